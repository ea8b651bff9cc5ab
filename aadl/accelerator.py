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
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from aadl import advice, kernels, memory
from aadl import state as saved_state
from aadl.acceptance import Decisions, Step, count
from aadl.attached import VERSION, Accelerator, check_format, warn_once
from aadl.history import Column, History
from aadl.history_layout import Layout
from aadl.mixing import host_tensor
from aadl.parameters import (
    Rates,
    closure_of,
    is_dry_step,
    makes_momentum,
    momentum_of,
    trainable_parameters,
)
from aadl.proposal import LEARNING_RATE_BAND
from aadl.ranks import Ranks, ranks_of, shards_of
from aadl.settings import Settings
from aadl.watch import Look, Sample, is_regular, kind_of_write, look_at, same_bits, versions_of
from aadl.wrappers import Target

ABANDONED = 10
"""Macro-steps abandoned one after the other before a warning says so."""


class AndersonAccelerator(Accelerator):
    """Anderson acceleration of one optimizer; made by `aadl.accelerate`, found by `aadl.accelerator_of`."""

    _decisions: Decisions
    _progress: dict[str, Any]
    _layout: Layout | None
    _left: Look | None
    """The tensors as the last hook left them; None where the next macro-step starts elsewhere."""
    _seen_rates: list[Any] | None
    """Learning rates of the groups in the last step, where all are numbers of Python."""
    _samples: list[Tensor]
    """Some of their elements at the end of the last macro-step."""
    _sample: Sample | None
    """Some elements of one of them after the last step, while an accepted candidate waits for its judgment."""
    _averaged: bool
    """Whether somebody averaged the weights since the last hook (local SGD)."""
    _postponed: Callable[[], None] | None

    def __init__(self, target: Target, settings: Settings, process_group: Any = None) -> None:
        self._loss_weight = 1.0
        self._given_up = self._is_dry = False
        self._seen_rates = None
        self._rates = Rates()
        if settings.shard_history or settings.local_sgd:
            sharded = any(shards_of(p) > 1 for p in trainable_parameters(target.optimizer))
            name = "shard_history" if settings.shard_history else "local_sgd"
            if sharded:
                raise ValueError(f"{name} must be False: the parameters are sharded over the ranks already, got True")
        super().__init__(target, settings, process_group)

    # ---- public ----------------------------------------------------------------------------------------------------

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
        """Bytes that the history takes on this rank, with the vectors of `aadl.history.Block`.

        Before the first step those that it will take, without momentum that an optimizer outside of torch.optim may
        yet make.
        """
        if self._layout is not None:
            return self._layout.nbytes
        if not self._handles or self.settings.idle:
            return 0
        return self._new_layout(
            trainable_parameters(self.optimizer), makes_momentum(self.optimizer), planned=True
        ).nbytes

    @property
    def uses_compiled_kernels(self) -> bool:
        """Whether the passes over memory run in kernels made by torch.compile."""
        compiled = self._history is not None and any(block.fused for block in self._history.blocks)
        return compiled and not kernels.compilation_error()

    @torch.inference_mode(False)
    @torch.no_grad()
    def reset(self) -> None:
        """Forget the history (after the map changed: new data, new loss, restored weights). Counters stay.

        A running macro-step is abandoned: the next optimizer step starts a new one.
        """
        self._decisions.settle()
        self._finish_push()
        self._decisions.reset("user", self._history)
        self._progress |= {"in_macro_step": 0, "written": False, "doubtful": False, "unseen": "", "first": ""}
        self._left = self._sample = None

    def remove(self) -> None:
        """Detach: the optimizer is afterwards as if it had never been accelerated."""
        self._decisions.settle()
        super().remove()
        self._layout = self._postponed = None

    # ---- state -----------------------------------------------------------------------------------------------------

    @torch.inference_mode(False)  # whose tensors no step could write to
    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs: `rows`, tensors by name (see aadl.state), and `books`, plain values as JSON.

        Allocates the history where no step has done so, so that the state of a fresh accelerator has the entries a
        saved one has and torch.distributed.checkpoint can load into it. The optimizer must have its own state by then.
        """
        self._decisions.settle()
        self._finish_push()
        fake = _tensors_are_fake()
        if self._layout is None and self._handles and not self.settings.idle and not fake:
            parameters = self._parameters(self.optimizer)
            if parameters is not None:
                self._lay_out(parameters, makes_momentum(self.optimizer))
        layout = self._layout
        books = self._decisions.books() | {
            "map": self.settings.map_description(),
            "progress": self._progress
            | {"unseen": self._writes_since_left(), "doubtful": not fake and self._is_doubtful()},
            "history": None if layout is None else saved_state.books_of(layout.history),
            "averaged": self.settings.local_sgd and self._left is not None and not self._untouched(self.optimizer),
        }
        rows = {} if layout is None else layout.rows()
        return {"version": VERSION, "books": json.dumps(books), "rows": rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue as the saved accelerator would have; at another history_depth, with the newest columns that fit.

        Raises:
            ValueError: the state was saved for another map (store_each_nth, state_coupling, history_dtype, parameter
                shapes) or is no accelerator state. Nothing was changed then.
        """
        super().load_state_dict(state)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _checked(self, state: Any) -> dict[str, Any]:
        """The books of a saved state, parsed, and the layout it fits; raises ValueError if there is none."""
        check_format(state)
        try:
            books = json.loads(state["books"])
            if books["map"].get("acceleration_type", "anderson") != "anderson":
                raise ValueError(
                    f"the saved accelerator has acceleration_type={books['map']['acceleration_type']!r}, this one "
                    f"acceleration_type={self.settings.acceleration_type!r}"
                )
            Decisions.restored(self.settings, books), books["progress"], books["averaged"]
            wanted, found = self.settings.map_description(), books["map"]
            for name, value in wanted.items():
                if found.get(name) != value and name != "history_depth":
                    raise ValueError(f"the saved accelerator has {name}={found.get(name)!r}, this one {name}={value!r}")
            if books["history"] is not None and self.settings.history_depth > 0:
                depth, saved_depth = self.settings.history_depth, found["history_depth"]
                books["fields"] = saved_state.parsed_books(books["history"])
                if depth != saved_depth:
                    books["slots"] = saved_state.slots_kept(books["fields"], saved_depth, depth)
                momentum = any(name.startswith("momentum") for name in state["rows"])
                books["layout"] = self._fitting_layout(momentum)
                saved_state.check_rows(state["rows"], books["layout"].rows(), saved_depth)
        except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"the saved state of the accelerator is damaged: {error!r}") from None
        return books

    def _fitting_layout(self, momentum: bool) -> Layout:
        """The layout of the present parameters, with rows for momentum or without; a new one if there is none."""
        parameters, layout = trainable_parameters(self.optimizer), self._layout
        if layout is not None and layout.is_of(parameters) and layout.has_momentum == momentum:
            return layout
        return self._new_layout(parameters, momentum)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _take_over(self, state: dict[str, Any], books: dict[str, Any]) -> None:
        """Continue from a saved state and its checked books."""
        self._postponed, self._layout = None, books.get("layout")
        if self._layout is not None:
            for block in self._layout.history.blocks:
                block.forget_fetch()
            saved_state.load_rows(state["rows"], self._layout.rows(), books.get("slots"))
            starts_at_mapped = books["history"]["starts_at_mapped"]
            saved_state.restore_books(self._layout.history, books["fields"], starts_at_mapped)
        self._decisions = Decisions.restored(self.settings, books)
        self._progress, self._averaged = _progress() | books["progress"], bool(books["averaged"])
        self._left = self._sample = None
        self._lacks_history = False

    @property
    def _num_columns(self) -> int:
        return len(self._history.columns) if self._history else 0

    # ---- hooks -----------------------------------------------------------------------------------------------------

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._see_rates(optimizer)
        settings, dry = self.settings, self._is_dry
        if settings.idle or self._given_up:
            return
        if settings.safeguard == "loss" and not dry and closure_of(args, kwargs) is None:
            raise ValueError("safeguard='loss' needs optimizer.step(closure), but step was called without a closure")
        if not settings.local_sgd:
            self._notice_writes(optimizer)
        if dry:
            return
        starts = self._progress["in_macro_step"] == 0
        if starts:
            self._finish_push()
        if settings.local_sgd:
            self._notice_averaging(optimizer)
        if self._lacks_history:
            self._say_that_history_is_missing()
        if starts:
            self._open_macro_step(optimizer)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._is_dry:
            self._leave()
            return
        self._decisions.settle()
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            self._decisions.statistics["skipped_steps"] += 1
            self._leave()
            return
        self._decisions.statistics["steps"] += 1
        if self.settings.idle or self._given_up:
            return
        self._progress["in_macro_step"] += 1
        self._note_rates(optimizer)
        if self._progress["in_macro_step"] == self.settings.store_each_nth:
            self._progress["in_macro_step"] = 0
            self._decisions.statistics["macro_steps"] += 1
            self._close_macro_step(optimizer, closure_of(args, kwargs))
        elif self._left is not None and not self.settings.local_sgd:
            self._leave()
        elif self._layout is not None:
            self._note_places(optimizer, self._layout, self.settings.local_sgd)

    # ---- macro-steps -----------------------------------------------------------------------------------------------

    @torch.inference_mode(False)
    @torch.no_grad()
    def _open_macro_step(self, optimizer: Optimizer, elsewhere: bool = False) -> None:
        """Note where the macro-step starts, if not where the last one ended.

        Args:
            elsewhere: whether that is known, and the running macro-step abandoned.
        """
        layout, changed = self._layout, False
        untouched = not elsewhere and self._untouched(optimizer)
        if layout is not None and layout.asks:
            other = not layout.is_of(trainable_parameters(optimizer))
            word = self._ranks.total(host_tensor([float(not untouched), float(other)]))
            untouched, changed = not float(word[0]), bool(word[1])
        if untouched and not changed:
            return
        self._decisions.settle()
        self._left, parameters, refusal = None, self._parameters(optimizer), None
        if parameters is None:
            return
        if layout is None or changed or not layout.is_of(parameters):
            if layout is not None:
                count(self._decisions.statistics["resets"], "parameters_changed")
            try:
                self._lay_out(parameters, makes_momentum(optimizer))
            except torch.OutOfMemoryError as error:
                refusal = error
        self._agree(refusal)
        assert self._layout is not None
        history, tensors = self._layout.history, self._layout.tensors(optimizer, self._look(optimizer))
        if elsewhere or not history.starts_at(tensors):
            self._decisions.statistics["moved"] += elsewhere or history.has_pair
            history.begin(tensors)
            self._decisions.start_elsewhere(history)

    def _abandon_macro_step(self, optimizer: Optimizer) -> None:
        """Start another macro-step here: what somebody wrote within the running one belongs to no map."""
        self._progress |= {"in_macro_step": 0, "abandoned_in_a_row": self._progress["abandoned_in_a_row"] + 1}
        self._sample = None
        self._open_macro_step(optimizer, elsewhere=True)
        if self._progress["abandoned_in_a_row"] == ABANDONED and not self._progress["warned"]:
            self._progress["warned"] = True
            warn_once(
                f"the last {ABANDONED} macro-steps of this {type(optimizer).__name__} were abandoned, because its "
                f"parameters are written to between steps, neither after every step nor at equal distances: nothing is "
                f"accelerated that way; write at other times, or call aadl.accelerate with store_each_nth=1"
            )

    @torch.inference_mode(False)
    @torch.no_grad()
    def _close_macro_step(self, optimizer: Optimizer, closure: Callable[[], Any] | None) -> None:
        layout = self._layout
        if layout is None or not (layout.parameters or layout.history.partial):
            return
        look, self._sample = self._look(optimizer), None
        if self.settings.store_each_nth > 1 and not self.settings.local_sgd:
            writes, left = self._progress["writes"], self._left
            if left is None and "exchanged" in writes:  # after a resume: who did so regularly will have done it again
                is_regular(writes, "exchanged", self._gap, self.settings.store_each_nth)
            elif left is not None and not look.keeps(left) and self._is_change("exchanged", optimizer):
                self._note_places(optimizer, layout)
                return
        self._progress["abandoned_in_a_row"] = 0
        history = layout.history
        if not layout.has_momentum and not history.has_pair and self._has_momentum(optimizer, layout.parameters):
            layout.add_momentum()  # made by the first step, from zero, of an optimizer we do not know
        tensors = layout.tensors(optimizer, look)
        self._follow_learning_rate(optimizer, layout)
        decisions, progress = self._decisions, self._progress
        rate = progress["learning_rate"]
        pending = None if decisions.pending is None else decisions.pending.at(rate)
        earlier = progress.get("pair_learning_rate", rate)
        ratio = rate / earlier
        column = Column(decisions.statistics["macro_steps"], not decisions.disturbed, rate, earlier_rate=earlier)
        decisions.pending, decisions.disturbed, progress["pair_learning_rate"] = None, False, rate
        due = self._is_due(history)

        watched, done = decisions.watched, decisions.statistics["macro_steps"]
        if watched is not None and done - watched.macro_step > 2 * self.settings.period:
            decisions.watched = None  # the way since then says nothing about that step any more
        looks_back = due and decisions.watched is not None and not decisions.moves
        measure = "kept" if looks_back else "jump" if due or pending is not None or not column.consecutive else ""

        def push() -> None:
            history.push(tensors, column, ratio, pending is not None, measure)
            if measure and not due and pending is None:
                decisions.note_jump(history)

        if not due and pending is None and any(block.offloaded for block in history.blocks):
            history.fetch(tensors)
            self._postponed = push  # by then the copy to the host is done
        else:
            push()
        abandoned = progress.pop("abandoned", False)
        if due or pending is not None:
            judged = None if self._partitioned else decisions.trial_closure(closure)
            written = progress["written"]
            doubtful = written or progress["doubtful"]
            own = judged, self._ranks, self.loss_weight, rate, written, doubtful, progress["accelerated_at"]
            step = Step(optimizer, history, tensors, *own)
            if due:
                progress |= {"written": False, "accelerated_at": column.macro_step}
                decisions.accelerate(step, pending)
            else:
                assert pending is not None
                decisions.judge(step, pending)
        progress["doubtful"] = progress["doubtful"] and decisions.watched is not None
        if self._events() >= advice.EVENTS and not progress["told"]:
            progress["told"] = True
            if not decisions.statistics["accepted"]:
                advice.warn_of_idleness(decisions.statistics)
        if abandoned:  # its start was not where it seems
            history.clear()
        self._note_places(optimizer, layout)

    def _events(self) -> float:
        """How many periods are over."""
        settings, statistics = self.settings, self._decisions.statistics
        waited = -(-settings.wait_iterations // settings.store_each_nth)
        return (statistics["macro_steps"] - waited) / settings.period

    def _is_due(self, history: History) -> bool:
        """Acceleration falls on every period-th macro-step, counted from the start, whatever was rejected between."""
        settings, done = self.settings, self._decisions.statistics["macro_steps"]
        if self._decisions.statistics["steps"] <= settings.wait_iterations or done % settings.period != 0:
            return False
        if settings.local_sgd:  # all ranks come to vote, whatever happened to their own histories
            return True
        return history.has_pair and not self._decisions.is_suspended()

    def _follow_learning_rate(self, optimizer: Optimizer, layout: Layout) -> None:
        """Note the mean learning rate of the macro-step, in units of the first one.

        Columns of other rates are brought to the present one (aadl.proposal). The history starts with the present pair
        where no factor does that: rates of groups change by different factors, or by more than LEARNING_RATE_BAND.
        """
        progress = self._progress
        moved = set(map(id, layout.parameters))
        groups = [
            (group, mean)
            for group, mean in zip(optimizer.param_groups, self._mean_rates(optimizer), strict=True)
            if self._partitioned or any(id(p) in moved for p in group["params"])
        ]
        rates = [mean for group, mean in groups if "lr" in group]
        last, progress["rates"] = progress["rates"], rates
        if last is None or rates == last:
            return
        ratios = [new / old if old else math.inf for new, old in zip(rates, last, strict=True) if new != old or new]
        uniform = all(math.isclose(ratio, ratios[0], rel_tol=1e-9) for ratio in ratios)
        if uniform and all(1 / LEARNING_RATE_BAND <= ratio <= LEARNING_RATE_BAND for ratio in ratios):
            progress["learning_rate"] *= ratios[0] if ratios else 1.0
        else:
            progress |= {"learning_rate": 1.0, "pair_learning_rate": 1.0}
            self._decisions.reset("learning_rate", self._history)

    def _see_rates(self, optimizer: Optimizer) -> None:
        """Look at the learning rates of the step that begins; rates on a device are not read."""
        rates = [group.get("lr") for group in optimizer.param_groups]
        if rates != self._seen_rates:
            self._is_dry = is_dry_step(optimizer)
            self._seen_rates = rates if all(type(rate) is float for rate in rates) else None

    def _note_rates(self, optimizer: Optimizer) -> None:
        """Add the learning rates of a step to those of its macro-step, once they change; on a device the last count."""
        progress = self._progress
        numbers = self._seen_rates
        if numbers is None:
            rates = [group.get("lr") for group in optimizer.param_groups]
            numbers = [rate if isinstance(rate, float) else None for rate in rates]
        if progress["in_macro_step"] == 1 or len(progress["first_rates"]) != len(numbers):
            progress |= {"first_rates": numbers, "rate_sums": []}
        elif progress["rate_sums"] or numbers != progress["first_rates"]:
            before = progress["in_macro_step"] - 1
            sums = progress["rate_sums"] or [
                None if rate is None else rate * before for rate in progress["first_rates"]
            ]
            pairs = zip(sums, numbers, strict=True)
            progress["rate_sums"] = [None if None in pair else sum(pair) for pair in pairs]

    def _mean_rates(self, optimizer: Optimizer) -> list[float]:
        """Learning rates of the groups, mean over the macro-step that ends here."""
        rates = self._rates.of(optimizer.param_groups)
        sums, steps = self._progress["rate_sums"], self.settings.store_each_nth
        if len(sums) != len(rates):
            return rates
        return [rate if total is None else total / steps for rate, total in zip(rates, sums, strict=True)]

    # ---- changes from outside --------------------------------------------------------------------------------------

    def _notice_writes(self, optimizer: Optimizer) -> None:
        """See whether somebody wrote to the tensors since the last step left them."""
        left, progress = self._left, self._progress
        untouched = left is not None and self._sample is None and versions_of(left.tensors) == left.versions
        if (untouched and not progress["first"]) or self.settings.store_each_nth == 1:
            return
        progress["doubtful"] = self._is_doubtful()
        kind, progress["unseen"] = self._writes_since_left(), ""
        first, progress["first"] = progress["first"], ""
        if first and first != kind:  # it came once, within the first macro-step or that which began there
            self._change(optimizer, ended=progress["in_macro_step"] == 0)
        elif kind:
            self._is_change(kind, optimizer, begins=bool(first))

    @property
    def _gap(self) -> int:
        """Number of the gap between two steps."""
        return self._decisions.statistics["steps"] + self._decisions.statistics["skipped_steps"]

    def _writes_since_left(self) -> str:
        """What was written since the last step, see `kind_of_write`; after a resume, what had been at the save."""
        left = self._left
        return self._progress["unseen"] if left is None else kind_of_write(left.versions, versions_of(left.tensors))

    def _is_doubtful(self) -> bool:
        """Whether the weights may have been filled through `.data` within the macro-step."""
        return self._progress["doubtful"] or (self._sample is not None and self._sample.differs())

    def _is_change(self, kind: str, optimizer: Optimizer, begins: bool = False) -> bool:
        """Whether the running macro-step was abandoned, because writes of this kind belong to no map.

        Without a pair there is nothing to lose yet: the next gap tells whether the first write was one of many.

        Args:
            begins: whether these writes came before the last step too.
        """
        progress, history = self._progress, self._history
        if is_regular(progress["writes"], kind, self._gap, self.settings.store_each_nth) or begins:
            return False
        if kind != "exchanged" and progress["in_macro_step"] == 0:  # the start is compared, see `_open_macro_step`
            return False
        if kind != "exchanged" and history is not None and not history.has_pair and not history.columns:
            progress["first"] = kind
            return False
        return self._change(optimizer)

    def _change(self, optimizer: Optimizer, ended: bool = False) -> bool:
        """Abandon the running macro-step, and return whether that was done, or forget the pair of one that has ended.

        Ranks see different writes (one of them may have evaluated other weights and put its own back), but must count
        alike: they go on, and agree upon what happened where they speak with each other.
        """
        alone = self._ranks.size == 1
        if not alone:
            self._progress["written"] = True
        elif ended and self._history is not None:
            self._decisions.forget_last(self._history, 1)
        else:
            self._abandon_macro_step(optimizer)
        return alone and not ended

    def _notice_averaging(self, optimizer: Optimizer) -> None:
        """With local SGD every change is an averaging over ranks: the maps of before and after differ."""
        if self._left is not None and not self._untouched(optimizer):
            self._averaged = True
        if self._averaged:  # all ranks go on counting as before: they must come to the votes together
            self._averaged = False
            self._decisions.reset("averaged", self._history)
            self._progress["abandoned"] = self._progress["in_macro_step"] > 0

    def _leave(self) -> None:
        """Within a macro-step, remember the version counters, and some elements while a candidate may be taken back."""
        left, layout = self._left, self._layout
        if left is None or layout is None or self._progress["in_macro_step"] == 0:
            return
        left.versions = versions_of(left.tensors)
        if self._decisions.pending is None and self._decisions.watched is None:
            return
        if self._sample is not None:
            self._sample.keep()
        elif layout.asks or not layout.history.partial:  # ranks might disagree about DTensors
            largest = max(layout.parameters, key=torch.Tensor.numel, default=None)
            if largest is not None and largest.device.type == "cpu":  # the host would wait for another device
                self._sample = Sample(largest)

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
            self._decisions.pending = self._decisions.watched = self._left = None
            warnings.warn(f"training goes on without acceleration: {error}", UserWarning, stacklevel=2)
            return None

    def _new_layout(self, parameters: list[Tensor], momentum: bool, planned: bool = False) -> Layout:
        ranks = Ranks() if self.settings.local_sgd else self._ranks
        return Layout(parameters, self.settings, ranks, self._partitioned, momentum, planned)

    def _lay_out(self, parameters: list[Tensor], momentum: bool) -> None:
        """Allocate rows for the trainable parameters (and momentum) of the optimizer as they are now."""
        if _tensors_are_fake():
            raise ValueError(
                f"this {type(self.optimizer).__name__} cannot be accelerated within FakeTensorMode, whose tensors have "
                f"no values: call aadl.remove_acceleration(optimizer) before such a step"
            )
        self._layout = None  # frees the old rows first
        self._layout = self._new_layout(parameters, momentum)
        self._decisions.pending = self._left = None
        self._progress |= {"learning_rate": 1.0, "rates": None}

    def _agree(self, refusal: torch.OutOfMemoryError | None) -> None:
        """Raise on every rank where one has no room for its new rows; the optimizer was not stepped then."""
        if self._layout is None or not self._layout.agreed:
            try:
                memory.agree(self._ranks, refusal)
            except torch.OutOfMemoryError:
                self._layout = None
                raise
            assert self._layout is not None
            self._layout.agreed = True

    def _has_momentum(self, optimizer: Optimizer, parameters: list[Tensor]) -> bool:
        if self.settings.state_coupling == "params":
            return False
        return any(momentum_of(optimizer.state.get(p), p) is not None for p in parameters)

    def _note_places(self, optimizer: Optimizer, layout: Layout, sampled: bool = True) -> None:
        """Remember the tensors as this hook leaves them, and some elements of them."""
        look = self._look(optimizer)
        self._left = look if layout.covers(look) else None
        self._samples = layout.sample(layout.tensors(optimizer, look)) if sampled and self._left is not None else []

    def _untouched(self, optimizer: Optimizer) -> bool:
        """Whether nobody seems to have written to the tensors since the last hook left them."""
        if self._layout is None or self._left is None:
            return False
        look = self._look(optimizer)
        if not look.untouched_since(self._left):
            return False
        sample = self._layout.sample(self._layout.tensors(optimizer, look))
        return all(map(same_bits, self._samples, sample))

    def _look(self, optimizer: Optimizer) -> Look:
        return look_at(optimizer, self.settings.state_coupling != "params")

    def _start_anew(self) -> None:
        """State of an accelerator that has seen no step."""
        self._decisions = Decisions(self.settings)
        self._progress = _progress()
        self._layout = self._left = self._sample = self._postponed = None
        self._samples, self._averaged = [], False


def _progress() -> dict[str, Any]:
    """Where an accelerator stands that has seen no step.

    in_macro_step (steps of the running macro-step); learning_rate, rates, first_rates and rate_sums (see
    `_follow_learning_rate` and `_note_rates`); writes (see `aadl.watch.is_regular`), unseen (the kind of those before a
    save) and first (the kind of those that may be the first of many); abandoned_in_a_row (macro-steps) and warned (of
    that); written (within a macro-step since the last acceleration, on this rank); doubtful (the running one);
    accelerated_at (the macro-step of the last acceleration, accepted or not); told
    (whether the first advice.EVENTS periods have been looked at for one with an accepted candidate).
    """
    return {
        "in_macro_step": 0,
        "learning_rate": 1.0,
        "rates": None,
        "first_rates": [],
        "rate_sums": [],
        "writes": {},
        "unseen": "",
        "first": "",
        "abandoned_in_a_row": 0,
        "warned": False,
        "written": False,
        "doubtful": False,
        "accelerated_at": 0,
        "told": False,
    }


def _tensors_are_fake() -> bool:
    """Whether tensors made now have no values, as in torch's FakeTensorMode."""
    return type(torch.empty(0, device="cpu")).__name__ == "FakeTensor"
