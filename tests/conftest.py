"""Fixtures that several modules use."""

from pathlib import Path

import pytest
from folders import save_tokenizer
from tiny import save_tiny


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 16-bit checkpoint of several shards, with a tokenizer; not to be written to."""
    folder = save_tiny("llama", False, tmp_path_factory.mktemp("source") / "source")
    save_tokenizer(folder)
    return folder
