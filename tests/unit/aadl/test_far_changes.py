"""Somebody else leads the weights far away: pairs from before do not steer, and nothing that was written is undone."""

import copy
import json

import pytest
import torch
from small_runs import flat, identical, network, sgd, snapshot, statistics, through_a_file, train

import aadl
from aadl.history import Column
from aadl.mixing import Gram
from aadl.problem import columns_here

MACRO = {"wait_iterations": 1, "store_each_nth": 10, "frequency": 20, "average": False}
"""The schedule by default; a candidate is accepted at step 40 of the run below, and judged at 50."""


def accelerated(**settings):
    model = network()
    return model, aadl.accelerate(sgd(model, 0.02), **MACRO | settings)


def fill(model):
    with torch.no_grad():
        model[2].bias.fill_(50)


def load(model):
    model.load_state_dict({name: 5 * value for name, value in model.state_dict().items()})


def multiply_through_data(model):
    torch._foreach_mul_([p.data for p in model.parameters()], 5.0)


def nudge(model):
    with torch.no_grad():
        torch._foreach_mul_(list(model.parameters()), 0.995)


def ranks_of_attempts(change, at, settings):
    """(macro-step, numerical rank) of every attempt after a change after step `at` that gives a candidate, and losses
    over those of the plain optimizer from the same weights on."""
    model, optimizer = accelerated(**settings)
    train(model, optimizer, at)
    change(model)
    plain_model = network()
    plain_model.load_state_dict(model.state_dict())
    plain = train(plain_model, sgd(plain_model, 0.02), 160)
    ranks, losses = [], []
    attempts = statistics(optimizer)["attempts"]
    for _ in range(160):
        losses += train(model, optimizer, 1)
        counts = statistics(optimizer)
        if counts["attempts"] > attempts:
            attempts = counts["attempts"]
            ranks.append((counts["macro_steps"], counts["numerical_rank"]))
    return ranks, [loss / other for loss, other in zip(losses, plain, strict=True)]


@pytest.mark.parametrize("at", [41, 45, 49, 50, 53, 60])
@pytest.mark.parametrize("change", [fill, load, multiply_through_data])
@pytest.mark.parametrize("safeguard", [True, "residual"])
def test_pairs_from_before_a_far_change_make_no_candidate(change, at, safeguard):
    ranks, ratios = ranks_of_attempts(change, at, {"safeguard": safeguard})
    before = at // 10
    assert ranks and all(rank < number - before for number, rank in ranks)
    assert max(ratios) < 1.5 and ratios[-1] < 1.05


@pytest.mark.parametrize("at", [41, 49, 50, 53])
@pytest.mark.parametrize("change", [fill, load])
def test_after_a_far_change_the_training_is_that_after_a_reset(change, at):
    """Pairs from before have no weight in anything: the balance of the momentum, the noise, the reach."""
    ends = []
    for resets in (False, True):
        model = network()
        settings = MACRO | {"average": "auto", "state_coupling": "full"}
        optimizer = aadl.accelerate(sgd(model, 0.02, momentum=0.5), **settings)
        train(model, optimizer, at)
        change(model)
        if resets:
            aadl.reset_history(optimizer)
        accepted = statistics(optimizer)["accepted"]
        train(model, optimizer, 100)
        assert statistics(optimizer)["accepted"] > accepted
        ends.append(flat(model))
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("at", [45, 50])
def test_pairs_from_before_a_small_change_stay(at):
    ranks, ratios = ranks_of_attempts(nudge, at, {})
    assert any(rank > number - at // 10 for number, rank in ranks[:2])
    assert max(ratios) < 1.5 and ratios[-1] < 1.05


def test_a_change_that_comes_with_every_macro_step_leaves_the_pairs():
    """However long it is beside the updates: they are the map that does both."""
    model, optimizer = accelerated(frequency=40)

    def shrink(step):
        if step % 10 == 0:
            with torch.no_grad():
                torch._foreach_mul_(list(model.parameters()), 0.9)

    train(model, optimizer, 400, after=shrink)
    counts = statistics(optimizer)
    assert counts["moved"] == 39 and counts["accepted"] > 0 and counts["numerical_rank"] > 3


@pytest.mark.parametrize("at", [41, 45, 49])
@pytest.mark.parametrize("which", ["0.weight", "0.bias", "2.weight", "2.bias"])
def test_no_parameter_that_was_filled_through_data_is_put_back(which, at):
    """No version counter tells, and a candidate waits for its judgment."""
    (model, optimizer), plain_model = accelerated(), network()
    train(model, optimizer, at)
    assert aadl.accelerator_of(optimizer).decisions.accepted is not None
    dict(model.named_parameters())[which].data.fill_(30)
    plain_model.load_state_dict(model.state_dict())
    train(model, optimizer, 50 - at)
    train(plain_model, sgd(plain_model, 0.02), 50 - at)
    assert torch.equal(flat(model), flat(plain_model)) and statistics(optimizer)["reverted"] == 0


def test_not_a_number_is_equal_to_itself():
    """A candidate that leads there is taken back, because nobody wrote."""
    model, optimizer = accelerated()
    train(model, optimizer, 41)
    train(model, optimizer, 9, loss=lambda model: float("nan") * model[0].weight.sum())
    assert statistics(optimizer)["reverted"] == 1 and bool(torch.isfinite(flat(model)).all())


@pytest.mark.parametrize("change", [fill, multiply_through_data])
@pytest.mark.parametrize("saved_at", [46, 50, 64])
def test_a_resumed_run_knows_what_a_change_has_ended(change, saved_at):
    model, optimizer = accelerated()
    train(model, optimizer, 45)
    change(model)
    train(model, optimizer, saved_at - 45)
    weights, state = copy.deepcopy(model.state_dict()), through_a_file(optimizer.state_dict())
    train(model, optimizer, 60)
    other, again = accelerated()
    other.load_state_dict(weights)
    again.load_state_dict(state)
    train(other, again, 60)
    assert identical(snapshot(other, again), snapshot(model, optimizer))
    assert identical(statistics(again), statistics(optimizer))


def test_states_that_know_nothing_of_such_changes_are_loaded():
    model, optimizer = accelerated()
    train(model, optimizer, 45)
    state = copy.deepcopy(optimizer.state_dict())
    values = json.loads(state["aadl"]["values"])
    del values["moved"]
    values["history"]["columns"] = [column[:5] for column in values["history"]["columns"]]
    state["aadl"]["values"] = json.dumps(values)
    optimizer.load_state_dict(state)
    columns = aadl.accelerator_of(optimizer).history.columns
    assert len(columns) == 3 and not any(column.moved or column.written for column in columns)


def test_an_update_with_a_far_change_hides_no_later_one():
    """Updates of lengths 1, 1, 50, 1, 49, 1, each in a direction of its own; somebody wrote within the long ones."""
    lengths = torch.tensor([1.0, 1.0, 50.0, 1.0, 49.0, 1.0], dtype=torch.float64)
    differences = torch.diag(lengths)[:, 1:] - torch.diag(lengths)[:, :-1]
    newest = torch.diag(lengths)[:, -1]
    gram = Gram(differences.T @ differences, differences.T @ newest, float(newest @ newest))
    written = [None, 50.0, None, 49.0, None]
    columns = [Column(place, True, 1.0, written=far) for place, far in enumerate(written)]
    assert columns_here(gram, columns) == 0
    columns[3] = Column(3, True, 1.0)
    assert columns_here(gram, columns) == 2
