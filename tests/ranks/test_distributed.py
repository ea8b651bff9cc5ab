"""Replicas of DistributedDataParallel decide together and stay bit-identical, whatever their local losses say."""

import math

import gloo
import pytest
import torch
import torch.distributed as dist
from small_runs import EAGER, INPUTS, TARGETS, identical, network
from torch.nn.parallel import DistributedDataParallel

import aadl

STEPS = 50


def train_replica(rank, group, poisoned=False):
    """Parameters, verdicts of the loss safeguard, and what the local losses alone would have said."""
    model = network()
    replica = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(replica.parameters(), lr=0.1, momentum=0.9)
    aadl.accelerate(optimizer, **EAGER, safeguard="loss", average=False, process_group=group)
    rows = slice(8 * rank, 8 * rank + 8)
    values, verdicts, alone = [], [], []

    def closure():
        optimizer.zero_grad()
        loss = (replica(INPUTS[rows]) - (-1) ** rank * TARGETS[rows]).square().mean()
        loss.backward()
        values.append(loss.item())
        return loss * math.nan if poisoned and rank == 1 else loss

    for _ in range(STEPS):
        values.clear()
        accepted = aadl.accelerator_of(optimizer).statistics["accepted"]
        optimizer.step(closure)
        if len(values) == 3:
            verdicts.append(aadl.accelerator_of(optimizer).statistics["accepted"] > accepted)
            alone.append(values[2] < values[1])
    parameters = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    return parameters, verdicts, alone


def train_replicas(rank, world_size):
    alone = [dist.new_group([member]) for member in range(world_size)]
    return {
        "together": train_replica(rank, None),
        "whole group": train_replica(rank, dist.group.WORLD),
        "each alone": train_replica(rank, alone[rank]),
        "poisoned": train_replica(rank, None, poisoned=True),
    }


@pytest.fixture
def runs(spawn_ranks):
    first, second = spawn_ranks(train_replicas, 2)
    return {name: (first[name], second[name]) for name in first}


@pytest.mark.smoke
def test_replicas_judge_together_and_stay_identical(runs):
    (first, verdicts, first_alone), (second, other_verdicts, second_alone) = runs["together"]
    assert torch.equal(first, second)
    assert verdicts == other_verdicts
    assert {True, False} <= {*verdicts}
    assert first_alone != second_alone  # the local losses disagree, so one rank at least was overruled

    assert torch.equal(runs["whole group"][0][0], first)

    (first, verdicts, _), (second, other_verdicts, _) = runs["each alone"]  # what would happen without agreement
    assert verdicts != other_verdicts
    assert not torch.equal(first, second)

    (first, verdicts, first_alone), (second, other_verdicts, _) = runs["poisoned"]
    assert torch.equal(first, second)
    assert verdicts == other_verdicts == [False] * len(verdicts)
    assert any(first_alone)  # the rank without NaN would have accepted


class Broken(Exception):
    pass


def train_with_failures(rank, size, settings, failing, evaluation):
    """Rank 1 fails in one evaluation of a trial ("plain": the first, "candidate": the second), or returns no loss."""
    model = network()
    replica = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(replica.parameters(), lr=0.1, momentum=0.9)
    aadl.accelerate(optimizer, **EAGER | {"average": False} | settings)
    rows = slice(16 // size * rank, 16 // size * (rank + 1))
    calls, raised = [], 0

    def closure():
        calls.append(None)
        if failing and rank == 1 and len(calls) == (2 if evaluation == "plain" else 3):
            raise Broken
        optimizer.zero_grad()
        loss = (replica(INPUTS[rows]) - (-1) ** rank * TARGETS[rows]).square().mean()
        loss.backward()
        return None if failing and rank == 1 and evaluation == "valueless" else loss

    for _ in range(STEPS):
        calls.clear()
        try:
            optimizer.step(closure)
        except Broken:
            raised += 1
    statistics = dict(aadl.accelerator_of(optimizer).statistics)
    parameters = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    return {"parameters": parameters, "statistics": statistics, "raised": raised}


def fail_everywhere(rank, size):
    results = {}
    for evaluation in ("plain", "candidate"):
        for safeguard in (True, "loss"):
            results[evaluation, safeguard] = train_with_failures(rank, size, {"safeguard": safeguard}, True, evaluation)
    results["valueless"] = train_with_failures(rank, size, {"safeguard": True}, True, "valueless")
    results["none"] = train_with_failures(rank, size, {"safeguard": True}, False, "plain")
    return results


def fail_with_a_shared_history(rank, size):
    settings = {"safeguard": True, "shard_history": True}
    return {
        evaluation: train_with_failures(rank, size, settings, True, evaluation) for evaluation in ("candidate", "plain")
    }


def check_failures(outcomes, name, raises, failures=3):
    """All ranks reject together; unless the loss is insisted on, they go over to the residual after some failures."""
    ours = [outcome[name] for outcome in outcomes]
    statistics = ours[0]["statistics"]
    assert torch.equal(ours[0]["parameters"], ours[1]["parameters"]), name
    assert identical(statistics, ours[1]["statistics"]), name
    assert ours[0]["raised"] == 0, name
    assert (ours[1]["raised"] > 0) == raises, name
    if raises:
        assert statistics["accepted"] == 0 < statistics["rejected"]["closure"], name
    else:
        assert statistics["rejected"]["closure"] == failures, name
        assert statistics["closure_evaluations"] == 2 * failures, name
        assert "loss" not in statistics["rejected"] and statistics["accepted"] > 0, name


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    return gloo.spawn_ranks(tmp_path_factory.mktemp("failures") / "ranks", fail_everywhere, 2)


def test_a_closure_that_fails_on_one_rank_makes_all_reject(failures):
    outcomes = failures
    for evaluation in ("plain", "candidate"):
        for safeguard in (True, "loss"):
            check_failures(outcomes, (evaluation, safeguard), raises=safeguard == "loss")
    check_failures(outcomes, "valueless", raises=False, failures=1)
    healthy = [outcome["none"]["statistics"] for outcome in outcomes]
    assert identical(*healthy)  # whole: numbers, causes, switches
    assert healthy[0]["accepted"] > 0


def test_a_closure_that_fails_on_one_rank_with_a_shared_history(spawn_ranks):
    outcomes = spawn_ranks(fail_with_a_shared_history, 2)
    for evaluation in ("candidate", "plain"):
        check_failures(outcomes, evaluation, raises=False)
