"""bigint8's HTTP service as a Ray Serve application, for a Ray cluster whose other applications Serve runs too.

serve run --app-dir launch --working-dir launch serve_app:build model=opt-13b gpus=4

One replica, which needs no GPU, is the driver: it plans, starts a worker for each stage on its own cluster, and
answers what `bigint8 serve` answers. Serve's proxies have the ports.
"""

import asyncio
import time
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from bigint8.errors import WorkerError
from bigint8.model_pipeline import ModelPipeline
from bigint8.options import Access, Cluster, DeviceKind, Dtype, Int8Config
from bigint8.service.app import new_app
from bigint8.service.limits import Keys, Limits
from bigint8.service.state import Model, State
from bigint8.session import find_model
from bigint8.terminal.flags import bytes_of_flag, new_console
from bigint8.terminal.tables import print_plan, print_summary

END_SECONDS = 20.0
"""How long workers and whatever else is left may take to end, after the requests."""


class Arguments(BaseModel):
    """What `serve run serve_app:build NAME=VALUE...` takes, and `args` of a Serve config: flags of `bigint8 serve`.

    gpus: how many devices of the cluster: all GPUs, or a CPU of each node, by default
    max_requests: that are taken from Serve at once; more wait in its proxies. Those without a place in a step wait in
        the service's line, whose length is `max_queue`
    drain_seconds: how long requests may go on when the application is deleted or deployed anew
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str
    checkpoint: str | None = None
    name: str | None = None
    gpus: int | None = Field(default=None, ge=1)
    device: DeviceKind = "auto"
    context: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=8, ge=1)
    dtype: Dtype = "auto"
    int8_head: bool = False
    revision: str | None = None
    trust_remote_code: bool = False
    max_body: str = "8MiB"
    max_queue: int = Field(default=64, ge=1)
    queue_seconds: float = Field(default=60.0, gt=0)
    client_seconds: float = Field(default=30.0, gt=0)
    max_requests: int = Field(default=1000, ge=1)
    drain_seconds: float = Field(default=30.0, ge=0)

    def limits(self) -> Limits:
        """The service's own bounds. Raises BigInt8Error for a size that is none."""
        body = bytes_of_flag("max_body", self.max_body)
        return Limits(body, self.max_queue, self.queue_seconds, self.client_seconds, self.max_requests)


@serve.ingress()
class Bigint8:
    """The replica: a model over the workers of its cluster, and the application that answers for it."""

    def __init__(self, arguments: Arguments, keys: Keys) -> None:
        """Plan and load. Raises BigInt8Error, which `serve status` shows."""
        self._state = State(arguments.name or arguments.model)
        self._keys, self._limits = keys or Keys.from_environment(), arguments.limits()
        self._pipeline = _opened(arguments)
        try:
            _load(self._pipeline)
            self._state.open(Model.of(self._pipeline, self._state.name))
        except BaseException:
            self._pipeline.close()
            raise

    def __serve_build_asgi_app__(self) -> Any:
        """What answers requests."""
        return new_app(self._state, self._limits, self._keys)

    def check_health(self) -> None:
        """Raise WorkerError if the engine has ended for good: Serve then starts another replica.

        While a stage is started again there is nothing that another replica would do better.
        """
        _, said = self._state.health()
        if said["status"] == "failed":
            raise WorkerError(f"the engine has ended: {said['error']}")

    async def __del__(self) -> None:
        """End the workers. Serve has waited for the requests."""
        if hasattr(self, "_pipeline"):
            self._state.drain(0.0)
            await asyncio.to_thread(self._pipeline.close)


def _opened(arguments: Arguments) -> ModelPipeline:
    """The model's workers on this cluster, and its plan."""
    int8 = Int8Config(dtype=arguments.dtype, int8_head=arguments.int8_head or None)
    access = Access(arguments.revision, arguments.trust_remote_code)
    found = find_model(arguments.model, int8, access, arguments.checkpoint, elsewhere=True)
    workload = found.spec.workload(arguments.context, arguments.batch_size)
    return ModelPipeline(found, arguments.gpus, workload, Cluster(arguments.device, "auto"))


def _load(pipeline: ModelPipeline) -> None:
    """Load, and say in the replica's log what is loaded where."""
    console, began = new_console(), time.perf_counter()
    print_plan(console, pipeline.plan)
    reports = pipeline.load()
    print_summary(console, pipeline.plan, reports, time.perf_counter() - began)


def build(arguments: Arguments) -> serve.Application:
    """The application, with one replica.

    Keys are those of BIGINT8_API_KEY where this runs, or else where the replica does. Raises BigInt8Error for an
    argument that is wrong.
    """
    arguments.limits()
    deployment = serve.deployment(
        Bigint8,
        name="bigint8",
        num_replicas=1,
        ray_actor_options={"num_cpus": 0, "num_gpus": 0},  # the workers have them all
        max_ongoing_requests=arguments.max_requests,
        max_queued_requests=arguments.max_requests,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=arguments.drain_seconds + END_SECONDS,
    )
    return deployment.bind(arguments, Keys.from_environment())
