"""A process that ends what a killed driver leaves of its own Ray cluster.

The kernel ends Ray's own processes with the driver that started them, and workers end when these are gone. But Ray's
agents, two processes on each node, first want to report that to a cluster which is not there any more, for minutes. So
a small program waits for the end of a pipe that only the driver holds, and kills them.
"""

import contextlib
import subprocess
import sys

import psutil

_PROGRAM = """
import os, signal, sys
if sys.stdin.buffer.read(1):
    sys.exit()  # the driver has ended the cluster itself
for pid in sys.argv[1:]:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            ours = b"ray" in file.read()
    except OSError:
        ours = not os.path.isdir("/proc/self")
    if ours:
        try:
            os.kill(int(pid), signal.SIGKILL)
        except OSError:
            pass
"""


class Leash:
    """What `processes` are to end with this one, whatever ends it. `release` it when they have ended otherwise."""

    def __init__(self, processes: list[int]) -> None:
        command = [sys.executable, "-E", "-S", "-c", _PROGRAM, *map(str, processes)]
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, start_new_session=True
        )

    def release(self) -> None:
        """End the program that waits."""
        with contextlib.suppress(OSError):
            self._process.communicate(b"x", timeout=5)


def agents_here() -> list[int]:
    """The processes that Ray's nodes have started which this process started."""
    nodes = [child for child in psutil.Process().children() if child.name() == "raylet"]
    return [child.pid for node in nodes for child in node.children(recursive=True)]
