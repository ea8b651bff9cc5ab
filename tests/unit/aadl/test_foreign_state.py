"""Optimizers that keep other things than torch.optim does: no step dies of it, and what cannot be right is refused."""

import copy
import functools
import math
import warnings
from contextlib import nullcontext

import pytest
import torch
from small_runs import EAGER, INPUTS, TARGETS, identical, network, sgd, snapshot, statistics, train
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

import aadl
from aadl.history import KINDS


class Foreign(torch.optim.Optimizer):
    """Momentum of 0.5 in a tensor that `make` turns into something else; `groups` changes what the groups say."""

    def __init__(self, parameters, make=lambda momentum: momentum, groups=lambda group: None, later=lambda self: None):
        super().__init__(parameters, {"lr": 0.05})
        self.make, self.later, self.momenta = make, later, {}
        for group in self.param_groups:
            groups(group)

    def zero_grad(self, set_to_none=True):
        for p in self.momenta:
            p.grad = None

    @torch.no_grad()
    def step(self, closure=None):
        for p in [p for group in self.param_groups for p in group["params"] if isinstance(p, torch.Tensor)]:
            momentum = self.momenta.setdefault(p, torch.zeros_like(p)).mul_(0.5).add_(p.grad)
            self.state[p] = {"exp_avg": self.make(momentum)}
            p.sub_(momentum, alpha=0.05)
        self.later(self)


class Quantized(torch.Tensor):
    """A tensor without memory, as the 8-bit states of torchao."""

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype, device=values.device)

    def __init__(self, values):
        self.codes = values.to(torch.bfloat16)

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), keywords=None):
        if function is torch.ops.aten.detach.default:
            return cls(arguments[0].codes.to(arguments[0].dtype))
        raise NotImplementedError(function)


def plain_values(optimizer):
    """What people keep beside the state of the parameters."""
    optimizer.state["steps"] = optimizer.state.get("steps", 0) + 1
    optimizer.state["losses"] = [0.1, 0.2]
    optimizer.state["norms"] = torch.ones(3)
    optimizer.state["prev_flat_grad"] = None


def other_keys(optimizer):
    """State that changes its keys at every step."""
    optimizer.state["steps"] = optimizer.state.get("steps", 0) + 1
    for p, momentum in optimizer.momenta.items():
        odd = optimizer.state["steps"] % 2
        optimizer.state[p] = {"momentum_buffer" if odd else "other": momentum}


def no_dictionaries(optimizer):
    for p, momentum in optimizer.momenta.items():
        optimizer.state[p] = (momentum, torch.ones(3))


def bare_tensors(optimizer):
    optimizer.state.update(optimizer.momenta)


def rates_of_its_own(optimizer):
    """None at first, a number from the fifth step on."""
    optimizer.calls = getattr(optimizer, "calls", 0) + 1
    optimizer.param_groups[0]["lr"] = None if optimizer.calls < 5 else 0.01


OPTIMIZERS = {
    "itself": {},
    "quantized momentum": {"make": Quantized},
    "momentum in bfloat16": {"make": lambda momentum: momentum.bfloat16()},
    "momentum in float64": {"make": lambda momentum: momentum.double()},
    "factored momentum": {"make": lambda momentum: momentum.reshape(-1)[:1]},
    "sparse momentum": {"make": lambda momentum: momentum.to_sparse()},
    "momentum elsewhere": {"make": lambda momentum: momentum.to("meta")},
    "momentum as a list": {"make": lambda momentum: momentum.tolist()},
    "no momentum yet": {"make": lambda momentum: None},
    "momentum as another tensor each time": {"make": torch.clone},
    "plain values": {"later": plain_values},
    "other keys": {"later": other_keys},
    "no dictionaries": {"later": no_dictionaries},
    "bare tensors": {"later": bare_tensors},
    "lr=None": {"groups": lambda group: group.update(lr=None)},
    "no lr": {"groups": lambda group: group.pop("lr")},
    "lr of its own": {"later": rates_of_its_own},
    "lr as a list": {"groups": lambda group: group.update(lr=[0.1, 0.2])},
    "lr as a tensor": {"groups": lambda group: group.update(lr=torch.tensor(0.05))},
    "lr as a tensor of one element": {"groups": lambda group: group.update(lr=torch.tensor([0.05]))},
    "lr as a tensor that is learned": {"groups": lambda group: group.update(lr=torch.tensor(0.05, requires_grad=True))},
    "lr as many": {"groups": lambda group: group.update(lr=torch.ones(3))},
    "no tensors": {"groups": lambda group: group["params"].extend([None, "name", 3])},
}
ELSEWHERE = (
    "other keys",
    "no dictionaries",
    "bare tensors",
    *(n for n, given in OPTIMIZERS.items() if "make" in given),
)
"""Those whose momentum itself is not under its key in a dictionary."""


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_whatever_an_optimizer_keeps_it_is_accelerated_and_no_step_dies(name):
    model = network()
    optimizer = aadl.accelerate(Foreign(model.parameters(), **OPTIMIZERS[name]), **EAGER)
    losses = train(model, optimizer, 40)
    counts = statistics(optimizer)
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    assert counts["steps"] == 40 and counts["accepted"] > 0
    aadl.accelerator_of(optimizer).state_dict()

    plain_model = network()
    plain = Foreign(plain_model.parameters(), **OPTIMIZERS[name])
    train(plain_model, plain, 40)
    assert not identical(plain_model.state_dict(), model.state_dict())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_momentum_is_cleared_where_it_can_be_and_left_alone_elsewhere(name):
    """Nonlinear GMRES clears it at an accepted candidate."""
    model = network()
    optimizer = aadl.accelerate(
        Foreign(model.parameters(), **OPTIMIZERS[name]), "nonlinear_gmres", residuals=lambda: model(INPUTS) - TARGETS,
        frequency=2, momentum="zero",
    )  # fmt: skip
    for _ in range(20):
        if not statistics(optimizer)["accepted"]:
            train(model, optimizer, 2)
    assert statistics(optimizer)["accepted"] == 1
    cleared = not any(momentum.any() for momentum in optimizer.momenta.values())
    assert cleared == (name not in ELSEWHERE)


@pytest.mark.parametrize("name", ["itself", "momentum in bfloat16"])
def test_momentum_follows_the_parameters_where_it_has_their_type(name):
    model = network()
    optimizer = aadl.accelerate(Foreign(model.parameters(), **OPTIMIZERS[name]), **EAGER)
    train(model, optimizer, 6)
    kinds = [block.kind for block in aadl.accelerator_of(optimizer).history.blocks]
    assert ("momentum" in kinds) == (name == "itself")


class LoadsAlone(torch.optim.SGD):
    """Loads without the function of torch, as the optimizers of bitsandbytes do, and so without any hook."""

    def load_state_dict(self, state_dict):
        for p, state in zip(self.param_groups[0]["params"], state_dict["state"].values(), strict=True):
            self.state[p] = {key: value.clone() for key, value in state.items()}


class SavesAlone(torch.optim.SGD):
    def state_dict(self):
        return {"momenta": [state["momentum_buffer"] for state in self.state.values()]}


def test_states_that_will_carry_no_history_are_announced():
    model = network()
    with pytest.warns(UserWarning, match="SavesAlone.state_dict passes over the history of aadl: save aadl.accelerato"):
        optimizer = aadl.accelerate(SavesAlone(model.parameters(), lr=0.05, momentum=0.5), **EAGER)
    train(model, optimizer, 11)
    other = network()
    other.load_state_dict(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = aadl.accelerate(SavesAlone(other.parameters(), lr=0.05, momentum=0.5), **EAGER)
    for p, momentum in zip(other.parameters(), optimizer.state_dict()["momenta"], strict=True):
        again.state[p]["momentum_buffer"] = momentum.clone()
    aadl.accelerator_of(again).load_state_dict(copy.deepcopy(aadl.accelerator_of(optimizer).state_dict()))
    train(model, optimizer, 10)
    train(other, again, 10)
    assert identical([*model.parameters()], [*other.parameters()]) and statistics(again)["accepted"] > 0


class SavesByAnObject(torch.optim.SGD):
    state_dict = functools.partial(dict)


def test_a_method_without_code_is_no_obstacle():
    optimizer = aadl.accelerate(SavesByAnObject(network().parameters(), lr=0.05))
    assert statistics(optimizer)["steps"] == 0


class LoadsAsEver(torch.optim.SGD):
    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)


@pytest.mark.parametrize("kind", [LoadsAlone, LoadsAsEver])
def test_a_load_that_will_pass_over_the_history_is_announced_at_the_save(kind):
    model = network()
    optimizer = aadl.accelerate(kind(model.parameters(), lr=0.05, momentum=0.5), **EAGER)
    train(model, optimizer, 11)
    alone = kind is LoadsAlone
    said = pytest.warns(
        UserWarning, match=r"LoadsAlone\.load_state_dict passes over.*load_state_dict\(state\['aadl'\]\)"
    )
    with said if alone else nullcontext():
        saved = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    other_model = network()
    other = aadl.accelerate(kind(other_model.parameters(), lr=0.05, momentum=0.5), **EAGER)
    other_model.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    if alone:
        assert statistics(other)["steps"] == 0
        aadl.accelerator_of(other).load_state_dict(saved["optimizer"]["aadl"])
    for run in ((model, optimizer), (other_model, other)):
        train(*run, 10)
    assert identical(model.state_dict(), other_model.state_dict())
    assert statistics(other)["steps"] == 21


class Doubled(nn.Parameter):
    """A parameter of a class of its own, with memory as any other."""


@pytest.mark.parametrize("kind", [Doubled, nn.Parameter])
def test_a_class_of_its_own_is_no_reason_to_refuse_a_parameter(kind):
    ends = []
    for make in (kind, nn.Parameter):
        model = network()
        model[0].weight = make(model[0].weight.detach().clone())
        optimizer = aadl.accelerate(sgd(model), **EAGER)
        train(model, optimizer, 12)
        assert statistics(optimizer)["accepted"] > 0
        ends.append(snapshot(model, optimizer))
    assert identical(*ends)


def test_parameters_without_plain_memory_are_refused():
    for parameter, message in [
        (nn.Parameter(Quantized(torch.ones(2))), r"parameter of shape \(2,\) is a Quantized"),
        (nn.LazyLinear(3).weight, "UninitializedParameter without a shape: run the model once"),
    ]:
        optimizer = torch.optim.SGD([parameter], lr=0.1)
        with pytest.raises(ValueError, match=message):
            aadl.accelerate(optimizer)
        with pytest.raises(ValueError, match="is not accelerated"):
            aadl.accelerator_of(optimizer)


def accelerate_shards(rank, size):
    """What becomes of the optimizer of a FullyShardedDataParallel model, by use_orig_params."""
    del rank, size
    outcomes = {}
    for whole in (False, True):
        model = FullyShardedDataParallel(network(), device_id=torch.device("cpu"), use_orig_params=whole)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        try:
            aadl.accelerate(optimizer, **EAGER)
        except ValueError as error:
            outcomes[whole] = str(error)
        outcomes[whole, "losses"] = train(model, optimizer, 4)  # the plain optimizer trains on
        outcomes[whole, "parts"] = [p.numel() for p in model.parameters()]
    return outcomes


@pytest.mark.smoke
def test_shards_of_fully_sharded_data_parallel_are_refused_on_every_rank(spawn_ranks):
    outcomes = spawn_ranks(accelerate_shards, 2)
    for outcome in outcomes:
        for whole in (False, True):
            assert "use torch.distributed.fsdp.fully_shard" in outcome[whole]
            assert outcome[whole, "losses"][-1] < outcome[whole, "losses"][0]
    assert any(0 in outcome[True, "parts"] for outcome in outcomes)  # also where a rank has nothing of a parameter


class Around(torch.optim.Optimizer):
    """Keeps nothing itself; its momentum is that of the optimizer inside it."""

    def __init__(self, inside):
        super().__init__(inside.param_groups, {})
        self.param_groups, self.inside = inside.param_groups, inside

    def step(self, closure=None):
        return self.inside.step(closure)


@pytest.mark.parametrize("make", [torch.optim.Adam, functools.partial(torch.optim.SGD, momentum=0.9)])
def test_the_momentum_of_an_optimizer_inside_is_extrapolated(make):
    ends = []
    for wrap in (Around, lambda inside: inside):
        model = network()
        optimizer = aadl.accelerate(wrap(make(model.parameters(), lr=0.02)), **EAGER)
        train(model, optimizer, 60)
        ends.append((model.state_dict(), copy.deepcopy(statistics(optimizer))))
        assert any(block.kind == "momentum" for block in aadl.accelerator_of(optimizer).history.blocks)
    assert identical(*ends) and ends[0][1]["accepted"] > 3


class Both(torch.optim.Optimizer):
    """Two optimizers inside, each of which has its part of the parameters."""

    def __init__(self, model):
        super().__init__(model.parameters(), {"lr": 0.02})
        parameters = list(model.parameters())
        self.first = torch.optim.SGD(parameters[::2], lr=0.02, momentum=0.9)
        self.second = torch.optim.Adam(parameters[1::2], lr=0.02)

    def step(self, closure=None):
        self.first.step()
        self.second.step()


def test_the_momentum_of_several_optimizers_inside_is_extrapolated_and_their_state_is_theirs():
    model = network()
    optimizer = aadl.accelerate(Both(model), **EAGER)
    train(model, optimizer, 60)
    count = len(list(model.parameters()))
    assert len(optimizer.first.state) == len(optimizer.second.state) == count / 2
    assert len(optimizer.first.state_dict()["state"]) == count / 2
    history = aadl.accelerator_of(optimizer).history
    lengths = [sum(block.mapped.numel() for block in history.blocks if block.kind == kind) for kind in KINDS]
    assert lengths[0] == lengths[1] and bool(history.blocks[1].mapped.all()) and statistics(optimizer)["accepted"] > 3
