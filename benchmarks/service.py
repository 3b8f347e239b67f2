"""The HTTP service over two CPU workers: its throughput, first tokens beside a long prompt, many connections, a soak.

python benchmarks/service.py [--model smollm2-135m] [--checkpoint DIR] [--rounds 3] [--json FILE]
python benchmarks/service.py --soak [--requests 1000] [--clients 64]
python benchmarks/service.py --connections 10000

By default two comparisons, each in turns within one process that holds the pipeline; clients are another process:
- 16 clients stream answers over HTTP, against the same requests given to the same pipeline's engine. At least 0.95 of
  its tokens/s are asked for.
- the time to the first token of a short prompt (16 tokens), alone and while one of 1,500 tokens is computed, which was
  sent 20, 40, 60 or 80 % of its own time before, in turn. At most 3 times as long is asked for.

`--soak`: `bigint8 serve` as a program. So many requests by so many clients; one in twenty hangs up midway, and twice a
worker is killed. All others must be whole, with the tokens of a quiet run before. The memory of the driver and of the
workers (PSS) is read all the time: the mean of the last quarter of the requests must be within 2 % of the second's.

`--connections`: so many connections at once, all of which ask, to a service that holds 1,000: each must be answered,
with an answer or with 503, and afterwards all is as before.
"""

import asyncio
import contextlib
import json
import math
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from rich.console import Console
from rounds import Comparison, Figures, interleave, print_machine, write_json

LONG, SHORT = 1500, 16
"""Tokens of the prompts whose first tokens are timed."""

HANGS_UP = 20
"""One in so many clients of the soak."""

KILLS = (0.1, 0.6)
"""After which share of the requests a worker is killed."""

WAIT = 600.0


def main(
    model: Annotated[str, typer.Option(help="A preset or a checkpoint folder.")] = "smollm2-135m",
    checkpoint: Annotated[Path | None, typer.Option(help="A checkpoint of that preset's shape.")] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 48,
    soak: Annotated[
        bool, typer.Option("--soak", help="Many requests, with clients that leave and workers that die.")
    ] = False,
    requests: Annotated[int, typer.Option(min=8, help="Of the soak.")] = 1000,
    clients: Annotated[int, typer.Option(min=1, help="Of the soak.")] = 64,
    connections: Annotated[int, typer.Option(min=0, help="Open so many at once instead.")] = 0,
    chunk: Annotated[int, typer.Option(min=16, help="Tokens of prompts that run at once.")] = 32,
    long: Annotated[int, typer.Option(min=64, help="Tokens of the long prompt.")] = LONG,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
    asks: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure the service."""
    if asks is not None:
        print(json.dumps(asyncio.run(ask_all(**json.loads(asks.read_text())))))
        return
    console = Console(highlight=False)
    print_machine(console)
    folder = str(checkpoint or model)
    if soak:
        compared = [soak_service(folder, requests, clients)]
    elif connections:
        compared = [open_connections(folder, connections)]
    else:
        compared = compare(folder, rounds, tokens, chunk, long)
    for comparison in compared:
        comparison.print(
            console, next(iter(comparison.rounds)), {"ratio": 3, "seconds": 3, "MB before": 1, "MB after": 1}
        )
    write_json(json_file, compared, "over HTTP")
    if any(comparison.failed for comparison in compared):
        raise typer.Exit(1)


# --- clients -----------------------------------------------------------------------------------------------------


async def ask(port: int, body: dict[str, Any], leave_after: int | None = None) -> dict[str, Any]:
    """One streamed request on a connection of its own: status, text, seconds to the first token, how it ended.

    leave_after: hang up after so many events
    """
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**22)
    content = json.dumps({**body, "stream": True}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(content)}"
    )
    writer.write(f"{head}\r\nconnection: close\r\n\r\n".encode() + content)
    status = int((await reader.readline()).split()[1])
    found: dict[str, Any] = {"status": status, "text": "", "first": None, "reason": None, "events": 0}
    while (line := await reader.readline()) != b"":
        if not line.startswith(b"data: {"):
            continue
        chunk = json.loads(line[6:])
        if "error" in chunk:
            found["reason"] = chunk["error"]["message"]
            break
        found["first"] = found["first"] or time.perf_counter() - began
        found["text"] += chunk["choices"][0]["text"]
        found["reason"] = chunk["choices"][0]["finish_reason"]
        found["events"] += 1
        if leave_after is not None and found["events"] >= leave_after:
            found["reason"] = "left"
            break
    writer.close()
    return found


async def ask_all(port: int, bodies: list[dict[str, Any]], clients: int, leave: list[int | None]) -> list[Any]:
    """All requests by so many clients, each of which asks again when it has its answer. Says when one is done."""
    found: list[Any] = [None] * len(bodies)
    left = iter(range(len(bodies)))

    async def client() -> None:
        for i in left:
            try:
                found[i] = await ask(port, bodies[i], leave[i])
            except (OSError, ValueError, IndexError) as error:
                found[i] = {"status": 0, "text": "", "reason": f"{type(error).__name__}: {error}"}
            print(".", file=sys.stderr, flush=True)

    await asyncio.gather(*(client() for _ in range(clients)))
    return found


class Clients:
    """`ask_all` in a process of its own. `done` counts its answers while it runs."""

    def __init__(self, port: int, bodies: list[dict[str, Any]], clients: int, leave: list[int | None]) -> None:
        asked = {"port": port, "bodies": bodies, "clients": clients, "leave": leave}
        self._folder = tempfile.TemporaryDirectory()
        file = Path(self._folder.name) / "asks.json"
        file.write_text(json.dumps(asked))
        command = [sys.executable, __file__, "--asks", str(file)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.done = 0
        self._counts = threading.Thread(target=self._count)
        self._counts.start()
        self._answers: list[str] = []
        self._reads = threading.Thread(target=lambda: self._answers.extend(self._process.stdout or []))
        self._reads.start()

    def _count(self) -> None:
        assert self._process.stderr is not None
        for _ in self._process.stderr:
            self.done += 1

    def result(self) -> list[dict[str, Any]]:
        """All answers, in the order of the requests."""
        self._process.wait()
        self._counts.join()
        self._reads.join()
        self._folder.cleanup()
        found: list[dict[str, Any]] = json.loads(self._answers[-1])
        return found


def prompt_of(seed: int, count: int) -> list[int]:
    """Tokens that share no beginning with other prompts."""
    choose = random.Random(seed)
    return [choose.randrange(5, 100) for _ in range(count)]


# --- one pipeline, with HTTP and without -------------------------------------------------------------------------


def compare(model: str, rounds: int, tokens: int, chunk: int, long: int) -> list[Comparison]:
    from bigint8.model_pipeline import ModelPipeline
    from bigint8.options import Cluster, Workload
    from bigint8.service.app import new_app
    from bigint8.service.limits import Limits
    from bigint8.service.server import Server
    from bigint8.service.state import Model, State
    from bigint8.session import find_model

    limits, state = Limits(queue=128, queue_seconds=WAIT), State("model")
    with (
        ModelPipeline(find_model(model), 2, Workload(2048, 8, chunk), Cluster("cpu")) as pipeline,
        Server(new_app(state, limits), "127.0.0.1", 0, limits) as server,
    ):
        pipeline.load(progress=False)
        state.open(Model.of(pipeline, "model"))
        port = int(server.address.rpartition(":")[2])
        return [time_throughput(pipeline, port, rounds, tokens), time_first_tokens(port, rounds, long)]


def time_throughput(pipeline: Any, port: int, rounds: int, tokens: int, clients: int = 16) -> Comparison:
    """Tokens/s of the same requests, by clients over HTTP and by threads that ask the engine."""
    from bigint8.run.settings import Settings

    prompts = [prompt_of(i, 16) for i in range(2 * clients)]
    asked = {"model": "model", "max_tokens": tokens, "temperature": 0}
    made = [0]

    def figures(seconds: float) -> Figures:
        now, before = pipeline.stats().tokens, made[0]
        made[0] = now
        return {"tokens/s": (now - before) / seconds, "seconds": seconds}

    def over_http() -> Figures:
        bodies = [{**asked, "prompt": ids} for ids in prompts]
        pipeline.stats()
        running = Clients(port, bodies, clients, [None] * len(bodies))
        while not pipeline.engine.queue[1]:  # the client's process has begun
            time.sleep(0.001)
        began = time.perf_counter()
        while running.done < len(bodies):
            time.sleep(0.002)
        seconds = time.perf_counter() - began
        wrong = [each for each in running.result() if each["reason"] not in ("length", "stop")]
        if wrong:
            raise RuntimeError(f"{len(wrong)} requests failed: {wrong[0]}")
        return figures(seconds)

    def without() -> Figures:
        began, settings = (
            time.perf_counter(),
            Settings(tokens, eos=frozenset(pipeline.text.ends(pipeline.model.generation_config))),
        )
        with ThreadPoolExecutor(clients) as threads:
            list(threads.map(lambda ids: pipeline.engine.submit(ids, settings).result(WAIT), prompts))
        return figures(time.perf_counter() - began)

    without()  # compiles, warms up
    comparison = Comparison(
        f"{len(prompts)} requests of {clients} clients, {tokens} tokens each", "tokens/s", lower=False
    )
    interleave(comparison, {"over HTTP": over_http, "the engine": without}, rounds)
    return comparison


def time_first_tokens(port: int, rounds: int, long: int) -> Comparison:
    """Seconds to the first token of a short prompt, alone and while a long one is computed."""
    seeds = iter(range(10**6, 10**9))

    def body(count: int) -> dict[str, Any]:
        return {"model": "model", "prompt": prompt_of(next(seeds), count), "max_tokens": 2, "temperature": 0}

    async def first(count: int) -> float:
        found = await ask(port, body(count))
        assert found["first"] is not None, found
        return float(found["first"])

    whole = statistics.median(asyncio.run(first(long)) for _ in range(2))

    async def beside(share: float) -> tuple[float, float]:
        task = asyncio.create_task(first(long))
        await asyncio.sleep(share * whole)
        return await first(SHORT), await task

    def alone() -> Figures:
        return {"seconds": statistics.median(asyncio.run(first(SHORT)) for _ in range(4)), "the long one": whole}

    def busy() -> Figures:
        times = [asyncio.run(beside(share)) for share in (0.2, 0.4, 0.6, 0.8)]
        return {
            "seconds": statistics.median(t for t, _ in times),
            "the long one": statistics.median(t for _, t in times),
        }

    title = f"first token of a prompt of {SHORT} tokens, and beside one of {long}"
    comparison = Comparison(title, "seconds")
    interleave(comparison, {"alone": alone, "beside a long one": busy}, rounds)
    return comparison


# --- the program -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def program(model: str, *flags: str) -> Iterator[tuple["subprocess.Popen[bytes]", int]]:
    """`bigint8 serve` over two CPU workers, loaded, and its port."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.txt"
        command = [sys.executable, "-m", "bigint8.serve", model, "--gpus", "2", "--device", "cpu", "--port", "0"]
        with log.open("w") as out:
            options = ["--name", "model", "--queue-seconds", str(WAIT), "--max-queue", "1000"]
            process = subprocess.Popen([*command, *options, *flags], stdout=out, stderr=out)
        try:
            port, until = 0, time.monotonic() + WAIT
            while not port or health(port) != 200:
                said = log.read_text()
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"the service does not start: {said[-2000:]}")
                listening = re.search(r"listening on http://\S+:(\d+)", said)
                port = int(listening[1]) if listening else 0
                time.sleep(0.1)
            yield process, port
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def health(port: int) -> int:
    """The status of /health, 0 where nobody answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=WAIT) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def workers_of(pid: int) -> list[psutil.Process]:
    """The processes of a service's stages."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            found += [child] * ("ray::Worker" in " ".join(child.cmdline()))
    return found


def pss(processes: list[psutil.Process]) -> float:
    """MB of memory, each page shared among those who have it."""
    total = 0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            total += process.memory_full_info().pss
    return total / 1e6


def soak_requests(count: int) -> tuple[list[dict[str, Any]], list[int | None]]:
    """Requests of unlike lengths, half of them sampled, and after how many events whose client leaves."""
    choose = random.Random(0)
    bodies, leave = [], []
    for i in range(count):
        sampled = {"temperature": 1.0, "seed": i} if i % 2 else {"temperature": 0}
        wanted = choose.randrange(8, 32)
        bodies.append(
            {"model": "model", "prompt": prompt_of(i, choose.randrange(2, 80)), "max_tokens": wanted, **sampled}
        )
        leave.append(choose.randrange(2, 6) if i % HANGS_UP == HANGS_UP - 1 else None)
    return bodies, leave


def soak_service(model: str, requests: int, clients: int) -> Comparison:
    """Memory in the second and in the last quarter of the requests. What goes wrong with them is told as failed."""
    bodies, leave = soak_requests(requests)
    title = f"soak: {requests} requests of {clients} clients, {leave.count(None)} to their end, {len(KILLS)} kills"
    comparison = Comparison(title, "ratio")
    with program(model, "--context", "2048", "--batch-size", "8") as (process, port):
        quiet = Clients(port, bodies, 8, [None] * requests).result()
        busy = Clients(port, bodies, clients, leave)
        samples: list[tuple[float, float, float]] = []
        kills = list(KILLS)
        while busy.done < requests:
            share = busy.done / requests
            if kills and share >= kills[0]:
                kills.pop(0)
                random.Random(share).choice(workers_of(process.pid)).send_signal(signal.SIGKILL)
            samples.append((share, pss([psutil.Process(process.pid)]), pss(workers_of(process.pid))))
            time.sleep(0.25)
        found = busy.result()
        for side, at in (("driver", 1), ("workers", 2)):
            second, last = (_mean(samples, at, *bounds) for bounds in ((0.25, 0.5), (0.75, 1.0)))
            comparison.add(side, {"ratio": last / second, "MB before": second, "MB after": last})
            if not 0.98 <= last / second <= 1.02:
                comparison.add(f"memory of the {side}", None, f"{last / second:.3f} of what it was")
    _check_answers(comparison, quiet, found, leave)
    return comparison


def _mean(samples: list[tuple[float, float, float]], at: int, low: float, high: float) -> float:
    """While a worker is gone its memory is: the median. NaN where these requests went by between two samples."""
    found = [sample[at] for sample in samples if low <= sample[0] < high]
    return statistics.median(found) if found else math.nan


def _check_answers(
    comparison: Comparison, quiet: list[dict[str, Any]], found: list[dict[str, Any]], leave: list[int | None]
) -> None:
    for i, (expected, answer) in enumerate(zip(quiet, found, strict=True)):
        if leave[i] is not None:
            continue
        if expected["reason"] not in ("length", "stop"):
            comparison.add(f"request {i} of the quiet run", None, str(expected)[:200])
        elif (answer["text"], answer["reason"]) != (expected["text"], expected["reason"]):
            comparison.add(f"request {i}", None, f"{str(answer)[:200]}, not {expected['text'][:100]!r}")


# --- many connections --------------------------------------------------------------------------------------------


def open_connections(model: str, count: int) -> Comparison:
    """All at once: who is answered, and how the service is afterwards."""
    comparison = Comparison(f"{count} connections at once, of which 1,000 are held", "seconds")
    with program(model, "--context", "256", "--batch-size", "8") as (process, port):
        before = pss([psutil.Process(process.pid)])
        began = time.perf_counter()
        statuses = storm(port, count)
        seconds = time.perf_counter() - began
        if set(statuses) - {200, 429, 503}:
            comparison.add("statuses", None, str(dict(statuses)))
        after = health(port)
        if after != 200:
            comparison.add("health afterwards", None, str(after))
        told = {f"status {status}": float(number) for status, number in sorted(statuses.items())}
        grown = pss([psutil.Process(process.pid)]) - before
        comparison.add("service", {"seconds": seconds, "MB grown": grown, **told})
    return comparison


def storm(port: int, count: int) -> Counter[int]:
    """How often which status was the answer to a request on each of so many connections that are open together.

    0: no answer. Ports are those of several addresses, since one has less than 65,000, many of them in use.
    """
    import resource

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard != resource.RLIM_INFINITY else 2 * count, hard))
    body = json.dumps({"model": "model", "prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d"
    statuses, opened = Counter[int](), []
    for index in range(count):
        try:
            source = (f"127.0.0.{2 + index // 20_000}", 0)
            opened.append(socket.create_connection(("127.0.0.1", port), WAIT, source))
            opened[-1].sendall(head % len(body) + b"\r\n\r\n" + body)
        except OSError:
            statuses[0] += len(opened) + statuses[0] <= index  # one that breaks while it asks may have an answer
    for connection in opened:
        try:
            said = connection.recv(64).split()
            statuses[int(said[1]) if said else 0] += 1
        except OSError:
            statuses[0] += 1
        connection.close()
    return statuses


if __name__ == "__main__":
    typer.run(main)
