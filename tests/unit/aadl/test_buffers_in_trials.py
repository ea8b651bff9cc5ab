"""Buffers of the modules that a closure calls are put back after a trial, however a module writes them."""

import copy

import pytest
import torch
from small_runs import identical, network, squared_error
from torch import nn

from aadl import trial_loss


def expanded():
    return torch.ones(1).expand(3)


def inference():
    with torch.inference_mode():
        return torch.ones(3) * 1


def in_pieces():
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("make", [expanded, inference, in_pieces])
def test_buffers_that_nobody_can_write_to_disturb_no_trial(make):
    model = network()
    model.register_buffer("fixed", make())
    plain, again = trial_loss.trial_losses(lambda: squared_error(model), [*model.parameters()], lambda: None)
    assert plain == again


class Keeping(nn.Module):
    """Keeps numbers of its last inputs in buffers, and calls `keep` to do so in one way of many."""

    def __init__(self, keep):
        super().__init__()
        self.keep = keep
        self.register_buffer("last", torch.zeros(6))

    def forward(self, x):
        self.keep(self, x.detach().mean(0))
        return x + self.last.mean()


def in_other_memory(module, values):
    module.last.data = 0.5 * (module.last + values)


def by_set(module, values):
    module.last.set_(0.5 * (module.last + values))


def growing(module, values):
    module.last.data = torch.cat([module.last.data, values])


def resized(module, values):
    length = len(module.last)
    module.last.resize_(length + 6)
    module.last[length:] = values


@pytest.mark.parametrize("keep", [in_other_memory, by_set, growing, resized])
def test_buffers_are_put_back_however_a_module_writes_them(keep):
    model = network(Keeping(keep))
    parameters = [*model.parameters()]

    def closure():
        return squared_error(model)

    untouched = copy.deepcopy(dict(model[1].named_buffers()))
    closure()
    assert not identical(untouched, dict(model[1].named_buffers()))
    before = copy.deepcopy(dict(model[1].named_buffers()))
    plain, again = trial_loss.trial_losses(closure, parameters, lambda: None)
    assert plain == again and identical(before, dict(model[1].named_buffers()))


class MakingOnce(nn.Module):
    """Makes a buffer in its first call, and remembers in Python that there is one."""

    def __init__(self, name):
        super().__init__()
        self.name, self.is_made = name, False
        self.register_buffer("late", None)

    def forward(self, x):
        if not self.is_made:
            self.register_buffer(self.name, torch.ones(6))
            self.is_made = True
        return x * getattr(self, self.name)


@pytest.mark.parametrize("name", ["late", "unknown"])
def test_buffers_that_a_module_makes_in_a_trial_stay_because_it_may_rely_on_them(name):
    model = network(MakingOnce(name))
    plain, again = trial_loss.trial_losses(lambda: squared_error(model), [*model.parameters()], lambda: None)
    assert plain == again and torch.equal(getattr(model[1], name), torch.ones(6))
    squared_error(model)


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_scripted_modules_are_left_as_they_were():
    model = network(nn.BatchNorm1d(6))
    scripted = torch.jit.script(model)
    before = copy.deepcopy([*model.buffers()])
    plain, again = trial_loss.trial_losses(lambda: squared_error(scripted), [*model.parameters()], lambda: None)
    assert plain == again
    assert identical(before, [*model.buffers()]) and identical(before, [*scripted.buffers()])
