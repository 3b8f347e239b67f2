"""Recipes of launch/ as files: containers, Kubernetes, and what the README says of all.

Each is held to the real tool where it is installed, and to what the tool's own description says where it is not.
"""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from jsonschema import ValidationError, validate
from serving import until

import bigint8.launch
import bigint8.serve

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"


# --- containers --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((LAUNCH / "compose.yaml").read_text())
    return found


def of_compose(**variables: str) -> subprocess.CompletedProcess[str]:
    """What compose makes of the file, where one of its two commands is installed."""
    commands = (["docker", "compose"], ["docker-compose"])
    there = [command for command in commands if shutil.which(command[0]) and _works([*command, "version"])]
    if not there:
        pytest.skip("neither `docker compose` nor docker-compose is installed here")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BIGINT8_")} | variables
    words = [*there[0], "--file", LAUNCH / "compose.yaml", "config"]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60, check=False)


def _works(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0


def test_compose_accepts_its_file_and_asks_for_a_model() -> None:
    refused = of_compose()
    assert refused.returncode != 0 and "name a model" in refused.stderr
    taken = of_compose(BIGINT8_MODEL="/models/m", BIGINT8_FLAGS="--gpus 2", BIGINT8_API_KEY="k")
    assert taken.returncode == 0, taken.stderr
    (service,) = yaml.safe_load(taken.stdout)["services"].values()
    words = service["command"] if isinstance(service["command"], list) else shlex.split(service["command"])
    assert words[:2] == ["serve", "/models/m"] and words[-2:] == ["--gpus", "2"]


COMPOSE_SERVICE = {
    "build", "image", "command", "environment", "ports", "volumes", "deploy", "init", "shm_size", "ulimits", "cap_drop",
    "security_opt", "stop_grace_period", "restart", "healthcheck",
}  # fmt: skip
"""Keys of a service that the file uses, all of which schema/compose-spec.json of compose-spec/compose-spec has."""


def test_a_container_gets_the_gpus_and_is_stopped_later_than_its_requests(compose: dict[str, Any]) -> None:
    (service,) = compose["services"].values()
    assert set(compose) == {"services", "volumes"} and set(service) == COMPOSE_SERVICE
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    words = service["command"].split()
    drain = int(words[words.index("--drain-seconds") + 1])
    assert drain < int(service["stop_grace_period"].removesuffix("s"))
    assert service["ports"] == ["${BIGINT8_ADDRESS:-127.0.0.1}:${BIGINT8_PORT:-8000}:8000"], "only this machine"
    assert service["environment"] == ["BIGINT8_API_KEY"], "handed on if it is set; the file has no key"


def test_the_probe_of_the_container_says_whether_the_service_answers(compose: dict[str, Any], tmp_path: Path) -> None:
    (service,) = compose["services"].values()
    _, python, *rest = service["healthcheck"]["test"]
    assert python == "python"
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    words = [sys.executable, *(word.replace("8000", str(port)) for word in rest)]
    assert subprocess.run(words, capture_output=True, timeout=60, check=False).returncode != 0
    (tmp_path / "health").write_text("{}")
    command = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", "--directory", tmp_path, str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: subprocess.run(words, capture_output=True, timeout=60, check=False).returncode == 0)
    finally:
        server.terminate()
        server.wait()


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's, each with what stands after it on all of its lines."""
    lines = [line for line in (LAUNCH / "Dockerfile").read_text().splitlines() if line and not line.startswith("#")]
    found = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in found]


def test_an_image_is_made_of_files_that_are_there_and_are_sent_to_the_builder() -> None:
    sent = (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()
    copied = {name for word, rest in instructions() if word == "COPY" for name in rest.split()[:-1]}
    assert all((ROOT / name).exists() for name in copied)
    assert {f"!{name}" for name in copied} == {line for line in sent if line.startswith("!")}
    assert sent.index("*") < min(sent.index(f"!{name}") for name in copied)


def test_an_image_installs_extras_that_there_are_and_runs_a_command_that_there_is() -> None:
    commands = " ".join(rest for word, rest in instructions() if word == "RUN")
    extras = set(re.findall(r'"\.\[([\w,]+)\]"', commands)[0].split(","))
    section = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    assert extras <= set(re.findall(r"^(\w+) = \[", section, re.MULTILINE))
    assert ("ENTRYPOINT", '["bigint8"]') in instructions()
    assert ("USER", "bigint8") in instructions(), "not root"
    subprocess.run(["sh", "-n", "-c", commands], check=True)


# --- Kubernetes --------------------------------------------------------------------------------------------------


def closed(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    """A schema of an object that has no other keys than these."""
    return {
        "type": "object", "properties": properties, "required": list(required), "additionalProperties": False,
    }  # fmt: skip


TEXT, NUMBER, ANY = {"type": "string"}, {"type": "integer"}, {"type": "object"}
SIZES = {"type": "object", "additionalProperties": TEXT}
CONTAINER = closed(
    {
        "name": TEXT, "image": TEXT, "env": {"type": "array"},
        "resources": closed({"requests": SIZES, "limits": SIZES}),
        "volumeMounts": {"type": "array", "items": closed({"name": TEXT, "mountPath": TEXT, "readOnly": {}}, "name")},
    },
    "name", "image",
)  # fmt: skip
POD = closed({
    "spec": closed(
        {
            "securityContext": ANY, "containers": {"type": "array", "items": CONTAINER}, "volumes": {"type": "array"},
            "terminationGracePeriodSeconds": NUMBER,
        },
        "containers",
    )
})  # fmt: skip
RAY_CLUSTER = closed(
    {
        "rayVersion": TEXT,
        "authOptions": closed({"mode": {"enum": ["disabled", "token"]}}),
        "headGroupSpec": closed({"rayStartParams": SIZES, "template": POD}, "template"),
        "workerGroupSpecs": {
            "type": "array",
            "items": closed(
                {
                    "groupName": TEXT, "replicas": NUMBER, "minReplicas": NUMBER, "maxReplicas": NUMBER,
                    "rayStartParams": SIZES, "template": POD,
                },
                "groupName", "minReplicas", "maxReplicas", "template",
            ),
        },
    },
    "headGroupSpec",
)  # fmt: skip
SPECS = {
    "RayJob": closed({
        "entrypoint": TEXT, "backoffLimit": NUMBER, "submitterConfig": closed({"backoffLimit": NUMBER}),
        "shutdownAfterJobFinishes": {"type": "boolean"}, "ttlSecondsAfterFinished": NUMBER,
        "rayClusterSpec": RAY_CLUSTER,
    }),
    "RayService": closed(
        {
            "upgradeStrategy": closed({"type": {"enum": ["None", "NewCluster"]}}), "serveConfigV2": TEXT,
            "rayClusterConfig": RAY_CLUSTER,
        },
        "rayClusterConfig",
    ),
}  # fmt: skip
"""The part that the manifests use of what KubeRay's resources are, as its release 1.7 has them
(ray-operator/config/crd/bases in ray-project/kuberay), with the types that it gives them."""


@pytest.mark.parametrize("kind", SPECS)
def test_a_manifest_has_the_fields_that_kuberay_knows(kind: str) -> None:
    name = {"RayJob": "kuberay-job.yaml", "RayService": "kuberay-service.yaml"}[kind]
    manifest = yaml.safe_load((LAUNCH / name).read_text())
    head = {"apiVersion": {"const": "ray.io/v1"}, "kind": {"const": kind}, "metadata": closed({"name": TEXT}, "name")}
    schema = closed({**head, "spec": SPECS[kind]}, "apiVersion", "kind", "metadata", "spec")
    validate(manifest, schema)
    with pytest.raises(ValidationError):
        validate({**manifest, "spec": {**manifest["spec"], "entryPoint": "x"}}, schema)


@pytest.mark.parametrize("name", ["kuberay-job.yaml", "kuberay-service.yaml"])
def test_pods_of_a_manifest_have_the_volumes_that_they_mount_and_the_image_that_is_built(name: str) -> None:
    spec = yaml.safe_load((LAUNCH / name).read_text())["spec"]
    cluster = spec.get("rayClusterSpec") or spec["rayClusterConfig"]
    assert f"ray=={cluster['rayVersion']}" in (ROOT / "constraints.txt").read_text().splitlines()
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for pod in (group["template"]["spec"] for group in groups):
        (container,) = pod["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert f"--uid {pod['securityContext']['runAsUser']}" in (LAUNCH / "Dockerfile").read_text()
    (workers,) = cluster["workerGroupSpecs"]
    gpus = int(workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    text = spec.get("entrypoint", "").replace("--gpus ", "gpus: ") + spec.get("serveConfigV2", "")
    assert int(re.findall(r"gpus: (\d+)", text)[0]) == workers["replicas"] * gpus


# --- all of them -------------------------------------------------------------------------------------------------


def test_what_the_readme_names_is_there_and_nothing_else() -> None:
    named = set(re.findall(r"^\| `([\w.-]+)`", (LAUNCH / "README.md").read_text(), re.MULTILINE))
    assert named == {file.name for file in LAUNCH.iterdir() if file.is_file()} - {"README.md"}


@pytest.mark.parametrize("file", sorted(LAUNCH.iterdir()), ids=lambda file: file.name)
def test_flags_that_recipes_give_bigint8_are_flags_that_it_has(file: Path) -> None:
    if file.is_dir():
        pytest.skip("compiled files of Python")
    known = {"serve": flags_of(bigint8.serve.app), "launch": flags_of(bigint8.launch.app)}
    text = file.read_text().replace("\\\n", " ").replace("\n    --prompt", " --prompt")
    for command, rest in re.findall(r"\bbigint8[ .](serve|launch)\b([^\n`|]*)", text):
        given = set(re.findall(r"(?<!\S)--[a-z][a-z-]+", rest))
        assert given <= known[command], (file.name, rest)


def flags_of(app: typer.Typer) -> set[str]:
    command = typer.main.get_command(app)
    return {name for parameter in command.params for name in parameter.opts}
