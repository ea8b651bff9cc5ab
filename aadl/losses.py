"""The losses of a training, as its own backward passes begin at them: what they say of the last candidate.

Nothing is evaluated for it. Without a closure these losses are all that is seen of a candidate that leads where
gradients look like those before: behind the boundary of a logarithm, or onto a plateau.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from aadl.mixing import host_tensor
from aadl.ranks import PLAIN, local

WINDOW = 10
"""Losses before a candidate with which those after it are compared."""
FEWEST = 4
"""Losses after a candidate that are compared: that all of them lie above WINDOW others is chance in 1 of 1,001 cases
(of 184,756 with ten)."""
RISING = 1.5
"""Losses rise before a candidate where the means of the halves of WINDOW differ by this many standard deviations of a
loss within a half: chance in 1 of 40 cases, and 3.5 where the losses lie on a straight line."""
MOST = 4096
"""Losses that are kept, of one step and after a candidate."""
_TENSOR: Any = Tensor
_PLAIN_DISPATCH = _TENSOR.__torch_dispatch__
Number = float | Tensor
"""A Python number from a host, so that nothing is kept of its graph; else a tensor of no dimension on its device."""


class Losses:
    """The losses of one training.

    Args:
        recent: the last WINDOW ones.
        since: those since the last acceleration.
        highest: of the WINDOW ones before it, times the sign, the highest finite one; inf if there is none, or if they
            rose already.
        sign: 1 where the training minimizes its loss, -1 where it maximizes it, 0 where a rise says nothing.
        plain: of the WINDOW ones before the last acceleration, which return with the plain iterate.
        reverted: how often a plain iterate has returned; None where nobody has told.
        begun: whether a step was made.
        places: of the sample among the parameters of the optimizer; empty for those that `choose` takes.

    Attributes:
        coming: those since the last step.
        sample: parameters whose gradients tell that a loss is one of this training.
    """

    def __init__(
        self,
        recent: Sequence[Number] = (),
        since: Sequence[Number] = (),
        highest: Number = math.inf,
        sign: int = 0,
        plain: Sequence[Number] = (),
        reverted: int | None = None,
        begun: bool = False,
        places: Sequence[int] = (),
    ) -> None:
        self.recent, self.since, self.highest, self.sign = list(recent), list(since), highest, sign
        self.plain, self.reverted = list(plain), reverted
        self.coming: list[Number] = []
        self.sample: list[Tensor] = []
        self._places = [int(place) for place in places]
        self._left: list[int | None] = []
        self._steps, self._thread = 0, threading.get_ident() if begun else None
        self.in_closure = self._is_noted = False

    def look(self, roots: Sequence[Any], gradients: Sequence[Any]) -> Callable[[], None] | None:
        """Look at a backward pass that begins; return what notes its losses once it has ended, or None.

        What counts is the sign of the gradients that the losses are given: `(-loss).backward()` and
        `loss.backward(-one)` minimize the same, and neither that size nor a constant factor of the loss (the scale of
        a GradScaler) tells how good it is. A step that evaluates its closure at several points tells by the first one
        what the loss is. Passed over are losses that change no gradient of the sample, or whose gradients somebody
        writes to or drops before the next pass (skipped steps); passes within others (reentrant checkpoints), or with
        steps in them; passes of other threads than the one that makes the steps, because nobody may look at gradients
        that another thread computes; tensors of several numbers; and all while a CUDA graph is captured.

        Args:
            roots: the tensors at which the pass begins.
            gradients: those that are given to them.
        """
        sample, steps = self.sample, self._steps
        if not sample or not self.are_here() or torch._C._current_graph_task_id() != -1:
            return None
        if self._is_noted:
            return None
        before = [p.grad for p in sample]
        versions = list(map(_version, before))
        if self.coming and versions != self._left:
            self.coming = []  # no step was made with the gradients of these losses
        factors = list(map(_factor, roots))

        def note() -> None:
            now = [p.grad for p in sample]
            left = list(map(_version, now))
            if steps == self._steps and any(
                gradient is not None and (gradient is not old or version != old_version)
                for gradient, old, version, old_version in zip(now, before, left, versions, strict=True)
            ):
                self._left, self._is_noted = left, self.in_closure
                with torch._C._DisableTorchDispatch():  # modes that count or trace what a training computes
                    numbers = list(map(_told, roots, gradients, factors))
                self.coming = [*self.coming, *(number for number in numbers if number is not None)][-MOST:]

        return note

    def are_here(self) -> bool:
        """Whether this thread makes the steps."""
        return self._thread == threading.get_ident()

    def begin_step(self, has_closure: bool) -> None:
        """Note that a step begins, within which its closure may be called several times."""
        self.in_closure, self._is_noted = has_closure, False
        self._steps, self._thread = self._steps + 1, threading.get_ident()

    def abandon_step(self) -> None:
        """Note that the last step has ended with an exception."""
        self.in_closure = self._is_noted = False

    def choose(self, parameters: Sequence[Tensor]) -> None:
        """Choose the sample: the first and the last one of the parameters in use.

        Args:
            parameters: those of the optimizer, after a step; without gradients at that time are those that it leaves.
        """
        used = [p for p in parameters if p.grad is not None] or [p for p in parameters if p.requires_grad]
        self.sample = used[:1] + used[1:][-1:]

    def choose_again(self, parameters: Sequence[Tensor]) -> None:
        """Take the sample of the saved losses, or choose one."""
        places, self._places = self._places, []
        self.sample = [parameters[place] for place in places if 0 <= place < len(parameters)]
        if not self.sample:
            self.choose(parameters)

    def end_step(self, skipped: bool) -> None:
        """Take over the losses of a step; those of a skipped one moved nothing."""
        self.in_closure = self._is_noted = False
        coming, self.coming = self.coming, []
        if coming and not skipped:
            self.recent = [*self.recent, *coming][-WINDOW:]
            self.since = [*self.since, *coming][:MOST]

    def note_reverts(self, reverted: int) -> None:
        """Forget the losses after a candidate that was taken back.

        Args:
            reverted: how often a plain iterate has returned so far.
        """
        if self.reverted not in (None, reverted):
            self.recent = self.plain
        self.reverted = reverted

    def begin_trial(self, sign: int) -> None:
        """Note that a candidate may have been accepted; for the sign see the class."""
        self.since, self.plain, self.highest, self.sign = [], self.recent, math.inf, sign
        if sign and len(self.recent) == WINDOW:
            values = sign * _joined(self.recent)
            highest = torch.where(values.isfinite(), values, -math.inf).max()
            earlier, later = values.view(2, -1).mean(1)
            deviation = values.view(2, -1).var(1).mean().sqrt()
            rises = later - earlier > RISING * deviation
            self.highest = torch.where(highest.isfinite() & ~rises, highest, math.inf)

    def rise(self) -> Number:
        """How far the losses since the candidate lie above those before it: min(since) - max(before).

        Positive, the candidate has led to where the loss is higher. It is nan where a loss since the candidate is not
        finite, and 0 where there are fewer than FEWEST to compare.
        """
        since, self.since = self.since, []
        if not since:
            return 0.0
        values = self.sign * _joined(since)
        rise = values.min() - self.highest if len(since) >= FEWEST else 0 * values[0]
        return torch.where(values.isfinite().all(), torch.where(rise.isfinite(), rise, 0.0), math.nan)

    def state(self, parameters: Sequence[Tensor]) -> dict[str, Any]:
        """Plain values for a checkpoint.

        Args:
            parameters: all those of the optimizer.
        """
        lists = {"recent": self.recent, "since": self.since, "plain": self.plain}
        where = {id(p): place for place, p in enumerate(parameters)}
        return {name: list(map(float, numbers)) for name, numbers in lists.items()} | {
            "highest": float(self.highest),
            "sign": self.sign,
            "reverted": self.reverted,
            "begun": self._thread is not None,
            "places": [where[id(p)] for p in self.sample if id(p) in where],
        }


def _version(gradient: Tensor | None) -> int | None:
    """Changes when somebody writes to the gradient; inference tensors do not say."""
    return None if gradient is None else -1 if gradient.is_inference() else gradient._version


def _factor(root: Any) -> Tensor | None:
    """The constant of a loss that is a product with one, as a GradScaler makes it; None if there is none.

    Asked before the pass, which frees it. A saved tensor with hooks stays as it is, because these may compute it again.
    """
    with torch._C.DisableTorchFunctionSubclass():
        node = getattr(root, "grad_fn", None)
    if node is None or node.name() != "MulBackward0":
        return None
    held = (getattr(getattr(node, f"_raw_saved_{side}", None), "data", None) for side in ("self", "other"))
    constants = [constant for constant in held if isinstance(constant, Tensor)]
    return constants[0] if len(constants) == 1 else None


def _told(root: Any, gradient: Any, factor: Tensor | None) -> Number | None:
    """What is minimized: the loss without its constant factor, with the sign of its gradient; None if nothing tells."""
    loss, given, scale = _number(root), _number(gradient), 1.0 if factor is None else _number(factor)
    if loss is None or given is None:
        return None
    loss = loss * (given.sign() if isinstance(given, Tensor) else (given > 0) - (given < 0))
    if isinstance(scale, Tensor):
        return loss / torch.where(scale == 0, 1.0, scale.abs())
    return loss / abs(scale) if scale else loss


def _number(tensor: Any) -> Number | None:
    """A tensor of one number without its graph; None for anything else."""
    if not isinstance(tensor, Tensor):
        return None
    kind: Any = type(tensor)
    if kind is not Tensor and kind.__torch_dispatch__ is _PLAIN_DISPATCH:  # its numbers are its own
        with torch._C.DisableTorchFunctionSubclass():
            tensor = tensor.as_subclass(Tensor)
    here = local(tensor)
    if type(here) not in PLAIN or here.numel() != 1 or not here.is_floating_point():
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
