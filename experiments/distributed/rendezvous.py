"""How the ranks of a job meet: all connect to a store that rank 0 holds, and a roll call names those that are missing.

Where MASTER_ADDR and MASTER_PORT are given, the store is there, as with torch's env://. Elsewhere rank 0 binds a free
port and announces it: by MPI's broadcast, in the store of torchrun's agent, or in a file of a folder that all ranks
see. The first host of the job with a port made from its number would need no announcement, but is not enough: jsrun may
put rank 0 on another host, and another job may hold the port. torch names no missing ranks either: its store and its
`monitored_barrier` count those that came ("2/4 clients joined").
"""

from __future__ import annotations

import errno
import json
import os
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from data_loaders.files import write_text
from experiments.distributed.interfaces import LOOPBACK, as_text, interface_addresses
from experiments.distributed.polling import Deadline, ask_all
from experiments.distributed.ranks import Ranks

PROBE_SECONDS = 3.0  # for one attempt to reach one address
GRACE_SECONDS = 5.0  # the other ranks wait this much longer than rank 0, whose message names the missing ranks
READ_SECONDS = 2.0  # rank 0 gives the others this long to read why it ends
AGENT_KEY = "aadl rank 0"


@dataclass(frozen=True)
class Announcement:
    """Where the store of rank 0 listens, and a token that only it knows, unless launcher or user gave the address."""

    addresses: tuple[str, ...]
    port: int
    token: str | None = None

    def as_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def read(text: str | bytes) -> Announcement:
        """Reads what `as_json` wrote; raises ValueError, KeyError or TypeError for any other text."""
        raw = json.loads(text)
        return Announcement(tuple(raw["addresses"]), int(raw["port"]), str(raw["token"]))


# --- where rank 0 announces


def announcement_path(folder: Path, ranks: Ranks) -> Path:
    """Returns the file of this attempt, `.rendezvous-<job>.<step>.<restart>.json`; ValueError where jobs look alike."""
    job = ranks.job_id or ranks.step_id
    if not job and ranks.local_size == ranks.world_size:
        job = f"{socket.gethostname()}-{os.getppid()}"  # one host: the same mpiexec, or its proxy, is everyone's parent
    if not job:
        raise ValueError(
            f"{ranks.launcher} gives the job no name: set AADL_JOB_ID to one text for all of its ranks, or install "
            "mpi4py for this MPI library"
        )
    job, step = (re.sub(r"[^\w-]", "_", text) for text in (job, ranks.step_id or "0"))
    return folder / f".rendezvous-{job}.{step}.{ranks.restart_count}.json"


def write_announcement(path: Path, announcement: Announcement) -> None:
    """Renames the announcement into place and deletes those of earlier attempts of the same step."""
    write_text(path, announcement.as_json())
    attempt = re.compile(re.escape(path.name.rsplit(".", 2)[0]) + r"\.\d+\.json$")
    for other in path.parent.iterdir():
        if other != path and attempt.match(other.name):
            other.unlink(missing_ok=True)


def read_announcement(path: Path) -> Announcement | None:
    """Returns the announcement, or None while there is none."""
    try:
        os.listdir(path.parent)  # makes network file systems look again
        return Announcement.read(path.read_text("utf-8"))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_board(board: Store, announcement: Announcement) -> None:
    """Writes the announcement to the store of torchrun's agent, over that of an earlier attempt."""
    board.set(AGENT_KEY, announcement.as_json())


def read_board(board: Store) -> Announcement | None:
    """Returns the announcement in the store of torchrun's agent, or None while there is none."""
    return Announcement.read(board.get(AGENT_KEY)) if board.check([AGENT_KEY]) else None


# --- the store


def listen(port: int, *, loopback: bool = False) -> socket.socket:
    """Returns a listening socket for IPv4 and IPv6, with `loopback` for this host alone; OSError for a taken port."""
    both = not loopback and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    address = (LOOPBACK if loopback else "", port)
    try:
        return socket.create_server(address, family=family, backlog=4096, dualstack_ipv6=both)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise OSError(
                f"port {port} of {socket.gethostname()} is taken: choose another AADL_MASTER_PORT or MASTER_PORT, or "
                "unset it and let rank 0 pick one"
            ) from None
        raise


def host_store(listening: socket.socket, token: str, seconds: float) -> Store:
    """Returns the store of rank 0, on a socket that listens already, so that no other process can take its port."""
    port = listening.getsockname()[1]
    store = TCPStore(
        LOOPBACK,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=seconds),
        master_listen_fd=listening.detach(),
    )
    store.set("token", token)
    return store


def _try_store(address: str, port: int, token: str | None, deadline: Deadline) -> Store | None:
    """Returns the store at this address, or None if there is none or, where a token is given, it has another one."""
    seconds = max(0.1, min(PROBE_SECONDS, deadline.remaining()))
    try:
        with socket.create_connection((address, port), timeout=seconds):
            pass
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=seconds))
        if token is not None and not (store.check(["token"]) and store.get("token").decode() == token):
            return None
    except (OSError, RuntimeError, ValueError):  # torch's own errors are RuntimeErrors
        return None
    store.set_timeout(timedelta(seconds=max(1.0, deadline.remaining())))
    return store


def connect(
    find: Callable[[], Announcement | None], ranks: Ranks, deadline: Deadline, where: str, what: str = "rank 0"
) -> Store:
    """Connects to the store of rank 0 when it is announced and answers; a stale announcement does neither.

    Args:
        find: returns the announcement, or None as long as there is none.
        ranks: this process, for the message.
        deadline: when to give up, with a RuntimeError.
        where: where rank 0 announces, for the message.
        what: what holds the store, for the message.
    """
    tried: Announcement | None = None
    while True:
        announcement = find()
        if announcement is not None:
            tried = announcement
            for address in announcement.addresses:
                store = _try_store(address, announcement.port, announcement.token, deadline)
                if store is not None:
                    return store
        if not deadline.pause():
            break
    me = f"rank {ranks.rank} on {host_of(ranks)}"
    if tried is None:
        raise RuntimeError(f"{me}: {what} announced no address in {where} within {deadline.seconds:g} s")
    raise RuntimeError(
        f"{me}: {what} did not answer at {' or '.join(tried.addresses)}, port {tried.port}, within "
        f"{deadline.seconds:g} s; this host has {as_text(interface_addresses())} (launch.interface names the one to "
        "use)"
    )


# --- the roll call


def host_of(ranks: Ranks) -> str:
    """Returns the name of this host, as the scheduler calls it where there is one."""
    return ranks.host or socket.gethostname()


def roll_call(
    store: Store,
    ranks: Ranks,
    facts: Mapping[str, Any],
    judge: Callable[[Sequence[Mapping[str, Any]]], str],
    deadline: Deadline,
) -> bool:
    """Waits for all ranks in a store that is new; returns True if they are on several machines or networks.

    Args:
        store: of all ranks.
        ranks: this process.
        facts: what rank 0 must know of this rank, with "host", "machine" and maybe "network", a network namespace.
        judge: called on rank 0 with the facts by rank; returns why these ranks cannot work together, or "".
        deadline: when to give up.

    Raises:
        RuntimeError: ranks are missing, which the message names, or cannot work together.
    """

    def answer_to(found: list[Any]) -> dict[str, Any]:
        missing = [rank for rank, fact in enumerate(found) if fact is None]
        if missing:
            return {"several": False, "problem": _missing_text(ranks, missing, deadline)}
        several = len({(fact["machine"], fact.get("network")) for fact in found}) > 1
        return {"several": several, "problem": _different_worlds(found) or judge(found)}

    me = f"rank {ranks.rank} on {host_of(ranks)}"
    own = {"world_size": ranks.world_size, **facts}
    try:
        answer = ask_all(store, "hello", ranks, own, answer_to, deadline, GRACE_SECONDS)
        if answer is None:
            raise RuntimeError(f"{me}: rank 0 did not answer in the roll call within {deadline.seconds:g} s")
        if answer["problem"]:  # the store ends with rank 0, and the others need a moment to read it
            num_read, end = store.add("hello read", 1), Deadline(READ_SECONDS)
            while ranks.rank == 0 and num_read < ranks.world_size and end.pause():
                num_read = store.add("hello read", 0)
    except dist.DistError as error:
        cause = str(error).split("\n")[0]
        raise RuntimeError(f"{me}: the store of rank 0 was lost in the roll call: {cause}") from None
    if answer["problem"]:
        raise RuntimeError((f"{me} stops: " if ranks.rank else "") + answer["problem"])
    return bool(answer["several"])


def _different_worlds(facts: Sequence[Mapping[str, Any]]) -> str:
    mine = facts[0]
    for rank, fact in enumerate(facts):
        if fact["world_size"] != mine["world_size"]:
            return (
                f"rank 0 on {mine['host']} counts {mine['world_size']} ranks, but rank {rank} on {fact['host']} counts "
                f"{fact['world_size']}"
            )
    return ""


def _missing_text(ranks: Ranks, missing: Sequence[int], deadline: Deadline) -> str:
    if not ranks.hosts:
        who = spans(missing)
    else:
        by_host: dict[str, list[int]] = {}
        for rank in missing:
            by_host.setdefault(ranks.hosts[rank], []).append(rank)
        who = ", ".join(f"{spans(group)} (expected on {host})" for host, group in by_host.items())
    noun = "rank" if len(missing) == 1 else "ranks"
    return f"{noun} {who} of {ranks.world_size} never came to rank 0 on {host_of(ranks)} within {deadline.seconds:g} s"


def spans(numbers: Sequence[int]) -> str:
    """Returns rising integers as text, "3, 6-8"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)
