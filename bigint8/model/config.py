"""A checkpoint's configs as transformers reads them."""

from pathlib import Path
from typing import Any

from ..checkpoint.headers import Checkpoint
from ..errors import CheckpointError, in_one_line
from ..options import Access


def read_hf_config(checkpoint: Checkpoint, access: Access) -> Any:
    """The checkpoint's config, without what it says of int8: that is for bigint8 to read.

    Raises CheckpointError for one that transformers refuses.
    """
    from transformers import AutoConfig

    try:
        hf_config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=access.trust_remote_code)
    except Exception as error:  # transformers checks a config's values with many kinds of exceptions
        raise refused(checkpoint, error) from error
    if hasattr(hf_config, "quantization_config"):
        del hf_config.quantization_config
    return hf_config


def read_generation_config(folder: Path) -> Any:
    """The folder's generation_config.json, None where there is none. Raises CheckpointError for one that is refused."""
    from transformers import GenerationConfig

    file = folder / "generation_config.json"
    if not file.is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(folder)
    except Exception as error:  # as many kinds as there are ways to garble it
        reason = in_one_line(error)
        raise CheckpointError(f"{file}: transformers refuses it: {reason}; remove it to use defaults") from error


def refused(checkpoint: Checkpoint, error: Exception) -> CheckpointError:
    """The error for a config of which transformers makes no model."""
    return CheckpointError(f"{checkpoint.folder / 'config.json'}: transformers refuses it: {in_one_line(error)}")
