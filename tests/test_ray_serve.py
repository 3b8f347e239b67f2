"""The service on a Ray cluster: deployed by Serve as the KubeRay recipe has it, beside the job of the other one.

Both run on one cluster of this machine, over the same tiny model, and answer the same.
"""

import json
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import yaml
from job_cluster import JobCluster, job_cluster
from openai import APIStatusError, AuthenticationError, BadRequestError, OpenAI
from pydantic import ValidationError
from serving import NAME, WAIT, loaded, save_model, until

from bigint8 import BigInt8Error, WorkerError
from bigint8.service.state import Model, State

LAUNCH = Path(__file__).parent.parent / "launch"
KEY = "a-key"
PROMPT = "w5 w17 w99"
TOKENS = 24

sys.path.append(str(LAUNCH))  # as the image has it
import serve_app  # noqa: E402


def manifest(name: str) -> dict[str, Any]:
    """A Kubernetes manifest of launch/."""
    found: dict[str, Any] = yaml.safe_load((LAUNCH / name).read_text())
    return found


@dataclass(frozen=True)
class Deployed:
    """A service that Serve runs, where its proxy listens, and the cluster."""

    cluster: JobCluster
    folder: Path
    url: str

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=WAIT)

    def ask_dashboard(self, method: str, path: str, json: Any = None) -> Any:
        url, headers = self.cluster.address + path, self.cluster.headers
        response = httpx.request(method, url, json=json, headers=headers, timeout=WAIT)
        response.raise_for_status()
        return response.json() if response.content else None

    def deploy(self, config: dict[str, Any]) -> None:
        """What `serve deploy` does, with the same command."""
        file = self.folder.parent / "serve.yaml"
        file.write_text(yaml.safe_dump(config))
        command = ["serve", "deploy", "--address", self.cluster.address, str(file)]
        done = subprocess.run(
            command, env=self.cluster.environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.ask_dashboard("GET", "/api/serve/applications/")["applications"].get("bigint8", {})
        return found

    def living(self, what: str, gone: str) -> list[dict[str, Any]]:
        """The actors or placement groups that the cluster still has."""
        found = self.ask_dashboard("GET", f"/api/v0/{what}?detail=1")["data"]["result"]["result"]
        return [each for each in found if each["state"] != gone]

    def stats(self) -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(f"{self.url}/stats", headers={"Authorization": f"Bearer {KEY}"}).json()
        return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / NAME, ends=False)


@pytest.fixture(scope="module")
def deployed(folder: Path) -> Iterator[Deployed]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    config = yaml.safe_load(manifest("kuberay-service.yaml")["spec"]["serveConfigV2"])
    (application,) = config["applications"]
    application["args"] |= {"model": str(folder), "name": NAME, "gpus": 2, "device": "cpu"}
    config["http_options"] = {"host": "127.0.0.1", "port": port}
    with job_cluster(PYTHONPATH=python_path(), BIGINT8_API_KEY=KEY) as cluster:
        there = Deployed(cluster, folder, f"http://127.0.0.1:{port}")
        there.deploy(config)
        until(lambda: there.status().get("status") in ("RUNNING", "DEPLOY_FAILED"), 180)
        assert there.status()["status"] == "RUNNING", there.status()["message"]
        yield there


def python_path() -> str:
    return ":".join(path for path in sys.path if path)


# --- what it is asked for ----------------------------------------------------------------------------------------


def test_the_command_of_the_readme_is_one_that_serve_takes_and_its_arguments_are_those_of_the_application() -> None:
    from ray.serve.scripts import run

    lines = (LAUNCH / "README.md").read_text().splitlines()
    (words,) = (shlex.split(line)[2:] for line in lines if line.startswith("serve run "))
    taken = run.make_context("run", words).params
    assert (taken["app_dir"], taken["working_dir"], taken["blocking"]) == ("launch", "launch", False)
    module, _, builder = taken["config_or_import_path"].partition(":")
    assert (LAUNCH / f"{module}.py").is_file() and getattr(serve_app, builder) is serve_app.build
    given = serve_app.Arguments.model_validate(dict(word.split("=") for word in taken["arguments"]))
    assert given.gpus == 4 and given.drain_seconds == 30


def test_an_argument_that_nobody_knows_or_that_is_wrong_is_refused_before_anything_starts() -> None:
    with pytest.raises(ValidationError, match="gpu\n"):
        serve_app.Arguments.model_validate({"model": "opt-125m", "gpu": "2"})
    with pytest.raises(BigInt8Error, match="max_body much"):
        serve_app.build(serve_app.Arguments(model="opt-125m", max_body="much"))


def test_a_replica_takes_no_device_and_gives_requests_their_time_to_end() -> None:
    options = serve_app.build(serve_app.Arguments(model="opt-125m", drain_seconds=7))._bound_deployment
    assert options.num_replicas == 1
    assert (options.ray_actor_options["num_cpus"], options.ray_actor_options["num_gpus"]) == (0, 0)
    assert options._deployment_config.graceful_shutdown_timeout_s > 7


def test_an_engine_that_has_ended_for_good_is_unhealthy_and_one_that_runs_is_not(folder: Path) -> None:
    state = State(NAME)
    with loaded(folder) as pipeline:
        state.open(Model.of(pipeline, NAME))
        replica = SimpleNamespace(_state=state)
        serve_app.Bigint8.check_health(replica)
        assert pipeline.engine is not None
        pipeline.engine.close()
        with pytest.raises(WorkerError, match="the engine has ended"):
            serve_app.Bigint8.check_health(replica)


# --- what it answers ---------------------------------------------------------------------------------------------


def test_a_service_streams_and_completes_what_a_job_on_the_same_cluster_generates(
    deployed: Deployed, tmp_path: Path
) -> None:
    written, log = run_job(deployed, tmp_path)
    expected = written["generations"][0]["text"]
    asked: dict[str, Any] = {"model": NAME, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
    whole = deployed.client.completions.create(**asked)
    pieces = [chunk.choices[0].text for chunk in deployed.client.completions.create(**asked, stream=True)]
    assert whole.choices[0].text == "".join(pieces)
    assert whole.choices[0].text.split() == expected.split()  # one word a token
    assert len(expected.split()) == TOKENS and len([piece for piece in pieces if piece]) > TOKENS // 2

    assert [load["bytes_read"] > 0 for load in written["load"]] == [True, True]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", log), "a log is lines of text"
    assert re.search(r"^worker [01] \(.*: (\S+ kB) of \1$", log, re.MULTILINE), "progress in lines"
    assert max(map(len, log.splitlines())) > 100 and "blocks" in log, "tables are not folded into 80 columns"


def run_job(deployed: Deployed, tmp_path: Path) -> tuple[dict[str, Any], str]:
    """The file and the log that the job of the recipe leaves, over two workers and for the prompt of these tests."""
    words = shlex.split(manifest("kuberay-job.yaml")["spec"]["entrypoint"])
    result = tmp_path / "out.json"
    others = {"--model": deployed.folder, "--gpus": 2, "--prompt": PROMPT, "--json": result}
    for flag, value in others.items():
        words[words.index(flag) + 1] = str(value)
    more = ["--raw", "--device", "cpu", "--max-new-tokens", str(TOKENS)]
    submit = ["ray", "job", "submit", "--address", deployed.cluster.address, "--log-color=false", "--"]
    environment = deployed.cluster.environment
    done = subprocess.run(
        [*submit, *words, *more], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (job,) = deployed.ask_dashboard("GET", "/api/jobs/")
    return json.loads(result.read_text()), deployed.ask_dashboard("GET", f"/api/jobs/{job['submission_id']}/logs")[
        "logs"
    ]


def test_it_is_the_same_service_with_its_key_its_health_and_its_errors(deployed: Deployed) -> None:
    assert httpx.get(f"{deployed.url}/health").json() == {"status": "ok"}
    with pytest.raises(AuthenticationError):
        OpenAI(base_url=f"{deployed.url}/v1", api_key="another", max_retries=0).models.list()
    assert [model.id for model in deployed.client.models.list()] == [NAME]
    with pytest.raises(BadRequestError, match="max_token: there is no such parameter"):
        deployed.client.completions.create(model=NAME, prompt="w1", extra_body={"max_token": 3})
    with pytest.raises(APIStatusError, match="8,388,608 bytes"):
        deployed.client.completions.create(model=NAME, prompt="w1 " * 3_000_000)


def test_a_client_that_hangs_up_frees_its_pages(deployed: Deployed) -> None:
    asked: dict[str, Any] = {"model": NAME, "prompt": PROMPT, "max_tokens": 2000, "stream": True}
    stream = deployed.client.completions.create(**asked)
    next(iter(stream))
    assert deployed.stats()["running"] == 1
    stream.close()
    until(lambda: (now := deployed.stats())["running"] == 0 and now["free_pages"] == now["pages"])


# --- how it ends -------------------------------------------------------------------------------------------------


def test_an_application_that_is_no_longer_deployed_ends_its_requests_first_and_leaves_no_worker(
    deployed: Deployed,
) -> None:
    """`serve shutdown` would end Serve's proxies at once, and with them what they stream."""
    stream = iter(
        deployed.client.completions.create(
            model=NAME,
            prompt=PROMPT,
            max_tokens=1000,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    next(stream)
    deployed.ask_dashboard("PUT", "/api/serve/applications/", json={"applications": []})
    until(lambda: deployed.status().get("status") == "DELETING")
    *_, usage = stream
    assert usage.usage is not None and usage.usage.completion_tokens == 1000
    until(lambda: not deployed.status())
    workers = ("Worker", "ServeReplica:bigint8:bigint8")
    until(lambda: not [actor for actor in deployed.living("actors", "DEAD") if actor["class_name"] in workers])
    assert deployed.living("placement_groups", "REMOVED") == []
