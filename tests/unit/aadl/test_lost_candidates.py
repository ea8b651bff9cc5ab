"""A candidate at which no step is made any more, because the loss is not finite there, goes all the same."""

import copy
import math

import pytest
import torch
from small_runs import flat, identical, network, squared_error, statistics, through_a_file, train
from test_losses import KINDS, SETTINGS, accelerated, plus

import aadl


@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_that_skips_every_step_behind_a_boundary_does_not_end_the_training(fused, after):
    """There gradients are not finite either, and no macro-step would end."""
    make = lambda p: torch.optim.Adam(p, lr=0.01, fused=fused)  # noqa: E731
    model, optimizer = accelerated(make)
    plain, scaler = aadl.accelerator_of(optimizer).history.blocks[0].mapped.clone(), torch.amp.GradScaler("cpu")
    place, reach = torch.equal(flat(model), plain), aadl.accelerator_of(optimizer).decisions.reach
    seconds = [state["exp_avg_sq"].clone() for state in optimizer.state.values()]

    def step(amount):
        optimizer.zero_grad()
        scaler.scale(squared_error(model) * amount).backward()
        scaler.step(optimizer)
        scaler.update()

    for amount in (*[1.0] * after, *[math.nan] * 4):
        step(amount)
    counts, accelerator = statistics(optimizer), aadl.accelerator_of(optimizer)
    assert counts["reverted"] == counts["suspensions"] == 1 and accelerator.steps_in_macro_step == 0
    assert accelerator.decisions.reach < reach and torch.equal(accelerator.history.blocks[0].start, plain)
    assert not place and torch.equal(flat(model), plain)
    assert identical(seconds, [state["exp_avg_sq"] for state in optimizer.state.values()])
    for _ in range(10):
        step(1.0)
    columns = aadl.accelerator_of(optimizer).history.columns
    assert not any(column.moved or column.written is not None for column in columns)
    for _ in range(30):
        step(1.0)
    assert statistics(optimizer)["moved"] == 0 and statistics(optimizer)["accepted"] > 1
    assert bool(flat(model).isfinite().all())


def left_out(model, optimizer, amount, count):
    """Backward passes without steps."""
    for _ in range(count):
        optimizer.zero_grad()
        plus(amount)(model).backward()


def test_a_good_batch_after_three_bad_ones_is_stepped_with():
    model, optimizer = accelerated()
    left_out(model, optimizer, math.nan, 3)
    before = flat(model)
    left_out(model, optimizer, 0.0, 1)
    assert torch.equal(flat(model), before)
    optimizer.step()
    left_out(model, optimizer, math.nan, 3)
    train(model, optimizer, 4)
    assert statistics(optimizer)["reverted"] == 0 and statistics(optimizer)["steps"] == 25


def test_without_a_candidate_nothing_is_hidden():
    model = network()
    optimizer = aadl.accelerate(KINDS["SGD"](model.parameters()), **SETTINGS)
    train(model, optimizer, 5)
    left_out(model, optimizer, math.nan, 5)
    with torch.no_grad():
        next(model.parameters()).add_(0.3)
    train(model, optimizer, 1)
    assert statistics(optimizer)["moved"] == 1


class OnlyTheMiddle(torch.nn.Sequential):
    """Has parameters before and behind those in use."""

    def __init__(self):
        super().__init__(torch.nn.Linear(2, 2), *network(), torch.nn.Linear(2, 2))

    def forward(self, inputs):
        return self[3](self[2](self[1](inputs)))


def test_a_resumed_run_looks_at_the_same_parameters_and_knows_what_was_dropped():
    ends, model = [], OnlyTheMiddle()
    optimizer = aadl.accelerate(KINDS["momentum"](model.parameters()), **SETTINGS)
    train(model, optimizer, 20)
    left_out(model, optimizer, math.nan, 2)
    optimizer.zero_grad()
    squared_error(model).backward()  # by which the losses before are dropped
    again = copy.deepcopy(model)
    other = aadl.accelerate(KINDS["momentum"](again.parameters()), **SETTINGS)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    for each, its_optimizer in ((model, optimizer), (again, other)):
        seen = aadl.accelerator_of(its_optimizer).losses
        assert (
            len(seen.passes.dropped) + len(seen.passes.coming) == 3
        )  # gradients that were not saved lead to no step either
        assert [p.shape for p in seen.passes.sample] == [each[1].weight.shape, each[3].bias.shape]
        its_optimizer.zero_grad()
        train(each, its_optimizer, 5, loss=plus(10.0))
        ends.append((flat(each), copy.deepcopy(statistics(its_optimizer))))
    assert identical(*ends) and ends[0][1]["reverted"] == 1
