"""What users' programs do to nonlinear GMRES: points and weights that change, shared closures, odd functions."""

import copy
import gc
import json
from contextlib import nullcontext

import pytest
import torch
from residual_runs import (
    ADAM,
    INPUTS,
    OFTEN,
    SGD,
    TARGETS,
    attach,
    closure_of,
    network,
    residuals_of,
    started,
    train,
)
from small_runs import flat, identical
from torch import nn

import aadl
from aadl.least_squares import within_bounds
from aadl.trial_values import draw

DOUBLE = torch.float64


def test_mini_batches_of_another_size_are_noticed_as_those_of_one_size_are():
    model, optimizer, accelerator = started(**OFTEN)
    train(model, optimizer, 8)
    attempts = accelerator.statistics["attempts"]
    for step in range(12):
        optimizer.step(closure_of(model, optimizer, slice(8 * (step % 4), 8 * (step % 4) + 8)))
    assert accelerator.statistics["attempts"] == attempts > 2
    assert accelerator.statistics["resets"]["points"] > 3


def test_a_change_of_points_is_no_harm_that_shortens_the_period():
    model, optimizer, accelerator = started(lr=1e-3)
    for rows in [slice(0, 8)] * 20 + [slice(0, 64)] * 20:
        optimizer.step(closure_of(model, optimizer, rows))
    assert accelerator.statistics["resets"] == {"points": 1}
    assert accelerator.pace.period == 10


def trained_on_points_of_its_own(accelerated, observe):
    """(weights, accelerator or None) of a run whose points are drawn at every evaluation, by torch's generator."""
    model = network()
    optimizer, accelerator = ADAM(model.parameters(), lr=0.02), None

    def residuals():
        points = torch.rand(64, 3, dtype=DOUBLE)
        return model(points) - points.sum(1, keepdim=True)

    def closure():
        optimizer.zero_grad()
        found = residuals()
        if accelerated and observe:
            accelerator.observe(found)
        found.square().mean().backward()

    if accelerated:
        accelerator = attach(optimizer, residuals=None if observe else residuals, **OFTEN)
    for _ in range(12):
        optimizer.step(closure)
    return flat(model), accelerator


@pytest.mark.parametrize("observe", [True, False])
def test_points_drawn_at_every_evaluation_are_noticed(observe):
    """A trial rewinds torch's generator, but the next step must not see the points of the trial."""
    weights, accelerator = trained_on_points_of_its_own(True, observe)
    assert torch.equal(weights, trained_on_points_of_its_own(False, observe)[0])
    assert accelerator.statistics["attempts"] == 0 and accelerator.statistics["resets"]["points"] > 3


def test_each_draw_is_one_of_its_own(monkeypatch):
    """A generator of CUDA goes on by draws, not by the numbers in one."""
    drawn = []
    monkeypatch.setattr(torch, "rand", lambda number, device: drawn.append((number, device.type)))
    draw([torch.empty(1, device="meta"), torch.empty(1)], 2)
    assert drawn == [(1, "cpu")] * 2


@pytest.mark.parametrize("bound", [100, 0.3])
def test_writes_after_every_step_leave_the_points_comparable_where_they_change_nothing(bound):
    model, optimizer, accelerator = started(**OFTEN)
    with nullcontext() if bound == 100 else pytest.warns(UserWarning, match="nothing tells whether the points stay"):
        for _ in range(40):
            train(model, optimizer, 1)
            with torch.no_grad():
                for p in model.parameters():
                    p.clamp_(-bound, bound)
    counts = accelerator.statistics
    assert (counts["attempts"] > 5, counts["moved"] > 5) == (bound == 100, bound != 100)
    assert not counts["resets"]


@pytest.mark.parametrize("harm", [0.0, 0.1])
def test_a_state_saved_after_writes_resumes_bit_for_bit(harm):
    """As after a validation with other weights, swapped in and out."""
    model, optimizer, accelerator = started(**OFTEN)
    train(model, optimizer, 6)
    with torch.no_grad():
        model[0].weight.add_(harm)
    state, weights = copy.deepcopy((optimizer.state_dict(), model.state_dict()))
    train(model, optimizer, 12)
    again, resumed, continued = started(**OFTEN)
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    train(again, resumed, 12)
    assert torch.equal(flat(model), flat(again)) and accelerator.statistics["accepted"] > 2
    assert identical(accelerator.statistics, continued.statistics)


def test_a_model_that_becomes_double_starts_again_in_double():
    """No history of float32 writes to its weights."""
    model = network().float()
    optimizer = SGD(model.parameters(), lr=0.02)
    places = lambda: {"dtype": model[0].weight.dtype}  # noqa: E731
    residuals = lambda model, rows=None: model(INPUTS.to(**places())) - TARGETS.to(**places())  # noqa: E731
    accelerator = attach(optimizer, residuals=lambda: residuals(model), **OFTEN)
    closure = closure_of(model, optimizer, observe=False, residuals=residuals)
    for step in range(12):
        optimizer.step(closure)
        if step == 5:
            model.double()
    counts = accelerator.statistics
    assert counts["resets"] == {"parameters_changed": 1} and counts["accepted"] > 2
    assert not torch.equal(flat(model), flat(model).float().double())


@pytest.mark.parametrize("observe", [True, False])
def test_parameters_that_cannot_be_extrapolated_end_the_acceleration_and_not_the_training(observe):
    model, optimizer, accelerator = started(observe=observe, **OFTEN)
    train(model, optimizer, 6, observe)
    attempts, before = accelerator.statistics["attempts"], flat(model)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))]})
    with pytest.warns(UserWarning, match="training goes on without acceleration") as caught:
        train(model, optimizer, 6, observe)
    assert len(caught) == 1 and not torch.equal(flat(model), before)
    assert accelerator.statistics["attempts"] == attempts and accelerator.num_columns == 0
    assert accelerator.history_bytes == 0


@pytest.mark.parametrize("kind", ["anderson", "nonlinear_gmres"])
def test_what_is_given_up_holds_no_history_where_warnings_are_errors_too(kind):
    model = network()
    optimizer = aadl.accelerate(SGD(model.parameters(), lr=0.05), kind, frequency=2, store_each_nth=1)
    train(model, optimizer, 6, kind != "anderson")
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))]})
    with pytest.raises(UserWarning, match="training goes on without acceleration"):
        train(model, optimizer, 1, kind != "anderson")
    train(model, optimizer, 2, kind != "anderson")
    accelerator = aadl.accelerator_of(optimizer)
    assert accelerator.history_bytes == accelerator.num_columns == 0
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def test_a_state_loads_where_all_parameters_are_frozen():
    model, optimizer, accelerator = started(**OFTEN)
    train(model, optimizer, 6)
    for p in model.parameters():
        p.requires_grad_(False)
    optimizer.step(lambda: accelerator.observe(residuals_of(model)))
    optimizer.load_state_dict(optimizer.state_dict())
    for p in model.parameters():
        p.requires_grad_(True)
    train(model, optimizer, 6)
    assert accelerator.statistics["resets"]["parameters_changed"] == 2


def test_the_trials_of_another_optimizer_hand_nothing_over():
    """Two optimizers share a closure, and the second one steps without it."""
    model = network()
    first, second = (SGD(layer.parameters(), lr=0.05) for layer in (model[0], model[2]))
    one = attach(first, **OFTEN)
    other = attach(second, residuals=lambda: residuals_of(model), **OFTEN)

    def closure():
        first.zero_grad()
        second.zero_grad()
        found = residuals_of(model)
        one.observe(found)
        other.observe(found)
        found.square().mean().backward()

    for _ in range(12):
        first.step(closure)
        second.step()
    assert other.history.residuals.row.numel == 64 and "points" not in other.statistics["resets"]
    assert other.statistics["accepted"] > 2


@pytest.mark.parametrize("observes", [True, False])
def test_a_function_that_observes_what_it_returns_is_asked_as_any_other(observes):
    def residuals():
        found = residuals_of(model)
        if observes:
            accelerator.observe(found)
        return found

    model, optimizer, accelerator = started(residuals=residuals, **OFTEN)
    for _ in range(12):
        closure_of(model, optimizer)()
        optimizer.step()
    assert accelerator.num_columns == 6 and not accelerator.statistics["resets"]
    assert accelerator.statistics["accepted"] > 2


@pytest.mark.parametrize("transform", [None, "grad", "vmap"])
def test_observations_within_transforms_are_those_outside_of_them(transform):
    model, optimizer, accelerator = started(**OFTEN)

    def loss_of_one(point, target):
        found = model(point) - target
        accelerator.observe(found)
        return found.square().mean()

    def closure():
        optimizer.zero_grad()
        if transform == "grad":
            torch.func.grad(loss_of_one)(INPUTS, TARGETS)
        if transform == "vmap":
            torch.func.vmap(loss_of_one)(INPUTS, TARGETS)
        found = residuals_of(model)
        if transform is None:
            accelerator.observe(found)
        found.square().mean().backward()

    for _ in range(12):
        optimizer.step(closure)
    expected, plain, _ = started(**OFTEN)
    train(expected, plain, 12)
    assert torch.allclose(flat(model), flat(expected), rtol=0, atol=1e-9)
    assert accelerator.statistics["accepted"] > 2


def test_a_function_that_leaves_its_model_in_another_mode_leaves_no_trace():
    def residuals():
        model.eval()
        return residuals_of(model)

    model, optimizer, _ = started(residuals=residuals, **OFTEN)
    train(model, optimizer, 4, observe=False)
    assert model.training and model[1].training


class Marked(torch.Tensor):
    """Tensors that the collector of garbage can tell from others."""


def test_a_removed_accelerator_keeps_no_residuals():
    model, optimizer, accelerator = started(**OFTEN)
    train(model, optimizer, 4)
    aadl.remove_acceleration(optimizer)
    accelerator.observe(residuals_of(model).detach().as_subclass(Marked))
    assert not any(type(thing) is Marked for thing in gc.get_objects())


@pytest.mark.parametrize(("floor", "expected"), [(0, 0), (1e4, 1e4), (0.1, 0.4)])
def test_the_damping_of_a_loaded_state_keeps_to_the_bounds_of_the_new_settings(floor, expected):
    assert within_bounds(0.4, floor) == expected
    _, _, accelerator = started(**OFTEN)
    state = accelerator.state_dict()
    values = json.loads(state["values"]) | {"damping": 0.4}
    _, _, other = started(reg_acc=floor, **OFTEN)
    other.load_state_dict(state | {"values": json.dumps(values)})
    assert json.loads(other.state_dict()["values"])["damping"] == expected
