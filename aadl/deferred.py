"""Numbers on their way between host and device, without either waiting for the other."""

from __future__ import annotations

import torch
from torch import Tensor


class Deferred:
    """A scalar copied to the host without waiting for the device; `value` waits for the copy.

    On a CPU it is there at once. On CUDA the copy is queued behind the work that makes the number; who asks after the
    next optimizer step finds it done, while the device is busy with that step.

    Args:
        number: a tensor of one element.
    """

    def __init__(self, number: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._number = number.detach()
        if number.device.type == "cuda":
            host = torch.empty(number.shape, dtype=number.dtype, pin_memory=True, device="cpu")
            self._number = host.copy_(number.detach(), non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(number.device))

    def value(self) -> float:
        if self._event is not None:
            self._event.synchronize()
        return float(self._number)


def handed(numbers: Tensor, device: torch.device) -> Tensor:
    """A few numbers of the host on a device; a copy from memory that is not pinned would wait for the device."""
    if device.type != "cuda":
        return numbers.to(device)
    return numbers.pin_memory().to(device, non_blocking=True)
