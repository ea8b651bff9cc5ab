"""Trials: a user's function is evaluated for its value, and leaves no trace.

The function was written for training. After a trial everything that torch's Python interface reaches is as before:

- *Gradients.* A trial has its own value of every attribute `.grad` that it reads or writes, on any tensor. Backward
  passes that accumulate into leaves are skipped; all of them enter the engine through one call. Derivatives that are
  values (torch.autograd.grad, torch.func) are computed as always, and so are the gradients of the optimizer's
  parameters where a backward pass makes a graph of them (`create_graph`), because the loss may contain them.
- *Steps.* A step of any optimizer within a trial finds no gradients, so that it moves nothing; it counts nowhere.
- *Modules.* A trial restores the buffers and the train/eval flags of the modules that it calls.
- *Random numbers.* Every evaluation of a trial sees the same random numbers of torch, on all devices.
- *Caches of weights.* Those of autocast and of torch.nn.utils.parametrize.cached are empty when an evaluation begins,
  because the weights change in between.

A trial cannot restore what a function writes to by other ways (Python objects, tensors of its own in place, its own
generators), and it does not see C++ code that runs backward passes itself (docs/method.md).
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.nn import Module
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.utils import stateless
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from aadl.backward import BackwardWatch
from aadl.parameters import all_parameters
from aadl.trial_values import GRADIENT, Trial


@contextmanager
def without_trace(parameters: Sequence[Tensor], is_closure: bool) -> Iterator[Callable[[], None]]:
    """Evaluate functions inside this context without a trace.

    Args:
        parameters: parameters of the optimizer. After a skipped backward pass their gradients are zeros.
        is_closure: whether the functions are closures for training, which run backward passes and set gradients. For
            functions that do neither, torch's own gradients and engine stay as they are.

    Yields:
        A function that restores what the next evaluation would see of the last one, so that both see the same random
        numbers.
    """
    with _running(Trial(parameters), is_closure) as trial:
        yield trial.rewind


_lock = threading.Lock()
_stances: dict[Any, Any] = {}
"""A key for each context of `_nothing_compiled`; under None the stance of torch's compiler that they share."""
_trials: dict[int, Trial] = {}
"""The running trials of closures, by thread; other threads see torch as it is."""
_noting_trials: dict[int, Trial] = {}
"""The running trials of any functions, by thread."""
_Replaced = list[tuple[Any, str, Any]]
"""Owner, name and original of what is replaced; `_ABSENT` for what the owner inherits."""
_replaced: _Replaced = []
"""While the trial of any closure runs."""
_replaced_for_notes: _Replaced = []
"""While any trial runs."""
_ABSENT = object()
_seen: list[RemovableHandle | BackwardWatch] = []
"""While the trial of any closure runs: the hook on the steps of all optimizers, and the watch on backward passes."""


def on_trial() -> bool:
    """Whether this thread evaluates a closure in a trial."""
    return bool(_trials) and threading.get_ident() in _trials


@contextmanager
def _running(trial: Trial, is_closure: bool = True) -> Iterator[Trial]:
    """Make this the running trial of the thread. (A torch function mode would make compiled models compile once more.)

    Args:
        trial: what is asked and noted.
        is_closure: see `without_trace`.
    """
    thread = threading.get_ident()
    with _lock:
        if not _noting_trials:
            _replace(_replaced_for_notes, _for_notes())
        if not _trials and is_closure:
            _replace(_replaced, _for_closures())
            _seen.extend([register_optimizer_step_pre_hook(_take_gradients), BackwardWatch(_skip, first=True)])
        outer, outer_notes = _trials.get(thread), _noting_trials.get(thread)
        _noting_trials[thread] = trial
        if is_closure:
            _trials[thread] = trial
    handle = register_module_forward_pre_hook(
        lambda module, arguments: trial.note(module) if threading.get_ident() == thread else None
    )
    try:
        with torch.enable_grad(), _nothing_compiled(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using `torch.compile.module.` when there are global hooks")
            yield trial
    finally:
        handle.remove()
        with _lock:
            _go_back(_trials, thread, outer)
            _go_back(_noting_trials, thread, outer_notes)
            if not _trials:
                while _seen:
                    _seen.pop().remove()
                _put_back(_replaced)
            if not _noting_trials:
                _put_back(_replaced_for_notes)
        trial.end()


@contextmanager
def _nothing_compiled() -> Iterator[None]:
    """A context in which nothing is compiled: code that torch would compile (again) runs as it is written.

    The stance of torch's compiler belongs to the process. The first of the trials that run at a time sets it and the
    last one restores it: trials of two threads end in any order.
    """
    key = object()
    with _lock:
        if not _stances:
            has_compiled = torch._dynamo.utils.counters.get("frames")  # otherwise every call gets a bit slower
            _stances[None] = torch.compiler.set_stance("eager_on_recompile") if has_compiled else nullcontext()
        _stances[key] = None
    try:
        yield
    finally:
        with _lock:
            del _stances[key]
            if len(_stances) == 1:
                _stances.pop(None).__exit__(None, None, None)


def _trial() -> Trial | None:
    return _trials.get(threading.get_ident())


def _go_back(trials: dict[int, Trial], thread: int, outer: Trial | None) -> None:
    """Make the trial around the one that ends the running one again."""
    if outer is None:
        trials.pop(thread, None)
    else:
        trials[thread] = outer


def _for_notes() -> _Replaced:
    """Owners, names and replacements of torch's entry points through which modules are changed or called."""
    return [
        (Module, "train", _noting(Module.train)),
        (stateless, "_functional_call", _noting(stateless._functional_call)),
    ]


def _for_closures() -> _Replaced:
    """The same of those that read, write and compute gradients."""
    return [
        (Tensor, "grad", _OWN_GRADIENT),
        (Tensor, "_grad", _OWN_GRADIENT),
        # the usual ways, for speed alone
        (Tensor, "backward", _passing_over(Tensor.backward)),
        (Module, "zero_grad", _clearing(Module.zero_grad, Module.parameters)),
        (Optimizer, "zero_grad", _clearing(Optimizer.zero_grad, all_parameters)),
    ]


def _replace(replaced: _Replaced, replacements: _Replaced) -> None:
    """Replace torch's entry points by ones that ask for the trial of the thread."""
    for owner, name, replacement in replacements:
        replaced.append((owner, name, vars(owner).get(name, _ABSENT)))
        setattr(owner, name, replacement)


def _put_back(replaced: _Replaced) -> None:
    while replaced:
        owner, name, original = replaced.pop()
        if original is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, original)


def _take_gradients(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Let a step that a closure makes within a trial find no gradients."""
    del args, kwargs
    trial = _trial()
    if trial is not None:
        trial.clear(all_parameters(optimizer), to_none=True)


def _skip(given: dict[str, Any]) -> Literal[False] | None:
    """Skip a backward pass within a trial."""
    trial = _trial()
    if trial is None:
        return None
    if given.get("create_graph"):
        trial.differentiate(Variable._execution_engine.run_backward, given)
    else:
        trial.pass_over()
    return False


def _get(tensor: Tensor) -> Tensor | None:
    trial = _trial()
    return GRADIENT.__get__(tensor) if trial is None else trial.gradient(tensor)


def _set(tensor: Tensor, gradient: Tensor | None) -> None:
    trial = _trial()
    if trial is None:
        GRADIENT.__set__(tensor, gradient)
    else:
        trial.set_gradient(tensor, gradient)


_OWN_GRADIENT = property(_get, _set, lambda tensor: _set(tensor, None))
"""`Tensor.grad` that belongs to the trial, where one runs."""


def _passing_over(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        trial = _trial()
        makes_graph = kwargs.get("create_graph", args[2] if len(args) > 2 else False)
        return original(tensor, *args, **kwargs) if trial is None or makes_graph else trial.pass_over()

    return call


def _clearing(original: Callable[..., Any], tensors: Callable[[Any], Iterable[Tensor]]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(owner: Any, set_to_none: bool = True) -> Any:
        trial = _trial()
        return original(owner, set_to_none) if trial is None else trial.clear(tensors(owner), set_to_none)

    return call


def _noting(original: Callable[..., Any]) -> Callable[..., Any]:
    """Have the running trial remember a module, and tensors of a given dictionary, before the function runs."""

    @functools.wraps(original)
    def call(module: Module, *args: Any, **kwargs: Any) -> Any:
        trial = _noting_trials.get(threading.get_ident())
        if trial is not None:
            trial.note(module)
            given = args[0] if args and isinstance(args[0], dict) else {}
            for name in given.keys() & dict(module.named_buffers(remove_duplicate=False)).keys():
                trial.keep(given[name])
        return original(module, *args, **kwargs)

    return call
