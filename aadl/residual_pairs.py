"""The pairs (x_j, r_j) of nonlinear GMRES: where the residuals of a step come from, and when a pair is stored.

Residuals come from `residuals=fn`, or the closure of `step` hands them over (`observe`). In the second case the
residuals of a step's own evaluation make its pair, which costs no forward pass.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from aadl import memory
from aadl.acceptance import Cause, count
from aadl.attached import Accelerator
from aadl.parameters import all_parameters, belongs_to_a_loop
from aadl.ranks import is_sharded, local, ranks_of
from aadl.residual_history import ResidualHistory
from aadl.settings import Settings
from aadl.statistics import Statistics
from aadl.trial import on_trial
from aadl.trial_values import unwrapped
from aadl.watch import versions_of
from aadl.wrappers import Target

Residuals = Callable[[], "Tensor | Sequence[Tensor]"]
"""Returns the residuals r at the present weights, as one tensor or several."""

RESUMED = "resumed"
"""Stands for version counters that a checkpoint does not carry."""


class ResidualPairs(Accelerator):
    """The pairs of `aadl.nonlinear_gmres.ResidualAccelerator`, which makes the candidates.

    Args:
        target: the optimizer.
        settings: the validated arguments.
        process_group: ranks whose residuals make the loss together.
        residuals: () -> r at the present weights; None where closures hand them over.
        check: () -> residuals on other points, on which a candidate must be better too; None for no such points.
    """

    _statistics: Statistics
    _history: ResidualHistory | None
    _observes: bool
    """Whether residuals are handed over by `observe`."""
    _inside: bool
    """Whether a step is running."""
    _is_repeated: bool
    """Whether the running step began at the weights of the newest pair, so that its residuals can be compared."""
    _has_begun: bool
    """Whether the weights of a pair are stored whose residuals are not stored yet."""
    _has_failed: bool
    """Whether an evaluation has failed here, on one of several ranks, and a warning said so."""
    _parts: list[Tensor]
    """Residuals that were observed for the running step, or for the next one."""
    _trial_parts: list[Tensor] | None
    """Residuals that an evaluation for a candidate has observed; None while none runs."""
    _versions: list[int]
    """Version counters of the weights at which `_parts` were observed."""
    _known: list[int] | str | None
    """Version counters at which the weights are those of the newest pair; None where nothing is known."""

    def __init__(
        self,
        target: Target,
        settings: Settings,
        process_group: Any = None,
        residuals: Residuals | None = None,
        check: Residuals | None = None,
    ) -> None:
        self._residuals, self._check = residuals, check
        super().__init__(target, settings, process_group)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def observe(self, residuals: Tensor) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Hand over the residuals of the loss at the present weights, where they are computed anyway.

        Call it in the closure of `step`, or before a `step` without a closure, once per evaluation of the loss. With
        gradient accumulation call it once per micro-batch, and with several terms once per term: the parts are joined
        in this order. The loss is the sum of squares of all parts, up to a factor; the weight of a term goes into r as
        its square root.

        Args:
            residuals: r, of any shape; float64, float32 or lower, real or complex. It is read at the end of the step,
                and must not be changed in place before.

        Raises:
            ValueError: it is no tensor.
        """
        if not isinstance(residuals, Tensor):
            raise ValueError(f"observe takes one tensor a call, got {type(residuals).__name__}: call it for each term")
        residuals = unwrapped(residuals.detach())
        if self._trial_parts is not None:
            self._trial_parts.append(residuals)
            return
        if self._is_off() or on_trial():  # the trial of another optimizer, which shares the closure
            return
        self._observes = True
        versions = versions_of(self._tensors())
        if self._inside:
            if versions != self._versions:
                return  # a line search asks for the loss at another point
            if not self._parts:
                with torch._C._DisableFuncTorch():  # a closure may observe within torch.func.grad
                    self._begin_pair()
        elif versions != self._versions:
            self._parts, self._versions = [], versions
        self._parts.append(residuals)

    def _check_closure(self, closure: Callable[[], Any] | None) -> None:
        """Raise ValueError if nobody can evaluate the residuals."""
        if closure is None:
            raise ValueError(
                "acceleration_type='nonlinear_gmres' needs residuals=fn, or a closure given to step that calls "
                "aadl.accelerator_of(optimizer).observe(r): step was called without a closure"
            )
        if not self._statistics["steps"] and belongs_to_a_loop(closure):
            raise ValueError(
                "acceleration_type='nonlinear_gmres' needs residuals=fn here: the closure belongs to the loop of a "
                "framework, whose metrics would count the trials"
            )

    def _watch(self, has_closure: bool) -> None:
        """Note the weights at which residuals are observed in this step, or before one without a closure."""
        if self._has_begun and self._history is not None:  # the last step ended with an exception
            self._history.void()
            self._known = None
        self._has_begun = False
        versions = versions_of(self._tensors())
        if has_closure or versions != self._versions:
            self._parts = []
        self._versions = versions
        if self._parts:
            self._begin_pair()

    # ---- pairs -----------------------------------------------------------------------------------------------------

    def _begin_pair(self) -> None:
        """Store the weights at which this step sees its residuals, unless they are those of the newest pair."""
        history = self._history
        if history is None:
            return
        is_known = self._known is not None and self._is_at(self._known, self._versions)
        self._is_repeated = is_known or (self._known is not None and history.is_at_newest())
        self._statistics["moved"] += self._known is not None and not self._is_repeated
        # after writes the weights may be those of the pair on some ranks only, and all have to store the same pairs
        is_stored = is_known or (self._is_repeated and history.ranks.size == 1)
        if is_stored or self._statistics["steps"] % self.settings.store_each_nth:
            return
        with torch.no_grad():
            history.push_weights()
        self._has_begun = True

    def _end_pair(self) -> None:
        """Store the residuals that this step has seen."""
        history, parts, self._parts = self._history, self._parts, []
        if history is None or not parts:
            return
        if self._is_repeated:
            history.compare(joined(parts))
        if self._has_begun:
            history.push_residuals(joined(parts))
            self._has_begun = False
        self._known = None

    def _store(self, residuals: Tensor) -> None:
        """Store the pair of the present weights, at which the next step begins."""
        assert self._history is not None
        self._history.push_weights()
        self._history.push_residuals(residuals)
        self._known = versions_of(self._tensors())

    def _is_at(self, known: list[int] | str, versions: list[int] | None = None) -> bool:
        """Whether nobody has written to the weights since these version counters were read."""
        if known == RESUMED:
            assert self._history is not None
            return self._history.is_at_newest()
        return known == (versions_of(self._tensors()) if versions is None else versions)

    # ---- evaluations -----------------------------------------------------------------------------------------------

    def _source(self, closure: Callable[[], Any] | None) -> Callable[[], Any]:
        """A function that evaluates the residuals at the present weights."""
        source = self._residuals or closure
        assert source is not None
        return source

    def _evaluated(self, source: Callable[[], Any]) -> Tensor:
        """Evaluate the residuals at the present weights, shape (M,), and count the evaluation.

        Raises:
            NoResidualsError: the function returned no tensors, or the closure observed none.
        """
        given = source is self._residuals or source is self._check
        self._statistics["residual_evaluations" if given else "closure_evaluations"] += 1
        observed: list[Tensor] = []
        self._trial_parts = observed
        try:
            made = source()
        finally:
            self._trial_parts = None
        made = made if given else observed
        parts = list(made) if isinstance(made, list | tuple) else [made]
        if parts and all(isinstance(part, Tensor) for part in parts):
            return joined(parts)
        if given:
            name = "residuals" if source is self._residuals else "check"
            raise NoResidualsError(f"{name} must return a tensor, or a list of tensors, got {type(made).__name__}")
        raise NoResidualsError(
            "the closure must call aadl.accelerator_of(optimizer).observe(r) with the residuals r of its loss, or "
            "aadl.accelerate needs residuals=fn: this closure called no observe"
        )

    def _evaluated_with_others(self, history: ResidualHistory, source: Callable[[], Any]) -> Tensor:
        """`_evaluated`, or nan where that fails on one of several ranks.

        The others are on their way into the next sum. With nan in it all ranks reject together and train on.

        Raises:
            Exception: of a process on its own, whatever the function raised; `NoResidualsError` of any.
        """
        try:
            return self._evaluated(source)
        except NoResidualsError:
            raise  # a mistake in the program, which all ranks run
        except Exception as error:
            if history.ranks.size == 1:
                raise
            self._say_that_ranks_reject(error)
        block = history.residuals
        if block is None:
            return torch.full((1,), math.nan, device=history.locals[0].device if history.locals else None)
        return torch.full_like(block.mapped, math.nan)

    def _say_that_ranks_reject(self, error: Exception) -> None:
        """Warn once why the ranks took no candidate."""
        told, self._has_failed = self._has_failed, True
        if told:
            return
        with suppress(Warning):  # where warnings are errors, a warning must not end a step that others go on with
            warnings.warn(
                "the ranks reject candidates where the residuals cannot be evaluated on one of them, as on this one: "
                f"{type(error).__name__}: {error}",
                UserWarning,
                stacklevel=2,
            )

    # ---- memory ----------------------------------------------------------------------------------------------------

    def _lay_out(self, optimizer: Optimizer) -> None:
        """Allocate rows for the trainable parameters of the optimizer, unless there are rows for them."""
        history = self._history
        if history is None or not history.is_of([p for p in all_parameters(optimizer) if p.requires_grad]):
            self._allocate(optimizer)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _allocate(self, optimizer: Optimizer) -> None:
        parameters = self._extrapolated(optimizer)
        if parameters is None:
            return
        if self._history is not None:
            count(self._statistics["resets"], Cause.PARAMETERS_CHANGED)
        self._history, error = None, None
        ranks = ranks_of(self.process_group)
        try:
            self._history = ResidualHistory(parameters, self.settings, ranks)
        except torch.OutOfMemoryError as out_of_memory:
            error = out_of_memory
        memory.agree(ranks, error)
        self._known = None

    def _tensors(self) -> list[Tensor]:
        """The parameters, and their shards here, whose version counters show changes."""
        if self._history is not None:
            return self._history.watched
        parameters = self._extrapolated(self.optimizer) or []
        return [*parameters, *(local(p) for p in parameters if is_sharded(p))]

    def _let_go(self) -> None:
        self._history = None

    def _start_over(self) -> None:
        """Be as an accelerator that has seen no step."""
        self._history = None
        self._observes = self._inside = self._has_begun = self._is_repeated = self._has_failed = False
        self._parts, self._versions = [], []
        self._trial_parts = self._known = None


class NoResidualsError(ValueError):
    """A function returned no residuals, or a closure observed none."""


def joined(residuals: Sequence[Tensor]) -> Tensor:
    """Parts of a residual vector as one, real and in float32 at least, without gradients."""
    parts = [_flat(part.detach()) for part in residuals]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _flat(tensor: Tensor) -> Tensor:
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    flat = local(real).reshape(-1)
    return flat if flat.dtype in (torch.float32, torch.float64) else flat.float()
