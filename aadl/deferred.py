"""Numbers on their way between host and device, without either waiting for the other."""

from __future__ import annotations

import torch
from torch import Tensor


class Deferred:
    """A few numbers copied to the host without waiting for the device; `values` waits for the copy.

    On a CPU they are there at once. On CUDA the copy is queued behind the work that makes the numbers. Who asks after
    the next optimizer step finds it done, while the device is busy with that step.

    Args:
        numbers: a tensor of a few elements.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._numbers = numbers.detach()
        if numbers.device.type == "cuda":
            host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True, device="cpu")
            self._numbers = host.copy_(numbers.detach(), non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(numbers.device))

    def values(self) -> list[float]:
        """The numbers, in one flat list."""
        if self._event is not None:
            self._event.synchronize()
        return self._numbers.view(-1).tolist()

    def value(self) -> float:
        """The number, if it is a single one."""
        (number,) = self.values()
        return float(number)


def handed(numbers: Tensor, device: torch.device) -> Tensor:
    """Copy a few numbers of the host to a device through pinned memory, so that the host does not wait."""
    if device.type != "cuda":
        return numbers.to(device)
    return numbers.pin_memory().to(device, non_blocking=True)


def on_host(numbers: Tensor) -> bool:
    """Whether the host can read the numbers without waiting for a device."""
    return numbers.device.type == "cpu"
