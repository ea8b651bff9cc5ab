"""Lets one job at a time use an output folder, by a lock file that names its holder and goes stale when it dies.

The lock needs neither flock nor a common clock, so that it works on network file systems: O_EXCL makes the file, and
the age of its last sign of life is measured against a file that is made beside it.

filelock's SoftFileLease is no replacement. It waits a whole lease for a holder that died long ago on another host,
takes over from a paused process of this host, and knows no restarts of jobs; its versions without GHSA-fq56-3cx3-fjxp
(from 4.2.1) need Python 3.11.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from experiments.distributed.host import machine, namespace
from experiments.distributed.ranks import Ranks

LOCK_NAME = "running.lock"
STALE_SECONDS = 300.0  # without a sign of life, on another host
BEATS = 10  # signs of life within that time


class FolderInUse(OSError):
    """Another job holds the folder."""


class FolderLock:
    """Context manager for rank 0 of the job that holds the folder; the caller reports its success to the other ranks.

    Args:
        folder: where the lock is made; the folder is made as well.
        what: what the job does there, for the message to others.
        ranks: this process; the lock of an earlier start of its job is stale.
        stale_seconds: a holder on another host that gave no sign of life for so long is dead.

    Attributes:
        note: what was taken over from a dead holder, which the caller prints; "" for nothing.
    """

    def __init__(self, folder: Path, what: str, ranks: Ranks, *, stale_seconds: float = STALE_SECONDS) -> None:
        self.folder, self.path = Path(folder), Path(folder) / LOCK_NAME
        self.note = ""
        self._stale_seconds = stale_seconds
        self._me = _holder(what, ranks)
        self._stop = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="lock", daemon=True)

    def __enter__(self) -> FolderLock:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Takes the lock, also from a dead holder, which on another host takes `stale_seconds` at most.

        A holder on another host that died a moment ago looks alive, so this method waits for its next sign of life,
        which a living holder gives after a tenth of its `stale_seconds`. FolderInUse names the job that holds it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        end = time.monotonic() + 1.1 * self._stale_seconds  # some file systems do not tell the time
        first: tuple[str | None, int | None] | None = None
        while not _create(self.path, self._me):
            holder, touched = _read(self.path), _touched(self.path)
            is_over = time.monotonic() > end
            if touched is None and not is_over:  # it was given back, or its server does not answer
                time.sleep(0.05)
                continue
            if not is_over and (why := self._why_stale(self.path, holder)):
                self._take_over(holder, why)
                continue
            seen = (holder.get("token"), touched)
            if is_over or self._is_here(holder) or seen != (first or seen):
                raise FolderInUse(
                    f"{self.folder} is in use by {_name(holder)}; wait for it, end it, or take another output folder"
                )
            if first is None:
                self._say_what_is_waited_for(holder)
            first = seen
            time.sleep(min(1.0, self._stale_seconds / (2 * BEATS)))
        self._heart.start()

    def check(self) -> None:
        """Call before each write. Raises FolderInUse if another job took the folder, as while this one slept."""
        if not self.path.exists():
            raise FolderInUse(f"{self.folder} was taken over by another job, which has ended; nothing more is written")
        if rival := self._rival():
            raise FolderInUse(f"{self.folder} was taken over by {_name(rival)}; nothing more is written here")

    def release(self) -> None:
        """Gives the lock back; a lock that another job has taken over stays."""
        if not self._heart.is_alive():
            return
        self._stop.set()
        self._heart.join()
        if _read(self.path).get("token") == self._me["token"]:
            self.path.unlink(missing_ok=True)

    def _rival(self) -> dict[str, Any]:
        """Another holder of the lock; {} for none, and where the file cannot be read now."""
        holder = _read(self.path)
        return {} if holder.get("token") in (self._me["token"], None) else holder

    def _is_here(self, holder: Mapping[str, Any]) -> bool:
        """Whether the holder is a process that this one can ask for."""
        return bool(holder.get("machine") == self._me["machine"])

    def _why_stale(self, path: Path, holder: Mapping[str, Any]) -> str:
        """Why the maker of a lock or guard file is dead, "" for one that lives or has gone with its file."""
        me = self._me
        if me["job"] and holder.get("job") == me["job"] and me["restart"] > holder.get("restart", 0):
            return f"this is restart {me['restart']} of the same job"
        if self._is_here(holder):
            return "" if _lives(holder["pid"], holder["pid_started"]) else "its process is gone"
        age = self._age(path)
        return f"no sign of life for {age:.0f} s" if age > self._stale_seconds else ""

    def _age(self, path: Path) -> float:
        """Seconds since a file was touched, by the clock of its file system; 0 where that is not known."""
        probe = self.folder / f".{LOCK_NAME}-{self._me['token']}"
        try:
            probe.touch()
            return probe.stat().st_mtime - path.stat().st_mtime
        except OSError:
            return 0.0
        finally:
            probe.unlink(missing_ok=True)

    def _take_over(self, holder: Mapping[str, Any], why: str) -> None:
        """Removes the lock of a dead holder.

        Only the process that has made the guard file may do so. Without it a slow process, which has seen the old lock,
        could remove the new lock of a quick one.
        """
        guard = self.path.with_name(f".{LOCK_NAME}-takeover")
        if not _create(guard, self._me):
            if self._why_stale(guard, _read(guard)):
                guard.unlink(missing_ok=True)
            time.sleep(0.05)
            return
        try:
            if _read(self.path).get("token") == holder.get("token") and self._why_stale(self.path, holder):
                self.path.unlink(missing_ok=True)
                self.note = f"took {self.folder} over from {_name(holder)}: {why}"
        finally:
            guard.unlink(missing_ok=True)

    def _say_what_is_waited_for(self, holder: Mapping[str, Any]) -> None:
        left = max(0.0, self._stale_seconds - self._age(self.path))
        print(
            f"{self.folder} is locked by {_name(holder)}; it cannot be asked from here, so its next sign of life is "
            f"waited for, {left:.3g} s at most",
            file=sys.stderr,
            flush=True,
        )

    def _beat(self) -> None:
        """Gives signs of life, as long as the lock is ours."""
        while not self._stop.wait(self._stale_seconds / BEATS):
            try:
                if self._rival():
                    print(f"warning: another job has taken {self.folder} over", file=sys.stderr, flush=True)
                    return
                os.utime(self.path)
            except OSError:
                continue  # the server may come back


def _holder(what: str, ranks: Ranks) -> dict[str, Any]:
    return {
        "token": secrets.token_hex(8),
        "what": what,
        "host": socket.gethostname(),
        "machine": f"{machine()} {namespace('pid')}",
        "pid": os.getpid(),
        "pid_started": _started(os.getpid()),
        "job": f"{ranks.scheduler} {ranks.job_id}" if ranks.scheduler != "none" else "",
        "restart": ranks.job_restarts,
        "started_utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _name(holder: Mapping[str, Any]) -> str:
    job = f", job {holder['job']}" if holder.get("job") else ""
    return (
        f"process {holder.get('pid', '?')} on {holder.get('host', 'an unknown host')}{job}, which has run "
        f"{holder.get('what') or 'something'} since {holder.get('started_utc', 'an unknown time')}"
    )


def _create(path: Path, holder: Mapping[str, Any]) -> bool:
    """Makes a file that says who holds it; False where it exists."""
    try:
        file = open(path, "x", encoding="utf-8")  # noqa: SIM115
    except FileExistsError:
        return False
    try:
        with file:
            json.dump(holder, file)
    except BaseException:  # on a full disk, the empty file would look like the lock of another job
        with suppress(OSError):
            path.unlink()
        raise
    return True


def _read(path: Path) -> dict[str, Any]:
    """What a lock file says; {} for a missing or damaged one, and for one that is being made."""
    try:
        holder = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _touched(path: Path) -> int | None:
    """When a file was touched, in ns; None for a missing one."""
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return None


def _lives(pid: int, started: str) -> bool:
    """Whether a process of this host runs, and is the one that started then; a zombie does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    now = _started(pid)
    return now != "" and now in (started, "unknown")


def _started(pid: int) -> str:
    """When a process started, in the kernel's ticks; "" for a zombie, "unknown" where the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "unknown"
    return "" if fields[0] in "ZX" else fields[19]
