"""Optimizers of the suite: Levenberg-Marquardt, Muon beside Adam, Adam with frozen moments; the slope weight."""

import copy
import itertools
import math
import pickle
import types

import pytest
import torch
from burgers_by_autograd import residual_and_slope, solution
from small_runs import EAGER, closure_of, identical, network, snapshot, statistics, through_a_file, train
from suite_cases import build, pinn_run
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR

import aadl
from experiments.distributed.ranks import Ranks
from experiments.training.optimizers import LARS, FrozenAdam, LevenbergMarquardt, MuonAdam
from experiments.training.optimizers.levenberg_marquardt import LARGEST_DAMPING, _Damped
from experiments.training.stage import Stage
from experiments.training.train import train as train_loop

LM = {"optimizer": {"name": "LevenbergMarquardt"}}
LOSS = "metrics/train/loss"


def weights_of(model):
    return parameters_to_vector(model.parameters()).detach().clone()


# ---- Levenberg-Marquardt ---------------------------------------------------------------------------------------------


class LeastSquares:
    """Closure: residuals `function(w)` of the parameters as one vector w, followed by `padding` zeros."""

    def __init__(self, function, *starts, padding=0):
        self.parameters = [nn.Parameter(torch.tensor(start, dtype=torch.float64)) for start in starts]
        self.function, self.padding = function, padding

    def _padded(self, vector):
        residuals = self.function(vector)
        return torch.cat([residuals, residuals.new_zeros(self.padding)])

    def vector(self):
        return parameters_to_vector(self.parameters).detach().clone()

    def residuals(self):
        return self._padded(self.vector())

    def linearize(self):
        return self.residuals(), torch.autograd.functional.jacobian(self._padded, self.vector())

    def loss(self):
        return float(self.residuals().square().sum())


class Script:
    """Closure: the linear model r = 1, J = 1, and a trial loss for each gain ratio of the script, in turn.

    With damping 1 the step is -1/2, the predicted decrease 3/4.
    """

    def __init__(self, *ratios, damping=1.0):
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.ratios, self.damping, self.trials = list(ratios), damping, []

    def linearize(self):
        return torch.ones(1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)

    def residuals(self):
        ratio = self.ratios[len(self.trials)]
        self.trials.append(float(self.weight.detach()))
        update = -1 / (1 + self.damping)
        loss = 1 - ratio * (1 - (1 + update) ** 2)
        return torch.tensor([loss], dtype=torch.float64).sqrt()


TIMES = torch.linspace(0, 3, 20, dtype=torch.float64)
DECAY = torch.tensor([2.0, 1.5, 0.5], dtype=torch.float64)


def decay(w):
    return w[0] * torch.exp(-w[1] * TIMES) + w[2]


def rosenbrock(w):
    return torch.stack([10 * (w[1] - w[0] ** 2), 1 - w[0]])


def wide(w):
    """4 residuals of 9 parameters."""
    return torch.stack([torch.sin(w[i] * w[i + 1]) + w[i + 5] ** 2 - 0.3 * i for i in range(4)])


WIDE_START = [0.3, -0.7, 1.1, 0.4, -0.2, 0.9, 0.1, -1.3, 0.6]


@pytest.mark.parametrize(
    ("problem", "solution", "steps"),
    [
        (LeastSquares(lambda w: decay(w) - decay(DECAY), [1.0, 0.3], [0.0]), DECAY.tolist(), 15),
        (LeastSquares(rosenbrock, [-1.2], [1.0]), [1.0, 1.0], 30),
    ],
)
def test_levenberg_marquardt_finds_the_solution_and_the_loss_never_rises(problem, solution, steps):
    optimizer = LevenbergMarquardt(problem.parameters)
    losses = []
    for _ in range(steps):
        before = problem.loss()
        losses.append(float(optimizer.step(problem)))
        assert losses[-1] == before  # of the weights before the step
    losses.append(problem.loss())
    assert all(later <= sooner for sooner, later in itertools.pairwise(losses))
    assert problem.vector().tolist() == pytest.approx(solution, abs=1e-7) and losses[0] > 0.1


def test_both_forms_make_the_same_step():
    start = torch.tensor(WIDE_START, dtype=torch.float64)
    kernel, normal = LeastSquares(wide, WIDE_START), LeastSquares(wide, WIDE_START, padding=7)
    shapes = [problem.linearize()[1].shape for problem in (kernel, normal)]
    assert shapes == [(4, 9), (11, 9)]
    residuals, jacobian = kernel.linearize()
    for problem in (kernel, normal):
        LevenbergMarquardt(problem.parameters, damping=0.05).step(problem)
    damped = jacobian.T @ jacobian + 0.05 * torch.eye(9, dtype=torch.float64)
    expected = start - torch.linalg.solve(damped, jacobian.T @ residuals)
    assert (expected - start).norm() > 0.1
    for problem in (kernel, normal):
        assert torch.allclose(problem.vector(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (6, 6)])
@pytest.mark.parametrize("damping", [1e-3, 1.0, 1e3])
def test_the_predicted_decrease_is_that_of_the_linear_model(shape, damping):
    residuals, jacobian = torch.randn(shape[0], dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    update, predicted = _Damped(residuals, jacobian)(damping)
    expected = residuals.square().sum() - (residuals + jacobian @ update).square().sum()
    assert predicted == pytest.approx(float(expected), rel=1e-9) and predicted > 0
    gradient = jacobian.T @ (residuals + jacobian @ update) + damping * update
    assert gradient.abs().max() < 1e-9 * (1 + damping)


@pytest.mark.parametrize(("ratio", "factor"), [(0.9, 1 / 3), (0.5, 1.0), (0.1, 2.0)])
def test_the_damping_follows_the_gain_ratio(ratio, factor):
    script = Script(ratio)
    optimizer = LevenbergMarquardt([script.weight], damping=1.0)
    assert float(optimizer.step(script)) == 1.0
    assert optimizer.param_groups[0]["damping"] == pytest.approx(factor)
    assert script.trials == [pytest.approx(-0.5)] and float(script.weight.detach()) == script.trials[0]


@pytest.mark.parametrize("failure", [-1.0, math.nan, -math.inf, 0.0])
def test_the_damping_rises_until_the_loss_falls(failure):
    script = Script(failure, failure, 0.2, damping=16.0)  # the script's predictions are those of the third trial
    optimizer = LevenbergMarquardt([script.weight], damping=1.0)
    optimizer.step(script)
    assert script.trials == pytest.approx([-1 / 2, -1 / 5, -1 / 17])
    assert float(script.weight.detach()) == script.trials[-1]
    assert optimizer.param_groups[0]["damping"] == pytest.approx(2 * 16.0)


def test_the_weights_are_put_back_when_no_trial_succeeds():
    script = Script(*[-1.0] * 5)
    script.weight.data.fill_(0.1)
    optimizer = LevenbergMarquardt([script.weight], damping=1.0, max_trials=3)
    assert float(optimizer.step(script)) == 1.0
    assert len(script.trials) == len(set(script.trials)) == 3 and 0.1 not in script.trials
    assert float(script.weight.detach()) == 0.1
    assert optimizer.param_groups[0]["damping"] == 4.0**3  # where the next step goes on
    optimizer.param_groups[0]["damping"] = 2 * LARGEST_DAMPING
    optimizer.step(script)
    assert len(script.trials) == 4 and float(script.weight.detach()) == 0.1
    assert optimizer.param_groups[0]["damping"] == 1.0  # the first one: other points may go better


@pytest.mark.parametrize(("damping", "max_trials"), [(1e-18, 20), (1e-2, 1), (1e-8, 5)])
def test_a_damping_that_is_too_small_is_raised_step_by_step(damping, max_trials):
    weights = nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))

    class Rosenbrock:
        def residuals(self):
            x, y = weights.detach()
            return torch.stack([10 * (y - x**2), 1 - x])

        def linearize(self):
            x = float(weights.detach()[0])
            return self.residuals(), torch.tensor([[-20 * x, 10.0], [-1.0, 0.0]], dtype=torch.float64)

    optimizer = LevenbergMarquardt([weights], damping=damping, max_trials=max_trials)
    for _ in range(200):
        optimizer.step(Rosenbrock())
    assert torch.allclose(weights.detach(), torch.ones(2, dtype=torch.float64), atol=1e-8)


def test_other_points_are_learned_after_convergence():
    weights = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    jacobian = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 7.0]], dtype=torch.float64)
    closure = types.SimpleNamespace(target=torch.ones(3, dtype=torch.float64))
    closure.residuals = lambda: jacobian @ weights.detach() - closure.target
    closure.linearize = lambda: (closure.residuals(), jacobian)
    optimizer = LevenbergMarquardt([weights])
    for _ in range(60):  # far beyond the last digit
        optimizer.step(closure)
    closure.target = torch.tensor([3.0, -1.0, 2.0], dtype=torch.float64)
    for _ in range(15):
        optimizer.step(closure)
    best = torch.linalg.lstsq(jacobian, closure.target).solution
    assert torch.allclose(weights.detach(), best, rtol=1e-6)


def test_a_matrix_without_a_factor_is_damped_and_not_tried():
    weight, trials = nn.Parameter(torch.zeros(2)), []

    class Singular:
        def linearize(self):
            return torch.ones(2), torch.full((2, 2), 1e4)

        def residuals(self):
            trials.append(weight.detach().clone())
            return torch.ones(2) + 1e4 * weight.detach().sum()

    optimizer = LevenbergMarquardt([weight], damping=1e-3)
    assert _Damped(*Singular().linearize())(1e-3) is None
    optimizer.step(Singular())
    assert optimizer.param_groups[0]["damping"] > 1e-2
    assert len(trials) >= 1 and weight.isfinite().all() and float(Singular().residuals().norm()) < 0.1


def test_a_loss_that_is_nan_is_returned_and_the_weights_stay():
    problem = LeastSquares(lambda w: w * math.nan, [1.0, 2.0])
    optimizer = LevenbergMarquardt(problem.parameters, damping=0.5)
    assert math.isnan(float(optimizer.step(problem)))
    assert problem.vector().tolist() == [1.0, 2.0] and optimizer.param_groups[0]["damping"] == 0.5


@pytest.mark.parametrize("entry", [math.nan, math.inf])
def test_a_jacobian_that_is_not_finite_is_not_tried(entry):
    script = Script()
    residuals, jacobian = torch.ones(1, dtype=torch.float64), torch.full((1, 1), entry, dtype=torch.float64)
    script.linearize = lambda: (residuals, jacobian)
    assert _Damped(residuals, jacobian)(1.0) is None
    LevenbergMarquardt([script.weight]).step(script)
    assert script.trials == [] and float(script.weight.detach()) == 0.0


def test_levenberg_marquardt_goes_on_bit_for_bit_from_its_state():
    problem = LeastSquares(rosenbrock, [-1.2], [1.0])
    optimizer = LevenbergMarquardt(problem.parameters, damping=0.3, max_trials=7)
    for _ in range(4):
        optimizer.step(problem)
    state = through_a_file(optimizer.state_dict())
    assert state["param_groups"][0]["damping"] == optimizer.param_groups[0]["damping"] != 0.3
    other = LeastSquares(rosenbrock, [0.0], [0.0])
    vector_to_parameters(problem.vector(), other.parameters)
    restored = LevenbergMarquardt(other.parameters)
    restored.load_state_dict(state)
    assert restored.param_groups[0]["max_trials"] == 7
    fresh = LeastSquares(rosenbrock, [0.0], [0.0])
    vector_to_parameters(problem.vector(), fresh.parameters)
    forgetful = LevenbergMarquardt(fresh.parameters)
    for _ in range(3):
        for one, closure in ((optimizer, problem), (restored, other), (forgetful, fresh)):
            one.step(closure)
    assert torch.equal(problem.vector(), other.vector()) and not torch.equal(problem.vector(), fresh.vector())
    assert restored.state_dict() == optimizer.state_dict()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"damping": 0.0}, r"damping must be a finite number > 0, got 0\.0"),
        ({"damping": -1.0}, r"damping must be a finite number > 0, got -1\.0"),
        ({"damping": math.inf}, r"damping must be a finite number > 0, got inf"),
        ({"damping": math.nan}, r"damping must be a finite number > 0, got nan"),
        ({"max_trials": 0}, r"max_trials must be an integer >= 1, got 0"),
        ({"max_trials": True}, r"max_trials must be an integer >= 1, got True"),
        ({"max_trials": 2.0}, r"max_trials must be an integer >= 1, got 2\.0"),
    ],
)
def test_levenberg_marquardt_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        LevenbergMarquardt([nn.Parameter(torch.zeros(2))], **arguments)


def test_levenberg_marquardt_refuses_two_groups():
    groups = [{"params": [nn.Parameter(torch.zeros(2))]} for _ in range(2)]
    with pytest.raises(ValueError, match=r"params must be one group, got 2"):
        LevenbergMarquardt(groups)
    LevenbergMarquardt(groups[:1])


# ---- Muon beside Adam ------------------------------------------------------------------------------------------------


def deep(bias=True):
    """Weights (6, 3) and (4, 6) for Muon; a column, a row and the biases for Adam."""
    torch.manual_seed(1)
    sizes = [(3, 6), (6, 4), (4, 1), (1, 2), (2, 1)]
    layers = [layer for a, b in sizes for layer in (nn.Linear(a, b, bias=bias), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


MUON = {"lr": 3e-2, "momentum": 0.9}
ADAM = {"lr": 7e-3, "betas": (0.8, 0.99)}
BOTH = {"lr": 3e-2, "adam_lr": 7e-3, "momentum": 0.9, "betas": (0.8, 0.99)}


def muon_adam(model, **changes):
    return MuonAdam(model.parameters(), **(BOTH | changes))


def test_it_is_muon_for_matrices_and_adam_for_the_rest():
    model = deep()
    twin, start = copy.deepcopy(model), weights_of(model)
    optimizer = muon_adam(model)
    matrices = [p for p in twin.parameters() if p.ndim == 2 and 1 not in p.shape]
    others = [p for p in twin.parameters() if p.ndim == 1 or 1 in p.shape]
    assert [tuple(p.shape) for p in matrices] == [(6, 3), (4, 6)] and len(others) == 8
    parts = [torch.optim.Muon(matrices, weight_decay=0.0, **MUON), torch.optim.Adam(others, **ADAM)]
    schedulers = [CosineAnnealingLR(part, 9) for part in (optimizer, *parts)]
    for _ in range(8):
        loss = closure_of(model, optimizer)()
        optimizer.step()
        twin.zero_grad()
        assert float(closure_of(twin, parts[0])().detach()) == float(loss.detach())
        for part in parts:
            part.step()
        for scheduler in schedulers:
            scheduler.step()
        assert identical(dict(model.state_dict()), dict(twin.state_dict()))
        assert [group["lr"] for group in optimizer.param_groups] == [part.param_groups[0]["lr"] for part in parts]
    assert ((weights_of(model) - start).abs() > 1e-6).all()


def test_rates_are_in_the_groups_and_a_scheduler_multiplies_both():
    optimizer = muon_adam(deep())
    assert [group["lr"] for group in optimizer.param_groups] == [3e-2, 7e-3]
    scheduler = StepLR(optimizer, 1, gamma=0.5)
    train(deep(), optimizer, 1)
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [1.5e-2, 3.5e-3]
    defaults = MuonAdam(deep().parameters())
    assert [group["lr"] for group in defaults.param_groups] == [2e-2, 1e-2]


def test_a_rate_in_the_group_is_the_rate_of_the_step():
    model = deep()
    optimizer = muon_adam(model)
    train(model, optimizer, 2)
    for still, moving in ((0, 1), (1, 0)):
        optimizer.param_groups[still]["lr"], optimizer.param_groups[moving]["lr"] = 0.0, 1e-2
        before = [[p.detach().clone() for p in group["params"]] for group in optimizer.param_groups]
        train(model, optimizer, 1)
        same = [
            all(torch.equal(p, old) for p, old in zip(group["params"], values, strict=True))
            for group, values in zip(optimizer.param_groups, before, strict=True)
        ]
        assert same[still] and not same[moving]


def test_step_returns_what_the_closure_returns():
    model, twin = deep(), deep()
    optimizer, plain = muon_adam(model), muon_adam(twin)
    with_closure = train(model, optimizer, 4, with_closure=True)
    assert with_closure == train(twin, plain, 4) and plain.step() is None


def assert_goes_on(model, optimizer, other, restored, steps=5):
    assert identical(snapshot(model, optimizer), snapshot(other, restored))
    before = weights_of(model)
    losses = train(model, optimizer, steps)
    assert losses == train(other, restored, steps)
    assert identical(snapshot(model, optimizer), snapshot(other, restored))
    assert not torch.equal(before, weights_of(model))


def shares_its_state(optimizer):
    groups = [group for part in optimizer._parts for group in part.param_groups]
    return all(part.state is optimizer.state for part in optimizer._parts) and all(
        own is seen for own, seen in zip(groups, optimizer.param_groups, strict=True)
    )


@pytest.mark.parametrize("on_disk", [False, True])
def test_muon_adam_goes_on_bit_for_bit_from_its_state(on_disk):
    model = deep()
    optimizer = muon_adam(model)
    train(model, optimizer, 5)
    other = copy.deepcopy(model)
    restored = MuonAdam(other.parameters())
    state = optimizer.state_dict()
    restored.load_state_dict(through_a_file(state) if on_disk else copy.deepcopy(state))
    assert shares_its_state(optimizer) and shares_its_state(restored)
    assert [group["lr"] for group in restored.param_groups] == [3e-2, 7e-3]
    assert_goes_on(model, optimizer, other, restored)
    forgetful = copy.deepcopy(other)
    train(forgetful, muon_adam(forgetful), 1)
    train(other, restored, 1)
    assert not torch.equal(weights_of(forgetful), weights_of(other))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copy_stands_on_its_own(copied):
    model = deep()
    optimizer = muon_adam(model)
    train(model, optimizer, 5)
    other, twin = copied((model, optimizer))
    assert shares_its_state(twin) and twin.state is not optimizer.state
    assert all(part not in optimizer._parts for part in twin._parts)
    kept = snapshot(model, optimizer)
    assert_goes_on(*copy.deepcopy((model, optimizer)), other, twin)
    assert identical(snapshot(model, optimizer), kept)  # left alone by its copies


def test_muon_adam_refuses_groups():
    model = deep()
    message = r"params must be parameters, not groups of them"
    for params in ([{"params": list(model.parameters())}], model.named_parameters()):
        with pytest.raises(ValueError, match=message):
            MuonAdam(params)
    optimizer = muon_adam(model)
    with pytest.raises(ValueError, match=r"MuonAdam takes all parameters when it is made, and no further groups"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    assert len(optimizer.param_groups) == 2
    with pytest.raises(ValueError, match=r"empty parameter list"):
        MuonAdam([])
    for rate in ("lr", "adam_lr"):
        with pytest.raises(ValueError, match=r"[Ll]earning rate"):
            muon_adam(model, **{rate: -1.0})


@pytest.mark.parametrize("kind", ["matrices", "vectors"])
def test_one_kind_of_parameters_needs_one_part(kind):
    shapes = {"matrices": [(3, 4), (2, 2)], "vectors": [(5,), (1, 4), (4, 1), (2, 2, 2)]}[kind]
    ours, theirs = ([nn.Parameter(torch.linspace(-1, 1, math.prod(s)).reshape(s)) for s in shapes] for _ in range(2))
    optimizer = MuonAdam(ours, **BOTH)
    if kind == "matrices":
        reference = torch.optim.Muon(theirs, weight_decay=0.0, **MUON)
    else:
        reference = torch.optim.Adam(theirs, **ADAM)
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match=r"no further groups"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    for _ in range(4):
        for own, other in zip(ours, theirs, strict=True):
            own.grad = torch.randn_like(own)
            other.grad = own.grad.clone()
        optimizer.step()
        reference.step()
    restored = MuonAdam(ours)
    restored.load_state_dict(optimizer.state_dict())
    assert shares_its_state(restored)
    assert all(torch.equal(own, other) for own, other in zip(ours, theirs, strict=True))


# ---- Adam with frozen moments ----------------------------------------------------------------------------------------


def vectors(dtype, count=2):
    values = torch.linspace(-1, 2, 7, dtype=dtype)
    return [[nn.Parameter(values.clone()), nn.Parameter(values[:4].reshape(2, 2).clone())] for _ in range(count)]


def step_all(optimizers, lists, gradients):
    """One step of each, all with the same gradients."""
    for optimizer, parameters in zip(optimizers, lists, strict=True):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()


def random_gradients(parameters):
    return [torch.randn_like(p) * torch.logspace(-3, 1, p.numel(), dtype=p.dtype).view_as(p) for p in parameters]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_it_is_adam_until_it_freezes(dtype, tolerance):
    lists = vectors(dtype)
    arguments = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6}
    optimizers = [FrozenAdam(lists[0], freeze_after=20, **arguments), torch.optim.Adam(lists[1], **arguments)]

    def distance():
        own, other = (parameters_to_vector(parameters).detach() for parameters in lists)
        return float((own - other).norm() / other.norm())

    for _ in range(20):
        step_all(optimizers, lists, random_gradients(lists[0]))
        assert distance() <= tolerance
    for _ in range(3):
        step_all(optimizers, lists, random_gradients(lists[0]))
    assert distance() > 100 * tolerance


def test_then_second_moments_stand_still():
    beta1, beta2, rate, eps, freeze_after = 0.8, 0.95, 1e-2, 1e-6, 5
    ((parameter, _),) = vectors(torch.float64, 1)
    optimizer = FrozenAdam([parameter], rate, (beta1, beta2), eps, freeze_after)
    m, v, w = torch.zeros(7).double(), torch.zeros(7).double(), parameter.detach().clone()
    for step in range(1, 13):
        (gradient,) = random_gradients([parameter])
        parameter.grad = gradient
        last = copy.deepcopy(optimizer.state[parameter])
        optimizer.step()
        state = optimizer.state[parameter]
        m = beta1 * m + (1 - beta1) * gradient
        if step <= freeze_after:
            v = beta2 * v + (1 - beta2) * gradient**2
        else:
            assert torch.equal(state["exp_avg_sq"], last["exp_avg_sq"])
            assert not torch.equal(state["exp_avg"], last["exp_avg"])
        scale = (v / (1 - beta2 ** min(step, freeze_after))).sqrt() + eps
        w = w - rate * m / (1 - beta1**step) / scale
        assert torch.allclose(parameter.detach(), w, rtol=1e-12, atol=1e-14)
        assert torch.allclose(state["exp_avg_sq"], v, rtol=1e-12, atol=0) and state["step"] == step


def test_a_weight_without_a_gradient_is_left_alone():
    ((one, other),) = vectors(torch.float32, 1)
    start = other.detach().clone()
    one.grad = torch.ones_like(one)
    optimizer = FrozenAdam([{"params": [one]}, {"params": [other], "lr": 1.0}])
    optimizer.step()
    assert torch.equal(other, start) and optimizer.state.keys() == {one}
    assert optimizer.step(lambda: 3.5) == 3.5


@pytest.mark.parametrize("steps", [3, 8])
def test_frozen_adam_goes_on_bit_for_bit_from_its_state(steps):
    model = network()
    optimizer = FrozenAdam(model.parameters(), lr=1e-2, freeze_after=5)
    train(model, optimizer, steps)
    other = copy.deepcopy(model)
    restored = FrozenAdam(other.parameters())
    restored.load_state_dict(through_a_file(optimizer.state_dict()))
    assert restored.param_groups[0]["freeze_after"] == 5
    assert_goes_on(model, optimizer, other, restored)


@pytest.mark.parametrize("freeze_after", [0, -1, True, 2.0, None])
def test_frozen_adam_refuses(freeze_after):
    with pytest.raises(ValueError, match=rf"freeze_after must be an integer >= 1, got {freeze_after!r}"):
        FrozenAdam([nn.Parameter(torch.zeros(2))], freeze_after=freeze_after)


# ---- accelerated -----------------------------------------------------------------------------------------------------

MAKERS = {
    "MuonAdam": muon_adam,
    "FrozenAdam": lambda model: FrozenAdam(model.parameters(), lr=1e-2, freeze_after=6),
}


@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize("name", MAKERS)
def test_it_is_accelerated(name, with_closure):
    model, twin = network(), network()
    optimizer = aadl.accelerate(MAKERS[name](model), **EAGER)
    losses = train(model, optimizer, 40, with_closure=with_closure)
    assert losses[-1] < 0.5 * losses[0]
    counted = statistics(optimizer)
    assert counted["accepted"] > 0 and counted["moved"] == 0 and not counted["resets"]
    assert losses != train(twin, MAKERS[name](twin), 40)


@pytest.mark.parametrize("name", MAKERS)
def test_it_goes_on_bit_for_bit_when_accelerated(name):
    model = network()
    optimizer = aadl.accelerate(MAKERS[name](model), **EAGER)
    train(model, optimizer, 7)
    other = copy.deepcopy(model)
    restored = aadl.accelerate(MAKERS[name](other), **EAGER)
    restored.load_state_dict(through_a_file(optimizer.state_dict()))
    before = statistics(optimizer)["accepted"]
    assert_goes_on(model, optimizer, other, restored, steps=23)
    assert statistics(restored)["accepted"] == statistics(optimizer)["accepted"] > before
    assert identical(optimizer.state_dict()["aadl"], restored.state_dict()["aadl"])


# ---- slope weight ----------------------------------------------------------------------------------------------------

NU = 0.02
CASES = [
    {"conditions": "soft"},
    {"conditions": "soft", "chunk_points": 7},
    {"conditions": "hard"},
    {"conditions": "hard", "chunk_points": 7},
    {"conditions": "hard", "num_conditions": 0},
]


def steep(slope_weight=True, **settings):
    """Problem and points; the weights are made larger, for slopes that differ."""
    settings = {"options": {"nu": NU}, "dtype": "float64", "condition_weight": 3.0} | settings
    problem = build(pinn_run(LM, slope_weight=slope_weight, **settings), Ranks())
    with torch.no_grad():
        for p in problem.model.parameters():
            p *= 2.0
    return problem, problem.points(problem.model, 0)


def book(model, points, is_hard, slopes=None):
    """Residuals by autograd, divided by 1 + |u_x| of `slopes`, None for the present ones; and the present u_x."""
    residual, slope = residual_and_slope(model, points, NU, is_hard)
    present = slope.detach()
    divisor = 1 + (present if slopes is None else slopes).abs()
    rows = [residual / divisor / math.sqrt(len(residual))]
    if len(points.conditions):
        error = solution(model, points.conditions, is_hard) - points.values
        rows.append(error * math.sqrt(3.0 / len(error)))
    return torch.cat(rows).squeeze(1), present


def moved(model):
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)


@pytest.mark.parametrize("settings", CASES)
def test_residuals_are_divided_by_the_slopes_of_the_last_linearization(settings):
    problem, points = steep(**settings)
    model, is_hard = problem.model, settings["conditions"] == "hard"
    expected, slopes = book(model, points, is_hard)
    weights = 1 / (1 + slopes.abs())
    assert float(weights.max() / weights.min()) > 1.2
    residuals, jacobian = problem.linearize(model, points)
    assert torch.allclose(residuals, expected.detach(), rtol=1e-9, atol=1e-12)
    assert torch.allclose(problem.residuals(model, points), residuals, rtol=1e-10, atol=1e-14)
    rows = [torch.autograd.grad(r, list(model.parameters()), retain_graph=True, allow_unused=True) for r in expected]
    zeros = [torch.zeros_like(p) for p in model.parameters()]
    for row, found in zip(rows, jacobian, strict=True):
        gradient = [z if g is None else g for g, z in zip(row, zeros, strict=True)]
        assert torch.allclose(parameters_to_vector(gradient), found, rtol=1e-8, atol=1e-11)
    # An acceleration asks for the loss, and gets that of the weighted residuals.
    model.zero_grad()
    loss = problem.backward(model, points)
    assert float(loss) == pytest.approx(float(residuals.square().sum()), rel=1e-12)
    gradient = parameters_to_vector([p.grad for p in model.parameters()])
    assert torch.allclose(gradient, 2 * jacobian.T @ residuals, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("settings", CASES)
def test_slopes_are_frozen_between_linearizations(settings):
    problem, points = steep(**settings)
    model, is_hard = problem.model, settings["conditions"] == "hard"
    problem.linearize(model, points)
    _, slopes = book(model, points, is_hard)
    moved(model)
    frozen, fresh = (book(model, points, is_hard, which)[0].detach() for which in (slopes, None))
    assert not torch.allclose(frozen, fresh, rtol=1e-2)
    for _ in range(2):
        assert torch.allclose(problem.residuals(model, points), frozen, rtol=1e-9, atol=1e-12)
    assert torch.allclose(problem.linearize(model, points)[0], fresh, rtol=1e-9, atol=1e-12)
    assert torch.allclose(problem.residuals(model, points), fresh, rtol=1e-9, atol=1e-12)


def test_in_several_dimensions_the_slope_is_the_sum():
    settings = {"equation": "burgers_100d", "options": {"dimension": 4}}
    (weighted, points), (plain, _) = (steep(weight, **settings) for weight in (True, False))
    x = points.interior.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(weighted.model(x).sum(), x)
    divisor = 1 + gradient[:, :-1].sum(dim=1).abs()
    ours, theirs = (problem.linearize(problem.model, points) for problem in (weighted, plain))
    for found, reference in zip(ours, theirs, strict=True):
        expected = reference.clone()
        expected[: len(x)] /= divisor if expected.ndim == 1 else divisor[:, None]
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(ours[0], theirs[0], rtol=1e-2)


def test_recorded_losses_are_without_the_weight():
    config = pinn_run(LM, {"iterations": 6, "evaluate_every": 3}, slope_weight=True, dtype="float64")
    problem, plain = build(config, Ranks()), build(pinn_run(LM, dtype="float64"), Ranks())
    optimizer = LevenbergMarquardt(problem.model.parameters())
    start = float(plain.loss(plain.model, plain.points(plain.model, 0)).detach())
    result = train_loop(problem, [Stage(optimizer)], Ranks())
    points = problem.points(problem.model, 0)
    plain.model.load_state_dict(problem.model.state_dict())
    end = float(plain.loss(plain.model, points).detach())
    assert result.series[LOSS][[0, -1]] == pytest.approx([start, end], rel=1e-12)
    weighted = float(problem.residuals(problem.model, points).square().sum())
    assert weighted < 0.99 * end
    trained_plainly = train_loop(plain, [Stage(LevenbergMarquardt(plain.model.parameters()))], Ranks())
    assert trained_plainly.series[LOSS][-1] < result.series[LOSS][-1]  # it goes on from there, without the weight


@pytest.mark.parametrize("name", ["Adam", "LBFGS", "MuonAdam"])
@pytest.mark.parametrize("by_variant", [False, True])
def test_the_slope_weight_needs_an_optimizer_that_linearizes(name, by_variant):
    message = (
        rf"variants\.one: problem\.slope_weight must be false for {name}, which does not linearize; "
        r"it must be an optimizer that does, as LevenbergMarquardt"
    )
    variant = {"optimizer": {"name": name}}
    pinn_run(variant, slope_weight=False)
    with pytest.raises(ValueError, match=message):
        if by_variant:
            pinn_run(variant | {"problem": {"slope_weight": True}})
        else:
            pinn_run(variant, slope_weight=True)
    assert pinn_run(LM | {"problem": {"slope_weight": True}}).problem.slope_weight
    with pytest.raises(ValueError, match=r"problem\.slope_weight must be true or false, got 1"):
        pinn_run(LM, slope_weight=1)


# ---- LARS ------------------------------------------------------------------------------------------------------------


def test_lars_takes_the_steps_of_its_formula():
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 1)).double()
    weights = [p.detach().clone() for p in model.parameters()]
    buffers = [torch.zeros_like(p) for p in weights]
    optimizer = LARS(model.parameters(), lr=0.7, momentum=0.9, weight_decay=0.01, trust=0.02)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(5, 4, dtype=torch.float64)).square().mean().backward()
        for weight, buffer, p in zip(weights, buffers, model.parameters(), strict=True):
            ratio = 0.02 * weight.norm() / (p.grad.norm() + 0.01 * weight.norm()) if p.ndim > 1 else 1.0
            buffer.mul_(0.9).add_(ratio * (p.grad + 0.01 * weight))
            weight.sub_(0.7 * buffer)
        optimizer.step()
        for weight, p in zip(weights, model.parameters(), strict=True):
            torch.testing.assert_close(p.detach(), weight, rtol=1e-12, atol=1e-14)


def test_lars_leaves_zeros_and_missing_gradients_alone():
    zero, frozen = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([zero, frozen], lr=0.5, momentum=0.0)
    zero.grad = torch.ones(2, 2)
    optimizer.step()
    assert torch.equal(zero.detach(), torch.full((2, 2), -0.5))  # without a norm the ratio is 1
    assert torch.equal(frozen.detach(), torch.ones(2, 2)) and optimizer.step(lambda: 3.0) == 3.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": 0.0}, "lr must be a number > 0, got 0.0"),
        ({"lr": 1.0, "momentum": 1.0}, r"momentum must be a number in \[0, 1\), got 1.0"),
        ({"lr": 1.0, "trust": math.nan}, "trust must be a number > 0, got nan"),
    ],
)
def test_lars_refuses_what_is_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        LARS([torch.nn.Parameter(torch.zeros(1))], **arguments)
