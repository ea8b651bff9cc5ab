"""Situations in which acceleration must not break: degenerate maps, odd parameters, changes from outside."""

import math

import pytest
import torch
from small_runs import (
    ALWAYS,
    EAGER,
    Pairs,
    adam,
    closure_of,
    flat,
    identical,
    network,
    sgd,
    snapshot,
    statistics,
    stored_columns,
    train,
)
from torch import nn

import aadl


def assert_counts_add_up(optimizer):
    counts = statistics(optimizer)
    assert counts["attempts"] == counts["accepted"] + sum(counts["rejected"].values())


# ---- what the published package breaks on --------------------------------------------------------------------------


def descend(parameters, optimizer, steps, gradient=lambda x: x, after=lambda step: None):
    """Steps with gradients gradient(x) of each parameter; for x itself the solution is 0."""
    for step in range(1, steps + 1):
        for x in parameters:
            x.grad = gradient(x.detach()).clone()
        optimizer.step()
        after(step)


def scaled(values, dtype=torch.float32):
    """A parameter of ones and the gradient of sum(values x^2) / 2."""
    values = torch.tensor(values, dtype=dtype)
    return nn.Parameter(torch.ones_like(values)), lambda x: values * x


SAFEGUARDS = [True, False, "residual"]


@pytest.mark.parametrize("safeguard", SAFEGUARDS)
@pytest.mark.parametrize("average", [False, True, "always"])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_training_on_after_exact_convergence(safeguard, average, momentum):
    x, gradient = scaled([1.0, 0.5, 0.25])
    optimizer = torch.optim.SGD([x], lr=1.0, momentum=momentum)
    aadl.accelerate(optimizer, **EAGER | {"safeguard": safeguard, "average": average})
    descend([x], optimizer, 400, gradient)
    with torch.no_grad():
        x.zero_()
        for entry in optimizer.state.values():
            if entry.get("momentum_buffer") is not None:
                entry["momentum_buffer"].zero_()
    aadl.reset_history(optimizer)
    counts = statistics(optimizer)
    attempts, refused, averaging = counts["attempts"], counts["rejected"].get("rank", 0), counts["averaging"]
    descend([x], optimizer, 100, gradient)  # longer than the longest pause that the rounding before may have caused
    assert x.tolist() == [0, 0, 0]
    attempts, refused = counts["attempts"] - attempts, counts["rejected"].get("rank", 0) - refused
    # updates of zero say nothing of noise, so averaging stays as it was, and leave nothing to extrapolate
    assert attempts > 10 and counts["averaging"] == averaging
    assert refused == attempts
    assert_counts_add_up(optimizer)
    descend([x], optimizer, 30, lambda x: gradient(x - 2))  # and off again
    assert torch.isfinite(x).all()
    assert (x - 2).norm() < 1


def test_learning_rate_zero_is_no_step():
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    pairs = Pairs(optimizer)
    aadl.accelerate(optimizer, **EAGER | {"frequency": 1000})
    before = snapshot(model, optimizer)["model"]
    train(model, optimizer, 5)
    assert statistics(optimizer)["steps"] == 0
    assert identical(before, snapshot(model, optimizer)["model"])
    optimizer.param_groups[0]["lr"] = 0.02
    start = [entry["exp_avg"].clone() for entry in optimizer.state.values()]
    train(model, optimizer, 1)
    history = aadl.accelerator_of(optimizer).history
    end = [entry["exp_avg"] for entry in optimizer.state.values()]
    moved = torch.cat([(b - a).reshape(-1) for a, b in zip(start, end, strict=True)])
    assert torch.equal(history.blocks[1].residual, moved)  # momentum had been gathered at rate 0
    train(model, optimizer, 2)
    optimizer.param_groups[0]["lr"] = 0.0
    train(model, optimizer, 1)
    optimizer.param_groups[0]["lr"] = 0.02
    train(model, optimizer, 3)
    del pairs.pairs[-4], pairs.starts[-4]
    assert statistics(optimizer)["steps"] == 6
    assert statistics(optimizer)["resets"] == {}
    assert identical(stored_columns(aadl.accelerator_of(optimizer)), pairs.columns(4))


def test_frozen_parameters_and_those_without_gradient_keep_their_bits():
    frozen = nn.Parameter(torch.randn(4), requires_grad=False)
    idle = nn.Parameter(torch.randn(4, dtype=torch.float64))
    x, gradient = scaled([0.1, 1.0, 0.5], torch.float64)
    kept = frozen.clone(), idle.detach().clone()
    optimizer = torch.optim.Adam([{"params": [frozen, x]}, {"params": [idle], "weight_decay": 0.1}], lr=0.05)
    aadl.accelerate(optimizer, **ALWAYS)
    descend([x], optimizer, 40, gradient)
    assert statistics(optimizer)["accepted"] > 0
    assert identical((frozen.detach(), idle.detach()), (kept[0].detach(), kept[1]))
    assert aadl.accelerator_of(optimizer).history.blocks[0].row.numel == 7
    descend([x, idle], optimizer, 5, lambda x: x)
    assert not identical(idle.detach(), kept[1])


def test_groups_may_come_and_parameters_freeze_and_thaw():
    x, gradient = scaled([0.1, 1.0, 0.5])
    y = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([x], lr=0.2, momentum=0.5)
    aadl.accelerate(optimizer, **ALWAYS)
    accelerator = aadl.accelerator_of(optimizer)

    def go(parameters, expected_resets, numel):
        accepted = accelerator.statistics["accepted"]
        descend(parameters, optimizer, 9, gradient)
        assert accelerator.statistics["resets"].get("parameters_changed", 0) == expected_resets
        assert sum(block.row.numel for block in accelerator.history.blocks if block.kind == "parameters") == numel
        assert accelerator.statistics["accepted"] > accepted or numel == 0

    go([x], 0, 3)
    optimizer.add_param_group({"params": [y]})
    go([x, y], 1, 6)
    x.requires_grad_(False)
    x.grad, kept = None, x.detach().clone()
    go([y], 2, 3)
    assert torch.equal(x, kept)
    y.requires_grad_(False)
    y.grad = None
    go([], 3, 0)
    x.requires_grad_(True)
    go([x], 4, 3)
    assert not torch.equal(x, kept)
    assert_counts_add_up(optimizer)


def test_attempts_of_the_moving_average_that_was_not_needed_are_counted():
    model = network()
    optimizer = aadl.accelerate(sgd(model), "identity", **EAGER | {"average": True, "average_tolerance": 1e9})
    train(model, optimizer, 20)
    assert statistics(optimizer)["rejected"] == {"averaging_off": statistics(optimizer)["attempts"]}
    assert statistics(optimizer)["attempts"] > 5


LAYOUTS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "sliced": lambda x: torch.cat([x, x], 1)[:, :3],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("kind", ["SGD", "Adam"])
def test_memory_layouts_do_not_matter(layout, kind):
    values = torch.rand(2, 3, 4, 5, dtype=torch.float64) + 0.01
    ends = []
    for change in (lambda x: x, layout):
        x = nn.Parameter(change(torch.ones(2, 3, 4, 5, dtype=torch.float64)))
        optimizer = getattr(torch.optim, kind)([x, nn.Parameter(torch.ones(3, dtype=torch.float64))], lr=0.1)
        aadl.accelerate(optimizer, **ALWAYS)
        strides = x.stride()
        descend([x], optimizer, 25, lambda x: values * x)
        assert x.stride() == strides
        ends.append(x.detach().clone())
    assert not x.is_contiguous()
    assert statistics(optimizer)["accepted"] > 5
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-7)
    plain = nn.Parameter(torch.ones(2, 3, 4, 5, dtype=torch.float64))
    descend([plain], getattr(torch.optim, kind)([plain], lr=0.1), 25, lambda x: values * x)
    assert not torch.allclose(plain, ends[0], rtol=1e-3)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_complex_parameters_are_pairs_of_real_ones(momentum):
    values = torch.tensor([0.1, 1.0, 0.5, 0.3], dtype=torch.float64)
    z = nn.Parameter(torch.complex(torch.ones(4), torch.arange(4.0)).to(torch.complex128))
    x = nn.Parameter(torch.view_as_real(z.detach()).clone())
    ends = []
    for parameter, weights in ((z, values), (x, values[:, None])):
        optimizer = torch.optim.SGD([parameter], lr=0.3, momentum=momentum)
        aadl.accelerate(optimizer, **ALWAYS)
        descend([parameter], optimizer, 7, lambda p, weights=weights: weights * p)
        ends.append(parameter.detach())
    assert statistics(optimizer)["accepted"] == 2
    torch.testing.assert_close(torch.view_as_real(ends[0]), ends[1], rtol=1e-9, atol=1e-12)
    descend([x], torch.optim.SGD([x], lr=0.3, momentum=momentum), 1, lambda p: 0.01 * p)
    assert not torch.allclose(torch.view_as_real(ends[0]), ends[1], rtol=1e-3, atol=0)


def test_parameters_of_mixed_dtypes_share_one_problem():
    values = torch.logspace(-2, 0, 8, dtype=torch.float64)
    ends = []
    for dtypes in ([torch.float64] * 2, [torch.float32, torch.float64]):
        parts = [nn.Parameter(torch.ones(4, dtype=dtype)) for dtype in dtypes]
        weights = dict(zip(parts, values.split(4), strict=True))
        optimizer = torch.optim.SGD(parts, lr=0.5)
        aadl.accelerate(optimizer, **ALWAYS)
        for _ in range(10):
            for part, weight in weights.items():
                part.grad = weight.to(part.dtype) * part.detach()
            optimizer.step()
        assert [part.dtype for part in parts] == dtypes
        ends.append(torch.cat([part.detach().double() for part in parts]))
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-3)
    assert ends[0][:2].max() < 0.5 < (1 - 0.5 * values[:2]).pow(10).min()  # what plain steps leave
    assert len(aadl.accelerator_of(optimizer).history.blocks) == 2
    assert statistics(optimizer)["accepted"] == 4


@pytest.mark.parametrize("safeguard", SAFEGUARDS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("step", [1, 5, 6, 7])
def test_gradients_that_are_not_finite_raise_nothing(safeguard, value, step):
    model = network()
    optimizer = adam(model, **EAGER | {"safeguard": safeguard})
    closure = closure_of(model, optimizer)
    good = snapshot(model, optimizer)["model"]
    for count in range(1, 20):
        closure()
        if count == step:
            for p in model.parameters():
                p.grad.fill_(value)
        optimizer.step()
    assert_counts_add_up(optimizer)
    optimizer.load_state_dict(adam(model).state_dict())
    model.load_state_dict(good)
    losses = train(model, optimizer, 40)
    assert losses[-1] < losses[0]
    assert statistics(optimizer)["accepted"] > 0


def test_lbfgs_starts_again_from_an_accepted_candidate():
    """Its next direction is the gradient there: curvature pairs would span two points without a step between them.

    It is as long as that of a first iteration with the magnitude of the gradient before; iterations are counted on.
    """
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.3, max_iter=1)
    aadl.accelerate(optimizer, **ALWAYS)
    along_gradient, after_accepted, last = [], [], None
    for number in range(30):
        accepted = statistics(optimizer)["accepted"]
        before = flat(model)
        optimizer.step(closure_of(model, optimizer))
        moved = flat(model) - before
        gradient = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
        length = 0.3 * min(1.0, 1.0 / float((gradient if last is None else last).abs().sum()))
        last = gradient
        assert optimizer.state_dict()["state"][0]["n_iter"] == number + 1
        rounding = 2e-7 * float(1 + before.abs().max())
        along_gradient.append(torch.allclose(moved, -length * gradient, atol=rounding))
        after_accepted.append(statistics(optimizer)["accepted"] > accepted)
    for number in range(1, 30):  # an accepted step itself moves elsewhere
        assert after_accepted[number] or along_gradient[number] == after_accepted[number - 1], number
    assert 3 < sum(after_accepted) < 20


def test_parameters_without_elements_and_extreme_magnitudes():
    empty, full = nn.Parameter(torch.zeros(0)), nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = aadl.accelerate(torch.optim.SGD([empty, full], lr=0.1), **ALWAYS)
    for _ in range(8):
        optimizer.zero_grad()
        (full.square().sum() + empty.sum()).backward()
        optimizer.step()
    assert float(full.detach().abs().max()) < 0.3
    for scale in (1e-25, 1e18):
        x = nn.Parameter(torch.full((4,), scale))
        curvature = torch.tensor([1.0, 0.5, 0.2, 0.1])
        optimizer = aadl.accelerate(torch.optim.SGD([x], lr=1.0), **ALWAYS)
        for _ in range(20):
            x.grad = curvature * x.detach()
            optimizer.step()
        assert statistics(optimizer)["accepted"] > 0, scale
        assert float(x.detach().abs().max()) < 0.05 * scale


@pytest.mark.parametrize(("last", "is_rounding"), [(2, True), (5, False)])
def test_every_step_of_a_macro_step_rounds(last, is_rounding):
    """An update of two units in the last place is nothing to extrapolate where three steps have made it."""
    x = nn.Parameter(torch.ones(10))
    settings = {"store_each_nth": 3, "frequency": 6, "wait_iterations": 9, "safeguard": "residual", "average": False}
    optimizer = aadl.accelerate(torch.optim.SGD([x], lr=1.0), **settings)
    for units in (64, 32, 16, last):
        for number in (units, 0, 0):
            x.grad = torch.full_like(x, -number * torch.finfo(torch.float32).eps)
            optimizer.step()
    assert statistics(optimizer)["attempts"] == 1
    assert statistics(optimizer)["rejected"].get("rank", 0) == is_rounding
