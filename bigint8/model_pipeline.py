"""A model as a pipeline over devices: planned, loaded, given requests, ended."""

import contextlib
import ctypes
import gc
import os
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .errors import BigInt8Error
from .options import Access, Cluster, Int8Config, Workload
from .plan.beside import left_beside
from .plan.cut import make_plan
from .plan.devices import Device, cpu_device, find_devices
from .plan.offload import spill_here, spill_of_boxes
from .plan.plan import Plan
from .session import FoundModel, find_model, load_here, warm_up

if TYPE_CHECKING:
    from .load.bars import Shown
    from .load.fill import LoadReport
    from .run.engine import Engine
    from .run.generate import Answer, Generator
    from .run.pipeline import Pipeline
    from .run.requests import Completion
    from .run.stages import EngineStats
    from .run.text import Text
    from .run.trace import Trace


class ModelPipeline:
    """A model over its devices: planned when this is made, loaded by `load`; a context manager that ends it.

    devices: what there is to plan for; plan: which stage lives where; note: where that is not quite what was asked for
    model: the transformers model that runs there, once it is loaded: all of `generate()` works on it
    engine: what runs the requests of many callers together, once it is loaded
    reports: what loading did, for each stage

    One device of this machine needs no workers: then the model lives in this process.
    """

    def __init__(
        self,
        found: FoundModel,
        gpus: int | None = None,
        workload: Workload | None = None,
        cluster: Cluster = Cluster(),  # noqa: B008  (frozen)
        trace: str | os.PathLike[str] | None = None,
        slots: int | None = None,
        beside: "ModelPipeline | None" = None,
    ) -> None:
        """Plan for `gpus` devices of this machine, all GPUs or one CPU by default, or of a Ray cluster.

        trace: a file of what is loaded and computed when, written by `close`; https://ui.perfetto.dev opens it
        slots: how many steps are under way at once, one more than there are stages by default
        beside: a loaded model that goes on running meanwhile. The plan is for what its devices have left; where it has
            workers, these get second ones on the same devices, so that either model may end before the other

        Raises PlanError when the model does not fit, BigInt8Error and WorkerError where the devices are not there.
        """
        self.found = found
        self.note: str | None = None
        self.model: Any = None
        self.engine: Engine | None = None
        self.reports: list[LoadReport] = []
        self._workers: Pipeline | None = None
        self._trace_file, self._slots = None if trace is None else Path(trace).absolute(), slots
        self._trace: Trace | None = None
        self._text: Text | None = None
        self._generator: Generator | None = None
        self._beside, self._one_box = beside, cluster.address is None
        self._whole: list[Device] = []
        found.opened()
        workload = workload or found.spec.workload()
        if cluster.address is None and (beside is None or beside._workers is None):
            there, self.note = find_devices(cluster.device, gpus)
            self.devices = self._left(there)
            spill = spill_here(found.spec, cpu_device().usable_bytes)
            self.plan = make_plan(found.spec, self.devices, workload, spill=spill)
            return
        workers = self._start(gpus, cluster)
        try:
            self.plan = self._plan_for(workers, workload)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "ModelPipeline":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Start the workers, if the plan needs any: `load` does it otherwise. Raises WorkerError."""
        if self._workers is None and len(self.plan.stages) > 1:
            kind = self.plan.stages[0].device.kind
            workers = self._start(len(self.plan.stages), Cluster("cuda" if kind == "cuda" else "cpu"))
            if not _as_planned(self.plan, self._left(workers.devices())):  # the GPUs may come in another order
                self.plan = self._plan_for(workers, self.plan.workload)
                self.note = "planned again, for the devices that the workers have"

    def load(self, progress: "Shown" = True) -> "list[LoadReport]":
        """Load the model; what that did for each stage. Raises what `load_sharded_int8` raises.

        progress: whether to show it, or who is told of it (`load.bars.Watch`)
        """
        checkpoint = self.found.opened()
        self._end_engine()
        self._begin_trace()
        self.start()
        if self._workers is None:
            warm_up(self.plan.spec, (stage.device.kind for stage in self.plan.stages))

            from .load.device_map import place_plan

            self.model = load_here(place_plan(self.plan, checkpoint), checkpoint, progress, self._trace)
            self.engine = self.model.engine
            self.reports = [self.model.load_report]
            self._trace_loads()
            self._beside = None
            return self.reports
        from .load.warm_up import importing

        with importing():  # while the workers do, too
            from .model.config import read_generation_config, read_hf_config
            from .run.driver import PipelineModel
            from .run.engine import Engine

        # a config that is wrong is told before the load, which may take long
        hf_config = read_hf_config(checkpoint, self.plan.spec.access)
        generation_config = read_generation_config(checkpoint.folder)
        self.reports = self._workers.load(self.plan, progress)
        self.engine = Engine.of(self.plan, self._workers, self._trace, self._slots)
        self.model = PipelineModel(hf_config, self.engine, self.plan)
        self.model.generation_config = generation_config or self.model.generation_config
        self._trace_loads()
        self._beside = None  # that one may go
        return self.reports

    # --- requests ---

    @property
    def text(self) -> "Text":
        """The checkpoint's tokenizer. Raises BigInt8Error where it cannot be read."""
        return self.read_text()

    def read_text(self, raw: bool = False) -> "Text":
        """Read the tokenizer, once. `raw`: a prompt is continued as it is, also where there is a chat template."""
        if self._text is None:
            from .run.text import Text

            self._text = Text(self.found.opened().folder, self.found.spec.access, raw)
        return self._text

    @property
    def _requests(self) -> "Generator":
        if self.engine is None:
            why = "its blocks run through transformers' own modules, one batch at a time: use pipe.model.generate(...)"
            raise BigInt8Error(f"{self.found.spec.name}: {'no model is loaded' if self.model is None else why}")
        if self._generator is None:
            from .run.generate import Generator

            self._generator = Generator(self.engine, self.read_text, self.plan, self.model.generation_config)
        return self._generator

    def generate(self, prompts: Any, generation_config: Any = None, **settings: Any) -> "list[Answer]":
        """The answers to all prompts, which run together. See `run.generate.Generator`."""
        return self._requests.generate(prompts, generation_config, **settings)

    def stream(self, prompt: Any, generation_config: Any = None, **settings: Any) -> Iterator[str]:
        """The answer to one prompt, piece by piece. See `run.generate.Generator`."""
        return self._requests.stream(prompt, generation_config, **settings)

    async def agenerate(self, prompts: Any, generation_config: Any = None, **settings: Any) -> "list[Answer]":
        """`generate` for asyncio."""
        return await self._requests.agenerate(prompts, generation_config, **settings)

    def astream(self, prompt: Any, generation_config: Any = None, **settings: Any) -> AsyncIterator[str]:
        """`stream` for asyncio."""
        return self._requests.astream(prompt, generation_config, **settings)

    def submit(self, prompt: Any, generation_config: Any = None, **settings: Any) -> "Completion":
        """Ask for an answer; returns at once: its tokens as they come. See `run.generate.Generator`."""
        return self._requests.submit(prompt, generation_config, **settings)[0]

    def stats(self) -> "EngineStats":
        """Tokens a second, the queue, and the busy share and memory of each stage."""
        return self._requests.stats()

    def close(self) -> None:
        """Let the model go; end the workers, and the cluster if it was started for them. Requests that run fail."""
        self.model = None
        try:
            self._end_engine()
            self._write_trace()
        finally:
            workers, self._workers = self._workers, None
            if workers is not None:
                workers.close()

    def _end_engine(self) -> None:
        engine, self.engine, self._generator = self.engine, None, None
        if engine is not None:
            engine.close()

    # --- what is traced ---

    def _begin_trace(self) -> None:
        if self._trace_file is not None:
            from .run.trace import Trace

            self._trace = Trace()
            for index in range(len(self.plan.stages)):
                self._trace.row(f"stage {index}")

    def _trace_loads(self) -> None:
        """The loads, as their reports tell: they have just ended. From here on the workers keep spans of their own."""
        if self._trace is None:
            return
        end_ns = time.time_ns()
        for index, report in enumerate(self.reports):
            start_ns = end_ns - int(report.seconds * 1e9)
            self._trace.span(f"stage {index}", "load", start_ns, end_ns, {"bytes read": report.bytes_read})
        if self._workers is not None:
            self._workers.trace(True)

    def _write_trace(self) -> None:
        if self._trace is None or self._trace_file is None:
            return
        if self._workers is not None:
            from .run.spans import draw

            with contextlib.suppress(BigInt8Error):  # of a worker that is gone: the others' are lost with it
                draw(self._trace, self._workers.spans())
        self._trace.write(self._trace_file)
        self._trace = None

    def _plan_for(self, workers: "Pipeline", workload: Workload) -> Plan:
        """The best plan for what the workers have; where nothing else fits, with blocks in the memory and on the disk
        of their own boxes."""
        self.devices = self._left(workers.devices())
        return make_plan(self.found.spec, self.devices, workload, spill=spill_of_boxes(self.found.spec))

    def _start(self, count: int | None, cluster: Cluster) -> "Pipeline":
        from .run.pipeline import Pipeline

        beside = None if self._beside is None else self._beside._workers
        self._workers = Pipeline(count, cluster, self.found.spec, beside)
        return self._workers

    def _left(self, devices: list[Device]) -> list[Device]:
        """What the model may take of devices: all, or what another one leaves of them. Notes what there is in all."""
        if self._beside is None:
            self._whole = devices
            return devices
        self._whole = self._beside._whole
        return left_beside(self._beside._taken(), self._whole, devices, self._one_box)

    def _taken(self) -> list[tuple[Device, int]]:
        """What the stages take of their devices, as a second model's plan names these."""
        stages = self.plan.stages
        devices = [stage.device for stage in stages] if self._workers is None else self._workers.devices()
        return [(device, stage.needed_bytes) for device, stage in zip(devices, stages, strict=False)]


def _as_planned(plan: Plan, there: Sequence[Device]) -> bool:
    """Whether the stages, in their order, are on devices of the planned kinds with room for them."""
    return all(
        device.model == stage.device.model and replace(stage, device=device).headroom_bytes >= 0
        for stage, device in zip(plan.stages, there, strict=False)
    )


def give_memory_back() -> None:
    """Let the system have the memory of models that have ended: what is in cycles, and what allocators keep."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; other libraries give back by themselves
        if trim is not None:
            trim(0)


@contextlib.contextmanager
def open_pipeline(
    model: str | os.PathLike[str],
    gpus: int | None = None,
    *,
    config: Int8Config | None = None,
    workload: Workload | None = None,
    cluster: Cluster = Cluster(),  # noqa: B008  (frozen)
    access: Access = Access(),  # noqa: B008  (frozen)
    progress: bool = True,
) -> Iterator[ModelPipeline]:
    """Load a model as a pipeline over several devices, to use in a `with` block.

    with open_pipeline("opt-175b", gpus=8) as pipe:
        answers = pipe.generate(["...", "..."], max_new_tokens=64)

    Its `model` is a transformers model.

    model: a preset's name, a folder or a hub id
    gpus: how many devices: all GPUs, or one CPU, by default
    config: threshold, skipped modules, dtype and so on
    workload: tokens of each sequence and sequences at once to leave room for
    cluster: which devices, and where; by default a Ray cluster starts on loopback, if there are several of them
    access: a revision on the hub, and whether Python code that a checkpoint brings may run

    Raises CheckpointError, PlanError, WorkerError.
    """
    found = find_model(model, config, access, elsewhere=cluster.address is not None)
    with ModelPipeline(found, gpus, workload, cluster) as pipeline:
        pipeline.load(progress)
        yield pipeline
