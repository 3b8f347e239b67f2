"""numba's cache of compiled kernels, emptied when the sources of this package have changed.

numba keeps a compiled kernel beside its source file and checks that file only. But a kernel calls functions of other
files. If only these change, for example in an upgrade, numba goes on to use the old kernel.

Processes that start together compile each kernel once between them: see `compile_in_turns`.
"""

import contextlib
import hashlib
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO

from numba.core import caching, config

try:
    import fcntl
except ImportError:  # Windows has none: there each process compiles what it does not find
    fcntl = None  # type: ignore[assignment]

STAMP = "numba-sources.txt"

LOCKS = "numba-compiling.lock"

# The operating system's locks belong to a process, so the threads of one need a lock of their own.
_compiling = threading.Lock()


def drop_stale_kernels(package: Path) -> None:
    """Remove a package's compiled kernels, unless all its modules are as they were when the cache was begun.

    Does nothing if the package's folder cannot be written to: then numba keeps kernels elsewhere.
    """
    digest = hashlib.sha256()
    for source in sorted(package.glob("*.py")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    cache = _cache_of(package)
    stamp, made = cache / STAMP, cache / f"{STAMP}.{os.getpid()}"
    with contextlib.suppress(OSError):
        if stamp.read_text() == digest.hexdigest():
            return
    with contextlib.suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True)
        for compiled in (*cache.glob("*.nbi"), *cache.glob("*.nbc")):
            compiled.unlink(missing_ok=True)
        made.write_text(digest.hexdigest())
        made.replace(stamp)


def _cache_of(package: Path) -> Path:
    """Where numba keeps what it compiled of a package: beside it, or in a folder of its own in NUMBA_CACHE_DIR."""
    if not config.CACHE_DIR:
        return package / "__pycache__"
    return Path(config.CACHE_DIR, caching._CacheLocator.get_suitable_cache_subpath(str(package / "__init__.py")))


def compile_in_turns(compilations: Mapping[str, Callable[[], None]], folder: Path) -> None:
    """Do compilations, each by name, of which other processes may be doing some at the same time.

    What another process is compiling comes last: by then it lies in numba's cache, in `folder`, and is only loaded.
    """
    with _compiling, _lock_file(folder) as file:
        others = []
        for name, compilation in compilations.items():
            if _lock(file, name, wait=False):
                compilation()
                _unlock(file, name)
            else:
                others.append(name)
        for name in others:
            _lock(file, name, wait=True)
            compilations[name]()
            _unlock(file, name)


@contextlib.contextmanager
def _lock_file(folder: Path) -> Iterator[IO[bytes] | None]:
    """A file with a byte for each kernel to lock; none where there are no locks or the folder cannot be written to."""
    with contextlib.ExitStack() as stack:
        file = None
        if fcntl is not None:
            with contextlib.suppress(OSError):
                file = stack.enter_context((folder / LOCKS).open("ab"))
        yield file


def _lock(file: IO[bytes] | None, name: str, wait: bool) -> bool:
    """Whether the kernel is this process's to compile. Locks that fail for another reason are done without."""
    if file is None:
        return True
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, zlib.crc32(name.encode()))
    except (BlockingIOError, PermissionError):  # POSIX allows either where another process has the lock
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _unlock(file: IO[bytes] | None, name: str) -> None:
    if file is not None:
        with contextlib.suppress(OSError):
            fcntl.lockf(file, fcntl.LOCK_UN, 1, zlib.crc32(name.encode()))
