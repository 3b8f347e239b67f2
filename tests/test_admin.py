"""A model loaded beside the one that is served, and served in its place, while requests go on."""

import gc
import os
import re
import signal
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import httpx
import psutil
import pytest
import torch
from folders import replace as replace_tensor
from folders import save_tokenizer
from serving import ADMIN_KEY, NAME, WAIT, WORK, loaded, save_model, serving, slow_down, until
from test_service import assert_refused, metrics_of
from test_service_faults import workers_of
from tiny import tiny_model

from bigint8.options import Cluster
from bigint8.plan.beside import left_beside
from bigint8.plan.devices import Box, cpu_device
from bigint8.run.settings import Settings
from bigint8.serve import ServeFlags, plan_beside
from bigint8.service.limits import ADMIN_VARIABLE

ADMIN = {"authorization": f"Bearer {ADMIN_KEY}"}
IDS, TOKENS = [5, 17, 99], 60


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("one") / "model", ends=False)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("two") / "model", ends=False, seed=7)


def words(pipeline, count=TOKENS, ids=IDS):
    """The likeliest answer of a model, without a service."""
    tokens = pipeline.engine.submit(ids, Settings(count)).result(WAIT).tokens
    return "".join(f" w{token}" for token in tokens if token)


@pytest.fixture(scope="module")
def answers(one, two):
    """What either model says, by its folder."""
    found = {}
    for folder in (one, two):
        with loaded(folder) as pipeline:
            found[folder] = words(pipeline)
    assert found[one] != found[two]
    return found


def opener_of(folder):
    """As `bigint8 serve FOLDER` plans other models."""
    flags = ServeFlags(model=str(folder), context=WORK.context, batch_size=WORK.sequences, dtype="float32")
    return partial(plan_beside, flags, Cluster("cpu"))


@pytest.fixture
def service(one):
    """A service of the first model, whose steps take a while, so that something happens meanwhile."""
    with loaded(one) as pipeline, serving(pipeline, ends=False, opener=opener_of(one)) as service:
        slow_down(pipeline)
        yield service


def ask_to_load(service, model, **more):
    return service.client.post("/admin/load", json={"model": str(model), **more}, headers=ADMIN)


def status(service):
    return service.client.get("/admin/load", headers=ADMIN).json()


def load(service, model, **more):
    """Load a model, and wait until the one before it is gone."""
    response = ask_to_load(service, model, **more)
    assert response.status_code == 202 and response.headers["location"] == "/admin/load", response.text
    until(lambda: status(service)["status"] in ("done", "failed"))
    return status(service)


def text(service, model=NAME, count=TOKENS):
    response = service.complete(model=model, max_tokens=count, temperature=0)
    return response.json()["choices"][0]["text"] if response.status_code == 200 else response.status_code


# --- the switch ----------------------------------------------------------------------------------------------------


def test_requests_under_way_end_on_the_old_model_and_new_ones_go_to_the_new(service, one, two, answers):
    engine = weakref.ref(service.pipeline.engine)
    before = metrics_of(service)
    asked = {"model": NAME, "prompt": "w5 w17 w99", "max_tokens": 600, "temperature": 0, "stream": True}
    expected = words(service.pipeline, 600)
    with ThreadPoolExecutor(4) as threads:
        begun = threading.Semaphore(0)

        def stream():
            with httpx.stream("POST", f"{service.url}/v1/completions", json=asked, timeout=WAIT) as response:
                found = []
                for line in response.iter_lines():
                    found += re.findall(r'"text":"([^"]*)"', line)
                    assert f'"model":"{NAME}"' in line or not line.startswith("data: {")
                    begun.release()
            return "".join(found)

        streams = [threads.submit(stream) for _ in range(3)]
        for _ in range(12):
            begun.acquire()
        assert service.client.get("/health").json() == {"status": "ok"}
        response = ask_to_load(service, two, name="other")
        assert response.status_code == 202
        said = response.json()
        assert (said["name"], said["model"], said["context"]) == ("other", str(two), WORK.context)
        assert said["stages"][0]["needed_bytes"] <= said["stages"][0]["usable_bytes"]
        until(lambda: status(service)["status"] == "draining")
        assert not any(each.done() for each in streams), "they still run on the old model"
        assert status(service)["old"] == NAME and status(service)["old_requests"] == 3
        assert [each["id"] for each in service.client.get("/v1/models").json()["data"]] == ["other"]
        assert_refused(service.complete(), 404, "model_not_found", "model")
        assert text(service, "other") == answers[two]
        during = metrics_of(service)
        assert during["bigint8_models",] == 2 and service.client.get("/stats").json()["model"] == "other"
        assert [each.result() for each in streams] == [expected] * 3
    until(lambda: status(service)["status"] == "done")
    stage = status(service)["stages"][0]
    assert stage["read_bytes"] == stage["total_bytes"] > 0
    after = metrics_of(service)
    assert after["bigint8_models",] == 1 and after["bigint8_loads_total", "done"] == 1
    made = after["bigint8_generated_tokens_total",] - before["bigint8_generated_tokens_total",]
    assert made == 4 * 600 + TOKENS, "what the old model made is still counted"
    assert service.pipeline.engine is None
    gc.collect()
    assert engine() is None, "somebody keeps the old model"


def test_the_same_model_is_updated_in_place_and_keeps_its_name(service, one, two, answers, tmp_path):
    folder = save_model(tmp_path / "model", ends=False)
    assert load(service, folder, name=NAME)["status"] == "done"
    assert text(service) == answers[one]
    save_model(folder, ends=False, seed=7)
    said = load(service, folder)
    assert (said["status"], said["name"]) == ("done", NAME)
    assert text(service) == answers[two]


def test_memory_of_an_old_model_is_given_back(tmp_path):
    """Loaded again and again, the process does not grow by a model."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 10, "num_attention_heads": 8}
    folder = tmp_path / "model"
    tiny_model("llama", False, torch.float16, max_position_embeddings=256, **sizes).save_pretrained(folder)
    save_tokenizer(folder)
    work = replace(WORK, context=256)
    flags = ServeFlags(model=str(folder), context=256, batch_size=4, dtype="float32")
    opener = partial(plan_beside, flags, Cluster("cpu"))
    with loaded(folder, work) as pipeline, serving(pipeline, ends=False, opener=opener) as service:
        weights = pipeline.plan.stages[0].weight_bytes
        assert weights > 36 * 2**20
        process, resident = psutil.Process(), []
        for _ in range(4):
            assert load(service, folder, name=NAME)["status"] == "done"
            assert service.complete(max_tokens=4).status_code == 200
            resident.append(process.memory_info().rss)
        assert resident[-1] - resident[0] < weights / 2, resident


# --- what does not work out ----------------------------------------------------------------------------------------


def test_a_model_that_has_no_room_is_refused_with_the_numbers_and_nothing_changes(service, two, answers, one):
    response = ask_to_load(service, two, batch_size=10**6)
    assert_refused_with_plan(response)
    assert status(service)["status"] == "failed" and metrics_of(service)["bigint8_loads_total", "refused"] == 1
    assert text(service) == answers[one]
    assert load(service, two, name="other")["status"] == "done", "another one may be asked for"


def assert_refused_with_plan(response):
    assert response.status_code == 409, response.text
    said = response.json()
    assert said["error"]["code"] == "no_room" and "does not fit" in said["error"]["message"]
    assert f"beside {NAME}" in said["error"]["message"]
    plan = said["plan"]
    assert plan["needed_bytes"] > plan["there_bytes"] > 0 and plan["short_bytes"] > 0 and plan["stages"]
    assert "sequences" in [way["change"] for way in plan["ways_out"]]


def test_a_load_that_fails_leaves_the_running_model_as_it_is(service, answers, one, tmp_path):
    folder = save_model(tmp_path / "model")
    replace_tensor(folder, "model.layers.3.mlp.up_proj.weight", lambda tensor: tensor[:, :1] * float("nan"))
    response = ask_to_load(service, folder)
    if response.status_code == 202:
        until(lambda: status(service)["status"] == "failed")
        assert "up_proj" in status(service)["error"]
    else:
        assert_refused(response, 400, "no_such_checkpoint", "model", said="up_proj")
    assert service.client.get("/health").json() == {"status": "ok"}
    assert text(service) == answers[one] and metrics_of(service)["bigint8_models",] == 1


def test_a_load_that_fails_while_it_reads_leaves_the_running_model_as_it_is(service, answers, one, two, tmp_path):
    """The file is cut short after it was planned."""
    folder = save_model(tmp_path / "model")
    opener = service.loads._opener

    def cut_short(request, running):
        planned = opener(request, running)
        for shard in folder.glob("*.safetensors"):
            os.truncate(shard, shard.stat().st_size // 2)
        return planned

    service.loads._opener = cut_short
    assert ask_to_load(service, folder).status_code == 202
    until(lambda: status(service)["status"] == "failed")
    assert "safetensors" in status(service)["error"]
    assert metrics_of(service)["bigint8_loads_total", "failed"] == 1
    service.loads._opener = opener
    assert text(service) == answers[one]
    assert load(service, two, name=NAME)["status"] == "done" and text(service) == answers[two]


def test_what_is_no_model_is_refused(service, tmp_path):
    assert_refused(ask_to_load(service, tmp_path / "nowhere"), 400, "no_such_checkpoint", "model", said="nowhere")
    assert_refused(ask_to_load(service, "w", batch=3), 400, "unknown_parameter", "batch")
    no_tokenizer = tmp_path / "plain"
    tiny_model("llama", False).save_pretrained(no_tokenizer)
    assert_refused(ask_to_load(service, no_tokenizer), 400, said="context=2048")
    assert_refused(ask_to_load(service, no_tokenizer, context=100), 400, said="tokenizer")
    assert metrics_of(service)["bigint8_models",] == 1


def test_while_one_is_loaded_another_is_refused(service, two):
    opener, gate = service.loads._opener, threading.Event()

    def gated(request, running):
        gate.wait(WAIT)
        return opener(request, running)

    service.loads._opener = gated
    with ThreadPoolExecutor() as threads:
        first = threads.submit(ask_to_load, service, two, name="other")
        until(lambda: status(service)["status"] == "planning")
        assert service.client.get("/health").json() == {"status": "ok", "loading": "other"}
        assert service.client.get("/stats").json()["load"]["name"] == "other"
        assert_refused(ask_to_load(service, two), 409, "load_under_way", "model", said="other is under way")
        gate.set()
        assert first.result().status_code == 202
    until(lambda: status(service)["status"] == "done")


# --- who may -------------------------------------------------------------------------------------------------------


def test_only_an_admin_key_opens_admin_and_it_opens_nothing_else(one, two):
    with loaded(one) as pipeline, serving(pipeline, keys=("client",), opener=opener_of(one)) as service:
        for key in ("", "Bearer client", "Bearer whoever", f"Basic {ADMIN_KEY}"):
            for method in ("GET", "POST"):
                response = service.client.request(method, "/admin/load", headers={"authorization": key})
                assert_refused(response, 401, "invalid_api_key", said=ADMIN_VARIABLE)
        assert service.client.get("/admin/load", headers=ADMIN).json() == {"status": "none"}
        assert_refused(service.client.get("/admin/else", headers=ADMIN), 404, "not_found")
        assert_refused(service.client.get("/v1/models", headers=ADMIN), 401, "invalid_api_key")


def test_without_an_admin_key_there_is_no_admin(one):
    with loaded(one) as pipeline, serving(pipeline) as service:
        for method in ("GET", "POST"):
            assert_refused(service.client.request(method, "/admin/load", headers=ADMIN), 404, "not_found")
        assert "/admin/load" not in service.client.get("/openapi.json").json()["paths"]


# --- what devices have left ----------------------------------------------------------------------------------------


def test_what_devices_have_left_is_what_was_there_less_what_was_promised_or_what_is_free_if_that_is_less():
    gpu = replace(cpu_device(), name="cuda:0", usable_bytes=100)
    other, far = replace(gpu, name="cuda:1"), replace(gpu, box=Box("far"))

    def left(taken, whole, now, one_box=False):
        return [device.usable_bytes for device in left_beside(taken, whole, now, one_box)]

    assert left([(gpu, 30)], [gpu, other, far], [gpu, other, far]) == [70, 100, 100]
    assert left([(gpu, 30)], [gpu], [replace(gpu, usable_bytes=50)]) == [50]
    assert left([(gpu, 130)], [gpu], [gpu]) == [0]
    assert left([(gpu, 30)], [other], [gpu]) == [100], "a device that nothing is known of is as it is measured"
    cpu = replace(gpu, name="cpu", usable_bytes=100)
    assert left([(cpu, 30), (cpu, 50)], [cpu, cpu], [cpu] * 3) == [40] * 3, "one memory for all of a box's workers"
    assert left([(replace(cpu, box=Box("by its host")), 30)], [cpu], [cpu], one_box=True) == [70]


# --- as a program, over two workers --------------------------------------------------------------------------------


@pytest.fixture
def program(one, tmp_path):
    """`bigint8 serve` over two CPU workers, and a client of it; its model is loaded."""
    log = (tmp_path / "log.txt").open("w+")
    command = [sys.executable, "-m", "bigint8.serve", str(one), "--gpus", "2", "--device", "cpu", "--port", "0"]
    options = ["--context", "2048", "--name", NAME, "--dtype", "float32", "--drain-seconds", "60"]
    environment = os.environ | {"COLUMNS": "200", ADMIN_VARIABLE: ADMIN_KEY}
    process = subprocess.Popen([*command, *options], stdout=log, stderr=log, env=environment)

    def address():
        assert process.poll() is None, (tmp_path / "log.txt").read_text()
        return re.search(r"listening on (http\S+);", (tmp_path / "log.txt").read_text())

    try:
        until(address)
        with httpx.Client(base_url=address()[1], timeout=WAIT) as client:
            until(lambda: client.get("/health").status_code == 200, 120)
            yield process, client, tmp_path / "log.txt"
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        log.close()


def test_over_workers_a_second_set_stands_beside_the_first_until_that_has_ended(program, one, two, answers):
    process, client, log = program

    def ask(model=NAME, **more):
        body = {"model": model, "prompt": "w5 w17 w99", "max_tokens": TOKENS, "temperature": 0, **more}
        return client.post("/v1/completions", json=body)

    def text_of(model=NAME):
        return ask(model).json()["choices"][0]["text"]

    def told():
        return client.get("/admin/load", headers=ADMIN).json()

    assert text_of() == answers[one]
    first = {worker.pid for worker in workers_of(process)}
    long = {"model": NAME, "prompt": "w5 w17 w99", "max_tokens": 1900, "temperature": 0, "stream": True}
    with client.stream("POST", "/v1/completions", json=long) as stream:
        lines = stream.iter_lines()
        next(lines)
        response = client.post("/admin/load", json={"model": str(two), "name": "other"}, headers=ADMIN)
        assert response.status_code == 202 and len(response.json()["stages"]) == 2, response.text
        rest = list(lines)
    assert rest[-2:] == ["data: [DONE]", ""] and '"finish_reason":"length"' in rest[-4]
    until(lambda: told()["status"] == "done")
    assert text_of("other") == answers[two]
    until(lambda: not first & {worker.pid for worker in workers_of(process)})  # they have ended, with their memory
    second = {worker.pid for worker in workers_of(process)}
    assert len(second) == 2

    refused = client.post("/admin/load", json={"model": str(two), "batch_size": 10**6}, headers=ADMIN)
    assert refused.status_code == 409 and refused.json()["plan"]["short_bytes"] > 0
    until(lambda: {worker.pid for worker in workers_of(process)} == second)
    workers_of(process)[0].send_signal(signal.SIGKILL)
    assert text_of("other") == answers[two], "a worker that stands in a shared place is started again too"

    children = psutil.Process(process.pid).children(recursive=True)
    with ThreadPoolExecutor() as threads:
        threads.submit(client.post, "/admin/load", json={"model": str(one)}, headers=ADMIN)
        until(lambda: told()["status"] in ("planning", "loading"))
        children += psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, log.read_text()
    assert "Traceback" not in log.read_text(), log.read_text()
    assert not psutil.wait_procs(children, 10)[1], "all that it started has ended"
