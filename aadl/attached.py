"""Accelerator: attached to an optimizer by hooks, saved with the optimizer's state, and found again."""

from __future__ import annotations

import warnings
import weakref
from abc import ABC, abstractmethod
from typing import Any, NoReturn

from torch import Tensor
from torch.optim import Optimizer

from aadl.hooks import StepHooks
from aadl.parameters import trainable_parameters
from aadl.ranks import ranks_of
from aadl.settings import Settings
from aadl.statistics import Statistics
from aadl.wrappers import Target, chain_of, warn_of_loads_without_hooks, warn_of_saves_without_hooks

VERSION = 5
"""Of the layout of the states that accelerators save."""
STATE_KEY = "aadl"
"""Key under which `optimizer.state_dict()` carries the accelerator's state."""

_accelerators: weakref.WeakKeyDictionary[Optimizer, weakref.ref[Accelerator]] = weakref.WeakKeyDictionary()


class Accelerator(ABC):
    """Base of the accelerators: hooks around the steps, and the state inside that of the optimizer.

    Each kind of acceleration implements what happens before and after a step, its state, and its start.

    Attributes:
        settings: the validated arguments.
        process_group: the ranks that decide together; None for all of them.
    """

    _given_up = False
    """Whether parameters came that cannot be extrapolated, so that nothing is accelerated any more."""

    def __init__(self, target: Target, settings: Settings, process_group: Any = None) -> None:
        optimizer = target.optimizer
        self.settings, self.process_group = settings, process_group
        self._optimizer = weakref.ref(optimizer)
        self._partitioned = target.kind == "partitioned"
        if not trainable_parameters(optimizer) and not self._partitioned:
            raise ValueError(f"this {type(optimizer).__name__} has no parameter that requires a gradient")
        self._loaded: tuple[dict[str, Any], dict[str, Any]] | None = None
        self._loads_by_name = self._lacks_history = False
        self._start_over()
        self._handles: list[Any] = []
        try:
            self._attach(target)
        except BaseException:  # nothing stays attached
            self._detach()
            raise
        _accelerators[optimizer] = weakref.ref(self)

    # ---- public ----------------------------------------------------------------------------------------------------

    @property
    def optimizer(self) -> Optimizer:
        """The accelerated optimizer."""
        optimizer = self._optimizer()
        if optimizer is None:
            raise ReferenceError("the accelerated optimizer no longer exists")
        return optimizer

    @property
    @abstractmethod
    def statistics(self) -> Statistics:
        """Counters and last values. Reading them waits for the device."""

    @property
    @abstractmethod
    def history_bytes(self) -> int:
        """Bytes of the history on this rank; before the first step the bytes that it will take."""

    def observe(self, residuals: Tensor) -> None:
        """Hand over the residuals of a least-squares loss at the present weights, see `ResidualAccelerator.observe`.

        Raises:
            ValueError: this kind of acceleration has no use for them.
        """
        del residuals
        raise ValueError(
            f"observe needs aadl.accelerate(optimizer, 'nonlinear_gmres'), this optimizer is accelerated by "
            f"{self.settings.acceleration_type!r}"
        )

    @abstractmethod
    def reset(self) -> None:
        """Forget the history, because the map changed: new data, a new loss, restored weights. Counters stay."""

    def remove(self) -> None:
        """Detach: the optimizer is afterwards as if it had never been accelerated."""
        self._detach()
        _accelerators.pop(self.optimizer, None)

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs: `rows`, tensors by name (see aadl.state), and `values`, plain ones."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue as the saved accelerator would have.

        Raises:
            ValueError: the state was saved for another map, or is no accelerator state. Nothing was changed then.
        """
        self._take_over(state, self._checked(state))

    def __repr__(self) -> str:
        optimizer, name = self._optimizer(), type(self).__name__
        kind = "nothing" if optimizer is None else type(optimizer).__name__
        if not self._handles:
            return f"{name}(removed)"
        done = f"{self.statistics['accepted']} of {self.statistics['attempts']} accepted"
        return f"{name}({kind}, {self.settings}, {self.num_columns} columns held, {done})"

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise TypeError(
            "an accelerator cannot be copied without its optimizer: copy the optimizer, call aadl.accelerate on the "
            "copy and hand it this accelerator's state_dict()"
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError("an accelerator cannot be pickled: save its state_dict() (optimizer.state_dict() carries it)")

    # ---- what each kind of acceleration implements ---------------------------------------------------------------

    @property
    @abstractmethod
    def num_columns(self) -> int:
        """Columns that the history holds."""

    @abstractmethod
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Act before a step of the optimizer, whose arguments these are."""

    @abstractmethod
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Act after a step of the optimizer, whose arguments these are."""

    @abstractmethod
    def _start_over(self) -> None:
        """Be as an accelerator that has seen no step."""

    @abstractmethod
    def _checked(self, state: Any) -> dict[str, Any]:
        """The plain values of a saved state; raises ValueError if it does not fit."""

    @abstractmethod
    def _take_over(self, state: dict[str, Any], saved: dict[str, Any]) -> None:
        """Continue from a saved state and its checked plain values."""

    @abstractmethod
    def _let_go(self) -> None:
        """Drop the history, where nothing is accelerated any more."""

    def _is_off(self) -> bool:
        """Whether nothing is accelerated."""
        return self.settings.idle or self._given_up or not self._handles

    def _extrapolated(self, optimizer: Optimizer) -> list[Tensor] | None:
        """What is extrapolated; None where parameters came after `accelerate` that cannot be.

        Training then goes on without acceleration. Several ranks stop, because they would wait for each other.
        """
        try:
            return None if self._given_up else trainable_parameters(optimizer)
        except ValueError as error:
            if ranks_of(self.process_group).size > 1:
                raise
            self._given_up = True
            self._let_go()  # before the warning, which may be an error
            warnings.warn(f"training goes on without acceleration: {error}", UserWarning, stacklevel=2)
            return None

    # ---- hooks -----------------------------------------------------------------------------------------------------

    def _attach(self, target: Target) -> None:
        self._handles.append(StepHooks(target.optimizer, self._before_step, self._after_step))
        if self._partitioned:  # a consolidated state of partitions would carry the whole history over the network
            self._handles.append(target.optimizer.register_state_dict_post_hook(self._say_that_state_is_partial))
        elif target.optimizer in target.carriers:
            warn_of_saves_without_hooks(target.optimizer)
        for carrier in target.carriers:
            self._handles.append(carrier.register_state_dict_post_hook(self._add_state))
            self._handles.append(carrier.register_load_state_dict_pre_hook(self._take_state))
            self._handles.append(carrier.register_load_state_dict_post_hook(self._restore_state))

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _add_state(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        warn_of_loads_without_hooks(optimizer)
        state[STATE_KEY] = self.state_dict()

    def _take_state(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        del optimizer
        saved = state.get(STATE_KEY)
        self._loaded = None if saved is None else (saved, self._checked(saved))
        names = [name for group in state.get("param_groups", ()) for name in group.get("params", ())]
        self._loads_by_name = any(isinstance(name, str) for name in names)
        return {key: value for key, value in state.items() if key != STATE_KEY}

    def _restore_state(self, optimizer: Optimizer) -> None:
        """Continue from the saved state after a load; without one, find out whose state was loaded.

        torch.distributed.checkpoint.state_dict names the parameters and drops what it does not know. Its loads are
        changes from outside: the pairs of this process stay true. Any other state is that of a plain optimizer.
        """
        del optimizer
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            self._take_over(*loaded)
        elif self._loads_by_name:
            self._lacks_history = self._num_steps == 0
        else:
            self._start_over()

    @property
    def _num_steps(self) -> int:
        return int(self.statistics["steps"])

    def _say_that_state_is_partial(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        del optimizer, state
        if self._num_steps:
            warn_once(
                "the state of a ZeroRedundancyOptimizer carries no history of aadl: save "
                "aadl.accelerator_of(optimizer).state_dict() of every rank beside it, and load it on the same rank"
            )

    def _say_that_history_is_missing(self) -> None:
        self._lacks_history = False
        warn_once(
            "the state that torch.distributed.checkpoint loaded carries no history of aadl: where the run was "
            "accelerated before, save aadl.accelerator_of(optimizer).state_dict() beside it, and load it after it"
        )


def accelerator_of(optimizer: Any) -> Accelerator:
    """The accelerator attached to an optimizer, or to one that it wraps.

    Raises:
        ValueError: the optimizer is not accelerated, or is no torch.optim.Optimizer.
    """
    found = find_accelerator(optimizer)
    if found is None:
        raise ValueError(f"this {type(optimizer).__name__} is not accelerated: call aadl.accelerate(optimizer) first")
    return found


def find_accelerator(optimizer: Any) -> Accelerator | None:
    """The accelerator attached to an optimizer, or to one that it wraps; None if there is none."""
    for link in chain_of(optimizer):
        reference = _accelerators.get(link) if isinstance(link, Optimizer) else None
        if reference is not None:
            return reference()
    return None


def warn_once(text: str) -> None:
    """Warn; Python shows the warning once a process, unless filters say otherwise."""
    warnings.warn(text, stacklevel=3)


def outline(state: Any) -> str:
    """A short description of a wrong state."""
    if not isinstance(state, dict):
        return f"a {type(state).__name__}"
    return f"version {state.get('version')!r} with keys {list(state)}"


def check_format(state: Any) -> None:
    """Raise ValueError unless this looks like the state of an accelerator, in the present version."""
    if not isinstance(state, dict) or state.keys() != {"version", "values", "rows"} or state["version"] != VERSION:
        raise ValueError(
            f"state must be the state_dict() of an accelerator whose states have version {VERSION}, "
            f"got {outline(state)}"
        )
