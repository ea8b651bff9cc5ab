"""Every optimizer of torch.optim: nothing changes where nothing is accelerated, and acceleration trains."""

import inspect
import math

import pytest
import torch
from small_runs import EAGER, identical, network, snapshot, squared_error, train
from torch import nn

import aadl

ARGUMENTS = {
    "ASGD": {"lr": 0.05},
    "Adadelta": {"lr": 1.0},
    "Adafactor": {"lr": 0.01},
    "Adagrad": {"lr": 0.05},
    "Adam": {"lr": 0.01},
    "AdamW": {"lr": 0.01},
    "Adamax": {"lr": 0.01},
    "LBFGS": {"lr": 0.3, "max_iter": 2},
    "Muon": {"lr": 0.01},
    "NAdam": {"lr": 0.01},
    "RAdam": {"lr": 0.02},
    "RMSprop": {"lr": 0.005},
    "Rprop": {"lr": 0.001},
    "SGD": {"lr": 0.05},
    "SparseAdam": {"lr": 0.02},
}
FURTHER = [
    ("SGD", {"lr": 0.02, "momentum": 0.9}),
    ("SGD", {"lr": 0.02, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3}),
    ("Adam", {"lr": 0.01, "amsgrad": True}),
    ("Adam", {"lr": torch.tensor(0.01)}),
    ("RMSprop", {"lr": 0.005, "momentum": 0.5, "centered": True}),
    ("LBFGS", {"line_search_fn": "strong_wolfe", "max_iter": 3}),
]
STEPS_GROW = {"Adafactor", "LBFGS", "Rprop"}
"""In so short a run each step is longer than the last, extrapolation points back, and may be rejected throughout."""
BACKENDS = [{"foreach": True}, {"foreach": False}, {"fused": True}]


def optimizer_classes():
    return {
        name: kind
        for name, kind in vars(torch.optim).items()
        if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
    }


def runs():
    """(optimizer, its arguments, whether step gets a closure) of all combinations that torch offers."""
    for name, kind in optimizer_classes().items():
        known = inspect.signature(kind).parameters
        backends = [backend for backend in BACKENDS if backend.keys() <= known.keys()]
        for arguments in backends or [{}]:
            yield from with_and_without_closure(name, ARGUMENTS[name] | arguments)
    for name, arguments in FURTHER:
        yield from with_and_without_closure(name, arguments)


def with_and_without_closure(name, arguments):
    text = ",".join(f"{key}={value}" for key, value in arguments.items() if key != "lr" or torch.is_tensor(value))
    for closure in (True, False) if name != "LBFGS" else (True,):
        yield pytest.param(name, arguments, closure, id=f"{name}({text}){'-closure' * closure}")


class Lookup(nn.Module):
    """Gradients that are sparse, of parameters that are not."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.table = nn.Embedding(6, 3, sparse=True)

    def forward(self, inputs):
        return self.table(torch.arange(len(inputs)) % 5).sum(1, keepdim=True)


def start(name, arguments):
    model = Lookup() if name == "SparseAdam" else network(bias=name != "Muon")
    return model, optimizer_classes()[name](model.parameters(), **arguments)


every_run = pytest.mark.parametrize(("name", "arguments", "closure"), list(runs()))


def test_no_optimizer_is_forgotten():
    assert optimizer_classes().keys() == ARGUMENTS.keys()


@every_run
def test_identity_changes_no_bit(name, arguments, closure):
    outcomes = []
    for accelerated in (False, True):
        model, optimizer = start(name, arguments)
        if accelerated:
            aadl.accelerate(optimizer, "identity", **EAGER)
        losses = train(model, optimizer, 32, with_closure=closure)
        outcomes.append((losses, snapshot(model, optimizer)))
    assert identical(outcomes[0], outcomes[1])
    assert aadl.accelerator_of(optimizer).statistics["macro_steps"] == 0  # no work either
    assert losses[-1] < losses[0]


@every_run
def test_acceleration_trains(name, arguments, closure):
    store_each_nth, safeguard = (1, "loss") if closure else (2, True)
    model, optimizer = start(name, arguments)
    aadl.accelerate(
        optimizer, wait_iterations=2, history_depth=4, store_each_nth=store_each_nth, frequency=4, safeguard=safeguard
    )
    losses = train(model, optimizer, 48, with_closure=closure)
    statistics = aadl.accelerator_of(optimizer).statistics
    assert all(math.isfinite(loss) for loss in losses)
    assert float(squared_error(model).detach()) < 0.9 * losses[0]
    assert statistics["steps"] == 48
    assert statistics["macro_steps"] == 48 // store_each_nth
    assert statistics["accepted"] > 0 or name in STEPS_GROW
    assert statistics["attempts"] == statistics["accepted"] + sum(statistics["rejected"].values())
    assert statistics["attempts"] > 0
    assert statistics["closure_evaluations"] == 0 or closure

    plain_model, plain = start(name, arguments)
    train(plain_model, plain, 48, with_closure=closure)
    assert identical(model.state_dict(), plain_model.state_dict()) == (statistics["accepted"] == 0)
