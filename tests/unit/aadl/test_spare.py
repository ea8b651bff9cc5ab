"""State beside parameters and momentum: where an update is not finite, it returns with the plain iterate."""

import copy

import pytest
import torch
from small_runs import RESIDUAL, identical, network, statistics, train

import aadl
from aadl.history_layout import Layout
from aadl.ranks import Ranks
from aadl.spare import Spare

SETTINGS = RESIDUAL | {"store_each_nth": 2, "frequency": 4}
MAKES = {
    "Adam": (lambda p: torch.optim.Adam(p, lr=0.02), {}),
    "AMSGrad": (lambda p: torch.optim.Adam(p, lr=0.02, amsgrad=True), {}),
    "RMSprop": (lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True), {}),
    "Adagrad": (lambda p: torch.optim.Adagrad(p, lr=0.1), {}),
    "momentum that is left alone": (
        lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.5),
        {"state_coupling": "params"},
    ),
}


def not_a_number(model):
    return float("nan") * sum(p.sum() for p in model.parameters())


@pytest.mark.parametrize("wait", [0, 2], ids=["judged", "confirmed before"])
@pytest.mark.parametrize("name", MAKES)
def test_one_gradient_that_is_not_finite_does_not_stay(name, wait):
    """It comes in the first macro-step after a candidate, or in the second one."""
    make, settings = MAKES[name]
    model = network()
    optimizer = aadl.accelerate(make(model.parameters()), **SETTINGS | settings)
    decisions = aadl.accelerator_of(optimizer).decisions
    for _ in range(200):
        train(model, optimizer, 1)
        state = copy.deepcopy([*optimizer.state.values()])
        if decisions.accepted is None:
            continue
        train(model, optimizer, wait)
        if not wait or decisions.confirmed is not None:
            break
    train(model, optimizer, 2, loss=not_a_number)
    counts = statistics(optimizer)
    assert counts["reverted"] == 1 and counts["resets"] == {"non_finite": 1}
    after = [*optimizer.state.values()]
    moved = {"exp_avg", "momentum_buffer"} - (set() if "state_coupling" in settings else {"momentum_buffer"})
    for before, now in zip(state, after, strict=True):  # momentum returns to where the plain iterate has it
        assert identical(*({k: v for k, v in kept.items() if k not in moved} for kept in (before, now)))
    train(model, optimizer, 20)
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_a_flag_on_a_device_decides_there():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = aadl.accelerate(torch.optim.Adam([parameter], lr=0.1), **SETTINGS)
    for _ in range(2):
        parameter.grad = torch.ones(3)
        optimizer.step()
    spare, seconds = Spare(), optimizer.state[parameter]["exp_avg_sq"]
    before = seconds.clone()
    layout = layout_of(optimizer)
    spare.keep(optimizer, layout, 1)
    seconds.fill_(torch.nan)
    spare.keep(optimizer, layout, 1)  # copies of this acceleration are there already
    spare.put_back(torch.tensor(False))
    spare.put_back(torch.tensor(True, device="meta"))  # nothing on the host waits for a device
    assert bool(seconds.isnan().all())
    spare.put_back(torch.tensor(True))
    assert torch.equal(seconds, before)
    seconds.fill_(torch.nan)
    spare.drop()
    spare.put_back(True)
    assert bool(seconds.isnan().all())


def layout_of(optimizer):
    """One whose history holds no momentum."""
    return Layout(optimizer.param_groups[0]["params"], aadl.accelerator_of(optimizer).settings, Ranks(), False, False)


def test_no_room_for_the_copies_is_said(monkeypatch):
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = aadl.accelerate(torch.optim.Adam([parameter], lr=0.1), **SETTINGS)
    parameter.grad = torch.ones(3)
    optimizer.step()
    seconds = optimizer.state[parameter]["exp_avg_sq"]

    def clone(tensor):
        raise torch.OutOfMemoryError(str(tensor.shape))

    spare, layout = Spare(), layout_of(optimizer)
    monkeypatch.setattr(torch.Tensor, "clone", clone)
    with pytest.warns(UserWarning, match="no room for a copy of the second moments"):
        spare.keep(optimizer, layout, 1)
    monkeypatch.undo()
    seconds.fill_(torch.nan)
    spare.put_back(True)
    assert bool(seconds.isnan().all())
