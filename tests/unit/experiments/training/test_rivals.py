"""Optimizers of packages that need not be installed, and those with a line search, in the suite."""

import copy
import sys

import pytest
import torch
from suite_cases import FREE_ADAM, FREE_SGD, PINN, RAW, SOAP, SSBROYDEN, build, needs, pinn_run, run_config

from experiments.catalog import parse_config
from experiments.distributed.ranks import Ranks
from experiments.settings.kinds import Component
from experiments.training.components import make_optimizer
from experiments.training.optimizers import SSBroyden
from experiments.training.stage import Stage
from experiments.training.train import Training, train

LOSS = "metrics/train/loss"


def trained(config):
    """The result of a run."""
    problem = build(config, Ranks())
    optimizer = make_optimizer(config.variant.optimizer, problem.model.parameters())
    return train(Training(problem, [Stage(optimizer)], Ranks()))


def test_ssbroyden_counts_every_evaluation_and_keeps_the_budget():
    training = {"iterations": 60, "evaluate_every": 10}
    result = trained(pinn_run({"optimizer": SSBROYDEN}, training, dtype="float64"))
    assert result.num_steps < 60 <= result.iterations[-1] <= 60
    assert (result.iterations == result.series["metrics/evaluations"]).all()
    assert result.series[LOSS][-1] < 0.5 * result.series[LOSS][0]


@pytest.mark.parametrize(("rule", "is_cleared"), [("reset", True), ("keep", False)])
def test_the_memory_of_ssbroyden_is_cleared_when_the_points_change(rule, is_cleared, monkeypatch):
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


def test_the_error_names_optimizers_of_packages():
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

    step = Training.take_step
    monkeypatch.setattr(Training, "take_step", lambda run, batch: modes.append(mode()) or step(run, batch))
    result = train(Training(problem, [Stage(optimizer)], Ranks()))
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
