"""Training by iterations, which are evaluations of the gradient, on points that are sampled on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

import aadl
from aadl.attached import find_accelerator
from experiments.distributed.devices import device_of
from experiments.training.optimizers import LINE_SEARCHES
from experiments.training.plan import Plan, Scheduling
from experiments.training.progress import Bar
from experiments.training.result import Result, padded

if TYPE_CHECKING:
    from experiments.training.train import Training


class Iterations(Plan):
    """Intervals of `evaluate_every` iterations; an iteration is an evaluation of the gradient (or of a Jacobian).

    A step that takes several iterations may reach beyond the end of its interval, and the evaluation follows the step.
    The schedule, which belongs to the first stage, steps once an iteration.

    Args:
        points: (model, iteration) -> the batch at that iteration; the same object as long as the points are the same.
        num_iterations: the run ends with the step that reaches them, >= 1.
        evaluate_every: iterations between two evaluations, >= 1.
        schedule: makes the learning-rate schedule; None for a constant rate.
        max_seconds: the run ends with the step that reaches so many seconds of training; None for no limit.
        resets_history: whether other points make L-BFGS, SSBroyden and aadl forget what they saw before.
        measures_updates: see `Plan`.
    """

    def __init__(
        self,
        points: Callable[[nn.Module, int], Any],
        num_iterations: int,
        evaluate_every: int,
        schedule: Scheduling | None = None,
        *,
        max_seconds: float | None = None,
        resets_history: bool = False,
        measures_updates: bool = False,
    ) -> None:
        super().__init__(math.ceil(num_iterations / evaluate_every), schedule, measures_updates)
        self._points, self._num_iterations, self._evaluate_every = points, num_iterations, evaluate_every
        self._max_seconds = math.inf if max_seconds is None else max_seconds
        self._resets_history = resets_history
        self._evaluated = [0]  # iteration of each entry in the series
        self._steps: list[int] = []  # iteration after each step of the present interval

    def bar(self, enabled: bool) -> Bar:
        limit = self._max_seconds if self._max_seconds < math.inf else None
        return Bar(self._num_iterations, "iterations", enabled, max_seconds=limit, shows_rate=True)

    def done(self, run: Training) -> int:
        return run.closure.iterations

    def begin(self, run: Training) -> None:
        run.closure.batch = self._points(run.problem.model, 0)

    def batches(self, run: Training) -> Iterator[Any]:
        """The points of one step after the other, until the interval or the time is over."""
        target = min(run.interval * self._evaluate_every, self._num_iterations)
        if not run.losses:  # otherwise the interval goes on, and so does the list
            self._steps = []
        while (iteration := run.closure.iterations) < target and not self._is_time_up(run):
            yield run.problem.to_device(self._points(run.problem.model, iteration))

    def _is_time_up(self, run: Training) -> bool:
        """Whether the training has lasted long enough by the clock of rank 0."""
        if self._max_seconds == math.inf:
            return False
        up = torch.tensor(float(run.clock.seconds() >= self._max_seconds), device=device_of(run.ranks))
        if run.ranks.world_size > 1:
            dist.broadcast(up, src=0)
        return bool(up)

    def prepare(self, run: Training, batch: Any) -> None:
        """Hands the points to the closure, and limits a line search to the evaluations that are left."""
        closure, optimizer = run.closure, run.closure.optimizer
        searches = isinstance(optimizer, LINE_SEARCHES)
        if searches:
            group = optimizer.param_groups[0]
            group["max_eval"] = max(1, min(group["max_eval"], self._num_iterations - closure.iterations))
        if batch is not closure.batch and self._resets_history:
            if searches:
                optimizer.state.clear()
            if find_accelerator(optimizer) is not None:
                aadl.reset_history(optimizer)
        closure.batch = batch

    def after_step(self, run: Training) -> None:
        before = self._steps[-1] if self._steps else self._evaluated[-1]
        self._steps.append(run.closure.iterations)
        if run.closure.optimizer is run.stages[0].optimizer:
            self.step_scheduler(self._steps[-1] - before)

    def after_steps(self, run: Training) -> None:
        self._evaluated += self._steps[-1:]  # none where the time was up before a step

    def judge(self, run: Training, losses: Tensor) -> tuple[dict[str, float], bool]:
        return {}, bool(losses.isfinite().all())

    def diverged_at(self, run: Training, losses: Tensor) -> int:
        """The step whose loss was not finite first; the last one where the evaluation was not."""
        bad = ~losses.isfinite()
        return self._steps[int(bad.int().argmax())] if bool(bad.any()) else self._steps[-1]

    def measures(self, run: Training) -> dict[str, float]:
        return {
            "metrics/evaluations": float(run.closure.evaluations),
            "metrics/learning_rate": run.closure.learning_rate,
        }

    def place(self, run: Training) -> int:
        return self._evaluated[-1]

    def following(self, run: Training) -> int:
        """The interval of the next step, because the last step may have gone beyond several."""
        if self._evaluated[-1] >= self._num_iterations:
            return self.num_intervals + 1
        return self._evaluated[-1] // self._evaluate_every + 1

    def result(self, run: Training, *, finished: bool, **more: Any) -> Result:
        reason = "iterations" if self._evaluated[-1] >= self._num_iterations else "time"
        return Result(
            series=padded(run.series, len(self._evaluated)),
            diverged_epoch=None,
            num_steps=run.num_steps,
            iterations=np.asarray(self._evaluated, dtype=np.int64),
            diverged_iteration=run.diverged_at,
            stop_reason=reason if run.diverged_at is None else "diverged",
            **more,
        )

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"evaluated": list(self._evaluated), "steps": list(self._steps)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._evaluated, self._steps = list(state["evaluated"]), list(state["steps"])
