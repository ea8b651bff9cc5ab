"""Wrappers around optimizers: the step that is the map is accelerated, once, or one sentence refuses the wrapper."""

import collections
import copy
import io

import pytest
import torch
from small_runs import EAGER, identical, network, sgd, snapshot, statistics, train
from torch.optim import Optimizer

import aadl

STEPS = 24


class Delegating:
    """As LARC of apex: no torch.optim.Optimizer, hands everything on."""

    def __init__(self, optimizer):
        self.optim = optimizer

    @property
    def param_groups(self):
        return self.optim.param_groups

    def zero_grad(self):
        self.optim.zero_grad()

    def step(self, closure=None):
        return self.optim.step(closure)

    def state_dict(self):
        return self.optim.state_dict()

    def load_state_dict(self, state):
        self.optim.load_state_dict(state)


class WithoutInit(Delegating, Optimizer):
    """As AcceleratedOptimizer of accelerate: a torch.optim.Optimizer that never calls its __init__."""


class Imitating:
    """As those of Lightning and Fabric: takes the class of what it wraps, and forwards all that it does not have."""

    def __init__(self, optimizer):
        self._optimizer = optimizer
        self.__class__ = type("Imitation", (Imitating, type(optimizer)), {})

    @property
    def optimizer(self):
        return self._optimizer

    def __getattr__(self, name):
        return getattr(self._optimizer, name)

    def step(self, closure=None):
        return self.optimizer.step(closure)

    def state_dict(self):
        return self.optimizer.state_dict()

    def load_state_dict(self, state):
        self.optimizer.load_state_dict(state)


class OwnHooks(WithoutInit):
    """As those of pytorch_optimizer: has step hooks of its own, which run around all that it does."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self._optimizer_step_pre_hooks = collections.OrderedDict()
        self._optimizer_step_post_hooks = collections.OrderedDict()
        self._patch_step_function()

    @property
    def state(self):
        return self.optim.state

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.clamp_(-1, 1)
        return self.optim.step()


class Sharpness(Optimizer):
    """Sharpness-aware minimization, which people call in two halves."""

    def __init__(self, optimizer):
        super().__init__(optimizer.param_groups, {})
        self.base_optimizer = optimizer
        self.param_groups, self.state = optimizer.param_groups, optimizer.state

    @torch.no_grad()
    def first_step(self):
        self.old = [(p, p.clone()) for group in self.param_groups for p in group["params"]]
        for p, _ in self.old:
            p.add_(p.grad, alpha=0.01)

    @torch.no_grad()
    def second_step(self):
        for p, value in self.old:
            p.copy_(value)
        self.base_optimizer.step()

    def step(self, closure=None):
        self.first_step()
        self.second_step()

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.base_optimizer.param_groups, self.base_optimizer.state = self.param_groups, self.state


class Lookahead(OwnHooks):
    """Goes half of the way back to where it was five steps ago."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.count, self.slow = 0, [p.detach().clone() for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        self.optim.step(closure)
        self.count += 1
        fast = [p for group in self.param_groups for p in group["params"]]
        for p, slow in zip(fast, self.slow, strict=True) if self.count % 5 == 0 else ():
            slow.lerp_(p, 0.5)
            p.copy_(slow)


INSIDE = [Delegating, WithoutInit, Imitating, Sharpness, Lookahead]
WRAPPERS = [*INSIDE, OwnHooks, lambda optimizer: Imitating(WithoutInit(optimizer))]


def named(wrappers):
    return [pytest.param(wrapper, id=getattr(wrapper, "__name__", "").strip("<>")) for wrapper in wrappers]


def wrapped(wrapper, **settings):
    model = network()
    inner = sgd(model, momentum=0.5)
    outer = wrapper(inner)
    if settings:
        assert aadl.accelerate(outer, **settings) is outer
    return model, inner, outer


def hooks_of(*optimizers):
    """Number of hooks attached to anything."""
    return sum(
        len(value)
        for optimizer in optimizers
        for name, value in vars(optimizer).items()
        if name.startswith("_optimizer_") and name.endswith("_hooks")
    )


@pytest.mark.parametrize("wrapper", named(WRAPPERS))
def test_a_wrapper_is_accelerated_found_reset_and_left_through_itself_and_what_it_holds(wrapper):
    model, inner, outer = wrapped(wrapper, **EAGER)
    accelerator = aadl.accelerator_of(outer)
    for given in (outer, Delegating(outer), Delegating(WithoutInit(outer))):
        assert aadl.accelerator_of(given) is accelerator
        with pytest.raises(ValueError, match="accelerated already"):
            aadl.accelerate(given)
    train(model, outer, STEPS)
    counts = statistics(outer)
    assert counts["steps"] == STEPS  # once for each step of the user
    assert counts["accepted"] > 0
    assert aadl.reset_history(outer) is outer and counts["resets"] == {"user": 1}
    assert aadl.remove_acceleration(outer) is outer
    assert hooks_of(inner, outer) == 0
    with pytest.raises(ValueError, match="is not accelerated"):
        aadl.accelerator_of(outer)


@pytest.mark.parametrize("wrapper", named(WRAPPERS))
def test_the_step_inside_is_the_map_unless_the_wrapper_runs_hooks_around_all_of_it(wrapper):
    _, inner, outer = wrapped(wrapper, **EAGER)
    assert aadl.accelerator_of(outer).optimizer is (outer if wrapper is OwnHooks else inner)


@pytest.mark.parametrize("wrapper", named([wrapper for wrapper in WRAPPERS if wrapper is not Lookahead]))
def test_the_state_of_a_wrapper_carries_the_history(wrapper):
    model, _, outer = wrapped(wrapper, **EAGER)
    train(model, outer, STEPS // 2)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": outer.state_dict()}, file)
    train(model, outer, STEPS // 2)

    resumed_model, _, resumed = wrapped(wrapper, **EAGER)
    file.seek(0)
    saved = torch.load(file)
    resumed_model.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(resumed_model, resumed, STEPS // 2)
    assert identical(snapshot(model, outer), snapshot(resumed_model, resumed))
    assert identical(copy.deepcopy(statistics(outer)), copy.deepcopy(statistics(resumed)))


def test_an_optimizer_of_other_parameters_is_not_taken_for_the_one_inside():
    models = network(), network()
    first, second = map(sgd, models)
    first.partner = aadl.accelerate(second, **EAGER)
    aadl.accelerate(first, **EAGER)
    for model, optimizer in zip(models, (first, second), strict=True):
        train(model, optimizer, STEPS)
        assert statistics(optimizer)["steps"] == STEPS
    assert aadl.accelerator_of(first) is not aadl.accelerator_of(second)


def test_an_optimizer_that_knows_its_wrapper_ends_the_chain():
    _, inner, outer = wrapped(Delegating)
    inner.owner = outer
    aadl.accelerate(outer, **EAGER)
    assert aadl.accelerator_of(outer).optimizer is inner


def test_two_halves_of_a_step_count_as_one():
    model, _, outer = wrapped(Sharpness, **EAGER)
    for _ in range(STEPS):
        for half in (outer.first_step, outer.second_step):
            outer.zero_grad()
            model(torch.ones(4, 3)).square().sum().backward()
            half()
    assert statistics(outer)["steps"] == STEPS


class OfNothing(Optimizer):
    """As implementations of old: neither __init__ of torch.optim.Optimizer nor an optimizer inside."""

    def __init__(self, parameters):
        self.param_groups, self.state = [{"params": list(parameters)}], collections.defaultdict(dict)

    def step(self, closure=None):
        pass


class OfSomethingElse(WithoutInit):
    """Steps parameters of its own besides."""

    @property
    def param_groups(self):
        return [*self.optim.param_groups, {"params": [torch.nn.Parameter(torch.ones(2))]}]


class WithoutGroups(Delegating):
    param_groups = None


class TRAC(OwnHooks):
    pass


class Madgrad(torch.optim.SGD):
    """The name of `MADGRAD` in other letters."""


class Tracked(torch.optim.SGD):
    """No TRAC."""


Sharding = type("DeepSpeedZeroOptimizer", (Delegating,), {"__module__": "deepspeed.runtime.zero.stage_1_and_2"})


class WithoutStateHooks(torch.optim.SGD):
    """Raises in the midst of attaching."""

    def register_load_state_dict_post_hook(self, hook):
        raise AttributeError("no hooks here")


def differentiable(model):
    return torch.optim.SGD([2 * p for p in model.parameters()], lr=0.1, differentiable=True)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda model: OfNothing(model.parameters()), ValueError, "OfNothing cannot be accelerated: its steps run no"),
        (lambda model: OfSomethingElse(sgd(model)), ValueError, "OfSomethingElse cannot be accelerated"),
        (lambda model: TRAC(sgd(model)), ValueError, "TRAC cannot be accelerated: it rescales"),
        (lambda model: Delegating(TRAC(sgd(model))), ValueError, "TRAC cannot be accelerated: it rescales"),
        (lambda model: Madgrad(model.parameters(), lr=0.1), ValueError, "Madgrad cannot be accelerated: it computes"),
        (differentiable, ValueError, "SGD with differentiable=True cannot be accelerated: gradients through its steps"),
        (lambda model: Sharding(sgd(model)), ValueError, "DeepSpeedZeroOptimizer cannot be accelerated.*fully_shard"),
        (lambda model: WithoutStateHooks(model.parameters(), lr=0.1), AttributeError, "no hooks here"),
    ],
    ids=["nothing", "something else", "TRAC", "TRAC inside", "Madgrad", "graph", "shards", "without state hooks"],
)
def test_what_cannot_be_accelerated_is_refused_by_name_with_nothing_attached(make, error, message):
    optimizer = make(network())
    held = [value for value in vars(optimizer).values() if isinstance(value, Optimizer)]
    with pytest.raises(error, match=message):
        aadl.accelerate(optimizer)
    assert hooks_of(optimizer, *held) == 0
    with pytest.raises(ValueError, match="is not accelerated"):
        aadl.accelerator_of(optimizer)


def test_a_name_that_only_begins_as_a_refused_one_is_accelerated():
    aadl.accelerate(Tracked(network().parameters(), lr=0.1))


def test_a_wrapper_whose_groups_are_none_is_accelerated():
    aadl.accelerate(WithoutGroups(sgd(network())))


def test_an_object_that_only_holds_an_optimizer_is_refused():
    optimizer = sgd(network())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    with pytest.raises(ValueError, match=r"torch\.optim\.Optimizer, got StepLR"):
        aadl.accelerate(scheduler)
    assert hooks_of(optimizer) == 0


class Several:
    """Hands its steps on to all optimizers inside."""

    def __init__(self, optimizers):
        self.optimizers = optimizers

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self):
        pass


class SeveralWithoutInit(Several, Optimizer):
    """The same, as a torch.optim.Optimizer."""


class Pair(Several):
    def __init__(self, optimizers):
        self.first, self.second = optimizers


@pytest.mark.parametrize(
    "wrap",
    [list, tuple, lambda both: dict(enumerate(both)), Several, SeveralWithoutInit, Pair],
    ids=["list", "tuple", "dict", "wrapper", "optimizer", "attributes"],
)
def test_several_optimizers_are_refused_with_what_to_do(wrap):
    both = [sgd(network()), sgd(network())]
    with pytest.raises(ValueError, match=r": accelerate each of the optimizers inside$"):
        aadl.accelerate(wrap(both))
    assert hooks_of(*both) == 0
    with pytest.raises(ValueError, match=r"got list: accelerate the optimizer inside$"):
        aadl.accelerate(both[:1])
    with pytest.raises(ValueError, match=r"got list$"):
        aadl.accelerate(list(network().parameters()))


@pytest.mark.parametrize("value", [torch.tensor(0.0), torch.zeros(3), "best", iter([])])
def test_what_only_looks_like_several_is_not_searched(value):
    class Trainer:
        def __init__(self):
            self.best = value

    for thing in (Trainer(), value):
        with pytest.raises(ValueError, match="optimizer must be a"):
            aadl.accelerate(thing)
