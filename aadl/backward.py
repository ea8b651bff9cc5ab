"""Backward passes: all those of torch's Python interface enter its engine through one call, which is watched here.

Trials skip them (`aadl.trial`), and accelerators look at the losses that they begin at (`aadl.losses`). The call is
replaced while somebody watches.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.autograd import Variable

from aadl.uncompiled import compiler_of_frames, pass_over

Afterwards = Callable[[], None]
"""Called after a backward pass that raised no error."""
Watcher = Callable[[dict[str, Any]], Afterwards | Literal[False] | None]
"""Called before a backward pass that accumulates gradients (not torch.autograd.grad), with the arguments of torch's
engine by name. Where it returns False, the pass is skipped, and nobody else is asked."""

_ARGUMENTS = "tensors", "grad_tensors", "keep_graph", "create_graph", "inputs", "allow_unreachable", "accumulate_grad"
_NAME = "_execution_engine"
_BASE: Any = torch._C._ImperativeEngine
_lock = threading.Lock()
_watchers: tuple[Callable[[], Watcher | None], ...] = ()
"""The first one is asked first. Methods are held weakly, so that a watch keeps no object alive. The tuple is replaced,
never changed, because another thread may be going through it."""


class BackwardWatch:
    """Asks the watcher about every backward pass until `remove` is called, or the owner of a method is gone.

    Args:
        watcher: a function, or a method of an object that may go.
        first: whether it is asked before those that are there.
    """

    def __init__(self, watcher: Watcher, first: bool = False) -> None:
        global _watchers
        _hide()
        is_method = hasattr(watcher, "__self__")
        self._reference = weakref.WeakMethod(watcher) if is_method else lambda: watcher
        with _lock:
            _watchers = (self._reference, *_watchers) if first else (*_watchers, self._reference)
            if vars(Variable).get(_NAME) is not _Engine.newest:  # or it is an older one, which somebody has put back
                setattr(Variable, _NAME, _Engine.around(getattr(Variable, _NAME)))

    def remove(self) -> None:
        """Stop watching."""
        _forget(self._reference)


class _Engine(_BASE):  # type: ignore[misc]
    """Stands for torch's engine, and is of its type, which compiled backward passes ask for."""

    engine: Any
    newest: _Engine | None = None
    """The one that asks the watchers. Older ones may be left inside the replacements of others."""

    @classmethod
    def around(cls, engine: Any) -> _Engine:
        """One that runs the passes of another engine."""
        cls.newest = made = cls()
        made.engine = _without_ours(engine)
        return made

    def run_backward(self, *args: Any, **kwargs: Any) -> Any:
        run = self.engine.run_backward
        if self is not _Engine.newest or kwargs.get("accumulate_grad") is False:
            return run(*args, **kwargs)
        compiles = compiler_of_frames is None or compiler_of_frames() is not None
        ask, tell = _hidden if compiles else (_ask, _tell)
        afterwards = ask(args, kwargs)
        if afterwards is None:
            return ()
        result = run(*args, **kwargs)
        if afterwards:
            tell(afterwards)
        return result


def _ask(args: Any, kwargs: Any) -> list[Afterwards] | None:
    """What is to be done after the pass; None where it is skipped."""
    afterwards: list[Afterwards] = []
    given = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
    if not given.get("accumulate_grad"):
        return afterwards
    for reference in _watchers:
        watcher = reference()
        if watcher is None:
            _forget(reference)
            continue
        answer = watcher(given)
        if answer is False:
            return None
        if answer is not None:
            afterwards.append(answer)
    return afterwards


def _tell(afterwards: list[Afterwards]) -> None:
    for function in afterwards:
        function()


def _hide() -> None:
    """Hide the functions of a pass from torch.compile. The first call imports parts of the compiler."""
    global _hidden
    if _hidden == (_ask, _tell):
        pass_over(_Engine.run_backward)
        _hidden = torch.compiler.disable(_ask), torch.compiler.disable(_tell)  # type: ignore[no-untyped-call]


_hidden: tuple[Callable[..., Any], Callable[..., Any]] = _ask, _tell
"""`_ask` and `_tell` for a pass that begins in compiled code. Hiding them costs each call a microsecond."""


def _forget(reference: Callable[[], Watcher | None]) -> None:
    """Ask this watcher no more; put torch's engine back if it was the last one and nobody has replaced this one."""
    global _watchers
    with _lock:
        _watchers = tuple(other for other in _watchers if other != reference)
        here = vars(Variable).get(_NAME)
        if not _watchers and isinstance(here, _Engine):
            setattr(Variable, _NAME, _without_ours(here))


def _without_ours(engine: Any) -> Any:
    """Unwrap the replacements of this module: several, where somebody has put an older one back."""
    while isinstance(engine, _Engine):
        engine = engine.engine
    return engine
