"""A stage of a run: an optimizer with its acceleration, as a variant describes it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

import aadl
from aadl.attached import STATE_KEY
from experiments.settings.kinds import Component, in_steps
from experiments.settings.run_config import PublishedConfig, VariantConfig
from experiments.training.clock import HookSeconds
from experiments.training.components import accelerate, solves_residuals
from experiments.training.problem import Problem
from experiments.training.published import PublishedScheme


@dataclass(frozen=True)
class Stage:
    """An optimizer over the parameters of the problem's model, accelerated or not, from an iteration on.

    Attributes:
        statistics: reads the counters of the acceleration, None without one.
        after: first iteration.
        seconds: reads the time that the acceleration took, None where nothing measures it.
        accelerator: an acceleration by the residuals of the loss, which observes them; None for any other or none.
        memory: an acceleration whose state is not in that of the optimizer; has state_dict and load_state_dict.
    """

    optimizer: torch.optim.Optimizer
    statistics: Callable[[], Mapping[str, Any]] | None = None
    after: int = 0
    seconds: Callable[[], float] | None = None
    memory: Any = None
    accelerator: aadl.ResidualAccelerator | None = None

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """What the ranks have in common, from which any number goes on, and the state of this rank's residuals."""
        memory = self.memory.state_dict() if self.memory is not None else None
        state = self.optimizer.state_dict()
        if self.accelerator is None:
            return {"optimizer": state, "memory": memory}, None
        own = state[STATE_KEY]
        return {"optimizer": state | {STATE_KEY: own | {"rows": {}}}, "memory": memory}, own

    def load_state_dict(self, shared: Mapping[str, Any], own: Mapping[str, Any] | None) -> None:
        """Continues from a state; `own` is None on ranks that did not take part in the run."""
        self.optimizer.load_state_dict(dict(shared["optimizer"]))
        if self.memory is not None:
            self.memory.load_state_dict(shared["memory"])
        if self.accelerator is not None and own is not None:
            self.accelerator.load_state_dict(dict(own))


def make_stages(problem: Problem, variant: VariantConfig) -> list[Stage]:
    published = None
    if variant.published is not None:
        published = PublishedConfig(**in_steps(variant.published.model_dump(), problem.steps_per_epoch))
    stages = [_make_stage(problem, variant.optimizer, variant.acceleration, published)]
    if variant.then is not None:
        then = _make_stage(problem, variant.then.optimizer, variant.then.acceleration)
        stages.append(replace(then, after=variant.then.after))
    return stages


def _make_stage(
    problem: Problem,
    component: Component,
    acceleration: Mapping[str, Any] | None,
    published: PublishedConfig | None = None,
) -> Stage:
    """An optimizer of the problem, with the acceleration of aadl or the published one where there are settings."""
    optimizer = problem.optimizer(component)
    seconds = HookSeconds(optimizer)
    if acceleration is not None:
        _accelerate(problem, optimizer, in_steps(acceleration, problem.steps_per_epoch))
        accelerator = aadl.accelerator_of(optimizer)
        observed = accelerator if isinstance(accelerator, aadl.ResidualAccelerator) else None
        stage = Stage(optimizer, lambda: accelerator.statistics, accelerator=observed)
    elif published is not None:
        scheme = PublishedScheme(optimizer, published)
        stage = Stage(optimizer, lambda: scheme.statistics, memory=scheme)
    else:
        return Stage(optimizer)
    return replace(stage, seconds=seconds.enclose()) if problem.times_acceleration else stage


def _accelerate(problem: Problem, optimizer: torch.optim.Optimizer, arguments: Mapping[str, Any]) -> None:
    """Accelerates the optimizer, by the residuals of the problem's loss where the settings ask for it."""
    if not solves_residuals(arguments):
        accelerate(optimizer, arguments)
        return
    names = inspect.signature(problem.least_squares).parameters
    found = problem.least_squares(**{name: arguments[name] for name in names if name in arguments})
    settings = {name: value for name, value in arguments.items() if name not in names}
    accelerate(optimizer, settings, residuals=found.solved, check=found.checked)
