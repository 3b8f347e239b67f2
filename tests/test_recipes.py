"""The recipes of launch/: Ray accepts the cluster file, and submit.sh really submits, to a cluster that runs here."""

import copy
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from job_cluster import JobCluster, job_cluster

ROOT = Path(__file__).parent.parent
SUBMIT = ROOT / "launch" / "submit.sh"


@pytest.fixture(scope="module")
def cluster() -> Iterator[JobCluster]:
    with job_cluster() as running:
        yield running


def submit(cluster: JobCluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(SUBMIT), cluster.address, "--", *arguments]
    return subprocess.run(command, env=cluster.environment, capture_output=True, text=True, timeout=600)


# --- the cluster file --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipe() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "launch" / "ray-cluster.yaml").read_text())
    return loaded


def test_cluster_file_is_valid_for_ray(recipe: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(recipe))
    validate_config(prepared)
    (node,) = prepared["available_node_types"].values()
    assert (node["min_workers"], node["max_workers"]) == (2, 2)  # all boxes, always
    assert prepared["head_start_ray_commands"] == recipe["head_start_ray_commands"]


def test_a_key_that_ray_does_not_know_would_be_noticed(recipe: dict[str, Any]) -> None:
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import prepare_config, validate_config

    with pytest.raises(ValidationError, match="setup_command"):
        validate_config(prepare_config(recipe | {"setup_command": []}))


def test_cluster_file_starts_ray_with_options_that_it_has(recipe: dict[str, Any]) -> None:
    from ray.scripts.scripts import start

    for role in ("head", "worker"):
        *_, line = recipe[f"{role}_start_ray_commands"]
        arguments = line.partition("ray start ")[2].replace("$RAY_HEAD_IP", "192.0.2.1").split()
        options = start.make_context("start", arguments).params
        assert options["head"] == (role == "head")
        assert (options["port"] or options["address"]) in (6379, "192.0.2.1:6379")


def test_commands_of_the_cluster_file_are_shell(recipe: dict[str, Any]) -> None:
    commands = [line for key, lines in recipe.items() if key.endswith("_commands") for line in lines]
    assert len(commands) == 6
    for command in commands:
        subprocess.run(["bash", "-n", "-c", command], check=True)


# --- submit.sh ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["--"], ["http://127.0.0.1:1"], ["a", "b", "--", "c"]])
def test_submit_says_how_to_use_it(arguments: list[str]) -> None:
    done = subprocess.run([str(SUBMIT), *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "usage: launch/submit.sh [ADDRESS] -- ARGUMENTS..." in done.stderr


def test_submit_without_a_cluster_there_fails(cluster: JobCluster) -> None:
    environment = cluster.environment | {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:1"}
    command = [str(SUBMIT), "--", "--model", "smollm2-135m"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "http://127.0.0.1:1" in done.stdout + done.stderr


def test_submitted_job_generates_text_over_two_workers_and_arguments_arrive_unchanged(cluster: JobCluster) -> None:
    prompt = "The capital of France is"
    odd = """He said: "it's $HOME, `id` \\ and *"  twice;"""
    prompts = ["--raw", "--prompt", prompt, "--prompt", odd]
    done = submit(cluster, "--model", "smollm2-135m", "--gpus", "2", *prompts, "--max-new-tokens", "8")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{prompt} Paris" in done.stdout
    assert f"\n{odd}" in done.stdout


def test_a_job_that_fails_is_a_failure(cluster: JobCluster) -> None:
    done = submit(cluster, "--model", "no-such-model/")
    assert done.returncode == 1
    assert "error: no-such-model/" in done.stdout


def test_a_job_that_is_stopped_is_a_failure(cluster: JobCluster) -> None:
    command = [
        str(SUBMIT),
        cluster.address,
        "--",
        "--model",
        "smollm2-135m",
        "--prompt",
        "x",
        "--max-new-tokens",
        "2000",
    ]
    watcher = subprocess.Popen(command, env=cluster.environment, stdout=subprocess.PIPE, text=True)
    assert watcher.stdout is not None
    found = next(filter(None, (re.search(r"Job '(.+?)' submitted", line) for line in watcher.stdout)))
    stop = ["ray", "job", "stop", "--address", cluster.address, found[1]]
    subprocess.run(stop, env=cluster.environment, check=True, capture_output=True, timeout=120)
    rest, _ = watcher.communicate(timeout=120)
    assert f"'{found[1]}' was stopped" in rest
    assert watcher.returncode == 1


def test_cluster_listens_on_loopback_only(cluster: JobCluster) -> None:
    listening = set()
    for process in cluster.process.children(recursive=True):
        try:
            connections = process.net_connections("inet")
        except psutil.NoSuchProcess:
            continue
        listening |= {c.laddr.ip.removeprefix("::ffff:") for c in connections if c.status == psutil.CONN_LISTEN}
    assert listening
    assert listening <= {"127.0.0.1", "::1"}
