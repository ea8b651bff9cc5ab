"""Replicas stay bit-identical whatever their losses say, exchange a kilobyte a time, and may share one history."""

import gloo
import pytest
import torch
import torch.distributed as dist
from parallel_runs import (
    CALM,
    LOSS,
    RESIDUAL,
    SAME_ON_RANKS,
    UNSAFE,
    agree,
    at_odds,
    check_same_run,
    distance,
    five_elements,
    gamma_distance,
    light_momentum,
    momentum,
    nine_elements,
    part_of_batch,
    refusing,
    replica,
    run,
)
from small_runs import EAGER, identical

STEPS = 120
LONG = 200
"""Of variants with the defaults, which wait before they accelerate."""
VARIANTS = {  # settings, closure, optimizer
    "residual": (RESIDUAL, False, momentum),
    "loss": (LOSS, True, momentum),
    "unsafe": (UNSAFE, False, momentum),
    "auto": (EAGER | {"average": True}, False, momentum),
    "always": (EAGER | {"average": "always"}, False, momentum),
    "default": ({}, False, light_momentum),
    "default after a long wait": ({"wait_iterations": 119}, False, light_momentum),
}
SHARED = SAME_ON_RANKS | {
    "nine elements": {"settings": LOSS | {"history_depth": 2}, "closure": True, "build": nine_elements},
    "five elements": {"settings": RESIDUAL | {"history_depth": 2}, "build": five_elements},
    "five elements, refused": {
        "settings": LOSS | {"history_depth": 2}, "closure": True, "build": five_elements, "context": refusing
    },
}  # fmt: skip
ON_FOUR = {"residual", "loss", "auto"}
SHARED_ON_FOUR = {"residual", "refused", "loss", "reverts", "five elements"}
"""Of VARIANTS and of SHARED; there are two cores."""
ELEMENTS = {"nine elements": 9, "five elements": 5, "five elements, refused": 5}


def steps_of(name):
    return LONG if "default" in name else STEPS


class Contrary:
    """Losses at odds, of which those of the last rank grow from one evaluation to the next."""

    def __init__(self):
        self.evaluations = 0

    def __call__(self, model, rank, size):
        self.evaluations += 1
        return at_odds(model, rank, size) + (100.0 * self.evaluations if rank == size - 1 else 0.0)


def train_replicas(rank, size):
    own = [dist.new_group([member]) for member in range(size)][rank]
    results = {
        name: run(rank, size, settings, wrap=replica, make=make, loss=at_odds, closure=closure, steps=steps_of(name))
        for name, (settings, closure, make) in VARIANTS.items()
        if size == 2 or name in ON_FOUR
    }
    results["each alone"] = run(
        rank, size, LOSS | {"process_group": own}, wrap=replica, loss=at_odds, closure=True, steps=STEPS
    )
    results["contrary"] = run(rank, size, LOSS, wrap=replica, loss=Contrary(), closure=True, steps=STEPS)
    if size == 2:
        results |= {steps: run(rank, size, wrap=replica, loss=at_odds, steps=steps) for steps in (STEPS, LONG)}
    return results


def share_history(rank, size):
    results = {}
    for name, more in SHARED.items():
        for shared in (False, True) if size == 2 or name in SHARED_ON_FOUR else ():
            settings = CALM | more["settings"] | {"shard_history": shared}
            results[name, shared] = run(rank, size, wrap=replica, loss=part_of_batch, **more | {"settings": settings})
    return results


def both(rank, size):
    return train_replicas(rank, size), share_history(rank, size)


@pytest.fixture(scope="module", params=[2, 4])
def world(request, tmp_path_factory):
    """(number of ranks, per rank the outcomes of VARIANTS, per rank those of SHARED)."""
    results = gloo.spawn_ranks(tmp_path_factory.mktemp("world") / "ranks", both, request.param)
    return request.param, [r[0] for r in results], [r[1] for r in results]


@pytest.mark.parametrize("name", VARIANTS)
def test_replicas_at_odds_stay_bit_identical(world, name):
    size, outcomes, _ = world
    if name not in outcomes[0]:
        pytest.skip("runs on two ranks: four ranks take a choice of the variants, to save time")
    ours = [outcome[name] for outcome in outcomes]
    assert agree(ours)
    assert all(identical(ours[0]["statistics"], other["statistics"]) for other in ours)
    assert ours[0]["statistics"]["steps"] == steps_of(name)
    assert ours[0]["statistics"]["accepted"] > 0 or "wait" in name
    assert torch.isfinite(ours[0]["weights"]).all() or name == "unsafe"
    assert size != 2 or not torch.equal(ours[0]["weights"], outcomes[0][steps_of(name)]["weights"])


def test_candidates_were_rejected_too_and_without_agreement_replicas_part(world):
    size, outcomes, _ = world
    for name in ("residual", "loss", "auto"):
        assert sum(outcomes[0][name]["statistics"]["rejected"].values()) > 0, name
    contrary = [outcome["contrary"] for outcome in outcomes]
    assert agree(contrary)
    for counts in (outcome["statistics"] for outcome in contrary):
        assert counts["rejected"].get("loss", 0) > 0 and counts["accepted"] == 0
    assert size != 2 or torch.equal(contrary[0]["weights"], outcomes[0][STEPS]["weights"])
    apart = [outcome["each alone"] for outcome in outcomes]
    assert not agree(apart)
    assert not all(identical(apart[0]["statistics"], other["statistics"]) for other in apart)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_messages_of_an_acceleration_take_a_kilobyte(world, name):
    """One of inner products, one for the direction of a candidate, one of losses, one residual for an accepted one."""
    _, outcomes, _ = world
    _, closure, _ = VARIANTS[name]
    if name not in outcomes[0]:
        pytest.skip("runs on two ranks: four ranks take a choice of the variants, to save time")
    for outcome in (outcome[name] for outcome in outcomes):
        counts = outcome["statistics"]
        assert outcome["own"][0].pop(0) == ("all_reduce", 8)  # whether all ranks have room for their histories
        words = {8: 0, 24: 0, 88: 0}
        for calls, events in zip(outcome["own"], outcome["events"], strict=True):
            assert {call for call, _ in calls} <= {"all_reduce"} and events <= 1
            sizes = [size for _, size in calls]
            assert sizes in ([], [88]) if not events else sizes[0] <= 1024 and sizes[1:] in ([], [8], [8, 24])
            for size in sizes[events:]:
                words[size] += 1
        assert sum(outcome["events"]) >= counts["attempts"] > 0
        assert words[8] <= counts["attempts"] and words[88] <= counts["accepted"]
        assert 2 * words[24] == counts["closure_evaluations"]
        assert (words[24] > 0) == closure  # also shows that the counter misses nothing
    assert not any(outcomes[0]["each alone"]["own"])  # nothing to agree upon


@pytest.mark.parametrize("name", SHARED)
def test_a_shared_history_takes_a_part_of_the_memory_and_changes_nothing(world, name):
    size, _, outcomes = world
    if (name, True) not in outcomes[0]:
        pytest.skip("runs on two ranks: four ranks take a choice of the variants, to save time")
    elements = ELEMENTS.get(name, 83)
    whole = [outcome[name, False] for outcome in outcomes]
    parts = [outcome[name, True] for outcome in outcomes]
    assert agree(whole)
    check_same_run(parts, whole[0], name, gammas=1e-12 if "refused" in name else 1e-8)
    assert (whole[0]["statistics"]["accepted"] > 0) == ("refused" not in name)

    bytes_of_element, remainder = divmod(whole[0]["bytes"], elements)
    assert remainder == 0
    assert sum(part["bytes"] for part in parts) == whole[0]["bytes"]
    assert max(part["bytes"] for part in parts) == -(-elements // size) * bytes_of_element
    gathers = [call for calls in parts[0]["own"] for call in calls if call[0].startswith("all_gather")]
    assert (len(gathers) > 0) == (name != "refused")
    assert not any(call[0].startswith("all_gather") for calls in whole[0]["own"] for call in calls)


def test_the_shared_runs_met_every_verdict_and_differ_from_each_other(world):
    size, _, outcomes = world
    results = outcomes[0]
    assert results["reverts", True]["statistics"]["reverted"] > 0
    assert results["loss", True]["statistics"]["rejected"].get("loss", 0) > 0
    assert results["residual", True]["statistics"]["rejected"].get("backward", 0) > 0
    assert gamma_distance(results["residual", True], results["loss", False]) > 1e-3
    assert distance(results["residual", True], results["reverts", False]) > 1e-3
    assert size == 2 or outcomes[3]["five elements", True]["bytes"] == 0  # nothing was left for the last rank
