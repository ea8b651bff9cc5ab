"""Gradient accumulation, activation checkpointing, shared tensors and torch.compile give the runs they gave before.

Compiled models and steps with the same counts of compilations: tests/unit/aadl/test_accelerator.py.
"""

from contextlib import nullcontext

import pytest
import torch
from parallel_runs import (
    INPUTS,
    LOSS,
    RESIDUAL,
    TARGETS,
    agree,
    distance,
    momentum,
    network,
    part_of_batch,
    replica,
    run,
)
from small_runs import flat, identical
from torch import nn
from torch.utils.checkpoint import checkpoint

import aadl


def accumulate(rank, size, synchronize_always):
    """Gradients of four micro-batches; only the last one is sent over the network."""
    model = replica(network(), rank, size)
    optimizer = aadl.accelerate(momentum(model.parameters()), **RESIDUAL)
    for _ in range(50):
        optimizer.zero_grad()
        for part in range(4):
            last = part == 3
            rows = slice(rank + size * part, None, 4 * size)
            with nullcontext() if last or synchronize_always else model.no_sync():
                ((model(INPUTS[rows]) - TARGETS[rows]).square().mean() / 4).backward()
        optimizer.step()
    weights = flat(model)
    return {"weights": weights, "statistics": aadl.accelerator_of(optimizer).statistics}


def accumulate_both(rank, size):
    return {
        "no_sync": accumulate(rank, size, False),
        "synchronized": accumulate(rank, size, True),
        "one batch": run(rank, size, RESIDUAL, wrap=replica, loss=part_of_batch, steps=50),
    }


def test_accumulated_gradients_are_those_of_the_whole_batch(spawn_ranks):
    outcomes = spawn_ranks(accumulate_both, 2)
    expected = outcomes[0]["one batch"]
    plain = run(steps=50)
    for name in ("no_sync", "synchronized"):
        ours = [outcome[name] for outcome in outcomes]
        assert agree(ours), name
        assert identical(ours[0]["statistics"], ours[1]["statistics"]), name
        assert ours[0]["statistics"]["accepted"] == expected["statistics"]["accepted"] > 0, name
        assert distance(ours[0], expected) < 1e-9, name
        assert distance(ours[0], plain) > 1e-3, name


class Checkpointed(nn.Module):
    """The first layers are computed again in the backward pass; the dropout must draw the same numbers then."""

    def __init__(self, again):
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.05))
        self.last = nn.Linear(8, 1)
        self.again, self.forwards = again, 0

    def forward(self, inputs):
        self.forwards += 1
        hidden = checkpoint(self.first, inputs, use_reentrant=False) if self.again else self.first(inputs)
        return self.last(hidden)


def checkpointed_run(again, settings):
    models = []

    def build():
        torch.manual_seed(1)
        models.append(Checkpointed(again).double())
        return models[-1]

    torch.manual_seed(2)
    outcome = run(0, 1, settings, build=build, closure=True, steps=50)
    return outcome, models[0]


@pytest.mark.parametrize("settings", [LOSS, RESIDUAL], ids=["loss", "residual"])
def test_activation_checkpointing_changes_nothing(settings):
    (ours, model), (expected, plain) = checkpointed_run(True, settings), checkpointed_run(False, settings)
    assert torch.equal(ours["weights"], expected["weights"])
    assert identical(ours["statistics"], expected["statistics"])
    assert ours["statistics"]["attempts"] > 0
    assert (ours["statistics"]["closure_evaluations"] > 0) == (settings is LOSS)
    assert model.forwards == plain.forwards == 50 + ours["statistics"]["closure_evaluations"]
    counts = [int(one.first[1].num_batches_tracked) for one in (model, plain)]
    assert counts == [100, 50]  # torch runs the layers twice a step; trials leave no trace
    assert settings is LOSS or ours["statistics"]["accepted"] > 0
    other, _ = checkpointed_run(True, None)
    assert settings is LOSS or not torch.equal(other["weights"], ours["weights"])


class Tied(nn.Module):
    """An encoder and a decoder with one weight, used transposed; or the same function with the weight held once."""

    def __init__(self, modules):
        super().__init__()
        torch.manual_seed(1)
        self.encoder = nn.Linear(3, 3, bias=False)
        self.middle = nn.Linear(3, 3)
        if modules:
            self.decoder = nn.Linear(3, 3, bias=False)
            self.decoder.weight = self.encoder.weight
        self.output = nn.Linear(3, 1)
        self.tied = modules

    def forward(self, inputs):
        hidden = torch.tanh(self.middle(torch.tanh(self.encoder(inputs))))
        decoded = self.decoder(hidden) if self.tied else nn.functional.linear(hidden, self.encoder.weight)
        return self.output(decoded)


def tied(modules):
    """The output layer draws the same numbers in both."""
    model = Tied(modules).double()
    torch.manual_seed(3)
    nn.init.normal_(model.output.weight)
    nn.init.zeros_(model.output.bias)
    return model


@pytest.mark.parametrize(("settings", "closure"), [(RESIDUAL, False), (LOSS, True)], ids=["residual", "loss"])
def test_a_tensor_shared_by_modules_counts_once(settings, closure):
    ours, expected = (
        run(0, 1, settings, build=lambda modules=modules: tied(modules), closure=closure) for modules in (True, False)
    )
    assert torch.equal(ours["weights"], expected["weights"])
    assert identical(ours["statistics"], expected["statistics"])
    assert ours["bytes"] == expected["bytes"]
    assert ours["statistics"]["accepted"] > 0
    assert distance(ours, run(build=lambda: tied(True))) > 1e-4


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_compiled_train_step():
    """Forward, backward and step in one function, as in the tutorials of torch.compile."""
    ends = []
    for backend in ("eager", None):
        torch._dynamo.reset()
        model = network()
        optimizer = aadl.accelerate(momentum(model.parameters()), **RESIDUAL)

        def step(model=model, optimizer=optimizer):
            loss = (model(INPUTS) - TARGETS).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        used = step if backend is None else torch.compile(step, backend=backend)
        for _ in range(30):
            used()
        weights = flat(model)
        ends.append((weights, aadl.accelerator_of(optimizer).statistics))
    assert torch.allclose(ends[0][0], ends[1][0], rtol=0, atol=1e-12)
    assert ends[0][1]["accepted"] == ends[1][1]["accepted"] > 0
    assert ends[0][1]["steps"] == 30
    assert (ends[0][0] - run(steps=30)["weights"]).abs().max() > 1e-4
