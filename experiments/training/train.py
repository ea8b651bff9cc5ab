"""The only training loop."""

from __future__ import annotations

import inspect
import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import aadl
from aadl.attached import STATE_KEY, find_accelerator
from experiments.distributed.devices import device_of
from experiments.distributed.ranks import Ranks
from experiments.images.settings import ImageTrainingConfig
from experiments.pinn.settings import PinnTrainingConfig
from experiments.training.components import make_scheduler
from experiments.training.optimizers import LINE_SEARCHES, answering
from experiments.training.problem import Field, Problem, weights_of
from experiments.training.progress import Bar
from experiments.training.schedules import step_scheduler
from experiments.training.steps import AccumulatedClosure, Clock, Closure, Stage, Updates, moving_average

VALUE_SECONDS = "timing/"
"""Series of an evaluation with this prefix are seconds of their own, which are added up."""


@dataclass(frozen=True)
class Result:
    """What a run measured.

    Attributes:
        series: values by name ("group/name"): at epochs 0 .. epochs, NaN after a divergence and where nothing was
            evaluated; with `iterations`, one at each of them.
        diverged_epoch: first epoch with a loss that is not finite, None for a run that ended well or has iterations.
        num_steps: optimizer steps taken.
        iterations: where the series were evaluated, in evaluations of the gradient; None for epochs.
        diverged_iteration: first iteration with a loss that is not finite.
        stop_reason: "iterations", "time" or "diverged"; "" for epochs.
        attributes: further attributes of the record.
        fields: by name, see `Problem.fields`.
        weights: that were evaluated last, where they are wanted; on the CPU.
    """

    series: dict[str, np.ndarray]
    diverged_epoch: int | None
    num_steps: int
    iterations: np.ndarray | None = None
    diverged_iteration: int | None = None
    stop_reason: str = ""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, Field] = field(default_factory=dict)
    weights: Mapping[str, Tensor] = field(default_factory=dict)


class Session(Protocol):
    """What keeps a run on disk and may end it early, see `experiments.runs.session`."""

    def restore(self, run: Training) -> bool:
        """Puts the run where it was saved last, if it was."""

    def after_step(self, run: Training, loss: Tensor) -> None:
        """Called after every step of the optimizer; may raise."""

    def after_interval(self, run: Training) -> None:
        """Called after every evaluation; may raise."""


def train(
    problem: Problem,
    first: Stage,
    training: Any,
    ranks: Ranks,
    *,
    ema_decay: float | None = None,
    mean_epochs: int | None = None,
    then: Stage | None = None,
    session: Session | None = None,
    show_progress: bool = False,
    save_weights: bool = False,
) -> Result:
    """Trains interval by interval, evaluates after each of them, off the clock.

    An interval is an epoch; for problems with `points` it is `evaluate_every` iterations, and an iteration is an
    evaluation of the gradient (or of a Jacobian). A step that takes several of them may reach beyond the end of its
    interval, and the evaluation follows the step.

    Args:
        problem: model, batches, loss and evaluation.
        first: an optimizer over `problem.model.parameters()`, accelerated or not.
        training: number of epochs or iterations, scheduler, whether to measure the updates.
        ranks: this process; the gradients are averaged over `world_size` ranks.
        ema_decay: evaluates an exponential moving average of the weights, see `steps.moving_average`.
        mean_epochs: evaluates, in this many last epochs, the mean of the weights after each of their steps.
        then: the second stage, without the scheduler.
        session: takes up a saved run, saves this one on the way, and may stop it.
        show_progress: a progress bar on a terminal, plain lines elsewhere.
        save_weights: whether the result has the weights.

    Returns:
        The series. A loss that is not finite ends the run, which is then recorded as diverged.
    """
    stages = [first, *([then] if then is not None else [])]
    run = Training(problem, stages, training, ranks, ema_decay, mean_epochs, show_progress)
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

    Attributes:
        interval: the present one, from 1.
        step: steps taken in it.
        num_steps: steps taken in all.
        iterations: where the series were evaluated.
        diverged_at: interval or iteration of the first loss that is not finite.
    """

    def __init__(
        self,
        problem: Problem,
        stages: Sequence[Stage],
        training: Any,
        ranks: Ranks,
        ema_decay: float | None,
        mean_epochs: int | None,
        show_progress: bool,
    ) -> None:
        self.problem, self.stages, self.training, self.ranks = problem, stages, training, ranks
        self.closure = _closure(problem, stages, training, ranks)
        self.scheduler: Any = None
        if isinstance(training, ImageTrainingConfig):
            assert problem.steps_per_epoch is not None
            batch = training.global_batch(ranks)
            self.scheduler = step_scheduler(stages[0].optimizer, training, problem.steps_per_epoch, batch)
        elif training.scheduler is not None:
            self.scheduler = make_scheduler(training.scheduler, stages[0].optimizer)
        self.ema = None
        if ema_decay is not None:
            average = moving_average(ema_decay)
            # The counter that torch passes was sent to the device, and reading it would make the host wait.
            self.ema = AveragedModel(problem.model, multi_avg_fn=lambda a, w, _: average(a, w, self._num_averaged()))
        self._averages_after = 0  # this interval
        if mean_epochs is not None:
            self.ema = AveragedModel(problem.model)
            self._averages_after = _num_intervals(training) - mean_epochs
        self.updates = Updates() if training.measure_updates else None
        self.clock = Clock(problem.model)
        self.series: dict[str, list[float]] = {}
        self.interval, self.step, self.num_steps = 1, 0, 0
        self.iterations = [0]
        self.diverged_at: int | None = None
        self.is_lost = False  # all ranks know that a loss was not finite
        self.longest_evaluation = 0.0
        self._is_warm = not _needs_warm_up(self.closure)
        self._earlier_seconds = 0.0  # of the acceleration, in earlier processes
        self.seconds: dict[str, float] = {}  # of what is not training, or a part of it, by series
        self._losses: list[Tensor] = []  # of the present interval
        self._places: list[int] = []  # iteration of each of them
        self.bar = _bar(problem, training, show_progress)

    @property
    def goes_on(self) -> bool:
        """Whether there is an interval to train."""
        return self.interval <= _num_intervals(self.training) and self.diverged_at is None

    @property
    def evaluated(self) -> nn.Module:
        """The model whose values are recorded."""
        return self.ema.module if self.ema is not None and self._averages else self.problem.model

    @property
    def _averages(self) -> bool:
        """Whether the present interval, or the evaluation before the first one, is one of those that are averaged."""
        return self.interval > self._averages_after

    def begin(self) -> None:
        """Evaluates the initial weights."""
        if self.problem.points is not None:
            self.closure.batch = self.problem.points(self.problem.model, 0)
        if isinstance(self.training, ImageTrainingConfig):
            self.seconds["timing/input_seconds"] = 0.0
        _append(self.series, 0, self._evaluate() | self._measures() | self.seconds, self.stages[:1])

    def train_interval(self, session: Session | None = None) -> bool:
        """Trains to the end of the present interval and evaluates; False if there was no time for a single step."""
        problem, is_sampled = self.problem, self.problem.points is not None
        if is_sampled and self.closure.iterations >= _target(self.training, self.interval):
            self.interval += 1
            return True  # the last step went beyond this interval
        problem.model.train()
        self.closure.model.train()
        self.clock.start()
        for batch in self._batches():
            if not self._is_warm:
                with self.clock.stopped():
                    self.closure.warm_up(batch)
                self._is_warm = True
            self._step(batch)
            if session is not None:
                session.after_step(self, self._losses[-1])
            if self.is_lost:
                break
        if self.scheduler is not None and not is_sampled and not isinstance(self.training, ImageTrainingConfig):
            self.scheduler.step()
        self.clock.stop()
        if not self._losses:
            return False
        self._finish_interval()
        return True

    def _step(self, batch: Any) -> None:
        """One step of the optimizer, and what follows it."""
        problem, closure = self.problem, self.closure
        _prepare(closure, batch, self.training)
        if self.updates is not None:
            self.updates.before(problem.model)
        self._losses.append(closure.step())
        if self.updates is not None:
            self.updates.after(problem.model)
        if self.ema is not None and self._averages:
            self.ema.update_parameters(problem.model)
        self.num_steps += 1
        self.step += 1
        if problem.points is not None:
            before = self._places[-1] if self._places else self.iterations[-1]
            self._places.append(closure.iterations)
            if self.scheduler is not None and closure.optimizer is self.stages[0].optimizer:
                for _ in range(self._places[-1] - before):
                    self.scheduler.step()
            self.bar.update(self._places[-1] - before)
        elif isinstance(self.training, ImageTrainingConfig):
            with warnings.catch_warnings():
                # GradScaler often skips the first step, and the schedule goes on all the same.
                warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
                self.scheduler.step()
            self.bar.update(1)
            if self.bar.is_due:
                self.bar.show({"metrics/train/loss": float(self._losses[-1])})

    def _batches(self) -> Iterator[Any]:
        """The rest of an epoch, or the points of one step after the other until the interval is over."""
        problem, training, closure = self.problem, self.training, self.closure
        if problem.epoch_batches is not None:
            batches = iter(problem.epoch_batches(self.interval, self.step))
            yield from self._timed(batches) if isinstance(training, ImageTrainingConfig) else batches
            return
        assert problem.points is not None
        target = _target(training, self.interval)
        while (iteration := closure.iterations) < target and not self._is_time_up():
            for stage in self.stages:
                if stage.after <= iteration:
                    closure.optimizer = stage.optimizer
            yield problem.points(problem.model, iteration)

    def _timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches, with the time that this process waits for them."""
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self._add_seconds("timing/input_seconds", time.perf_counter() - start)
            if batch is None:
                return
            yield batch if self.problem.to_device is None else self.problem.to_device(batch)

    def _is_time_up(self) -> bool:
        """Whether the training has lasted long enough, in the opinion of rank 0."""
        limit = getattr(self.training, "max_seconds", None)
        if limit is None:
            return False
        up = torch.tensor(float(self.clock.seconds() >= limit), device=device_of(self.ranks))
        if self.ranks.world_size > 1:
            dist.broadcast(up, src=0)
        return bool(up)

    def _finish_interval(self) -> None:
        """Evaluates, keeps the values, and goes on to the next interval."""
        is_sampled = self.problem.points is not None
        losses, places = self._losses, self._places
        values = self._measures()
        bad = ~torch.stack([loss.to(losses[0].device).reshape(()) for loss in losses]).isfinite()
        if is_sampled:
            finite = not bool(bad.any())
            self.iterations.append(places[-1])
        else:
            values["metrics/train/minibatch_loss"] = _mean_over_ranks(torch.stack(losses).mean(), self.ranks)
            finite = math.isfinite(values["metrics/train/minibatch_loss"])
        if self.updates is not None:
            values["updates/relative_standard_deviation"] = self.updates.relative_standard_deviation()
        if _is_evaluated(self.training, self.interval) or not finite:
            values |= self._evaluate()
        values |= self.seconds
        place = len(self.iterations) - 1 if is_sampled else self.interval
        reached = max(places, default=0)
        _append(self.series, place, values, [stage for stage in self.stages if stage.after <= reached])
        if not is_sampled and not isinstance(self.training, ImageTrainingConfig):
            self.bar.update(1)
        self.bar.show(values)
        if self.is_lost or not (finite and math.isfinite(values.get("metrics/train/loss", 0.0))):
            self.diverged_at = self.interval
            if is_sampled:
                self.diverged_at = places[-1] if finite else places[int(bad.int().argmax())]
        self.interval, self.step, self._losses, self._places = self.interval + 1, 0, [], []

    def _evaluate(self) -> dict[str, float]:
        """Values of the evaluated model; their seconds are added to those of earlier evaluations."""
        start = time.monotonic()
        with answering(self.closure.optimizer):
            values = _evaluate(self.problem, self.evaluated)
        for name in [name for name in values if name.startswith(VALUE_SECONDS)]:
            self._add_seconds(name, values.pop(name))
        seconds = time.monotonic() - start
        self.longest_evaluation = max(self.longest_evaluation, seconds)
        if isinstance(self.training, ImageTrainingConfig):
            self._add_seconds("timing/evaluation_seconds", seconds)
        return values

    def _add_seconds(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def _measures(self) -> dict[str, float]:
        """Time, and what else is known without an evaluation."""
        values = self.clock.values()
        if any(stage.seconds is not None for stage in self.stages):
            self.seconds["timing/acceleration_seconds"] = self._acceleration_seconds()
        if isinstance(self.training, ImageTrainingConfig) and self._losses:
            seconds = values["timing/training_seconds"] - self.series["timing/training_seconds"][-1]
            values["timing/images_per_second"] = len(self._losses) * self.training.global_batch(self.ranks) / seconds
        if isinstance(self.closure, AccumulatedClosure) and self.closure.scaler.is_enabled():
            values["metrics/skipped_steps"] = float(self.closure.num_skipped)
        if self.problem.points is not None:
            values["metrics/evaluations"] = float(self.closure.evaluations)
        if self.problem.points is not None or isinstance(self.training, ImageTrainingConfig):
            values["metrics/learning_rate"] = float(self.closure.optimizer.param_groups[0].get("lr", math.nan))
        return values

    @property
    def best_by(self) -> float | None:
        """Value of the last evaluation by which runs are compared; None where the last interval had none."""
        entries = self.series.get(self.problem.best_by, [])
        is_new = len(entries) == len(self.series["timing/training_seconds"])
        return entries[-1] if is_new and math.isfinite(entries[-1]) else None

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What all ranks have in common, and what belongs to this one; all ranks must call."""
        if self.problem.synchronize is not None:
            self.problem.synchronize()
        losses = torch.stack(self._losses).cpu() if self._losses else torch.empty(0)
        optimizers, accelerators = zip(*map(_state_of, self.stages), strict=True)
        shared = {
            "model": self.problem.model.state_dict(),
            "optimizers": list(optimizers),
            "memories": [stage.memory.state_dict() if stage.memory is not None else None for stage in self.stages],
            "scheduler": self.scheduler.state_dict() if self.scheduler is not None else None,
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "updates": self.updates.state_dict() if self.updates is not None else None,
            "closure": self.closure.state_dict(),
            "clock": self.clock.state_dict(),
            "problem": self.problem.state() if self.problem.state is not None else None,
            "series": {name: list(values) for name, values in self.series.items()},
            "seconds": dict(self.seconds),
            "acceleration_seconds": self._acceleration_seconds(),
            "mean_losses": _mean(losses, self.ranks),
            "places": list(self._places),
            "iterations": list(self.iterations),
            "interval": self.interval,
            "step": self.step,
            "num_steps": self.num_steps,
            "diverged_at": self.diverged_at,
        }
        return shared, {"losses": losses, "accelerators": list(accelerators)}

    def load_state(self, shared: Mapping[str, Any], own: Mapping[str, Any] | None) -> None:
        """Continues where a run with the same settings was; `own` is None on ranks that did not take part in it."""
        self.problem.model.load_state_dict(shared["model"])
        for position, stage in enumerate(self.stages):
            stage.optimizer.load_state_dict(shared["optimizers"][position])
            if stage.memory is not None:
                stage.memory.load_state_dict(shared["memories"][position])
            if stage.accelerator is not None and own is not None:
                stage.accelerator.load_state_dict(own["accelerators"][position])
        device = next(self.problem.model.parameters()).device
        for name in ("scheduler", "ema", "closure", "clock"):
            part = getattr(self, name)
            if part is not None:
                part.load_state_dict(shared[name])
        if self.updates is not None:
            self.updates.load_state_dict(shared["updates"], device)
        for name in ("interval", "step", "num_steps", "diverged_at"):
            setattr(self, name, shared[name])
        self.series = {name: list(values) for name, values in shared["series"].items()}
        self.seconds, self._earlier_seconds = dict(shared["seconds"]), shared["acceleration_seconds"]
        self.iterations, self._places = list(shared["iterations"]), list(shared["places"])
        losses = own["losses"] if own is not None else shared["mean_losses"]
        self._losses = list(losses.to(device))
        if self.problem.restore is not None:
            self.closure.batch = self.problem.restore(shared["problem"])
        for stage in self.stages:
            if self.problem.points is not None and stage.after <= self.closure.iterations:
                self.closure.optimizer = stage.optimizer
        self.bar.skip(self._done())

    def _num_averaged(self) -> Tensor:
        assert self.ema is not None
        return self.ema.n_averaged

    def _done(self) -> int:
        """What the progress bar counts, so far."""
        if self.problem.points is not None:
            return self.closure.iterations
        return self.num_steps if isinstance(self.training, ImageTrainingConfig) else self.interval - 1

    def _acceleration_seconds(self) -> float:
        """Of all processes that had this run."""
        return self._earlier_seconds + sum(stage.seconds() for stage in self.stages if stage.seconds is not None)

    def result(self, *, finished: bool, weights: bool = False) -> Result:
        """The series so far; of a finished run also what is worth one evaluation at the end, and the weights."""
        problem, training = self.problem, self.training
        more: dict[str, Any] = {}
        if finished:
            with torch.no_grad(), answering(self.closure.optimizer):
                more = {
                    "attributes": problem.finish(self.evaluated) if problem.finish is not None else {},
                    "fields": problem.fields(self.evaluated) if problem.fields is not None else {},
                    "weights": (problem.export or weights_of)(self.evaluated) if weights else {},
                }
        if not isinstance(training, PinnTrainingConfig):
            length = _num_intervals(training) + 1 if finished else self.interval
            padded = {name: _padded(entries, length) for name, entries in self.series.items()}
            return Result(padded, self.diverged_at, self.num_steps, **more)
        reason = "iterations" if self.iterations[-1] >= training.iterations else "time"
        return Result(
            series={name: _padded(entries, len(self.iterations)) for name, entries in self.series.items()},
            diverged_epoch=None,
            num_steps=self.num_steps,
            iterations=np.asarray(self.iterations, dtype=np.int64),
            diverged_iteration=self.diverged_at,
            stop_reason=reason if self.diverged_at is None else "diverged",
            **more,
        )


def _state_of(stage: Stage) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The state of its optimizer, and that of its accelerator where each rank has residuals of its own.

    What the ranks have in common stays in that of the optimizer: other ranks go on from it, with an empty history.
    """
    state = stage.optimizer.state_dict()
    if stage.accelerator is None:
        return state, None
    own = state[STATE_KEY]
    return state | {STATE_KEY: own | {"rows": {}}}, own


def _closure(problem: Problem, stages: Sequence[Stage], training: Any, ranks: Ranks) -> Closure:
    """The closure of the steps, with the model as it is trained: over ranks, compiled."""
    model, device = problem.model, device_of(ranks)
    if isinstance(training, ImageTrainingConfig):
        if ranks.world_size > 1:
            # Buffers are sent when somebody looks at them: before an evaluation and before a save.
            model = DistributedDataParallel(
                model,
                device_ids=[device] if device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                **_without_buffers(),
            )
        if training.compile:
            model = torch.compile(model)  # type: ignore[assignment]
        scaler = torch.amp.GradScaler(device.type, enabled=training.precision == "float16")
        return AccumulatedClosure(problem, model, stages, training.accumulate, scaler)
    if ranks.world_size > 1 and problem.backward is None:
        model = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    return Closure(problem, model, stages)


def _without_buffers() -> dict[str, Any]:
    """What keeps DistributedDataParallel from sending buffers; torch 2.13 has another name for it."""
    is_new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    return {"forward_sync_buffers" if is_new else "broadcast_buffers": False}


def _needs_warm_up(closure: Closure) -> bool:
    """Whether the first pass of a process arranges or compiles something."""
    return closure.model is not closure.problem.model


def _bar(problem: Problem, training: Any, show_progress: bool) -> Bar:
    """Progress in epochs, iterations, or steps with images."""
    if isinstance(training, PinnTrainingConfig):
        return Bar(training.iterations, "iterations", show_progress, training.max_seconds)
    if isinstance(training, ImageTrainingConfig):
        assert problem.steps_per_epoch is not None
        return Bar(training.epochs * problem.steps_per_epoch, "steps", show_progress, images=problem.batch_images)
    return Bar(training.epochs, "epochs", show_progress)


def _num_intervals(training: Any) -> int:
    if isinstance(training, PinnTrainingConfig):
        return math.ceil(training.iterations / training.evaluate_every)
    return training.epochs


def _target(training: Any, interval: int) -> int:
    """The iteration that ends an interval."""
    assert isinstance(training, PinnTrainingConfig)
    return min(interval * training.evaluate_every, training.iterations)


def _is_evaluated(training: Any, interval: int) -> bool:
    """Whether an evaluation follows the interval."""
    if not isinstance(training, ImageTrainingConfig):
        return True
    return interval % training.evaluate_every == 0 or interval == training.epochs


def _prepare(closure: Closure, batch: Any, training: Any) -> None:
    """Hands the batch to the closure; the memory of what was seen on other points begins anew, if asked for.

    Optimizers with a line search are told what is left of the budget: their last step ends with the search that uses it
    up.
    """
    optimizer = closure.optimizer
    if isinstance(optimizer, LINE_SEARCHES) and isinstance(training, PinnTrainingConfig):
        group = optimizer.param_groups[0]
        group["max_eval"] = max(1, min(group["max_eval"], training.iterations - closure.iterations))
    if batch is not closure.batch and closure.problem.reset_on_new_data:
        if isinstance(optimizer, LINE_SEARCHES):
            optimizer.state.clear()
        if find_accelerator(optimizer) is not None:
            aadl.reset_history(optimizer)
    closure.batch = batch


def _evaluate(problem: Problem, model: nn.Module) -> dict[str, float]:
    was_training = model.training
    model.eval()
    with torch.no_grad():
        values = problem.evaluate(model)
    model.train(was_training)
    return values


def _append(series: dict[str, list[float]], place: int, values: Mapping[str, float], stages: Sequence[Stage]) -> None:
    """Adds the values at a place of the series; one that starts late, as a cause of rejection, is filled with NaN or 0.

    Of several accelerated stages the counters are added, and of their other values those of the last one are taken.
    """
    row = dict(values)
    for stage in stages:
        if stage.statistics is None:
            continue
        for name, value in stage.statistics().items():
            if isinstance(value, Mapping):
                counts = {f"acceleration/{name}_{cause}": float(count) for cause, count in value.items()}
                row |= {key: row.get(key, 0.0) + count for key, count in counts.items()}
            elif isinstance(value, int) and not isinstance(value, bool) and name not in _LAST_INTEGERS:
                row[f"acceleration/{name}"] = row.get(f"acceleration/{name}", 0.0) + value
            elif isinstance(value, (bool, int, float)):
                row[f"acceleration/{name}"] = float(value)
    for name, value in row.items():
        missing = 0.0 if name.startswith("acceleration/rejected_") else math.nan
        entries = series.setdefault(name, [])
        entries.extend([missing] * (place - len(entries)))
        entries.append(value)


_LAST_INTEGERS = ("numerical_rank",)  # integers that count nothing


def _padded(values: list[float], length: int) -> np.ndarray:
    result = np.full(length, np.nan)
    result[: len(values)] = values
    return result


def _mean_over_ranks(value: Tensor, ranks: Ranks) -> float:
    return float(_mean(value, ranks))


def _mean(value: Tensor, ranks: Ranks) -> Tensor:
    if ranks.world_size == 1:
        return value
    total = value.to(device_of(ranks), copy=True)
    dist.all_reduce(total)
    return total / ranks.world_size
