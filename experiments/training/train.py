"""The only training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from experiments.distributed.devices import device_of
from experiments.distributed.ranks import Ranks
from experiments.training.attempts import AttemptTrace
from experiments.training.averaging import WeightAverage
from experiments.training.clock import Clock
from experiments.training.optimizers import answering
from experiments.training.problem import Problem
from experiments.training.result import Result, append
from experiments.training.stage import Stage
from experiments.training.updates import Updates

VALUE_SECONDS = "timing/"
"""Series of an evaluation with this prefix are seconds, which the loop adds up."""

Watch = Callable[[int, Mapping[str, float]], None]
"""A function that receives each entry of the series and its epoch or iteration."""


class Session(Protocol):
    """What keeps a run on disk and may end it early, see `experiments.runs.session`."""

    def restore(self, run: Training) -> bool:
        """Puts the run where it was saved last, if it was."""

    def after_step(self, run: Training, loss: Tensor) -> None:
        """The loop calls it after every step of the optimizer; may raise."""

    def after_interval(self, run: Training) -> None:
        """The loop calls it after every interval; may raise."""


def train(run: Training, session: Session | None = None, *, save_weights: bool = False) -> Result:
    """Trains interval by interval, as the plan of the problem divides the run, and evaluates off the clock.

    A session takes up a saved run, saves this one on the way, and may stop it. A loss that is not finite ends the run,
    and the result says where it diverged.
    """
    if session is None or not session.restore(run):
        run.begin()
    while run.goes_on:
        if not run.train_interval(session):
            break  # the time was up when the interval began
        if session is not None:
            session.after_interval(run)
    run.bar.close()
    return run.result(finished=True, weights=save_weights)


class Training:
    """A run in the making: everything that a step changes, so that it can be saved and taken up again.

    Args:
        problem: model, plan, loss and evaluation.
        stages: optimizers over the parameters of the model, each from its iteration on; the first has the schedule.
        ranks: this process; the gradients are averaged over `world_size` ranks.
        ema_decay: evaluates an exponential moving average of the weights, see `averaging.moving_average`.
        mean_epochs: evaluates, in this many last epochs, the mean of the weights after each of their steps.
        show_progress: a progress bar on a terminal, plain lines elsewhere.
        trace_attempts: whether the result has every attempt of the acceleration.
        watch: receives the entries of the series as they come, and the learning rate.

    Attributes:
        plan: what is trained in each interval.
        interval, step: the present one, from 1, and the steps taken in it.
        losses: of its steps.
        num_steps: steps taken in all.
        diverged_at: interval or iteration of the first loss that is not finite.
        is_lost: whether all ranks know that a loss was not finite.
        seconds: of what is not training, or a part of it, by series.
        longest_evaluation: in seconds.
    """

    def __init__(
        self,
        problem: Problem,
        stages: Sequence[Stage],
        ranks: Ranks,
        *,
        ema_decay: float | None = None,
        mean_epochs: int | None = None,
        show_progress: bool = False,
        trace_attempts: bool = False,
        watch: Watch | None = None,
    ) -> None:
        self.problem, self.stages, self.ranks = problem, stages, ranks
        self.plan = problem.plan()
        self.closure = problem.closure(stages, ranks)
        self.plan.start(stages[0].optimizer)
        self.average: WeightAverage | None = None
        if ema_decay is not None:
            self.average = WeightAverage(problem.model, ema_decay)
        elif mean_epochs is not None:
            self.average = WeightAverage(problem.model, None, self.plan.num_intervals - mean_epochs)
        self.updates = Updates() if self.plan.measures_updates else None
        self.attempts = AttemptTrace(stages) if trace_attempts else None
        self._watch = watch
        self.clock = Clock(problem.model)
        self.series: dict[str, list[float]] = {}
        self.interval, self.step, self.num_steps = 1, 0, 0
        self.losses: list[Tensor] = []
        self.diverged_at: int | None = None
        self.is_lost = False
        self.seconds: dict[str, float] = {}
        self.longest_evaluation = 0.0
        self._is_warm = False
        self._earlier_seconds = 0.0  # of the acceleration, in earlier processes
        self.bar = self.plan.bar(show_progress)

    @property
    def goes_on(self) -> bool:
        return self.interval <= self.plan.num_intervals and self.diverged_at is None

    @property
    def evaluated(self) -> nn.Module:
        """The model whose values are recorded."""
        is_averaged = self.average is not None and self.average.covers(self.interval)
        return self.average.model if is_averaged and self.average is not None else self.problem.model

    def begin(self) -> None:
        self.plan.begin(self)
        self._append(self._evaluate() | self._measures() | self.seconds, self.stages[:1], place=0)

    def train_interval(self, session: Session | None = None) -> bool:
        """Trains to the end of the present interval and evaluates; False if there was no time for a single step."""
        self.problem.model.train()
        self.closure.model.train()
        self.clock.start()
        for batch in self.plan.batches(self):
            if not self._is_warm:
                with self.clock.stopped():
                    self.closure.warm_up(batch)
                self._is_warm = True
            self.take_step(batch)
            if session is not None:
                session.after_step(self, self.losses[-1])
            if self.is_lost:
                break
        self.plan.after_steps(self)
        self.clock.stop()
        if not self.losses:
            return False
        self._finish_interval()
        return True

    def take_step(self, batch: Any) -> None:
        """Trains on one batch: one step of the optimizer, then the weights' average, the notes and the progress bar."""
        model = self.problem.model
        self.closure.choose_stage()
        self.plan.prepare(self, batch)
        if self.updates is not None:
            self.updates.before(model)
        self.losses.append(self.closure.step())
        if self.updates is not None:
            self.updates.after(model)
        if self.average is not None and self.average.covers(self.interval):
            self.average.update(model)
        self.num_steps += 1
        self.step += 1
        if self.attempts is not None:
            self.attempts.after_step(self.num_steps)
        self.plan.after_step(self)
        self.bar.move_to(self.plan.done(self))
        if self.bar.is_due:
            self.bar.show({"metrics/train/loss": float(self.losses[-1])})

    def _finish_interval(self) -> None:
        """Evaluates, keeps the values, and goes on to the next interval."""
        plan, losses = self.plan, torch.stack([loss.to(self.losses[0].device).reshape(()) for loss in self.losses])
        values = self._measures()
        of_losses, finite = plan.judge(self, losses)
        values |= of_losses
        if self.updates is not None:
            values["updates/relative_standard_deviation"] = self.updates.relative_standard_deviation()
        if plan.is_evaluated(self) or not finite:
            values |= self._evaluate()
        values |= self.seconds
        self._append(values, self.closure.begun(), plan.place(self))
        if self.is_lost or not (finite and math.isfinite(values.get("metrics/train/loss", 0.0))):
            self.diverged_at = plan.diverged_at(self, losses)
        self.interval, self.step, self.losses = plan.following(self), 0, []
        self.bar.move_to(plan.done(self))
        self.bar.show(values)

    def _append(self, values: Mapping[str, float], stages: Sequence[Stage], place: int) -> None:
        num_entries = len(self.series.get("timing/training_seconds", ()))
        statistics = [stage.statistics() for stage in stages if stage.statistics is not None]
        entry = append(self.series, num_entries, values, statistics)
        if self._watch is not None:
            self._watch(place, {"metrics/learning_rate": self.closure.learning_rate, **entry})

    def _evaluate(self) -> dict[str, float]:
        """Values of the evaluated model; their seconds are added to those of earlier evaluations."""
        start = time.monotonic()
        with answering(self.closure.optimizer):
            values = evaluate(self.problem, self.evaluated)
        for name in [name for name in values if name.startswith(VALUE_SECONDS)]:
            self.add_seconds(name, values.pop(name))
        self.longest_evaluation = max(self.longest_evaluation, time.monotonic() - start)
        return values

    def add_seconds(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def _measures(self) -> dict[str, float]:
        """Time, and what else is known without an evaluation."""
        if any(stage.seconds is not None for stage in self.stages):
            self.seconds["timing/acceleration_seconds"] = self._acceleration_seconds()
        return self.clock.values() | self.closure.measures() | self.plan.measures(self)

    def _acceleration_seconds(self) -> float:
        """Of all processes that had this run."""
        return self._earlier_seconds + sum(stage.seconds() for stage in self.stages if stage.seconds is not None)

    def mean_over_ranks(self, value: Tensor) -> Tensor:
        if self.ranks.world_size == 1:
            return value
        total = value.to(device_of(self.ranks), copy=True)
        dist.all_reduce(total)
        return total / self.ranks.world_size

    def _parts(self) -> dict[str, Any]:
        """What has a state of its own that all ranks share; None for what this run does without."""
        return {name: getattr(self, name) for name in ("average", "updates", "attempts", "closure", "clock", "plan")}

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What all ranks have in common, and what belongs to this one; all ranks must call."""
        self.problem.synchronize()
        losses = torch.stack(self.losses).cpu() if self.losses else torch.empty(0)
        stages, accelerators = zip(*(stage.state_dict() for stage in self.stages), strict=True)
        shared = {
            "model": self.problem.model.state_dict(),
            "stages": list(stages),
            **{name: part.state_dict() if part is not None else None for name, part in self._parts().items()},
            "problem": self.problem.state(),
            "series": {name: list(values) for name, values in self.series.items()},
            "seconds": dict(self.seconds),
            "acceleration_seconds": self._acceleration_seconds(),
            "mean_losses": self.mean_over_ranks(losses),
            "interval": self.interval,
            "step": self.step,
            "num_steps": self.num_steps,
            "diverged_at": self.diverged_at,
        }
        return shared, {"losses": losses, "accelerators": list(accelerators)}

    def load_state(self, shared: Mapping[str, Any], own: Mapping[str, Any] | None) -> None:
        """Continues where a run with the same settings was; `own` is None on ranks that did not take part in it."""
        device = next(self.problem.model.parameters()).device
        self.problem.model.load_state_dict(shared["model"])
        accelerators = own["accelerators"] if own is not None else [None] * len(self.stages)
        for stage, state, of_rank in zip(self.stages, shared["stages"], accelerators, strict=True):
            stage.load_state_dict(state, of_rank)
        for name, part in self._parts().items():
            if part is not None:
                part.load_state_dict(shared.get(name))
        for name in ("interval", "step", "num_steps", "diverged_at"):
            setattr(self, name, shared[name])
        self.series = {name: list(values) for name, values in shared["series"].items()}
        self.seconds, self._earlier_seconds = dict(shared["seconds"]), shared["acceleration_seconds"]
        losses = own["losses"] if own is not None else shared["mean_losses"]
        self.losses = list(losses.to(device))
        self.closure.batch = self.problem.restore(shared["problem"])
        self.closure.choose_stage()
        self.bar.start_at(self.plan.done(self))

    def result(self, *, finished: bool, weights: bool = False) -> Result:
        """The series so far; of a finished run also what is worth one evaluation at the end, and the weights."""
        more: dict[str, Any] = {"attempts": self.attempts.columns() if self.attempts is not None else None}
        if finished:
            with torch.no_grad(), answering(self.closure.optimizer):
                more |= {
                    "attributes": self.problem.finish(self.evaluated),
                    "fields": self.problem.fields(self.evaluated),
                    "weights": self.problem.export(self.evaluated) if weights else {},
                }
        return self.plan.result(self, finished=finished, **more)


def evaluate(problem: Problem, model: nn.Module) -> dict[str, float]:
    """Values of the problem in eval mode, without gradients; the mode is restored."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        values = problem.evaluate(model)
    model.train(was_training)
    return values
