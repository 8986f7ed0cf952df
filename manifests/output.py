"""Folders that appear complete or not at all."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

# Proof that a folder `<out>.partial` is a leftover of ours, which may be deleted.
_MARKER = ".rtpurbo-partial"
_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file is larger than the file system or the process limit allows",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
}


def refuse_existing(out: Path) -> None:
    """ValueError when `out` exists in any form, a dangling link included: outputs are never overwritten."""
    if os.path.lexists(out):
        raise ValueError(f"{out}: exists already, wanted a new folder; outputs are never overwritten")


def check_space(out: Path, needed: int) -> None:
    """ValueError when the disk that will hold `out` has fewer than `needed` bytes free."""
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise ValueError(f"{out}: needs {needed} bytes of disk space, {parent} has {free} bytes free")


@contextlib.contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """The folder `<out>.partial` to fill; it becomes `out` by one rename when the block ends, and is removed when the block raises.

    What an interrupted run left there is replaced. ValueError, with nothing left behind: `out` exists, something else is in the
    partial folder's place, or a file cannot be written (no space, no permission, ...). Errors of other files pass.
    """
    refuse_existing(out)
    partial = out.with_name(out.name + ".partial")
    if os.path.lexists(partial) and not (partial / _MARKER).is_file():
        raise ValueError(f"{partial}: is in the way and was not left over by an interrupted run, wanted no such path")
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        (partial / _MARKER).touch()
        yield partial
        sync(partial)
        refuse_existing(out)
        os.rename(partial, out)
        # Last, so that whatever a killed process leaves behind can be told from a folder of the user's.
        (out / _MARKER).unlink()
        sync(out.parent)
    except SafetensorError as error:
        if not str(error).startswith("Error while serializing"):
            raise
        raise ValueError(f"{out}: cannot be written ({str(error).splitlines()[0][:200]})") from error
    except OSError as error:
        if error.filename and not Path(os.fsdecode(error.filename)).is_relative_to(partial):
            raise
        raise ValueError(f"{out}: cannot be written: {_REASONS.get(error.errno or 0, error.strerror or str(error))}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file or a folder's list of names is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
