"""Two functions around every step of an optimizer, whoever else hooks into it and however often its step is entered."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

_WRAPPER = Optimizer.register_step_pre_hook.__code__.co_filename
"""The file of the function that torch wraps around `step`, which calls the hooks."""

Before = Callable[[Optimizer, Any, Any], None]


class StepHooks:
    """Calls `before` and `after` once around each outermost call of `optimizer.step`.

    torch wraps the `step` of every class, so that a subclass whose `step` calls `super().step()` runs all hooks twice;
    only the outermost call counts. `after` runs before the post-hooks of others, which see the weights that the step
    leaves; `before` runs after the pre-hooks of others, whose changes it can notice.

    Args:
        optimizer: whose steps.
        before: called with (optimizer, args, kwargs) of the step.
        after: called with the same, unless the step raised an exception.
    """

    def __init__(self, optimizer: Optimizer, before: Before, after: Before) -> None:
        self._before, self._after = before, after
        self._running = self._entered_again = False
        self._pre = optimizer.register_step_pre_hook(self._enter)
        self._post = optimizer.register_step_post_hook(self._leave)
        _move(self._post, last=False)

    def remove(self) -> None:
        """Detach."""
        self._pre.remove()
        self._post.remove()

    @torch.compiler.disable
    def _enter(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._running and _is_inside_a_step(optimizer):  # else the last step ended with an exception
            self._entered_again = True
            return
        self._running, self._entered_again = True, False
        self._before(optimizer, args, kwargs)

    @torch.compiler.disable
    def _leave(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._running or (self._entered_again and _is_inside_a_step(optimizer)):
            return
        self._running = False
        if not _stands(self._pre, last=True) and not _is_inside_a_step(optimizer):  # else torch goes through them
            _move(self._pre, last=True)
        self._after(optimizer, args, kwargs)


def _stands(handle: Any, last: bool) -> bool:
    """Whether a hook is the last or the first of all; also where torch keeps hooks in a way that allows no order."""
    hooks = handle.hooks_dict_ref()
    movable = hasattr(hooks, "move_to_end") and handle.id in hooks
    return not movable or next(reversed(hooks) if last else iter(hooks)) == handle.id


def _move(handle: Any, last: bool) -> None:
    """Put a hook behind or in front of all others."""
    if not _stands(handle, last):
        handle.hooks_dict_ref().move_to_end(handle.id, last=last)


def _is_inside_a_step(optimizer: Optimizer) -> bool:
    """Whether the call of `step` whose hooks run now was made during another one of the same optimizer."""
    frame, calls = sys._getframe(), 0
    while frame is not None and calls < 2:
        calls += frame.f_code.co_filename == _WRAPPER and frame.f_locals.get("self") is optimizer
        frame = frame.f_back  # type: ignore[assignment]
    return calls > 1
