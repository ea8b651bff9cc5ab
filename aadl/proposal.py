"""From inner products to the coefficients of a candidate: which columns, averaged or not, and whether they will do."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from aadl import mixing, smoothing
from aadl.mixing import Gram, Mixing, host_tensor
from aadl.settings import Settings

MAXIMAL_COEFFICIENT_NORM = 1e8
LEARNING_RATE_BAND = 4.0
"""Factor within which a column may be brought to the present learning rate."""
MAXIMAL_AGE = 3
"""In units of history_depth macro-steps."""
MAXIMAL_GROWTH = 1e4
"""Of an older residual over the newest one."""


class Proposal(NamedTuple):
    """What the mixing problem gave; `refused` names the cause why it is not to be used, "" if it is."""

    mixing: Mixing
    predicted: float
    """||f_k - DF gamma||^2."""
    refused: str


def propose(
    gram: Gram,
    factors: list[float],
    changes: list[float],
    jumps: list[float],
    last_jump: float,
    reach: float,
    ages: list[int],
    averaging: bool,
    settings: Settings,
    stored: torch.dtype,
) -> Proposal:
    """Coefficients for all columns, zero for those left out.

    Args:
        gram: inner products at the present learning rate, columns oldest first.
        factors: of the learning rate now over that of each column.
        changes: l_j / l' - 1 for every column, with the learning rate l_j of its first update and the present one l'.
        jumps: length of the way from the end of the first update of each column to the start of the second one.
        last_jump: length of the last candidate's step, where it kept its promise; else 0.
        reach: longest step, in units of the way that the pairs behind it have made.
        ages: macro-steps since each column was stored.
        averaging: whether the moving average is on.
        settings: acceleration_type, average_window, regularization; without safeguard all columns are used.
        stored: dtype of the history, which bounds the eigenvalues that mean anything.
    """
    used = len(ages)
    if settings.safeguard:
        oldest = MAXIMAL_AGE * settings.history_depth
        near = [1 / LEARNING_RATE_BAND <= factor <= LEARNING_RATE_BAND for factor in factors]
        ages = [age if flag else oldest + 1 for age, flag in zip(ages, near, strict=True)]
        used = mixing.usable_suffix(gram, ages, oldest, MAXIMAL_GROWTH)
    part = mixing.newest(gram, used)
    cutoff = settings.eigenvalue_cutoff(stored)
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
    refused = ""
    if solution.numerical_rank == 0 or not gram.square > settings.store_each_nth**2 * gram.rounding:
        refused = "rank"  # nothing is left to extrapolate, or the update itself is rounding
    elif settings.safeguard and not solution.coefficient_norm <= MAXIMAL_COEFFICIENT_NORM:
        refused = "coefficients"
    left_out = host_tensor([0.0] * start)
    gamma = torch.cat([left_out, solution.gamma])
    if settings.safeguard and settings.acceleration_type != "identity":
        gamma = gamma * step_fraction(gram, gamma, changes, jumps, last_jump, start, reach)
    solution = solution._replace(gamma=gamma, mean=torch.cat([left_out, solution.mean]))
    return Proposal(solution, mixing.predicted_square(gram, gamma), refused)


def rounding_bounds(gram: Gram, factors: list[float], steps: int) -> Tensor:
    """(n eps ||g||)^2 for every column, at the present learning rate, with n = `steps` of a macro-step."""
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
    """How much of a candidate is taken: its step is at most `reach` times the way that the used pairs have made.

    The last candidate's step is a part of that way also where the used pairs are all younger.

    The step is sum_j gamma_j Dg_j with Dg_j = f_{j+1} + c_j f_j + s_j at the present learning rate, where s_j is the
    jump inside column j and c_j its entry of `changes`, so that its length is at most
    ||sum_j gamma_j f_{j+1}|| + ||sum_j gamma_j c_j f_j|| + sum_j |gamma_j| ||s_j||.
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
