"""Opens HDF5 files without locks, and says in one sentence why a file cannot be opened.

No lock is needed: a record is written under another name and renamed when it is whole, so that nobody ever sees a part
of one. Many parallel file systems have no locks, and HDF5 then refuses to open any file. The variable
HDF5_USE_FILE_LOCKING overrides what a program asks for.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py

CURE = "export HDF5_USE_FILE_LOCKING=FALSE"


class RecordError(OSError):
    """A file gives no record; the message names it and says why."""


class UnreadableRecord(RecordError):
    """The file cannot be opened here or now: it is locked, closed to this account, or on a disk with errors."""


class DamagedRecord(RecordError):
    """The bytes of the file are no HDF5 file, or not all of one."""


class ForeignRecord(RecordError):
    """An HDF5 file that this program did not write, or a record of another schema."""


class IncompleteRecord(RecordError):
    """The record of a run that is not finished."""


@contextmanager
def opened(path: Path, mode: str = "r") -> Iterator[h5py.File]:
    """Opens an HDF5 file without a lock, in the mode "r", "r+" or "w".

    Raises:
        FileNotFoundError: there is no such file.
        UnreadableRecord: it cannot be opened here or now; it may be whole.
        DamagedRecord: it was to be read, and its bytes are damaged.
        OSError: it cannot be written.
    """
    try:
        with h5py.File(path, mode, locking=False) as file:
            yield file
    except RecordError:
        raise
    except FileNotFoundError as error:
        if path.is_symlink():  # into a store, as those of git-annex and DVC, which may have the file elsewhere
            raise UnreadableRecord(f"{path} is a link to {os.readlink(path)}, which is not here: fetch it") from error
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:  # h5py raises whatever the bytes lead to
        if mode == "r" or _is_about_locks(str(error)):
            raise _sorted(path, error) from error
        if number := _number_of(error):  # a full disk may show as a RuntimeError when the file is closed
            raise OSError(number, os.strerror(number), str(path)) from error
        raise


def _sorted(path: Path, error: Exception) -> RecordError:
    """Returns the error with its cause in one sentence."""
    text, number = str(error), _number_of(error)
    if _is_about_locks(text):
        if number in (errno.EAGAIN, errno.EACCES):
            return UnreadableRecord(f"{path} is locked by another program, as a notebook: close it there, or {CURE}")
        asked = os.environ.get("HDF5_USE_FILE_LOCKING", "")
        return UnreadableRecord(
            f"{path} cannot be locked ({os.strerror(number)}), and HDF5_USE_FILE_LOCKING={asked} asks for it: {CURE}"
        )
    if "already open" in text or "locking flag" in text:
        return UnreadableRecord(
            f"{path} is open for writing in another program: close it there, or run h5clear -s on the file where the "
            "program was killed"
        )
    if number in (errno.EACCES, errno.EPERM):
        return UnreadableRecord(f"{path} is closed to this account ({os.strerror(number)}): ask its owner to open it")
    if number:
        return UnreadableRecord(f"{path} cannot be read ({os.strerror(number)}); it may be whole")
    return DamagedRecord(f"{path} is damaged ({_short(error)}): delete it, or make its run again")


def _number_of(error: Exception) -> int:
    """The number of the error of the system behind an error of HDF5; 0 for none."""
    found = re.search(r"errno = (\d+)", str(error))
    return (error.errno if isinstance(error, OSError) else None) or (int(found[1]) if found else 0)


def _is_about_locks(text: str) -> bool:
    return "unable to lock file" in text


def _short(error: Exception) -> str:
    """What HDF5 found, without what it was asked for."""
    text = " ".join(str(error).split()).strip("'\"")
    inner = re.search(r"\((.+)\)", text)
    return (inner[1] if inner else text or type(error).__name__)[:120]
