"""ResidualAccelerator: nonlinear GMRES on the residuals of a least-squares loss, with the optimizer as preconditioner.

The loss is ||r(x)||^2 with residuals r on points that stay. The history keeps pairs (x_j, r_j). Every `frequency`
optimizer steps a candidate x+ = x_k + sum_j gamma_j (x_j - x_k) minimizes ||r_k + sum_j gamma_j (r_j - r_k)||^2, damped
after Levenberg and Marquardt, and replaces x_k where ||r(x+)||^2 is smaller than ||r_k||^2; where the optimizer
normalizes its steps, smaller by more than these steps change it.

An acceleration evaluates the residuals twice: at x_k, where the step has led, and at x+. The host waits for a device
once per acceleration, for the products. The decision is carried out on the device; the host reads it before the next
step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from aadl import advice
from aadl.acceptance import Cause, cause_of_residuals, count
from aadl.attached import VERSION, check_format
from aadl.deferred import Deferred, on_host
from aadl.learning_rates import is_dry_step
from aadl.least_squares import Solution, change_by_steps, gain_ratio, next_damping, solve, within_bounds
from aadl.mixing import Gram, newest
from aadl.pace import Pace, clears_momentum, is_normalized
from aadl.parameters import all_parameters, closure_of, forget_curvature, trainable_parameters
from aadl.ranks import local, ranks_of
from aadl.residual_history import Products, ResidualHistory, planned_bytes
from aadl.residual_pairs import RESUMED, ResidualPairs
from aadl.statistics import Statistics, residual_statistics
from aadl.trial import without_trace
from aadl.trial_values import draw
from aadl.watch import momentum_buffers, versions_of

FIRST_DAMPING = 1e-2
"""Damping of the first attempt, unless the smallest damping is larger."""
ROWS_PER_COLUMN = 8
"""Least number of residuals for a coefficient, so that few points are not learned by heart."""
SAME = 1e-3
"""Relative difference of residuals at the same weights up to which they belong to the same points."""

PROGRESS = ("trusted", "observes", "warned")
"""Flags of an accelerator that its state carries."""


class _Candidate(NamedTuple):
    """A candidate, before it is decided."""

    solution: Solution
    slots: list[int]
    """Slots of the columns that it is made of."""
    before: float
    """||r_k||^2."""
    least: float
    """By how much ||r(x+)||^2 has to be smaller, >= 0."""


class ResidualAccelerator(ResidualPairs):
    """Nonlinear GMRES for one optimizer; made by `aadl.accelerate(optimizer, "nonlinear_gmres", ...)`."""

    _damping: float
    _pace: Pace
    _trusted: bool
    """Whether residuals at the same weights were seen to be the same, so that they belong to the same points."""
    _warned: bool
    """Whether the first advice.EVENTS periods are over, and a warning was given if nothing was accepted in them."""
    _open_attempt: tuple[_Candidate, Deferred, bool] | None
    """The last attempt while it is not counted, the numbers that decide it, and whether the host knew them at once."""

    # ---- public ----------------------------------------------------------------------------------------------------

    @property
    def statistics(self) -> Statistics:
        """Counters and last values. Reading them waits for the device."""
        self._settle()
        return self._statistics

    @property
    def history(self) -> ResidualHistory | None:
        """The stored pairs; None before the first residuals. For inspection: nothing may write to it."""
        return self._history

    @property
    def pace(self) -> Pace:
        """The period of the accelerations, and what it adapts to. For inspection."""
        return self._pace

    @property
    def history_bytes(self) -> int:
        """Bytes of the history on this rank; before the first residuals the bytes of the rows for weights."""
        if self._history is not None:
            return self._history.nbytes
        if self._is_off():
            return 0
        return planned_bytes(trainable_parameters(self.optimizer), self.settings)

    @torch.no_grad()
    def reset(self) -> None:
        """Forget the pairs, because the points have changed. Counters stay."""
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
        plain = {
            "map": self._map(),
            "statistics": self._statistics,
            "damping": self._damping,
            "pace": vars(self._pace),
            "progress": {name: getattr(self, f"_{name}") for name in PROGRESS},
            "is_known": self._known is not None,
            "is_written": self._known is not None and not self._is_at(self._known),
            "history": None if history is None else history.plain_state(),
        }
        rows = {} if history is None else history.rows()
        return {"version": VERSION, "values": json.dumps(plain), "rows": rows}

    def _map(self) -> dict[str, Any]:
        """Settings that two accelerators must have in common to exchange their states."""
        return {"acceleration_type": "nonlinear_gmres", "history_dtype": str(self.settings.history_dtype)}

    @torch.no_grad()
    def _checked(self, state: Any) -> dict[str, Any]:
        check_format(state)
        try:
            saved: dict[str, Any] = json.loads(state["values"])
            found = {"acceleration_type": "anderson"} | saved["map"]
            for name, value in self._map().items():
                if found.get(name) != value:
                    raise ValueError(f"the saved accelerator has {name}={found.get(name)!r}, this one {name}={value!r}")
            float(saved["damping"]), bool(saved["is_known"]), saved["statistics"]["steps"]
            all(saved["progress"][name] in (True, False) for name in PROGRESS)
            Pace(**saved["pace"])
            saved["restored"] = self._restored(saved["history"], state["rows"])
        except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"the saved state of the accelerator is damaged: {error!r}") from None
        return saved

    def _restored(self, saved: dict[str, Any] | None, rows: dict[str, Tensor]) -> ResidualHistory | None:
        """A history with the saved rows; without pairs if they are of another rank or depth, or missing."""
        if saved is None:
            return None
        history = ResidualHistory(trainable_parameters(self.optimizer), self.settings, ranks_of(self.process_group))
        # in older states the rows of every rank have the names that those of rank 0 have
        rows = {name if name[0].isdigit() else f"{history.begin}{name}": row for name, row in rows.items()}
        if history.fits(saved, rows):
            history.load(saved, rows)
        else:
            history.pushed = int(saved["pushed"])
        return history

    def _take_over(self, state: dict[str, Any], saved: dict[str, Any]) -> None:
        del state
        self._start_over()
        self._history, self._statistics = saved["restored"], self._statistics | saved["statistics"]
        self._damping = within_bounds(saved["damping"], self.settings.regularization)
        pace = Pace(**saved["pace"])
        if pace.usual == self.settings.frequency and pace.adapts == self.settings.paced:
            self._pace = pace
        else:
            self._pace.due = self._statistics["steps"] + 1
        for name in PROGRESS:
            setattr(self, f"_{name}", bool(saved["progress"][name]))
        has_pair = self._history is not None and self._history.has_pair
        known: list[int] | str = [] if saved.get("is_written") else RESUMED  # older states have none
        self._known = known if saved["is_known"] and has_pair else None
        self._lacks_history = False
        if saved["history"] is not None and saved["history"]["has_pair"] and not has_pair:
            count(self._statistics["resets"], Cause.RESUMED)

    # ---- hooks -----------------------------------------------------------------------------------------------------

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._settle()
        if self._is_off() or is_dry_step(optimizer):
            return
        closure = closure_of(args, kwargs)
        if self._residuals is None:
            self._check_closure(closure)
        if self._lacks_history:
            self._say_that_history_is_missing()
        self._lay_out(optimizer)
        self._inside = self._history is not None
        watches = self._residuals is None or self._observes or not self._statistics["steps"]  # or in the first one
        if self._inside and watches:
            self._watch(closure is not None)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        history = self._history
        if not self._inside or history is None:
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
            self._accelerate(optimizer, closure_of(args, kwargs))
        elif self._residuals is not None and not self._observes and steps % settings.store_each_nth == 0:
            with without_trace(all_parameters(optimizer), is_closure=False):
                self._store(self._evaluated_with_others(history, self._residuals))
        if not self._statistics["accepted"] and steps >= advice.EVENTS * settings.frequency and not self._warned:
            self._warned = True
            advice.warn_of_idleness(self._statistics)

    # ---- acceleration ----------------------------------------------------------------------------------------------

    def _accelerate(self, optimizer: Optimizer, closure: Callable[[], Any] | None) -> None:
        """Evaluate the residuals where the step has led, and at a candidate if there is one."""
        history = self._history
        assert history is not None
        source = self._source(closure)
        with without_trace(all_parameters(optimizer), is_closure=self._residuals is None) as rewind:

            def evaluated(function: Callable[[], Any], draws: int = 1) -> Tensor:
                rewind()
                draw(all_parameters(optimizer), draws)
                return self._evaluated_with_others(history, function)

            self._store(evaluated(source))
            if self._residuals is not None and not self._trusted:
                history.compare(evaluated(source, draws=2))  # which differs where it is random
            attempt = self._attempt(history)
            self._pace.go_on(self._statistics["steps"])
            if attempt is None:
                return
            check = self._check
            before = None if check is None else evaluated(check)
            try:
                history.place(attempt.slots, attempt.solution.coefficients)
                after = evaluated(source)
                checked = None if check is None else evaluated(check)
            except BaseException:
                history.put_back()
                count(self._statistics["rejected"], Cause.CLOSURE)
                raise
        numbers = [_square(after)] + [_square(r) for r in (before, checked) if r is not None]
        self._decide(optimizer, attempt, after, history.ranks.total(torch.stack(numbers)))

    def _attempt(self, history: ResidualHistory) -> _Candidate | None:
        """Solve the mixing problem; return None, with the cause counted, if there is no candidate."""
        products, pace = history.products(), self._pace
        is_doubtful = not products.doubt <= SAME**2 * history.ranks.size
        if is_doubtful:
            pace.before = math.nan
        pace.note_jump(products.jump)
        pace.note_square(products.gram.square, is_normalized(self.optimizer))
        if not _is_finite(products):
            self._forget(Cause.NON_FINITE)
            return None
        if not products.aligned:
            history.align()
            self._known = None
            count(self._statistics["resets"], Cause.RESUMED)
            return None
        if is_doubtful:
            self._trusted = False
            history.forget_columns()
            count(self._statistics["resets"], Cause.POINTS)
            return None
        self._trusted = self._trusted or products.compared
        if not self._trusted or not products.slots:
            return None
        self._statistics["attempts"] += 1
        slots = products.slots[-max(1, products.num_residuals // ROWS_PER_COLUMN) :]
        gram = newest(products.gram, len(slots))
        assert history.residuals is not None
        cutoff = self.settings.eigenvalue_cutoff(self.settings.history_dtype or torch.float32)
        solution = solve(gram, self._damping, torch.finfo(history.residuals.row.dtype).eps, cutoff)
        self._statistics["numerical_rank"] = solution.mixing.numerical_rank
        self._statistics["condition_number"] = solution.mixing.condition_number
        self._statistics["coefficient_norm"] = solution.mixing.coefficient_norm
        if not solution.mixing.numerical_rank or not solution.predicted < gram.square:
            count(self._statistics["rejected"], Cause.RANK)
            return None
        self._statistics["gain"] = math.sqrt(solution.predicted / gram.square)
        return _Candidate(solution, slots, gram.square, self._least_gain(products.gram))

    def _least_gain(self, gram: Gram) -> float:
        """By how much the sum of squares has to fall; inf where the linear model of late did not hold."""
        if not is_normalized(self.optimizer):
            return 0.0
        return change_by_steps(gram) if self._damping <= self._first_damping() else math.inf

    def _first_damping(self) -> float:
        return within_bounds(FIRST_DAMPING, self.settings.regularization)

    def _decide(self, optimizer: Optimizer, attempt: _Candidate, after: Tensor, numbers: Tensor) -> None:
        """Accept the candidate if the sum of squares falls far enough, and that of `check` falls; else put x_k back."""
        history = self._history
        assert history is not None
        flag = numbers[0] < attempt.before - attempt.least
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
        self._open_attempt = attempt, Deferred(torch.cat([flag.double().view(1), numbers])), at_once
        if at_once:
            self._settle()

    def _scale_momentum(self, optimizer: Optimizer, flag: Tensor, accepted: bool | None) -> None:
        """Clear the momentum where the candidate was accepted: it was built up at another point."""
        if accepted is False or not clears_momentum(self.settings.momentum, self._pace, optimizer):
            return
        buffers = list(map(local, momentum_buffers(optimizer, all_parameters(optimizer))))
        if accepted and buffers:
            torch._foreach_zero_(buffers)
        else:
            for buffer in buffers:
                buffer.mul_((~flag).to(buffer.device))

    def _settle(self) -> None:
        """Count the last attempt and adapt the damping."""
        attempt, self._open_attempt = self._open_attempt, None
        if attempt is None:
            return
        (solution, _, before, least), numbers, at_once = attempt
        flag, after = numbers.values()[:2]
        statistics = self._statistics
        ratio = gain_ratio(before, solution.predicted, after) if math.isfinite(after) else -math.inf
        is_small = before - least <= after < before  # the model holds, and the damping stays adapted to it
        self._damping = next_damping(self._damping, ratio, bool(flag) or is_small, self.settings.regularization)
        statistics["trust_ratio"], statistics["damping"] = ratio, self._damping
        statistics["period"] = self._pace.period
        if flag:
            statistics["accepted"] += 1
            return
        count(statistics["rejected"], Cause.STEPS if is_small else cause_of_residuals(before, after))
        if not at_once and self._history is not None:
            self._history.drop_newest_column()

    def _forget(self, cause: Cause) -> None:
        count(self._statistics["resets"], cause)
        self._known, self._pace.before = None, math.nan
        if self._history is not None and cause is Cause.USER:
            self._history.change_points()
        elif self._history is not None:
            self._history.void(wipe=cause is Cause.NON_FINITE)

    def _start_over(self) -> None:
        """Be as an accelerator that has seen no step."""
        super()._start_over()
        self._statistics, settings = residual_statistics(), self.settings
        first = (settings.wait_iterations // settings.frequency + 1) * settings.frequency
        self._pace = Pace(settings.frequency, settings.paced, first)
        self._damping = self._first_damping()
        self._trusted = self._warned = False
        self._open_attempt = None


def _is_finite(products: Products) -> bool:
    """Whether all products are finite."""
    gram = products.gram
    return math.isfinite(gram.square + float(gram.matrix.sum() + gram.projection.sum()))


def _square(residuals: Tensor) -> Tensor:
    """||r||^2 in float64."""
    wide = residuals.double()
    return torch.dot(wide, wide)
