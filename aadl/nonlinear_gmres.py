"""ResidualAccelerator: nonlinear GMRES on the residuals of a least-squares loss, with the optimizer as preconditioner.

The loss is ||r(x)||^2 with residuals r on points that stay. The history keeps pairs (x_j, r_j); every `frequency`
optimizer steps a candidate x+ = x_k + sum_j gamma_j (x_j - x_k) minimizes ||r_k + sum_j gamma_j (r_j - r_k)||^2, damped
after Levenberg and Marquardt, and replaces x_k where ||r(x+)||^2 is smaller than ||r_k||^2.

The residuals of a step's own evaluation make its pair, where the closure hands them over (`observe`). An acceleration
evaluates them twice more: at x_k, where the step has led, and at x+.

The host waits for a device once per acceleration, for the products. The verdict is carried out on the device; the host
reads it before the next step.
"""

from __future__ import annotations

import copy
import json
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from aadl import advice, memory
from aadl.acceptance import Cause, cause_of_residuals, count
from aadl.attached import VERSION, Accelerator, check_format
from aadl.deferred import Deferred, on_host
from aadl.learning_rates import is_dry_step
from aadl.least_squares import Solution, gain_ratio, next_damping, solve
from aadl.mixing import newest
from aadl.pace import Pace, is_normalized, lets_go_of_momentum
from aadl.parameters import (
    MOMENTUM_KEYS,
    all_parameters,
    belongs_to_a_loop,
    closure_of,
    forget_curvature,
    state_of,
    trainable_parameters,
)
from aadl.ranks import local, ranks_of
from aadl.residual_history import ResidualHistory, is_finite, joined, planned_bytes
from aadl.settings import Settings
from aadl.statistics import Statistics, residual_statistics
from aadl.trial import without_trace
from aadl.watch import versions_of
from aadl.wrappers import Target

FIRST_DAMPING = 1e-2
ROWS_PER_COLUMN = 8
"""Residuals that a coefficient needs, so that few points are not learned by heart."""
SAME = 1e-3
"""Relative difference of residuals at the same weights up to which they belong to the same points."""

Residuals = Callable[[], "Tensor | Sequence[Tensor]"]


PROGRESS = ("trusted", "observes", "warned")
"""Flags of an accelerator that its state carries."""
RESUMED = "resumed"
"""In place of version counters, which a checkpoint does not carry."""


class _Attempt(NamedTuple):
    """A candidate on trial."""

    solution: Solution
    slots: list[int]
    """Of the columns that it is made of."""
    before: float
    """||r_k||^2."""


class ResidualAccelerator(Accelerator):
    """Nonlinear GMRES for one optimizer; made by `aadl.accelerate(optimizer, "nonlinear_gmres", ...)`.

    Args:
        target: the optimizer.
        settings: the validated arguments.
        process_group: ranks whose residuals make the loss together.
        residuals: () -> r at the present weights, one tensor or several; None where closures hand them over.
        check: () -> residuals on other points, on which a candidate must be better too; None for no such points.
    """

    _statistics: Statistics
    _history: ResidualHistory | None
    _damping: float
    _pace: Pace
    _trusted: bool
    """Whether the residuals at the same weights were seen to be the same, so that they belong to the same points."""
    _observes: bool
    """Whether residuals are handed over by `observe`."""
    _warned: bool
    _inside: bool
    """Whether a step is running."""
    _is_repeated: bool
    """Whether the running step has begun at the weights of the newest pair."""
    _has_begun: bool
    """Whether the weights of a pair are stored whose residuals are not yet."""
    _parts: list[Tensor]
    """Residuals that were observed for the running step, or the next one."""
    _trial_parts: list[Tensor] | None
    """Residuals observed by a trial evaluation, while one runs."""
    _versions: list[int]
    """Version counters of the weights at which `_parts` were observed."""
    _known: list[int] | str | None
    """Version counters at which the weights are those of the newest pair."""
    _verdict: tuple[_Attempt, Deferred, bool] | None
    """The last attempt, the numbers that decided, and whether the host knew them at once."""

    def __init__(
        self,
        target: Target,
        settings: Settings,
        process_group: Any = None,
        residuals: Residuals | None = None,
        check: Residuals | None = None,
    ) -> None:
        self._residuals, self._check = residuals, check
        super().__init__(target, settings, process_group)

    # ---- public ----------------------------------------------------------------------------------------------------

    @property
    def statistics(self) -> Statistics:
        """Counters and last values, see `aadl.accelerate`. Reading them waits for the device."""
        self._settle()
        return self._statistics

    @property
    def history(self) -> ResidualHistory | None:
        """The stored pairs; None before the first residuals. For inspection: nothing may write to it."""
        return self._history

    @property
    def history_bytes(self) -> int:
        """Bytes that the history takes on this rank; before the first residuals those of the rows for weights."""
        if self._history is not None:
            return self._history.nbytes
        if not self._handles or self.settings.idle:
            return 0
        return planned_bytes(trainable_parameters(self.optimizer), self.settings)

    @torch.compiler.disable
    def observe(self, residuals: Tensor) -> None:
        """Hand over the residuals of the loss at the present weights, where they are computed anyway.

        Call it in the closure of `step`, or before a `step` without one, once per evaluation of the loss; with gradient
        accumulation once per micro-batch, and with several terms once per term: the parts are put together in their
        order. The loss is the sum of squares of all of them, up to a factor: the weight of a term goes into r as its
        square root.

        Args:
            residuals: r, of any shape; float64, float32 or lower, real or complex. It is read at the end of the step,
                and must not be changed in place before.
        """
        residuals = residuals.detach()
        if self._trial_parts is not None:
            self._trial_parts.append(residuals)
            return
        if self.settings.idle:
            return
        self._observes = True
        versions = versions_of(self._tensors())
        if self._inside:
            if versions != self._versions:
                return  # a line search asks for the loss at another point
            if not self._parts:
                self._begin_pair()
        elif versions != self._versions:
            self._parts, self._versions = [], versions
        self._parts.append(residuals)

    @torch.no_grad()
    def reset(self) -> None:
        """Forget the pairs: the points have changed. Counters stay."""
        self._settle()
        self._forget(Cause.USER)

    def remove(self) -> None:
        """Detach: the optimizer is afterwards as if it had never been accelerated."""
        self._settle()
        super().remove()
        self._history = None

    @property
    def num_columns(self) -> int:
        return 0 if self._history is None else self._history.num_columns

    # ---- state -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs, as of `Accelerator.state_dict`; the residuals are those of this rank."""
        self._settle()
        history = self._history
        books = {
            "map": self._map(),
            "statistics": copy.deepcopy(self._statistics),
            "damping": self._damping,
            "pace": vars(self._pace),
            "progress": {name: getattr(self, f"_{name}") for name in PROGRESS},
            "is_known": self._known is not None and self._is_at(self._known),
            "history": None if history is None else history.books(),
        }
        rows = {} if history is None else history.rows()
        return {"version": VERSION, "books": json.dumps(books), "rows": rows}

    def _map(self) -> dict[str, Any]:
        """What two accelerators must have in common to exchange their states."""
        return {"acceleration_type": "nonlinear_gmres", "history_dtype": str(self.settings.history_dtype)}

    @torch.no_grad()
    def _checked(self, state: Any) -> dict[str, Any]:
        check_format(state)
        try:
            books = json.loads(state["books"])
            for name, value in self._map().items():
                if books["map"].get(name) != value:
                    raise ValueError(
                        f"the saved accelerator has {name}={books['map'].get(name)!r}, this one {name}={value!r}"
                    )
            float(books["damping"]), bool(books["is_known"]), books["statistics"]["steps"]
            [books["progress"][name] for name in PROGRESS]
            Pace(**books["pace"])
            books["restored"] = self._restored(books["history"], state["rows"])
        except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"the saved state of the accelerator is damaged: {error!r}") from None
        return books

    def _restored(self, saved: dict[str, Any] | None, rows: dict[str, Tensor]) -> ResidualHistory | None:
        """A history with the saved rows; without pairs where these are of another rank, depth, or not in the state."""
        if saved is None:
            return None
        history = ResidualHistory(trainable_parameters(self.optimizer), self.settings, ranks_of(self.process_group))
        if history.fits(saved, rows):
            history.load(saved, rows)
        else:
            history.pushed = int(saved["pushed"])
        return history

    def _take_over(self, state: dict[str, Any], books: dict[str, Any]) -> None:
        del state
        self._start_over()
        self._history, self._statistics, self._damping = books["restored"], books["statistics"], books["damping"]
        pace = Pace(**books["pace"])
        if pace.usual == self.settings.frequency and pace.adapts == self.settings.paced:
            self._pace = pace
        else:
            self._pace.due = self._statistics["steps"] + 1
        for name in PROGRESS:
            setattr(self, f"_{name}", bool(books["progress"][name]))
        has_pair = self._history is not None and self._history.has_pair
        self._known = RESUMED if books["is_known"] and has_pair else None
        self._lacks_history = False
        if books["history"] is not None and books["history"]["has_pair"] and not has_pair:
            count(self._statistics["resets"], Cause.RESUMED)

    # ---- hooks -----------------------------------------------------------------------------------------------------

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._settle()
        if self.settings.idle or is_dry_step(optimizer):
            return
        closure = closure_of(args, kwargs)
        if self._residuals is None:
            self._check_closure(closure)
        if self._lacks_history:
            self._say_that_history_is_missing()
        self._inside = True
        watches = self._residuals is None or self._observes or not self._statistics["steps"]  # or in the first one
        if watches:
            self._watch(optimizer, closure is not None)

    def _check_closure(self, closure: Callable[[], Any] | None) -> None:
        """Raise ValueError where nobody can evaluate the residuals."""
        if closure is None:
            raise ValueError(
                "acceleration_type='nonlinear_gmres' needs residuals=fn, or a closure given to step that calls "
                "aadl.accelerator_of(optimizer).observe(r): step was called without a closure"
            )
        if not self._statistics["steps"] and belongs_to_a_loop(closure):
            raise ValueError(
                "acceleration_type='nonlinear_gmres' needs residuals=fn here: the closure belongs to the loop of a "
                "framework, whose metrics would count the trials"
            )

    def _watch(self, optimizer: Optimizer, has_closure: bool) -> None:
        """Note where the weights are at which this step's residuals are observed, or were before a step without one."""
        self._lay_out(optimizer)
        if self._has_begun and self._history is not None:  # the last step ended with an exception
            self._history.void()
            self._known = None
        self._has_begun = False
        versions = versions_of(self._tensors())
        if has_closure or versions != self._versions:
            self._parts = []
        self._versions = versions
        if self._parts:
            self._begin_pair()

    @torch.inference_mode(False)
    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._inside:
            return
        self._inside = False
        self._end_pair()
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            self._statistics["skipped_steps"] += 1
            return
        self._statistics["steps"] += 1
        settings, steps = self.settings, self._statistics["steps"]
        if steps >= self._pace.due:
            self._lay_out(optimizer)
            self._accelerate(optimizer, closure_of(args, kwargs))
        elif self._residuals is not None and not self._observes and steps % settings.store_each_nth == 0:
            self._lay_out(optimizer)
            with without_trace(all_parameters(optimizer), is_closure=False):
                self._store(self._evaluated(self._residuals))
        if not self._statistics["accepted"] and steps >= advice.EVENTS * settings.frequency and not self._warned:
            self._warned = True
            advice.warn_of_idleness(self._statistics)

    # ---- pairs -----------------------------------------------------------------------------------------------------

    def _begin_pair(self) -> None:
        """Store the weights at which the residuals of this step are seen, unless they are those of the newest pair."""
        history = self._history
        self._is_repeated = history is not None and self._is_known()
        if history is None or self._is_repeated or self._statistics["steps"] % self.settings.store_each_nth:
            return
        with torch.no_grad():
            history.push_weights()
        self._has_begun = True

    def _end_pair(self) -> None:
        """Store the residuals that this step has seen."""
        history, parts, self._parts = self._history, self._parts, []
        if history is None or not parts:
            return
        if self._has_begun:
            history.push_residuals(joined(parts))
            self._has_begun = False
        elif self._is_repeated:
            history.compare(joined(parts))
        self._known = None

    def _store(self, residuals: Tensor) -> None:
        """Store the pair of the present weights, which the next step begins with."""
        assert self._history is not None
        self._history.push_weights()
        self._history.push_residuals(residuals)
        self._known = versions_of(self._tensors())

    def _is_known(self) -> bool:
        """Whether this step begins at the weights of the newest pair."""
        return self._known is not None and self._is_at(self._known, self._versions)

    def _is_at(self, known: list[int] | str, versions: list[int] | None = None) -> bool:
        """Whether nobody has written to the weights since these counters were read."""
        if known == RESUMED:
            assert self._history is not None
            return self._history.is_at_newest()
        return known == (versions_of(self._tensors()) if versions is None else versions)

    # ---- acceleration ----------------------------------------------------------------------------------------------

    def _accelerate(self, optimizer: Optimizer, closure: Callable[[], Any] | None) -> None:
        """Evaluate the residuals where the step has led, and at a candidate if there is one."""
        history = self._history
        assert history is not None
        source = self._source(closure)
        with without_trace(all_parameters(optimizer), is_closure=self._residuals is None) as rewind:
            self._store(self._evaluated(source))
            attempt = self._propose(history)
            self._pace.go_on(self._statistics["steps"])
            if attempt is None:
                return
            check = self._check
            before = None if check is None else (rewind(), self._evaluated(check))[1]
            try:
                history.place(attempt.slots, attempt.solution.coefficients)
                rewind()
                after = self._evaluated(source)
                checked = None if check is None else (rewind(), self._evaluated(check))[1]
            except BaseException:
                history.put_back()
                raise
        numbers = [_square(after)] + [_square(r) for r in (before, checked) if r is not None]
        self._decide(optimizer, attempt, after, history.ranks.total(torch.stack(numbers)))

    def _source(self, closure: Callable[[], Any] | None) -> Callable[[], Any]:
        """What evaluates the residuals at the present weights."""
        if self._residuals is not None:
            return self._residuals
        assert closure is not None

        def observed() -> list[Tensor]:
            self._trial_parts = []
            try:
                closure()
                return self._trial_parts
            finally:
                self._trial_parts = None

        return observed

    def _evaluated(self, source: Callable[[], Any]) -> Tensor:
        """Residuals at the present weights, counted.

        Raises:
            ValueError: there are none.
        """
        given = source is self._residuals or source is self._check
        self._statistics["residual_evaluations" if given else "closure_evaluations"] += 1
        made = source()
        parts = list(made) if isinstance(made, list | tuple) else [made]
        if parts and all(isinstance(part, Tensor) for part in parts):
            return joined(parts)
        if given:
            name = "residuals" if source is self._residuals else "check"
            raise ValueError(f"{name} must return a tensor, or a list of tensors, got {type(made).__name__}")
        raise ValueError(
            "the closure must call aadl.accelerator_of(optimizer).observe(r) with the residuals r of its loss, or "
            "aadl.accelerate needs residuals=fn: this closure called no observe"
        )

    def _propose(self, history: ResidualHistory) -> _Attempt | None:
        """Solve the mixing problem; None, counted by cause, where there is no candidate."""
        look, pace = history.look(), self._pace
        pace.note_jump(look.jump)
        pace.note_square(look.gram.square, is_normalized(self.optimizer))
        if not is_finite(look):
            self._forget(Cause.NON_FINITE)
            return None
        if not look.aligned:
            history.align()
            self._known = None
            count(self._statistics["resets"], Cause.RESUMED)
            return None
        if not look.doubt <= SAME**2 * history.ranks.size:
            self._trusted = False
            history.forget_columns()
            count(self._statistics["resets"], Cause.POINTS)
            return None
        self._trusted = self._trusted or look.compared
        if not self._trusted or not look.slots:
            return None
        self._statistics["attempts"] += 1
        slots = look.slots[-max(1, look.num_residuals // ROWS_PER_COLUMN) :]
        gram = newest(look.gram, len(slots))
        assert history.residuals is not None
        solution = solve(gram, self._damping, torch.finfo(history.residuals.row.dtype).eps)
        self._statistics["numerical_rank"] = solution.mixing.numerical_rank
        self._statistics["condition_number"] = solution.mixing.condition_number
        self._statistics["coefficient_norm"] = solution.mixing.coefficient_norm
        if not solution.mixing.numerical_rank or not solution.predicted < gram.square:
            count(self._statistics["rejected"], Cause.RANK)
            return None
        self._statistics["gain"] = math.sqrt(solution.predicted / gram.square)
        return _Attempt(solution, slots, gram.square)

    def _decide(self, optimizer: Optimizer, attempt: _Attempt, after: Tensor, numbers: Tensor) -> None:
        """Take the candidate where the sum of squares falls, on the points of `check` too; else put x_k back."""
        history = self._history
        assert history is not None
        flag = numbers[0] < attempt.before
        if numbers.numel() > 1:
            flag = flag & (numbers[2] < numbers[1])
        at_once = on_host(flag) or isinstance(optimizer, torch.optim.LBFGS)
        if at_once and not bool(flag):
            history.put_back()
        elif at_once:
            history.push_weights()
            history.push_residuals(after)
            forget_curvature(optimizer, pairs=False)
        else:
            history.take(flag, after)
        self._scale_momentum(optimizer, flag, bool(flag) if at_once else None)
        self._known = versions_of(self._tensors())
        self._verdict = attempt, Deferred(torch.cat([flag.double().view(1), numbers])), at_once
        if at_once:
            self._settle()

    def _scale_momentum(self, optimizer: Optimizer, flag: Tensor, accepted: bool | None) -> None:
        """Let go of momentum that was built for another point, where the candidate was taken."""
        if accepted is False or not lets_go_of_momentum(self.settings.momentum, self._pace, optimizer):
            return
        states = [state_of(optimizer, p) for p in all_parameters(optimizer)]
        found = [state.get(key) for state in states for key in MOMENTUM_KEYS if key in state]
        buffers = [local(buffer) for buffer in found if isinstance(buffer, Tensor)]
        if accepted and buffers:
            torch._foreach_zero_(buffers)
        else:
            for buffer in buffers:
                buffer.mul_((~flag).to(buffer.device))

    def _settle(self) -> None:
        """Take note of the last verdict."""
        verdict, self._verdict = self._verdict, None
        if verdict is None:
            return
        (solution, _, before), numbers, at_once = verdict
        flag, after = numbers.values()[:2]
        statistics = self._statistics
        ratio = gain_ratio(before, solution.predicted, after) if math.isfinite(after) else -math.inf
        self._damping = next_damping(self._damping, ratio, bool(flag), self.settings.regularization)
        statistics["trust_ratio"], statistics["damping"] = ratio, self._damping
        statistics["period"] = self._pace.period
        if flag:
            statistics["accepted"] += 1
            return
        count(statistics["rejected"], cause_of_residuals(before, after))
        if not at_once and self._history is not None:
            self._history.drop_newest_column()

    def _forget(self, cause: Cause) -> None:
        count(self._statistics["resets"], cause)
        self._known, self._pace.before = None, math.nan
        if self._history is not None and cause is Cause.USER:
            self._history.change_points()
        elif self._history is not None:
            self._history.void(wipe=cause is Cause.NON_FINITE)

    # ---- bookkeeping -----------------------------------------------------------------------------------------------

    @torch.inference_mode(False)
    @torch.no_grad()
    def _lay_out(self, optimizer: Optimizer) -> None:
        """Have rows for the trainable parameters of the optimizer as they are now."""
        history, parameters = self._history, [p for p in all_parameters(optimizer) if p.requires_grad]
        if history is not None:
            known = history.parameters
            same = len(known) == len(parameters) and all(map(operator.is_, known, parameters))
            if same and all(map(operator.eq, (p.shape for p in parameters), history.shapes)):
                return
            count(self._statistics["resets"], Cause.PARAMETERS_CHANGED)
        self._history, refusal = None, None
        ranks = ranks_of(self.process_group)
        try:
            self._history = ResidualHistory(trainable_parameters(optimizer), self.settings, ranks)
        except torch.OutOfMemoryError as error:
            refusal = error
        memory.agree(ranks, refusal)
        self._known = None

    def _tensors(self) -> list[Tensor]:
        """The parameters, or their shards here, whose version counters tell of changes."""
        if self._history is not None:
            return self._history.locals
        return [local(p) for p in trainable_parameters(self.optimizer)]

    def _start_over(self) -> None:
        self._statistics = residual_statistics()
        settings = self.settings
        first = (settings.wait_iterations // settings.frequency + 1) * settings.frequency
        self._pace = Pace(settings.frequency, settings.paced, first)
        floor = settings.regularization
        self._damping = max(FIRST_DAMPING, floor) if floor else 0.0
        self._history = None
        self._trusted = self._residuals is not None
        self._observes = self._warned = self._inside = self._has_begun = self._is_repeated = False
        self._parts = []
        self._trial_parts = None
        self._versions = []
        self._known = None
        self._verdict = None


def _square(residuals: Tensor) -> Tensor:
    """||r||^2 in float64."""
    wide = residuals.double()
    return torch.dot(wide, wide)
