"""The only training loop."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

import aadl
from aadl.accelerator import find_accelerator
from experiments.checks import make_scheduler
from experiments.config import AnyTrainingConfig, PinnTrainingConfig, TrainingConfig
from experiments.launch import Ranks, device_of


class Field(NamedTuple):
    """Values on a grid, for the record; a field whose only dimension has its own name is a coordinate."""

    dimensions: tuple[str, ...]
    values: np.ndarray
    units: str
    long_name: str


class Description(NamedTuple):
    """What is known of the data before a run.

    Attributes:
        source: where it comes from.
        digest: short hash.
        num_rows: to train on, None where points are sampled.
        note: what everybody must know of results on it, "" for nothing.
    """

    source: str
    digest: str
    num_rows: int | None
    note: str = ""


@dataclass(frozen=True)
class Problem:
    """What the loop needs to know of an experiment.

    Attributes:
        model: the network, on its device, initialized from the run's seed.
        epoch_batches: epoch (from 1) -> batches of this rank; None where `points` is given.
        loss: (model, batch) -> scalar, the mean over the batch.
        evaluate: model -> values by the name of their series, as "metrics/train/loss"; called in eval mode, no grad.
        data_source: where the data came from, "csv", "surrogate" or "computed".
        data_digest: short hash of the data, for telling whether two runs saw the same.
        points: (model, iteration) -> the batch at that iteration; the same object as long as the points are the same.
        backward: (model, batch) -> loss, with gradients accumulated, both the mean over all ranks; None for `loss` and
            its backward pass, and for DistributedDataParallel where there are several ranks.
        residuals: (model, batch) -> residuals r, (rows,), weighted so that the loss is sum r^2.
        linearize: (model, batch) -> r and its Jacobian, (rows,) and (rows, parameters).
        finish: model -> attributes of the record that are worth one evaluation, at the end.
        fields: model -> fields of the record.
        reset_on_new_data: whether L-BFGS and aadl begin anew when `points` gives other points.
        attributes: further attributes of the record.
    """

    model: nn.Module
    epoch_batches: Callable[[int], Iterable[Any]] | None
    loss: Callable[[nn.Module, Any], Tensor]
    evaluate: Callable[[nn.Module], dict[str, float]]
    data_source: str
    data_digest: str
    points: Callable[[nn.Module, int], Any] | None = None
    backward: Callable[[nn.Module, Any], Tensor] | None = None
    residuals: Callable[[nn.Module, Any], Tensor] | None = None
    linearize: Callable[[nn.Module, Any], tuple[Tensor, Tensor]] | None = None
    finish: Callable[[nn.Module], dict[str, float]] | None = None
    fields: Callable[[nn.Module], dict[str, Field]] | None = None
    reset_on_new_data: bool = False
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """An optimizer, accelerated or not, from an iteration on.

    Attributes:
        optimizer: over `problem.model.parameters()`.
        statistics: reads the counters of its acceleration.
        after: first iteration.
    """

    optimizer: torch.optim.Optimizer
    statistics: Callable[[], Mapping[str, Any]] | None = None
    after: int = 0


@dataclass(frozen=True)
class Result:
    """What a run measured.

    Attributes:
        series: values by name ("group/name"): at epochs 0 .. epochs, NaN after a divergence; with `iterations`, one at
            each of them.
        diverged_epoch: first epoch with a loss that is not finite, None for a run that ended well or has iterations.
        num_steps: optimizer steps taken.
        iterations: where the series were evaluated, in evaluations of the gradient; None for epochs.
        diverged_iteration: first iteration with a loss that is not finite.
        stop_reason: "iterations", "time" or "diverged"; "" for epochs.
        attributes: further attributes of the record.
        fields: by name, see `Problem.fields`.
    """

    series: dict[str, np.ndarray]
    diverged_epoch: int | None
    num_steps: int
    iterations: np.ndarray | None = None
    diverged_iteration: int | None = None
    stop_reason: str = ""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, Field] = field(default_factory=dict)


class Closure:
    """What `optimizer.step` gets: the loss of the present batch, with gradients; everything is counted.

    Attributes:
        batch, optimizer: present ones, set by the loop.
        num_losses: calls, trial evaluations of an acceleration included.
        num_linearizations, num_residuals: calls of the two methods.
    """

    def __init__(self, problem: Problem, model: nn.Module, stages: Sequence[Stage]) -> None:
        self.problem, self.model, self.stages = problem, model, stages
        self.optimizer = stages[0].optimizer
        self.batch: Any = None
        self.num_losses = self.num_linearizations = self.num_residuals = 0

    def __call__(self) -> Tensor:
        """The loss, with its gradients in the parameters."""
        self.num_losses += 1
        self.optimizer.zero_grad()
        if self.problem.backward is not None:
            return self.problem.backward(self.model, self.batch)
        loss = self.problem.loss(self.model, self.batch)
        loss.backward()
        return loss

    def linearize(self) -> tuple[Tensor, Tensor]:
        """Residuals (rows,) and their Jacobian (rows, parameters); the loss is the sum of their squares."""
        self.num_linearizations += 1
        if self.problem.linearize is None:
            raise ValueError(f"{type(self.optimizer).__name__} needs residuals, which this problem does not have")
        return self.problem.linearize(self.model, self.batch)

    def residuals(self) -> Tensor:
        """Residuals (rows,): a trial."""
        self.num_residuals += 1
        if self.problem.residuals is None:
            raise ValueError(f"{type(self.optimizer).__name__} needs residuals, which this problem does not have")
        return self.problem.residuals(self.model, self.batch)

    @property
    def evaluations(self) -> int:
        """Evaluations of the loss: for a gradient, for a Jacobian, or on trial."""
        return self.num_losses + self.num_linearizations + self.num_residuals

    @property
    def iterations(self) -> int:
        """Evaluations without the trials: those of the gradient or of the Jacobian."""
        trials = sum(stage.statistics().get("closure_evaluations", 0) for stage in self.stages if stage.statistics)
        return self.num_losses + self.num_linearizations - trials


def train(
    problem: Problem,
    optimizer: torch.optim.Optimizer,
    training: AnyTrainingConfig,
    ranks: Ranks,
    *,
    ema_decay: float | None = None,
    statistics: Callable[[], Mapping[str, Any]] | None = None,
    then: Stage | None = None,
    show_progress: bool = False,
) -> Result:
    """Trains interval by interval, evaluates after each of them, off the clock.

    An interval is an epoch; for problems with `points` it is `evaluate_every` iterations, and an iteration is an
    evaluation of the gradient (or of a Jacobian). A step that takes several of them may reach beyond the end of its
    interval, and the evaluation follows the step.

    Args:
        problem: model, batches, loss and evaluation.
        optimizer: over `problem.model.parameters()`, accelerated or not.
        training: number of epochs or iterations, scheduler, whether to measure the updates.
        ranks: this process; the gradients are averaged over `world_size` ranks.
        ema_decay: evaluates an exponential moving average of the weights, see `_moving_average`.
        statistics: reads the counters of an acceleration, once an interval.
        then: the second stage, without the scheduler.
        show_progress: a progress bar on a terminal, plain lines elsewhere.

    Returns:
        The series. A loss that is not finite ends the run, which is then recorded as diverged.
    """
    model: nn.Module = problem.model
    if ranks.world_size > 1 and problem.backward is None:
        device = device_of(ranks)
        model = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    stages = [Stage(optimizer, statistics), *([then] if then is not None else [])]
    closure = Closure(problem, model, stages)
    scheduler = make_scheduler(training.scheduler, optimizer) if training.scheduler is not None else None
    ema = None
    if ema_decay is not None:
        ema = AveragedModel(problem.model, multi_avg_fn=_moving_average(ema_decay))
    evaluated = ema.module if ema is not None else problem.model
    updates = _Updates() if training.measure_updates else None
    clock = _Clock(problem.model)

    series: dict[str, list[float]] = {}
    if problem.points is not None:
        closure.batch = problem.points(problem.model, 0)
    values = _evaluate(problem, evaluated)
    _append(series, 0, values | clock.values() | _counts(problem, closure), stages[:1])
    iterations = [0]
    num_steps = 0
    diverged_at = None
    bar = _Bar(*_length(training), show_progress, getattr(training, "max_seconds", None))
    for interval in range(1, _num_intervals(training) + 1):
        if problem.points is not None and closure.iterations >= _target(training, interval):
            continue  # the last step went beyond this interval
        model.train()
        losses: list[Tensor] = []
        places: list[int] = []  # iteration of each loss
        clock.start()
        for batch in _batches(problem, training, ranks, closure, clock, interval):
            _prepare(closure, batch, training)
            if updates is not None:
                updates.before(problem.model)
            before = iterations[-1] if not places else places[-1]
            loss = closure.optimizer.step(closure)  # type: ignore[arg-type]
            losses.append(torch.as_tensor(loss).detach())
            if updates is not None:
                updates.after(problem.model)
            if ema is not None:
                ema.update_parameters(problem.model)
            num_steps += 1
            if problem.points is not None:
                places.append(closure.iterations)
                if scheduler is not None and closure.optimizer is optimizer:
                    for _ in range(places[-1] - before):
                        scheduler.step()
                bar.update(places[-1] - before)
        if scheduler is not None and problem.points is None:
            scheduler.step()
        clock.stop()

        values = clock.values() | _counts(problem, closure)
        if not losses:  # the time was up when the interval began
            break
        if problem.points is None:
            values["metrics/train/minibatch_loss"] = _mean_over_ranks(torch.stack(losses).mean(), ranks)
            finite = math.isfinite(values["metrics/train/minibatch_loss"])
        else:
            bad = ~torch.stack([loss.to(losses[0].device).reshape(()) for loss in losses]).isfinite()
            finite = not bool(bad.any())
            iterations.append(places[-1])
        if updates is not None:
            values["updates/relative_standard_deviation"] = updates.relative_standard_deviation()
        values |= _evaluate(problem, evaluated)
        place = interval if problem.points is None else len(iterations) - 1
        _append(series, place, values, [stage for stage in stages if stage.after <= max(places, default=0)])
        if problem.points is None:
            bar.update(1)
        bar.show(values)
        if not (finite and math.isfinite(values.get("metrics/train/loss", 0.0))):
            diverged_at = interval
            if problem.points is not None:
                diverged_at = places[-1] if finite else places[int(bad.int().argmax())]
            break
    bar.close()
    if problem.points is None:
        padded = {name: _padded(entries, _num_intervals(training) + 1) for name, entries in series.items()}
        return Result(padded, diverged_at, num_steps)
    assert isinstance(training, PinnTrainingConfig)  # `_num_intervals` would have failed
    reason = "iterations" if iterations[-1] >= training.iterations else "time"
    with torch.no_grad():
        return Result(
            series={name: _padded(entries, len(iterations)) for name, entries in series.items()},
            diverged_epoch=None,
            num_steps=num_steps,
            iterations=np.asarray(iterations, dtype=np.int64),
            diverged_iteration=diverged_at,
            stop_reason=reason if diverged_at is None else "diverged",
            attributes=problem.finish(evaluated) if problem.finish is not None else {},
            fields=problem.fields(evaluated) if problem.fields is not None else {},
        )


def _num_intervals(training: AnyTrainingConfig) -> int:
    if isinstance(training, TrainingConfig):
        return training.epochs
    return math.ceil(training.iterations / training.evaluate_every)


def _target(training: AnyTrainingConfig, interval: int) -> int:
    """The iteration that ends an interval."""
    assert isinstance(training, PinnTrainingConfig)
    return min(interval * training.evaluate_every, training.iterations)


def _length(training: AnyTrainingConfig) -> tuple[int, str]:
    """What a progress bar counts."""
    if isinstance(training, TrainingConfig):
        return training.epochs, "epochs"
    return training.iterations, "iterations"


def _batches(
    problem: Problem, training: AnyTrainingConfig, ranks: Ranks, closure: Closure, clock: _Clock, interval: int
) -> Iterator[Any]:
    """The batches of an epoch, or the points of one step after the other until the interval is over."""
    if problem.points is None:
        assert problem.epoch_batches is not None
        yield from problem.epoch_batches(interval)
        return
    assert isinstance(training, PinnTrainingConfig)
    target = _target(training, interval)
    while (iteration := closure.iterations) < target and not _is_time_up(training, ranks, closure, clock):
        for stage in closure.stages:
            if stage.after <= iteration:
                closure.optimizer = stage.optimizer
        yield problem.points(problem.model, iteration)


def _is_time_up(training: PinnTrainingConfig, ranks: Ranks, closure: Closure, clock: _Clock) -> bool:
    """Whether the training has lasted long enough, in the opinion of rank 0."""
    if training.max_seconds is None:
        return False
    up = torch.tensor(float(clock.seconds() >= training.max_seconds), device=device_of(ranks))
    if ranks.world_size > 1:
        dist.broadcast(up, src=0)
    return bool(up)


def _prepare(closure: Closure, batch: Any, training: AnyTrainingConfig) -> None:
    """Hands the batch to the closure; the memory of what was seen on other points begins anew, if asked for.

    L-BFGS is told what is left of the budget: its last step ends with the line search that uses it up.
    """
    optimizer = closure.optimizer
    if isinstance(optimizer, torch.optim.LBFGS) and isinstance(training, PinnTrainingConfig):
        group = optimizer.param_groups[0]
        group["max_eval"] = max(1, min(group["max_eval"], training.iterations - closure.iterations))
    if batch is not closure.batch and closure.problem.reset_on_new_data:
        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.state.clear()
        if find_accelerator(optimizer) is not None:
            aadl.reset_history(optimizer)
    closure.batch = batch


def _counts(problem: Problem, closure: Closure) -> dict[str, float]:
    """Series that only iterations have."""
    if problem.points is None:
        return {}
    rate = closure.optimizer.param_groups[0].get("lr", math.nan)
    return {"metrics/evaluations": float(closure.evaluations), "metrics/learning_rate": float(rate)}


class _Clock:
    """Seconds of wall time and of the process that passed between `start` and `stop`."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._wall = self._cpu = 0.0
        self._started: tuple[float, float] | None = None

    def start(self) -> None:
        _synchronize(self._model)
        self._started = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        assert self._started is not None
        _synchronize(self._model)
        self._wall += time.perf_counter() - self._started[0]
        self._cpu += time.process_time() - self._started[1]
        self._started = None

    def seconds(self) -> float:
        return self._wall + (time.perf_counter() - self._started[0] if self._started is not None else 0.0)

    def values(self) -> dict[str, float]:
        return {"timing/training_seconds": self._wall, "timing/training_cpu_seconds": self._cpu}


def _moving_average(decay: float) -> Callable[[Any, Any, Any], None]:
    """`e <- d_n e + (1 - d_n) w` with `d_n = min(decay, (1 + n) / (10 + n))` after n averages.

    With a constant decay the random initial weights would weigh on the average for 1 / (1 - decay) steps and more, and
    the rival would look worse than it is.
    """

    def update(averages: Any, weights: Any, num_averaged: Any) -> None:
        count = float(num_averaged)
        torch._foreach_lerp_(averages, weights, 1.0 - min(decay, (1.0 + count) / (10.0 + count)))

    return update


class _Updates:
    """Relative standard deviation of consecutive updates u_k = x_{k+1} - x_k, pooled over an epoch.

    For two neighbors the variance over the squared mean is `||u_{k+1} - u_k||^2 / ||u_{k+1} + u_k||^2`; pooled,

        s^2 = sum_k ||u_{k+1} - u_k||^2 / sum_k ||u_{k+1} + u_k||^2.

    Aligned updates give 0, independent ones of zero mean 1, alternating ones more. Pairs reach across epochs, for with
    a single batch an epoch there were none otherwise.
    """

    def __init__(self) -> None:
        self._last: Tensor | None = None
        self._start: Tensor | None = None
        self._sums = [0.0, 0.0]

    def before(self, model: nn.Module) -> None:
        self._start = parameters_to_vector(model.parameters()).detach().clone()

    def after(self, model: nn.Module) -> None:
        assert self._start is not None  # before() was called
        update = parameters_to_vector(model.parameters()).detach() - self._start
        if self._last is not None:
            self._sums[0] += float((update - self._last).double().square().sum())
            self._sums[1] += float((update + self._last).double().square().sum())
        self._last = update

    def relative_standard_deviation(self) -> float:
        difference, total = self._sums
        self._sums = [0.0, 0.0]
        return math.sqrt(difference / total) if total > 0 else math.nan


class _Bar:
    """Progress on stderr: a bar on a terminal, at most ten plain lines elsewhere; with the last loss and error.

    A line appears for each tenth of the total count or of `max_seconds` of training, whichever is further.
    """

    def __init__(self, total: int, unit: str, enabled: bool = True, max_seconds: float | None = None) -> None:
        self._total, self._unit, self._count, self._max_seconds = total, unit, 0, max_seconds
        self._start = time.perf_counter()
        self._lines = enabled and not sys.stderr.isatty()
        self._told = 0
        self._bar = tqdm(total=total, unit=f" {unit}", dynamic_ncols=True) if enabled and not self._lines else None

    def update(self, count: int) -> None:
        self._count += count
        if self._bar is not None:
            self._bar.update(min(count, self._total - self._bar.n))  # the last step may go beyond

    def show(self, values: Mapping[str, float] | None = None) -> None:
        """Tells the loss and the error; the plain lines appear here."""
        shown = _headline(values or {})
        if self._bar is not None:
            self._bar.set_postfix(shown)
        tenths = self._tenths((values or {}).get("timing/training_seconds", 0.0))
        if self._lines and tenths > self._told:
            self._told = tenths
            seconds = time.perf_counter() - self._start
            more = "".join(f", {name} {text}" for name, text in shown.items())
            if shown and self._unit == "iterations":
                more += f", {self._count / max(seconds, 1e-9):.0f} iterations/s"
            count = min(self._count, self._total)
            print(f"{count}/{self._total} {self._unit}, {seconds:.0f} s{more}", file=sys.stderr, flush=True)

    def _tenths(self, seconds: float) -> int:
        """0 to 10, after so many seconds of training."""
        timed = int(10 * seconds / self._max_seconds) if self._max_seconds is not None else 0
        return min(10, max(self._count * 10 // self._total, timed))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _headline(values: Mapping[str, float]) -> dict[str, str]:
    """The training loss and the first error on a validation set, as texts."""
    errors = (value for name, value in values.items() if name.startswith("metrics/validation/"))
    shown = {"loss": values.get("metrics/train/loss"), "error": next(errors, None)}
    return {name: f"{value:.3g}" for name, value in shown.items() if value is not None}


def progress(items: Iterable[Any], total: int, unit: str, enabled: bool = True) -> Iterator[Any]:
    """Passes the items on, with a bar on a terminal and at most ten plain lines elsewhere, both on stderr."""
    bar = _Bar(total, unit, enabled)
    try:
        for item in items:
            yield item
            bar.update(1)
            bar.show()
    finally:
        bar.close()


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
    if ranks.world_size > 1:
        value = value.clone()
        dist.all_reduce(value)
        value /= ranks.world_size
    return float(value)


def _synchronize(model: nn.Module) -> None:
    if next(model.parameters()).is_cuda:
        torch.cuda.synchronize()
