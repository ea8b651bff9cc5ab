"""A small least-squares network, accelerated by its residuals, and the loops that train it."""

import torch
from small_runs import flat
from torch import nn

import aadl

INPUTS = torch.linspace(-1, 1, 192, dtype=torch.float64).reshape(64, 3)
TARGETS = torch.sin(3 * INPUTS).sum(1, keepdim=True)
SGD, ADAM = torch.optim.SGD, torch.optim.Adam
OFTEN = {"frequency": 2, "history_depth": 6}


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def residuals_of(model, rows=slice(None)):
    return model(INPUTS[rows]) - TARGETS[rows]


def loss_of(model):
    return float(residuals_of(model).detach().square().sum())


def attach(optimizer, **settings):
    """The accelerator of the residuals."""
    return aadl.accelerator_of(aadl.accelerate(optimizer, "nonlinear_gmres", **settings))


def started(make=SGD, lr=0.05, observe=True, momentum=None, **settings):
    """(model, optimizer, accelerator); the residuals come from the closure, or from a function.

    `momentum` is that of SGD; `buffers` of the settings is the accelerator's `momentum`.
    """
    model = network()
    optimizer = make(model.parameters(), lr=lr, **({} if momentum is None else {"momentum": momentum}))
    if "buffers" in settings:
        settings["momentum"] = settings.pop("buffers")
    given = {} if observe or "residuals" in settings else {"residuals": lambda: residuals_of(model)}
    return model, optimizer, attach(optimizer, **given, **settings)


def closure_of(model, optimizer, rows=slice(None), observe=True, residuals=residuals_of):
    """The closure of a user; whatever is not accelerated has nothing to observe."""
    accelerator = aadl.attached.find_accelerator(optimizer)

    def closure():
        optimizer.zero_grad()
        found = residuals(model, rows)
        if observe and accelerator is not None:
            accelerator.observe(found)
        loss = found.square().mean()
        loss.backward()
        return loss

    return closure


def train(model, optimizer, steps, observe=True):
    closure = closure_of(model, optimizer, observe=observe)
    for _ in range(steps):
        optimizer.step(closure)


def trained_plainly(steps, lr=0.05, rows=lambda step: slice(None)):
    """The weights after steps of SGD without acceleration."""
    model = network()
    optimizer = SGD(model.parameters(), lr=lr)
    for step in range(steps):
        optimizer.step(closure_of(model, optimizer, rows(step)))
    return flat(model)
