"""The losses of a training, as its own backward passes begin at them: what they say of the last candidate.

Nothing is evaluated for it. Without a closure these losses are all that is seen of a candidate that leads where
gradients look like those before: behind the boundary of a logarithm, or onto a plateau.
"""

from __future__ import annotations

import math
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
MOST = 4096
"""Losses that are kept, of one step and after a candidate."""
Number = float | Tensor
"""A Python number from a host, so that nothing is kept of its graph; else a tensor of no dimension on its device."""


class Losses:
    """The losses of one training.

    Args:
        recent: the last WINDOW ones.
        since: those since the last acceleration.
        highest: of the WINDOW ones before it, times the sign, the highest finite one; inf if there is none.
        sign: 1 where the training minimizes its loss, -1 where it maximizes it, 0 where a rise says nothing.

    Attributes:
        coming: those since the last step.
        sample: parameters whose gradients tell that a loss is one of this training.
    """

    def __init__(
        self, recent: Sequence[Number] = (), since: Sequence[Number] = (), highest: Number = math.inf, sign: int = 0
    ) -> None:
        self.recent, self.since, self.highest, self.sign = list(recent), list(since), highest, sign
        self.coming: list[Number] = []
        self.sample: list[Tensor] = []
        self._in_closure = self._is_noted = False

    def see(self, run: Callable[[], Any], given: Sequence[Any]) -> Any:
        """Run a backward pass, and note the losses at which it begins, times the gradients that they are given.

        The product is what the pass minimizes: `(-loss).backward()` and `loss.backward(-one)` are the same. A step
        that evaluates its closure at several points tells by the first one what the loss is. Passed over are losses
        that change no gradient of the sample, or whose gradients are dropped before the next pass (skipped steps),
        tensors of several numbers, and all while a CUDA graph is captured.

        Args:
            run: runs the pass.
            given: arguments of torch's engine, of which the first two are the tensors and their gradients.
        """
        before = [p.grad for p in self.sample]
        versions = [gradient._version if gradient is not None else None for gradient in before]
        if self.coming and not self._is_noted and versions.count(None) == len(versions):
            self.coming = []  # no step was made with the gradients of these losses
        result = run()
        if not self._is_noted and len(given) > 1:
            for p, gradient, version in zip(self.sample, before, versions, strict=True):
                now = p.grad
                if now is not gradient or (now is not None and now._version != version):
                    self._note(given[0], given[1])
                    break
        return result

    def _note(self, roots: Sequence[Any], gradients: Sequence[Any]) -> None:
        self._is_noted = self._in_closure
        for root, gradient in zip(roots, gradients, strict=False):
            loss, factor = _number(root), _number(gradient)
            if loss is not None and factor is not None:
                if len(self.coming) == MOST:  # nobody steps
                    del self.coming[0]
                self.coming.append(loss * factor)

    def begin_step(self, has_closure: bool) -> None:
        """Note that a step begins, within which its closure may be called several times."""
        self._in_closure, self._is_noted = has_closure, False

    def choose(self, parameters: Sequence[Tensor]) -> None:
        """Choose the sample: the first and the last one of the parameters in use.

        Args:
            parameters: those of the optimizer, after a step; without gradients at that time are those that it leaves.
        """
        used = [p for p in parameters if p.grad is not None] or [p for p in parameters if p.requires_grad]
        self.sample = used[:1] + used[1:][-1:]

    def end_step(self, skipped: bool) -> None:
        """Take over the losses of a step; those of a skipped one moved nothing."""
        self._in_closure = self._is_noted = False
        coming, self.coming = self.coming, []
        if coming and not skipped:
            self.recent = [*self.recent, *coming][-WINDOW:]
            self.since = [*self.since, *coming][:MOST]

    def begin_trial(self, sign: int) -> None:
        """Note that a candidate may have been accepted; for the sign see the class."""
        self.since, self.highest, self.sign = [], math.inf, sign
        if sign and len(self.recent) == WINDOW:
            values = sign * _joined(self.recent)
            highest = torch.where(values.isfinite(), values, -math.inf).max()
            self.highest = torch.where(highest.isfinite(), highest, math.inf)

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

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        values = [self.recent, self.since, [self.highest]]
        recent, since, (highest,) = ([float(number) for number in numbers] for numbers in values)
        return {"recent": recent, "since": since, "highest": highest, "sign": self.sign}


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
