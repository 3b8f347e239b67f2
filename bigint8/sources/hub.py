"""A hub's model of which each machine has only what it needs: the headers of all shards, and the shards of its stage.

An outline is a folder in the cache that looks like the checkpoint: its config and tokenizer, and for each shard a file
of the same size that has only the header, a sparse file that takes up no more than that. A plan needs no more. Where
weights are read, the shards that a stage needs come to that machine first, and take the places of their outlines.
"""

import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.folder import CONFIG_FILES
from ..checkpoint.headers import INDEX_FILE, MAX_HEADER_BYTES, SINGLE_FILE, check_shard_name
from ..errors import CheckpointError, in_one_line
from .gguf import cache_folder

FIRST_BYTES = 100_000
"""What is asked for of a shard at first: most headers are shorter."""

SECONDS = 30

NEEDS = (
    "each machine of a cluster fetches the shards of its stages: it needs a way to the hub, room in its cache, and for "
    "a model that is not public a token (HF_TOKEN)"
)


@dataclass(frozen=True)
class HubCommit:
    """A repository of the hub, as it was at one commit: the same files on every machine."""

    id: str
    commit: str

    @property
    def folder(self) -> Path:
        """Of its outline on this machine."""
        return cache_folder() / "hub" / self.id.replace("/", "--") / self.commit


def outline_of(hub_id: str, revision: str | None) -> HubCommit:
    """Make the outline of a revision, by default of the main branch; whatever the hub's client raises."""
    from huggingface_hub import snapshot_download

    snapshot = Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(CONFIG_FILES)))
    hub = HubCommit(hub_id, snapshot.name)
    make_outline(hub)
    return hub


def make_outline(hub: HubCommit) -> Path:
    """The folder of the outline, made if it is not there; it appears whole or not at all.

    Raises CheckpointError where it cannot be had, and for an index that names files elsewhere.
    """
    folder = hub.folder
    if folder.is_dir():
        if all(file.exists() for file in folder.rglob("*")):
            return folder
        shutil.rmtree(folder)  # somebody has emptied the hub's own cache, to which it has links
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        _make_outline(hub, folder)
    except CheckpointError:
        raise
    except Exception as error:  # the hub's client raises many kinds, by transport and status
        raise CheckpointError(
            f"the hub, {hub.id} at {hub.commit[:8]}: its headers cannot be read by {socket.gethostname()}: "
            f"{in_one_line(error, 200)}; {NEEDS}"
        ) from error
    return folder


def _make_outline(hub: HubCommit, folder: Path) -> None:
    from huggingface_hub import snapshot_download

    snapshot = Path(snapshot_download(hub.id, revision=hub.commit, allow_patterns=list(CONFIG_FILES)))
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".outline-") as temporary:
        made = Path(temporary) / "outline"
        made.mkdir()
        for file in snapshot.iterdir():
            if file.is_file() and file.suffix != ".safetensors":
                (made / file.name).symlink_to(file.resolve())
        for name in _shards(made):
            _draw(hub, name, made / name)
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # not another process that was quicker
                raise


def fetch_shards(hub: HubCommit, names: Iterable[str]) -> None:
    """Let the outlines of these shards become the shards themselves. Raises CheckpointError where one cannot be had."""
    from huggingface_hub import hf_hub_download

    for name in sorted(set(names)):
        place = hub.folder / name
        if place.is_symlink():
            continue
        try:
            file = Path(hf_hub_download(hub.id, name, revision=hub.commit)).resolve()
            with tempfile.TemporaryDirectory(dir=place.parent, prefix=".shard-") as temporary:
                (Path(temporary) / "shard").symlink_to(file)
                os.replace(Path(temporary) / "shard", place)  # noqa: PTH105  (of a link, not of what it names)
        except Exception as error:  # the hub's client raises many kinds, by transport and status
            raise CheckpointError(
                f"the hub, {hub.id} at {hub.commit[:8]}: {name} cannot be fetched by {socket.gethostname()}: "
                f"{in_one_line(error, 200)}; {NEEDS}"
            ) from error


def _shards(folder: Path) -> list[str]:
    """The shards' names, as the index has them; the single one where there is none."""
    index = folder / INDEX_FILE
    if not index.is_file():
        return [SINGLE_FILE]
    try:
        names = sorted({str(name) for name in json.loads(index.read_bytes())["weight_map"].values()})
    except (ValueError, KeyError, AttributeError, TypeError):
        raise CheckpointError(f"{index}: no weight_map; the hub's copy is wrong") from None
    for name in names:
        check_shard_name(index, name)
    return names


def _draw(hub: HubCommit, name: str, place: Path) -> None:
    """A shard's outline; a link to the shard where the hub's cache has it."""
    from huggingface_hub import try_to_load_from_cache

    place.parent.mkdir(parents=True, exist_ok=True)
    cached = try_to_load_from_cache(hub.id, name, revision=hub.commit)
    if isinstance(cached, str):
        place.symlink_to(Path(cached).resolve())
        return
    begin, size = _part(hub, name, 0, FIRST_BYTES)
    length = int.from_bytes(begin[:8], "little")
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise CheckpointError(f"the hub, {hub.id}: {name} of {size:,} bytes has a header of {length:,}: it is damaged")
    if len(begin) < 8 + length:
        begin += _part(hub, name, len(begin), 8 + length)[0]
    with place.open("wb") as file:
        file.write(begin[: 8 + length])
        file.truncate(size)


def _part(hub: HubCommit, name: str, start: int, stop: int) -> tuple[bytes, int]:
    """Some bytes of a file on the hub, fewer where it ends; and how many it has in all."""
    from huggingface_hub import hf_hub_url, utils

    hub_client: Any = utils  # it names what it exports to no type checker
    wanted = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    url, headers = hf_hub_url(hub.id, name, revision=hub.commit), hub_client.build_hf_headers() | wanted
    response = hub_client.get_session().get(url, headers=headers, timeout=SECONDS)
    hub_client.hf_raise_for_status(response)
    total = response.headers.get("Content-Range", "").rpartition("/")[2]
    if response.status_code != 206 or not total.isdigit():
        raise CheckpointError(f"the hub, {hub.id}: {name} cannot be had in parts; fetch the model to a folder first")
    return response.content, int(total)
