"""Runs on several ranks, and what the tests compare of them; a module of its own so that processes can import it."""

import copy
import sys
from contextlib import ExitStack, contextmanager, nullcontext
from unittest import mock

import torch
import torch.distributed as dist
from small_runs import EAGER, identical
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import aadl
from aadl import acceptance, decisions, trial_loss

INPUTS = torch.linspace(-1, 1, 48, dtype=torch.float64).reshape(16, 3)
TARGETS = torch.sin(3 * INPUTS).sum(1, keepdim=True)
RESIDUAL = EAGER | {"safeguard": "residual", "average": False}
LOSS = EAGER | {"safeguard": "loss", "average": False}
UNSAFE = EAGER | {"safeguard": False, "average": False, "frequency": 6}
"""At every sixth step, since nothing else keeps what rounding does from growing from one candidate to the next."""
CALM = {"reg_acc": 1e-3}
"""Keeps coefficients from magnifying rounding, where runs that sum in another order are compared."""
COLLECTIVES = (
    "all_reduce", "all_gather", "all_gather_single", "all_gather_into_tensor", "broadcast", "reduce_scatter_tensor",
    "reduce_scatter_single",
)  # fmt: skip


def network():
    """83 elements, which neither 2 nor 4 divides; the last bias is one element. The same at every call."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def nine_elements():
    """On four ranks the windows of the flat row have 3, 3, 3 and 0 of them."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 1), nn.Tanh(), nn.Linear(1, 1, bias=False), nn.Tanh(), nn.Linear(1, 2)).double()


def five_elements():
    """On four ranks the windows have 2, 2, 1 and 0 elements."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 1), nn.Tanh(), nn.Linear(1, 1, bias=False)).double()


def replica(model, rank, size):
    return DistributedDataParallel(model)


def shard(model, mesh):
    """fully_shard of every layer and of the rest."""
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def sharded(model, rank, size):
    return shard(model, init_device_mesh("cpu", (size,)))


def alone(model, rank, size):
    return model


def momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def light_momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.02, momentum=0.8)


def gentle_momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.02, momentum=0.5)


def gentle_adam(parameters):
    return torch.optim.Adam(parameters, lr=0.02)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.05)


def whole_batch(model, rank, size):
    return (model(INPUTS) - TARGETS).square().mean()


def part_of_batch(model, rank, size):
    """Equal parts: the mean of the gradients over ranks is that of the whole batch."""
    return (model(INPUTS[rank::size]) - TARGETS[rank::size]).square().mean()


def at_odds(model, rank, size):
    """Every rank has other data, and every second one wants the opposite."""
    rows = slice(16 // size * rank, 16 // size * (rank + 1))
    return (1 + rank / 4) * (model(INPUTS[rows]) - (-1) ** rank * TARGETS[rows]).square().mean()


def values_of(model):
    """All parameters in a row, gathered where they are sharded."""
    parts = [p.detach() for p in model.parameters()]
    return torch.cat([(p.full_tensor() if hasattr(p, "full_tensor") else p).reshape(-1) for p in parts])


class Watch:
    """What an accelerated run does, step by step, as seen from outside.

    Attributes:
        calls: per step, (name, bytes of the input, whether aadl made the call) of every collective through Python.
        events: per step, how often a Gram matrix was made to accelerate.
        gammas: the coefficients of every mixing problem.
    """

    def __init__(self):
        self.calls, self.events, self.gammas = [[]], [0], []

    def next_step(self):
        self.calls.append([])
        self.events.append(0)

    @contextmanager
    def watching(self):
        with ExitStack() as stack:
            for name in COLLECTIVES:
                if hasattr(dist, name):
                    stack.enter_context(mock.patch.object(dist, name, self._counted(name)))
            solve, accelerate = decisions.coefficients_of, decisions.Decisions.accelerate

            def keep_gamma(*args, **more):
                coefficients = solve(*args, **more)
                self.gammas.append(coefficients.mixing.gamma.clone())
                return coefficients

            def keep_event(*args):
                self.events[-1] += 1
                return accelerate(*args)

            stack.enter_context(mock.patch.object(decisions, "coefficients_of", keep_gamma))
            stack.enter_context(mock.patch.object(decisions.Decisions, "accelerate", keep_event))
            yield self

    def _counted(self, name):
        original = getattr(dist, name)

        def call(*args, **kwargs):
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            caller = sys._getframe(1).f_globals["__name__"]
            self.calls[-1].append((name, min(t.nbytes for t in tensors), caller.startswith("aadl")))
            return original(*args, **kwargs)

        return call

    @property
    def own_calls(self):
        """Per step, (name, bytes) of what aadl sent."""
        return [[(name, size) for name, size, own in step if own] for step in self.calls]


class Alternating:
    """A stand-in for aadl.acceptance.must_revert: takes every third judged candidate back, whatever it predicted."""

    def __init__(self):
        self.judged, self.last = 0, None

    def __call__(self, square, along, candidate):
        if candidate is not self.last:
            self.judged, self.last = self.judged + 1, candidate
        return self.judged % 3 == 1


def reverting():
    return mock.patch.object(acceptance, "must_revert", Alternating())


def refusing():
    """The loss safeguard takes no candidate, so that the pairs are those of the plain run, bit for bit."""
    return mock.patch.object(trial_loss, "mean_over_ranks", lambda *_: (1.0, 2.0, 1.0))


SAME_ON_RANKS = {  # arguments of run
    "residual": {"settings": RESIDUAL},
    "refused": {"settings": LOSS | {"reg_acc": 1e-2}, "closure": True, "context": refusing},
    "loss": {"settings": LOSS, "closure": True},
    "unsafe": {"settings": UNSAFE},
    "always": {"settings": EAGER | {"average": "always", "average_window": 2}, "make": adam},
    "adam": {"settings": RESIDUAL | {"store_each_nth": 2, "frequency": 4}, "make": adam},
    "coefficients only": {"settings": RESIDUAL | {"state_coupling": "combine"}},
    "reverts": {"settings": RESIDUAL, "context": reverting},
}
"""What ranks that share a history, or the parameters, must do like one process with everything."""


def run(
    rank=0,
    size=1,
    settings=None,
    *,
    wrap=alone,
    make=momentum,
    build=network,
    loss=whole_batch,
    closure=False,
    steps=60,
    context=nullcontext,
    after=lambda step, model, optimizer: None,
):
    """Train; settings None is without acceleration. Returns what the tests compare."""
    model = wrap(build(), rank, size)
    optimizer = make(model.parameters())
    if settings is not None:
        aadl.accelerate(optimizer, **settings)
    outcome = go_on(rank, size, model, optimizer, 1, steps, loss, closure, context, after)
    if settings is not None:
        outcome["bytes"] = aadl.accelerator_of(optimizer).history_bytes
    return outcome


def go_on(
    rank, size, model, optimizer, first, last, loss=whole_batch, closure=False, context=nullcontext,
    after=lambda step, model, optimizer: None,
):  # fmt: skip
    """Steps first..last of a run."""

    def compute():
        optimizer.zero_grad()
        value = loss(model, rank, size)
        value.backward()
        return value

    watch = Watch()
    with watch.watching(), context():
        for step in range(first, last + 1):
            if closure:
                optimizer.step(compute)
            else:
                compute()
                optimizer.step()
            after(step, model, optimizer)
            watch.next_step()
    return {
        "weights": values_of(model),
        "statistics": None if aadl.attached.find_accelerator(optimizer) is None else statistics_of(optimizer),
        "gammas": watch.gammas,
        "calls": watch.calls,
        "own": watch.own_calls,
        "events": watch.events,
    }


def statistics_of(optimizer):
    return copy.deepcopy(aadl.accelerator_of(optimizer).statistics)


def outcome(model, optimizer):
    """Weights, in float64 without loss, and statistics."""
    return {"weights": values_of(model).double(), "statistics": statistics_of(optimizer)}


def agree(outcomes):
    """Whether all ranks have the same weights, bit for bit."""
    return all(torch.equal(outcomes[0]["weights"], other["weights"]) for other in outcomes)


def check_same_run(ours, expected, name, *, gammas=1e-8, weights=1e-10):
    """Checks that all ranks agree bit for bit, and that their run is the expected one up to rounding.

    An accepted candidate that differs by one rounding is magnified by the differences after it.
    """
    assert agree(ours), name
    assert all(identical(ours[0]["statistics"], other["statistics"]) for other in ours), name
    assert counts_of(ours[0]) == counts_of(expected), name
    assert gamma_distance(ours[0], expected) < gammas, name
    assert distance(ours[0], expected) < weights, name


def distance(left, right):
    """Largest difference of the weights of two outcomes."""
    return float((left["weights"] - right["weights"]).abs().max())


def gamma_distance(left, right):
    """Largest difference of the coefficients relative to the largest of a problem; inf for unequal events."""
    if len(left["gammas"]) != len(right["gammas"]) or not left["gammas"]:
        return float("inf")
    worst = 0.0
    for ours, theirs in zip(left["gammas"], right["gammas"], strict=True):
        if ours.shape != theirs.shape:
            return float("inf")
        worst = max(worst, float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1)))
    return worst


def counts_of(outcome):
    """The counters alone: whole numbers, which rounding does not touch."""
    return {key: value for key, value in outcome["statistics"].items() if not isinstance(value, float)}
