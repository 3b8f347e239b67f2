"""The Ray cluster that workers run on: one of our own on loopback, or one that is there."""

import contextlib
import functools
import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

import ray
from ray import _raylet
from ray._private import node, parameter, ray_constants, services, utils
from ray.exceptions import AuthenticationError, RayError

from ..errors import WorkerError, in_one_line
from ..plan.devices import cuda_devices, wait_without_spinning
from .leash import Leash, agents_here

OBJECT_STORE_BYTES = 2**30
"""Of a cluster that we start: only hidden states and logits pass through it."""

ANSWER_SECONDS = 10.0
"""How long a cluster's head may take to accept a connection. Ray itself would try for minutes."""

_RAY: Any = _raylet  # compiled, and known to no type checker

TOKEN_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
"""What tells Ray whether a cluster asks for a token, and which."""

_own_address: str | None = None
"""Of the cluster that this process started last."""

_leash: Leash | None = None
"""Of the cluster that this process started."""


_users = 0
_joining = threading.RLock()


def connect(workers: int | None, address: str | None) -> bool:
    """Connect to the cluster at `address`, or start one for so many workers that listens on loopback only.

    Where an earlier call did so already, its cluster is used. Returns whether the caller has to `leave` it: not where
    the process was connected by somebody else. Raises WorkerError for a cluster that cannot be reached or started.
    """
    global _users
    with _joining:
        if ray.is_initialized():
            _users += bool(_users)
            return bool(_users)
        _join(workers, address)
        _users = 1
        return True


def leave() -> None:
    """The connection is not needed any more. With its last user it ends, and with it a cluster that was started."""
    global _leash, _users
    with _joining:
        _users = max(0, _users - 1)
        if _users:
            return
        leash, _leash = _leash, None
        try:
            ray.shutdown()
        finally:
            if leash is not None:
                leash.release()


def _join(workers: int | None, address: str | None) -> None:
    global _leash, _own_address
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if address is not None:
            where = _check_that_somebody_listens(address)
            _read_token_again()  # not before: a cluster that is not there leaves Ray the token of the one that is used
            if where is not None:
                _check_token(where)
            with _sigterm_as_it_was():
                ray.init(address=address, **quiet)
        else:
            # The plan has counted the memory: Ray's watchdog would only kill workers where it is nearly full. The
            # workers run at the priority of the driver: they are this machine's main work.
            os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
            os.environ.setdefault("RAY_worker_niceness", "0")
            wait_without_spinning()
            with _loopback_only(), _token_of_its_own(), _without_onlookers(), _sigterm_as_it_was():
                ray.init(
                    address="local",
                    num_cpus=workers or max(1, len(cuda_devices())),
                    object_store_memory=OBJECT_STORE_BYTES,
                    include_dashboard=False,
                    **quiet,
                )
            _leash = Leash(agents_here())
            _own_address = ray.get_runtime_context().gcs_address
    except AuthenticationError as error:
        raise _wrong_token(address) from error
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        where = f"address={address}: the Ray cluster" if address else "a local Ray cluster"
        raise WorkerError(f"{where} cannot be reached or started: {in_one_line(error)}") from error


def is_own() -> bool:
    """Whether the cluster that this process is connected to is one that it has started."""
    return bool(ray.get_runtime_context().gcs_address == _own_address)


def _check_that_somebody_listens(address: str) -> str | None:
    """Raise WorkerError where nothing listens at HOST:PORT; the address, if Ray is to be asked there by name.

    What is written otherwise is for Ray to understand, and with "auto" it looks for a token by itself.
    """
    where = services.canonicalize_bootstrap_address(address) if address == "auto" else address
    host, _, port = (where or "").rpartition(":")
    if "://" in address or not host or not port.isdigit():
        return None
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        named = "" if where == address else f" at {where}"
        raise WorkerError(
            f"address={address}: no Ray cluster answers{named} ({in_one_line(error)}); ray start --head starts one and "
            "says its address, whose port is 6379 unless told otherwise"
        ) from None
    return where if address != "auto" else None


def _check_token(where: str) -> None:
    """Raise AuthenticationError at once for a token that is wrong or missing.

    `ray.init` tries for 20 s, and does not say why. Where one is to be sent and there is none, Ray's client would abort
    this process.
    """
    wanted = _RAY.get_authentication_mode() == _RAY.AuthenticationMode.TOKEN
    if wanted and not _RAY.AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True):
        raise AuthenticationError("there is no token")
    _RAY.GcsClient(address=where)


def _wrong_token(address: str | None) -> WorkerError:
    sent = "RAY_AUTH_MODE is not 'token', so none was sent"
    if os.environ.get("RAY_AUTH_MODE") == "token":
        there = _RAY.AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True)
        sent = "the one that was sent is not its own" if there else "there is none here"
    return WorkerError(
        f"address={address}: the Ray cluster asks for its token, and {sent}; set RAY_AUTH_MODE=token, and give the "
        "token that its nodes were started with: in RAY_AUTH_TOKEN, in a file that RAY_AUTH_TOKEN_PATH names, or in "
        "~/.ray/auth_token, which ray get-auth-token shows on its head"
    )


def places(kind: str) -> dict[str, int]:
    """How many workers of a kind each node of the cluster has place for, by its id; those that have none are left out.

    As Ray counts its GPUs or CPUs, whoever uses them now.
    """
    resource = "GPU" if kind == "cuda" else "CPU"
    found = {node["NodeID"]: int(node["Resources"].get(resource, 0)) for node in ray.nodes() if node["Alive"]}
    return {node: count for node, count in found.items() if count}


def pick(workers: int | None, device: str) -> tuple[str, int]:
    """The kind of device and the number of workers, from what is asked for and what the cluster has.

    By default these are all GPUs, or a CPU worker on each node where there is none. Raises WorkerError where it has too
    little.
    """
    gpus, on_cpus = sum(places("cuda").values()), places("cpu")
    cpus = sum(on_cpus.values())
    kind = device if device != "auto" else ("cuda" if gpus else "cpu")
    if kind == "cuda" and not gpus:
        asked = "device=cuda" if workers is None else f"gpus={workers}"
        raise WorkerError(
            f"{asked}: the cluster has 0 GPUs, as Ray counts them; ray start --num-gpus N on their node tells it, "
            "device=cpu runs on CPUs"
        )
    workers = workers or (gpus if kind == "cuda" else max(1, len(on_cpus)))
    if kind == "cuda" and gpus < workers:
        raise WorkerError(f"gpus={workers}: the cluster has {gpus} GPUs; name at most that many, or device=cpu")
    if kind == "cpu" and cpus < workers:
        raise WorkerError(f"gpus={workers}: the cluster has {cpus} CPUs for CPU workers; name at most that many")
    return kind, workers


@contextlib.contextmanager
def _sigterm_as_it_was() -> Iterator[None]:
    """A Ray started in here leaves SIGTERM to this process, which may unwind: Ray's own handler aborts."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def _without_onlookers() -> Iterator[None]:
    """A Ray started in here has no dashboard, no log monitor and no autoscaler, and a small agent on each node.

    Actors need no more. Each of these is a Python process that takes half a second to a second of a CPU to start, and
    workers wait for the agent. `ray start` has flags for some of them, `ray.init` for none, so functions of Ray are
    replaced here. A function that another version of Ray lacks is left out.
    """
    instead = (
        (parameter, "RayParams", functools.partial(parameter.RayParams, no_monitor=True, include_log_monitor=False)),
        (node.Node, "start_api_server", lambda self, **_: setattr(self, "_webui_url", None)),
        (utils, "get_dashboard_dependency_error", lambda: ImportError("not needed")),
    )
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in instead if hasattr(owner, name)]
    try:
        for owner, name, value in instead:
            if hasattr(owner, name):
                setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


@contextlib.contextmanager
def _token_of_its_own() -> Iterator[None]:
    """A Ray started in here asks everybody for a random token, which only this process and its children know.

    Without it, every user of this machine could run programs there as this one. Ray's own default is a token in the
    home folder, the same for all clusters. What a person has set is left as it is.
    """
    if any(os.environ.get(name) for name in TOKEN_VARIABLES):
        _read_token_again()
        yield
        return
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    _read_token_again()
    try:
        yield
    finally:  # it is known to Ray in here by now
        for name in TOKEN_VARIABLES:
            os.environ.pop(name, None)


def _read_token_again() -> None:
    """Ray keeps the token of the cluster before, and whether there was one."""
    _RAY.Config.initialize("")
    _RAY.AuthenticationTokenLoader.instance().reset_cache()


@contextlib.contextmanager
def _loopback_only() -> Iterator[None]:
    """A Ray started in here listens on 127.0.0.1 only.

    On Windows and macOS Ray does so by itself, unless an environment variable tells it to form clusters. On Linux it
    replaces a loopback address by one that others can reach. To turn the same variable off is the only way there.
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
