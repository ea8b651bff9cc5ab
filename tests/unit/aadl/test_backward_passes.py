"""Watching backward passes changes nothing for anybody: other threads, compiled code, many optimizers, errors."""

import math
import threading
import warnings

import pytest
import torch
from small_runs import INPUTS, TARGETS, flat, is_torchs_engine, network, sgd, squared_error, statistics, train
from test_losses import SETTINGS
from torch._dynamo.testing import CompileCounter
from torch.autograd import Variable
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import aadl
from aadl.losses import WINDOW


def accelerated(model=None, **more):
    model = network() if model is None else model
    return model, aadl.accelerate(sgd(model, lr=0.02), **SETTINGS | more)


def losses(optimizer):
    return aadl.accelerator_of(optimizer).losses


def test_a_thousand_optimizers_take_no_deeper_stack():
    parameters = [torch.nn.Parameter(torch.ones(1)) for _ in range(1000)]
    optimizers = [aadl.accelerate(torch.optim.SGD([p], lr=0.1), **SETTINGS) for p in parameters]
    for _ in range(2):
        sum(p.square().sum() for p in parameters).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert all(len(losses(optimizer).recent) == 1 for optimizer in optimizers)


def test_the_losses_of_a_thread_are_its_own():
    """Nobody looks at gradients that another thread computes: reading them meanwhile ends Python."""
    seen, errors = {}, []
    barrier = threading.Barrier(2)

    def work(amount):
        try:
            model, optimizer = accelerated(torch.nn.Sequential(torch.nn.Linear(3, 200), torch.nn.Linear(200, 1)))
            barrier.wait()
            seen[amount] = []
            for _ in range(200):
                train(model, optimizer, 1, loss=lambda model: 1e-3 * squared_error(model) + amount)
                seen[amount] += losses(optimizer).recent[-1:]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(amount,)) for amount in (1000.0, 2000.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for amount, numbers in seen.items():
        assert len(numbers) == 199 and all(abs(number - amount) < 100 for number in numbers)


def test_a_training_that_moves_to_another_thread_is_seen_after_a_step():
    model, optimizer = accelerated()
    train(model, optimizer, 20)
    thread = threading.Thread(target=lambda: train(model, optimizer, 4, loss=lambda model: squared_error(model) + 30))
    thread.start()
    thread.join()
    assert len(losses(optimizer).since) == 3 and min(losses(optimizer).since) > 30


@pytest.mark.parametrize("compiled_autograd", [False, True])
def test_compiled_training_steps_compile_nothing_more(compiled_autograd):
    weights = []
    for watched in (False, True):
        torch._dynamo.reset()
        counter, model = CompileCounter(), network()
        optimizer = sgd(model, lr=0.02)
        if watched:  # hooks of the optimizer take frames of their own
            aadl.accelerate(optimizer, **SETTINGS | {"wait_iterations": 1000})

        def gradients(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            squared_error(model).backward()

        compiled = torch.compile(gradients, backend=counter)
        torch._dynamo.utils.counters.clear()
        with warnings.catch_warnings(), torch._dynamo.config.patch(compiled_autograd=compiled_autograd):
            warnings.filterwarnings("ignore", ".*AccumulateGrad.*|.*lru_cache.*")
            for _ in range(12):
                compiled()
                optimizer.step()
        weights.append((counter.frame_count, dict(torch._dynamo.utils.counters["frames"]), flat(model)))
    assert weights[0][:2] == weights[1][:2] and torch.equal(weights[0][2], weights[1][2])
    assert len(losses(optimizer).recent) == WINDOW


def test_the_engine_stays_one_of_torch():
    """Compiled backward passes ask for its type, and take what they queue from it."""
    _, optimizer = accelerated()
    engine, called = Variable._execution_engine, []
    assert isinstance(engine, torch._C._ImperativeEngine) and not is_torchs_engine()
    assert engine.is_checkpoint_valid()
    weights = torch.ones(2, requires_grad=True)
    weights.register_hook(lambda gradient: engine.queue_callback(lambda: called.append(True)))
    weights.sum().backward()
    assert called == [True] and aadl.remove_acceleration(optimizer) is optimizer


class Replacing:
    """The engine of somebody else, around the one that is there."""

    def __init__(self):
        self.engine = Variable._execution_engine

    def run_backward(self, *args, **kwargs):
        return self.engine.run_backward(*args, **kwargs)


def test_engines_of_others_around_it_ask_once(monkeypatch):
    model, optimizer = accelerated()
    train(model, optimizer, 1)
    monkeypatch.setattr(Variable, "_execution_engine", Replacing())
    other, second = accelerated()
    train(other, second, 1)
    for each, its_optimizer in ((model, optimizer), (other, second)):
        train(each, its_optimizer, 3)
        assert len(losses(its_optimizer).recent) == 3
        aadl.remove_acceleration(its_optimizer)
    assert isinstance(Variable._execution_engine, Replacing)
    monkeypatch.undo()
    aadl.remove_acceleration(accelerated()[1])
    assert is_torchs_engine()


def test_an_engine_that_somebody_puts_back_asks_again(monkeypatch):
    model, optimizer = accelerated()
    monkeypatch.setattr(Variable, "_execution_engine", Replacing())
    _, second = accelerated()
    monkeypatch.undo()
    other, third = accelerated()
    for each, its_optimizer in ((model, optimizer), (other, third)):
        train(each, its_optimizer, 3)
        assert len(losses(its_optimizer).recent) == 2  # nobody looks before the first step
    for its_optimizer in (optimizer, second, third):
        aadl.remove_acceleration(its_optimizer)
    assert is_torchs_engine()


def test_functions_are_traced_as_always():
    model, optimizer = accelerated()
    train(model, optimizer, 2)

    def gradient(inputs):
        model.zero_grad()
        model(inputs).square().mean().backward()
        return model[0].weight.grad.clone()

    traced = make_fx(gradient, tracing_mode="real")(INPUTS)
    assert torch.allclose(traced(INPUTS), gradient(INPUTS))


def test_gradients_made_in_inference_mode():
    model, optimizer = accelerated()
    train(model, optimizer, 2)
    squared_error(model).backward()
    with torch.inference_mode():
        for p in model.parameters():
            p.grad = 2 * p.grad
    optimizer.step()
    squared_error(network()).backward()


def stepping_in_the_pass(set_to_none):
    """An optimizer for each parameter, which steps as soon as its gradient is there."""
    model = network()
    optimizers = {p: aadl.accelerate(torch.optim.SGD([p], lr=0.02), **SETTINGS) for p in model.parameters()}

    def step(p):
        optimizers[p].step()
        optimizers[p].zero_grad(set_to_none)

    handles = [p.register_post_accumulate_grad_hook(step) for p in model.parameters()]
    return model, list(optimizers.values()), handles


@pytest.mark.parametrize("set_to_none", [False, True])
def test_steps_within_a_pass_see_none_of_its_losses(set_to_none):
    """It began before them, and ends after them."""
    model, optimizers, handles = stepping_in_the_pass(set_to_none)
    for _ in range(25):
        (
            squared_error(model) * math.nan if statistics(optimizers[0])["steps"] == 20 else squared_error(model)
        ).backward()
    assert not any(losses(optimizer).recent or losses(optimizer).passes.coming for optimizer in optimizers)
    for handle in handles:
        handle.remove()


def test_a_step_within_a_pass_may_choose_another_sample():
    model, optimizer = accelerated(store_each_nth=1, frequency=2)
    handle = model[2].bias.register_post_accumulate_grad_hook(lambda p: optimizer.step())
    for _ in range(5):
        optimizer.zero_grad()
        squared_error(model).backward()
    handle.remove()
    assert statistics(optimizer)["steps"] == 5


@pytest.mark.parametrize("way", ["hook", "closure"])
def test_a_pass_or_a_closure_that_raises_leaves_no_loss(way):
    model, optimizer = accelerated()
    train(model, optimizer, 20)
    handle = model[2].weight.register_hook(lambda gradient: 1 / 0)

    def closure():
        optimizer.zero_grad()
        (squared_error(model) * math.nan).backward()
        return 1 / 0

    if way == "closure":
        handle.remove()
    with pytest.raises(ZeroDivisionError):
        optimizer.step(closure) if way == "closure" else closure()
    handle.remove()
    train(model, optimizer, 5)
    assert statistics(optimizer)["reverted"] == 0 and len(losses(optimizer).recent) == WINDOW
    assert all(map(math.isfinite, losses(optimizer).recent))


def test_of_a_step_that_was_given_up_only_the_gradients_may_stay():
    """Gradients of a loss that is not finite are cleared in place, and the step left out."""
    model, optimizer = accelerated()
    train(model, optimizer, 20)
    (squared_error(model) * math.nan).backward()
    optimizer.zero_grad(set_to_none=False)
    for _ in range(5):
        squared_error(model).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    assert len(losses(optimizer).recent) == WINDOW and statistics(optimizer)["reverted"] == 0


def test_a_checkpointed_loss_is_seen_once():
    """Its inner pass begins at it as well."""
    model, optimizer = accelerated()
    for _ in range(2):
        optimizer.zero_grad()
        inputs = INPUTS.clone().requires_grad_()
        parts = checkpoint(lambda x: (model(x) - TARGETS).square().mean(), inputs, use_reentrant=True)
        (parts + 1).backward()
        optimizer.step()
    assert len(losses(optimizer).recent) == 1 and losses(optimizer).recent[0] > 1


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_nothing_is_computed_once_more(use_reentrant):
    """A saved factor of a loss may be packed by a checkpoint."""
    model, optimizer = accelerated()
    calls = []

    def loss(inputs):
        calls.append(True)
        return 2 * (model(inputs) - TARGETS).square().mean()

    train(model, optimizer, 1)
    optimizer.zero_grad()
    checkpoint(loss, INPUTS.clone().requires_grad_(), use_reentrant=use_reentrant).backward()
    assert len(calls) == 2 and len(losses(optimizer).passes.coming) == 1


def test_nothing_is_kept_of_a_removed_accelerator():
    model, optimizer = accelerated()
    accelerator = aadl.accelerator_of(optimizer)
    train(model, optimizer, 3)
    assert accelerator.losses.passes.sample
    aadl.remove_acceleration(optimizer)
    assert not accelerator.losses.passes.sample and not accelerator.losses.recent and is_torchs_engine()


class Unwilling(torch.Tensor):
    """Knows few functions of torch."""

    @classmethod
    def __torch_function__(cls, function, kinds, arguments=(), named=None):
        if getattr(function, "__name__", "") != "backward":
            raise TypeError
        return super().__torch_function__(function, kinds, arguments, named)


def test_losses_of_another_class():
    model, optimizer = accelerated()
    train(model, optimizer, 1)
    optimizer.zero_grad()
    loss = 2 * squared_error(model)
    loss.as_subclass(Unwilling).backward()
    assert losses(optimizer).passes.coming == []


def test_modes_see_nothing_of_it():
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, kinds, arguments=(), named=None):
            seen.append(function)
            return function(*arguments, **named or {})

    counts = []
    for watched in (False, True):
        model = network()
        optimizer = aadl.accelerate(sgd(model), **SETTINGS) if watched else sgd(model)
        train(model, optimizer, 1)
        optimizer.zero_grad()
        loss = squared_error(model)
        with Mode():
            loss.backward()
        counts.append(len(seen))
        seen.clear()
    assert counts[0] == counts[1] > 0 and losses(optimizer).passes.coming == [float(loss.detach())]
