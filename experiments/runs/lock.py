"""Lets one job at a time use an output folder, by a lock file that names its holder and goes stale when it dies.

The lock needs neither flock nor a common clock, so that it works on network file systems. A hard link makes the file,
because that is atomic; the age of a sign of life is measured against a file that is made beside the lock.
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
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

LOCK_NAME = "running.lock"
STALE_SECONDS = 300.0  # without a sign of life, on another host
BEATS = 10  # signs of life within that time


class FolderInUse(OSError):
    """Another job holds the folder."""


class FolderLock:
    """Context manager for rank 0 of the job that holds the folder; the caller reports its success to the other ranks.

    Attributes:
        note: what was taken over from a dead holder, which the caller prints; "" for nothing.
    """

    def __init__(
        self,
        folder: Path,
        what: str,
        *,
        stale_seconds: float = STALE_SECONDS,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        """Args:
        folder: where the lock is made; the folder is made as well.
        what: what the job does there, for the message to others.
        stale_seconds: a holder on another host that gave no sign of life for so long is dead, > 0.
        environment: for the job's id and its number of restarts.
        """
        if not stale_seconds > 0:
            raise ValueError(f"stale_seconds must be > 0, got {stale_seconds}")
        self.folder, self.path = Path(folder), Path(folder) / LOCK_NAME
        self.note = ""
        self._what, self._stale_seconds, self._environment = what, stale_seconds, environment
        self._token = secrets.token_hex(8)
        self._pid = -1
        self._stop = threading.Event()
        self._heart: threading.Thread | None = None

    def __enter__(self) -> FolderLock:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Takes the lock, also from a dead holder, which on another host takes `stale_seconds` at most.

        A holder on another host that died a moment ago looks alive, so this method waits for its next sign of life,
        which a living holder gives after a tenth of its `stale_seconds`.

        Raises:
            FolderInUse: another job holds it; the message names that job.
            OSError: the folder cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        mine = self.folder / f".{LOCK_NAME}-{self._token}"
        try:
            mine.write_text(json.dumps(_holder(self._token, self._what, self._environment)))
            for _ in range(100):  # others may come and go meanwhile
                if _link(mine, self.path):
                    break
                self._remove_stale(mine)
            else:
                raise FolderInUse(f"{self.folder} is fought over by other jobs: {self.path} comes and goes")
        finally:
            mine.unlink(missing_ok=True)
        self._pid = os.getpid()
        self._heart = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._heart.start()

    def check(self) -> None:
        """Checks the lock; call it before each write, because a process that slept for long may have lost its lock.

        Raises:
            FolderInUse: another job has taken the folder over.
        """
        if not self.path.exists():
            raise FolderInUse(f"{self.folder} was taken over by another job, which has ended; nothing more is written")
        holder = _read(self.path)
        if holder.get("token") not in (self._token, None):  # None: it cannot be read now
            raise FolderInUse(f"{self.folder} was taken over by {_name(holder)}; nothing more is written here")

    def release(self) -> None:
        """Gives the lock back, in the process that took it; a lock that another job has taken over stays."""
        if self._pid != os.getpid():
            return
        self._pid = -1
        self._stop.set()
        if self._heart is not None:
            self._heart.join()
        if _read(self.path).get("token") == self._token:
            self.path.unlink(missing_ok=True)

    def _remove_stale(self, mine: Path) -> None:
        """Removes the lock of a dead holder, or raises FolderInUse.

        Only the process that has made the guard file may do so. Without it a slow process, which has seen the old lock,
        could remove the new lock of a quick one.
        """
        if not self.path.exists():
            return  # it was given back
        holder = _read(self.path)
        why = self._why_stale(self.path, mine)
        if not why and not self._is_here(holder):
            why = self._wait_for_sign(holder, mine)
            if not self.path.exists():
                return
        if not why:
            raise FolderInUse(_refusal(self.folder, _read(self.path) or holder))
        guard = self.path.with_name(f".{LOCK_NAME}-takeover")
        if not _link(mine, guard):
            if self._why_stale(guard, mine):
                guard.unlink(missing_ok=True)
            time.sleep(0.05)
            return
        try:
            if _read(self.path).get("token") == holder.get("token") and self._why_stale(self.path, mine):
                self.path.unlink(missing_ok=True)
                self.note = f"took {self.folder} over from {_name(holder)}: {why}"
        finally:
            guard.unlink(missing_ok=True)

    def _wait_for_sign(self, holder: Mapping[str, Any], mine: Path) -> str:
        """Waits until a holder on another host gives a sign of life, or has given none for too long.

        Returns:
            Why it is dead; "" if it lives, if another one has come, or if it has given the lock back.
        """
        seen, end = _touched(self.path), time.monotonic() + 1.1 * self._stale_seconds
        if seen is None:
            return ""
        left = self._stale_seconds - (_age(self.path, mine) or 0.0)
        print(
            f"{self.folder} is locked by {_name(holder)}; it cannot be asked from here, so its next sign of life is "
            f"waited for, {max(0.0, left):.3g} s at most",
            file=sys.stderr,
            flush=True,
        )
        while time.monotonic() < end:
            time.sleep(min(1.0, self._stale_seconds / (2 * BEATS)))
            same = _read(self.path).get("token") == holder.get("token")  # which also makes a network file system look
            if not same or _touched(self.path) != seen:
                return ""
            if why := self._why_stale(self.path, mine):
                return why
        return ""  # the file system does not tell the time, so nobody knows

    def _is_here(self, holder: Mapping[str, Any]) -> bool:
        """Whether the holder is a process that this one can ask for."""
        me = _holder("", "", self._environment)
        return bool(holder) and all(holder.get(key) == me[key] for key in ("host", "boot", "pid_space"))

    def _why_stale(self, path: Path, mine: Path) -> str:
        """Why the maker of a lock or guard file is dead, "" for one that lives or has gone with its file."""
        holder = _read(path)
        me = _holder("", "", self._environment)
        if holder.get("job") and holder["job"] == me["job"] and me["restart"] > holder.get("restart", 0):
            return f"this is restart {me['restart']} of the same job"
        if self._is_here(holder):
            return "" if _lives(holder["pid"], holder.get("pid_started")) else "its process is gone"
        age = _age(path, mine)
        return f"no sign of life for {age:.0f} s" if age is not None and age > self._stale_seconds else ""

    def _beat(self) -> None:
        """Gives signs of life, as long as the lock is ours."""
        while not self._stop.wait(self._stale_seconds / BEATS):
            try:
                if _read(self.path).get("token") != self._token:
                    print(f"warning: another job has taken {self.folder} over", file=sys.stderr, flush=True)
                    return
                os.utime(self.path)
            except OSError:
                continue  # the server may come back


def _holder(token: str, what: str, environment: Mapping[str, str]) -> dict[str, Any]:
    job, restart = _job(environment)
    return {
        "token": token,
        "what": what,
        "host": socket.gethostname(),
        "boot": _boot_id(),
        "pid_space": _pid_space(),
        "pid": os.getpid(),
        "pid_started": _started(os.getpid()),
        "job": job,
        "restart": restart,
        "started_utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _job(environment: Mapping[str, str]) -> tuple[str, int]:
    """Id of the scheduler's job, "" for none, and how often it was restarted."""
    job = ""
    if environment.get("SLURM_JOB_ID"):
        job = f"slurm {environment['SLURM_JOB_ID']}"
    elif environment.get("LSB_JOBID"):
        index = environment.get("LSB_JOBINDEX", "0")
        job = f"lsf {environment['LSB_JOBID']}" + (f"[{index}]" if index not in ("", "0") else "")
    for name in ("AADL_RESTART_COUNT", "SLURM_RESTART_COUNT"):
        text = environment.get(name, "")
        if text.isdecimal():
            return job, int(text)
    return job, 0


def _name(holder: Mapping[str, Any]) -> str:
    job = f", job {holder['job']}" if holder.get("job") else ""
    return (
        f"process {holder.get('pid', '?')} on {holder.get('host', 'an unknown host')}{job}, which has run "
        f"{holder.get('what') or 'something'} since {holder.get('started_utc', 'an unknown time')}"
    )


def _refusal(folder: Path, holder: Mapping[str, Any]) -> str:
    return f"{folder} is in use by {_name(holder)}; wait for it, end it, or take another output folder"


def _read(path: Path) -> dict[str, Any]:
    """What a lock file says, {} for a missing or damaged one."""
    try:
        holder = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _link(source: Path, target: Path) -> bool:
    """Makes the target with the source's content at once; False where it exists."""
    try:
        os.link(source, target)
        return True
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links: the content follows the name after a moment
        try:
            handle = os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        with os.fdopen(handle, "wb") as file:
            file.write(source.read_bytes())
        return True


def _touched(path: Path) -> int | None:
    """When a file was touched, in ns; None for a missing one."""
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return None


def _age(path: Path, probe: Path) -> float | None:
    """Seconds since a file was touched, by the clock of its file system; None where that cannot be told."""
    try:
        os.utime(probe)
        return max(0.0, os.stat(probe).st_mtime - os.stat(path).st_mtime)
    except OSError:
        return None


def _lives(pid: int, started: str | None) -> bool:
    """Whether a process of this host runs, and is the one that started then; a zombie does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    now = _started(pid)
    return now != "" and (not started or now in (started, "unknown"))


def _started(pid: int) -> str:
    """When a process started, in the kernel's ticks; "" for a zombie, "unknown" where the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "unknown"
    return "" if fields[0] in "ZX" else fields[19]


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _pid_space() -> str:
    """Containers on one host have process numbers of their own."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
