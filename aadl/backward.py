"""Backward passes: all those of torch's Python interface enter its engine through one call, which is watched here.

Trials skip them (`aadl.trial`), and accelerators look at the losses that they begin at (`aadl.losses`). The call is
replaced while somebody watches.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

from torch.autograd import Variable

Watcher = Callable[[Callable[[], Any], Any, Any], Any]
"""Called with a function that runs the pass, and with the arguments and keywords of torch's engine (`named`); returns
what the pass returns. It is asked about passes that accumulate gradients, not about torch.autograd.grad."""

_ARGUMENTS = "tensors", "grad_tensors", "keep_graph", "create_graph", "inputs", "allow_unreachable", "accumulate_grad"
_NAME = "_execution_engine"
_lock = threading.Lock()
_watchers: list[Callable[[], Watcher | None]] = []
"""The first one is asked first. Methods are held weakly, so that nobody lives on because he watches."""


class Watch:
    """Asks the watcher about every backward pass until `remove` is called, or the owner of a method is gone.

    Args:
        watcher: a function, or a method of an object that may go.
        first: whether it is asked before those that are there.
    """

    def __init__(self, watcher: Watcher, first: bool = False) -> None:
        is_method = hasattr(watcher, "__self__")
        self._reference = weakref.WeakMethod(watcher) if is_method else lambda: watcher
        with _lock:
            _watchers.insert(0 if first else len(_watchers), self._reference)
            if not isinstance(vars(Variable).get(_NAME), _Engine):
                setattr(Variable, _NAME, _Engine(getattr(Variable, _NAME)))

    def remove(self) -> None:
        """Stop watching."""
        _forget(self._reference)


class _Engine:
    """Stands for torch's engine."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def run_backward(self, *args: Any, **kwargs: Any) -> Any:
        run = functools.partial(self.engine.run_backward, *args, **kwargs)
        if kwargs.get("accumulate_grad") or named(args, kwargs).get("accumulate_grad"):
            for reference in reversed(_watchers):
                watcher = reference()
                if watcher is None:
                    _forget(reference)
                else:
                    run = functools.partial(watcher, run, args, kwargs)
        return run()


def named(args: Any, kwargs: Any) -> dict[str, Any]:
    """All arguments of torch's engine by name."""
    return {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}


def _forget(reference: Callable[[], Watcher | None]) -> None:
    """Ask this watcher no more; put torch's engine back if it was the last one and nobody has replaced this one."""
    with _lock:
        if reference in _watchers:
            _watchers.remove(reference)
        here = vars(Variable).get(_NAME)
        if not _watchers and isinstance(here, _Engine):
            setattr(Variable, _NAME, here.engine)
