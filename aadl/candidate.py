"""From inner products to the coefficients of a candidate: which columns, whether averaged, and how long a step."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from aadl import mixing, smoothing
from aadl.acceptance import MAXIMAL_COEFFICIENT_NORM, Cause
from aadl.mixing import Gram, Mixing, host_tensor
from aadl.problem import MacroStep, Problem
from aadl.settings import Settings

LEARNING_RATE_BAND = 4.0
"""Factor within which a column may be brought to the present learning rate."""
MAXIMAL_AGE = 3
"""Age of the oldest usable column, in units of history_depth macro-steps."""
MAXIMAL_GROWTH = 1e4
"""Largest quotient of an older residual over the newest one."""


class Coefficients(NamedTuple):
    """Solution of the mixing problem."""

    mixing: Mixing
    residual: Tensor
    """Coefficients of the residual differences as they are stored, see `History.combine`."""
    residual_factor: float
    """Of the newest residual, see `History.combine`."""
    predicted: float
    """||f_k - DF gamma||^2."""
    rejected: Cause | None
    """Why the coefficients make no candidate; None where they do."""


def coefficients_of(
    step: MacroStep,
    problem: Problem,
    *,
    macro_step: int,
    averaging: bool,
    reach: float,
    last_jump: dict[str, float],
    settings: Settings,
) -> Coefficients:
    """Coefficients for all columns, oldest first, zero for those that are left out.

    Args:
        step: the macro-step that has ended.
        problem: its mixing problem, at the present learning rate.
        macro_step: its number.
        averaging: whether the moving average is on.
        reach: longest step, in units of the way that the pairs behind it have made.
        last_jump: by kind of vector, the squared step of the last candidate, if its prediction held.
        settings: acceleration_type, average_window, regularization, history_dtype; without safeguard all columns are
            used, and the step has any length.
    """
    gram, columns = problem.gram, step.history.columns
    factors = [step.rate / column.learning_rate for column in columns]
    changes = [column.earlier_rate / step.rate - 1 for column in columns]
    ages = [macro_step - column.macro_step for column in columns]
    used, jumps = len(ages), [_length(column.jump, problem.weights) for column in columns]
    if settings.safeguard:
        oldest = MAXIMAL_AGE * settings.history_depth
        near = [1 / LEARNING_RATE_BAND <= factor <= LEARNING_RATE_BAND for factor in factors]
        ages = [age if flag else oldest + 1 for age, flag in zip(ages, near, strict=True)]
        used = min(problem.here, mixing.usable_suffix(gram, ages, oldest, MAXIMAL_GROWTH))
    part = mixing.newest(gram, used)
    cutoff = settings.eigenvalue_cutoff(settings.history_dtype or torch.float32)
    window = settings.average_window or smoothing.DEFAULT_WINDOW
    start = len(ages) - used
    noise = rounding_bounds(gram, factors, settings.store_each_nth)[start:]
    if settings.acceleration_type == "identity":
        mean = smoothing.window_mean(used, window)
        solution = Mixing(mean, mean, used, math.nan, 0.0)
    elif averaging:
        solution = smoothing.smoothed_coefficients(part, window, settings.regularization, cutoff, noise)
    else:
        solution = mixing.mixing_coefficients(part, settings.regularization, cutoff, noise)
    left_out = host_tensor([0.0] * start)
    gamma, mean, fraction = torch.cat([left_out, solution.gamma]), torch.cat([left_out, solution.mean]), 1.0
    if settings.safeguard and settings.acceleration_type != "identity":
        last_length = _length(last_jump, problem.weights)
        fraction = step_fraction(gram, gamma, changes, jumps, last_length, start, reach)
        gamma = gamma * fraction
    rejected = _cause_of(solution, gram, settings)
    solution = solution._replace(gamma=gamma, mean=mean)
    scaled, beta = host_tensor(factors) * gamma, settings.relaxation
    residual, residual_factor = (scaled - gamma) - (1 - beta) * scaled, 1 - beta
    if averaging and min(changes) < 0:
        shortened = fraction * _as_made(mean, changes)
        residual = residual + host_tensor(factors) * (mixing.tail_sums(len(columns))[:-1].T @ shortened)
        residual_factor -= float(shortened.sum())
    return Coefficients(solution, residual, residual_factor, mixing.predicted_square(gram, gamma), rejected)


def _as_made(mean: Tensor, changes: list[float]) -> Tensor:
    """What the mean of the mapped iterates lacks in each earlier update, in units of that at the present rate; <= 0.

    At the present learning rate a mapped iterate is x_i + f_i. Where the rate has risen since, the optimizer has never
    been there, and the mean takes the mapped iterate as it was made, x_i + (1 + c_i) f_i.
    """
    weights = mean.diff(prepend=mean.new_zeros(1))
    return weights * host_tensor(changes).clamp(max=0.0)


def _length(squares: dict[str, float], weights: dict[str, float]) -> float:
    """Length of a vector in the norm of the mixing problem, from the squares of its parts."""
    return math.sqrt(sum(weights.get(kind, 0.0) * square for kind, square in squares.items()))


def _cause_of(solution: Mixing, gram: Gram, settings: Settings) -> Cause | None:
    """Why a solution makes no candidate; None where it does."""
    if solution.numerical_rank == 0 or not gram.square > settings.store_each_nth**2 * gram.rounding:
        return Cause.RANK  # nothing is left to extrapolate, or the update itself is rounding
    if settings.safeguard and not solution.coefficient_norm <= MAXIMAL_COEFFICIENT_NORM:
        return Cause.COEFFICIENTS
    return None


def rounding_bounds(gram: Gram, factors: list[float], steps: int) -> Tensor:
    """(n eps ||g||)^2 for every column at the present learning rate, with n = `steps` of a macro-step."""
    return host_tensor([steps**2 * gram.rounding * factor**2 for factor in factors])


def step_fraction(
    gram: Gram,
    gamma: Tensor,
    changes: list[float],
    jumps: list[float],
    last_jump: float,
    start: int,
    reach: float,
) -> float:
    """Factor in (0, 1] that shortens a candidate: its step is at most `reach` times the way of the used pairs.

    The last candidate's step counts as a part of that way even if all used pairs are younger.

    The step is sum_j gamma_j Dg_j with Dg_j = f_{j+1} + c_j f_j + s_j at the present learning rate, where s_j is the
    jump inside column j and c_j its entry of `changes`, so that its length is at most
    ||sum_j gamma_j f_{j+1}|| + ||sum_j gamma_j c_j f_j|| + sum_j |gamma_j| ||s_j||.

    Args:
        gram: inner products at the present learning rate, columns oldest first.
        gamma: coefficients of all columns.
        changes: c_j = l_j / l' - 1, from the learning rate l_j of the column's first update and the present one l'.
        jumps: ||s_j||.
        last_jump: length of the last candidate's step, if its prediction held; else 0.
        start: first column that is used.
        reach: see `coefficients_of`.
    """
    squares = mixing.residual_squares(gram)
    nothing = gamma.new_zeros(1)
    length = _length_of_sum(gram, torch.cat([nothing, gamma])) + float(gamma.abs() @ host_tensor(jumps))
    if any(changes):
        length += _length_of_sum(gram, torch.cat([gamma * host_tensor(changes), nothing]))
    way = sum(map(math.sqrt, squares[start:])) + (sum(jumps[start:]) or last_jump)
    return min(1.0, reach * way / length) if length > 0 else 1.0


def _length_of_sum(gram: Gram, coefficients: Tensor) -> float:
    """||sum_i coefficients_i f_i|| over all columns + 1 pairs, oldest first."""
    total = float(coefficients.sum())
    combined = mixing.tail_sums(coefficients.numel() - 1).T @ coefficients  # the sum is total f_k - DF combined
    square = total**2 * gram.square - 2 * total * float(gram.projection @ combined)
    return math.sqrt(max(square + float(combined @ gram.matrix @ combined), 0.0))
