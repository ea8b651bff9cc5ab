"""Two functions around every step of an optimizer, whoever else hooks into it and however often its step is entered."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from aadl.trial import on_trial
from aadl.uncompiled import uncompiled

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
        self._pre = optimizer.register_step_pre_hook(uncompiled(self._enter))
        self._post = optimizer.register_step_post_hook(uncompiled(self._leave))
        self._pre_hooks: Any = self._pre.hooks_dict_ref()
        self._number = 0
        post_hooks: Any = self._post.hooks_dict_ref()
        if hasattr(post_hooks, "move_to_end"):  # else torch keeps hooks in a way that allows no order
            post_hooks.move_to_end(self._post.id, last=False)

    def remove(self) -> None:
        """Detach both hooks."""
        self._pre.remove()
        self._post.remove()

    def _enter(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if on_trial():  # whose closure steps this optimizer; such a step moves nothing
            return
        if self._running and _is_inside_a_step(optimizer):
            self._entered_again = True
            return
        self._running = True  # as it is already where the last step ended with an exception
        self._before(optimizer, args, kwargs)

    def _leave(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._entered_again:
            if _is_inside_a_step(optimizer):
                return
            self._entered_again = False
        if not self._running or on_trial():
            return
        self._running = False
        if len(self._pre_hooks) != self._number:
            self._move_behind(optimizer)
        self._after(optimizer, args, kwargs)

    def _move_behind(self, optimizer: Optimizer) -> None:
        """Move behind pre-hooks that others have registered since, unless torch iterates over them now."""
        movable = hasattr(self._pre_hooks, "move_to_end") and self._pre.id in self._pre_hooks
        if movable and not _is_inside_a_step(optimizer):
            self._pre_hooks.move_to_end(self._pre.id)
            self._number = len(self._pre_hooks)


def _is_inside_a_step(optimizer: Optimizer) -> bool:
    """Whether the `step` whose hooks run now was called within another `step` of the same optimizer."""
    frame, calls = sys._getframe(), 0
    while frame is not None and calls < 2:
        calls += frame.f_code.co_filename == _WRAPPER and frame.f_locals.get("self") is optimizer
        frame = frame.f_back  # type: ignore[assignment]
    return calls > 1
