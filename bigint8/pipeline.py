"""The pipeline over Ray: a worker for each device, and the driver that sends work through them.

A step of the model is a chain of actor calls, each given the reference of the one before: hidden states go from worker
to worker, and the driver sees only token ids and logits. Where the head is tied to the embeddings, the last hidden
state returns to the first worker, which has them (a ring).
"""

import contextlib
import itertools
import os
import socket
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import ray
import torch
from ray._private import ray_constants
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch import Tensor
from transformers import AutoConfig, Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .checkpoint import open_checkpoint
from .config import Int8Config
from .errors import BigInt8Error, WorkerError
from .hardware import Device, DeviceKind, cpu_device, cuda_devices
from .loader import LoadReport, check_context, load_stage, read_generation_config
from .planner import Plan
from .progress import LoadProgress

START_SECONDS = 180
"""How long a cluster may take to give us workers."""

POLL_SECONDS = 0.1
"""How often loading workers are asked how far they are."""

MAX_RESTARTS = 3
"""How often one step is tried again after a worker died."""

OBJECT_STORE_BYTES = 2**30
"""Of a cluster that we start: only hidden states and logits pass through it."""

CacheEdit = tuple[str, Any]
"""A method of a transformers cache and its argument, to be applied on every worker before the next step."""


# --- tensors between processes -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packed:
    """A tensor as Ray moves it: a numpy array, bfloat16 as the int16 of its bits."""

    array: Any
    dtype: str


def pack(tensor: Tensor | None) -> Packed | None:
    """A tensor ready to leave this process."""
    if tensor is None:
        return None
    tensor = tensor.detach().cpu().contiguous()
    bits = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
    return Packed(bits.numpy(), str(tensor.dtype).removeprefix("torch."))


def unpack(packed: Packed | None, device: str) -> Tensor | None:
    """The tensor on this process's device."""
    if packed is None:
        return None
    tensor = torch.from_numpy(packed.array.copy())  # what Ray hands out is read-only
    return tensor.view(getattr(torch, packed.dtype)).to(device)


# --- the worker --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WorkerInfo:
    """Where a worker runs and what it has: `device` as the worker itself names it."""

    node: str
    host: str
    pid: int
    device: Device


class Worker:
    """The actor that owns one device: it loads its stage and runs it."""

    def __init__(self, kind: str) -> None:
        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
        self._kind = kind
        self._progress = (0, 0)
        self._stage: Any = None
        self._device = "cpu"
        self._caches: dict[int, Any] = {}

    def describe(self) -> WorkerInfo:
        device = cuda_devices()[0] if self._kind == "cuda" else cpu_device()
        return WorkerInfo(ray.get_runtime_context().get_node_id(), socket.gethostname(), os.getpid(), device)

    def load(
        self, folder: str, first: int, last: int, device: str, config: Int8Config, dtype: str, trust_remote_code: bool
    ) -> LoadReport:
        self.unload()
        self._device = device

        def on_progress(done: int, total: int) -> None:
            self._progress = (done, total)

        checkpoint = open_checkpoint(folder, trust_remote_code)
        self._stage, report = load_stage(checkpoint, first, last, device, config, dtype, on_progress, trust_remote_code)
        return report

    def unload(self) -> None:
        """Give the stage's memory back."""
        self._stage, self._caches, self._progress = None, {}, (0, 0)

    @ray.method(concurrency_group="control")
    def progress(self) -> tuple[int, int]:
        """Bytes read so far and in all; (0, 0) before reading begins."""
        return self._progress

    @torch.inference_mode()
    def forward(
        self,
        inputs: Packed,
        cache_id: int | None,
        edits: Sequence[CacheEdit],
        mask: Packed | None,
        positions: Packed | None,
        keep: int | Packed | None,
    ) -> Packed:
        """One step of this stage. `keep`: on the last stage, which tokens' hidden states (and logits) to return."""
        cache = None
        if cache_id is not None:
            if cache_id not in self._caches:
                self._caches[cache_id] = self._stage.new_cache()
            cache = self._caches[cache_id]
            for method, argument in edits:
                getattr(cache, method)(torch.tensor(argument) if isinstance(argument, list) else argument)
        hidden = self._stage(
            unpack(inputs, self._device), unpack(mask, self._device), unpack(positions, self._device), cache
        )
        if keep is not None:
            index = unpack(keep, self._device) if isinstance(keep, Packed) else slice(-keep if keep else None, None)
            hidden = hidden[:, index]
            if self._stage.has_head:
                hidden = self._stage.head(hidden)
        return cast(Packed, pack(hidden))

    @torch.inference_mode()
    def head(self, hidden: Packed) -> Packed:
        """Logits of the last stage's hidden states, where the head lives with the embeddings."""
        return cast(Packed, pack(self._stage.head(unpack(hidden, self._device))))

    def drop(self, cache_id: int) -> None:
        """Forget a sequence."""
        self._caches.pop(cache_id, None)


# --- the pipeline ------------------------------------------------------------------------------------------------


class Pipeline:
    """The workers in order. Use as a context manager, or `close` it: that ends the workers and a cluster it started."""

    def __init__(self, workers: int | None = None, device: DeviceKind = "auto", address: str | None = None) -> None:
        """Start `workers` actors on the cluster at `address`, or on one of their own that listens on loopback only.

        By default as many as the cluster has GPUs, or one on a CPU. Raises WorkerError if the cluster cannot be
        reached or has too few GPUs or CPUs.
        """
        self._started_ray = False
        self._group: Any = None
        self._workers: list[Any] = []
        self._load: Callable[[int], Any] | None = None
        self._stages = 0
        self._ids = itertools.count()
        self.infos: list[WorkerInfo] = []
        try:
            self._connect(workers, address)
            self.kind, count = self._pick(workers, device)
            self._start_workers(count)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _connect(self, workers: int | None, address: str | None) -> None:
        if ray.is_initialized():
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        try:
            if address is not None:
                ray.init(address=address, **quiet)
            else:
                # The plan has counted the memory: Ray's watchdog would only kill workers where it is nearly full. And
                # the workers are what this machine is to do, so they run at the priority of the driver.
                os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
                os.environ.setdefault("RAY_worker_niceness", "0")
                with _loopback_only():
                    ray.init(
                        address="local",
                        num_cpus=max(workers or 1, os.cpu_count() or 1),
                        object_store_memory=OBJECT_STORE_BYTES,
                        include_dashboard=False,
                        **quiet,
                    )
        except (ConnectionError, RuntimeError, ValueError, RayError) as error:
            where = f"the Ray cluster at {address}" if address else "a local Ray cluster"
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise WorkerError(f"--address: {where} cannot be reached or started: {reason}") from error
        self._started_ray = True

    def _pick(self, workers: int | None, device: DeviceKind) -> tuple[str, int]:
        """The kind of device and the number of workers."""
        there = ray.cluster_resources()
        gpus, cpus = int(there.get("GPU", 0)), int(there.get("CPU", 0))
        kind = device if device != "auto" else ("cuda" if gpus else "cpu")
        workers = workers or (gpus if kind == "cuda" and gpus else 1)
        if kind == "cuda" and gpus < workers:
            raise WorkerError(f"--gpus {workers}: the cluster has {gpus} GPUs; name at most that many, or --device cpu")
        if kind == "cpu" and cpus < workers:
            raise WorkerError(f"--gpus {workers}: the cluster has {cpus} CPUs for CPU workers; name at most that many")
        return kind, workers

    def _start_workers(self, count: int) -> None:
        bundle = {"CPU": 1, "GPU": 1} if self.kind == "cuda" else {"CPU": 1}
        self._group = placement_group([bundle] * count, strategy="PACK")
        if not self._group.wait(START_SECONDS):
            raise WorkerError(
                f"the cluster gave no place for {count} x {bundle} within {START_SECONDS} s; other jobs may hold it "
                "(ray status shows them)"
            )
        self._workers = [self._new_worker(i) for i in range(count)]
        infos = self._get([worker.describe.remote() for worker in self._workers], START_SECONDS)
        order = sorted(range(count), key=lambda i: (infos[i].node, infos[i].device.name, i))  # neighbours share a box
        self._bundles = order
        self._workers = [self._workers[i] for i in order]
        self.infos = [infos[i] for i in order]

    def _new_worker(self, bundle: int) -> Any:
        actor = ray.remote(concurrency_groups={"control": 1})(Worker).options(
            num_cpus=1,
            num_gpus=1 if self.kind == "cuda" else 0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group=self._group, placement_group_bundle_index=bundle
            ),
        )
        return actor.remote(self.kind)

    def devices(self) -> list[Device]:
        """A device for each worker, in order; CPU workers of one box share its memory equally."""
        nodes = [info.node for info in self.infos]
        return [
            info.device
            if info.device.kind == "cuda"
            else replace(info.device, usable_bytes=info.device.usable_bytes // nodes.count(info.node))
            for info in self.infos
        ]

    def load(
        self,
        folder: str | os.PathLike[str],
        plan: Plan,
        config: Int8Config | None = None,
        progress: bool = True,
        trust_remote_code: bool = False,
    ) -> list[LoadReport]:
        """Load every stage of the plan, in parallel, each worker its own byte ranges.

        The folder must be readable on every node. Workers beyond the plan's stages stay idle. Raises what the loader
        raises; then nothing stays loaded.
        """
        if len(plan.stages) > len(self._workers):
            raise WorkerError(f"a plan of {len(plan.stages)} stages for {len(self._workers)} workers")
        settings = config or Int8Config()

        def start(index: int) -> Any:
            stage = plan.stages[index]
            return self._workers[index].load.remote(
                str(Path(folder).absolute()),
                stage.first_block,
                stage.last_block,
                self.infos[index].device.name,
                settings,
                plan.dtype,
                trust_remote_code,
            )

        self._load, self._stages = start, len(plan.stages)
        for worker in self._workers[self._stages :]:
            worker.unload.remote()
        loads = [start(i) for i in range(self._stages)]
        infos = self.infos[: self._stages]
        names = [f"worker {i} ({info.host}, {info.device.name})" for i, info in enumerate(infos)]
        with LoadProgress(names, enabled=progress) as bars:
            waiting = loads
            while waiting:
                _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=POLL_SECONDS)
                asked = [worker.progress.remote() for worker in self._workers[: self._stages]]
                for i, (done, total) in enumerate(self._get(asked)):
                    if total:
                        bars.update(i, done, total)
        try:
            return cast(list[LoadReport], self._get(loads))
        except BaseException:
            self._load, self._stages = None, 0
            for worker in self._workers:
                worker.unload.remote()
            raise

    def model(self, folder: str | os.PathLike[str], plan: Plan, trust_remote_code: bool = False) -> "PipelineModel":
        """The transformers model that runs on the workers; `load` comes first."""
        hf_config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        model = PipelineModel(hf_config, self, plan)
        generation_config = read_generation_config(Path(folder))
        if generation_config is not None:
            model.generation_config = generation_config
        return model

    def step(
        self,
        inputs: Tensor,
        cache_id: int | None,
        edits: Sequence[CacheEdit],
        mask: Tensor | None,
        positions: Tensor | None,
        keep: int | Tensor,
        tied: bool,
    ) -> Tensor:
        """Token ids (batch, tokens) through all stages: logits (batch, kept tokens, vocabulary)."""
        if not self._stages:
            raise WorkerError("no model is loaded on the workers; Pipeline.load comes first")
        packed_mask, packed_positions = pack(mask), pack(positions)
        kept = pack(keep) if isinstance(keep, Tensor) else keep
        last = self._stages - 1
        hidden: Any = pack(inputs)
        for i, worker in enumerate(self._workers[: self._stages]):
            hidden = worker.forward.remote(
                hidden, cache_id, edits, packed_mask, packed_positions, kept if i == last else None
            )
        if tied and last > 0:
            hidden = self._workers[0].head.remote(hidden)
        return cast(Tensor, unpack(self._get(hidden), "cpu"))

    def new_cache_id(self) -> int:
        """An id under which the workers keep the keys and values of one batch of sequences."""
        return next(self._ids)

    def drop(self, cache_id: int) -> None:
        """Let the workers forget a batch of sequences."""
        if ray.is_initialized():
            for worker in self._workers:
                worker.drop.remote(cache_id)

    def restart_dead(self) -> list[int]:
        """Start each dead worker again and load its stage; returns their indices. Other workers keep theirs."""
        if self._load is None:
            return []
        alive = [worker.progress.remote() for worker in self._workers]
        dead = []
        for i, reference in enumerate(alive):
            try:
                ray.get(reference, timeout=START_SECONDS)
            except (RayActorError, GetTimeoutError):
                dead.append(i)
        for i in dead:
            ray.kill(self._workers[i])
            self._workers[i] = self._new_worker(self._bundles[i])
        infos = self._get([self._workers[i].describe.remote() for i in dead], START_SECONDS)
        for i, info in zip(dead, infos, strict=True):
            self.infos[i] = info
        self._get([self._load(i) for i in dead if i < self._stages])
        return dead

    def _get(self, references: Any, timeout: float | None = None) -> Any:
        """`ray.get` with the errors of the interface: those of bigint8 as they were raised, others as WorkerError."""
        try:
            return ray.get(references, timeout=timeout)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, BigInt8Error):
                raise cause from None
            if isinstance(cause, RayActorError):
                raise cause from None
            raise WorkerError(f"a worker failed: {type(cause).__name__}: {cause}") from error
        except GetTimeoutError:
            raise WorkerError(f"a worker did not answer within {timeout:.0f} s; ray status shows the cluster") from None

    def close(self) -> None:
        """End the workers; end the cluster, or the connection to it, that this pipeline began."""
        if ray.is_initialized():
            for worker in self._workers:
                ray.kill(worker)
            if self._group is not None:
                remove_placement_group(self._group)
            if self._started_ray:
                ray.shutdown()
        self._workers, self._group = [], None


@contextlib.contextmanager
def _loopback_only() -> Iterator[None]:
    """A Ray started in here listens on 127.0.0.1 only.

    Ray does that by itself on Windows and macOS, where this variable turns it off; on Linux it replaces a loopback
    address that it is given by one that others can reach, so the same switch is the only way.
    """
    name, before = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    environment = os.environ.get(name)
    os.environ[name] = "0"
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        os.environ.pop(name)
        if environment is not None:
            os.environ[name] = environment


# --- the driver --------------------------------------------------------------------------------------------------


class PipelineCache(Cache):
    """What the driver keeps of a batch of sequences: an id, the tokens so far and their positions.

    The keys and values are with the workers. Edits (beam search, assisted decoding) are noted and go along with the
    next step. When the object goes, the workers forget the sequences.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__(layers=[])
        self._pipeline = pipeline
        self.edits: list[CacheEdit] = []
        self.tokens: Tensor | None = None
        self.positions: Tensor | None = None
        self._finalizer: Callable[[], Any] | None = None
        self.renew()

    def renew(self) -> None:
        """A new id: the workers' caches for the old one are dropped, the tokens stay."""
        if self._finalizer is not None:
            self._finalizer()
        self.id = self._pipeline.new_cache_id()
        self.edits = []
        self._finalizer = weakref.finalize(self, self._pipeline.drop, self.id)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.tokens is None else self.tokens.shape[1]

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return True

    def note(self, tokens: Tensor, positions: Tensor | None) -> None:
        """These tokens have passed through the workers."""
        self.edits = []
        self.tokens = tokens if self.tokens is None else torch.cat([self.tokens, tokens], dim=1)
        if positions is not None:
            positions = positions.expand(tokens.shape[0], -1)
            self.positions = positions if self.positions is None else torch.cat([self.positions, positions], dim=1)

    def _edit(self, method: str, argument: Any, change: Callable[[Tensor], Tensor]) -> None:
        self.edits.append((method, argument))
        self.tokens = None if self.tokens is None else change(self.tokens)
        self.positions = None if self.positions is None else change(self.positions)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._edit("reorder_cache", beam_idx.tolist(), lambda t: t[beam_idx.cpu()])

    def batch_select_indices(self, indices: Tensor) -> None:
        self._edit("batch_select_indices", indices.tolist(), lambda t: t[indices.cpu()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._edit("batch_repeat_interleave", repeats, lambda t: t.repeat_interleave(repeats, dim=0))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            self._edit("crop", tokens_to_remove, lambda t: t[:, : -abs(tokens_to_remove)])


class PipelineModel(PreTrainedModel, GenerationMixin):
    """A causal language model whose forward pass runs on the workers: all of `generate()` works on it."""

    main_input_name = "input_ids"

    def __init__(self, config: Any, pipeline: Pipeline, plan: Plan) -> None:
        super().__init__(config)
        self.pipeline, self.plan = pipeline, plan
        self._dtype = getattr(torch, plan.dtype)

    @property
    def device(self) -> torch.device:
        """Where token ids go in and logits come out."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return cast(torch.dtype, self._dtype)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = PipelineCache(self.pipeline)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: PipelineCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (batch, kept tokens, vocabulary) of token ids (batch, tokens).

        Raises BigInt8Error for a sequence longer than the planned context, WorkerError when a worker fails. A worker
        that dies is started again and the sequences are run through anew.
        """
        cache = past_key_values
        if cache is None and use_cache:
            cache = PipelineCache(self.pipeline)
        past = cache.get_seq_length() if cache is not None else 0
        check_context(past + input_ids.shape[1], self.plan.context)
        tied = bool(getattr(self.config, "tie_word_embeddings", False))
        inputs, positions, edits = input_ids, position_ids, list(cache.edits) if cache is not None else []
        keep = logits_to_keep
        for attempt in range(MAX_RESTARTS + 1):
            try:
                logits = self.pipeline.step(
                    inputs, cache.id if cache is not None else None, edits, attention_mask, positions, keep, tied
                )
                break
            except RayActorError as error:
                if attempt == MAX_RESTARTS:
                    raise WorkerError(f"a worker died {attempt + 1} times in one step: {error}") from error
                time.sleep(attempt)
                self.pipeline.restart_dead()
                if cache is not None:
                    cache.renew()
                    edits = []
                    if cache.tokens is not None:
                        inputs = torch.cat([cache.tokens, input_ids], dim=1)
                        if position_ids is not None and cache.positions is not None:
                            new = position_ids.expand(input_ids.shape[0], -1)
                            positions = torch.cat([cache.positions, new], dim=1)
                    if isinstance(logits_to_keep, int):
                        keep = logits_to_keep or input_ids.shape[1]
                    else:
                        keep = logits_to_keep + (inputs.shape[1] - input_ids.shape[1])
        if cache is not None:
            cache.note(input_ids, position_ids)
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)
