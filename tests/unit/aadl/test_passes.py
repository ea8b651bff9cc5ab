"""Which losses a step goes back to, where scripts clip, clear, replace or leave out the gradients between passes."""

import copy
import math
import threading

import pytest
import torch
from small_runs import INPUTS, TARGETS, flat, network, squared_error, statistics, through_a_file, train
from test_losses import KINDS, SETTINGS, accelerated, plus

import aadl
from aadl.passes import STUCK


def clipped_parts(model, optimizer, amount):
    """Micro-batches, each of which is clipped with those before it."""
    optimizer.zero_grad()
    for _ in range(STUCK + 2):
        (plus(amount)(model) / (STUCK + 2)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e3)


def row_by_row(model, optimizer, amount):
    """Gradients of each part are taken out, as private training and Fisher matrices do."""
    total = [torch.zeros_like(p) for p in model.parameters()]
    for rows in torch.arange(16).view(STUCK + 1, 4):
        optimizer.zero_grad()
        (((model(INPUTS[rows]) - TARGETS[rows]) ** 2).sum() / 16 + amount).backward()
        for sum_, p in zip(total, model.parameters(), strict=True):
            sum_ += p.grad
    for sum_, p in zip(total, model.parameters(), strict=True):
        p.grad = sum_


def adversarial(model, optimizer, amount):
    """Passes for the inputs alone come before that for the weights."""
    for _ in range(STUCK + 1):
        plus(amount)(model).backward()
        optimizer.zero_grad()
    plus(amount)(model).backward()


@pytest.mark.parametrize("passes", [clipped_parts, row_by_row, adversarial])
@pytest.mark.parametrize("kind", ["SGD", "Adam"])
def test_losses_that_usually_lead_to_no_step_do_not_end_a_trial(kind, passes):
    """Its candidate would go amid the step, which has the gradients of the candidate."""
    model = network()
    optimizer = aadl.accelerate(KINDS[kind](model.parameters()), **SETTINGS)
    accelerator, reverted_within = aadl.accelerator_of(optimizer), 0
    for _ in range(25):
        on_trial = accelerator.decisions.accepted is not None
        passes(model, optimizer, math.nan if on_trial else 0.0)
        reverted_within += statistics(optimizer)["reverted"]
        optimizer.step()
    assert statistics(optimizer)["accepted"] == 1 and reverted_within == 0
    assert statistics(optimizer)["reverted"] == (passes is not row_by_row)


@pytest.mark.parametrize(("steps", "usual"), [(range(20), STUCK + 1), ([10], STUCK + 1), ([9], 0)])
def test_a_candidate_goes_once_more_losses_than_usual_lead_to_no_step(steps, usual):
    """What was so in one of the last ten steps is usual."""
    model = network()
    optimizer = aadl.accelerate(KINDS["SGD"](model.parameters()), **SETTINGS)
    for step in range(20):
        optimizer.zero_grad()
        if step in steps:
            adversarial(model, optimizer, 0.0)
        else:
            squared_error(model).backward()
        optimizer.step()
    for number in range(1, usual + STUCK + 2):
        optimizer.zero_grad()
        plus(math.nan)(model).backward()
        assert statistics(optimizer)["reverted"] == (number > usual + STUCK)


def as_none(optimizer):
    optimizer.zero_grad()


def as_zeros(optimizer):
    optimizer.zero_grad(set_to_none=False)


def as_numbers(optimizer):
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = None if p.grad is None else p.grad.nan_to_num_(0, 0, 0)


@pytest.mark.parametrize("clear", [as_none, as_zeros, as_numbers])
@pytest.mark.parametrize("within_closure", [False, True])
def test_losses_whose_gradients_were_cleared_do_not_count(within_closure, clear):
    """The script steps all the same, so that momentum moves the weights, but for gradients that are None."""
    model, optimizer = accelerated(KINDS["momentum"])
    seen = aadl.accelerator_of(optimizer).losses

    def closure():
        optimizer.zero_grad()
        loss = squared_error(model) * math.nan
        loss.backward()
        clear(optimizer)
        return loss

    for _ in range(5):
        if within_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    assert seen.since == [] and bool(flat(model).isfinite().all())
    assert statistics(optimizer)["reverted"] == (clear is as_none)


def test_zero_gradients_of_a_plateau_count():
    """Nobody has cleared them: the loss is not finite there, and nothing leads back."""
    model, optimizer = accelerated()
    for _ in range(5):
        optimizer.zero_grad()
        (0 * squared_error(model) + math.inf).backward()
        optimizer.step()
    assert statistics(optimizer)["reverted"] == 1


def several_roots(model, optimizer):
    errors = (model(INPUTS) - TARGETS) ** 2
    torch.autograd.backward([errors, 0 * model[0].weight.sum() + 99], [torch.full((16, 1), 1 / 16), None])


def several_passes(model, optimizer):
    ((model(INPUTS) - TARGETS) ** 2).backward(torch.full((16, 1), 1 / 16))
    (0 * model[0].weight.sum() + 99).backward()


def replaced(model, optimizer):
    """Gradients of two losses are put together by hand."""
    kept = []
    for loss in (squared_error(model), 0 * squared_error(model) + 99):
        optimizer.zero_grad()
        loss.backward()
        kept.append([p.grad.clone() for p in model.parameters()])
    for p, first, second in zip(model.parameters(), *kept, strict=True):
        p.grad = first + second


@pytest.mark.parametrize("backward", [several_roots, several_passes, replaced])
def test_a_part_of_the_loss_is_not_the_loss(backward):
    model, optimizer = accelerated()
    for _ in range(5):
        optimizer.zero_grad()
        backward(model, optimizer)
        optimizer.step()
    seen = aadl.accelerator_of(optimizer).losses
    assert statistics(optimizer)["reverted"] == 0 and seen.since == []
    train(model, optimizer, 2)
    assert len(seen.since) == 2


def test_a_loss_that_another_thread_left_out_does_not_count():
    model, optimizer = accelerated()
    released, seen = threading.Event(), threading.Event()

    def left_out():
        train(model, optimizer, 1)
        optimizer.zero_grad()
        plus(math.nan)(model).backward()
        seen.set()
        released.wait(60)  # so that the next thread has another number

    first = threading.Thread(target=left_out)
    first.start()
    assert seen.wait(60)
    second = threading.Thread(target=train, args=(model, optimizer, 4))
    second.start()
    second.join()
    released.set()
    first.join()
    assert all(map(math.isfinite, aadl.accelerator_of(optimizer).losses.since))
    assert statistics(optimizer)["reverted"] == 0


def resumed(model, optimizer, make):
    """Another training, which goes on from the state of this one."""
    again = network()
    other = aadl.accelerate(make(again.parameters()), **SETTINGS)
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    return again, other


def test_a_resumed_run_sees_losses_in_whatever_thread_it_trains():
    model, optimizer = accelerated()
    again, other = resumed(model, optimizer, KINDS["SGD"])
    thread = threading.Thread(target=train, args=(again, other, 5), kwargs={"loss": plus(math.nan)})
    thread.start()
    thread.join()
    train(model, optimizer, 5, loss=plus(math.nan))
    assert statistics(other)["reverted"] == statistics(optimizer)["reverted"] == 1
    assert torch.equal(flat(again), flat(model))


@pytest.mark.parametrize("before", range(STUCK + 1))
@pytest.mark.parametrize("good", [0, 2])
@pytest.mark.parametrize("fused", [False, True])
def test_a_run_that_is_resumed_where_no_step_is_made_takes_the_candidate_back(fused, good, before):
    make = lambda p: torch.optim.Adam(p, lr=0.01, fused=fused)  # noqa: E731
    model, optimizer = accelerated(make)
    scalers = torch.amp.GradScaler("cpu"), torch.amp.GradScaler("cpu")

    def step(model, optimizer, scaler, amount):
        optimizer.zero_grad()
        scaler.scale(squared_error(model) * amount).backward()
        scaler.step(optimizer)
        scaler.update()

    for amount in (*[1.0] * good, *[math.nan] * before):
        step(model, optimizer, scalers[0], amount)
    again, other = resumed(model, optimizer, make)
    scalers[1].load_state_dict(scalers[0].state_dict())
    for each, its_optimizer, scaler in ((model, optimizer, scalers[0]), (again, other, scalers[1])):
        for _ in range(STUCK + 1):
            step(each, its_optimizer, scaler, math.nan)
    assert statistics(other)["reverted"] == statistics(optimizer)["reverted"] == 1
    assert torch.equal(flat(again), flat(model))


def test_a_resumed_run_compares_with_the_same_bound():
    """A bound in float32 would be another one."""
    model, optimizer = accelerated()
    _, other = resumed(model, optimizer, KINDS["SGD"])
    for each in (optimizer, other):
        seen = aadl.accelerator_of(each).losses
        seen.since = [float(seen.bound) * (1 + 1e-12)] * 5
    ours, theirs = (float(aadl.accelerator_of(each).losses.rise()) for each in (optimizer, other))
    assert ours == theirs > 0


@pytest.mark.parametrize("good", [0, 2])
@pytest.mark.parametrize("through", ["load_state_dict", ".data"])
def test_weights_that_somebody_puts_back_himself_stay(through, good):
    model, optimizer = accelerated()
    train(model, optimizer, good)
    mine = 0.5 * flat(model)
    for number in range(STUCK + 2):
        optimizer.zero_grad()
        plus(math.nan)(model).backward()
        if number == 1:
            halves = {name: 0.5 * value for name, value in model.state_dict().items()}
            if through == "load_state_dict":
                model.load_state_dict(halves)
            else:
                for name, p in model.named_parameters():
                    p.data.copy_(halves[name])
    assert torch.equal(flat(model), mine) and statistics(optimizer)["reverted"] == 0


def test_several_losses_of_one_graph():
    """The candidate goes at the first of two passes; the second one finds the weights of its graph unchanged."""
    model, optimizer = accelerated()
    plain = aadl.accelerator_of(optimizer).history.blocks[0].mapped.clone()
    for _ in range(STUCK + 1):
        optimizer.zero_grad()
        loss = squared_error(model) * math.nan
        loss.backward(retain_graph=True)
        loss.backward()
    assert statistics(optimizer)["reverted"] == 1 and torch.equal(flat(model), plain)
