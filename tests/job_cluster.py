"""A Ray cluster of its own process, for tests that submit jobs and applications to it: with a token, on loopback."""

import contextlib
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

CLUSTER = """
import socket, sys
from ray.cluster_utils import Cluster
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
cluster = Cluster(
    initialize_head=True,
    head_node_args=dict(
        num_cpus=4, object_store_memory=2**28, include_dashboard=True, dashboard_host="127.0.0.1", dashboard_port=port,
        dashboard_agent_listen_port=0,
    ),
)
print(cluster.webui_url, flush=True)
sys.stdin.read()
cluster.shutdown()
"""
"""Runs a cluster until its stdin ends: `ray.init`, but beside another one its agent, which takes jobs, finds a port."""


@dataclass(frozen=True)
class JobCluster:
    """A cluster that runs, and what a client of it has in its environment."""

    address: str
    process: psutil.Process
    environment: dict[str, str]

    @property
    def headers(self) -> dict[str, str]:
        """What a request to its dashboard must bear."""
        return {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}


@contextlib.contextmanager
def job_cluster(**variables: str) -> Iterator[JobCluster]:
    """A cluster with places for four CPU workers. `variables` are further ones of its environment."""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # pytest's are too long for Ray's sockets
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # everything binds to loopback
            "RAY_TMPDIR": folder,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            **variables,
        }
        environment.pop("RAY_ADDRESS", None)
        process = subprocess.Popen(
            [sys.executable, "-c", CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert process.stdin is not None and process.stdout is not None
        try:
            address = process.stdout.readline().strip()
            assert address, "the cluster did not start"
            yield JobCluster(f"http://{address}", psutil.Process(process.pid), environment)
        finally:
            process.stdin.close()
            process.wait(120)
