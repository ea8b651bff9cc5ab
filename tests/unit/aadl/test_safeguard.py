"""Judging accepted candidates by the next residual, with an exact way back."""

import math

import pytest
import quadratics
import torch
from quadratics import quadratic
from small_runs import (
    EAGER,
    RESIDUAL,
    adam,
    identical,
    nesterov,
    network,
    register_first,
    snapshot,
    squared_error,
    train,
)

import aadl
from aadl import acceptance


def kinked(model):
    """Leaves the regime its history was made in: after an extrapolation the gradient is a hundredfold."""
    return model.scale * squared_error(model)


@pytest.mark.parametrize("make", [adam, nesterov])
@pytest.mark.parametrize("coupling", ["params", "combine", "full"])
def test_a_revert_puts_back_the_plain_iterate_and_its_momentum(make, coupling):
    model = network()
    settings = EAGER | {"safeguard": "residual", "average": False, "state_coupling": coupling}
    optimizer = make(model)
    plain_iterates = []
    register_first(optimizer, lambda *_: plain_iterates.append(snapshot(model, optimizer)))
    aadl.accelerate(optimizer, **settings)
    accelerator, reverts, model.scale = aadl.accelerator_of(optimizer), 0, 1.0
    for _ in range(60):
        before = accelerator.statistics["accepted"], accelerator.statistics["reverted"]
        train(model, optimizer, 1, loss=kinked)
        accepted = accelerator.statistics["accepted"] > before[0]
        model.scale = 1e4 if accepted else 1.0
        if accelerator.statistics["reverted"] > before[1]:
            reverts += 1
            left, kept = snapshot(model, optimizer), plain_iterates[-2]
            assert identical(left["model"], kept["model"])
            assert not identical(left["model"], plain_iterates[-1]["model"])
            for name in ("momentum_buffer", "exp_avg"):
                mine = [entry.get(name) for entry in left["optimizer"]["state"].values()]
                theirs = [entry.get(name) for entry in kept["optimizer"]["state"].values()]
                assert identical(mine, theirs) or coupling == "params"
    # Adam forgets the scale of its gradients, and its steps do not grow as those of SGD do
    assert reverts > 0 or make is adam


@pytest.mark.parametrize("frequency", [1, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_residual_that_is_not_finite_resets_the_history(value, frequency):
    model = network()
    optimizer = nesterov(model, **RESIDUAL | {"frequency": frequency})
    accelerator = aadl.accelerator_of(optimizer)
    while not accelerator.statistics["accepted"]:
        plain = snapshot(model, optimizer)
        train(model, optimizer, 1)
    after = snapshot(model, optimizer)
    train(model, optimizer, 1, loss=lambda m: value * squared_error(m))
    assert accelerator.statistics["reverted"] == 1 and accelerator.statistics["resets"] == {"non_finite": 1}
    assert accelerator.statistics["trust_ratio"] == math.inf
    history = accelerator.history
    assert history.columns == [] and not history.has_pair
    for block in history.blocks:
        assert not any(tensor.any() for name, tensor in block.tensors.items() if name.startswith("delta"))
    left = snapshot(model, optimizer)
    assert all(torch.isfinite(entry).all() for entry in left["model"].values())
    assert not identical(left["model"], after["model"]) and not identical(left["model"], plain["model"])
    train(model, optimizer, 40)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert accelerator.statistics["accepted"] > 1 and accelerator.statistics["resets"] == {"non_finite": 1}


@pytest.mark.parametrize("of_the_weights_alone", [True, False])
def test_a_reset_forgets_the_candidate_that_might_be_taken_back(of_the_weights_alone):
    model = network()
    optimizer = nesterov(model, **RESIDUAL)
    decisions = aadl.accelerator_of(optimizer).decisions
    for _ in range(60):
        train(model, optimizer, 1)
        if decisions.confirmed is not None and decisions.last_jump:
            break
    assert decisions.confirmed is not None and decisions.last_jump
    if of_the_weights_alone:  # somebody has put them elsewhere
        decisions.start_elsewhere(aadl.accelerator_of(optimizer).history)
    else:
        aadl.reset_history(optimizer)
    assert (decisions.accepted, decisions.confirmed, decisions.last_jump) == (None, None, {})


def test_a_second_look_that_puts_the_plain_iterate_back_attempts_nothing_more():
    problem = quadratic(1e3, seed=0)
    x, optimizer = quadratics.sgd(problem, RESIDUAL, lr=0.5)
    counts, decisions = aadl.accelerator_of(optimizer).statistics, aadl.accelerator_of(optimizer).decisions
    plain = x.detach().clone()
    while not counts["accepted"]:
        x.grad = problem.gradient(x.detach())
        plain = x.detach() - 0.5 * x.grad
        optimizer.step()
    x.grad = problem.gradient(x.detach())
    optimizer.step()
    attempts = counts["attempts"]
    assert decisions.confirmed is not None
    x.grad = 10 * (x.detach() - plain)  # undoes the candidate, and more
    optimizer.step()
    assert (counts["reverted"], counts["attempts"]) == (1, attempts)
    assert torch.equal(x.detach(), plain)


def test_what_could_be_put_back_goes_with_the_next_candidate_and_with_time():
    """The candidate is written where the plain iterate was kept, and old iterates say nothing about an update."""
    for frequency in (1, 2):
        model, both = network(), 0
        optimizer = nesterov(model, **RESIDUAL | {"frequency": frequency})
        decisions = aadl.accelerator_of(optimizer).decisions
        while decisions.confirmed is None or frequency == 1:
            train(model, optimizer, 1)
            both += decisions.accepted is not None
            assert decisions.accepted is None or decisions.confirmed is None
            if both > 5:
                break
    decisions.pause.until = 1000
    train(model, optimizer, 5)
    assert decisions.confirmed is None


def test_pauses_double_up_to_a_limit_and_halve():
    pause = acceptance.Pause(longest=64)
    lengths = []
    for step in range(9):
        pause.extend(step)
        lengths.append(pause.length)
        assert pause.until == step + pause.length
    assert lengths == [1, 2, 4, 8, 16, 32, 64, 64, 64]
    pause.shorten()
    assert pause.length == 32


def promises(growth):
    """Trust ratios and statistics on x - (A x - b) / 2, whose update is `growth` times too long after a candidate.

    The map is linear, so the residual of a candidate is (I - A / 2) r with the predicted residual r. Eigenvalues of A
    are in (0, 1], and what comes next is 1/2 to 1 times as long as what was promised, times the growth. The history is
    forgotten after each verdict, since a pair that grew is none of this map.
    """
    problem = quadratic(1e3, seed=0)
    x, optimizer = quadratics.sgd(problem, RESIDUAL, lr=0.5)
    counts, ratios = aadl.accelerator_of(optimizer).statistics, []
    for _ in range(101):  # the last candidate, after an even step, is judged too
        judged = counts["accepted"] > len(ratios)
        x.grad = (growth if judged else 1.0) * problem.gradient(x.detach())
        optimizer.step()
        if judged:
            ratios.append(counts["trust_ratio"])
            aadl.reset_history(optimizer)
    assert len(ratios) == counts["accepted"] > 3
    return ratios, counts


def test_residuals_beyond_the_prediction_suspend_acceleration():
    ratios, counts = promises(growth=1.0)
    assert all(0.5 - 1e-6 < ratio < 1 + 1e-6 for ratio in ratios)
    assert counts["suspensions"] == counts["suspended"] == counts["reverted"] == 0
    ratios, counts = promises(growth=8.0)
    assert all(4 - 1e-6 < ratio < 8 + 1e-6 for ratio in ratios)
    assert counts["suspensions"] == counts["accepted"]
    assert counts["suspended"] > 10


@pytest.mark.parametrize("average", [False, "always"])
def test_noise_is_expected_of_the_next_residual_where_averages_are_mixed(average):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    aadl.accelerate(optimizer, **EAGER | {"safeguard": "residual", "average": average})
    accelerator = aadl.accelerator_of(optimizer)
    for _ in range(100):
        train(model, optimizer, 1)
        if accelerator.decisions.accepted is not None:
            break
    assert accelerator.decisions.accepted is not None
    assert (accelerator.decisions.accepted.noise > 0) == (average == "always")


def test_trust_ratio_and_revert_rule():
    pending = acceptance.Candidate(predicted=1.0, before=4.0, noise=0.0, weights={})
    assert acceptance.trust_ratio(4.0, pending) == 2.0
    assert acceptance.trust_ratio(math.nan, pending) == math.inf
    pending.advance = 2.0
    assert not acceptance.must_revert(16.0, -1.0, pending)
    assert acceptance.must_revert(16.1, -1.0, pending)
    assert acceptance.must_revert(16.0, -1.1, pending)
    assert acceptance.must_revert(math.nan, 0.0, pending) and acceptance.must_revert(0.0, math.nan, pending)
    noisy = acceptance.Candidate(predicted=1.0, before=4.0, noise=3.0, weights={})
    assert acceptance.trust_ratio(4.0, noisy) == 1.0 and acceptance.revert_bound(noisy) == 28.0
    calm = acceptance.Candidate(predicted=0.0, before=0.0, noise=0.0, weights={})
    assert acceptance.trust_ratio(0.0, calm) == 0.0
    assert acceptance.trust_ratio(1.0, calm) == math.inf
