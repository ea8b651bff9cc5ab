"""AndersonAccelerator: the policy, attached to an optimizer by step hooks.

A macro-step is `store_each_nth` optimizer steps; it is the map G whose fixed point is sought. At the end of one the
pair (x_k, g_k) goes into the history; every `frequency` optimizer steps (rounded up to macro-steps) the history is
mixed into a candidate that may replace g_k. Nothing else ever touches a parameter.

The host waits for a device once per acceleration, for the Gram matrix. All later verdicts of the same acceleration are
carried out on the device; the host reads them after the next optimizer step (`Decisions.settle`).
"""

from __future__ import annotations

import json
import math
import warnings
import weakref
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from aadl import kernels
from aadl import state as saved_state
from aadl.decisions import Decisions, Step, count
from aadl.history import Column, History
from aadl.layout import Layout
from aadl.mixing import host_tensor
from aadl.parameters import (
    Rates,
    closure_of,
    is_dry_step,
    makes_momentum,
    momentum_of,
    trainable_parameters,
)
from aadl.ranks import Ranks, ranks_of, shards_of
from aadl.settings import Settings
from aadl.watch import Look, look_at
from aadl.wrappers import Target, chain_of, warn_of_loads_without_hooks

VERSION = 2
"""Of the layout of `AndersonAccelerator.state_dict()`."""
STATE_KEY = "aadl"
"""Key under which `optimizer.state_dict()` carries the accelerator's state."""
LEARNING_RATE_BAND = 1.25
"""Residuals are rescaled to the present learning rate within this factor; beyond it the history starts anew."""

_accelerators: weakref.WeakKeyDictionary[Optimizer, weakref.ref[AndersonAccelerator]] = weakref.WeakKeyDictionary()


class AndersonAccelerator:
    """Anderson acceleration of one optimizer; made by `aadl.accelerate`, found by `aadl.accelerator_of`.

    Attributes:
        settings: the validated arguments.
    """

    settings: Settings
    _decisions: Decisions
    _progress: dict[str, Any]
    _layout: Layout | None
    _left: Look | None
    """The tensors as the last hook left them; None where the next macro-step starts elsewhere."""
    _samples: list[Tensor]
    _averaged: bool
    """Whether somebody averaged the weights since the last hook (local SGD)."""
    _postponed: Callable[[], None] | None

    def __init__(self, target: Target, settings: Settings, process_group: Any = None) -> None:
        optimizer, partitioned = target.optimizer, target.kind == "partitioned"
        self.settings = settings
        self.process_group = process_group
        self._loss_weight = 1.0
        self._given_up = False
        self._rates = Rates()
        self._partitioned = partitioned
        self._optimizer = weakref.ref(optimizer)
        parameters = trainable_parameters(optimizer)
        if not parameters and not partitioned:
            raise ValueError(f"this {type(optimizer).__name__} has no parameter that requires a gradient")
        if (settings.shard_history or settings.local_sgd) and any(shards_of(p) > 1 for p in parameters):
            name = "shard_history" if settings.shard_history else "local_sgd"
            raise ValueError(f"{name} must be False: the parameters are sharded over the ranks already, got True")
        self._start_anew()
        self._handles: list[RemovableHandle] = []
        try:
            self._attach(target)
        except BaseException:  # nothing stays attached
            self._detach()
            raise
        self._loaded: tuple[dict[str, Any], dict[str, Any]] | None = None
        _accelerators[optimizer] = weakref.ref(self)

    def _attach(self, target: Target) -> None:
        self._handles.append(target.optimizer.register_step_pre_hook(self._before_step))
        self._handles.append(target.optimizer.register_step_post_hook(self._after_step))
        for carrier in target.carriers:
            self._handles.append(carrier.register_state_dict_post_hook(self._add_state))
            self._handles.append(carrier.register_load_state_dict_pre_hook(self._take_state))
            self._handles.append(carrier.register_load_state_dict_post_hook(self._restore_state))

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # ---- public ----------------------------------------------------------------------------------------------------

    @property
    def optimizer(self) -> Optimizer:
        """The accelerated optimizer."""
        optimizer = self._optimizer()
        if optimizer is None:
            raise ReferenceError("the accelerated optimizer no longer exists")
        return optimizer

    @property
    def statistics(self) -> dict[str, Any]:
        """Counters and last values, see `aadl.accelerate`. Reading them waits for the device."""
        self._decisions.settle()
        return self._decisions.statistics

    @property
    def loss_weight(self) -> float:
        """Weight of this rank's losses in the mean over ranks that judges a candidate; 1 unless set, > 0.

        For instance the number of samples behind them, where ranks have different ones. Not part of the state.
        """
        return self._loss_weight

    @loss_weight.setter
    def loss_weight(self, weight: float) -> None:
        if not 0 < weight < math.inf:
            raise ValueError(f"loss_weight must be a number > 0 and finite, got {weight!r}")
        self._loss_weight = float(weight)

    @property
    def history_bytes(self) -> int:
        """Bytes that the history takes on this rank, with the vectors of `aadl.history.Block`."""
        return 0 if self._history is None else saved_state.nbytes(self._history.blocks)

    @property
    def uses_compiled_kernels(self) -> bool:
        """Whether the passes over memory run in kernels made by torch.compile."""
        compiled = self._history is not None and any(block.fused for block in self._history.blocks)
        return compiled and not kernels.compilation_error()

    def reset(self) -> None:
        """Forget the history (after the map changed: new data, new loss, restored weights). Counters stay.

        A running macro-step is abandoned: the next optimizer step starts a new one.
        """
        self._decisions.settle()
        self._finish_push()
        self._decisions.reset("user", self._history)
        self._progress["in_macro_step"], self._left = 0, None

    def remove(self) -> None:
        """Detach: the optimizer is afterwards as if it had never been accelerated."""
        self._decisions.settle()
        self._detach()
        self._layout = self._postponed = None
        _accelerators.pop(self.optimizer, None)

    # ---- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs: `rows`, tensors by name (see aadl.state), and `books`, plain values as JSON.

        Allocates the history where no step has done so, so that the state of a fresh accelerator has the entries a
        saved one has and torch.distributed.checkpoint can load into it. The optimizer must have its own state by then.
        """
        self._decisions.settle()
        self._finish_push()
        if self._layout is None and self._handles and not self.settings.idle:
            parameters = self._parameters(self.optimizer)
            if parameters is not None:
                self._lay_out(parameters, makes_momentum(self.optimizer))
        layout = self._layout
        books = self._decisions.books() | {
            "map": self.settings.map_description(),
            "progress": self._progress,
            "history": None if layout is None else saved_state.books_of(layout.history),
            "averaged": self.settings.local_sgd and self._left is not None and not self._untouched(self.optimizer),
        }
        rows = {} if layout is None else layout.rows()
        return {"version": VERSION, "books": json.dumps(books), "rows": rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue as the saved accelerator would have.

        Raises:
            ValueError: the state was saved for another map (store_each_nth, state_coupling, history_depth,
                history_dtype, parameter shapes) or is no accelerator state. Nothing was changed then.
        """
        self._take_over(state, self._checked(state))

    def _checked(self, state: Any) -> dict[str, Any]:
        """The books of a saved state, parsed, and the layout it fits; raises ValueError if there is none."""
        if not isinstance(state, dict) or state.keys() != {"version", "books", "rows"} or state["version"] != VERSION:
            raise ValueError(f"state must be the state_dict() of an accelerator of this version, got {_outline(state)}")
        try:
            books = json.loads(state["books"])
            Decisions.restored(self.settings, books), books["progress"], books["averaged"]
            wanted, found = self.settings.map_description(), books["map"]
            for name, value in wanted.items():
                if found.get(name) != value:
                    raise ValueError(f"the saved accelerator has {name}={found.get(name)!r}, this one {name}={value!r}")
            if books["history"] is not None:
                books["fields"] = saved_state.parsed_books(books["history"])
                momentum = any(name.startswith("momentum") for name in state["rows"])
                books["layout"] = self._fitting_layout(momentum)
                saved_state.check_rows(state["rows"], books["layout"].rows())
        except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"the saved state of the accelerator is damaged: {error!r}") from None
        return books

    def _fitting_layout(self, momentum: bool) -> Layout:
        """The layout of the present parameters, with rows for momentum or without; a new one if there is none."""
        parameters, layout = trainable_parameters(self.optimizer), self._layout
        if layout is not None and layout.is_of(parameters) and layout.has_momentum == momentum:
            return layout
        return self._new_layout(parameters, momentum)

    def _take_over(self, state: dict[str, Any], books: dict[str, Any]) -> None:
        """Continue from a saved state and its checked books."""
        self._postponed, self._layout = None, books.get("layout")
        if self._layout is not None:
            for block in self._layout.history.blocks:
                block.forget_fetch()
            saved_state.load_rows(state["rows"], self._layout.rows())
            starts_at_mapped = books["history"]["starts_at_mapped"]
            saved_state.restore_books(self._layout.history, books["fields"], starts_at_mapped)
        self._decisions = Decisions.restored(self.settings, books)
        self._progress, self._averaged = books["progress"], bool(books["averaged"])
        self._left = None

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

    # ---- hooks -----------------------------------------------------------------------------------------------------

    @torch.compiler.disable
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.settings.idle or self._given_up:
            return
        dry = is_dry_step(optimizer)
        if self.settings.safeguard == "loss" and not dry and closure_of(args, kwargs) is None:
            raise ValueError("safeguard='loss' needs optimizer.step(closure), but step was called without a closure")
        if dry:
            return
        self._finish_push()
        if self.settings.local_sgd and self._left is not None and not self._untouched(optimizer):
            self._averaged = True
        if self._averaged:  # all ranks go on counting as before: they must come to the votes together
            self._averaged = False
            self._decisions.reset("averaged", self._history)
            self._progress["abandoned"] = self._progress["in_macro_step"] > 0
        if self._progress["in_macro_step"] == 0:
            self._open_macro_step(optimizer)

    @torch.compiler.disable
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if is_dry_step(optimizer):
            return
        self._decisions.settle()
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            self._decisions.statistics["skipped_steps"] += 1
            return
        self._decisions.statistics["steps"] += 1
        if self.settings.idle or self._given_up:
            return
        self._progress["in_macro_step"] += 1
        if self._progress["in_macro_step"] == self.settings.store_each_nth:
            self._progress["in_macro_step"] = 0
            self._decisions.statistics["macro_steps"] += 1
            self._close_macro_step(optimizer, closure_of(args, kwargs))
        elif self.settings.local_sgd and self._layout is not None:
            self._note_places(optimizer, self._layout)

    def _add_state(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        warn_of_loads_without_hooks(optimizer)
        state[STATE_KEY] = self.state_dict()

    def _take_state(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        del optimizer
        saved = state.get(STATE_KEY)
        self._loaded = None if saved is None else (saved, self._checked(saved))
        return {key: value for key, value in state.items() if key != STATE_KEY}

    def _restore_state(self, optimizer: Optimizer) -> None:
        del optimizer
        loaded, self._loaded = self._loaded, None
        if loaded is None:  # a checkpoint of the plain optimizer
            self._start_anew()
        else:
            self._take_over(*loaded)

    # ---- macro-steps -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _open_macro_step(self, optimizer: Optimizer) -> None:
        """Note where the macro-step starts, if not where the last one ended."""
        layout, untouched, changed = self._layout, self._untouched(optimizer), False
        if layout is not None and layout.asks:
            other = not layout.is_of(trainable_parameters(optimizer))
            word = self._ranks.total(host_tensor([float(not untouched), float(other)]))
            untouched, changed = not float(word[0]), bool(word[1])
        if untouched and not changed:
            return
        self._decisions.settle()
        parameters = self._parameters(optimizer)
        if parameters is None:
            return
        if layout is None or changed or not layout.is_of(parameters):
            if layout is not None:
                count(self._decisions.statistics["resets"], "parameters_changed")
            self._lay_out(parameters, makes_momentum(optimizer))
        assert self._layout is not None
        history, tensors = self._layout.history, self._layout.tensors(optimizer, self._look(optimizer))
        if not history.starts_at(tensors):
            self._decisions.statistics["moved"] += history.has_pair
            history.begin(tensors)
            self._decisions.pending = None  # the macro-step that starts here says nothing about the candidate
            self._decisions.disturbed = True

    @torch.no_grad()
    def _close_macro_step(self, optimizer: Optimizer, closure: Callable[[], Any] | None) -> None:
        layout = self._layout
        if layout is None or not (layout.parameters or layout.history.partial):
            return
        history = layout.history
        if not layout.has_momentum and not history.has_pair and self._has_momentum(optimizer, layout.parameters):
            layout.add_momentum()  # made by the first step, from zero, of an optimizer we do not know
        tensors = layout.tensors(optimizer, self._look(optimizer))
        self._follow_learning_rate(optimizer, layout)
        decisions, progress = self._decisions, self._progress
        pending, rate = decisions.pending, progress["learning_rate"]
        ratio = rate / progress.get("pair_learning_rate", rate)
        column = Column(decisions.statistics["macro_steps"], not decisions.disturbed, rate)
        decisions.pending, decisions.disturbed, progress["pair_learning_rate"] = None, False, rate
        due = self._is_due(history)

        measure = due or pending is not None or not column.consecutive

        def push() -> None:
            history.push(tensors, column, ratio, pending is not None, measure)

        if not due and pending is None and any(block.offloaded for block in history.blocks):
            history.fetch(tensors)
            self._postponed = push  # by then the copy to the host is done
        else:
            push()
        abandoned = progress.pop("abandoned", False)
        if due or pending is not None:
            judged = closure if self.settings.safeguard in (True, "loss") and not self._partitioned else None
            step = Step(optimizer, history, tensors, judged, self._ranks, self.loss_weight, rate)
            if due:
                decisions.accelerate(step, pending)
            else:
                assert pending is not None
                decisions.judge(step, pending)
        if abandoned:  # its start was not where it seems
            history.clear()
        self._note_places(optimizer, layout)

    def _is_due(self, history: History) -> bool:
        """Acceleration falls on every period-th macro-step, counted from the start, whatever was rejected between."""
        settings, done = self.settings, self._decisions.statistics["macro_steps"]
        if self._decisions.statistics["steps"] <= settings.wait_iterations or done % settings.period != 0:
            return False
        if settings.local_sgd:  # all ranks come to vote, whatever happened to their own histories
            return True
        return history.has_pair and not self._decisions.is_suspended()

    def _follow_learning_rate(self, optimizer: Optimizer, layout: Layout) -> None:
        """Note the learning rate; start the history anew where residuals of then and now do not compare.

        They do while all groups' rates change by one factor and stay within LEARNING_RATE_BAND over the window.
        """
        progress, history = self._progress, layout.history
        moved = set(map(id, layout.parameters))
        groups = [
            group
            for group in optimizer.param_groups
            if self._partitioned or any(id(p) in moved for p in group["params"])
        ]
        rates = self._rates.of(groups)
        last, progress["rates"] = progress["rates"], rates
        if last is None or rates == last:
            return
        ratios = [new / old if old else math.inf for new, old in zip(rates, last, strict=True) if new != old or new]
        rate = progress["learning_rate"] * ratios[0]
        oldest = history.columns[0].learning_rate if history.columns else progress["learning_rate"]
        uniform = all(math.isclose(ratio, ratios[0], rel_tol=1e-9) for ratio in ratios)
        if uniform and 1 / LEARNING_RATE_BAND <= rate / oldest <= LEARNING_RATE_BAND:
            progress["learning_rate"] = rate
        else:
            progress |= {"learning_rate": 1.0, "pair_learning_rate": 1.0}
            self._decisions.reset("learning_rate", self._history)

    # ---- bookkeeping -----------------------------------------------------------------------------------------------

    def _finish_push(self) -> None:
        """Store the pair whose copy to the host was under way."""
        push, self._postponed = self._postponed, None
        if push is not None:
            with torch.no_grad():
                push()

    @property
    def _history(self) -> History | None:
        return None if self._layout is None else self._layout.history

    @property
    def _ranks(self) -> Ranks:
        return ranks_of(self.process_group)

    def _parameters(self, optimizer: Optimizer) -> list[Tensor] | None:
        """What is extrapolated; None where parameters came after `accelerate` that cannot be.

        Training then goes on without acceleration. Several ranks stop, since they would wait for each other.
        """
        try:
            return None if self._given_up else trainable_parameters(optimizer)
        except ValueError as error:
            if self._ranks.size > 1:
                raise
            self._given_up, self._layout = True, None
            self._decisions.pending = self._left = None
            warnings.warn(f"training goes on without acceleration: {error}", UserWarning, stacklevel=2)
            return None

    def _new_layout(self, parameters: list[Tensor], momentum: bool) -> Layout:
        ranks = Ranks() if self.settings.local_sgd else self._ranks
        return Layout(parameters, self.settings, ranks, self._partitioned, momentum)

    def _lay_out(self, parameters: list[Tensor], momentum: bool) -> None:
        """Allocate rows for the trainable parameters (and momentum) of the optimizer as they are now."""
        self._layout = None  # frees the old rows first
        self._layout = self._new_layout(parameters, momentum)
        self._decisions.pending = self._left = None
        self._progress |= {"learning_rate": 1.0, "rates": None}

    def _has_momentum(self, optimizer: Optimizer, parameters: list[Tensor]) -> bool:
        if self.settings.state_coupling == "params":
            return False
        return any(momentum_of(optimizer.state.get(p), p) is not None for p in parameters)

    def _note_places(self, optimizer: Optimizer, layout: Layout) -> None:
        """Remember the tensors as this hook leaves them."""
        look = self._look(optimizer)
        self._left = look if layout.covers(look) else None
        self._samples = [] if self._left is None else layout.sample(layout.tensors(optimizer, look))

    def _untouched(self, optimizer: Optimizer) -> bool:
        """Whether nobody seems to have written to the tensors since the last hook left them."""
        if self._layout is None or self._left is None:
            return False
        look = self._look(optimizer)
        if not look.untouched_since(self._left):
            return False
        sample = self._layout.sample(self._layout.tensors(optimizer, look))
        return all(torch.equal(a, b) or torch.equal(a.view(torch.uint8), b.view(torch.uint8))  # which nan is too
                   for a, b in zip(self._samples, sample, strict=True))  # fmt: skip

    def _look(self, optimizer: Optimizer) -> Look:
        return look_at(optimizer, self.settings.state_coupling != "params")

    def _start_anew(self) -> None:
        """State of an accelerator that has seen no step."""
        self._decisions = Decisions(self.settings)
        self._progress = {"in_macro_step": 0, "learning_rate": 1.0, "rates": None}
        self._layout = self._left = self._postponed = None
        self._samples, self._averaged = [], False


def accelerator_of(optimizer: Any) -> AndersonAccelerator:
    """The accelerator attached to an optimizer, or to one that it wraps.

    Raises:
        ValueError: the optimizer is not accelerated, or is no torch.optim.Optimizer.
    """
    found = find_accelerator(optimizer)
    if found is None:
        raise ValueError(f"this {type(optimizer).__name__} is not accelerated: call aadl.accelerate(optimizer) first")
    return found


def find_accelerator(optimizer: Any) -> AndersonAccelerator | None:
    """The accelerator attached to an optimizer, or to one that it wraps; None if there is none."""
    for link in chain_of(optimizer):
        reference = _accelerators.get(link) if isinstance(link, Optimizer) else None
        if reference is not None:
            return reference()
    return None


def _outline(state: Any) -> str:
    """What a wrong state is, in a few words."""
    if not isinstance(state, dict):
        return f"a {type(state).__name__}"
    return f"version {state.get('version')!r} with keys {list(state)}"
