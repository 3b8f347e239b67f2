"""What the service counts and what the engine does now, for Prometheus and for the page."""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..plan.plan import Plan
from ..run.stages import EngineStats
from .state import Counted, State

ENDPOINTS = (
    "/", "/health", "/metrics", "/stats", "/openapi.json", "/v1/models", "/v1/completions", "/v1/chat/completions",
    "/admin/load",
)  # fmt: skip
"""The paths that are counted by name: whatever else clients ask for is counted as one."""

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)
"""Bounds of the histograms' buckets."""

SAMPLE_SECONDS = 1.0
"""The engine is asked at most so often, whoever looks."""


@dataclass(frozen=True)
class Sample:
    """What the model did at a time that is served, and all that there were. It does not keep the model.

    plan, name, chats: of that model
    busy: each stage's share of the time since the sample before
    tokens, restarts: of all models since the service began; running, waiting: of all that it has
    """

    at: float
    plan: Plan
    name: str
    chats: bool
    stats: EngineStats
    busy: tuple[float, ...]
    tokens: int
    restarts: int
    running: int
    waiting: int


class Sampler:
    """Asks the engine when somebody looks, and not again within a second: workers answer that, too."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._asking = asyncio.Lock()
        self._last: Sample | None = None

    async def sample(self) -> Sample | None:
        """The newest sample; None while there is no model."""
        async with self._asking:
            counted, last = self._state.counted(), self._last
            model = counted.models[0] if counted.models else None
            if model is None:
                return None
            if last is None or last.plan is not model.plan or time.monotonic() - last.at >= SAMPLE_SECONDS:
                self._last = await asyncio.to_thread(_sample, counted, last)
            return self._last


def _sample(counted: Counted, last: Sample | None) -> Sample:
    all_stats = [model.engine.stats() for model in counted.models]
    stats, model = all_stats[0], counted.models[0]
    busy = _busy(last if last is not None and last.plan is model.plan else None, stats)
    tokens = counted.tokens + sum(each.tokens for each in all_stats)
    restarts = counted.restarts + sum(each.restarts for each in all_stats)
    running, waiting = sum(each.running for each in all_stats), sum(each.waiting for each in all_stats)
    told = model.plan, model.name, model.text.chats, stats, busy
    return Sample(time.monotonic(), *told, tokens, restarts, running, waiting)


def _busy(last: Sample | None, stats: EngineStats) -> tuple[float, ...]:
    """A stage that was started again meanwhile counts from its start."""
    if last is None or stats.seconds <= last.stats.seconds or len(stats.stages) != len(last.stats.stages):
        return stats.busy
    seconds = stats.seconds - last.stats.seconds
    before = [stage.busy_seconds for stage in last.stats.stages]
    now = [stage.busy_seconds for stage in stats.stages]
    done = [after - start if after >= start else after for start, after in zip(before, now, strict=True)]
    return tuple(min(1.0, each / seconds) for each in done)


class Metrics(Collector):
    """Counters and histograms of requests, and the engine's numbers, in a registry of their own."""

    def __init__(self, state: State) -> None:
        self._state = state
        self.sampler = Sampler(state)
        self._sample: Sample | None = None
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "bigint8_requests", "Requests that were answered.", ["endpoint", "status"], registry=registry
        )
        self._seconds = Histogram(
            "bigint8_request_seconds", "From a request to the end of its answer.", ["endpoint"], buckets=SECONDS,
            registry=registry,
        )  # fmt: skip
        self.prompt_tokens = Counter("bigint8_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.first_token = Histogram(
            "bigint8_first_token_seconds", "From a request to its first token.", buckets=SECONDS, registry=registry
        )
        registry.register(self)

    def answered(self, path: str, status: int, seconds: float) -> None:
        """A request has its answer."""
        endpoint = path if path in ENDPOINTS else "other"
        self._requests.labels(endpoint, str(status)).inc()
        self._seconds.labels(endpoint).observe(seconds)

    async def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        self._sample = await self.sampler.sample()
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """The engine's numbers, of the newest sample."""
        ready = self._state.health()[0] == 200
        yield GaugeMetricFamily("bigint8_ready", "1 if a request would be worked on now.", float(ready))
        loads = CounterMetricFamily("bigint8_loads", "Models asked for beside another one.", labels=["result"])
        for result in ("done", "failed", "refused"):
            loads.add_metric([result], self._state.loads[result])
        yield loads
        yield GaugeMetricFamily("bigint8_models", "Models that requests run on.", len(self._state.counted().models))
        if self._sample is None:
            return
        stats = self._sample.stats
        yield CounterMetricFamily("bigint8_generated_tokens", "Tokens of answers.", self._sample.tokens)
        yield CounterMetricFamily("bigint8_restarts", "Stages that were started again.", self._sample.restarts)
        yield GaugeMetricFamily("bigint8_queue", "Requests that wait in line.", self._sample.waiting)
        yield GaugeMetricFamily("bigint8_running", "Sequences that run.", self._sample.running)
        pages = GaugeMetricFamily("bigint8_free_pages", "Pages of keys and values left.", labels=["group"])
        for index, free in enumerate(stats.free_pages):
            pages.add_metric([str(index)], free)
        yield pages
        share = GaugeMetricFamily(
            "bigint8_stage_busy_share", "Of the time since the sample before, in which it computed.", labels=["stage"]
        )
        seconds = CounterMetricFamily("bigint8_stage_busy_seconds", "Time in which it computed.", labels=["stage"])
        for index, (stage, busy) in enumerate(zip(stats.stages, self._sample.busy, strict=True)):
            share.add_metric([str(index)], busy)
            seconds.add_metric([str(index)], stage.busy_seconds)
        yield share
        yield seconds
