"""Whether the losses of a run are finite."""

from __future__ import annotations

from torch import Tensor

from aadl.deferred import Deferred


class FiniteLosses:
    """Says whether the losses were finite, some steps late, so that the host does not wait for a device."""

    def __init__(self) -> None:
        self._pending: list[Deferred] = []
        self._finite = True

    def __call__(self, loss: Tensor) -> bool:
        """Takes the present loss; returns whether those of two steps ago and before were finite."""
        self._pending.append(Deferred(loss.isfinite().all()))
        if len(self._pending) > 2:
            self._finite = self._finite and bool(self._pending.pop(0).value())
        return self._finite
