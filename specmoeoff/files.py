"""Files that are either whole or absent, and the one cache folder."""

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from specmoeoff.errors import BadInput


def cache_dir() -> Path:
    """Where checkpoints and packed experts are kept: $SPECMOEOFF_CACHE, else the user's cache folder."""
    override = os.environ.get("SPECMOEOFF_CACHE")
    if override:
        return Path(override)
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "specmoeoff"
    except RuntimeError:
        raise BadInput("this user has no home folder; set SPECMOEOFF_CACHE to a folder for the cache.") from None


@contextmanager
def explain_os_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals while writing `path` into one sentence with a remedy."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            reason = "the disk is full; free some space or choose another folder"
        elif error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            reason = "writing is not permitted; choose another folder"
        elif error.errno in (errno.ENOENT, errno.ENOTDIR):
            reason = f"the folder {path.parent} does not exist; create it first"
        else:
            reason = error.strerror or str(error)
        raise BadInput(f"{path}: cannot write: {reason}.") from error


def write_atomic(path: Path | str, content: str | bytes | Iterable[bytes]) -> None:
    """Write beside, fsync, rename: a reader sees the old file or the new one, never half of one."""
    path = Path(path)
    pieces = [content.encode()] if isinstance(content, str) else [content] if isinstance(content, bytes) else content
    with explain_os_errors(path):
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.writelines(pieces)
                stream.flush()
                os.fsync(stream.fileno())
            Path(name).chmod(0o644)
            Path(name).replace(path)
            sync_folder(path.parent)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk: until then a rename may be lost with the power."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_json(text: str | bytes) -> Any:
    """The value of a JSON text, or ValueError with the reason."""
    try:
        return json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except ValueError:
        raise ValueError("a number has too many digits") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_text(path: Path | str, what: str) -> str:
    """The text of a file a person named, or a sentence saying why not. `what` names its role."""
    path = Path(path)
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BadInput(f"{path}: no such {what}.") from None
    except IsADirectoryError:
        raise BadInput(f"{path}: is a folder, a {what} file is expected.") from None
    except UnicodeDecodeError:
        raise BadInput(f"{path}: is not UTF-8 text, so not a {what}.") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot read the {what}: {error.strerror}.") from None


def sha256_text(text: str) -> str:
    """Hex SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()
