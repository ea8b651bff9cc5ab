"""Files that are written whole or not at all, and locks between processes."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path, *, sync: bool = True) -> Iterator[Path]:
    """Yields a temporary path beside `path`; what the block writes there replaces `path` at once and whole.

    After an error the old file is untouched and there is no temporary file; a killed process may leave
    `.NAME-XXXXXXXX.tmp` behind. The mode of the file follows the umask, because the block makes the file itself.
    Without `sync` the file may be empty after a power failure, which is enough for files that are cheap to make again.
    """
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        if sync:
            _sync(temporary)
        os.replace(temporary, path)
        if sync:
            _sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str, *, executable: bool = False) -> None:
    """Writes a text file (UTF-8) at once and whole, and makes its folder; OSError names a file that cannot be written.

    All who may read an `executable` file may execute it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, sync=False) as temporary:
            temporary.write_text(text, encoding="utf-8")
            if executable:
                mode = temporary.stat().st_mode
                temporary.chmod(mode | (mode & 0o444) >> 2)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from error


@contextmanager
def tolerating_read_only() -> Iterator[list[OSError]]:
    """Yields a list, which afterwards holds the error of the block if this user may not write in that place.

    Any other error is raised, as that of a full disk or of a quota.
    """
    refusals: list[OSError] = []
    try:
        yield refusals
    except OSError as error:
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
        if cause.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        refusals.append(error)


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Holds a lock (flock) on a file while the block runs, and makes the file.

    Yields whether the lock is held: False on a file system without locks. BlockingIOError where another process holds
    it and the caller does not `wait`.
    """
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            is_held = True
        except BlockingIOError:
            raise
        except OSError:
            is_held = False
        yield is_held


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems do not sync folders
            raise
    finally:
        os.close(handle)
