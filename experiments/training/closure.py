"""What an optimizer's step gets: closures that give the loss of the present batch, and count what they give."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from experiments.training.batchnorm import untouched_buffers

if TYPE_CHECKING:
    from experiments.training.problem import Observer, Problem
    from experiments.training.stage import Stage


class Closure:
    """What `optimizer.step` gets: the loss of the present batch, with gradients; it counts every evaluation.

    Args:
        problem: computes loss, gradients and residuals.
        model: as it is trained, which may be the problem's model in a DistributedDataParallel.
        stages: the optimizers; the first one is the present one.

    Attributes:
        optimizer, batch: the present ones; the plan sets the batch.
        num_losses: calls, trial evaluations of an acceleration included.
        num_linearizations, num_residuals: calls of the two methods.
    """

    def __init__(self, problem: Problem, model: nn.Module, stages: Sequence[Stage]) -> None:
        self.problem, self.model, self.stages = problem, model, stages
        self.optimizer = stages[0].optimizer
        self.batch: Any = None
        self.num_losses = self.num_linearizations = self.num_residuals = 0

    def warm_up(self, batch: Any) -> None:
        """One pass before the first step of a process, which changes nothing but torch's preparations.

        DistributedDataParallel rearranges its buckets after its first pass, and sums over three or more ranks then
        differ in their last digits. Without this pass a continued run would not repeat the uninterrupted one. With
        torch.compile the pass compiles. A model that torch runs as it is needs none.
        """
        if self.model is self.problem.model:
            return
        device = next(self.problem.model.parameters()).device
        with torch.random.fork_rng([device] if device.type == "cuda" else []), untouched_buffers(self.problem.model):
            self.problem.loss(self.model, batch).backward()
        self.optimizer.zero_grad()

    def begun(self) -> list[Stage]:
        """The stages that have begun; the first one always has, and the count may wait for a device."""
        return [stage for stage in self.stages if stage.after == 0 or stage.after <= self.iterations]

    def choose_stage(self) -> None:
        """Makes the optimizer of the last stage that has begun the present one."""
        self.optimizer = self.begun()[-1].optimizer

    def step(self) -> Tensor:
        """One step of the present optimizer; returns the loss before the step."""
        return torch.as_tensor(self.optimizer.step(self)).detach()  # type: ignore[arg-type]

    def __call__(self) -> Tensor:
        """The loss, with its gradients in the parameters."""
        self.num_losses += 1
        self.optimizer.zero_grad()
        return self.problem.backward(self.model, self.batch, self._observer)

    def linearize(self) -> tuple[Tensor, Tensor]:
        """Residuals (rows,) and their Jacobian (rows, parameters); the loss is the sum of their squares."""
        self.num_linearizations += 1
        return self.problem.linearize(self.model, self.batch, self._observer)

    def residuals(self) -> Tensor:
        """Residuals (rows,) of a trial."""
        self.num_residuals += 1
        return self.problem.residuals(self.model, self.batch)

    @property
    def _observer(self) -> Observer | None:
        """The function that receives the residuals of the present optimizer's evaluations."""
        for stage in self.stages:
            if stage.optimizer is self.optimizer and stage.accelerator is not None:
                return stage.accelerator.observe
        return None

    @property
    def evaluations(self) -> int:
        """Evaluations of the loss for a gradient, for a Jacobian or on trial, and those of the residuals."""
        residuals = self.num_residuals + self._counted("residual_evaluations")
        return self.num_losses + self.num_linearizations + residuals

    @property
    def iterations(self) -> int:
        """Evaluations of the gradient or of the Jacobian, without the trials."""
        return self.num_losses + self.num_linearizations - self._counted("closure_evaluations")

    @property
    def learning_rate(self) -> float:
        """The rate of the present optimizer, NaN where it has none."""
        return float(self.optimizer.param_groups[0].get("lr", math.nan))

    def measures(self) -> dict[str, float]:
        return {}

    def _counted(self, name: str) -> int:
        """The sum of one counter over the accelerations."""
        return sum(stage.statistics().get(name, 0) for stage in self.stages if stage.statistics)

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("num_losses", "num_linearizations", "num_residuals")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in ("num_losses", "num_linearizations", "num_residuals"):
            setattr(self, name, state[name])


class AccumulatedClosure(Closure):
    """Computes the gradients over the parts of a batch, scaled against underflow, and then steps the optimizer.

    The first call in a step returns the loss that the gradients belong to. Further calls, the trials of a safeguard,
    evaluate the loss at the present parameters in train mode, forward only. They leave no trace in the buffers, and go
    without DistributedDataParallel: the caller averages over the ranks. Optimizers that need a gradient at a second
    point, as L-BFGS, cannot use this closure.

    Args:
        problem, model, stages: as of Closure; a batch is a tuple of tensors with equally many rows.
        parts: >= 1 parts into which a batch is cut; their gradients are averaged.
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
        """One pass as of Closure, with a part of the batch."""
        super().warm_up(tuple(tensor.tensor_split(self._num_parts)[0] for tensor in batch))

    def step(self) -> Tensor:
        """One step; returns the loss before the step, the mean over the parts."""
        self.optimizer.zero_grad()
        loss = self._loss = self._with_gradients()
        if self.scaler.is_enabled():
            # GradScaler refuses the keyword `closure`, in which it scales no loss; this closure has no backward pass.
            self.scaler.step(self.optimizer, self)
            self.scaler.update()
            self.num_skipped += self._loss is not None  # a step that was taken has asked for the loss
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

    def measures(self) -> dict[str, float]:
        return {"metrics/skipped_steps": float(self.num_skipped)} if self.scaler.is_enabled() else {}

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
