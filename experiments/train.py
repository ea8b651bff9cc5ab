"""The only training loop."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from experiments.checks import make_scheduler
from experiments.config import TrainingConfig
from experiments.launch import Ranks, device_of


@dataclass(frozen=True)
class Problem:
    """What the loop needs to know of an experiment.

    Attributes:
        model: the network, on its device, initialized from the run's seed.
        epoch_batches: epoch (from 1) -> batches of this rank.
        loss: (model, batch) -> scalar, the mean over the batch.
        evaluate: model -> values by the name of their series, as "metrics/train/loss"; called in eval mode, no grad.
        data_source: where the data came from, "csv" or "surrogate".
        data_digest: short hash of the data, for telling whether two runs saw the same.
    """

    model: nn.Module
    epoch_batches: Callable[[int], Iterable[Any]]
    loss: Callable[[nn.Module, Any], Tensor]
    evaluate: Callable[[nn.Module], dict[str, float]]
    data_source: str
    data_digest: str


@dataclass(frozen=True)
class Result:
    """What a run measured.

    Attributes:
        series: values at epochs 0 .. epochs by name ("group/name"); NaN after a divergence.
        diverged_epoch: first epoch with a loss that is not finite, None for a run that ended well.
        num_steps: optimizer steps taken.
    """

    series: dict[str, np.ndarray]
    diverged_epoch: int | None
    num_steps: int


def train(
    problem: Problem,
    optimizer: torch.optim.Optimizer,
    training: TrainingConfig,
    ranks: Ranks,
    *,
    ema_decay: float | None = None,
    statistics: Callable[[], Mapping[str, Any]] | None = None,
    show_progress: bool = False,
) -> Result:
    """Trains for a number of epochs, evaluates after each of them, off the clock.

    Args:
        problem: model, batches, loss and evaluation.
        optimizer: over `problem.model.parameters()`, accelerated or not.
        training: number of epochs, scheduler, whether to measure the updates.
        ranks: this process; the gradients are averaged over `world_size` ranks.
        ema_decay: evaluates an exponential moving average of the weights, see `_moving_average`.
        statistics: reads the counters of an acceleration, once an epoch.
        show_progress: a progress bar on a terminal, plain lines elsewhere.

    Returns:
        The series by epoch. A loss that is not finite ends the run, which is then recorded as diverged.
    """
    model: nn.Module = problem.model
    if ranks.world_size > 1:
        device = device_of(ranks)
        model = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    scheduler = make_scheduler(training.scheduler, optimizer) if training.scheduler is not None else None
    ema = None
    if ema_decay is not None:
        ema = AveragedModel(problem.model, multi_avg_fn=_moving_average(ema_decay))
    evaluated = ema.module if ema is not None else problem.model
    updates = _Updates() if training.measure_updates else None

    series: dict[str, list[float]] = {}
    _append(
        series,
        0,
        _evaluate(problem, evaluated),
        statistics,
        {"timing/training_seconds": 0.0, "timing/training_cpu_seconds": 0.0},
    )
    training_seconds = training_cpu_seconds = 0.0
    num_steps = 0
    diverged_epoch = None
    for epoch in progress(range(1, training.epochs + 1), training.epochs, "epochs", show_progress):
        model.train()
        losses: list[Tensor] = []
        _synchronize(problem.model)
        start, cpu_start = time.perf_counter(), time.process_time()
        for batch in problem.epoch_batches(epoch):

            def closure(batch: Any = batch) -> Tensor:
                optimizer.zero_grad()
                loss = problem.loss(model, batch)
                loss.backward()
                return loss

            if updates is not None:
                updates.before(problem.model)
            loss = optimizer.step(closure)  # type: ignore[arg-type]
            losses.append(torch.as_tensor(loss).detach())
            if updates is not None:
                updates.after(problem.model)
            if ema is not None:
                ema.update_parameters(problem.model)
            num_steps += 1
        if scheduler is not None:
            scheduler.step()
        _synchronize(problem.model)
        training_seconds += time.perf_counter() - start
        training_cpu_seconds += time.process_time() - cpu_start

        values = {
            "timing/training_seconds": training_seconds,
            "timing/training_cpu_seconds": training_cpu_seconds,
            "metrics/train/minibatch_loss": _mean_over_ranks(torch.stack(losses).mean(), ranks),
        }
        if updates is not None:
            values["updates/relative_standard_deviation"] = updates.relative_standard_deviation()
        finite = math.isfinite(values["metrics/train/minibatch_loss"])
        values |= _evaluate(problem, evaluated)
        _append(series, epoch, values, statistics, {})
        if not (finite and math.isfinite(values.get("metrics/train/loss", 0.0))):
            diverged_epoch = epoch
            break
    return Result(
        series={name: _padded(values, training.epochs + 1) for name, values in series.items()},
        diverged_epoch=diverged_epoch,
        num_steps=num_steps,
    )


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


def progress(items: Iterable[Any], total: int, unit: str, enabled: bool = True) -> Iterator[Any]:
    """Passes the items on, with a bar on a terminal and at most ten plain lines elsewhere, both on stderr."""
    if not enabled:
        yield from items
    elif sys.stderr.isatty():
        yield from tqdm(items, total=total, unit=f" {unit}", dynamic_ncols=True)
    else:
        start = time.perf_counter()
        for count, item in enumerate(items, start=1):
            yield item
            if count == total or count * 10 // total > (count - 1) * 10 // total:
                seconds = time.perf_counter() - start
                print(f"{count}/{total} {unit}, {seconds:.0f} s", file=sys.stderr, flush=True)


def _evaluate(problem: Problem, model: nn.Module) -> dict[str, float]:
    was_training = model.training
    model.eval()
    with torch.no_grad():
        values = problem.evaluate(model)
    model.train(was_training)
    return values


def _append(
    series: dict[str, list[float]],
    epoch: int,
    values: Mapping[str, float],
    statistics: Callable[[], Mapping[str, Any]] | None,
    more: Mapping[str, float],
) -> None:
    """Adds the values of one epoch; a series that starts late, as a new cause of rejection, is filled with NaN or 0."""
    row = {**values, **more}
    if statistics is not None:
        for name, value in statistics().items():
            if isinstance(value, Mapping):
                row |= {f"acceleration/{name}_{cause}": float(count) for cause, count in value.items()}
            elif isinstance(value, (bool, int, float)):
                row[f"acceleration/{name}"] = float(value)
    for name, value in row.items():
        missing = 0.0 if name.startswith("acceleration/rejected_") else math.nan
        entries = series.setdefault(name, [])
        entries.extend([missing] * (epoch - len(entries)))
        entries.append(value)


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
