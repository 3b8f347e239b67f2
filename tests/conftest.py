"""Fixtures that several modules use."""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # before triton is imported: it asks once
    os.environ.setdefault("TRITON_INTERPRET", "1")

from folders import save_tokenizer
from tiny import save_tiny


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 16-bit checkpoint of several shards, with a tokenizer; not to be written to."""
    folder = save_tiny("llama", False, tmp_path_factory.mktemp("source") / "source")
    save_tokenizer(folder)
    return folder
