"""What a node says of itself before anything of bigint8 runs there: versions, and its clock.

These functions are sent to the node whole, not by name: they need no more than Python and Ray there, so that a node
without bigint8, or with another one, can say so.
"""

import hashlib
import importlib.metadata
import importlib.util
import re
import sys
import time
from pathlib import Path

ABSENT = "not installed"


def state_here() -> tuple[dict[str, str], float]:
    """The versions that must be alike, by name, and what the clock says, in seconds since 1970."""
    found = {"Python": f"{sys.version_info.major}.{sys.version_info.minor}", "bigint8": _bigint8()}
    for package in ("torch", "transformers", "ray"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = ABSENT
        found[package] = version.partition("+")[0]  # builds for other GPUs are alike
    return found, time.time()


def _bigint8() -> str:
    """The version of bigint8, and a digest of its sources: those of a git checkout change without it."""
    version, sources = ABSENT, hashlib.sha256()
    for package in ("bigint8", "bigint8_kernels"):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:  # not there, or an empty folder of that name
            return ABSENT
        for root in map(Path, spec.submodule_search_locations or []):
            for file in sorted(root.rglob("*.py")):
                if file.relative_to(root).parts[0] != "configs":  # which lies elsewhere in a checkout
                    sources.update(f"{package}/{file.relative_to(root).as_posix()}\0".encode() + file.read_bytes())
            told = re.search(r'^__version__ = "(.*)"', (root / "__init__.py").read_text(encoding="utf-8"), re.MULTILINE)
            version = told.group(1) if told else version
    return f"{version} (sources {sources.hexdigest()[:8]})"
