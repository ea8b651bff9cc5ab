"""What an optimizer keeps beside parameters and their momentum, from before the steps after a candidate.

No candidate changes second moments, but the steps after it may: one gradient that is not finite stays in them for good.
So they are copied before the first of these steps, and return with the plain iterate where its update is not finite.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from aadl.history_layout import Layout
from aadl.parameters import momentum_of, state_of
from aadl.ranks import PLAIN, local


class Spare:
    """Copies of the tensors in the state of an optimizer that no history holds."""

    def __init__(self) -> None:
        self._number = -1
        self._kept: list[tuple[Any, str, Tensor]] = []

    def drop(self) -> None:
        """Free the copies: no candidate is on trial."""
        self._number, self._kept = -1, []

    def keep(self, optimizer: Optimizer, layout: Layout, number: int) -> None:
        """Copy the state as it is now, unless there are copies for this acceleration already.

        Args:
            optimizer: whose state.
            layout: of the history.
            number: of the macro-step of the acceleration that made the candidate.
        """
        if number == self._number:
            return
        self.drop()
        self._number = number
        try:
            for p in layout.parameters:
                state = state_of(optimizer, p)
                momentum = momentum_of(state, p) if layout.has_momentum else None
                for key, value in state.items():
                    if value is not momentum and (here := _numbers(value)) is not None:
                        self._kept.append((state, key, here.clone()))
        except torch.OutOfMemoryError:
            self._kept = []
            warnings.warn(
                "there is no room for a copy of the second moments: if the updates after a candidate are not finite, "
                "the weights return alone, and ranks that have room for it differ from this one",
                UserWarning,
                stacklevel=2,
            )

    def put_back(self, flag: Tensor | bool) -> None:
        """Copy the values back where the flag holds.

        A flag on a device decides there, and about what lies there: counters of steps on the host would wait for it.
        """
        if flag is False:
            return
        for state, key, copy in self._kept:
            here = _numbers(state.get(key))
            if here is None or here.shape != copy.shape:
                continue
            if isinstance(flag, bool):
                here.copy_(copy)
            elif here.device.type == flag.device.type:
                here.copy_(torch.where(flag.to(here.device), copy, here))


def _numbers(value: Any) -> Tensor | None:
    """The part of a tensor of numbers with a fraction that lies here; None for anything else."""
    if not isinstance(value, Tensor):
        return None
    here = local(value.detach())
    fits = type(here) in PLAIN and here.layout == torch.strided
    return here if fits and (here.is_floating_point() or here.is_complex()) else None
