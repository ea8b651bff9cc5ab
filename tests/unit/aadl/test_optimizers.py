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
STEPS_GROW = {"Adafactor", "LBFGS"}
"""In so short a run each step is longer than the last, extrapolation points back, and may be rejected throughout."""
BACKENDS = [{"foreach": True}, {"foreach": False}, {"fused": True}]


def optimizer_classes():
    return {
        name: kind
        for name, kind in vars(torch.optim).items()
        if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
    }


def runs_of(name):
    """(arguments, whether step gets a closure) of all combinations that torch offers for an optimizer."""
    known = inspect.signature(optimizer_classes()[name]).parameters
    backends = [backend for backend in BACKENDS if backend.keys() <= known.keys()]
    further = [arguments for other, arguments in FURTHER if other == name]
    for arguments in [ARGUMENTS[name] | backend for backend in backends or [{}]] + further:
        for closure in (True, False) if name != "LBFGS" else (True,):
            yield arguments, closure


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


every_optimizer = pytest.mark.parametrize("name", ARGUMENTS)


def test_no_optimizer_is_forgotten():
    assert optimizer_classes().keys() == ARGUMENTS.keys() | {"Rprop"}


def test_rprop_is_refused():
    optimizer = torch.optim.Rprop(network().parameters())
    with pytest.raises(ValueError, match=r"^Rprop cannot be accelerated: it changes the step size of every weight"):
        aadl.accelerate(optimizer)
    assert not optimizer._optimizer_step_post_hooks  # nothing is attached


@every_optimizer
def test_identity_changes_no_bit(name):
    for arguments, closure in runs_of(name):
        outcomes = []
        for accelerated in (False, True):
            model, optimizer = start(name, arguments)
            if accelerated:
                aadl.accelerate(optimizer, "identity", **EAGER)
            losses = train(model, optimizer, 16, with_closure=closure)
            outcomes.append((losses, snapshot(model, optimizer)))
        assert identical(outcomes[0], outcomes[1]), (arguments, closure)
        assert aadl.accelerator_of(optimizer).statistics["macro_steps"] == 0  # no work either
        assert losses[-1] < losses[0], (arguments, closure)


@every_optimizer
def test_acceleration_trains(name):
    for arguments, closure in runs_of(name):
        store_each_nth, safeguard = (1, "loss") if closure else (2, True)
        model, optimizer = start(name, arguments)
        settings = {"history_depth": 4, "store_each_nth": store_each_nth, "frequency": 4, "safeguard": safeguard}
        aadl.accelerate(optimizer, wait_iterations=2, **settings)
        losses = train(model, optimizer, 48, with_closure=closure)
        statistics, case = aadl.accelerator_of(optimizer).statistics, (arguments, closure)
        assert all(math.isfinite(loss) for loss in losses), case
        assert float(squared_error(model).detach()) < 0.9 * losses[0], case
        assert statistics["steps"] == 48 and statistics["macro_steps"] == 48 // store_each_nth, case
        assert statistics["accepted"] > 0 or name in STEPS_GROW, case
        assert statistics["attempts"] == statistics["accepted"] + sum(statistics["rejected"].values()) > 0, case
        assert statistics["closure_evaluations"] == 0 or closure, case

        plain_model, plain = start(name, arguments)
        train(plain_model, plain, 48, with_closure=closure)
        assert identical(model.state_dict(), plain_model.state_dict()) == (statistics["accepted"] == 0), case
