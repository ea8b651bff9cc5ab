import contextlib
import os
import random
import socket
import threading
from dataclasses import replace
from datetime import timedelta

import launched
import pytest
import torch.distributed as dist
from processes import wait_until

from experiments.distributed import interfaces, rendezvous
from experiments.distributed.interfaces import check_interfaces, interface_addresses, interface_towards, own_addresses
from experiments.distributed.polling import Deadline
from experiments.distributed.ranks import Ranks
from experiments.distributed.rendezvous import (
    Announcement,
    announcement_path,
    read_announcement,
    read_board,
    roll_call,
    spans,
    write_announcement,
    write_board,
)

STEP = Ranks(launcher="srun", job_id="7", step_id="0", scheduler="slurm", world_size=4)
FACTS = {"host": "here", "machine": "here"}


def name_of(attempt=0, ranks=STEP):
    return announcement_path(rendezvous.Path(), replace(ranks, restart_count=attempt)).name


# --- the file


def test_ranks_in_any_order_meet_by_the_file(tmp_path):
    layout = [3, 1]  # two nodes, so that rank 0 must announce an address that is not the loopback's, if there is one
    order = list(range(4))
    random.shuffle(order)
    processes = {}
    for rank in order:
        variables = launched.srun_variables(rank, 4, layout=layout)
        processes[rank] = launched.start(launched.job, variables, tmp_path / f"log-{rank}", tmp_path / "results")
    assert launched.finish(processes.values()) == [0] * 4, [path.read_text() for path in tmp_path.glob("log-*")]
    assert all("of 4 by srun summed" in (tmp_path / f"log-{rank}").read_text() for rank in range(4))
    assert not list((tmp_path / "results").iterdir())  # rank 0 has taken its announcement back


def test_a_stale_announcement_is_ignored(tmp_path):
    """Neither a dead port nor the store of another job is taken for rank 0; rank 1 is there long before it."""
    foreign = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))
    foreign.set("token", "of another job")
    path = tmp_path / "results" / name_of()
    path.parent.mkdir()
    with socket.socket() as dead:
        dead.bind(("127.0.0.1", 0))
        write_announcement(path, Announcement(("127.0.0.1",), dead.getsockname()[1], "dead"))
        second = launched.start(launched.job, launched.srun_variables(1, 2), tmp_path / "log-1", tmp_path / "results")
        second.join(1.0)
        write_announcement(path, Announcement(("127.0.0.1",), foreign.port, "another token"))
        second.join(1.0)
        assert second.is_alive()
    first = launched.start(launched.job, launched.srun_variables(0, 2), tmp_path / "log-0", tmp_path / "results")
    assert launched.finish([first, second]) == [0, 0], (tmp_path / "log-1").read_text()


def test_rank_0_deletes_the_announcements_of_earlier_attempts_only(tmp_path):
    others = [name_of(ranks=replace(STEP, job_id="8")), name_of(ranks=replace(STEP, step_id="1")), "results.h5"]
    for name in [name_of(0), name_of(1), *others]:
        (tmp_path / name).write_text("{}")
    written = Announcement(("10.0.0.1", "10.0.1.1"), 4711, "token")
    write_announcement(tmp_path / name_of(2), written)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name_of(2), *others])
    assert read_announcement(tmp_path / name_of(2)) == written


@pytest.mark.parametrize("text", ["", "{", "[]", '{"addresses": ["a"]}', '{"addresses": 1, "port": 2, "token": ""}'])
def test_half_an_announcement_is_ignored(tmp_path, text):
    (tmp_path / "file").write_text(text)
    assert read_announcement(tmp_path / "file") is None
    assert read_announcement(tmp_path / "missing") is None


def test_the_file_names_job_step_and_restart(tmp_path):
    names = {name_of(), name_of(1), name_of(ranks=replace(STEP, job_id="8")), name_of(ranks=replace(STEP, step_id="1"))}
    assert len(names) == 4 and name_of(1) == ".rendezvous-7.0.1.json"
    here = Ranks(launcher="mpich", world_size=2, local_size=2, node_rank=-1)
    assert announcement_path(tmp_path, here).name.startswith(f".rendezvous-{socket.gethostname()}-")
    with pytest.raises(ValueError, match="mpich gives the job no name: set AADL_JOB_ID"):
        announcement_path(tmp_path, replace(here, world_size=4))


# --- ranks that do not come


def test_a_missing_rank_is_named_with_its_host(tmp_path):
    processes = [
        launched.start(
            job_with_deadline,
            launched.srun_variables(rank, 4, layout=[2, 2], nodes="node[07-08]"),
            tmp_path / f"log-{rank}",
            tmp_path / "results",
            2,
        )
        for rank in (0, 2)
    ]
    assert launched.finish(processes) == [1, 1]
    printed = [(tmp_path / f"log-{rank}").read_text() for rank in (0, 2)]
    missing = "ranks 1 (expected on node07), 3 (expected on node08) of 4 never came to rank 0"
    assert missing in printed[0] and "within 4 s" in printed[0]
    assert missing in printed[1] and "rank 2" in printed[1]  # rank 0 tells the others before it leaves
    assert all("Traceback" not in text and len(text.strip().splitlines()) == 1 for text in printed)


def job_with_deadline(folder, together=1):
    """The deadline begins when so many processes have started."""
    (folder.parent / f"started-{os.getpid()}").touch()
    assert wait_until(lambda: len(list(folder.parent.glob("started-*"))) == together)
    launched.job(folder, start_seconds=4.0)


def test_a_rank_0_that_does_not_come_is_named(tmp_path):
    process = launched.start(job_with_deadline, launched.srun_variables(1, 2), tmp_path / "log", tmp_path / "results")
    assert launched.finish([process]) == [1]
    printed = (tmp_path / "log").read_text()
    assert "rank 1 on " in printed and "rank 0 announced no address in" in printed and name_of() in printed


def call_all(store, worlds, judge=lambda facts: "", seconds=20.0, only=None, facts=lambda rank: {}):
    """The roll call of len(worlds) ranks in threads that begin together: what each returns or raises."""
    outcomes, together = {}, threading.Barrier(len(worlds) if only is None else len(only), timeout=60)

    def call(rank):
        ranks = Ranks(rank, worlds[rank], rank, host=f"host{rank}")
        client = dist.TCPStore("127.0.0.1", store.port, is_master=False, timeout=timedelta(seconds=20))
        together.wait()
        try:
            own = {**FACTS, "host": f"host{rank}", **facts(rank)}
            outcomes[rank] = roll_call(client, ranks, own, judge, Deadline(seconds))
        except RuntimeError as error:
            outcomes[rank] = str(error)

    threads = [threading.Thread(target=call, args=(rank,)) for rank in (range(len(worlds)) if only is None else only)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [outcomes.get(rank) for rank in range(len(worlds))]


@pytest.fixture
def store():
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))


def test_a_missing_rank_is_named_to_those_that_came(store):
    outcomes = call_all(store, [3] * 3, seconds=2.0, only=[0, 2])
    assert outcomes[0] == "rank 1 of 3 never came to rank 0 on host0 within 2 s"
    assert outcomes[0] in outcomes[2]


def test_an_attempt_of_torchrun_does_not_take_the_announcement_of_an_earlier_one(store):
    """The agent keeps its store: the address of the first attempt is there until rank 0 of the second one writes."""
    old, new = (dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in range(2))
    old.set("token", "first")
    new.set("token", "second")
    assert read_board(store) is None
    write_board(store, Announcement(("127.0.0.1",), old.port, "first"))
    del old
    threading.Timer(0.5, write_board, (store, Announcement(("127.0.0.1",), new.port, "second"))).start()
    found = rendezvous.connect(lambda: read_board(store), Ranks(1, 2, 1), Deadline(20.0), "the store of the agent")
    assert found.get("token") == b"second"


def test_ranks_that_count_differently_are_an_error(store):
    outcomes = call_all(store, [2, 3])
    assert outcomes[0] == "rank 0 on host0 counts 2 ranks, but rank 1 on host1 counts 3"
    assert outcomes[0] in outcomes[1]


def test_ranks_of_one_machine_are_on_one_network(store):
    assert call_all(store, [2, 2]) == [False, False]


def test_containers_of_one_machine_are_on_several_networks(store):
    assert call_all(store, [2, 2], facts=lambda rank: {"network": f"net:[{rank}]"}) == [True, True]


def test_all_ranks_hear_the_verdict_of_rank_0(store):
    outcomes = call_all(store, [2, 2], judge=lambda facts: f"{facts[1]['host']} has no GPU")
    assert outcomes[0] == "host1 has no GPU" and "host1 has no GPU" in outcomes[1]


def test_a_store_that_is_lost_is_one_sentence(tmp_path):
    ranks = Ranks(1, 2, 1)
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))
    client = dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=5))
    del server
    with pytest.raises(RuntimeError, match="the store of rank 0 was lost in the roll call"):
        roll_call(client, ranks, FACTS, lambda facts: "", Deadline(5.0))


# --- addresses


def test_a_port_that_is_taken_is_named():
    with rendezvous.listen(0, loopback=True) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"port {port} of .* is taken: choose another AADL_MASTER_PORT"):
            rendezvous.listen(port, loopback=True)


def test_addresses_lead_outside_where_there_are_several_hosts():
    present = interface_addresses()
    assert own_addresses((), one_host=True) == ("127.0.0.1",)
    outside = own_addresses((), one_host=False)
    others = {entry for entries in present.values() for entry in entries if entry not in ("127.0.0.1", "::1")}
    wired = [entries for name, entries in present.items() if name.startswith(("eth", "en", "ib", "hsn"))]
    assert set(outside) >= {entry for entries in wired for entry in entries}
    assert not others or not {"127.0.0.1", "::1"} & set(outside)
    for name, entries in present.items():
        if entries[0] in others:
            assert own_addresses((name,), one_host=False)[0] == entries[0]


def test_the_interface_of_an_address():
    for name, entries in interface_addresses().items():
        for address in entries:
            assert interface_towards(address) == name
    with pytest.raises(ValueError, match=r"launch.interface ib7,ib8 has no address on .*; there are lo \("):
        check_interfaces(["ib7", "ib8"])
    check_interfaces(["ib7", "lo"])


def test_a_host_with_ipv6_alone_announces_that(monkeypatch):
    """A link-local address leads to no other node, and getaddrinfo knows the loopback's alone."""
    monkeypatch.setattr(interfaces, "interface_addresses", lambda: {"lo": ("::1",), "eth0": ("fd00::1",)})
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [(0, 0, 0, "", (entry,)) for entry in ("::1", "fe80::2")])
    assert own_addresses((), one_host=False) == ("fd00::1",)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_the_store_of_rank_0_answers_by_both_protocols(address):
    with contextlib.closing(rendezvous.listen(0)) as listening:
        port = listening.getsockname()[1]
        kept = rendezvous.host_store(listening, "token", 20.0)
    announced = Announcement((address,), port, "token")
    found = rendezvous.connect(lambda: announced, Ranks(1, 2, 1), Deadline(20.0), "nowhere")
    assert found.get("token") == kept.get("token") == b"token"


@pytest.mark.parametrize(
    ("numbers", "text"), [([], ""), ([3], "3"), ([3, 4], "3-4"), ([0, 2, 3, 4, 7, 9, 10], "0, 2-4, 7, 9-10")]
)
def test_spans(numbers, text):
    assert spans(numbers) == text
