"""The classes that a configuration may name: optimizers, schedules of the learning rate, and accelerations."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from pydantic import PositiveInt

import aadl
from experiments.settings.kinds import Component
from experiments.settings.schema import read_settings, refuse_unknown
from experiments.settings.suggestion import not_one_of
from experiments.training import optimizers as own

REFUSALS = (TypeError, AttributeError, ArithmeticError, LookupError, RuntimeError)
"""How torch refuses arguments, besides ValueError."""
PACKAGES = {"SOAP": "pytorch_optimizer", "AdamWScheduleFree": "schedulefree", "SGDScheduleFree": "schedulefree"}
"""Optimizers of packages that need not be there, and are imported when a configuration names one."""


@cache
def optimizers() -> dict[str, type[torch.optim.Optimizer] | str]:
    """Optimizers that a configuration may name: those of torch, of this suite, and of optional packages."""
    return _with_step(torch.optim) | _with_step(own) | PACKAGES


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """The class of an optimizer that a configuration may name; ValueError where its package is not there."""
    return _imported(name, optimizers()[name])


def _imported(name: str, found: Any) -> Any:
    """The class, or that of this name in a package."""
    if not isinstance(found, str):
        return found
    try:
        return getattr(importlib.import_module(found), name)
    except ImportError:
        raise ValueError(f"{name} needs the package {found}, which is not installed: pip install {found}") from None


def needs_residuals(name: str) -> bool:
    """Whether the optimizer asks the closure for residuals and their Jacobian, which only some problems have."""
    return getattr(optimizers()[name], "needs_residuals", False)


@cache
def schedulers() -> dict[str, type[torch.optim.lr_scheduler.LRScheduler]]:
    return _with_step(torch.optim.lr_scheduler)


def takes(name: str, argument: str) -> bool:
    """Whether the constructor of the optimizer has this argument."""
    return argument in inspect.signature(optimizer_class(name)).parameters


def _with_step(module: Any) -> dict[str, Any]:
    return {
        name: member
        for name, member in vars(module).items()
        if inspect.isclass(member) and hasattr(member, "step") and name not in ("Optimizer", "LRScheduler")
    }


def check_component(component: Component, classes: Mapping[str, Any]) -> None:
    """Raises ValueError for an unknown class, or an argument that its signature lacks; a text is its package."""
    name = component.name
    if name not in classes:
        raise ValueError(f"name {not_one_of(name, sorted(classes))}")
    parameters = list(inspect.signature(_imported(name, classes[name])).parameters.values())[1:]
    defaults = {entry.name: entry.default for entry in parameters}
    refuse_unknown(component.arguments, {"name": inspect.Parameter.empty} | defaults)


def make_optimizer(component: Component, parameters: Any) -> torch.optim.Optimizer:
    """The optimizer over the given parameters, ready to train."""
    optimizer = optimizer_class(component.name)(parameters, **component.arguments)
    if own.is_schedule_free(optimizer):
        optimizer.train()  # type: ignore[attr-defined]
    return optimizer


def make_scheduler(component: Component, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return schedulers()[component.name](optimizer, **component.arguments)


def check_optimizer(component: Component) -> torch.optim.Optimizer:
    """Builds the optimizer on one dummy weight, so that what torch refuses is a ValueError before training."""
    for key in ("lr", "momentum", "weight_decay", "eps"):
        value = component.arguments.get(key, 0.0)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{key} must be a number, got {value!r}")
    try:
        return make_optimizer(component, [torch.nn.Parameter(torch.zeros(2))])
    except REFUSALS as error:
        raise ValueError(_refusal(component, error)) from None


def check_scheduler(component: Component, optimizer: torch.optim.Optimizer) -> None:
    """Builds the scheduler over such an optimizer and steps once, so that what torch refuses is a ValueError.

    Some classes look at their arguments only in `step`, and one needs an argument there that the training has not.
    """
    check_component(component, schedulers())
    try:
        scheduler = make_scheduler(component, optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a scheduler that steps first
            scheduler.step()
    except REFUSALS as error:
        raise ValueError(_refusal(component, error)) from None


def _refusal(component: Component, error: Exception) -> str:
    """What torch refuses, with the arguments, since "tuple index out of range" names none."""
    arguments = ", ".join(f"{key} = {value!r}" for key, value in component.arguments.items())
    return f"{component.name} refuses {arguments or 'to be without arguments'}: {error}"


def accelerate(optimizer: torch.optim.Optimizer, arguments: Mapping[str, Any], **functions: Any) -> None:
    """`aadl.accelerate` with arguments from YAML, in which `history_dtype` is the name of a dtype of torch."""
    dtype = arguments.get("history_dtype")
    if isinstance(dtype, str):
        arguments = {**arguments, "history_dtype": getattr(torch, dtype, dtype)}
    aadl.accelerate(optimizer, **arguments, **functions)


def solves_residuals(arguments: Mapping[str, Any] | None) -> bool:
    """Whether an acceleration is that by the residuals of the loss."""
    kind = (arguments or {}).get("acceleration_type")
    return isinstance(kind, str) and kind.lower() == "nonlinear_gmres"


def check_acceleration(optimizer: Component, arguments: Mapping[str, Any], probes: Sequence[str]) -> None:
    """Checks names against the signature of `aadl.accelerate`, which judges the values; `probes` go with residuals."""
    parameters = list(inspect.signature(aadl.accelerate).parameters.values())[1:]
    # These are no settings: the library takes the process group of the launch, the suite the functions of the problem.
    others = ("process_group", "residuals", "check")
    defaults = {entry.name: entry.default for entry in parameters if entry.name not in others}
    if solves_residuals(arguments):
        defaults |= dict.fromkeys(probes)
        for name in probes:
            read_settings(PositiveInt | None, arguments.get(name), name)
    refuse_unknown(arguments, defaults)
    try:
        accelerate(check_optimizer(optimizer), {k: v for k, v in arguments.items() if k not in probes})
    except TypeError as error:
        raise ValueError(str(error)) from None
