"""The losses of a training, as its own backward passes begin at them: what they say of the last candidate.

Nothing is evaluated for it. Without a closure these losses are all that is seen of a candidate that leads where
gradients look like those before: behind the boundary of a logarithm, or onto a plateau.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from aadl.mixing import host_tensor
from aadl.parameters import all_parameters, maximizes
from aadl.ranks import PLAIN, local

WINDOW = 10
"""Steps before a candidate with whose losses those after it are compared."""
FEWEST = 4
"""Steps after a candidate whose losses are compared."""
ROUNDING = 1e-5
"""Part of a loss by which it may rise because of rounding."""
MOST = 4096
"""Losses that are kept, of one step and after a candidate."""
STUCK = 3
"""Times in a row that no step is made, because the loss is not finite, after which a candidate goes."""
Number = float | Tensor
"""A Python number from a host, so that nothing is kept of its graph; else a tensor of no dimension on its device."""


class Losses:
    """The losses of one training.

    Args:
        recent: those of the last WINDOW steps, without those after candidates that were taken back.
        since: those of the steps since the last acceleration.
        plain: the recent ones at that time.
        bound: what the losses since then must exceed to have risen; inf where they cannot.
        sign: 1 where the training minimizes its loss, -1 where it maximizes it, 0 where a rise says nothing.
        reverted: how often a candidate has been taken back.
        dropped: those with whose gradients no step was made, since the last step.
        begun: whether a step was made.
        places: of the sample among the parameters of the optimizer; none for those that `choose` takes.

    Attributes:
        coming: those of the passes since the last step.
        sample: parameters whose gradients tell that a loss is one of this training.
        is_stuck: whether no step was made STUCK times in a row, because the loss was not finite.
    """

    def __init__(
        self,
        recent: Sequence[Number] = (),
        since: Sequence[Number] = (),
        plain: Sequence[Number] = (),
        bound: Number = math.inf,
        sign: int = 0,
        reverted: int = 0,
        dropped: Sequence[Number] = (),
        begun: bool = False,
        places: Sequence[int] = (),
    ) -> None:
        self.recent, self.since, self.plain = list(recent), list(since), list(plain)
        self.bound, self.sign, self.reverted = bound, sign, reverted
        self.coming: list[Number] = []
        self.dropped, self.is_stuck = list(dropped), False
        self.sample: list[Tensor] = []
        self._places = list(places)
        self._left: list[int | None] = []
        self._steps, self._in_closure, self._is_noted = 0, False, False
        self._thread = threading.get_ident() if begun else None

    @classmethod
    def of(cls, optimizer: Optimizer, **seen: Any) -> Losses:
        """The losses of the training with this optimizer; `seen` is a saved `state`."""
        losses, parameters = cls(**seen), all_parameters(optimizer)
        losses.sample = [parameters[place] for place in losses._places if place < len(parameters)]
        if not losses.sample:
            losses.choose(parameters)
        return losses

    # ---- backward passes -------------------------------------------------------------------------------------------

    def look(self, given: dict[str, Any], when_stuck: Callable[[], None]) -> Callable[[], None] | None:
        """Look at a backward pass that begins; return what notes its losses once it has ended, or None.

        A loss counts times the gradient that it is given, because `(-loss).backward()` and `loss.backward(-one)`
        minimize the same. A step that evaluates its closure at several points tells by the first one what the loss is.
        Passed over are losses that change no gradient of the sample, or whose gradients somebody writes to or drops
        before the next pass (skipped steps); passes within others (reentrant checkpoints), or with steps in them;
        passes of other threads than the one that makes the steps, because nobody may look at gradients that another
        thread computes; tensors of several numbers; and all while a CUDA graph is captured.

        Args:
            given: arguments of torch's engine: the tensors at which the pass begins, and their gradients.
            when_stuck: called after a pass that is one of those before which no step was made, see `is_stuck`.
        """
        sample, steps = self.sample, self._steps
        if self._is_noted or self._thread != threading.get_ident() or torch._C._current_graph_task_id() != -1:
            return None
        if any(p.is_cuda for p in sample) and torch.cuda.is_current_stream_capturing():
            return None
        before = [p.grad for p in sample]
        versions = list(map(_version, before))
        if self.coming and versions != self._left:
            self._drop()

        def note() -> None:
            left = [_version(p.grad) for p in sample]
            replaced = [p.grad is not gradient for p, gradient in zip(sample, before, strict=True)]
            if steps == self._steps and (left != versions or any(replaced)):
                self._left, self._is_noted = left, self._in_closure
                modes = torch._C._len_torch_dispatch_stack()  # they count or trace what a training computes
                with torch._C._DisableTorchDispatch() if modes else nullcontext():
                    self._note(given.get("tensors", ()), given.get("grad_tensors", ()))
            if self.is_stuck and self.coming and not math.isfinite(self.coming[-1]):
                when_stuck()  # the gradients of this pass lead to no step

        return note

    def _drop(self) -> None:
        """Put losses aside with whose gradients no step was made; a device is asked about every third ones."""
        self.dropped += [_mean(self.coming)] if self.coming else []
        self.coming = []
        if len(self.dropped) >= STUCK:
            self.is_stuck = not any(math.isfinite(loss) for loss in self.dropped)
            self.dropped = []

    def _note(self, roots: Sequence[Any], gradients: Sequence[Any]) -> None:
        for root, gradient in zip(roots, gradients, strict=False):
            loss, factor = _number(root), _number(gradient)
            if loss is not None and factor is not None:
                self.coming.append(loss * factor)
        del self.coming[:-MOST]  # nobody steps

    def choose(self, parameters: Sequence[Tensor]) -> None:
        """Choose the sample: the first and the last one of the parameters in use.

        Args:
            parameters: those of the optimizer, after a step; without gradients at that time are those that it leaves.
        """
        used = [p for p in parameters if p.grad is not None] or [p for p in parameters if p.requires_grad]
        self.sample = used[:1] + used[1:][-1:]

    # ---- steps -----------------------------------------------------------------------------------------------------

    def begin_step(self, has_closure: bool) -> None:
        """Note that a step begins, within which its closure may be called several times."""
        if self._in_closure:  # the last step has ended with an error
            self.coming = []
        self._in_closure, self._is_noted = has_closure, False
        self._steps, self._thread = self._steps + 1, threading.get_ident()

    def end_step(self, skipped: bool, reverted: int) -> None:
        """Take over the losses of a step; those of a skipped one moved nothing.

        Args:
            skipped: whether it was skipped.
            reverted: how often a candidate has been taken back so far.
        """
        self._forget_reverted(reverted)
        self._in_closure = self._is_noted = False
        if skipped:
            self._drop()
            return
        coming, self.coming, self.dropped, self.is_stuck = self.coming, [], [], False
        if coming:
            loss = _mean(coming)
            self.recent = [*self.recent, loss][-WINDOW:]
            self.since = [*self.since, loss][-MOST:]

    def _forget_reverted(self, reverted: int) -> None:
        """Forget the losses after a candidate that was taken back: the next one may lead to where they are as high."""
        if reverted != self.reverted:
            self.recent, self.reverted = self.plain, reverted

    # ---- candidates ------------------------------------------------------------------------------------------------

    def begin_trial(self, optimizer: Optimizer, judged: bool, reverted: int) -> None:
        """Note that a candidate may have been accepted.

        The losses have risen where each lies above the highest recent one, by more than these differ among each other:
        losses that rise all the time rise less.

        Args:
            optimizer: of the training.
            judged: whether a closure has judged the candidate.
            reverted: how often a candidate has been taken back so far.
        """
        self._forget_reverted(reverted)
        upward = None if judged else maximizes(optimizer)
        sign = 0 if upward is None else -1 if upward else 1
        self.since, self.plain, self.bound, self.sign = [], self.recent, math.inf, sign
        if sign and len(self.recent) == WINDOW:
            values = sign * _joined(self.recent)
            highest = torch.where(values.isfinite(), values, -math.inf).max()
            lowest = torch.where(values.isfinite(), values, math.inf).min()
            self.bound = 2 * highest - lowest + ROUNDING * highest.abs()

    def rise(self) -> Number:
        """How far the losses since the candidate lie above the bound: min(since) - (2 max(recent) - min(recent)).

        Positive, the candidate has led to where the loss is higher. It is nan where a loss since the candidate is not
        finite, and 0 where there are fewer than FEWEST to compare.
        """
        if not self.since:
            return 0.0
        values = self.sign * _joined(self.since)
        bound = torch.as_tensor(self.bound, device=values.device)
        rise = values.min() - bound if len(self.since) >= FEWEST else 0 * values[0]
        return torch.where(values.isfinite().all(), torch.where(rise.isfinite(), rise, 0.0), math.nan)

    def state(self, parameters: Sequence[Tensor]) -> dict[str, Any]:
        """Plain values for a checkpoint.

        Args:
            parameters: all those of the optimizer.
        """
        lists = {"recent": self.recent, "since": self.since, "plain": self.plain, "dropped": self.dropped}
        where = {id(p): place for place, p in enumerate(parameters)}
        return {name: list(map(float, values)) for name, values in lists.items()} | {
            "bound": float(self.bound),
            "sign": self.sign,
            "reverted": self.reverted,
            "begun": self._thread is not None,
            "places": [where[id(p)] for p in self.sample if id(p) in where],
        }


def _mean(losses: list[Number]) -> Number:
    """The loss of a step, from those of its passes."""
    return losses[0] if len(losses) == 1 else sum(losses[1:], losses[0]) / len(losses)


def _version(gradient: Tensor | None) -> int | None:
    """Changes when somebody writes to the gradient."""
    if gradient is None:
        return None
    try:
        return gradient._version
    except RuntimeError:  # an inference tensor, which does not say
        return -1


def _number(tensor: Any) -> Number | None:
    """A tensor of one number without its graph; None for anything else."""
    here: Tensor | None = tensor if type(tensor) is Tensor else local(tensor) if isinstance(tensor, Tensor) else None
    if here is None or type(here) not in PLAIN or here.numel() != 1 or not here.is_floating_point():
        return None
    if here.is_cpu:
        return float(here.item())
    if here.is_meta or (here.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    return here.detach().view(())


def _joined(numbers: list[Number]) -> Tensor:
    """The numbers as one vector, on the device of the first one that has one."""
    device = next((number.device for number in numbers if isinstance(number, Tensor)), None)
    if device is None:
        return host_tensor([float(number) for number in numbers])
    return torch.stack([torch.as_tensor(number, dtype=torch.float64, device=device) for number in numbers])
