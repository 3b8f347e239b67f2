"""Kernels that numba compiled and kept, dropped when they may be of other sources than these.

numba keeps a compiled kernel beside its file and looks at that file only: a change in a function that the kernel calls,
in another file, leaves the old one in use, also after an upgrade of the package.
"""

import contextlib
import hashlib
import os
from pathlib import Path

STAMP = "numba-sources.txt"


def drop_stale_kernels(package: Path) -> None:
    """Remove what numba compiled of a package's modules, unless all of them are as they were when that began.

    Where the folder cannot be written to, numba keeps kernels elsewhere, and nothing is done.
    """
    digest = hashlib.sha256()
    for source in sorted(package.glob("*.py")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    cache = package / "__pycache__"
    stamp, made = cache / STAMP, cache / f"{STAMP}.{os.getpid()}"
    with contextlib.suppress(OSError):
        if stamp.read_text() == digest.hexdigest():
            return
    with contextlib.suppress(OSError):
        cache.mkdir(exist_ok=True)
        for compiled in (*cache.glob("*.nbi"), *cache.glob("*.nbc")):
            compiled.unlink(missing_ok=True)
        made.write_text(digest.hexdigest())
        made.replace(stamp)
