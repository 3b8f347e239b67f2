"""The public path from a model's name to a model that runs: find, open, spec, plan, load."""

import contextlib
import os
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .checkpoint.folder import absolute, check_target
from .checkpoint.headers import Checkpoint, open_checkpoint
from .errors import BigInt8Error, CheckpointError
from .options import SHARD_BYTES, Access, Cluster, Int8Config, Workload, dtype_name
from .plan.cut import make_plan
from .plan.devices import Device, cuda_devices, find_devices
from .plan.plan import Plan
from .plan.spec import ModelSpec, spec_of
from .sources.find import Source, find_source

if TYPE_CHECKING:
    import torch

    from .load.fill import LoadReport
    from .load.intake import CheckReport
    from .load.save import QuantizeReport
    from .run.engine import Engine
    from .run.generate import Answer, Generator
    from .run.pipeline import Pipeline
    from .run.requests import Completion
    from .run.stages import EngineStats
    from .run.text import Text
    from .run.trace import Trace


@dataclass(frozen=True)
class FoundModel:
    """A model that was found: its source, its spec, and its opened checkpoint if the weights are at hand."""

    source: Source
    spec: ModelSpec
    checkpoint: Checkpoint | None

    def opened(self) -> Checkpoint:
        """The checkpoint. Raises CheckpointError, with the places that were searched, where there is none."""
        if self.checkpoint is None:
            raise self.source.not_found()
        return self.checkpoint


def find_model(
    model: str | os.PathLike[str],
    config: Int8Config | None = None,
    access: Access = Access(),  # noqa: B008  (frozen)
    checkpoint: str | os.PathLike[str] | None = None,
    weights: bool = True,
) -> FoundModel:
    """Find a preset, a folder or a hub id, and read its config and its shards' headers.

    checkpoint: where a preset's weights are, a folder or a hub id
    weights: fetch them if they are on the hub; without, a checkpoint that is not whole is known by its config alone

    Raises CheckpointError for a name that is none of these, a config that lacks sizes and a checkpoint that is wrong.
    """
    source = find_source(model, checkpoint, access, fetch=weights)
    opened = None
    if source.folder is not None:
        try:
            opened = open_checkpoint(source.folder, access)
        except CheckpointError:
            if weights:
                raise
    return FoundModel(source, spec_of(source, config, access, opened), opened)


# --- one process ---


def load_sharded_int8(
    path: str | os.PathLike[str],
    device_map: "str | int | torch.device | Mapping[str, Any]" = "auto",
    *,
    config: Int8Config | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    dtype: "str | torch.dtype" = "auto",
    context: int | None = None,
    batch_size: int = 1,
    offload_folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Any:
    """Load a causal language model with int8 weights in one process; returns the transformers model, ready to use.

    path: a checkpoint folder, a hub id or a preset's name
    device_map: "auto" plans over the GPUs, then the CPU (and `offload_folder`); a device puts all of it there; a
        mapping of module names to devices ("cpu", 0, "cuda:1", "disk") is taken as it is
    config: threshold, skipped modules and activations of the int8 layers; `dtype` here overrides the config's
    max_memory: the most to use on each device, in bytes or as "20GiB", by GPU index or "cpu"; others are not used
    context, batch_size: tokens of each sequence and sequences at once to leave room for (2048, or the model's length
        if that is shorter; one). A longer sequence is refused, and more of them than have room there
    offload_folder: where weights that fit nowhere else are kept in files that are mapped into memory, in a folder of
        their own that goes when the model does

    An int8 checkpoint (of `save_int8`, `python -m bigint8.quantize` or bitsandbytes) is recognised; on the CPU its
    weights are mapped files. The model has `plan`, `hf_device_map`, `load_report` and `save_int8(folder)`. Raises
    CheckpointError for a checkpoint that is missing or wrong, PlanError when it does not fit or the device map does not
    cover the model. Nothing half-loaded is returned.
    """
    settings = config or Int8Config()
    if (wanted := dtype_name(dtype)) != "auto":
        settings = settings.model_copy(update={"dtype": wanted})
    found = find_model(path, settings, Access(revision, trust_remote_code))
    workload = found.spec.workload(context, batch_size)

    checkpoint = found.opened()
    _warm_up(found.spec, (device.kind for device in cuda_devices()))

    from .load.device_map import place

    placement = place(found.spec, checkpoint, workload, device_map, max_memory, offload_folder)
    return _load_here(placement, checkpoint, progress)


def _warm_up(spec: ModelSpec, kinds: Iterable[str]) -> None:
    """Import what a load in this process needs; if it is onto the CPU, begin to compile kernels meanwhile."""
    from .load.warm_up import compile_kernels, import_model, importing

    with importing():
        if "cuda" not in kinds:
            compile_kernels(spec)
        import_model(spec)


def _load_here(placement: Any, checkpoint: Checkpoint, progress: bool, trace: "Trace | None" = None) -> Any:
    """The transformers model of a placement, loaded in this process."""
    from .load.bars import LoadProgress
    from .load.loaded import as_loaded
    from .model.config import read_generation_config
    from .run.local import with_pages

    generation_config = read_generation_config(checkpoint.folder)
    with LoadProgress([placement.plan.spec.name], enabled=progress) as bars:
        model, report = placement.load(checkpoint, lambda done, total: bars.update(0, done, total))
    if generation_config is not None:
        model.generation_config = generation_config
    return with_pages(as_loaded(model, placement.plan, report), trace)


# --- a pipeline ---


class ModelPipeline:
    """A model over its devices: planned when this is made, loaded by `load`; a context manager that ends it.

    plan: which stage lives where; note: where that is not quite what was asked for
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
        trace: "Trace | None" = None,
        slots: int | None = None,
    ) -> None:
        """Plan for `gpus` devices of this machine, all GPUs or one CPU by default, or of a Ray cluster.

        trace: takes what is loaded and computed, and when
        slots: how many steps are under way at once, one more than there are stages by default

        Raises PlanError when the model does not fit, BigInt8Error
        and WorkerError where the devices are not there.
        """
        self.found = found
        self.note: str | None = None
        self.model: Any = None
        self.engine: Engine | None = None
        self.reports: list[LoadReport] = []
        self._workers: Pipeline | None = None
        self._trace, self._slots = trace, slots
        self._text: Text | None = None
        self._generator: Generator | None = None
        found.opened()
        workload = workload or found.spec.workload()
        if cluster.address is None:
            devices, self.note = find_devices(cluster.device, gpus)
            self.plan = make_plan(found.spec, devices, workload)
            return
        workers = self._start(gpus, cluster)
        try:
            self.plan = make_plan(found.spec, workers.devices(), workload)
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
            there = workers.devices()  # what they say themselves: the GPUs may come in another order
            if not _as_planned(self.plan, there):
                self.plan = make_plan(self.found.spec, there, self.plan.workload)
                self.note = "planned again, for the devices that the workers have"

    def load(self, progress: bool = True) -> "list[LoadReport]":
        """Load the model; what that did for each stage. Raises what `load_sharded_int8` raises."""
        checkpoint = self.found.opened()
        self._end_engine()
        self.start()
        if self._workers is None:
            _warm_up(self.plan.spec, (stage.device.kind for stage in self.plan.stages))

            from .load.device_map import place_plan

            self.model = _load_here(place_plan(self.plan, checkpoint), checkpoint, progress, self._trace)
            self.engine = self.model.engine
            self.reports = [self.model.load_report]
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
        workers, self._workers, self.model = self._workers, None, None
        try:
            self._end_engine()
        finally:
            if workers is not None:
                workers.close()

    def _end_engine(self) -> None:
        engine, self.engine, self._generator = self.engine, None, None
        if engine is not None:
            engine.close()

    def _start(self, count: int | None, cluster: Cluster) -> "Pipeline":
        from .run.pipeline import Pipeline

        self._workers = Pipeline(count, cluster, self.found.spec)
        return self._workers


def _as_planned(plan: Plan, there: Sequence[Device]) -> bool:
    """Whether the stages, in their order, are on devices of the planned kinds with room for them."""
    return all(
        device.model == stage.device.model and replace(stage, device=device).headroom_bytes >= 0
        for stage, device in zip(plan.stages, there, strict=False)
    )


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
    found = find_model(model, config, access)
    with ModelPipeline(found, gpus, workload, cluster) as pipeline:
        pipeline.load(progress)
        yield pipeline


# --- checkpoints ---


def quantize(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    config: Int8Config | None = None,
    *,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
    access: Access = Access(),  # noqa: B008  (frozen)
) -> "QuantizeReport":
    """Write the int8 checkpoint of a 16-bit one: a folder, a preset's name or a hub id.

    The int8 values are those of `load_sharded_int8(source).save_int8(folder)`; what is not int8 keeps the dtype that it
    is stored in. Needs the memory of the staging buffers, whatever the model's size; a transposed layer (GPT-2) is held
    whole. Raises CheckpointError for a source that is wrong or int8 already, a folder that is taken, a full disk.
    """
    check_target(absolute(folder), overwrite)
    found = find_model(source, config, access)

    from .load.bars import LoadProgress
    from .load.save import check_apart, rewrite
    from .model.skeleton import skeleton_of

    checkpoint = found.opened()
    check_apart(checkpoint, absolute(folder))
    skeleton = skeleton_of(checkpoint, found.spec, found.spec.stored)
    with LoadProgress([found.source.name], enabled=progress) as bars:
        return rewrite(
            checkpoint,
            skeleton,
            folder,
            found.spec.int8.threshold,
            overwrite,
            shard_bytes,
            lambda done, total: bars.update(0, done, total),
        )


def check(found: FoundModel, dtype: str = "auto", progress: bool = True) -> "CheckReport":
    """Read and quantize a whole checkpoint, keeping nothing. Raises what `load_sharded_int8` raises."""
    from .load.bars import LoadProgress
    from .load.intake import check_all
    from .model.skeleton import skeleton_of

    checkpoint = found.opened()
    skeleton = skeleton_of(checkpoint, found.spec, found.spec.stored if dtype == "auto" else dtype)
    with LoadProgress([found.source.name], enabled=progress) as bars:
        return check_all(checkpoint, skeleton, lambda done, total: bars.update(0, done, total))
