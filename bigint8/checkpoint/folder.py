"""A checkpoint's folder on the disk: written beside the wanted place, which it takes when it is whole."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..errors import CheckpointError
from ..units import readable

CONFIG_FILES = ("*.json", "tokenizer*", "*.model", "*.txt", "*.jinja", "*.py")
"""What a checkpoint's folder holds besides weights; config.json and indices are written anew."""


def absolute(folder: str | os.PathLike[str]) -> Path:
    """The folder's absolute path. A link that is to be replaced is not followed."""
    return Path(os.path.abspath(folder))  # noqa: PTH100  (resolve() would follow it)


@contextlib.contextmanager
def new_checkpoint_folder(folder: Path, overwrite: bool, needed_bytes: int) -> Iterator[Path]:
    """A folder to write into, beside the wanted one. It takes that name when the block ends without an error.

    After an error it is removed. If the process is killed, the next save to the same place removes it. Raises
    CheckpointError for a full disk, and for a place that is taken, unless a checkpoint is there and `overwrite` is set.
    """
    check_target(folder, overwrite)
    partial = folder.parent / f".{folder.name}.partial"
    lock = None
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = _lock(partial, folder)
        try:
            _empty(partial)
            free = shutil.disk_usage(partial).free
            if free < needed_bytes:
                reason = f"{readable(needed_bytes)} are needed, {readable(free)} are free"
                raise CheckpointError(_no_room(folder, reason))
            yield partial
            check_target(folder, overwrite)
            _replace(folder, partial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            reason = f"{error.strerror} while writing {readable(needed_bytes)}"
            raise CheckpointError(_no_room(folder, reason)) from None
        raise CheckpointError(f"{folder}: cannot be written: {error.strerror}") from None
    finally:
        if lock is not None:
            os.close(lock)


def check_target(folder: Path, overwrite: bool) -> None:
    """Raise CheckpointError if the folder is there already and may not, or must not, be replaced."""
    try:
        if not os.path.lexists(folder):
            return
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: exists and is no folder; name another place")
        if not any(folder.iterdir()):
            return
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written: {error.strerror}") from None
    if not overwrite:
        raise CheckpointError(f"{folder}: exists already; name another folder, or replace it with overwrite=True")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: exists and is no checkpoint, so it is not overwritten; name another folder")


def copy_config_files(source: Path, target: Path) -> None:
    """Tokenizer, generation settings and the like, beside the weights."""
    for pattern in CONFIG_FILES:
        for file in source.glob(pattern):
            if file.is_file() and file.name != "config.json" and not file.name.endswith(".index.json"):
                shutil.copyfile(file, target / file.name)


def _lock(partial: Path, folder: Path) -> int | None:
    """Hold the partial folder against other saves, for as long as the descriptor is open."""
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        return None
    descriptor = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_ino != partial.stat().st_ino:  # the other save is through: this is its result
            raise BlockingIOError
    except OSError:
        os.close(descriptor)
        raise CheckpointError(f"{folder}: another process is saving there; wait for it, or name another one") from None
    return descriptor


def _empty(folder: Path) -> None:
    """Remove what a killed save has left."""
    for child in folder.iterdir():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()


def _replace(folder: Path, partial: Path) -> None:
    """The new folder takes the place of the old one, which is removed after that."""
    if not folder.exists():
        partial.rename(folder)
        return
    old = folder.parent / f".{folder.name}.replaced"
    _remove(old)
    folder.rename(old)
    partial.rename(folder)
    _remove(old)


def _remove(folder: Path) -> None:
    """Remove a folder, or a link to one, if it is there."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def _no_room(folder: Path, reason: str) -> str:
    return f"{folder}: no room on the disk: {reason}. Nothing was kept; free some, or name a folder on another disk"
