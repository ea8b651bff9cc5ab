"""Nonlinear GMRES on ranks that have rows of their own."""

import io
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from parallel_runs import replica, sharded, values_of
from residual_runs import INPUTS, SGD, TARGETS, attach, closure_of, network
from small_runs import identical
from torch import equal
from torch.testing import assert_close

import aadl
from aadl.trial import on_trial

STEPS = 24


def start(rank, size, wrap, **settings):
    """(model, optimizer, accelerator, closure) with the rows of this rank."""
    model = network()
    forward = wrap(model, rank, size) if size > 1 else model
    model = forward if wrap is sharded else model
    optimizer = SGD(model.parameters(), lr=0.05)
    accelerator = attach(optimizer, history_depth=5, **settings)
    own = slice(rank * 64 // size, (rank + 1) * 64 // size)
    closure = closure_of(model, optimizer, own, residuals=lambda _, rows: forward(INPUTS[rows]) - TARGETS[rows])
    return model, optimizer, accelerator, closure


def on_ranks(rank, size, wrap, frequency, saved_after=None, old_names=False):
    """(weights, counters, sizes of the sums over ranks), and the first two of a run that goes on from a saved state."""
    model, optimizer, accelerator, closure = start(rank, size, wrap, frequency=frequency, reg_acc=1e-2)
    sums, original = [], aadl.ranks.dist.all_reduce

    def counting(tensor, *args, **kwargs):
        sums.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    aadl.ranks.dist.all_reduce = counting
    saved = None
    for step in range(1, STEPS + 1):
        optimizer.step(closure)
        if step == saved_after:
            saved = io.BytesIO()
            torch.save((model.state_dict(), optimizer.state_dict()), saved)
    aadl.ranks.dist.all_reduce = original
    end = values_of(model), accelerator.statistics, sums
    if saved is None:
        return end
    weights, state = torch.load(io.BytesIO(saved.getvalue()), weights_only=False)
    if old_names:
        state["aadl"]["rows"] = {name.removeprefix(f"{rank}."): row for name, row in state["aadl"]["rows"].items()}
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    for _ in range(STEPS - saved_after):
        optimizer.step(closure)
    return (*end, values_of(model), accelerator.statistics)


@pytest.mark.parametrize("wrap", [replica, sharded])
@pytest.mark.parametrize("frequency", [1, 4])
def test_ranks_with_rows_of_their_own_are_one_process_with_all_rows(spawn_ranks, wrap, frequency):
    alone, counts, _ = on_ranks(0, 1, replica, frequency)
    results = spawn_ranks(on_ranks, 2, wrap, frequency)
    for weights, statistics, sums in results:
        assert_close(weights, alone, rtol=0, atol=1e-6)
        assert [statistics[name] for name in ("attempts", "accepted")] == [counts["attempts"], counts["accepted"]]
        by_us = [count for count in sums if count <= 5 * 5 + 5 + 4]
        assert len(by_us) <= 2 * (STEPS // frequency) + 2  # products and verdict, and one message about memory
    assert counts["accepted"] > 2 and equal(results[0][0], results[1][0])


@pytest.mark.parametrize(("wrap", "old_names"), [(replica, False), (sharded, False), (replica, True)])
def test_ranks_resume_bit_for_bit_each_with_its_own_rows(spawn_ranks, wrap, old_names):
    """In states of before, the rows of every rank are named as those of rank 0."""
    for weights, counts, _, again, resumed in spawn_ranks(on_ranks, 2, wrap, 4, 11, old_names):
        assert equal(weights, again) and identical(counts, resumed)
        assert counts["accepted"] > 2


def on_other_rows(rank, size, wrap):
    """(counters, weights) of runs: rank 1 has no rows, or loses some; the weights are clamped between steps."""
    ends = {}
    for case in ("no rows", "fewer rows", "harmless writes", "writes"):
        model = wrap(network(), rank, size)
        optimizer = SGD(model.parameters(), lr=0.05)
        accelerator = attach(optimizer, history_depth=5, frequency=2, reg_acc=1e-2)
        own = slice(64 * rank, 64) if case == "no rows" else slice(32 * rank, 32 * rank + 32)
        for step in range(20):
            if case == "fewer rows" and step == 10 and rank:
                own = slice(32, 50)
            optimizer.step(closure_of(model, optimizer, own))
            bound = {"harmless writes": 100, "writes": 0.5}.get(case)
            for p in model.parameters() if bound else ():
                with torch.no_grad():
                    p.clamp_(-bound, bound)
        ends[case] = accelerator.statistics, values_of(model)
    return ends


@pytest.mark.parametrize("wrap", [replica, sharded])
def test_ranks_agree_whatever_rows_one_of_them_has_and_whoever_writes(spawn_ranks, wrap):
    first, second = spawn_ranks(on_other_rows, 2, wrap)
    for case, (counts, weights) in first.items():
        others, same = second[case]
        assert equal(weights, same) and counts["rejected"] == others["rejected"], case
        assert counts["resets"] == others["resets"] == ({"points": 1} if case == "fewer rows" else {}), case
        assert (counts["attempts"], counts["moved"]) == ((0, 9) if case == "writes" else (counts["attempts"], 0)), case
        assert counts["accepted"] == others["accepted"] and (counts["accepted"] > 2) == (case != "writes"), case


def loads_of_rank_zero(rank, size, steps):
    """Both ranks load a checkpoint of rank 0 alone; the run goes on with an empty history."""
    model, optimizer, accelerator, closure = start(rank, size, replica, frequency=4)
    for _ in range(steps):
        optimizer.step(closure)
    saved = [(model.state_dict(), optimizer.state_dict())]
    dist.broadcast_object_list(saved, src=0)
    model.load_state_dict(saved[0][0])
    optimizer.load_state_dict(saved[0][1])
    columns = accelerator.num_columns
    for _ in range(12):
        optimizer.step(closure)
    return values_of(model), columns, accelerator.statistics


@pytest.mark.parametrize("steps", [4, 10])
def test_the_state_of_another_rank_costs_the_pairs_and_nothing_else(spawn_ranks, steps):
    """After 4 steps the points were not compared yet, and rank 1 has nothing to compare with."""
    (first, columns, counts), (second, others, _) = spawn_ranks(loads_of_rank_zero, 2, steps)
    assert equal(first, second)
    assert columns > 0 and others == 0
    assert counts["accepted"] > 0


def through_a_distributed_checkpoint(rank, size, folder):
    """(names of rows, whether they are as they were) after a load into rows of the same run."""
    _, optimizer, accelerator, closure = start(rank, size, replica, frequency=4)
    for _ in range(10):
        optimizer.step(closure)
    rows = accelerator.state_dict()["rows"]
    kept = {name: row.clone() for name, row in rows.items()}
    dcp.save({"aadl": accelerator}, checkpoint_id=folder)
    for row in rows.values():
        row.zero_()
    dcp.load({"aadl": accelerator}, checkpoint_id=folder)
    return set(rows), identical(rows, kept)


def test_a_distributed_checkpoint_does_not_mix_the_residuals_of_ranks(spawn_ranks, tmp_path):
    (first, same), (second, others) = spawn_ranks(through_a_distributed_checkpoint, 2, tmp_path / "checkpoint")
    assert same and others and first.isdisjoint(second)


def that_fails_on_one_rank(rank, size, failing, uses_function):
    """(weights, counters, warnings) of a run in which rank 1 fails in the evaluations of these numbers."""
    made, evaluations, own = [], [0], slice(rank * 64 // size, (rank + 1) * 64 // size)

    def evaluate():
        evaluations[0] += 1
        if rank == 1 and evaluations[0] in failing:
            raise RuntimeError("a bad batch")

    def residuals():
        evaluate()
        return made[0](INPUTS[own]) - TARGETS[own]

    settings = {"residuals": residuals} if uses_function else {}
    model, optimizer, accelerator, closure = start(rank, size, replica, frequency=2, **settings)
    made.append(model)

    def fallible():
        if on_trial():  # a trial of this closure
            evaluate()
        return closure()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(40):
            optimizer.step(fallible)
    said = [str(warning.message) for warning in caught if "ranks reject" in str(warning.message)]
    return values_of(model), accelerator.statistics, said


@pytest.mark.parametrize("uses_function", [False, True])
@pytest.mark.parametrize("failing", [(1,), (8,), (9,), (8, 10, 13), tuple(range(9, 200))])
def test_an_evaluation_that_fails_on_one_rank_is_rejected_by_all_and_training_goes_on(
    spawn_ranks, failing, uses_function
):
    here, there = spawn_ranks(that_fails_on_one_rank, 2, failing, uses_function)
    assert equal(here[0], there[0]) and bool(here[0].isfinite().all())
    for name in ("attempts", "accepted", "rejected", "resets"):
        assert here[1][name] == there[1][name], name
    assert here[1]["accepted"] > 0
    assert here[2] == [] and len(there[2]) == 1 and "a bad batch" in there[2][0]
