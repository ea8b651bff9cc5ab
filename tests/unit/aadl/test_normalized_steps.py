"""Nonlinear GMRES on optimizers whose steps are as long wherever they begin."""

import pytest
import torch
from residual_runs import SGD, loss_of, started, train
from small_runs import flat

from aadl.least_squares import STEPS, UNDONE, change_by_steps, next_damping
from aadl.mixing import Gram


class SignSGD(torch.optim.Optimizer):
    """Steps of one length in every weight."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    def step(self, closure):
        loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(p.grad.sign(), alpha=group["lr"])
        return loss


def test_gains_that_normalized_steps_undo_are_left_alone():
    """Steps of one length go back and forth over the valley until the rate falls; then candidates are kept."""
    places, ends = [], []
    for depth in (0, 20):
        model, optimizer, accelerator = started(SignSGD, history_depth=depth)
        train(model, optimizer, 100)
        places.append(flat(model))
        early = dict(accelerator.statistics)
        optimizer.param_groups[0]["lr"] = 1e-5
        train(model, optimizer, 100)
        ends.append(loss_of(model))
    assert torch.equal(*places)
    assert early["accepted"] == 0 < early["rejected"]["steps"]
    assert accelerator.statistics["accepted"] > 0 and ends[1] < 0.9 * ends[0]
    model, optimizer, accelerator = started(SGD)
    train(model, optimizer, 200)
    assert "steps" not in accelerator.statistics["rejected"]


def test_what_steps_change_is_read_from_the_products():
    residuals = torch.tensor([[4.0, 0.0, 1.0], [3.0, 1.0, 1.0], [3.0, -1.0, 0.0], [2.0, 1.0, 0.5]], dtype=torch.float64)
    for rows in (residuals, residuals.flip(0)):
        steps, newest = rows.diff(dim=0), rows[-1]
        gram = Gram(steps @ steps.T, steps @ newest, float(newest @ newest))
        moved, gained = steps.square().sum(1).mean(), -rows.square().sum(1).diff().mean()
        assert change_by_steps(gram) == pytest.approx(max(UNDONE * float(moved), STEPS * float(gained)))


def test_damping_falls_after_good_predictions_alone_and_rises_after_rejections():
    cases = [(0.9, True), (0.5, True), (0.1, True), (0.9, False), (0.1, False)]
    assert [next_damping(3.0, *case, floor=0.5) for case in cases] == [1.0, 3.0, 12.0, 12.0, 12.0]
    assert next_damping(1.0, 0.9, accepted=True, floor=0.5) == 0.5
    assert next_damping(0.0, 0.1, accepted=False, floor=0.0) == 0.0
