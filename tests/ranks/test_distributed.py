"""Replicas of DistributedDataParallel decide together and stay bit-identical, whatever their local losses say."""

import math

import pytest
import torch
from small_runs import EAGER, INPUTS, TARGETS, identical, network
from torch.nn.parallel import DistributedDataParallel

import aadl

STEPS = 50


class Broken(Exception):
    pass


def train(rank, spoiled="", **settings):
    """A replica whose data wants the opposite of the other's.

    Args:
        rank: of two.
        spoiled: what goes wrong on rank 1: "plain" or "candidate" (the first or second evaluation of a trial raises),
            "valueless" (no loss is returned) or "NaN" (it is returned).
        settings: further ones of the acceleration.

    Returns:
        Parameters, statistics, how often the closure raised, the verdicts of trials, and those of its own losses alone.
    """
    model = network()
    replica = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(replica.parameters(), lr=0.1, momentum=0.9)
    aadl.accelerate(optimizer, **EAGER | {"average": False} | settings)
    statistics = aadl.accelerator_of(optimizer).statistics
    rows = slice(8 * rank, 8 * rank + 8)
    spoiled = spoiled if rank == 1 else ""
    losses, raised, verdicts, alone = [], 0, [], []

    def closure():
        losses.append(math.nan)
        if len(losses) == {"plain": 2, "candidate": 3}.get(spoiled):
            raise Broken
        optimizer.zero_grad()
        loss = (replica(INPUTS[rows]) - (-1) ** rank * TARGETS[rows]).square().mean()
        loss.backward()
        losses[-1] = loss.item()
        return None if spoiled == "valueless" else loss * math.nan if spoiled == "NaN" else loss

    for _ in range(STEPS):
        losses.clear()
        accepted = statistics["accepted"]
        try:
            optimizer.step(closure)
        except Broken:
            raised += 1
        if len(losses) == 3:
            verdicts.append(statistics["accepted"] > accepted)
            alone.append(losses[2] < losses[1])
    parameters = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    return {
        "parameters": parameters, "statistics": dict(statistics), "raised": raised, "verdicts": verdicts, "alone": alone
    }  # fmt: skip


def judge(rank, world_size):
    return {spoiled: train(rank, spoiled, safeguard="loss") for spoiled in ("", "NaN")}


@pytest.mark.smoke
def test_replicas_judge_together_and_stay_identical(spawn_ranks):
    """What would happen without that shows test_data_parallel, "each alone"."""
    first, second = spawn_ranks(judge, 2)
    for spoiled in first:
        assert torch.equal(first[spoiled]["parameters"], second[spoiled]["parameters"])
        assert first[spoiled]["verdicts"] == second[spoiled]["verdicts"]
    assert {True, False} <= {*first[""]["verdicts"]}
    assert first[""]["alone"] != second[""]["alone"]  # so one rank at least was overruled
    assert not any(first["NaN"]["verdicts"]) and any(first["NaN"]["alone"])  # alone it would have accepted


def fail_everywhere(rank, size):
    results = {
        (evaluation, safeguard): train(rank, evaluation, safeguard=safeguard)
        for evaluation in ("plain", "candidate")
        for safeguard in (True, "loss")
    }
    for evaluation in ("plain", "candidate"):
        results["shared", evaluation] = train(rank, evaluation, safeguard=True, shard_history=True)
    return results | {"valueless": train(rank, "valueless", safeguard=True), "none": train(rank, safeguard=True)}


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


def test_a_closure_that_fails_on_one_rank_makes_all_reject(spawn_ranks):
    outcomes = spawn_ranks(fail_everywhere, 2)
    for evaluation in ("plain", "candidate"):
        for safeguard in (True, "loss"):
            check_failures(outcomes, (evaluation, safeguard), raises=safeguard == "loss")
        check_failures(outcomes, ("shared", evaluation), raises=False)
    check_failures(outcomes, "valueless", raises=False, failures=1)
    healthy = [outcome["none"]["statistics"] for outcome in outcomes]
    assert identical(*healthy)  # whole: numbers, causes, switches
    assert healthy[0]["accepted"] > 0
