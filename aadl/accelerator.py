"""AndersonAccelerator: the policy, attached to an optimizer by step hooks.

A macro-step is `store_each_nth` optimizer steps; it is the map G whose fixed point is sought. At the end of one the
pair (x_k, g_k) goes into the history; every `frequency` optimizer steps (rounded up to macro-steps) the history is
mixed into a candidate that may replace g_k. Nothing else ever touches a parameter.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from aadl import mixing, safeguard, smoothing
from aadl.history import Block, Column, History, Tensors, make_block
from aadl.mixing import host_tensor
from aadl.parameters import (
    all_parameters,
    by_dtype_and_device,
    closure_of,
    forget_curvature,
    identity_of,
    is_dry_step,
    maximizes,
    momentum_of,
    trainable_parameters,
)
from aadl.proposal import propose
from aadl.settings import Settings

VERSION = 1
"""Of the layout of `AndersonAccelerator.state_dict()`."""
STATE_KEY = "aadl"
"""Key under which `optimizer.state_dict()` carries the accelerator's state."""
COUNTERS = (
    "steps", "skipped_steps", "macro_steps", "attempts", "accepted", "reverted", "suspensions", "suspended",
    "closure_evaluations", "moved",
)  # fmt: skip
LAST_VALUES = ("relative_standard_deviation", "gain", "trust_ratio", "condition_number", "coefficient_norm")
MIXING_VALUES = ("numerical_rank", "condition_number", "coefficient_norm")
LEARNING_RATE_BAND = 1.25
"""Residuals are rescaled to the present learning rate within this factor; beyond it the history starts anew."""

_accelerators: weakref.WeakKeyDictionary[Optimizer, weakref.ref[AndersonAccelerator]] = weakref.WeakKeyDictionary()


class AndersonAccelerator:
    """Anderson acceleration of one optimizer; made by `aadl.accelerate`, found by `aadl.accelerator_of`.

    Attributes:
        settings: the validated arguments.
        statistics: counters and last values, see `aadl.accelerate`.
    """

    settings: Settings
    statistics: dict[str, Any]
    _averaging: bool
    _progress: dict[str, Any]
    _pause: safeguard.Pause
    _refusals: safeguard.Pause
    _pending: safeguard.Pending | None
    _history: History | None
    _parameters: list[Tensor]
    _block_parameters: list[list[Tensor]]
    _identity: list[tuple[int, torch.Size]]

    def __init__(self, optimizer: Optimizer, settings: Settings, process_group: Any = None) -> None:
        self.settings = settings
        self.process_group = process_group
        self._optimizer = weakref.ref(optimizer)
        if not trainable_parameters(optimizer):
            raise ValueError(f"this {type(optimizer).__name__} has no parameter that requires a gradient")
        self._start_anew()
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_state_dict_post_hook(self._add_state),
            optimizer.register_load_state_dict_pre_hook(self._take_state),
            optimizer.register_load_state_dict_post_hook(self._restore_state),
        ]
        self._loaded: tuple[dict[str, Any], History | None] | None = None
        _accelerators[optimizer] = weakref.ref(self)

    # ---- public ------------------------------------------------------------------------------------------------

    @property
    def optimizer(self) -> Optimizer:
        """The accelerated optimizer."""
        optimizer = self._optimizer()
        if optimizer is None:
            raise ReferenceError("the accelerated optimizer no longer exists")
        return optimizer

    def reset(self) -> None:
        """Forget the history (after the map changed: new data, new loss, restored weights). Counters stay.

        A running macro-step is abandoned: the next optimizer step starts a new one.
        """
        self._reset("user")
        self._progress["in_macro_step"] = 0

    def remove(self) -> None:
        """Detach: the optimizer is afterwards as if it had never been accelerated."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._history = None
        _accelerators.pop(self.optimizer, None)

    def state_dict(self) -> dict[str, Any]:
        """History, counters and decisions as tensors and plain values (loads with weights_only=True)."""
        return {
            "version": VERSION,
            "map": self.settings.map_description(),
            "statistics": copy.deepcopy(self.statistics),
            "progress": dict(self._progress),
            "pause": dict(vars(self._pause)),
            "refusals": dict(vars(self._refusals)),
            "pending": None if self._pending is None else dict(vars(self._pending)),
            "averaging": self._averaging,
            "history": None if self._history is None else self._history.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue as the saved accelerator would have.

        Raises:
            ValueError: the state was saved for another map (store_each_nth, state_coupling, history_depth,
                history_dtype, parameter shapes) or is no accelerator state. Nothing was changed then.
        """
        self._take_over(state, self._restored_history(state))

    def _restored_history(self, state: Any) -> History | None:
        """The history of a saved state, laid out for the present parameters; raises ValueError if it does not fit."""
        if not isinstance(state, dict) or state.keys() != self.state_dict().keys() or state["version"] != VERSION:
            raise ValueError(f"state must be the state_dict() of an accelerator of this version, got {_outline(state)}")
        try:
            _decisions(state)
            return self._history_of(state)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"the saved state of the accelerator is damaged: {error!r}") from None

    def _history_of(self, state: dict[str, Any]) -> History | None:
        wanted, found = self.settings.map_description(), state["map"]
        for name, value in wanted.items():
            if found.get(name) != value:
                raise ValueError(f"the saved accelerator has {name}={found.get(name)!r}, this one {name}={value!r}")
        if state["history"] is None:
            return None
        groups = by_dtype_and_device(trainable_parameters(self.optimizer))
        history = self._new_history(groups)
        if any(block["kind"] == "momentum" for block in state["history"]["blocks"]):
            history.blocks += self._momentum_blocks(groups)
        history.load_state_dict(state["history"])
        return history

    def _take_over(self, state: dict[str, Any], history: History | None) -> None:
        """Continue from a saved state and its restored history."""
        self._history = history
        self._parameters = trainable_parameters(self.optimizer) if history else []
        self._identity = identity_of(self._parameters)
        self._block_parameters = by_dtype_and_device(self._parameters)
        self.statistics = copy.deepcopy(state["statistics"])
        self._progress = dict(state["progress"])
        self._pause, self._refusals, self._pending = _decisions(state)
        self._averaging = bool(state["averaging"])

    def __repr__(self) -> str:
        optimizer = self._optimizer()
        kind = "nothing" if optimizer is None else type(optimizer).__name__
        if not self._handles:
            return "AndersonAccelerator(removed)"
        held = len(self._history.columns) if self._history else 0
        done = f"{self.statistics['accepted']} of {self.statistics['attempts']} accepted"
        return f"AndersonAccelerator({kind}, {self.settings}, {held} columns held, {done})"

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise TypeError(
            "an accelerator cannot be copied without its optimizer: copy the optimizer, call aadl.accelerate on the "
            "copy and hand it this accelerator's state_dict()"
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError("an accelerator cannot be pickled: save its state_dict() (optimizer.state_dict() carries it)")

    # ---- hooks -------------------------------------------------------------------------------------------------

    @torch.compiler.disable
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.settings.idle:
            return
        if self.settings.safeguard == "loss" and closure_of(args, kwargs) is None and not is_dry_step(optimizer):
            raise ValueError("safeguard='loss' needs optimizer.step(closure), but step was called without a closure")
        if self._progress["in_macro_step"] == 0 and not is_dry_step(optimizer):
            self._open_macro_step(optimizer)

    @torch.compiler.disable
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if is_dry_step(optimizer):
            return
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            self.statistics["skipped_steps"] += 1
            return
        self.statistics["steps"] += 1
        if self.settings.idle:
            return
        self._progress["in_macro_step"] += 1
        if self._progress["in_macro_step"] < self.settings.store_each_nth:
            return
        self._progress["in_macro_step"] = 0
        self.statistics["macro_steps"] += 1
        self._close_macro_step(optimizer, closure_of(args, kwargs))

    def _add_state(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        del optimizer
        state[STATE_KEY] = self.state_dict()

    def _take_state(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        del optimizer
        saved = state.get(STATE_KEY)
        self._loaded = None if saved is None else (saved, self._restored_history(saved))
        return {key: value for key, value in state.items() if key != STATE_KEY}

    def _restore_state(self, optimizer: Optimizer) -> None:
        del optimizer
        loaded, self._loaded = self._loaded, None
        if loaded is None:  # a checkpoint of the plain optimizer
            self._start_anew()
        else:
            self._take_over(*loaded)

    # ---- macro-steps -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _open_macro_step(self, optimizer: Optimizer) -> None:
        """Note where the macro-step starts, if not where the last one ended."""
        parameters = trainable_parameters(optimizer)
        if self._history is None or identity_of(parameters) != self._identity:
            if self._history is not None:
                _count(self.statistics["resets"], "parameters_changed")
            self._lay_out(optimizer, parameters)
        assert self._history is not None
        tensors = self._tensors(optimizer)
        if not self._history.starts_at(tensors):
            self.statistics["moved"] += self._history.has_pair
            self._history.begin(tensors)
            self._pending = None  # the macro-step that starts here says nothing about the candidate
            self._progress["disturbed"] = True

    @torch.no_grad()
    def _close_macro_step(self, optimizer: Optimizer, closure: Callable[[], Any] | None) -> None:
        history = self._history
        if history is None or not history.blocks:
            return
        without_momentum = len(history.blocks) == len(self._block_parameters)
        if without_momentum and not history.has_pair and self._wants_momentum(optimizer):
            history.blocks += self._momentum_blocks(self._block_parameters)  # made by the first step, from zero
        tensors = self._tensors(optimizer)
        self._follow_learning_rate(optimizer)
        pending, self._pending = self._pending, None
        if pending is not None and self._broke_promise(history, tensors, pending):
            history.write_mapped(tensors)
            history.continue_from_mapped()
            forget_curvature(optimizer)
            self._progress["disturbed"] = True
            return
        rate = self._progress["learning_rate"]
        ratio = rate / self._progress.get("pair_learning_rate", rate)
        history.push(tensors, Column(self.statistics["macro_steps"], not self._progress["disturbed"], rate), ratio)
        self._progress |= {"disturbed": False, "pair_learning_rate": rate}
        history.continue_from_mapped()
        if self._is_due() and self._attempt(history, tensors, closure):
            forget_curvature(optimizer)
            self._progress["disturbed"] = True

    def _broke_promise(self, history: History, tensors: list[Tensors], pending: safeguard.Pending) -> bool:
        """Judge the last accepted candidate by the residual of the macro-step it started."""
        squares = history.residual_squares(tensors)
        square = sum(pending.weights[kind] * value for kind, value in squares.items())
        self.statistics["trust_ratio"] = ratio = safeguard.trust_ratio(square, pending)
        if ratio > safeguard.SUSPEND_ABOVE:
            self._pause.extend(self.statistics["macro_steps"])
            self.statistics["suspensions"] += 1
        else:
            self._pause.shorten()
        reverts = safeguard.must_revert(square, pending)
        self.statistics["reverted"] += reverts
        return reverts

    def _is_due(self) -> bool:
        """Acceleration falls on every period-th macro-step, counted from the start, whatever was rejected between."""
        settings, done = self.settings, self.statistics["macro_steps"]
        assert self._history is not None
        if not self._history.columns or self.statistics["steps"] <= settings.wait_iterations:
            return False
        if done % settings.period != 0:
            return False
        if done < max(self._pause.until, self._refusals.until):
            self.statistics["suspended"] += 1
            return False
        return True

    def _follow_learning_rate(self, optimizer: Optimizer) -> None:
        """Note the learning rate; start the history anew where residuals of then and now do not compare.

        They do while all groups' rates change by one factor and stay within LEARNING_RATE_BAND over the window.
        """
        progress, history = self._progress, self._history
        moved = set(map(id, self._parameters))
        groups = [group for group in optimizer.param_groups if any(id(p) in moved for p in group["params"])]
        rates = [float(group["lr"]) for group in groups if "lr" in group]
        last, progress["rates"] = progress["rates"], rates
        if last is None or rates == last or history is None:
            return
        ratios = [new / old if old else math.inf for new, old in zip(rates, last, strict=True) if new != old or new]
        rate = progress["learning_rate"] * ratios[0]
        oldest = history.columns[0].learning_rate if history.columns else progress["learning_rate"]
        uniform = all(math.isclose(ratio, ratios[0], rel_tol=1e-9) for ratio in ratios)
        if uniform and 1 / LEARNING_RATE_BAND <= rate / oldest <= LEARNING_RATE_BAND:
            progress["learning_rate"] = rate
        else:
            progress |= {"learning_rate": 1.0, "pair_learning_rate": 1.0}
            self._reset("learning_rate")

    # ---- acceleration ------------------------------------------------------------------------------------------

    def _attempt(self, history: History, tensors: list[Tensors], closure: Callable[[], Any] | None) -> bool:
        """Mix, build the candidate, let the safeguard decide; the plain iterate stays where it says no."""
        statistics, settings = self.statistics, self.settings
        statistics["attempts"] += 1
        parts = history.gram()
        if not all(math.isfinite(part.square + float(part.matrix.sum())) for part in parts.values()):
            self._reject("non_finite")
            self._reset("non_finite")
            return False
        rate = self._progress["learning_rate"]
        scales = [rate / column.learning_rate for column in history.columns]
        weights = mixing.balancing_weights(parts)
        gram = mixing.joined(parts, weights, scales)
        consecutive = [column.consecutive for column in history.columns]
        deviation = smoothing.relative_standard_deviation(gram, consecutive)
        statistics["relative_standard_deviation"] = deviation
        if settings.average == "auto":
            self._averaging = smoothing.switch(self._averaging, deviation, settings.average_tolerance)
        statistics["averaging"] = self._averaging
        if settings.acceleration_type == "identity" and not self._averaging:
            self._reject("averaging_off")
            return False
        ages = [statistics["macro_steps"] - column.macro_step for column in history.columns]
        solution, predicted, refused = propose(
            gram, ages, self._averaging, settings, history.blocks[0].delta_mapped.dtype
        )
        statistics |= {name: getattr(solution, name) for name in MIXING_VALUES}
        if refused:
            self._reject(refused)
            return False
        statistics["gain"] = math.sqrt(predicted / gram.square) if gram.square > 0 else math.nan
        beta = settings.relaxation
        scaled = host_tensor(scales) * solution.gamma
        history.combine(solution.gamma, (scaled - solution.gamma) - (1 - beta) * scaled, 1 - beta)
        checked = settings.safeguard and settings.acceleration_type != "identity"
        if checked and not history.advance(solution.mean) >= 0:
            self._reject("backward")
            self._refusals.extend(statistics["macro_steps"], settings.period)
            return False
        if not self._takes(history, tensors, closure):
            return False
        history.continue_from_candidate()
        self._refusals.length = 0
        statistics["accepted"] += 1
        if settings.safeguard:
            noise = smoothing.noise_square(gram, consecutive) if self._averaging else 0.0
            self._pending = safeguard.Pending(predicted, gram.square, noise, weights)
        return True

    def _takes(self, history: History, tensors: list[Tensors], closure: Callable[[], Any] | None) -> bool:
        """Put the candidate in place; take it out again and return False where the training loss does not improve."""
        if closure is None or self.settings.safeguard not in (True, "loss"):
            history.write_candidate(tensors)
            return True
        self.statistics["closure_evaluations"] += 2
        better, cause = False, "loss"
        try:
            plain, candidate = safeguard.trial_losses(
                closure, all_parameters(self.optimizer), lambda: history.write_candidate(tensors), self._group()
            )
            better = candidate > plain if maximizes(self.optimizer) else candidate < plain
        except Exception:
            if self.settings.safeguard == "loss":
                raise
            cause = "closure"  # it cannot be evaluated for its value alone
        finally:
            if not better:
                history.write_mapped(tensors)
                self._reject(cause)
        return better

    # ---- state -------------------------------------------------------------------------------------------------

    def _group(self) -> Any:
        if self.process_group is not None:
            return self.process_group
        return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None

    def _lay_out(self, optimizer: Optimizer, parameters: list[Tensor]) -> None:
        """Allocate rows for the trainable parameters (and momentum) of the optimizer as they are now."""
        self._parameters, self._identity = parameters, identity_of(parameters)
        self._block_parameters = by_dtype_and_device(parameters)
        self._history = self._new_history(self._block_parameters)
        self._pending = None
        self._progress |= {"learning_rate": 1.0, "rates": None}
        if self._wants_momentum(optimizer):
            self._history.blocks += self._momentum_blocks(self._block_parameters)

    def _new_history(self, groups: list[list[Tensor]]) -> History:
        return History(self.settings.history_depth, self._make_blocks("parameters", groups, True))

    def _momentum_blocks(self, groups: list[list[Tensor]]) -> list[Block]:
        return self._make_blocks("momentum", groups, self.settings.state_coupling == "full")

    def _make_blocks(self, kind: str, groups: list[list[Tensor]], residuals: bool) -> list[Block]:
        depth, dtype = self.settings.history_depth, self.settings.history_dtype
        return [make_block(kind, group, depth, residuals, dtype) for group in groups]

    def _wants_momentum(self, optimizer: Optimizer) -> bool:
        if self.settings.state_coupling == "params":
            return False
        return any(momentum_of(optimizer.state.get(p), p) is not None for p in self._parameters)

    def _tensors(self, optimizer: Optimizer) -> list[Tensors]:
        """Values of every block: the parameters, and their momentum buffers (None where there is none yet)."""
        assert self._history is not None
        tensors: list[Tensors] = list(self._block_parameters)
        if len(self._history.blocks) > len(self._block_parameters):
            tensors += [[momentum_of(optimizer.state.get(p), p) for p in group] for group in self._block_parameters]
        return tensors

    def _reject(self, cause: str) -> None:
        _count(self.statistics["rejected"], cause)

    def _reset(self, cause: str) -> None:
        _count(self.statistics["resets"], cause)
        self._pending = None
        if self._history is not None:
            self._history.clear()

    def _start_anew(self) -> None:
        """State of an accelerator that has seen no step."""
        self.statistics = dict.fromkeys(COUNTERS, 0) | dict.fromkeys(LAST_VALUES, math.nan)
        self._averaging = self.settings.average == "always"
        self.statistics |= {"numerical_rank": 0, "averaging": self._averaging, "rejected": {}, "resets": {}}
        self._progress = {"in_macro_step": 0, "disturbed": False, "learning_rate": 1.0, "rates": None}
        self._pause = safeguard.Pause(safeguard.LONGEST_PAUSE)
        self._refusals = safeguard.Pause(safeguard.LONGEST_REFUSAL)
        self._pending = None
        self._history = None
        self._parameters, self._block_parameters, self._identity = [], [], []


def accelerator_of(optimizer: Optimizer) -> AndersonAccelerator:
    """The accelerator attached to an optimizer.

    Raises:
        ValueError: the optimizer is not accelerated, or is no torch.optim.Optimizer.
    """
    found = find_accelerator(optimizer)
    if found is None:
        raise ValueError(f"this {type(optimizer).__name__} is not accelerated: call aadl.accelerate(optimizer) first")
    return found


def find_accelerator(optimizer: Optimizer) -> AndersonAccelerator | None:
    """The accelerator attached to an optimizer, or None."""
    if not isinstance(optimizer, Optimizer):
        raise ValueError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    reference = _accelerators.get(optimizer)
    return None if reference is None else reference()


def _decisions(state: dict[str, Any]) -> tuple[safeguard.Pause, safeguard.Pause, safeguard.Pending | None]:
    """The pauses and the pending judgment of a saved state."""
    pending = None if state["pending"] is None else safeguard.Pending(**state["pending"])
    return safeguard.Pause(**state["pause"]), safeguard.Pause(**state["refusals"]), pending


def _outline(state: Any) -> str:
    """What a wrong state is, in a few words."""
    if not isinstance(state, dict):
        return f"a {type(state).__name__}"
    return f"version {state.get('version')!r} with keys {list(state)}"


def _count(counts: dict[str, int], cause: str) -> None:
    counts[cause] = counts.get(cause, 0) + 1
