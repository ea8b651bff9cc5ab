"""Seconds of training, and those of them that an acceleration takes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn


class Clock:
    """Counts the seconds between `start` and `stop`, wall time and CPU time of the process."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._wall = self._cpu = 0.0
        self._started: tuple[float, float] | None = None

    def start(self) -> None:
        _synchronize(self._model)
        self._started = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        assert self._started is not None
        _synchronize(self._model)
        self._wall += time.perf_counter() - self._started[0]
        self._cpu += time.process_time() - self._started[1]
        self._started = None

    def seconds(self) -> float:
        """Wall time so far; the clock may run."""
        return self._wall + (time.perf_counter() - self._started[0] if self._started is not None else 0.0)

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Stops the clock within a `with` block, whether it runs or not."""
        is_running = self._started is not None
        if is_running:
            self.stop()
        yield
        if is_running:
            self.start()

    def values(self) -> dict[str, float]:
        return {"timing/training_seconds": self._wall, "timing/training_cpu_seconds": self._cpu}

    def state_dict(self) -> dict[str, float]:
        return {"wall": self._wall, "cpu": self._cpu}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self._wall, self._cpu = state["wall"], state["cpu"]


def _synchronize(model: nn.Module) -> None:
    if next(model.parameters()).is_cuda:
        torch.cuda.synchronize()


class HookSeconds:
    """Measures the seconds, on a GPU those of kernels, of the step hooks that are registered before `enclose`."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._device = parameters[0].device if parameters and parameters[0].is_cuda else None
        self._sum = 0.0
        self._spans: list[tuple[Any, Any]] = []
        self._hooks: list[dict[int, Any]] = [optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks]
        self._others = [set(hooks) for hooks in self._hooks]

    def enclose(self) -> HookSeconds:
        """Ends the registration; returns this object."""
        for hooks, others in zip(self._hooks, self._others, strict=True):
            for key in hooks.keys() - others:
                hooks[key] = self._timed(hooks[key])
        return self

    def __call__(self) -> float:
        """Seconds so far; waits for the device."""
        if self._spans:
            torch.cuda.synchronize(self._device)
            self._sum += sum(start.elapsed_time(end) for start, end in self._spans) / 1000
            self._spans.clear()
        return self._sum

    def _now(self) -> Any:
        if self._device is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _timed(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """The hook, which adds its seconds to the sum."""

        def call(*arguments: Any) -> Any:
            start = self._now()
            result = hook(*arguments)
            if self._device is None:
                self._sum += time.perf_counter() - start
            else:
                self._spans.append((start, self._now()))
            return result

        return call
