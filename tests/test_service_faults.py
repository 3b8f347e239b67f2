"""What clients, signals and dying workers do to a service: it goes on, gives room back, and says how it is."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import psutil
import pytest
from serving import NAME, WAIT, Service, loaded, save_model, serving, slow_down, until
from test_service import assert_refused

from bigint8.run.settings import Settings
from bigint8.service.limits import Limits

LONG = {"prompt": "w5 w17 w99", "max_tokens": 2000, "temperature": 0}
"""A request that takes seconds with the slow stage of these tests."""

HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
QUICK = Limits(client_seconds=1.0, queue=2, queue_seconds=0.7, connections=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def pipeline(folder):
    """One whose steps take a while, so that something happens meanwhile."""
    with loaded(folder) as pipeline:
        slow_down(pipeline)
        yield pipeline


@pytest.fixture
def service(pipeline):
    with serving(pipeline, QUICK, ends=False) as service:
        yield service
        until(service.idle)


def running(service: Service) -> int:
    return service.pipeline.engine.queue[1]


def waiting(service: Service) -> int:
    return service.pipeline.engine.queue[0]


def sent(service: Service, body: dict) -> socket.socket:
    """A connection on which a whole request was sent."""
    connection, content = service.connect(), json.dumps({"model": NAME, **body}).encode()
    connection.sendall(HEAD % len(content) + content)
    return connection


def read_all(connection: socket.socket) -> bytes:
    connection.settimeout(WAIT)
    found = b""
    while True:
        try:
            piece = connection.recv(65536)
        except ConnectionResetError:
            return found
        if not piece:
            return found
        found += piece


# --- clients that hang up ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_gives_its_pages_back_at_once(service, stream):
    connection = sent(service, {**LONG, "stream": stream, "n": 3})
    if stream:
        connection.recv(1000)
    until(lambda: running(service) == 3)
    asked = list(service.pipeline.engine._scheduler.live)
    connection.close()
    until(service.idle, 2)
    assert all(len(each.completion.tokens) < 1000 for each in asked), "it was not at its end by itself"


def test_a_client_that_hangs_up_while_it_waits_in_line_leaves_the_line(pipeline):
    with serving(pipeline, Limits(), ends=False) as service:
        first = sent(service, {**LONG, "n": 4})
        until(lambda: running(service) == 4)
        second = sent(service, {**LONG, "max_tokens": 5})
        until(lambda: waiting(service) == 1)
        second.close()
        until(lambda: waiting(service) == 0, 2)
        assert running(service) == 4
        first.close()
        until(service.idle)


def test_a_client_that_stops_reading_a_stream_is_cancelled_when_it_is_gone(service):
    with service.client.stream("POST", "/v1/completions", json={"model": NAME, **LONG, "stream": True}) as response:
        assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
        next(response.iter_lines())
        assert running(service) == 1
    until(service.idle, 2)


# --- the line ------------------------------------------------------------------------------------------------------


def test_a_line_that_is_full_and_a_wait_that_is_too_long_are_refused(service):
    first = sent(service, {**LONG, "n": 4})
    until(lambda: running(service) == 4)
    with ThreadPoolExecutor() as threads:
        in_line = [threads.submit(service.complete, max_tokens=2, stream=stream) for stream in (True, False)]
        until(lambda: waiting(service) == 2)
        full = service.complete(max_tokens=2)
        assert_refused(full, 429, "queue_full", said="2 requests wait")
        assert int(full.headers["retry-after"]) > 0
        for each in in_line:
            assert_refused(each.result(), 503, "queue_timeout", said="within 0.7 s")
            assert "retry-after" in each.result().headers
    assert waiting(service) == 0 and running(service) == 4
    first.close()


def test_the_official_client_waits_and_tries_again_when_the_line_is_full(service):
    first = sent(service, {**LONG, "n": 4, "max_tokens": 300})
    until(lambda: running(service) == 4)
    second, third = (sent(service, {**LONG, "max_tokens": 1}) for _ in range(2))
    until(lambda: waiting(service) == 2)
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=3) as client:
        assert client.completions.create(model=NAME, prompt="w1", max_tokens=1).usage.completion_tokens == 1
    for each in (first, second, third):
        each.close()


# --- clients that are slow, and many -------------------------------------------------------------------------------


def answer_to(connection: socket.socket) -> tuple[int, dict]:
    head, _, body = read_all(connection).partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def test_headers_that_do_not_come_to_an_end_are_given_up(service):
    began = time.monotonic()
    silent, partial, dripping = (service.connect() for _ in range(3))
    partial.sendall(b"GET /health HTTP/1.1\r\nhost:")

    def drip():
        for byte in b"GET /health HTTP/1.1\r\nx: " + b"y" * 1000:
            try:
                dripping.sendall(bytes([byte]))
            except OSError:
                return
            time.sleep(0.05)

    thread = threading.Thread(target=drip)
    thread.start()
    assert read_all(silent) == b"", "who says nothing is told nothing"
    for connection in (partial, dripping):
        status, body = answer_to(connection)
        assert status == 408 and body["error"]["code"] == "request_timeout"
    thread.join()
    assert 0.9 < time.monotonic() - began < 10


def test_a_body_that_does_not_come_to_an_end_is_given_up(service):
    connection = service.connect()
    connection.sendall(HEAD % 500)
    for _ in range(6):
        connection.sendall(b"{")
        time.sleep(0.05)
    status, body = answer_to(connection)
    assert status == 408 and body["error"]["code"] == "request_timeout"


def test_a_client_that_does_not_read_is_hung_up_on(service):
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", service.port))
    count = 3000  # one behind the other, none of whose answers is read
    threading.Thread(target=lambda: connection.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n" * count)).start()
    time.sleep(2.5)
    assert read_all(connection).count(b"HTTP/1.1 200 OK") < count, "the answers have come, all of them"
    assert service.complete(max_tokens=1).status_code == 200


def test_what_is_no_http_is_refused(service):
    connection = service.connect()
    connection.sendall(b"\x16\x03\x01 hello\r\n\r\n")
    status, body = answer_to(connection)
    assert status == 400 and body["error"]["code"] == "invalid_http"


def test_connections_that_say_nothing_make_room_for_those_that_ask(pipeline):
    """Fifty times as many as may be open; a stream that runs meanwhile is left alone."""
    with serving(pipeline, Limits(connections=20), ends=False) as service:
        stream = sent(service, {**LONG, "max_tokens": 400, "stream": True})
        until(lambda: running(service) == 1)
        idle = [service.connect() for _ in range(1000)]
        for _ in range(3):
            with httpx.Client(base_url=service.url, timeout=WAIT) as client:
                assert client.get("/health").status_code == 200
        dropped = sum(select_readable(connection) for connection in idle)
        assert dropped >= 980
        assert read_until(stream, b"[DONE]").count(b'"finish_reason":"length"') == 1
        for connection in [*idle, stream]:
            connection.close()
    with serving(pipeline, Limits(connections=2), ends=False) as service:
        streams = [sent(service, {**LONG, "stream": True}) for _ in range(2)]
        until(lambda: running(service) == 2)
        status, body = answer_to(service.connect())
        assert status == 503 and body["error"]["code"] == "too_many_connections"
        for stream in streams:
            stream.close()
        until(service.idle)


def select_readable(connection: socket.socket) -> bool:
    """Whether the other end has closed it, or said something."""
    connection.setblocking(False)
    try:
        return len(connection.recv(1)) <= 1
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


def read_until(connection: socket.socket, end: bytes) -> bytes:
    found = b""
    while end not in found:
        found += connection.recv(65536)
    return found


# --- the engine, and the end ---------------------------------------------------------------------------------------


def test_who_drains_finishes_what_runs_and_takes_nothing_new(service):
    with ThreadPoolExecutor() as threads:
        answer = threads.submit(service.complete, max_tokens=150, temperature=0)
        until(lambda: running(service) == 1)
        drained = threads.submit(service.state.drain, WAIT)
        until(lambda: service.client.get("/health").status_code == 503)
        assert service.client.get("/health").json() == {"status": "draining"}
        assert_refused(service.complete(max_tokens=1), 503, "draining")
        assert service.client.get("/v1/models").status_code == 200
        assert drained.result() is True
        assert answer.result().json()["usage"]["completion_tokens"] == 150


def test_an_engine_that_ends_fails_what_runs_with_503_and_a_streams_last_event(folder):
    with loaded(folder) as own, serving(own, ends=False) as service:
        run, gate = own.engine._stages._run, threading.Event()

        def gated(step):
            if int(step.choices["index"].max(initial=0)) > 20:
                gate.wait(WAIT)
            return run(step)

        own.engine._stages._run = gated
        assert service.state.drain(0) is True
        service.state.phase = "ready"
        with ThreadPoolExecutor() as threads:
            whole = threads.submit(service.complete, max_tokens=500)
            stream = sent(service, {**LONG, "stream": True})
            until(lambda: running(service) == 2)
            assert service.state.drain(0.1) is False
            threading.Timer(0.3, gate.set).start()
            own.engine.close()
            assert_refused(whole.result(), 503, "engine_failed", said="closed before")
        assert b'"code":"engine_failed"' in read_until(stream, b"engine_failed")
        service.state.phase = "ready"
        health = service.client.get("/health")
        assert health.status_code == 503 and health.json()["status"] == "failed"
        assert_refused(service.complete(), 503, "engine_failed")
        for path in ("/metrics", "/stats"):
            assert service.client.get(path).status_code == 200


# --- as a program, over two workers --------------------------------------------------------------------------------


@pytest.fixture
def program(tmp_path):
    """`bigint8 serve` over two CPU workers, and the URL on which it listens; its model is not loaded yet."""
    folder, log = save_model(tmp_path / "model", ends=False), (tmp_path / "log.txt").open("w+")
    command = [sys.executable, "-m", "bigint8.serve", str(folder), "--gpus", "2", "--device", "cpu", "--port", "0"]
    options = ["--context", "2048", "--name", NAME, "--dtype", "float32", "--drain-seconds", "60"]
    process = subprocess.Popen([*command, *options], stdout=log, stderr=log, env=os.environ | {"COLUMNS": "200"})

    def address():
        assert process.poll() is None, (tmp_path / "log.txt").read_text()
        return re.search(r"listening on (http\S+);", (tmp_path / "log.txt").read_text())

    try:
        until(address)
        yield process, address()[1], tmp_path / "log.txt"
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        log.close()


def workers_of(process) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # of one that is gone, or about to be
            found += [child] * ("ray::Worker" in " ".join(child.cmdline()))
    return found


def test_a_service_over_workers_says_how_it_is_from_loading_to_its_end(program):
    process, url, log = program
    with httpx.Client(base_url=url, timeout=WAIT) as client:
        loading = client.get("/health")
        assert loading.status_code == 503 and loading.json() == {"status": "loading"}
        asked = {"model": NAME, "prompt": "w5 w17", "max_tokens": 40, "temperature": 0, "logprobs": 2}
        assert_refused(client.post("/v1/completions", json=asked), 503, "loading")
        until(lambda: client.get("/health").status_code == 200, 120)
        before = client.post("/v1/completions", json=asked).json()["choices"]

        workers = workers_of(process)
        assert len(workers) == 2
        workers[-1].send_signal(signal.SIGKILL)
        until(lambda: client.get("/health").status_code == 503, 2)
        said = client.get("/health").json()
        assert said["status"] == "restoring" and said["stage"] in (0, 1)
        assert client.post("/v1/completions", json=asked).json()["choices"] == before, "it waited for the stage"
        until(lambda: client.get("/health").status_code == 200)
        assert client.get("/stats").json()["restarts"] == 1 and len(client.get("/stats").json()["stages"]) == 2

        children = psutil.Process(process.pid).children(recursive=True)
        long = {**asked, "max_tokens": 1500, "logprobs": None, "stream": True}
        with client.stream("POST", "/v1/completions", json=long) as stream:
            lines = stream.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            until(lambda: httpx.get(f"{url}/health").json() == {"status": "draining"})
            assert_refused(httpx.post(f"{url}/v1/completions", json=asked), 503, "draining")
            rest = list(lines)
        assert rest[-2:] == ["data: [DONE]", ""] and '"finish_reason":"length"' in rest[-4]
    assert process.wait(30) == 0, log.read_text()
    assert "Traceback" not in log.read_text()
    assert not psutil.wait_procs(children, 10)[1], "all that it started has ended"


def test_a_port_that_is_taken_is_said_before_anything_is_loaded(folder, service, run):
    from bigint8 import serve

    began = run(serve, folder, "--port", service.port)
    assert began.code == 2 and f"--port {service.port}" in began.error and "Traceback" not in began.error
    refused = run(serve, folder, "--gpu-type", "rtx-3090")
    assert refused.code == 2 and "--gpu-type is for plans" in refused.error


def test_without_the_extra_the_command_says_how_to_install_it(folder):
    program = (
        "import sys; sys.modules['fastapi'] = None; sys.argv = ['serve', sys.argv[1]]\n"
        "from bigint8.serve import main; main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, timeout=WAIT)
    assert done.returncode == 2
    assert done.stderr == 'error: bigint8 serve needs fastapi: pip install "bigint8[serve]"\n'


def test_the_slow_stage_changes_no_token(service):
    assert len(service.pipeline.engine.submit([5], Settings(3)).result(WAIT).tokens) == 3
