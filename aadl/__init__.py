"""Stable Anderson acceleration for PyTorch optimizers.

    optimizer = aadl.accelerate(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))

Lupo Pasini, Yin, Reshniak, Stoyanov, "Stable Anderson Acceleration for Deep Learning", arXiv 2110.14813.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from aadl.accelerator import AndersonAccelerator, accelerator_of, find_accelerator
from aadl.settings import Settings

__version__ = "0.1.0"
__all__ = ["AndersonAccelerator", "accelerate", "accelerator_of", "remove_acceleration", "reset_history"]


def accelerate(
    optimizer: Optimizer,
    acceleration_type: str = "anderson",
    relaxation: float = 1.0,
    wait_iterations: int = 1,
    history_depth: int = 10,
    store_each_nth: int = 10,
    frequency: int = 20,
    reg_acc: float = 1e-8,
    average: bool | str = True,
    *,
    safeguard: bool | str = True,
    average_tolerance: float = 0.7,
    average_window: int | None = None,
    state_coupling: str = "full",
    history_dtype: torch.dtype | None = None,
    shard_history: bool = False,
    process_group: Any = None,
) -> Optimizer:
    """TODO"""
    if find_accelerator(optimizer) is not None:
        raise ValueError("this optimizer is accelerated already: call aadl.remove_acceleration(optimizer) first")
    settings = Settings(
        acceleration_type, relaxation, wait_iterations, history_depth, store_each_nth, frequency, reg_acc, average,
        safeguard, average_tolerance, average_window, state_coupling, history_dtype,
    )  # fmt: skip
    AndersonAccelerator(optimizer, settings, process_group)
    return optimizer


def reset_history(optimizer: Optimizer) -> None:
    """Forget the history of an accelerated optimizer, e.g. after its data or its parameters were exchanged."""
    accelerator_of(optimizer).reset()


def remove_acceleration(optimizer: Optimizer) -> None:
    """Detach the accelerator; the optimizer is afterwards as if it had never been accelerated."""
    accelerator_of(optimizer).remove()
