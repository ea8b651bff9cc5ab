"""How the ranks of a job find each other: rank 0 announces an address, all connect to its store, and a roll call.

Rank 0 binds its port before it announces it, so no other process can take it in between. The announcement is a file in
a shared folder, renamed into place, or whatever the launcher offers. The roll call agrees on a fresh name for this
attempt, since torchrun's agent keeps the keys of earlier attempts in its store and counts restarts for each node alone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import socket
import struct
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from experiments.distributed.ranks import Ranks

PROBE_SECONDS = 3.0  # for one attempt to reach one address
GRACE_SECONDS = 5.0  # that the others wait longer than rank 0, whose message names the missing ones
LONGEST_PAUSE_SECONDS = 1.0
SIOCGIFADDR = 0x8915  # of Linux: the IPv4 address of an interface
NOT_FOR_RANKS = re.compile(
    r"(lo\d*|docker|br-|virbr|veth|cni|flannel|tun|tap)"
)  # interfaces that lead to no other node


@dataclass(frozen=True)
class Announcement:
    """Where the store of rank 0 listens: addresses in order of preference, and a token that only this store knows."""

    addresses: tuple[str, ...]
    port: int
    token: str


class Deadline:
    """A point in time, with growing pauses until then."""

    def __init__(self, seconds: float) -> None:
        self._end, self.seconds, self._pause = time.monotonic() + seconds, seconds, 0.005

    def remaining(self) -> float:
        return self._end - time.monotonic()

    def pause(self) -> bool:
        """Waits a little; whether there is time left."""
        left = self.remaining()
        time.sleep(max(0.0, min(self._pause, left)))
        self._pause = min(2 * self._pause, LONGEST_PAUSE_SECONDS)
        return left > 0


# --- addresses and interfaces


def interface_addresses() -> dict[str, str]:
    """IPv4 address of each interface that has one."""
    addresses = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                packed = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                addresses[name] = socket.inet_ntoa(packed[20:24])
    return addresses


def check_interfaces(names: Sequence[str]) -> None:
    """Refuses interfaces of which this host has none.

    Raises:
        ValueError: with those there are.
    """
    present = interface_addresses()
    if not any(name in present for name in names):
        there = ", ".join(f"{name} ({address})" for name, address in present.items())
        raise ValueError(
            f"launch.interface {','.join(names)} has no address on {socket.gethostname()}; there are {there}"
        )


def own_addresses(interfaces: Sequence[str], *, one_host: bool) -> tuple[str, ...]:
    """Addresses under which this host can be reached, the best first.

    Args:
        interfaces: names whose addresses come first, or none.
        one_host: all ranks are here, so the loopback address does, which needs no network.
    """
    present = interface_addresses()
    if one_host and not interfaces:
        return ("127.0.0.1",)
    found = [present[name] for name in interfaces if name in present]
    with contextlib.suppress(OSError):
        found += [str(entry[4][0]) for entry in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)]
    found += [address for name, address in present.items() if not NOT_FOR_RANKS.match(name)]
    outside = [address for address in dict.fromkeys(found) if not address.startswith("127.")]
    return tuple(outside) or ("127.0.0.1",)


def interface_towards(address: str) -> str | None:
    """The interface through which this host reaches an IPv4 address, if that can be told."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # sends nothing
        except OSError:
            return None
        own = probe.getsockname()[0]
    return next((name for name, entry in interface_addresses().items() if entry == own), None)


# --- the announcement


def listen(port: int, *, loopback: bool = False) -> socket.socket:
    """A listening socket, on a free port where `port` is 0, for this host alone with `loopback`.

    Raises:
        OSError: the port is taken.
    """
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.0.1" if loopback else "", port))
        listening.listen(4096)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise OSError(
                f"port {port} of {socket.gethostname()} is taken: choose another AADL_MASTER_PORT or MASTER_PORT, or "
                "unset it and let rank 0 pick one"
            ) from None
        raise
    return listening


def announcement_path(folder: Path, ranks: Ranks) -> Path:
    """The file of this attempt, `.rendezvous-<job>.<step>.<restart>.json`.

    Raises:
        ValueError: nothing tells this job from another one that uses the same folder.
    """
    job = ranks.job_id or ranks.step_id
    if not job and ranks.local_size == ranks.world_size:
        job = f"{socket.gethostname()}-{os.getppid()}"  # one host: the same mpiexec, or its proxy, is everyone's parent
    if not job:
        raise ValueError(
            f"{ranks.launcher} gives the job no name: set AADL_JOB_ID to one text for all of its ranks, or install "
            "mpi4py for this MPI library"
        )
    return folder / f"{_job_prefix(ranks, job)}{ranks.restart_count}.json"


def _job_prefix(ranks: Ranks, job: str) -> str:
    return ".rendezvous-" + re.sub(r"[^\w-]", "_", job) + "." + re.sub(r"[^\w-]", "_", ranks.step_id or "0") + "."


def write_announcement(path: Path, announcement: Announcement) -> None:
    """Renames the announcement into place and deletes those of earlier attempts of the same step.

    Raises:
        OSError: the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, suffix=".tmp", delete=False) as file:
            json.dump(asdict(announcement), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, path)
    except OSError as error:
        raise OSError(f"rank 0 cannot announce its address in {path.parent}: {error.strerror or error}") from None
    attempt = re.compile(re.escape(path.name.rsplit(".", 2)[0]) + r"\.\d+\.json$")
    for other in path.parent.iterdir():
        if other != path and attempt.match(other.name):
            other.unlink(missing_ok=True)


def read_announcement(path: Path) -> Announcement | None:
    """The announcement, or None while there is none."""
    try:
        os.listdir(path.parent)  # makes network file systems look again
        raw = json.loads(path.read_text("utf-8"))
        return Announcement(tuple(raw["addresses"]), int(raw["port"]), str(raw["token"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


# --- the store


def host_store(listening: socket.socket, token: str, seconds: float) -> Store:
    """The store of rank 0, on a socket that listens already."""
    _, port = listening.getsockname()
    store = TCPStore(
        "127.0.0.1",
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=seconds),
        master_listen_fd=listening.detach(),
    )
    store.set("token", token)
    return store


def connect(find: Callable[[], Announcement | None], ranks: Ranks, deadline: Deadline, where: str) -> Store:
    """Connects to the store of rank 0 as soon as it is announced and answers; a stale announcement does neither.

    Args:
        find: gives the announcement, or None as long as there is none.
        ranks: this process, for the message.
        deadline: when to give up.
        where: where rank 0 announces, for the message.

    Raises:
        RuntimeError: nothing was announced, or nothing answers there.
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
        raise RuntimeError(f"{me}: rank 0 announced no address in {where} within {deadline.seconds:g} s")
    interfaces = ", ".join(f"{name} {address}" for name, address in interface_addresses().items())
    raise RuntimeError(
        f"{me}: rank 0 did not answer at {' or '.join(tried.addresses)}, port {tried.port}, within "
        f"{deadline.seconds:g} s; this host has {interfaces} (launch.interface names the one to use)"
    )


def _try_store(address: str, port: int, token: str | None, deadline: Deadline) -> Store | None:
    """The store at this address, if one is there and, where a token is given, knows it."""
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


def connect_given(ranks: Ranks, deadline: Deadline) -> Store:
    """The store at an address that the launcher or the user gave; rank 0 holds it, or torchrun's agent.

    Raises:
        OSError: the port is taken on the host of rank 0.
        RuntimeError: nothing answers there.
    """
    if ranks.rank == 0 and not ranks.agent_store:
        return host_store(listen(ranks.master_port), "", deadline.remaining())
    while True:
        store = _try_store(ranks.master_address, ranks.master_port, None, deadline)
        if store is not None:
            return store
        if not deadline.pause():
            raise RuntimeError(
                f"rank {ranks.rank} on {host_of(ranks)}: rank 0 did not answer at {ranks.master_address}, port "
                f"{ranks.master_port}, within {deadline.seconds:g} s; does rank 0 run on that host?"
            )


# --- the roll call


def host_of(ranks: Ranks) -> str:
    """The name of this host, as the scheduler calls it if it does."""
    return ranks.host or socket.gethostname()


def roll_call(
    base: Store,
    ranks: Ranks,
    facts: Mapping[str, Any],
    judge: Callable[[Sequence[Mapping[str, Any]]], str],
    deadline: Deadline,
) -> tuple[str, bool]:
    """Waits for all ranks and agrees on a name for this attempt.

    Each rank says hello with a number of its own, rank 0 welcomes it by that number, and the rank answers: what an
    earlier attempt left in the store carries other numbers and is not taken for an answer.

    Args:
        base: store of all ranks, maybe with the keys of earlier attempts.
        ranks: this process.
        facts: what rank 0 must know of this rank: "host" and "machine" at least.
        judge: says on rank 0, from the facts by rank, why these ranks cannot work together, or "".
        deadline: when to give up.

    Returns:
        The name, and whether the ranks are on several machines.

    Raises:
        RuntimeError: ranks are missing, which are named, or cannot work together.
    """
    store = PrefixStore("roll call", base)
    hello = json.dumps({"number": secrets.token_hex(8), "world_size": ranks.world_size, **facts})
    store.set(f"hello {ranks.rank}", hello)
    try:
        if ranks.rank == 0:
            return _call(store, ranks, hello, judge, deadline)
        return _answer(store, ranks, hello, deadline)
    except dist.DistError as error:
        cause = str(error).split("\n")[0]
        raise RuntimeError(
            f"rank {ranks.rank} on {host_of(ranks)}: the store of rank 0 was lost in the roll call: {cause}"
        ) from None


def _call(
    store: Store,
    ranks: Ranks,
    own: str,
    judge: Callable[[Sequence[Mapping[str, Any]]], str],
    deadline: Deadline,
) -> tuple[str, bool]:
    everyone = range(ranks.world_size)
    hellos: list[str] = []
    name, several = "", False
    while deadline.remaining() > 0:
        if store.check([f"hello {rank}" for rank in everyone]):
            found = [entry.decode() for entry in store.multi_get([f"hello {rank}" for rank in everyone])]
            if found != hellos:
                hellos, name = found, secrets.token_hex(8)
                facts = [json.loads(entry) for entry in hellos]
                several = len({fact["machine"] for fact in facts}) > 1
                problem = _different_worlds(facts) or judge(facts)
                _welcome(store, facts, {"name": name, "several": several, "problem": problem})
                if problem:
                    _linger(store, name, ranks)
                    raise RuntimeError(problem)
            if store.check([f"here {name} {rank}" for rank in everyone if rank] or [f"hello {0}"]):
                store.set(f"begin {name}", "")
                return name, several
        deadline.pause()
    missing = [rank for rank in everyone if rank and not store.check([f"hello {rank}"])]
    if not missing:  # then those missing have a hello of an earlier attempt
        missing = [rank for rank in everyone if rank and not store.check([f"here {name} {rank}"])]
    problem = _missing_text(ranks, missing, deadline)
    there = [rank for rank in everyone if store.check([f"hello {rank}"])]
    facts = [json.loads(entry) for entry in store.multi_get([f"hello {rank}" for rank in there])]
    _welcome(store, facts, {"name": "", "several": False, "problem": problem}, there)
    time.sleep(min(1.0, GRACE_SECONDS))
    raise RuntimeError(problem)


def _welcome(
    store: Store, facts: Sequence[Mapping[str, Any]], text: Mapping[str, Any], whom: Sequence[int] | None = None
) -> None:
    ranks = range(len(facts)) if whom is None else whom
    store.multi_set(  # type: ignore[attr-defined]
        [f"welcome {rank}" for rank in ranks],
        [json.dumps({"number": fact["number"], **text}) for fact in facts],
    )


def _linger(store: Store, name: str, ranks: Ranks) -> None:
    """Gives the others the time to read why rank 0 stops."""
    end = Deadline(2.0)
    others = [f"here {name} {rank}" for rank in range(1, ranks.world_size)]
    while not store.check(others) and end.pause():
        pass


def _answer(store: Store, ranks: Ranks, own: str, deadline: Deadline) -> tuple[str, bool]:
    number, name = json.loads(own)["number"], ""
    end = Deadline(deadline.remaining() + GRACE_SECONDS)
    while True:
        if store.check([f"welcome {ranks.rank}"]):
            welcome = json.loads(store.get(f"welcome {ranks.rank}"))
            if welcome["number"] == number:
                if welcome["name"] != name:
                    name = welcome["name"]
                    store.set(f"here {name} {ranks.rank}", "")
                if welcome["problem"]:
                    raise RuntimeError(f"rank {ranks.rank} on {host_of(ranks)} stops: {welcome['problem']}")
                if store.check([f"begin {name}"]):
                    return name, welcome["several"]
        if not end.pause():
            raise RuntimeError(
                f"rank {ranks.rank} on {host_of(ranks)}: rank 0 did not answer in the roll call within "
                f"{deadline.seconds:g} s"
            )


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
    """Rising integers as text, "3, 6-8"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)
