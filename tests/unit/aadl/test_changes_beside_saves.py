"""Changes from outside beside a save or a load: a resumed run knows what the uninterrupted one knows."""

import copy

import pytest
import torch
from small_runs import flat, identical, network, sgd, snapshot, statistics, train

import aadl

MACRO = {"wait_iterations": 1, "store_each_nth": 10, "frequency": 20, "average": False}
"""A candidate is accepted at step 40 of the run below, and judged at 50."""


def macro_run(momentum=0.0):
    """(model, optimizer) with this schedule."""
    model = network()
    return model, aadl.accelerate(sgd(model, 0.02, momentum=momentum), **MACRO)


def load(model, optimizer, weights):
    model.load_state_dict(weights)


def copy_through_data(model, optimizer, weights):
    for name, p in model.named_parameters():
        p.data.copy_(weights[name])


def point_elsewhere(model, optimizer, weights):
    for name, p in model.named_parameters():
        p.data = weights[name].clone()


def start_again(model, optimizer, weights):
    load(model, optimizer, weights)
    optimizer.state.clear()


@pytest.mark.parametrize("at", [41, 45, 49])
@pytest.mark.parametrize("change", [load, copy_through_data, point_elsewhere])
def test_no_candidate_is_taken_back_over_a_change_right_after_a_resume(change, at):
    """Weights that a resumed run begins with, and that are not those of the save, are left alone as well."""
    model, optimizer = macro_run()
    train(model, optimizer, at)
    assert aadl.accelerator_of(optimizer).decisions.accepted is not None
    state = copy.deepcopy(optimizer.state_dict())
    (other, again), plain_model = macro_run(), network()
    again.load_state_dict(state)
    change(other, again, {name: 30 * value for name, value in model.state_dict().items()})
    plain_model.load_state_dict(other.state_dict())
    train(other, again, 50 - at)
    train(plain_model, sgd(plain_model, 0.02), 50 - at)
    assert torch.equal(flat(other), flat(plain_model)) and statistics(again)["reverted"] == 0
    (same, unchanged) = macro_run()
    same.load_state_dict(model.state_dict())
    unchanged.load_state_dict(state)
    train(same, unchanged, 50 - at)
    assert not any(column.written for column in aadl.accelerator_of(unchanged).history.columns)


def test_tensors_that_are_replaced_at_unequal_distances_are_so_for_a_run_resumed_just_before_the_macro_step_ends():
    """The resumed run sees no step before the end, and knows of earlier replacements."""
    model, optimizer = macro_run()
    for steps, factor in ((45, 2), (14, 3)):
        train(model, optimizer, steps)
        point_elsewhere(model, optimizer, {name: factor * value for name, value in model.state_dict().items()})
    weights, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, 20)
    other, again = macro_run()
    other.load_state_dict(weights)
    again.load_state_dict(state)
    train(other, again, 20)
    assert identical(snapshot(other, again), snapshot(model, optimizer))
    assert identical(statistics(again), statistics(optimizer))


@pytest.mark.parametrize("at", [41, 45, 49])
@pytest.mark.parametrize("change", [point_elsewhere, start_again])
def test_tensors_that_were_replaced_before_a_save_are_replaced_for_a_resumed_run(change, at):
    model, optimizer = macro_run(0.5)
    train(model, optimizer, at)
    change(model, optimizer, {name: 3 * value for name, value in model.state_dict().items()})
    weights, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, 30)
    other, again = macro_run(0.5)
    other.load_state_dict(weights)
    again.load_state_dict(state)
    train(other, again, 30)
    assert identical(snapshot(other, again), snapshot(model, optimizer))
    assert identical(statistics(again), statistics(optimizer)) and statistics(again)["moved"] == 1
