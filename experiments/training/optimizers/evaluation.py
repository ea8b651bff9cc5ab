"""What optimizers evaluate: the loss of a closure, and the weights that they answer for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


def loss_of(closure: Callable[[], Any] | None) -> Any:
    """What the closure returns, with gradients; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


@contextlib.contextmanager
def answering(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within the context the parameters are the result: the average of Schedule-Free, not where it takes gradients."""
    swaps = is_schedule_free(optimizer)
    if swaps:
        optimizer.eval()  # type: ignore[attr-defined]
    yield
    if swaps:
        optimizer.train()  # type: ignore[attr-defined]


def is_schedule_free(optimizer: Any) -> bool:
    """Whether the optimizer, or its class, has weights to train at and others to evaluate."""
    return hasattr(optimizer, "train") and hasattr(optimizer, "eval")
