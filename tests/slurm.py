"""Slurm of two nodes on this machine, as far as it is installed; elsewhere what stands in for it.

The real one is a controller and two daemons, started here and ended here. What stands in has no queue and no daemons:
`srun` runs its command once for each node, on this machine, and `scancel` signals what that started.
"""

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

NODES = 2
CPUS = 2
START_SECONDS = 30.0

CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/none
CredType=cred/none
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus}
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

SRUN = """\
#!/bin/bash
for word in "$@"; do [[ $word == --ntasks=* ]] && count=${word#*=}; done
while [[ $1 == --* ]]; do shift; done
for ((i = 0; i < count; i++)); do
    SLURM_PROCID=$i "$@" &
    pids+=($!)
done
echo "${pids[@]}" >"$STAND_IN/$SLURM_JOB_ID.0"
code=0
trap : TERM  # it ends when what it started has ended
for pid in "${pids[@]}"; do
    while kill -0 "$pid" 2>/dev/null; do wait "$pid" || code=$?; done
done
exit $code
"""

SCANCEL = """\
#!/bin/bash
for word in "$@"; do [[ $word == --signal=* ]] && signal=${word#*=} || step=$word; done
kill -"$signal" $(<"$STAND_IN/$step")
"""


@dataclass(frozen=True)
class Ended:
    """A job that has ended. `log`: what it wrote, both streams."""

    id: int
    code: int
    log: str


class Slurm(Protocol):
    """What takes jobs."""

    def submit(self, folder: Path, environment: dict[str, str], *words: object) -> int:
        """Start a script with its arguments as a job, in a folder; its id."""

    def log(self, job: int) -> str:
        """What it has written so far."""

    def cancel(self, job: int) -> None:
        """End it before its time, as scancel does."""

    def ended(self, job: int) -> Ended | None:
        """How it has ended, if it has."""


class RealSlurm:
    """A controller and two daemons that run."""

    def __init__(self, config: Path) -> None:
        self._environment, self._folders = os.environ | {"SLURM_CONF": str(config)}, dict[int, Path]()

    def _ask(self, *command: str, **more: str) -> str:
        done = subprocess.run(
            command, env=self._environment | more, capture_output=True, text=True, timeout=60, check=True
        )
        return done.stdout

    def idle(self) -> bool:
        """Whether both nodes wait for work."""
        return self._ask("sinfo", "--noheader", "--Node", "--format=%t").split() == ["idle"] * NODES

    def submit(self, folder: Path, environment: dict[str, str], *words: object) -> int:
        options = ["--parsable", f"--chdir={folder}", f"--cpus-per-task={CPUS}", f"--nodes={NODES}"]
        job = int(self._ask("sbatch", *options, *map(str, words), **environment))
        self._folders[job] = folder
        return job

    def log(self, job: int) -> str:
        file = self._folders[job] / f"bigint8-{job}.log"
        return file.read_text() if file.exists() else ""

    def cancel(self, job: int) -> None:
        self._ask("scancel", str(job))

    def ended(self, job: int) -> Ended | None:
        words = self._ask("scontrol", "--oneliner", "show", "job", str(job)).split()
        told = dict(word.split("=", 1) for word in words if "=" in word)
        if told["JobState"] in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"):
            return None
        return Ended(job, int(told["ExitCode"].partition(":")[0]), self.log(job))


class StandIn:
    """Commands of Slurm's names, each doing here what the real one does on nodes."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._jobs = folder, dict[int, subprocess.Popen[bytes]]()
        for name, program in (("srun", SRUN), ("scancel", SCANCEL)):
            (folder / name).write_text(program)
            (folder / name).chmod(0o755)

    def submit(self, folder: Path, environment: dict[str, str], *words: object) -> int:
        job = len(self._jobs) + 1
        own = {
            "STAND_IN": str(self._folder), "PATH": f"{self._folder}:{environment.get('PATH', os.environ['PATH'])}",
            "SLURM_JOB_ID": str(job), "SLURM_JOB_NUM_NODES": str(NODES), "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_CPUS_PER_TASK": str(CPUS),
        }  # fmt: skip
        with (self._folder / f"{job}.log").open("wb") as log:
            self._jobs[job] = subprocess.Popen(
                ["bash", *map(str, words)], cwd=folder, env=os.environ | environment | own, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        return job

    def log(self, job: int) -> str:
        return (self._folder / f"{job}.log").read_text()

    def cancel(self, job: int) -> None:
        os.killpg(self._jobs[job].pid, signal.SIGTERM)  # the real one signals the script and all that its steps run

    def ended(self, job: int) -> Ended | None:
        code = self._jobs[job].poll()
        return None if code is None else Ended(job, code, self.log(job))

    def close(self) -> None:
        """End what a test has left."""
        for process in self._jobs.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[Slurm]:
    """Slurm, with its files in a folder."""
    if all(map(shutil.which, ("slurmctld", "slurmd", "sbatch", "scontrol"))) and os.geteuid() == 0:
        with _real(folder) as running:
            yield running
    else:
        stand_in = StandIn(folder)
        try:
            yield stand_in
        finally:
            stand_in.close()


@contextlib.contextmanager
def _real(folder: Path) -> Iterator[RealSlurm]:
    host = socket.gethostname().partition(".")[0]
    with contextlib.ExitStack() as probes:
        ports = [probes.enter_context(socket.create_server(("", 0))).getsockname()[1] for _ in range(1 + NODES)]
    (folder / "state").mkdir()
    for node in range(NODES):
        (folder / f"spool-node{node + 1}").mkdir()
    config = folder / "slurm.conf"
    config.write_text(CONFIG.format(host=host, ports=ports, user=getpass.getuser(), folder=folder, cpus=CPUS))
    commands = [["slurmctld", "-D"], *(["slurmd", "-D", "-N", f"node{node + 1}"] for node in range(NODES))]
    running = RealSlurm(config)
    with (folder / "daemons.log").open("wb") as log:
        environment = os.environ | {"SLURM_CONF": str(config)}
        daemons = [subprocess.Popen(command, env=environment, stdout=log, stderr=log) for command in commands]
        try:
            until = time.monotonic() + START_SECONDS
            while not _answers(running):
                assert time.monotonic() < until, (folder / "daemons.log").read_text()
                time.sleep(0.2)
            yield running
        finally:
            for daemon in reversed(daemons):
                daemon.terminate()
                daemon.wait(60)


def _answers(running: RealSlurm) -> bool:
    with contextlib.suppress(subprocess.CalledProcessError):
        return running.idle()
    return False
