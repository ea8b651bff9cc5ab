"""Closures that touch more than the gradients of the parameters."""

import itertools

import pytest
import torch
from small_runs import EAGER, INPUTS, TARGETS, network, squared_error, train
from torch import nn

import aadl

TRIED = EAGER | {"acceleration_type": "identity", "average": "always"}
"""Means of iterates are tried by the loss, all of them: nobody asks first which way they point."""


def verdict(accepted):
    """A loss of which every value is better (worse) than the last one, so that every candidate wins (none does)."""
    calls = itertools.count(1)
    return lambda model: squared_error(model) + (-1 if accepted else 1) * 10.0 * next(calls)


def trials_of(optimizer, accepted):
    """The closure's evaluations in trials, which were what `verdict` demands."""
    counts = aadl.accelerator_of(optimizer).statistics
    assert counts["accepted"] == accepted * counts["attempts"]
    assert counts["closure_evaluations"] == 2 * counts["attempts"] > 0
    return counts["closure_evaluations"]


@pytest.mark.parametrize("accepted", [False, True])
def test_gradients_of_other_optimizers_survive_a_trial(accepted):
    """The closure clears and fills the gradients of the whole model; a second optimizer steps after the first."""

    def run(accelerated):
        model = network()
        first = torch.optim.SGD(model[0].parameters(), lr=0.02)
        second = torch.optim.SGD(model[2].parameters(), lr=0.02)
        if accelerated:
            aadl.accelerate(first, **TRIED)
        loss_of = verdict(accepted)

        def closure():
            model.zero_grad()
            loss = loss_of(model)
            loss.backward()
            return loss

        missing = 0
        for _ in range(20):
            first.step(closure)
            missing += sum(p.grad is None or not bool(p.grad.any()) for p in model[2].parameters())
            second.step()
        return missing, trials_of(first, accepted) if accelerated else 0

    assert run(False) == (0, 0)
    missing, evaluations = run(True)
    assert missing == 0 and evaluations > 0


def test_a_closure_that_needs_gradients_of_its_inputs_is_never_tried_again_and_never_fatal():
    model = network()
    optimizer = aadl.accelerate(torch.optim.SGD(model.parameters(), lr=0.02), **EAGER)

    def closure():
        optimizer.zero_grad()
        inputs = INPUTS.clone().requires_grad_()
        (model(inputs) - TARGETS).square().mean().backward()
        attacked = INPUTS + 0.01 * inputs.grad.sign()
        optimizer.zero_grad()
        loss = (model(attacked) - TARGETS).square().mean()
        loss.backward()
        return loss

    for _ in range(20):
        optimizer.step(closure)
    statistics = aadl.accelerator_of(optimizer).statistics
    assert statistics["rejected"]["closure"] > 2 and statistics["accepted"] == 0


@pytest.mark.parametrize("accepted", [False, True])
def test_buffers_that_are_reassigned_are_put_back(accepted):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.all_calls = 0

        def forward(self, x):
            self.calls = self.calls + 1
            self.all_calls += 1
            return x

    model = network(Counting())
    optimizer = aadl.accelerate(torch.optim.SGD(model.parameters(), lr=0.02), **TRIED)
    train(model, optimizer, 20, with_closure=True, loss=verdict(accepted))
    evaluations = trials_of(optimizer, accepted)
    assert model[1].calls == 20 and model[1].all_calls == 20 + evaluations
