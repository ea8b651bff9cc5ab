"""Backward passes between two steps: which losses the step that comes goes back to.

Scripts clear gradients, clip them, add several passes up, and make no step where a loss is not finite. Gradients tell
what became of a pass: nobody else sees it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from aadl.mixing import host_tensor
from aadl.ranks import PLAIN, local

STUCK = 3
"""Losses that are not finite and lead to no step, beyond those usual between steps, after which none is expected."""
HABIT = 10
"""Steps that tell what is usual."""
MOST = 4096
"""Losses that are kept between steps."""
Number = float | Tensor
"""A Python number from a host, so that nothing is kept of its graph; else a tensor of no dimension on its device."""


@dataclass
class Passes:
    """The backward passes of one training since its last step.

    Args:
        dropped: losses with whose gradients no step was made; the last ones since the last step.
        num_dropped: their number since the last step.
        usually_dropped: their numbers before each of the last HABIT steps.
        begun: whether a step was made; nobody looks before.
        places: of the sample among the parameters of the optimizer; none where `choose` has taken none.

    Attributes:
        sample: parameters whose gradients tell that a loss is one of this training.
        coming: losses of the passes whose gradients are there.
    """

    dropped: list[Number] = field(default_factory=list)
    num_dropped: int = 0
    usually_dropped: list[int] = field(default_factory=list)
    begun: bool = False
    places: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sample: list[Tensor] = []
        self.coming: list[Number] = []
        self._is_unknown = False
        """Whether gradients are there of a pass that began at several numbers."""
        self._left: list[tuple[int, int | None]] = []
        self._were_zero = False
        self._was_stuck = False
        self._steps, self._in_closure, self._is_noted = 0, False, False
        self._thread: int | None = None

    def choose(self, parameters: Sequence[Tensor]) -> None:
        """Choose the sample: the first and the last one of the parameters in use.

        Args:
            parameters: those of the optimizer, after a step; without gradients at that time are those that it leaves.
        """
        used = [p for p in parameters if p.grad is not None] or [p for p in parameters if p.requires_grad]
        self.sample = used[:1] + used[1:][-1:]

    def look(self, given: dict[str, Any], when_stuck: Callable[[], None]) -> Callable[[], None] | None:
        """Look at a backward pass that begins; return what notes its losses once it has ended, or None.

        A loss counts times the gradient that it is given, because `(-loss).backward()` and `loss.backward(-one)`
        minimize the same. A step that evaluates its closure at several points tells by the first one what the loss is.
        Passed over are losses that change no gradient of the sample, or whose gradients somebody writes to or drops
        before the next pass; passes within others (reentrant checkpoints), or with steps in them; passes of other
        threads than the one that makes the steps (after a resume, than the first one), because nobody may look at
        gradients that another thread computes; and all while a CUDA graph is captured. A pass that begins at several
        numbers as well makes the loss of its step unknown.

        Args:
            given: arguments of torch's engine: the tensors at which the pass begins, and their gradients.
            when_stuck: called after a pass whose loss is not finite either, where no step is expected any more.
        """
        sample, steps, thread = self.sample, self._steps, threading.get_ident()
        if self.begun and self._thread is None:
            self._thread = thread
        if self._is_noted or self._thread != thread or torch._C._current_graph_task_id() != -1:
            return None
        if any(p.is_cuda for p in sample) and torch.cuda.is_current_stream_capturing():
            return None
        before = _gradients(sample)
        is_stuck = before != self._left and self._drop()

        def note() -> None:
            left = _gradients(sample)
            if steps == self._steps and left != before:
                self._left, self._is_noted = left, self._in_closure
                modes = torch._C._len_torch_dispatch_stack()  # they count or trace what a training computes
                with torch._C._DisableTorchDispatch() if modes else nullcontext():
                    self._note(given.get("tensors", ()), given.get("grad_tensors", ()))
                self._were_zero = self._are_zero()
            if is_stuck and self.coming and not math.isfinite(self.coming[-1]):
                when_stuck()  # the gradients of this pass lead to no step

        return note

    def _note(self, roots: Sequence[Any], gradients: Sequence[Any]) -> None:
        for root, gradient in zip(roots, gradients, strict=False):
            loss, factor = _number(root), _number(gradient)
            if loss is None or factor is None:
                self._is_unknown = True
            else:
                self.coming.append(loss * factor)
        del self.coming[:-MOST]  # nobody steps

    def _drop(self) -> bool:
        """Put losses aside with whose gradients no step was made; return whether none is expected any more.

        That is so where none of them is finite, and there are STUCK more of them than usual: adversarial examples and
        gradients by row clear gradients between steps, and some clip them after each of several passes. A device is
        not asked more often than about every third time.
        """
        if not self.coming:
            self._is_unknown = False
            return False
        most = STUCK + max(self.usually_dropped, default=0)
        self.dropped, self.num_dropped = [*self.dropped, mean(self.coming)][-most:], self.num_dropped + 1
        self.coming, self._is_unknown = [], False
        return self.num_dropped % most == 0 and not any(map(math.isfinite, self.dropped))

    def begin_step(self, has_closure: bool) -> None:
        """Note that a step begins, within which its closure may be called several times."""
        thread = threading.get_ident()
        if self._in_closure:  # the last step has ended with an error
            self.coming, self._is_unknown = [], False
        self._in_closure, self._is_noted = has_closure, False
        self._was_stuck = False
        if self._thread not in (None, thread) or self._are_cleared():
            self._was_stuck = self._drop()
        elif self.coming and [tensor for tensor, _ in _gradients(self.sample)] != [tensor for tensor, _ in self._left]:
            self._is_unknown = True  # somebody has put gradients of his own there
        self._steps, self.begun, self._thread = self._steps + 1, True, thread

    def end_step(self, skipped: bool) -> tuple[Number | None, bool]:
        """End a step; one that was skipped, or whose closure had cleared the gradients, moved nothing.

        Returns:
            Its loss, None where it is not known; and whether no step is expected any more, because it was skipped as
            several before, of which no loss was finite.
        """
        if skipped or (self._in_closure and self._are_cleared()):
            self._was_stuck = self._drop() or self._was_stuck
        self._in_closure = self._is_noted = False
        if skipped:
            return None, self._was_stuck
        loss = mean(self.coming) if self.coming and not self._is_unknown else None
        self.usually_dropped, self.num_dropped = [*self.usually_dropped, self.num_dropped][-HABIT:], 0
        self.coming, self.dropped, self._is_unknown = [], [], False
        return loss, False

    def _are_cleared(self) -> bool:
        """Whether the user has cleared the gradients since the last pass, as scripts do where a loss is not finite.

        An optimizer may clear them as well, at the end of its step.
        """
        if self.coming and not self._in_closure and all(p.grad is None for p in self.sample):
            return True
        return self._are_zero() and not self._were_zero

    def _are_zero(self) -> bool:
        """Whether gradients are zero or gone; not asked of a device, nor where the loss is finite."""
        if not self.coming or isinstance(self.coming[-1], Tensor) or math.isfinite(self.coming[-1]):
            return False
        here = [local(p.grad) for p in self.sample if p.grad is not None]
        return all(gradient.layout == torch.strided and not gradient.any() for gradient in here)

    def state(self, parameters: Sequence[Tensor]) -> dict[str, Any]:
        """Plain values, from which `Passes(**state)` continues; gradients are not saved, so they lead to no step.

        Args:
            parameters: all those of the optimizer.
        """
        where = {id(p): place for place, p in enumerate(parameters)}
        return {
            "dropped": joined([*self.dropped, *([mean(self.coming)] if self.coming else [])]).tolist(),
            "num_dropped": self.num_dropped + bool(self.coming),
            "usually_dropped": self.usually_dropped,
            "begun": self.begun,
            "places": [where[id(p)] for p in self.sample if id(p) in where],
        }


def mean(losses: list[Number]) -> Number:
    """The loss of a step, from those of its passes."""
    if len(losses) == 1:
        return losses[0]
    return joined(losses).mean() if any(isinstance(loss, Tensor) for loss in losses) else sum(losses) / len(losses)


def joined(numbers: Sequence[Number]) -> Tensor:
    """The numbers as one float64 vector, on the device of the first one that has one."""
    device = next((number.device for number in numbers if isinstance(number, Tensor)), None)
    if device is None:
        return host_tensor([float(number) for number in numbers])
    return torch.stack([torch.as_tensor(number, dtype=torch.float64, device=device) for number in numbers])


def _gradients(sample: Sequence[Tensor]) -> list[tuple[int, int | None]]:
    """Which tensors the gradients are, and how often they were written to."""
    return [(id(gradient), _version(gradient)) for gradient in [p.grad for p in sample]]


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
