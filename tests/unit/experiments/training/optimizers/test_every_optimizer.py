"""What every optimizer of the suite does: it goes on from its state, is accelerated, and refuses wrong arguments."""

import copy
import math

import pytest
import torch
from least_squares import LeastSquares, rosenbrock
from small_runs import EAGER, identical, network, snapshot, statistics, through_a_file, train
from torch import nn

import aadl
from experiments.training.optimizers import LARS, FrozenAdam, LevenbergMarquardt, MuonAdam, SSBroyden

MAKERS = {
    "LARS": (LARS, {"lr": 1e-3, "momentum": 0.8, "trust": 1.0}),
    "FrozenAdam": (FrozenAdam, {"lr": 1e-2, "freeze_after": 3}),
    "FrozenAdam, not yet frozen": (FrozenAdam, {"lr": 1e-2, "freeze_after": 5}),
    "LevenbergMarquardt": (LevenbergMarquardt, {"damping": 0.3, "max_trials": 7}),
    "MuonAdam": (MuonAdam, {"lr": 3e-2, "adam_lr": 7e-3, "momentum": 0.9, "betas": (0.8, 0.99)}),
    "SSBroyden": (SSBroyden, {"max_iter": 2}),
}


@pytest.mark.parametrize("name", MAKERS)
def test_it_goes_on_bit_for_bit_from_its_state(name):
    kind, arguments = MAKERS[name]
    problem = LeastSquares(rosenbrock, [[-1.2, 1.0], [0.5, 0.7]], [0.3])
    optimizer = kind(problem.parameters, **arguments)
    for _ in range(4):
        before = problem.loss()
        assert float(optimizer.step(problem)) == before  # of the weights before the step
    other, fresh = problem.twin(), problem.twin()
    restored = kind(other.parameters, **({"lr": 1.0} if kind is LARS else {}))
    restored.load_state_dict(through_a_file(optimizer.state_dict()))
    forgetful = kind(fresh.parameters, **arguments)
    for _ in range(3):
        for one, closure in ((optimizer, problem), (restored, other), (forgetful, fresh)):
            one.step(closure)
    assert torch.equal(problem.vector(), other.vector()) and not torch.equal(problem.vector(), fresh.vector())
    assert identical(restored.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize("name", ["MuonAdam", "FrozenAdam"])
def test_it_is_accelerated_and_goes_on_bit_for_bit(name, with_closure):
    kind, arguments = MAKERS[name]
    model, twin = network(), network()
    optimizer = aadl.accelerate(kind(model.parameters(), **arguments), **EAGER)
    losses = train(model, optimizer, 7, with_closure=with_closure)
    other = copy.deepcopy(model)
    restored = aadl.accelerate(kind(other.parameters()), **EAGER)
    restored.load_state_dict(through_a_file(optimizer.state_dict()))
    rest = train(model, optimizer, 33, with_closure=with_closure)
    assert rest == train(other, restored, 33, with_closure=with_closure)
    assert identical(snapshot(model, optimizer), snapshot(other, restored))
    assert identical(optimizer.state_dict()["aadl"], restored.state_dict()["aadl"])
    counted = statistics(optimizer)
    assert counted["accepted"] > 0 and counted["moved"] == 0 and not counted["resets"]
    assert rest[-1] < 0.5 * losses[0]
    assert losses + rest != train(twin, kind(twin.parameters(), **arguments), 40)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        *(
            (LevenbergMarquardt, {"damping": value}, f"damping must be .* got {value}")
            for value in (0.0, -1.0, math.inf, math.nan)
        ),
        *(
            (LevenbergMarquardt, {"max_trials": value}, f"max_trials must be .* got {value}")
            for value in (0, True, 2.0)
        ),
        *(
            (FrozenAdam, {"freeze_after": value}, f"freeze_after must be .* got {value!r}")
            for value in (0, -1, True, 2.0, None)
        ),
        (SSBroyden, {"max_iter": 0}, "max_iter must be greater than 0, got 0"),
        (SSBroyden, {"max_eval": 2.0}, r"max_eval must be an integer, got 2\.0"),
        (SSBroyden, {"curvature": 1.0}, r"curvature must be less than 1, got 1\.0"),
        (SSBroyden, {"curvature": math.nan}, r"curvature must be a finite number, got nan"),
        (LARS, {"lr": 0.0}, "lr must be greater than 0, got 0.0"),
        (LARS, {"lr": 1.0, "momentum": 1.0}, r"momentum must be less than 1, got 1.0"),
        (LARS, {"lr": 1.0, "trust": math.nan}, "trust must be a finite number, got nan"),
        (MuonAdam, {"lr": -1.0}, "[Ll]earning rate"),
        (MuonAdam, {"adam_lr": -1.0}, "[Ll]earning rate"),
    ],
)
def test_an_argument_out_of_its_range_is_refused(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind([nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, 2))], **arguments)


@pytest.mark.parametrize("name", ["LARS", "FrozenAdam", "MuonAdam"])
def test_a_weight_without_a_gradient_is_left_alone(name):
    kind, arguments = MAKERS[name]
    one, other = (nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    one.grad = torch.eye(2)
    optimizer = kind([one, other], **arguments)
    assert optimizer.step(lambda: 3.5) == 3.5
    assert torch.equal(other.detach(), torch.ones(2, 2)) and optimizer.state.keys() == {one}
    assert not torch.equal(one.detach(), torch.ones(2, 2)) and optimizer.step() is None
