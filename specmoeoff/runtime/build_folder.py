"""Folders that are either whole or absent: built beside, synced, renamed; one builder at a time."""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from specmoeoff.errors import BadInput
from specmoeoff.files import explain_os_errors, sync_folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    # flock dies with its process, so a killed builder never blocks the next one.
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def require_free_bytes(folder: Path, n_bytes: int, what: str) -> None:
    """BadInput naming the missing bytes when the disk under `folder` cannot take `n_bytes` more."""
    missing_bytes = n_bytes - shutil.disk_usage(folder).free
    if missing_bytes > 0:
        raise BadInput(
            f"{folder}: {what} needs {n_bytes:,} bytes and the disk lacks {missing_bytes:,} of them;"
            " free some space or set SPECMOEOFF_CACHE to a folder on a larger disk."
        )


def sync_and_drop(path: Path) -> None:
    """Bring a written file to the disk and let go of its page cache, so that it does not occupy memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def build_folder(
    final: Path, is_complete: Callable[[Path], bool], n_bytes: int, what: str, fill: Callable[[Path], None]
) -> None:
    """Make `final` unless it is complete already. `fill` writes into a folder that only becomes `final` whole.

    Whatever ends `fill` early leaves nothing; what a killed process left is removed by the next build.
    """
    with explain_os_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        if is_complete(final):
            return
        with _locked(final.with_name(f".{final.name}.lock")):
            if is_complete(final):
                return
            partial = final.with_name(f".{final.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            require_free_bytes(final.parent, n_bytes, what)
            partial.mkdir()
            try:
                fill(partial)
                for path in partial.iterdir():
                    sync_and_drop(path)
                sync_folder(partial)
                if final.exists():
                    shutil.rmtree(final)
                partial.rename(final)
                sync_folder(final.parent)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
