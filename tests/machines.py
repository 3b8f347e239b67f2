"""Machines on one machine: each has a network, a host name, processes, mounts and shared memory of its own.

A machine is a set of Linux namespaces, which a process holds. When that one ends, the kernel ends every process of the
machine and takes the network away, so nothing is left behind however a test ends. Two machines are joined by a cable, a
pair of virtual network devices, which can be pulled.
"""

import contextlib
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

CABLE = "b8"
"""The network device of each machine."""

NAMESPACES = ("--net", "--mount", "--uts", "--ipc", "--pid")
ROOT = Path(__file__).parents[1]
PORT = 6379
OBJECT_STORE_BYTES = 2**27
START_SECONDS = 120


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@dataclass
class Machine:
    """`environment`: of everything that runs there. `holder`: the process that holds it, as this machine counts."""

    name: str
    address: str
    environment: dict[str, str]
    _holder: "subprocess.Popen[str] | None" = None
    _others: list["subprocess.Popen[str]"] = field(default_factory=list)

    def power_on(self) -> None:
        """Make the namespaces. Raises OSError, CalledProcessError where that is not permitted."""
        command = ["unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc", "sh", "-c"]
        script = f"hostname {self.name} && mount -t tmpfs tmpfs /dev/shm && ip link set lo up && echo on && exec cat"
        self._holder = subprocess.Popen(
            [*command, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )  # it ends when its stdin does: when this process is gone
        assert self._holder.stdout is not None and self._holder.stderr is not None
        if self._holder.stdout.readline() != "on\n":
            raise OSError(self._holder.stderr.read())

    @property
    def pid(self) -> int:
        """Of the first process in its namespaces."""
        assert self._holder is not None
        children = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children").read_text().split()
        return int(children[0])

    def power_off(self) -> None:
        """End all that runs there at once, as when the power fails."""
        if self._holder is not None:
            self._holder.kill()
        for process in [*filter(None, [self._holder]), *self._others]:
            for stream in (process.stdin, process.stdout, process.stderr):
                with contextlib.suppress(OSError):  # it did not read what it was sent
                    assert stream is not None
                    stream.close()
            process.wait()
        self._holder, self._others = None, []

    def start(self, *command: object, **environment: str) -> "subprocess.Popen[str]":
        """A process there, which ends with the machine."""
        words = ["nsenter", "--target", str(self.pid), *NAMESPACES, "--", *map(str, command)]
        process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment | environment,
        )
        self._others.append(process)
        return process

    def run(self, *command: object, **environment: str) -> "subprocess.CompletedProcess[str]":
        """What a command there prints, once it has ended."""
        process = self.start(*command, **environment)
        out, error = process.communicate(timeout=600)
        self._others.remove(process)
        return subprocess.CompletedProcess(process.args, process.returncode, out, error)

    def python(self, *words: object, **environment: str) -> "subprocess.CompletedProcess[str]":
        return self.run(sys.executable, *words, **environment)

    def empty(self, folder: Path) -> None:
        """Let a folder be empty there, and have a disk of its own."""
        done = self.run("mount", "-t", "tmpfs", "tmpfs", folder)
        assert done.returncode == 0, done.stderr

    def put(self, what: Path, at: Path) -> None:
        """Let a folder or file of this machine stand in another's place there, until `take_away`."""
        done = self.run("mount", "--bind", what, at)
        assert done.returncode == 0, done.stderr

    def take_away(self, at: Path) -> None:
        """Show what was there before `put`."""
        done = self.run("umount", "--lazy", at)
        assert done.returncode == 0, done.stderr


@dataclass
class TwoMachines:
    """Machines `first` and `second` with a cable between them. Each has an empty folder of its own at `temporary`."""

    first: Machine
    second: Machine
    temporary: Path

    @property
    def address(self) -> str:
        """Of the Ray cluster, once `start_ray` was called."""
        return f"{self.first.address}:{PORT}"

    def __iter__(self) -> Iterator[Machine]:
        return iter((self.first, self.second))

    def power_on(self) -> None:
        for machine in self:
            machine.power_on()
            machine.empty(self.temporary)
        one, other = (str(machine.pid) for machine in self)
        ip("link", "add", CABLE, "netns", one, "type", "veth", "peer", "name", CABLE, "netns", other)
        for machine in self:
            for words in (
                ["ip", "addr", "add", f"{machine.address}/24", "dev", CABLE],
                ["ip", "link", "set", CABLE, "up"],
            ):
                done = machine.run(*words)
                assert done.returncode == 0, done.stderr

    def start_ray(self, cpus: int = 2) -> None:
        """A Ray cluster of both machines; `first` is its head. Returns once both nodes are there."""
        size = f"--object-store-memory={OBJECT_STORE_BYTES}"
        common = ["--block", f"--num-cpus={cpus}", "--disable-usage-stats", size]
        for machine, words in (
            (
                self.first,
                ["--head", f"--port={PORT}", "--include-dashboard=false", f"--temp-dir={self.temporary}"],
            ),
            (self.second, [f"--address={self.address}"]),
        ):
            process = machine.start(RAY, "start", *words, f"--node-ip-address={machine.address}", *common)
            self._wait_for_ray(process, 1 + (machine is self.second))

    def _wait_for_ray(self, process: "subprocess.Popen[str]", nodes: int) -> None:
        program = (
            "import ray, sys\nray.init(sys.argv[1], log_to_driver=False, logging_level='ERROR')\n"
            "sys.exit(sum(node['Alive'] for node in ray.nodes()) != int(sys.argv[2]))"
        )
        until = time.monotonic() + START_SECONDS
        while (done := self.first.python("-c", program, self.address, nodes)).returncode:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until, done.stderr

    def cut(self) -> None:
        """Pull the cable: nothing that is sent arrives any more, and nobody is told."""
        self._cable("down")

    def mend(self) -> None:
        """Put the cable back."""
        self._cable("up")

    def _cable(self, state: str) -> None:
        done = self.second.run("ip", "link", "set", CABLE, state)
        assert done.returncode == 0, done.stderr

    def power_off(self) -> None:
        for machine in self:
            machine.power_off()


RAY = Path(sys.executable).parent / "ray"


def environment_for(cache: Path, token: str) -> dict[str, str]:
    """Of whatever runs on the machines: this process's, and the token of their Ray cluster."""
    own = {
        "BIGINT8_CACHE": str(cache),
        "COLUMNS": "200",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | own


@contextlib.contextmanager
def two_machines(cache: Path) -> Iterator[TwoMachines]:
    """Two machines that are joined; skips the test, with the reason, where namespaces are not permitted."""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # tmp_path is too long for Ray's sockets
        environment = environment_for(cache, secrets.token_hex(32))
        machines = TwoMachines(
            Machine("box-a", "10.231.78.1", dict(environment)),
            Machine("box-b", "10.231.78.2", dict(environment)),
            Path(folder),
        )
        try:
            try:
                machines.power_on()
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(f"machines of namespaces cannot be made here: {error}")
            yield machines
        finally:
            machines.power_off()
