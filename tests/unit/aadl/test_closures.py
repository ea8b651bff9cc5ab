"""What closures do besides computing a loss: nothing of it is left by a trial, and what gives no loss is given up."""

import copy
import functools
import itertools
import math
import types
from unittest import mock

import pytest
import torch
from small_runs import (
    EAGER,
    INPUTS,
    TARGETS,
    Pairs,
    closure_of,
    identical,
    is_torchs_engine,
    network,
    snapshot,
    squared_error,
    statistics,
    stored_columns,
    train,
)
from torch import nn
from torch.func import functional_call, grad_and_value, stack_module_state, vjp
from torch.nn.utils import parametrize
from torch.optim.optimizer import _global_optimizer_pre_hooks

import aadl
from aadl import trial_loss
from aadl.trial import without_trace

LOSS = EAGER | {"safeguard": "loss", "average": False, "frequency": 1}
CAST = functools.partial(torch.autocast, "cpu", torch.bfloat16)


class Scene:
    """A model in two parts, of which the first belongs to another optimizer, and inputs that require a gradient."""

    def __init__(self):
        self.model, self.other = network(nn.BatchNorm1d(6), nn.Dropout(0.2)), nn.Linear(3, 3)
        self.points = INPUTS.clone().requires_grad_()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.02, momentum=0.9)
        self.second = torch.optim.Adam(self.other.parameters(), lr=0.01)
        self.leaves = [*self.model.parameters(), *self.other.parameters(), self.points]
        self.fired = []
        for p in self.leaves:
            p.register_post_accumulate_grad_hook(self.fired.append)
        self.held = {name: b.clone() for name, b in self.model.named_buffers()}
        self.context = CAST()

    def loss(self):
        return (self.model(self.other(self.points)) - TARGETS).square().mean()

    def everything(self):
        modules = [m.training for m in self.model.modules()]
        parts = snapshot(self.model, self.optimizer), snapshot(self.other, self.second), self.held
        switches = torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()
        gradients = [p.grad for p in self.leaves]
        return copy.deepcopy([*parts, gradients, modules, switches, len(self.fired), torch.get_rng_state()])


def of_all(scene):
    scene.optimizer.zero_grad()
    scene.second.zero_grad()
    loss = scene.loss()
    loss.backward()
    return loss


def set_to_zero(scene):
    scene.optimizer.zero_grad(set_to_none=False)
    scene.other.zero_grad(set_to_none=False)
    loss = scene.loss()
    torch.autograd.backward(loss)
    return loss


def accumulating(scene):
    loss = scene.loss()
    torch.autograd.backward([loss, 0.5 * loss], retain_graph=True)
    return loss


def by_hand(scene):
    loss = scene.loss()
    for p, g in zip(scene.leaves, torch.autograd.grad(loss, scene.leaves), strict=True):
        p.grad = g if p.grad is None else p.grad.mul_(0.5).add_(g)
    return loss


def of_some_inputs(scene):
    for p in scene.leaves:
        if p.grad is not None:
            p.grad.zero_()
    loss = scene.loss()
    loss.backward(inputs=[*scene.model.parameters(), scene.points])
    return loss


def scaled(scene):
    del scene.points.grad
    scene.optimizer.zero_grad()
    loss = scene.loss()
    torch.amp.GradScaler("cpu", init_scale=8.0).scale(loss).backward()
    for p in scene.model.parameters():
        p.grad.div_(8)
    nn.utils.clip_grad_norm_(scene.leaves, 1.0)
    return loss


def penalized(scene):
    """The squared length of the accumulated gradient belongs to the loss."""
    scene.optimizer.zero_grad()
    loss = scene.loss()
    loss.backward(create_graph=True, inputs=[*scene.model.parameters()])
    loss = loss + 0.1 * sum(p.grad.square().sum() for p in scene.model.parameters())
    scene.optimizer.zero_grad()
    loss.backward()
    return loss


def functional(scene):
    buffers = {name: b.clone() for name, b in scene.model.named_buffers()}

    def compute(parameters, buffers):
        return (functional_call(scene.model, (parameters, buffers), INPUTS) - TARGETS).square().mean()

    gradients, loss = grad_and_value(compute)(dict(scene.model.named_parameters()), buffers)
    for name, p in scene.model.named_parameters():
        p.grad = gradients[name].detach()
    return loss


def pulled_back(scene):
    scene.model.eval()
    weights = {name: p.detach() for name, p in scene.model.named_parameters()}
    loss, back = vjp(lambda w: (functional_call(scene.model, w, INPUTS) - TARGETS).square().mean(), weights)
    (gradients,) = back(torch.ones_like(loss))
    for name, p in scene.model.named_parameters():
        p.grad = gradients[name]
    scene.model.train()
    return loss


def buffers_from_outside(scene):
    scene.optimizer.zero_grad()
    loss = (functional_call(scene.model, scene.held, INPUTS) - TARGETS).square().mean()
    loss.backward()
    return loss


def toggling(scene):
    scene.model.train()
    loss = of_all(scene)
    scene.model.eval()
    with torch.no_grad():
        scene.loss()
    return loss


def cast_inside(scene):
    scene.optimizer.zero_grad()
    with CAST():
        loss = scene.loss()
    loss.backward()
    return loss


def cast_by_a_context_made_before(scene):
    scene.optimizer.zero_grad()
    with scene.context:
        loss = scene.loss()
    loss.backward()
    return loss


def switching_the_cache_off(scene):
    torch.set_autocast_cache_enabled(False)
    loss = of_all(scene)
    torch.set_autocast_cache_enabled(True)
    return loss


def stepping_others(scene):
    """Gradients of the second optimizer are from before."""
    scene.second.step()
    return of_all(scene)


def stepping_itself(scene):
    of_all(scene)
    scene.optimizer.step()
    return of_all(scene)


FORMS = [
    of_all, set_to_zero, accumulating, by_hand, of_some_inputs, scaled, penalized, functional, pulled_back,
    buffers_from_outside, toggling, cast_inside, cast_by_a_context_made_before, switching_the_cache_off,
    stepping_others, stepping_itself,
]  # fmt: skip
AROUND = {"plain": functools.partial(torch.autocast, "cpu", enabled=False), "autocast": CAST}


def tried(scene, closure):
    """Losses of a trial whose candidate lies elsewhere, and the weights of both; put back as a rejection does."""
    weights = [p.detach().clone() for p in scene.model.parameters()]
    moved = [w + 0.1 * torch.arange(w.numel()).reshape(w.shape).sin() for w in weights]

    def place(values):
        with torch.no_grad():
            for p, value in zip(scene.model.parameters(), values, strict=True):
                p.copy_(value)

    losses = trial_loss.trial_losses(closure, [*scene.model.parameters()], functools.partial(place, moved))
    assert identical([p.detach() for p in scene.model.parameters()], moved)
    place(weights)
    return losses, (weights, moved)


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("form", FORMS)
def test_trials_leave_no_trace_whatever_the_closure_does(form, around):
    """Accumulated gradients, gradients of other optimizers and of inputs, hooks on them, buffers, flags, generators."""
    torch.manual_seed(3)
    scene = Scene()
    buffers = list(scene.model.buffers())
    for _ in range(3):
        with AROUND[around]():
            scene.optimizer.step(lambda: form(scene))
            before, gradients = scene.everything(), [p.grad for p in scene.leaves]
            (plain, candidate), _ = tried(scene, lambda: form(scene))
            after = scene.everything()
        assert plain != candidate
        assert identical(before, after)
        assert all(p.grad is gradient for p, gradient in zip(scene.leaves, gradients, strict=True))
        assert all(a is b for a, b in zip(buffers, scene.model.buffers(), strict=True))
        scene.second.step()
    aadl.remove_acceleration(scene.optimizer)
    assert is_torchs_engine()
    assert not _global_optimizer_pre_hooks
    assert "grad" not in vars(torch.Tensor) and nn.Module.train.__module__ == "torch.nn.modules.module"


def test_a_trial_that_fails_leaves_no_trace():
    torch.manual_seed(3)
    scene = Scene()
    scene.optimizer.step(lambda: of_all(scene))
    before = scene.everything()

    def failing():
        scene.model.eval()
        torch.set_autocast_cache_enabled(False)
        with CAST():
            of_all(scene)
            raise OSError

    with pytest.raises(OSError):
        tried(scene, failing)
    after = scene.everything()
    assert identical(before[1:], after[1:]) and not identical(before[0], after[0])  # the candidate is still there


def test_an_ensemble_under_vmap_is_left_as_it_was():
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Linear(6, 1)) for _ in range(3)]
    weights, buffers = stack_module_state(models)
    skeleton = copy.deepcopy(models[0]).to("meta")

    def closure():
        outputs = torch.vmap(lambda w, b: functional_call(skeleton, (w, b), INPUTS))(weights, buffers)
        loss = (outputs - TARGETS).square().mean()
        loss.backward()
        return loss

    closure()
    before = copy.deepcopy([weights, buffers, [w.grad for w in weights.values()]])
    plain, again = trial_loss.trial_losses(closure, list(weights.values()), lambda: None)
    assert plain == again and math.isfinite(plain)
    assert identical(before, [weights, buffers, [w.grad for w in weights.values()]])
    assert all(type(b) is torch.Tensor and b.device.type == "meta" for b in skeleton.buffers())


def test_the_gradient_that_a_closure_finds_is_a_copy_and_zero_after_a_backward_pass():
    model = network()
    weight, other = model[0].weight, torch.ones(2, requires_grad=True)
    weight.grad, other.grad = torch.full_like(weight, 2.0), torch.ones(2)
    with without_trace([weight], is_closure=True):
        assert torch.equal(weight.grad, torch.full_like(weight, 2.0)) and weight.grad is weight.grad
        weight.grad.add_(1)
        other.grad = None
        assert other.grad is None
        (weight.sum() * other.sum()).backward()
        assert torch.equal(weight.grad, torch.full_like(weight, 3.0))
        assert other.grad is None and model[2].weight.grad is None  # unknown
        model.zero_grad(set_to_none=False)
        assert torch.equal(weight.grad, torch.zeros_like(weight)) and model[2].weight.grad is None
        weight.grad.add_(1)
        torch.optim.SGD([weight, other]).zero_grad()
        assert weight.grad is None and other.grad is None
        weight.sum().backward()
        assert torch.equal(weight.grad, torch.zeros_like(weight))
    assert torch.equal(weight.grad, torch.full_like(weight, 2.0)) and torch.equal(other.grad, torch.ones(2))


def test_every_evaluation_of_a_trial_finds_the_same_gradient():
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.full((2,), 5.0)
    found = []
    with without_trace([p], is_closure=True) as rewind:
        for _ in range(2):
            found.append(p.grad.tolist())
            p.square().sum().backward()
            rewind()
    assert found == [[5.0, 5.0]] * 2


def test_generators_of_all_devices_are_put_back():
    states, written = {0: 10, 1: 11}, []
    devices = types.SimpleNamespace(
        is_initialized=lambda: True,
        device_count=lambda: 2,
        get_rng_state=states.get,
        set_rng_state=lambda state, device: written.append((device, state)),
    )
    with mock.patch.object(torch, "xpu", devices), without_trace([], is_closure=False):
        pass
    assert written == [(0, 10), (1, 11)]


def value_at(scene, closure, weights):
    with torch.no_grad():
        for p, value in zip(scene.model.parameters(), weights, strict=True):
            p.copy_(value)
    return float(closure().detach())


@pytest.mark.filterwarnings("ignore:Using backward")
def test_the_gradients_that_a_loss_contains_are_computed():
    scene = Scene()
    scene.model.eval()
    losses, places = tried(scene, lambda: penalized(scene))
    expected = [value_at(scene, lambda: penalized(scene), weights) for weights in places]
    assert losses == pytest.approx(expected, rel=1e-6)


def test_weights_that_are_computed_once_for_a_region_are_computed_for_every_trial():
    scene = Scene()
    scene.model.eval()
    parametrize.register_parametrization(scene.model[0], "weight", nn.Tanh())

    def closure():
        return scene.loss()

    with parametrize.cached():
        held = scene.model[0].weight
        losses, places = tried(scene, closure)
        assert scene.model[0].weight is held
    assert list(losses) == [value_at(scene, closure, weights) for weights in places]


# ---- autocast --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [of_all, cast_inside, cast_by_a_context_made_before])
@pytest.mark.parametrize("around", AROUND)
def test_autocast_does_not_serve_old_weights_to_trials(around, form):
    """Both losses are those of the weights of the time, as a region of autocast of its own would see them."""
    torch.manual_seed(3)
    scene = Scene()
    scene.model[1].eval()
    scene.model[2].eval()
    with AROUND[around]():
        scene.optimizer.step(lambda: form(scene))
        losses, places = tried(scene, lambda: form(scene))
    assert losses[0] != losses[1]
    names = [name for name, _ in scene.model.named_parameters()]
    for loss, weights in zip(losses, places, strict=True):
        with torch.no_grad(), CAST(enabled=around == "autocast" or form is not of_all):
            outputs = functional_call(scene.model, dict(zip(names, weights, strict=True)), scene.other(scene.points))
            assert float((outputs - TARGETS).square().mean()) == loss


@pytest.mark.parametrize("form", [of_all, cast_inside, cast_by_a_context_made_before])
def test_the_rest_of_an_autocast_region_sees_no_weights_of_a_trial(form):
    scene = Scene()
    scene.model.eval()
    with CAST():
        scene.optimizer.step(lambda: form(scene))
        tried(scene, lambda: form(scene))
        inside = scene.model(INPUTS)
    with CAST():
        assert torch.equal(inside, scene.model(INPUTS))


# ---- what closures write to on purpose -------------------------------------------------------------------------------

TRIED = EAGER | {"acceleration_type": "identity", "average": "always"}
"""Means of iterates are tried by the loss, all of them: nobody asks first which way they point."""


def verdict(accepted):
    """A loss of which every value is better (worse) than the last one, so that every candidate wins (none does)."""
    calls = itertools.count(1)
    return lambda model: squared_error(model) + (-1 if accepted else 1) * 10.0 * next(calls)


def trials_of(optimizer, accepted):
    """The closure's evaluations in trials, which were what `verdict` demands."""
    counts = aadl.accelerator_of(optimizer).statistics
    assert counts["accepted"] == accepted * counts["attempts"]
    assert counts["closure_evaluations"] == 2 * counts["attempts"] > 0
    return counts["closure_evaluations"]


@pytest.mark.parametrize("accepted", [False, True])
def test_buffers_that_are_reassigned_are_put_back(accepted):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.all_calls = 0

        def forward(self, x):
            self.calls = self.calls + 1
            self.all_calls += 1
            return x

    model = network(Counting())
    optimizer = aadl.accelerate(torch.optim.SGD(model.parameters(), lr=0.02), **TRIED)
    train(model, optimizer, 20, with_closure=True, loss=verdict(accepted))
    evaluations = trials_of(optimizer, accepted)
    assert model[1].calls == 20 and model[1].all_calls == 20 + evaluations


def test_a_closure_that_projects_the_weights_does_not_move_an_accepted_candidate():
    """Else the next macro-step would start elsewhere than its pair says."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    pairs = Pairs(optimizer)
    aadl.accelerate(optimizer, **LOSS)
    documented = closure_of(model, optimizer)

    def closure():
        with torch.no_grad():
            for p in model.parameters():
                p.clamp_(-0.3, 0.3)
        return documented()

    checked = 0
    for _ in range(24):
        accepted = statistics(optimizer)["accepted"]
        optimizer.step(closure)
        if statistics(optimizer)["accepted"] > accepted:
            optimizer.step(closure)
            for stored, expected in zip(stored_columns(aadl.accelerator_of(optimizer)), pairs.columns(1), strict=True):
                torch.testing.assert_close(stored[-1:], expected, rtol=1e-4, atol=1e-6)
            checked += 1
    assert checked > 0 and statistics(optimizer)["moved"] == 0
