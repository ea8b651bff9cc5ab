"""What one rank does for all: the others wait, get the result or the mistake, and are named where they are late."""

import gloo
import pytest
from processes import wait_until

from experiments.distributed import together
from experiments.distributed.ranks import Ranks


def said(action):
    try:
        return action()
    except (ValueError, OSError) as error:
        return type(error).__name__, str(error)


def fail(error):
    raise error


def cases(rank, world_size, folder):
    """What a rank gets and reads in each case."""
    together.GRACE_SECONDS = 20.0
    ranks = Ranks(rank=rank, world_size=world_size, host=f"node{rank}", hosts=("node0", "node1", "node2"))
    made = []

    def make():
        made.append(rank)
        return {"made by": rank}

    results = {"first": together.by_first(ranks, make, "making", 60), "makers": made}
    results["each"] = together.by_each(ranks, lambda: 10 * rank, "counting", 60)
    for error in (ValueError("no such class"), FileNotFoundError(2, "No such file", "x.h5")):
        name = type(error).__name__
        results[name] = said(lambda error=error: together.by_first(ranks, lambda: fail(error), "making", 60))
    results["of one"] = said(
        lambda: together.by_each(ranks, lambda: fail(ValueError("too small")) if rank == 2 else 0, "copying", 60)
    )

    results["same"] = said(lambda: together.check_same(ranks, "csv (12ab)", "the data", 60))
    results["other"] = said(lambda: together.check_same(ranks, f"{'csv' if rank < 2 else 'none'}", "the data", 60))

    def slow():
        """Rank 0 comes when rank 2 has come, and rank 1 when rank 0 has waited for it in vain."""
        (folder / f"came-{rank}").touch()
        assert rank != 0 or wait_until((folder / "came-2").exists)
        assert rank != 1 or wait_until((folder / "over").exists)

    results["late"] = said(lambda: together.by_each(ranks, slow, "copying", 2.0))
    (folder / "over").touch()
    results["after"] = together.by_first(ranks, lambda: "goes on", "making", 60)
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    return gloo.spawn_ranks(folder / "ranks", cases, 3, folder)


def test_the_first_rank_makes_it_for_all(results):
    assert [each["first"] for each in results] == 3 * [{"made by": 0}]
    assert [each["makers"] for each in results] == [[0], [], []]
    assert [each["each"] for each in results] == [0, 10, 20]


def test_a_mistake_reaches_all_ranks_as_what_it_is(results):
    assert [each["ValueError"] for each in results] == 3 * [("ValueError", "no such class")]
    text = "[Errno 2] No such file: 'x.h5'"
    assert [each["FileNotFoundError"] for each in results] == [("FileNotFoundError", text)] + 2 * [("OSError", text)]
    of_others = ("ValueError", "rank 2 on node2: too small")
    assert [each["of one"] for each in results][:2] == 2 * [of_others]
    assert results[2]["of one"][0] == "ValueError" and "too small" in results[2]["of one"][1]


def test_what_must_be_the_same_on_all_ranks_is_compared(results):
    assert [each["same"] for each in results] == 3 * [None]
    text = "the data is none here and csv on rank 0"
    assert [each["other"] for each in results] == 3 * [("ValueError", f"rank 2 on node2: {text}")]


def test_ranks_that_are_late_are_named_to_all_and_the_next_meeting_is_another(results):
    text = "copying took more than 2 s: rank 1 on node1 was not done when the others had waited for so long"
    assert [each["late"] for each in results] == 3 * [("TimeoutError", text)]
    assert [each["after"] for each in results] == 3 * ["goes on"]


def test_a_process_without_a_group_is_on_its_own():
    assert together.by_first(Ranks(rank=1, world_size=2), lambda: 5, "making", 1) == 5
    together.check_same(Ranks(rank=1, world_size=2), "csv", "the data", 1)
    with pytest.raises(ValueError, match=r"^wrong$"):
        together.by_each(Ranks(), lambda: fail(ValueError("wrong")), "making", 1)
