"""The rivals of the acceleration: self-scaled Broyden, and optimizers of packages that need not be installed."""

import copy
import math
import sys
import types

import numpy as np
import pytest
import torch
from small_runs import through_a_file
from suite_cases import FREE_ADAM, FREE_SGD, PINN, RAW, SOAP, SSBROYDEN, build, needs, pinn_run, run_config
from torch import nn

from experiments.catalog import parse_config
from experiments.distributed.ranks import Ranks
from experiments.records.tuned_rates import HEADER, rows
from experiments.settings.kinds import Component
from experiments.training.components import make_optimizer
from experiments.training.optimizers import SSBroyden
from experiments.training.optimizers.line_search import ARMIJO
from experiments.training.optimizers.ss_broyden import self_scaled_update
from experiments.training.stage import Stage
from experiments.training.train import Training, train

LOSS = "metrics/train/loss"


class Function:
    """A closure of one parameter, or of two, that counts its calls."""

    def __init__(self, function, *starts):
        self.parameters = [nn.Parameter(torch.tensor(start, dtype=torch.float64)) for start in starts]
        self.function, self.calls = function, 0

    def vector(self):
        return torch.cat([p.detach() for p in self.parameters])

    def value(self):
        return float(self.function(self.vector()))

    def __call__(self):
        self.calls += 1
        for p in self.parameters:
            p.grad = None
        loss = self.function(torch.cat(self.parameters))
        loss.backward()
        return loss.detach()


def trained(config):
    """The result of a run."""
    problem = build(config, Ranks())
    optimizer = make_optimizer(config.variant.optimizer, problem.model.parameters())
    return train(problem, [Stage(optimizer)], Ranks())


def rosenbrock(w):
    return (100 * (w[1:] - w[:-1] ** 2).square() + (1 - w[:-1]).square()).sum()


SIZE = 8
HESSIAN = torch.diag(torch.logspace(-1, 2, SIZE, dtype=torch.float64)) + 0.5


def quadratic(w):
    return w @ HESSIAN @ w / 2


# ---- SSBroyden -------------------------------------------------------------------------------------------------------


def test_a_quadratic_takes_as_many_steps_as_it_has_dimensions():
    problem = Function(quadratic, [1.0, -2.0, 3.0], [0.5, 1.5, -1.0, 2.0, -0.5])
    optimizer = SSBroyden(problem.parameters, max_iter=1, curvature=1.01 * ARMIJO)  # searches that are nearly exact
    losses = [float(optimizer.step(problem)) for _ in range(SIZE)]
    assert losses[0] > 10 and losses[-1] > 1e-6 and problem.value() < 1e-9 * losses[-1]
    assert (np.diff(losses) < 0).all()


def textbook(hessian, s, y):
    """The update of the Hessian B, by the direct formulas of the self-scaled Broyden family."""
    image, product = hessian @ s, y @ s
    b, h = s @ image / product, y @ torch.linalg.solve(hessian, y) / product
    a = b * h - 1
    low = torch.minimum(torch.ones(()), h * (1 - (a / (1 + a)).sqrt()))
    theta = torch.maximum((low - 1) / a, torch.minimum(1 / low, (1 - b) / b))
    sigma = 1 + theta * a
    power = sigma ** (-1 / (len(s) - 1))
    tau = torch.minimum(torch.ones(()), 1 / b)
    tau = tau * torch.minimum(power, 1 / theta) if theta > 0 else torch.minimum(tau * power, sigma)
    w = (s @ image).sqrt() * (y / product - image / (s @ image))
    kept = hessian - torch.outer(image, image) / (s @ image) + theta * torch.outer(w, w)
    return tau * kept + torch.outer(y, y) / product


def test_the_inverse_is_that_of_the_textbook_along_a_run():
    problem = Function(rosenbrock, [-1.2, 1.0, -0.5], [0.8, 1.3])
    optimizer = SSBroyden(problem.parameters, max_iter=1)
    hessian = torch.eye(5, dtype=torch.float64)
    for step in range(25):
        before = problem.vector()
        problem()
        gradient = optimizer._gradient()
        optimizer.step(problem)
        s = problem.vector() - before
        problem()
        y = optimizer._gradient() - gradient
        direction = -torch.linalg.solve(hessian, gradient)
        assert float(direction @ s / (direction.norm() * s.norm())) > 1 - 1e-9, step
        hessian = textbook(hessian, s, y)
        inverse = optimizer.state[problem.parameters[0]]["inverse_hessian"]
        torch.testing.assert_close(inverse @ hessian, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-7)


@pytest.mark.parametrize("ratio", [0.1, 1.0, 10.0])
def test_the_update_satisfies_the_secant_equation_and_stays_positive(ratio):
    torch.manual_seed(0)
    for size in (1, 2, 6):
        factor = torch.randn(size, size, dtype=torch.float64)
        inverse = factor @ factor.T + torch.eye(size, dtype=torch.float64)
        s = torch.randn(size, dtype=torch.float64)
        curvature = float(s @ torch.linalg.solve(inverse, s))
        y = ratio * torch.linalg.solve(inverse, s) + 0.1 * s
        self_scaled_update(inverse, s, y, curvature)
        torch.testing.assert_close(inverse @ y, s, rtol=1e-9, atol=1e-9)
        assert float(torch.linalg.eigvalsh(inverse)[0]) > 0


def test_the_steps_meet_the_wolfe_conditions_and_find_the_minimum():
    problem = Function(rosenbrock, [-1.2, 1.0] * 3)
    optimizer = SSBroyden(problem.parameters, max_iter=1)
    for _ in range(200):
        before = problem.vector()
        loss = float(problem())
        slope = optimizer._gradient()
        assert float(optimizer.step(problem)) == loss
        s = problem.vector() - before
        if loss < 1e-20:
            break
        after = float(problem())
        assert after <= loss + ARMIJO * float(slope @ s) and float(slope @ s) < 0
        assert abs(float(optimizer._gradient() @ s)) <= 0.9 * abs(float(slope @ s)) * (1 + 1e-9)
    torch.testing.assert_close(problem.vector(), torch.ones(6, dtype=torch.float64), rtol=0, atol=1e-8)


def test_the_evaluations_of_a_step_are_bounded():
    for max_eval in (1, 2, 3, 7):
        problem = Function(rosenbrock, [-1.2, 1.0] * 3)
        optimizer = SSBroyden(problem.parameters, max_eval=max_eval)
        for step in range(1, 30):
            problem.calls = 0
            loss = problem.value()
            optimizer.step(problem)
            assert 1 <= problem.calls <= max_eval and problem.value() <= loss
            assert step < 5 or max_eval == 1 or problem.value() < 1000


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_not_stepped_to(value):
    problem = Function(lambda w: torch.where(w[0] > 0.9, value, 1.0) * (w[0] - 1.5).square(), [0.0])
    optimizer = SSBroyden(problem.parameters)
    for _ in range(5):
        optimizer.step(problem)
    assert 0.1 < float(problem.vector()) <= 0.9
    problem = Function(lambda w: w.sum() * value, [1.0, 2.0])
    optimizer = SSBroyden(problem.parameters)
    assert not bool(optimizer.step(problem).isfinite())
    assert problem.vector().tolist() == [1.0, 2.0]


def test_an_approximation_that_leads_nowhere_is_dropped():
    problem = Function(rosenbrock, [-1.2, 1.0])
    optimizer = SSBroyden(problem.parameters, max_iter=2)
    optimizer.step(problem)
    optimizer.state[problem.parameters[0]]["inverse_hessian"] = -torch.eye(2, dtype=torch.float64)
    loss = problem.value()
    optimizer.step(problem)
    assert problem.value() < loss


def test_it_goes_on_bit_for_bit_from_its_state():
    problem = Function(rosenbrock, [-1.2, 1.0], [0.3])
    optimizer = SSBroyden(problem.parameters, max_iter=3)
    for _ in range(3):
        optimizer.step(problem)
    other = Function(rosenbrock, *[p.detach().tolist() for p in problem.parameters])
    restored, forgetful = SSBroyden(other.parameters), Function(rosenbrock, *[p.tolist() for p in other.parameters])
    restored.load_state_dict(through_a_file(optimizer.state_dict()))
    fresh = SSBroyden(forgetful.parameters, max_iter=3)
    for _ in range(3):
        optimizer.step(problem)
        restored.step(other)
        fresh.step(forgetful)
    assert torch.equal(problem.vector(), other.vector()) and not torch.equal(problem.vector(), forgetful.vector())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_iter": 0}, "max_iter must be an integer >= 1, got 0"),
        ({"max_eval": 2.0}, r"max_eval must be an integer >= 1, got 2\.0"),
        ({"curvature": 1.0}, r"curvature must be a number in \(0\.0001, 1\), got 1\.0"),
        ({"curvature": float("nan")}, r"curvature must be a number in \(0\.0001, 1\), got nan"),
    ],
)
def test_ssbroyden_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        SSBroyden([nn.Parameter(torch.zeros(2))], **arguments)
    with pytest.raises(ValueError, match="params must be one group, got 2"):
        SSBroyden([{"params": [nn.Parameter(torch.zeros(2))]} for _ in range(2)])


def test_ssbroyden_counts_every_evaluation_and_keeps_the_budget():
    training = {"iterations": 60, "evaluate_every": 10}
    result = trained(pinn_run({"optimizer": SSBROYDEN}, training, dtype="float64"))
    assert result.num_steps < 60 <= result.iterations[-1] <= 60
    assert (result.iterations == result.series["metrics/evaluations"]).all()
    assert result.series[LOSS][-1] < 0.5 * result.series[LOSS][0]


@pytest.mark.parametrize(("rule", "is_cleared"), [("reset", True), ("keep", False)])
def test_the_memory_of_ssbroyden_begins_anew_with_the_points(rule, is_cleared, monkeypatch):
    empty, step = [], SSBroyden.step
    monkeypatch.setattr(SSBroyden, "step", lambda own, closure: empty.append(not own.state) or step(own, closure))
    problem = {"resample_every": 10, "history_on_resample": rule, "dtype": "float64"}
    trained(pinn_run({"optimizer": SSBROYDEN}, {"iterations": 40}, **problem))
    assert any(empty[1:]) == is_cleared


def test_images_refuse_optimizers_with_a_line_search():
    raw = copy.deepcopy(RAW) | {"experiment": "imagenet", "problem": {}, "training": {"batch_size": 8}}
    raw["variants"] = {"one": {"optimizer": {"name": "SSBroyden"}}}
    with pytest.raises(ValueError, match=r"optimizer: name must be one of .*, got 'SSBroyden'"):
        parse_config(raw)


# ---- optimizers of other packages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [SOAP, FREE_ADAM, FREE_SGD], ids=lambda optimizer: optimizer["name"])
def test_a_package_that_is_not_there_is_named(optimizer, monkeypatch):
    package = "pytorch_optimizer" if optimizer is SOAP else "schedulefree"
    monkeypatch.setitem(sys.modules, package, None)  # an import of it fails
    raw = PINN | {"variants": {"one": {"optimizer": optimizer}}}
    with pytest.raises(ValueError) as caught:
        parse_config(raw)
    assert str(caught.value) == (
        f"variants.one.optimizer: {optimizer['name']} needs the package {package}, which is not installed: "
        f"pip install {package}"
    )
    parse_config(PINN)


def test_names_of_optimizers_of_packages_are_told():
    with pytest.raises(ValueError, match=r"must be one of .*AdamWScheduleFree.*SGDScheduleFree, SOAP.*, got 'Soap'"):
        parse_config(PINN | {"variants": {"one": {"optimizer": {"name": "Soap"}}}})


@needs("schedulefree")
def test_schedule_free_is_evaluated_at_its_average(monkeypatch):
    config = run_config()
    problem = build(config, Ranks())
    optimizer = make_optimizer(Component("SGDScheduleFree", {"lr": 0.1}), problem.model.parameters())
    modes = []
    evaluate = problem.evaluate
    problem.evaluate = lambda model: modes.append(mode()) or evaluate(model)

    def mode():
        return optimizer.param_groups[0]["train_mode"]

    step = Training._step
    monkeypatch.setattr(Training, "_step", lambda run, batch: modes.append(mode()) or step(run, batch))
    result = train(problem, [Stage(optimizer)], Ranks())
    steps = modes.count(True)
    assert steps == result.num_steps and modes.count(False) == 11 and mode()  # ten epochs and the start
    with torch.no_grad():
        trained_at = evaluate(problem.model)[LOSS]
        optimizer.eval()
        assert evaluate(problem.model)[LOSS] == pytest.approx(result.series[LOSS][-1], rel=1e-5)
    assert trained_at != pytest.approx(result.series[LOSS][-1], rel=1e-5)


@needs("schedulefree")
def test_no_second_stage_follows_schedule_free():
    then = {"after": 4, "optimizer": {"name": "Adam"}}
    with pytest.raises(ValueError, match=r"variants\.one\.then must be null after AdamWScheduleFree"):
        pinn_run({"optimizer": FREE_ADAM, "then": then})


# ---- tuned rates -----------------------------------------------------------------------------------------------------


def run_with_rate(variant, lr, losses):
    optimizer = {"name": "SGD", "arguments": {"lr": lr}}
    config = {"experiment": "graduate_admissions", "variant_name": variant, "variant": {"optimizer": optimizer}}
    series = {LOSS: np.array(losses), "metrics/validation/loss": np.array([3.0, 2.0, 4.0])}
    return types.SimpleNamespace(config=config, series=series)


def test_a_rate_is_tuned_when_both_neighbors_are_worse():
    ends = {"inner": {0.1: [3.0, 9.0, 1.0], 0.2: [2.0, 1.0, 8.0], 0.3: [math.nan, 1.0, math.nan]}, "end": {0.1: [1.0]}}
    ends["end"] |= {0.2: [2.0], 0.3: [3.0]}
    runs = [run_with_rate(name, lr, [7.0, end]) for name in ends for lr, of in ends[name].items() for end in of]
    table = [dict(zip(HEADER, row, strict=True)) for row in rows(runs)]
    assert {(row["variant"], row["lr"]): row["tuned"] for row in table if row["tuned"]} == {
        ("inner", "0.2"): "yes",
        ("end", "0.1"): "end",
    }
    (row,) = (row for row in table if (row["variant"], row["lr"]) == ("inner", "0.2"))
    assert list(row.values())[4:9] == ["3", "2.000e+00", "1.000e+00", "8.000e+00", "2.000e+00"]
    (row,) = (row for row in table if (row["variant"], row["lr"]) == ("inner", "0.3"))
    assert row["loss"] == row["highest"] == "inf" and row["lowest"] == "1.000e+00"
