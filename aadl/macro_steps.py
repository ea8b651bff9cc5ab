"""What Anderson acceleration does around every step of an optimizer.

A macro-step is `store_each_nth` optimizer steps; it is the map G whose fixed point is sought. At its end the pair
(x_k, g_k) goes into the history. Every `frequency` optimizer steps (rounded up to macro-steps) the history is mixed
into a candidate that may replace g_k (`aadl.decisions`). Nothing else writes to a parameter.

The host waits for a device once per acceleration, for the Gram matrix (at first also in `aadl.empty_steps`). All later
decisions are carried out on the device; the host reads them after the next optimizer step (`Decisions.settle`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.optim import Optimizer

from aadl import memory
from aadl.acceptance import Cause, count
from aadl.attached import Accelerator
from aadl.backward import BackwardWatch
from aadl.block import Tensors
from aadl.decisions import Decisions
from aadl.empty_steps import EmptySteps
from aadl.history import Column, History
from aadl.history_layout import Layout
from aadl.learning_rates import LearningRates
from aadl.losses import Losses
from aadl.mixing import host_tensor
from aadl.outside import Change, OutsideWrites
from aadl.parameters import closure_of, makes_momentum, tensors_are_fake, trainable_parameters
from aadl.problem import MacroStep
from aadl.progress import Progress
from aadl.ranks import Ranks, ranks_of
from aadl.spare import Spare
from aadl.wrappers import Target


class MacroSteps(Accelerator):
    """The hooks of `aadl.accelerator.AndersonAccelerator`, which adds what users call and what is saved."""

    _decisions: Decisions
    _progress: Progress
    _rates: LearningRates
    _outside: OutsideWrites
    _empty: EmptySteps
    _layout: Layout | None
    _averaged: bool
    """Whether somebody averaged the weights since the last hook (local SGD)."""
    _postponed: Callable[[], None] | None
    """Stores the pair whose copy to the host is under way."""

    _spare: Spare
    _losses: Losses
    _loss_weight = 1.0

    # ---- hooks -----------------------------------------------------------------------------------------------------

    def _attach(self, target: Target) -> None:
        super()._attach(target)
        if self.settings.safeguard and not self.settings.idle:
            self._handles.append(BackwardWatch(self._see_backward))

    def _see_backward(self, given: dict[str, Any]) -> Callable[[], None] | None:
        return self._losses.passes.look(given, self._leave_lost_candidate)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _leave_lost_candidate(self) -> None:
        """Put the plain iterate back where no step is made at the candidate any more: the loss is not finite there."""
        optimizer, layout, steps = self._optimizer(), self._layout, self._progress.in_macro_step
        if optimizer is None or layout is None or self._ranks.size > 1:
            return
        if not self._outside.is_as_stepped(optimizer, layout, steps):  # somebody has put weights of his own there
            return
        tensors, spare = layout.tensors(optimizer, self._outside.look(optimizer)), self._spare if steps else None
        with ExitStack() as stack:
            for p in layout.parameters:  # backward passes yet to come must not find them changed
                stack.enter_context(_unsafe_preserve_version_counter(p))
            has_left = self._decisions.leave(optimizer, layout.history, tensors, spare)
        if has_left:
            self._progress.in_macro_step = 0
            self._outside.end_macro_step()
            self._outside.note_end(optimizer, layout)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._rates.see(optimizer)
        settings, dry = self.settings, self._rates.is_dry
        if settings.idle or self._given_up:
            return
        self._losses.passes.begin_step(closure_of(args, kwargs) is not None)
        if settings.safeguard == "loss" and not dry and closure_of(args, kwargs) is None:
            raise ValueError("safeguard='loss' needs optimizer.step(closure), but step was called without a closure")
        is_quiet = settings.local_sgd or self._outside.is_quiet()
        if not is_quiet:
            self._apply(self._outside.before_step(self._gap, self._progress.in_macro_step, self._layout), optimizer)
        if dry:
            return
        starts = self._progress.in_macro_step == 0
        if starts:
            self._finish_push()
        if settings.local_sgd:
            self._notice_averaging(optimizer)
        if self._lacks_history:
            self._say_that_history_is_missing()
        if starts:
            self._open_macro_step(optimizer)
        if self._layout is not None and self._decisions.is_on_trial:
            self._spare.keep(optimizer, self._layout, self._progress.accelerated_at)
        else:
            self._spare.drop()
        if self._layout is not None and not (settings.local_sgd or self._partitioned):
            self._empty.begin(self._layout, self._progress, self._outside.left if is_quiet or starts else None)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._rates.is_dry:
            self._losses.end_step(skipped=True, reverted=self._decisions.statistics["reverted"])
            if self._progress.in_macro_step:  # else momentum that is gathered at rate 0 belongs to no pair
                self._outside.note_step(self._layout, self._progress.in_macro_step)
            return
        decisions, progress = self._decisions, self._progress
        decisions.settle()
        is_skipped = bool(getattr(optimizer, "found_inf", None))
        is_skipped = is_skipped or self._empty.is_empty(self._layout, progress, self._outside.sample)
        is_stuck = self._losses.end_step(is_skipped, decisions.statistics["reverted"])
        if is_skipped:
            decisions.statistics["skipped_steps"] += 1
            if is_stuck:
                self._leave_lost_candidate()
            self._note_step(optimizer)
            return
        decisions.statistics["steps"] += 1
        if self.settings.idle or self._given_up:
            return
        progress.in_macro_step += 1
        self._rates.add_step(optimizer, progress.in_macro_step)
        if progress.in_macro_step == self.settings.store_each_nth:
            progress.in_macro_step = 0
            decisions.statistics["macro_steps"] += 1
            self._close_macro_step(optimizer, closure_of(args, kwargs))
        else:
            self._note_step(optimizer)

    def _note_step(self, optimizer: Optimizer) -> None:
        """Remember the tensors as a step leaves them that ends no macro-step."""
        steps, local_sgd = self._progress.in_macro_step, self.settings.local_sgd
        if self._layout is not None and (self._outside.left is None or local_sgd):
            self._outside.note_end(optimizer, self._layout, sampled=local_sgd or steps == 0)
        if not local_sgd:
            self._outside.note_step(self._layout, steps)

    @property
    def _gap(self) -> int:
        """Number of the gap between two steps."""
        return self._decisions.statistics["steps"] + self._decisions.statistics["skipped_steps"]

    # ---- macro-steps -----------------------------------------------------------------------------------------------

    @torch.inference_mode(False)
    @torch.no_grad()
    def _open_macro_step(self, optimizer: Optimizer, elsewhere: bool = False) -> None:
        """Note where the macro-step starts, if not where the last one ended.

        Args:
            elsewhere: whether it is known to start elsewhere, because the running macro-step is abandoned.
        """
        layout, changed = self._layout, False
        untouched = not elsewhere and self._outside.is_as_left(optimizer, layout)
        if layout is not None and layout.asks:
            other = not layout.is_of(trainable_parameters(optimizer))
            sums = self._ranks.total(host_tensor([float(not untouched), float(other)]))
            untouched, changed = not float(sums[0]), bool(sums[1])
        if untouched and not changed:
            return
        self._decisions.settle()
        self._outside.left, parameters, error = None, self._extrapolated(optimizer), None
        if parameters is None:
            return
        if layout is None or changed or not layout.is_of(parameters):
            if layout is not None:
                count(self._decisions.statistics["resets"], Cause.PARAMETERS_CHANGED)
            try:
                self._lay_out(parameters, makes_momentum(optimizer))
            except torch.OutOfMemoryError as out_of_memory:
                error = out_of_memory
        self._agree_on_room(error)
        assert self._layout is not None
        history, tensors = self._layout.history, self._layout.tensors(optimizer, self._outside.look(optimizer))
        if elsewhere or not history.starts_at(tensors):
            self._decisions.statistics["moved"] += elsewhere or history.has_pair
            history.begin(tensors)
            self._decisions.start_elsewhere(history)

    def _apply(self, change: Change, optimizer: Optimizer) -> bool:
        """Apply a change from outside, and return whether the running macro-step was abandoned.

        Ranks see different writes (one of them may have evaluated other weights and put its own back), but must count
        alike. They go on, and agree on what happened when they exchange data at the next acceleration.
        """
        if change is Change.NONE:
            return False
        if self._ranks.size > 1:
            self._outside.written = True
            return False
        if change is Change.ENDED and self._history is not None:
            self._decisions.forget_last(self._history, 1)
            return False
        self._abandon_macro_step(optimizer)
        return True

    def _abandon_macro_step(self, optimizer: Optimizer) -> None:
        """Start another macro-step here: a macro-step within which somebody wrote is no pair of the map."""
        progress = self._progress
        progress.in_macro_step, progress.abandoned_in_a_row = 0, progress.abandoned_in_a_row + 1
        self._outside.end_macro_step()
        self._open_macro_step(optimizer, elsewhere=True)
        progress.warn_if_abandoned(optimizer)

    def _is_changed(self, optimizer: Optimizer) -> bool:
        """Whether somebody has written to the tensors since the last hook."""
        return self._outside.left is not None and not self._outside.is_as_left(optimizer, self._layout)

    def _notice_averaging(self, optimizer: Optimizer) -> None:
        """With local SGD every change is an averaging over ranks: the maps of before and after differ."""
        if self._averaged or self._is_changed(optimizer):
            # all ranks go on counting as before: they must come to the votes together
            self._averaged = False
            self._decisions.reset(Cause.AVERAGED, self._history)
            self._progress.is_averaged = self._progress.in_macro_step > 0

    @torch.inference_mode(False)
    @torch.no_grad()
    def _close_macro_step(self, optimizer: Optimizer, closure: Callable[[], Any] | None) -> None:
        """Store the pair of the macro-step that ends, judge the last candidate, and accelerate where that is due."""
        layout = self._layout
        if layout is None or not (layout.parameters or layout.history.partial):
            return
        decisions, progress, outside, history = self._decisions, self._progress, self._outside, layout.history
        self._losses.passes.choose(layout.parameters)
        look = outside.look(optimizer)
        change = Change.NONE if self.settings.local_sgd else outside.after_macro_step(look, self._gap, history)
        leap = outside.end_macro_step()
        if self._apply(change, optimizer):
            outside.note_end(optimizer, layout)
            return
        progress.abandoned_in_a_row, outside.written = 0, outside.written or progress.is_empty
        if not history.has_pair:
            layout.add_momentum(optimizer)  # made by the first step, from zero, of an optimizer outside of torch.optim
        tensors = layout.tensors(optimizer, look)
        column, ratio = self._new_column(optimizer, layout, leap)
        accepted = None if decisions.accepted is None else decisions.accepted.at(column.learning_rate)
        decisions.accepted, decisions.disturbed, decisions.moved = None, False, False
        due = self._is_due(history)
        self._push(history, tensors, column, ratio, due, accepted is not None)
        if due or accepted is not None:
            step = self._macro_step(optimizer, history, tensors, closure)
            if due:
                outside.written, progress.accelerated_at = False, column.macro_step
                decisions.accelerate(step, accepted)
                self._losses.begin_trial(optimizer, step.closure is not None, decisions.statistics["reverted"])
            else:
                assert accepted is not None
                decisions.judge(step, accepted)
        outside.settle_doubt(decisions.confirmed is not None)
        progress.advise(self.settings, decisions.statistics, column.warm_up)
        if progress.is_averaged:  # the pair's start was not where it seems
            history.clear()
        progress.is_averaged = False
        outside.note_end(optimizer, layout)

    def _new_column(self, optimizer: Optimizer, layout: Layout, leap: float) -> tuple[Column, float]:
        """The column of the macro-step that ends, and its learning rate over that of the pair before."""
        rates, decisions = self._rates, self._decisions
        moving = None if self._partitioned else set(map(id, layout.parameters))
        if rates.end_macro_step(optimizer.param_groups, moving, self.settings.store_each_nth):
            decisions.reset(Cause.LEARNING_RATE, layout.history)
        rate = rates.factor
        earlier = rate if rates.pair_factor is None else rates.pair_factor
        rates.pair_factor = rate
        written = leap if leap and self._ranks.size == 1 else None  # others may not have seen it
        number, warm_up = decisions.statistics["macro_steps"], rates.warm_up(optimizer, self.settings)
        column = Column(number, not decisions.disturbed, rate, {}, earlier, decisions.moved, written, warm_up)
        return column, rate / earlier

    def _push(
        self, history: History, tensors: Sequence[Tensors], column: Column, ratio: float, due: bool, is_judged: bool
    ) -> None:
        """Store the pair, now or when its copy to the host is done, and measure what the decisions need."""
        decisions = self._decisions
        if (
            decisions.confirmed is not None
            and column.macro_step - decisions.confirmed.macro_step > 2 * self.settings.period
        ):
            decisions.confirmed = None  # the way since then says nothing about that candidate any more
        looks_again = due and decisions.confirmed is not None and not decisions.moves
        measure = "kept" if looks_again else "jump" if due or is_judged or not column.consecutive else ""

        rise = self._losses.rise() if is_judged or looks_again else 0.0

        def push() -> None:
            history.push(tensors, column, ratio, is_judged, measure, rise)
            if measure and not due and not is_judged:
                decisions.note_jump(history)

        if not due and not is_judged and any(block.offloaded for block in history.blocks):
            history.fetch(tensors)
            self._postponed = push  # by then the copy to the host is done
        else:
            push()

    def _macro_step(
        self, optimizer: Optimizer, history: History, tensors: Sequence[Tensors], closure: Callable[[], Any] | None
    ) -> MacroStep:
        """What the decisions see of the macro-step that has ended."""
        outside, ranks = self._outside, self._ranks
        whole = not history.partial or self.settings.shard_history
        return MacroStep(
            optimizer,
            history,
            tensors,
            None if self._partitioned else self._decisions.trials.closure_for(closure, optimizer),
            ranks,
            quorum=history.ranks.size if whole else 1,
            loss_weight=self._loss_weight,
            rate=self._rates.factor,
            written=outside.written,
            doubtful=outside.written or outside.is_doubtful,
            since=self._progress.accelerated_at,
            spare=self._spare,
        )

    def _is_due(self, history: History) -> bool:
        """Whether acceleration falls on this macro-step: every period-th one from the start, whatever was rejected."""
        settings, statistics = self.settings, self._decisions.statistics
        if statistics["steps"] <= settings.wait_iterations or statistics["macro_steps"] % settings.period != 0:
            return False
        if settings.local_sgd:  # all ranks come to vote, whatever happened to their own histories
            return True
        return history.has_pair and not self._decisions.is_paused()

    # ---- memory ----------------------------------------------------------------------------------------------------

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

    def _let_go(self) -> None:
        self._spare.drop()
        self._losses = Losses()
        self._layout = self._decisions.accepted = self._decisions.confirmed = self._outside.left = None

    def _new_layout(self, parameters: list[Tensor], momentum: bool, planned: bool = False) -> Layout:
        ranks = Ranks() if self.settings.local_sgd else self._ranks
        return Layout(parameters, self.settings, ranks, self._partitioned, momentum, planned)

    def _lay_out(self, parameters: list[Tensor], momentum: bool) -> None:
        """Allocate rows for the trainable parameters (and momentum) of the optimizer as they are now."""
        if tensors_are_fake():
            raise ValueError(
                f"this {type(self.optimizer).__name__} cannot be accelerated within FakeTensorMode, whose tensors have "
                f"no values: call aadl.remove_acceleration(optimizer) before such a step"
            )
        self._layout = None  # frees the old rows first
        self._layout = self._new_layout(parameters, momentum)
        self._decisions.accepted = self._outside.left = None
        self._rates.restart()

    def _agree_on_room(self, error: torch.OutOfMemoryError | None) -> None:
        """Raise on every rank where one has no room for its new rows; the optimizer was not stepped then."""
        if self._layout is None or not self._layout.agreed:
            try:
                memory.agree(self._ranks, error)
            except torch.OutOfMemoryError:
                self._layout = None
                raise
            assert self._layout is not None
            self._layout.agreed = True

    def _start_over(self) -> None:
        """Be as an accelerator that has seen no step."""
        self._decisions = Decisions(self.settings)
        self._progress, self._rates = Progress(), LearningRates()
        self._outside = OutsideWrites(self.settings.store_each_nth, self.settings.state_coupling != "params")
        self._empty, self._layout, self._postponed = EmptySteps(), None, None
        self._averaged, self._spare, self._losses = False, Spare(), Losses.of(self.optimizer, {})
