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
"""Losses that are not finite and to which no step is made, beyond those usual between steps, after which a candidate
goes."""
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
        not_finite: number of those before that were not finite, without those after candidates that were taken back.
        dropped: those with whose gradients no step was made; the last ones since the last step.
        num_dropped: their number since the last step.
        usually_dropped: their numbers before each of the last WINDOW steps.
        begun: whether a step was made.
        places: of the sample among the parameters of the optimizer; none for those that `choose` takes.

    Attributes:
        coming: those of the passes since the last step.
        sample: parameters whose gradients tell that a loss is one of this training.
    """

    def __init__(
        self,
        recent: Sequence[Number] = (),
        since: Sequence[Number] = (),
        plain: Sequence[Number] = (),
        bound: Number = math.inf,
        sign: int = 0,
        reverted: int = 0,
        not_finite: Number = 0.0,
        dropped: Sequence[Number] = (),
        num_dropped: int = 0,
        usually_dropped: Sequence[int] = (),
        begun: bool = False,
        places: Sequence[int] = (),
    ) -> None:
        self.recent, self.since, self.plain = list(recent), list(since), list(plain)
        self.bound, self.sign, self.reverted, self.not_finite = bound, sign, reverted, not_finite
        self.coming: list[Number] = []
        self.dropped, self.num_dropped, self.usually_dropped = list(dropped), num_dropped, list(usually_dropped)
        self.sample: list[Tensor] = []
        self._places = list(places)
        self._left: list[int | None] = []
        self._were_zero = False
        self._steps, self._in_closure, self._is_noted = 0, False, False
        self._begun, self._thread = begun, None

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
        passes of other threads than the one that makes the steps (after a resume, than the first one), because nobody
        may look at gradients that another thread computes; tensors of several numbers; and all while a CUDA graph is
        captured.

        Args:
            given: arguments of torch's engine: the tensors at which the pass begins, and their gradients.
            when_stuck: called after a pass whose loss is not finite either, where no step will be made any more.
        """
        sample, steps, thread = self.sample, self._steps, threading.get_ident()
        if self._begun and self._thread is None:
            self._thread = thread
        if self._is_noted or self._thread != thread or torch._C._current_graph_task_id() != -1:
            return None
        if any(p.is_cuda for p in sample) and torch.cuda.is_current_stream_capturing():
            return None
        before = [p.grad for p in sample]
        versions = list(map(_version, before))
        is_stuck = bool(self.coming) and versions != self._left and self._drop()

        def note() -> None:
            left = [_version(p.grad) for p in sample]
            replaced = [p.grad is not gradient for p, gradient in zip(sample, before, strict=True)]
            if steps == self._steps and (left != versions or any(replaced)):
                self._left, self._is_noted = left, self._in_closure
                modes = torch._C._len_torch_dispatch_stack()  # they count or trace what a training computes
                with torch._C._DisableTorchDispatch() if modes else nullcontext():
                    self._note(given.get("tensors", ()), given.get("grad_tensors", ()))
                self._were_zero = self._are_zero()
            if is_stuck and self.coming and not math.isfinite(self.coming[-1]):
                when_stuck()  # the gradients of this pass lead to no step

        return note

    def _drop(self) -> bool:
        """Put losses aside with whose gradients no step was made; return whether none will be made any more.

        That is so where none of them is finite, and there are STUCK more of them than usual: adversarial examples and
        gradients by row clear gradients between steps, and accumulated ones are clipped. A device is not asked more
        often than about every third of them.
        """
        most = STUCK + max(self.usually_dropped, default=0)
        if self.coming:
            self.dropped, self.num_dropped = [*self.dropped, _mean(self.coming)][-most:], self.num_dropped + 1
            self.coming = []
        return self.num_dropped > 0 and self.num_dropped % most == 0 and not any(map(math.isfinite, self.dropped))

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
        thread = threading.get_ident()
        if self._in_closure:  # the last step has ended with an error
            self.coming = []
        elif self._thread not in (None, thread):  # nobody has looked whether the gradients are still those
            self._drop()
        self._in_closure, self._is_noted = has_closure, False
        self._steps, self._begun, self._thread = self._steps + 1, True, thread

    def end_step(self, skipped: bool, reverted: int) -> bool:
        """Take over the losses of a step; those of a skipped one, or of one without gradients, moved nothing.

        Args:
            skipped: whether it was skipped.
            reverted: how often a candidate has been taken back so far.

        Returns:
            Whether it was skipped, and no step will be made any more, because the loss is not finite.
        """
        self._forget_reverted(reverted)
        self._in_closure = self._is_noted = False
        if skipped:
            return self._drop()
        if self.coming and self._are_cleared():
            self._drop()
        coming, self.coming, self.dropped = self.coming, [], []
        self.usually_dropped, self.num_dropped = [*self.usually_dropped, self.num_dropped][-WINDOW:], 0
        if coming:
            loss = _mean(coming)
            self.recent = [*self.recent, loss][-WINDOW:]
            self.since = [*self.since, loss][-MOST:]
        return False

    def _are_cleared(self) -> bool:
        """Whether the user has cleared the gradients before the step, as scripts do where the loss is not finite."""
        return all(p.grad is None for p in self.sample) or (self._are_zero() and not self._were_zero)

    def _are_zero(self) -> bool:
        """Whether gradients are zero; not asked of a device, nor where the loss is finite."""
        if not self.coming or isinstance(self.coming[-1], Tensor) or math.isfinite(self.coming[-1]):
            return False
        here = [local(p.grad) for p in self.sample if p.grad is not None]
        return all(gradient.layout == torch.strided and not gradient.any() for gradient in here)

    def _forget_reverted(self, reverted: int) -> None:
        """Forget the losses after a candidate that was taken back: the next one may lead to where they are as high."""
        if reverted != self.reverted:
            self.recent, self.since, self.reverted = self.plain, [], reverted

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
        if self.since:
            self.not_finite = self.not_finite + _joined(self.since).isfinite().logical_not().sum()
        self.since, self.plain, self.bound, self.sign = [], self.recent, math.inf, sign
        if sign and len(self.recent) == WINDOW:
            values = sign * _joined(self.recent)
            highest = torch.where(values.isfinite(), values, -math.inf).max()
            lowest = torch.where(values.isfinite(), values, math.inf).min()
            self.bound = 2 * highest - lowest + ROUNDING * highest.abs()

    def rise(self) -> Number:
        """How far the losses since the candidate lie above the bound: min(since) - (2 max(recent) - min(recent)).

        Positive, the candidate has led to where the loss is higher. It is nan where more losses since the candidate are
        not finite than all those before it, and 0 where there are fewer than FEWEST to compare.
        """
        if not self.since:
            return 0.0
        values = self.sign * _joined(self.since)
        finite = values.isfinite()
        bound, known = (torch.as_tensor(number, device=values.device) for number in (self.bound, self.not_finite))
        rise = torch.where(finite, values, math.inf).min() - bound
        counts = rise.isfinite() & (len(self.since) >= FEWEST)
        return torch.where(finite.logical_not().sum() <= known, torch.where(counts, rise, 0.0), math.nan)

    def state(self, parameters: Sequence[Tensor]) -> dict[str, Any]:
        """Plain values for a checkpoint.

        Args:
            parameters: all those of the optimizer.
        """
        lists = {"recent": self.recent, "since": self.since, "plain": self.plain}
        lists["dropped"] = [*self.dropped, *([_mean(self.coming)] if self.coming else [])]  # gradients are not saved
        where = {id(p): place for place, p in enumerate(parameters)}
        return {name: list(map(float, values)) for name, values in lists.items()} | {
            "bound": float(self.bound),
            "sign": self.sign,
            "reverted": self.reverted,
            "not_finite": float(self.not_finite),
            "num_dropped": self.num_dropped + bool(self.coming),
            "usually_dropped": self.usually_dropped,
            "begun": self._begun,
            "places": [where[id(p)] for p in self.sample if id(p) in where],
        }


def _mean(losses: list[Number]) -> Number:
    """The loss of a step, from those of its passes."""
    return losses[0] if len(losses) == 1 else sum(losses[1:], losses[0]) / len(losses)


def _version(gradient: Tensor | None) -> int | None:
    """Changes when somebody writes to the gradient; fully_shard accumulates into the local part of a DTensor."""
    if gradient is None:
        return None
    try:
        return gradient._version if type(gradient) is Tensor else local(gradient)._version
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
