"""What an optimizer's step gets: closures that give the loss of the present batch; and what is measured of steps."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from aadl import ResidualAccelerator
from aadl.deferred import Deferred
from experiments.training.batchnorm import untouched_buffers
from experiments.training.problem import Observer, Problem


@dataclass(frozen=True)
class Stage:
    """An optimizer, accelerated or not, from an iteration on.

    Attributes:
        optimizer: over `problem.model.parameters()`.
        statistics: reads the counters of its acceleration.
        after: first iteration.
        seconds: reads the time that its acceleration took, None where it is not measured.
        accelerator: of the residuals of the loss, which it observes; None for any other or none.
        memory: the acceleration, where its state is not in that of the optimizer; has state_dict and load_state_dict.
    """

    optimizer: torch.optim.Optimizer
    statistics: Callable[[], Mapping[str, Any]] | None = None
    after: int = 0
    seconds: Callable[[], float] | None = None
    memory: Any = None
    accelerator: ResidualAccelerator | None = None


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

    def warm_up(self, batch: Any) -> None:
        """A pass that leaves no trace but in the machinery, before the first step of a process.

        DistributedDataParallel arranges its buckets anew after its first pass, whereupon sums over three ranks or more
        come out differently in the last digits: without this one, a continued run would not repeat the uninterrupted
        one. And torch.compile compiles.
        """
        device = next(self.problem.model.parameters()).device
        with torch.random.fork_rng([device] if device.type == "cuda" else []), untouched_buffers(self.problem.model):
            self.problem.loss(self.model, batch).backward()
        self.optimizer.zero_grad()

    def step(self) -> Tensor:
        """One step of the present optimizer; returns the loss before it."""
        return torch.as_tensor(self.optimizer.step(self)).detach()  # type: ignore[arg-type]

    def __call__(self) -> Tensor:
        """The loss, with its gradients in the parameters."""
        self.num_losses += 1
        self.optimizer.zero_grad()
        if self.problem.backward is not None:
            return self.problem.backward(self.model, self.batch, self._observer)
        loss = self.problem.loss(self.model, self.batch)
        loss.backward()
        return loss

    def linearize(self) -> tuple[Tensor, Tensor]:
        """Residuals (rows,) and their Jacobian (rows, parameters); the loss is the sum of their squares."""
        self.num_linearizations += 1
        if self.problem.linearize is None:
            raise ValueError(f"{type(self.optimizer).__name__} needs residuals, which this problem does not have")
        return self.problem.linearize(self.model, self.batch, self._observer)

    def residuals(self) -> Tensor:
        """Residuals (rows,): a trial."""
        self.num_residuals += 1
        if self.problem.residuals is None:
            raise ValueError(f"{type(self.optimizer).__name__} needs residuals, which this problem does not have")
        return self.problem.residuals(self.model, self.batch)

    @property
    def _observer(self) -> Observer | None:
        """Who is handed the residuals of the present optimizer's evaluations."""
        for stage in self.stages:
            if stage.optimizer is self.optimizer and stage.accelerator is not None:
                return stage.accelerator.observe
        return None

    @property
    def evaluations(self) -> int:
        """Evaluations of the loss: for a gradient, for a Jacobian, or on trial; those of its residuals are some."""
        residuals = self.num_residuals + self._counted("residual_evaluations")
        return self.num_losses + self.num_linearizations + residuals

    @property
    def iterations(self) -> int:
        """Evaluations without the trials: those of the gradient or of the Jacobian."""
        return self.num_losses + self.num_linearizations - self._counted("closure_evaluations")

    def _counted(self, name: str) -> int:
        """A counter of the accelerations."""
        return sum(stage.statistics().get(name, 0) for stage in self.stages if stage.statistics)

    def state_dict(self) -> dict[str, Any]:
        """The counts, and what a scaler knows."""
        return {name: getattr(self, name) for name in ("num_losses", "num_linearizations", "num_residuals")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues the counts."""
        for name in ("num_losses", "num_linearizations", "num_residuals"):
            setattr(self, name, state[name])


class AccumulatedClosure(Closure):
    """Gradients first, over the parts of a batch and scaled against underflow; then the optimizer's step.

    The step's first call of the closure gets the loss that the gradients belong to. Further calls, the trials of a
    safeguard, evaluate the loss where the parameters are then, in train mode, forward only, without a trace in the
    buffers, and without DistributedDataParallel: the ranks' values are averaged by whoever asks. Optimizers that want a
    gradient at a second point (L-BFGS) are not for it.

    Args:
        problem, model, stages: as of Closure; a batch is a tuple of tensors with equally many rows.
        parts: >= 1 parts that a batch is cut into, whose gradients are averaged.
        scaler: a GradScaler; a disabled one changes nothing. An overflow skips the step, and no hook sees it.
    """

    def __init__(
        self, problem: Problem, model: nn.Module, stages: Sequence[Stage], parts: int, scaler: torch.amp.GradScaler
    ) -> None:
        super().__init__(problem, model, stages)
        self._num_parts, self.scaler = parts, scaler
        self._loss: Tensor | None = None
        self.num_skipped = 0

    def warm_up(self, batch: Any) -> None:
        """As of Closure, with a part of the batch."""
        super().warm_up(tuple(tensor.tensor_split(self._num_parts)[0] for tensor in batch))

    def step(self) -> Tensor:
        """One step; returns the loss before it, the mean over the parts."""
        self.optimizer.zero_grad()
        loss = self._loss = self._with_gradients()
        if self.scaler.is_enabled():
            # GradScaler refuses the keyword `closure` only, for it scales no loss in there; ours has no backward pass.
            self.scaler.step(self.optimizer, self)
            self.scaler.update()
            self.num_skipped += self._loss is not None  # a step that was taken has asked for it
        else:
            self.optimizer.step(self)  # type: ignore[arg-type]
        return loss

    def __call__(self) -> Tensor:
        """The loss: with its gradients at the first call of a step, alone at the others."""
        loss, self._loss = self._loss, None
        if loss is not None:
            return loss
        self.num_losses += 1
        with torch.no_grad(), untouched_buffers(self.problem.model):
            return torch.stack([self.problem.loss(self.problem.model, part) for part in self._parts()]).mean()

    def _parts(self) -> list[Any]:
        return list(zip(*(tensor.tensor_split(self._num_parts) for tensor in self.batch), strict=True))

    def _with_gradients(self) -> Tensor:
        self.num_losses += 1
        losses = []
        parts = self._parts()
        for number, part in enumerate(parts, start=1):
            apart = number < len(parts) and hasattr(self.model, "no_sync")
            with self.model.no_sync() if apart else contextlib.nullcontext():  # type: ignore[operator]
                loss = self.problem.loss(self.model, part)
                self.scaler.scale(loss / len(parts)).backward()
            losses.append(loss.detach())
        return torch.stack(losses).mean()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"num_skipped": self.num_skipped, "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.num_skipped = state["num_skipped"]
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])


class HookSeconds:
    """Seconds that step hooks take: those registered between the making of this object and `enclose`.

    On a GPU the time of its kernels counts, read at the next `__call__`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._device = parameters[0].device if parameters and parameters[0].is_cuda else None
        self._sum = 0.0
        self._spans: list[tuple[Any, Any]] = []
        self._hooks: list[dict[int, Any]] = [optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks]
        self._others = [set(hooks) for hooks in self._hooks]

    def enclose(self) -> HookSeconds:
        """Ends the part that is measured."""
        for hooks, others in zip(self._hooks, self._others, strict=True):
            for key in hooks.keys() - others:
                hooks[key] = self._timed(hooks[key])
        return self

    def __call__(self) -> float:
        """Seconds so far; waits for the device."""
        if self._spans:
            torch.cuda.synchronize(self._device)
            self._sum += sum(start.elapsed_time(end) for start, end in self._spans) / 1000
            self._spans.clear()
        return self._sum

    def _now(self) -> Any:
        if self._device is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _timed(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """The same hook, in the same place, its seconds counted."""

        def call(*arguments: Any) -> Any:
            start = self._now()
            result = hook(*arguments)
            if self._device is None:
                self._sum += time.perf_counter() - start
            else:
                self._spans.append((start, self._now()))
            return result

        return call


class Clock:
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

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """For what is not training, whether the clock runs or not."""
        is_running = self._started is not None
        if is_running:
            self.stop()
        yield
        if is_running:
            self.start()

    def values(self) -> dict[str, float]:
        return {"timing/training_seconds": self._wall, "timing/training_cpu_seconds": self._cpu}

    def state_dict(self) -> dict[str, float]:
        return {"wall": self._wall, "cpu": self._cpu}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self._wall, self._cpu = state["wall"], state["cpu"]


def _synchronize(model: nn.Module) -> None:
    if next(model.parameters()).is_cuda:
        torch.cuda.synchronize()


class FiniteLosses:
    """Whether the losses so far were finite, told some steps late so that the host does not wait for a device."""

    def __init__(self) -> None:
        self._pending: list[Deferred] = []
        self._finite = True

    def __call__(self, loss: Tensor) -> bool:
        """Takes the present loss; answers for those of two steps ago and before."""
        self._pending.append(Deferred(loss.isfinite().all()))
        if len(self._pending) > 2:
            self._finite = self._finite and bool(self._pending.pop(0).value())
        return self._finite


def moving_average(decay: float) -> Callable[[Any, Any, Any], None]:
    """`e <- d_n e + (1 - d_n) w` with `d_n = min(decay, (1 + n) / (10 + n))` after n averages.

    With a constant decay the random initial weights would weigh on the average for 1 / (1 - decay) steps and more, and
    the rival would look worse than it is.
    """

    def update(averages: Any, weights: Any, num_averaged: Any) -> None:
        count = float(num_averaged)
        torch._foreach_lerp_(averages, weights, 1.0 - min(decay, (1.0 + count) / (10.0 + count)))

    return update


class Updates:
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

    def state_dict(self) -> dict[str, Any]:
        return {"last": self._last, "sums": list(self._sums)}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | None = None) -> None:
        last = state["last"]
        self._last, self._sums = last if last is None else last.to(device), list(state["sums"])
