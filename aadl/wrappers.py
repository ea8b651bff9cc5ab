"""Wrappers around optimizers: which of the optimizers inside is accelerated, and which wrappers cannot be.

No package is imported: wrappers are known by what they hold and by the names of their classes.
"""

from __future__ import annotations

import inspect
import re
import sys
import warnings
from typing import Any, NamedTuple

from torch.optim import Optimizer

from aadl.parameters import all_parameters

INSIDE = ("Lookahead",)
"""Classes of wrappers that change the weights after the step inside: that step is the map, theirs is not."""
LEARNS_ITS_RATE = (
    "estimates its learning rate from the way since the first weights, which extrapolation lengthens: the rate stays "
    "too large"
)
REFUSED = {
    "AggMo": "keeps several momentum buffers, which do not follow a candidate",
    "DAdapt": LEARNS_ITS_RATE,
    "MADGRAD": "computes the weights from sums of all gradients, which do not follow a candidate",
    "NovoGrad": "normalizes the gradients before their momentum, so that its steps do not shrink near a minimum",
    "Prodigy": LEARNS_ITS_RATE,
    "ScheduleFree": "averages the weights over all its steps, so that every step is another map",
    "Rprop": "changes the step size of every weight at every step, by the signs of its last two gradients, so that its "
    "updates say nothing of the next ones",
    "TRAC(Optimizer)?$": "rescales the whole way from the first weights at every step, which leaves no map of the "
    "weights alone",
}
"""Patterns of names of optimizers that ended worse with acceleration than without it (docs/optimizers.md), and why."""
SHARDING = (
    "apex.contrib.optimizers.distributed", "colossalai.booster", "colossalai.zero", "deepspeed.runtime",
    "fairscale.optim.oss", "megatron",
)  # fmt: skip
"""Modules whose optimizers hold a part of the parameters on each rank, in plain tensors that look like whole ones."""
STATE_HOOKS = (
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


class Target(NamedTuple):
    """The optimizer to accelerate, and how it is wrapped."""

    optimizer: Optimizer
    """The one whose step is the map."""
    kind: str
    """"partitioned" inside a ZeroRedundancyOptimizer (every rank steps its part of the parameters), "averaged" inside
    a PostLocalSGDOptimizer (every rank steps its own copy of all), else ""."""
    carriers: list[Optimizer]
    """Those whose `state_dict` may be called for it."""
    process_group: Any = None
    """Of a ZeroRedundancyOptimizer."""


def chain_of(optimizer: Any) -> list[Any]:
    """The optimizer, the one that it holds, the one that this holds, and so on.

    Raises:
        ValueError: it is no optimizer and holds none.
    """
    chain = [optimizer]
    while len(inner := _held(chain[-1])) == 1 and not any(inner[0] is link for link in chain):
        chain += inner
    if not isinstance(chain[-1], Optimizer) or not _trains(optimizer):
        name = type(optimizer).__name__
        raise ValueError(f"optimizer must be a torch.optim.Optimizer, got {name}{_advice(optimizer)}")
    return chain


def target_of(optimizer: Any) -> Target:
    """The optimizer to accelerate: the outermost one of the chain whose own step runs hooks.

    Raises:
        ValueError: it is no optimizer, or one whose steps cannot be accelerated.
    """
    chain = chain_of(optimizer)
    for place, link in enumerate(chain):
        _check(link)
        kind = _kind(link)
        if kind == "partitioned":  # a consolidated state would carry the whole history over the network
            return Target(chain[place + 1], kind, [], link.process_group)
        if kind == "averaged":
            return Target(chain[place + 1], kind, [chain[place + 1]])
        inside = not _runs_hooks(link) or _is_inside(link)
        if inside and place + 1 < len(chain) and _same(link, chain[place + 1]):
            continue
        if not _runs_hooks(link):
            raise ValueError(
                f"{type(link).__name__} cannot be accelerated: its steps run no hooks, because it does not call "
                f"torch.optim.Optimizer.__init__, and it holds no optimizer that steps the same parameters"
                f"{_advice(link)}"
            )
        return Target(link, "", [carrier for carrier in chain if _carries_state(carrier)])
    raise AssertionError("a chain ends with an optimizer that holds none")


def warn_of_loads_without_hooks(optimizer: Any) -> None:
    """Warn at a save that a load will not restore the history, because some classes load without torch's function."""
    if _hands_on(optimizer, "load_state_dict", {"super"}):
        return
    name = type(optimizer).__name__
    warnings.warn(
        f"{name}.load_state_dict passes over the history of aadl: after it, call "
        f"aadl.accelerator_of(optimizer).load_state_dict(state['aadl']) with the state that was saved",
        stacklevel=4,
    )


def warn_of_saves_without_hooks(optimizer: Optimizer) -> None:
    """Warn that the states of the optimizer carry no history, because its class makes them without torch's function."""
    if not _hands_on(optimizer, "state_dict", {"super", "state_dict"}):
        name = type(optimizer).__name__
        warnings.warn(
            f"{name}.state_dict passes over the history of aadl: save aadl.accelerator_of(optimizer).state_dict() "
            f"beside it, and load it after it",
            stacklevel=6,
        )


def _hands_on(optimizer: Optimizer, name: str, signs: set[str]) -> bool:
    """Whether a method is that of torch, or may call it: one of its names is a sign, or it shows none."""
    method = inspect.unwrap(getattr(type(optimizer), name))
    code = getattr(method, "__code__", None)  # what is compiled, and objects that are called, have none
    return code is None or method is inspect.unwrap(getattr(Optimizer, name)) or not signs.isdisjoint(code.co_names)


def _held(wrapper: Any) -> list[Any]:
    """The optimizers among the attributes of an object, unless they step other parameters.

    No property is asked, since some wrappers forward them all.
    """
    values = {id(value): value for value in getattr(wrapper, "__dict__", {}).values() if _trains(value)}
    own = _parameters(wrapper)
    return [value for value in values.values() if not own or not (inner := _parameters(value)) or own & inner]


def _advice(thing: Any) -> str:
    """What to do with optimizers in a list, a dictionary, or the attributes of an object; "" where there are none."""
    attributes = list(getattr(thing, "__dict__", {}).values())
    held = [list(each.values()) if isinstance(each, dict) else each for each in (thing, *attributes, attributes)]
    found = {id(one) for each in held if isinstance(each, (list, tuple, set)) for one in each if _trains(one)}
    return f": accelerate {'each of the optimizers' if len(found) > 1 else 'the optimizer'} inside" if found else ""


def _trains(thing: Any) -> bool:
    """Whether an object has the methods of an optimizer (a scheduler has no `zero_grad`)."""
    kind = type(thing)
    return isinstance(thing, Optimizer) or all(callable(getattr(kind, name, None)) for name in ("step", "zero_grad"))


def _runs_hooks(optimizer: Any) -> bool:
    """Whether the step of this very object runs the hooks registered with it."""
    own = getattr(optimizer, "__dict__", {})
    hooked = getattr(getattr(type(optimizer), "step", None), "hooked", False)
    return bool(hooked) and "_optimizer_step_pre_hooks" in own and "_optimizer_step_post_hooks" in own


def _is_inside(wrapper: Any) -> bool:
    """Whether the step inside is accelerated although the wrapper runs hooks.

    Users of sharpness-aware minimization may call two half steps in place of `step`; the second calls the one inside.
    """
    names = {kind.__name__ for kind in type(wrapper).__mro__}
    return not names.isdisjoint(INSIDE) or callable(getattr(type(wrapper), "second_step", None))


def _carries_state(optimizer: Any) -> bool:
    return all(name in optimizer.__dict__ for name in STATE_HOOKS)


def _same(wrapper: Any, inner: Any) -> bool:
    """Whether both are made of the same parameters (a wrapper may have none of its own)."""
    own = _parameters(wrapper)
    return not own or own == _parameters(inner)


def _parameters(optimizer: Any) -> set[int]:
    groups = getattr(optimizer, "param_groups", None)
    return set() if groups is None else set(map(id, all_parameters(optimizer)))


def _check(link: Any) -> None:
    """Raise ValueError for what cannot be accelerated: classes, by their names, and what one option asks for."""
    if any(group.get("differentiable") for group in getattr(link, "param_groups", None) or ()):
        raise ValueError(
            f"{type(link).__name__} with differentiable=True cannot be accelerated: gradients through its steps would "
            f"not lead through candidates"
        )
    for kind in type(link).__mro__:
        for pattern, reason in REFUSED.items():
            if re.search(pattern, kind.__name__, re.IGNORECASE):
                raise ValueError(f"{kind.__name__} cannot be accelerated: it {reason}")
        if kind.__module__.startswith(SHARDING):
            raise ValueError(
                f"{kind.__name__} cannot be accelerated: {kind.__module__} cuts parameters into shards of its own; use "
                f"DistributedDataParallel, torch.distributed.fsdp.fully_shard or ZeroRedundancyOptimizer"
            )


def _kind(link: Any) -> str:
    """The kind of a wrapper of torch.distributed.optim, see `Target`."""
    package: Any = sys.modules.get("torch.distributed.optim")
    if package is None:  # nobody can have made one
        return ""
    if isinstance(link, getattr(package, "ZeroRedundancyOptimizer", ())):
        if getattr(link, "_overlap_with_ddp", False):
            raise ValueError("ZeroRedundancyOptimizer with overlap_with_ddp=True calls no step() to accelerate")
        return "partitioned"
    return "averaged" if isinstance(link, getattr(package, "PostLocalSGDOptimizer", ())) else ""
