"""Small training runs, and what the tests compare of them."""

import copy
import gc
import io
import itertools
import shutil
import sysconfig
from os import environ
from pathlib import Path

import torch
from torch import nn

import aadl

INPUTS = torch.linspace(-1, 1, 48).reshape(16, 3)
TARGETS = torch.sin(3 * INPUTS).sum(1, keepdim=True)
EAGER = {"wait_iterations": 2, "history_depth": 4, "store_each_nth": 1, "frequency": 2}
"""Settings that attempt an acceleration at every second step."""
ALWAYS = EAGER | {"safeguard": False, "average": False}
RESIDUAL = EAGER | {"safeguard": "residual", "average": False}


def missing_for_compilation():
    """What torch.compile needs to build for a CPU and does not find here; "" where nothing is missing."""
    name, header = environ.get("CXX", "g++"), Path(sysconfig.get_path("include")) / "Python.h"
    if not shutil.which(name) and not shutil.which("clang++"):
        return f"no C++ compiler: neither {name} (CXX) nor clang++ is on the PATH"
    return "" if header.is_file() else f"the headers of Python are not installed: {header} is missing"


def sgd(model, lr=0.05, **more):
    return torch.optim.SGD(model.parameters(), lr=lr, **more)


def adam(model, **settings):
    """Accelerated where there are settings; so is `nesterov`."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    return aadl.accelerate(optimizer, **settings) if settings else optimizer


def nesterov(model, **settings):
    optimizer = sgd(model, lr=0.02, momentum=0.9, nesterov=True)
    return aadl.accelerate(optimizer, **settings) if settings else optimizer


def is_torchs_engine():
    """Whether nobody watches backward passes any more, once optimizers that nobody holds are gone."""
    gc.collect()
    torch.zeros((), requires_grad=True).backward()  # lets go of those who are gone
    return type(torch.autograd.Variable._execution_engine).__module__.startswith("torch")


def statistics(optimizer):
    return aadl.accelerator_of(optimizer).statistics


def network(*more, bias=True):
    """A tanh network that is the same at every call."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 6, bias=bias), *more, nn.Tanh(), nn.Linear(6, 1, bias=bias))


def flat(model):
    """All parameters in a row."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def squared_error(model):
    return (model(INPUTS) - TARGETS).square().mean()


def closure_of(model, optimizer, loss=squared_error):
    """The closure of PyTorch's documentation."""

    def closure():
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        return value

    return closure


def train(model, optimizer, steps, *, with_closure=False, loss=squared_error, after=lambda step: None):
    """Losses before each step; after(step) is called after it."""
    losses = []
    closure = closure_of(model, optimizer, loss)
    for step in range(1, steps + 1):
        if with_closure:
            losses.append(float(optimizer.step(closure).detach()))
        else:
            losses.append(float(closure().detach()))
            optimizer.step()
        after(step)
    return losses


def snapshot(model, optimizer):
    """Everything that training changes, apart from the accelerator."""
    state = optimizer.state_dict()
    state.pop("aadl", None)
    return copy.deepcopy({"model": model.state_dict(), "optimizer": state})


def through_a_file(state):
    """A state dict after torch.save and torch.load."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def identical(left, right):
    """Whether two nested structures hold the same values, bit for bit (NaNs equal each other, 0 and -0 do not)."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(identical(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(identical, left, right))
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and left.shape == right.shape and _bytes(left) == _bytes(right)
    return type(left) is type(right) and (left == right or (left != left and right != right))


def _bytes(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def register_first(optimizer, hook):
    """A step post-hook that sees what the base optimizer made, before the accelerator sees it."""
    name = optimizer.register_step_post_hook(hook).id
    optimizer.register_step_pre_hook(lambda *_: optimizer._optimizer_step_post_hooks.move_to_end(name, last=False))


class Pairs:
    """Records, from outside, the pairs (x, g) of an optimizer without macro-steps; make it before `accelerate`."""

    def __init__(self, optimizer):
        self.optimizer, self.pairs, self.starts = optimizer, [], []
        optimizer.register_step_pre_hook(lambda *_: self.starts.append(self._values()))
        register_first(optimizer, lambda *_: self.pairs.append((self.starts[-1], self._values())))

    def _values(self):
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]
        return torch.cat([p.detach().reshape(-1) for p in parameters])

    def columns(self, count):
        """Differences of residuals and of mapped iterates between the newest count + 1 pairs, oldest first."""
        pairs = self.pairs[-count - 1 :]
        mapped = [g for _, g in pairs]
        residuals = [g - x for x, g in pairs]
        differences = [torch.stack([b - a for a, b in itertools.pairwise(v)]) for v in (residuals, mapped)]
        return differences[0], differences[1]


def stored_columns(accelerator):
    """The same, as the accelerator holds them; for parameters of one dtype."""
    history = accelerator.history
    block, order = history.blocks[0], history.order()
    return block.delta_residual[order], block.delta_mapped[order]
