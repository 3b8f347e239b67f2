"""Serve a model over HTTP, as OpenAI's interface has it.

python -m bigint8.serve MODEL --gpus N [--host 127.0.0.1 --port 8000]
"""

import contextlib
import signal
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from .errors import BigInt8Error
from .model_pipeline import ModelPipeline
from .options import SERVED_CPU_CHUNK, Access, Cluster, DeviceKind, Dtype, Int8Config, Workload
from .plan.devices import cuda_devices
from .session import FoundModel, find_model
from .terminal.flags import (
    AccessFlags,
    Int8Head,
    PlanFlags,
    Source,
    bytes_of_flag,
    command,
    new_app,
    new_console,
    run_command,
)
from .terminal.tables import print_plan, print_summary

if TYPE_CHECKING:
    from .service.loads import Loads
    from .service.schemas import LoadRequest

app = new_app()

LOOPBACK = ("127.0.0.1", "::1", "localhost")

LOOK_SECONDS = 0.1
"""How often the main thread looks whether a signal has come."""


@dataclass(kw_only=True)
class ServeFlags(AccessFlags, PlanFlags):
    """The flags of this command."""

    model: Source
    checkpoint: Annotated[str | None, typer.Option(help="Where a preset's weights are: a folder or a hub id.")] = None
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port to listen on; 0 takes a free one.")] = 8000
    name: Annotated[str | None, typer.Option(help="The model's name for clients (by default as it is given).")] = None
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences that run at once.")] = 8
    device: Annotated[DeviceKind, typer.Option(help="What the workers run on.")] = "auto"
    int8_head: Int8Head = False
    address: Annotated[str | None, typer.Option(help="An existing Ray cluster; by default a local one starts.")] = None
    max_body: Annotated[str, typer.Option(help="The largest request.")] = "8MiB"
    max_queue: Annotated[int, typer.Option(min=1, help="Requests that wait in line; then 429.")] = 64
    queue_seconds: Annotated[float, typer.Option(min=0.1, help="How long a request waits in line; then 503.")] = 60.0
    client_seconds: Annotated[
        float, typer.Option(min=0.1, help="How long a client may take to send headers, a body, or to read on.")
    ] = 30.0
    max_connections: Annotated[int, typer.Option(min=1, help="Connections that are open at once.")] = 1000
    drain_seconds: Annotated[float, typer.Option(min=0.0, help="How long requests may go on after SIGTERM.")] = 30.0


class Ending(BaseException):
    """The process was asked to end while it loads another model."""


class Signals:
    """What the process was asked by signals: to end when requests are done, and then, by Ctrl-C again, at once.

    loading: the main thread loads another model, which ends it with `Ending`
    """

    def __init__(self) -> None:
        self.serving = self.loading = self.ending = False

    def take(self) -> None:
        """Take SIGTERM and SIGINT from now on."""
        signal.signal(signal.SIGTERM, self._terminated)
        signal.signal(signal.SIGINT, self._interrupted)

    def _terminated(self, *_: int | FrameType | None) -> None:
        if not self.serving:
            sys.exit(0)  # nothing is asked yet
        self._end()

    def _interrupted(self, *_: int | FrameType | None) -> None:
        if not self.serving or self.ending:
            raise KeyboardInterrupt
        self._end()

    def _end(self) -> None:
        self.ending = True
        if self.loading:
            self.loading = False
            raise Ending


@command(app, ServeFlags)
def serve(flags: ServeFlags) -> None:
    """Serve a model over HTTP: OpenAI's interface, health, metrics, and a page to try it on."""
    try:
        from .service.app import new_app as new_service
        from .service.limits import ADMIN_VARIABLE, KEY_VARIABLE, Keys, Limits
        from .service.loads import Loads
        from .service.server import Server
        from .service.state import Model, State
    except ImportError as error:
        raise BigInt8Error(f'bigint8 serve needs {error.name}: pip install "bigint8[serve]"') from None
    flags.refuse_other_devices("plans: to serve")
    console, signals = new_console(), Signals()
    limits = Limits(
        bytes_of_flag("--max-body", flags.max_body), flags.max_queue, flags.queue_seconds, flags.client_seconds,
        flags.max_connections,
    )  # fmt: skip
    cluster = Cluster(flags.device, flags.address)
    found = _found(flags, flags.model, flags.checkpoint)
    found.opened()
    keys, admin_keys = Keys.from_environment(), Keys.from_environment(ADMIN_VARIABLE)
    state = State(flags.name or flags.model)
    loads = Loads(state, partial(plan_beside, flags, cluster), lambda line: console.print(line, soft_wrap=True))
    service = new_service(state, limits, keys, loads, admin_keys)
    signals.take()
    with Server(service, flags.host, flags.port, limits) as server, contextlib.closing(loads):
        console.print(f"listening on {server.address}; /health says 200 when the model is loaded", soft_wrap=True)
        if not keys and flags.host not in LOOPBACK:
            console.print(f"anyone who reaches {server.address} may use it: set {KEY_VARIABLE}", soft_wrap=True)
        pipeline = ModelPipeline(found, flags.gpus, _work(flags, found), cluster)
        loads.begin(pipeline, flags.model)
        if pipeline.note:
            console.print(pipeline.note, soft_wrap=True)
        print_plan(console, pipeline.plan)
        began = time.perf_counter()
        reports = pipeline.load()
        print_summary(console, pipeline.plan, reports, time.perf_counter() - began)
        state.open(Model.of(pipeline, state.name))
        del pipeline  # another one may take its place
        signals.serving = True
        console.print(f"serving {state.name} on {server.address}", soft_wrap=True)
        _load_until_the_end(loads, signals)
        console.print("ending: no more requests are taken")
        if not state.drain(flags.drain_seconds):
            console.print(f"requests that run after {flags.drain_seconds:g} s are ended", soft_wrap=True)


def _load_until_the_end(loads: "Loads", signals: Signals) -> None:
    """Load other models when they are asked for, until the process is to end. A load that is under way then ends."""
    with contextlib.suppress(Ending):
        signals.loading = True
        while not signals.ending:
            loads.work(LOOK_SECONDS)
    signals.loading = False


def _found(
    flags: ServeFlags, model: str, checkpoint: str | None, dtype: Dtype | None = None, int8_head: bool | None = None
) -> FoundModel:
    """A model with the settings of the flags, or with others in their place."""
    head = (flags.int8_head or None) if int8_head is None else int8_head
    int8 = Int8Config(dtype=dtype or flags.dtype, int8_head=head)
    access = flags.access() if model == flags.model else Access()  # a revision, and trust, are of that model alone
    return find_model(model, int8, access, checkpoint, elsewhere=flags.address is not None)


def plan_beside(flags: ServeFlags, cluster: Cluster, wanted: "LoadRequest", running: ModelPipeline) -> ModelPipeline:
    """The model that is asked for, planned beside the one that runs."""
    checkpoint = flags.checkpoint if wanted.checkpoint is None and wanted.model == flags.model else wanted.checkpoint
    found = _found(flags, wanted.model, checkpoint, wanted.dtype, wanted.int8_head)
    found.opened()
    work = _work(flags, found, wanted.context, wanted.batch_size)
    return ModelPipeline(found, flags.gpus, work, cluster, beside=running)


def _work(flags: ServeFlags, found: FoundModel, context: int | None = None, sequences: int | None = None) -> Workload:
    """The work of the flags, or other numbers in their place. CPUs take prompts in short pieces, so that none waits."""
    work = found.spec.workload(context or flags.context, sequences or flags.batch_size)
    on_cpus = flags.device == "cpu" or (flags.device == "auto" and flags.address is None and not cuda_devices())
    return replace(work, chunk=SERVED_CPU_CHUNK) if on_cpus else work


def main() -> None:
    """Run the command line."""
    run_command(app)


if __name__ == "__main__":
    main()
