"""The mixing problem of nonlinear GMRES: small matrices of inner products in, coefficients out.

Everything here is float64 on the host. Symbols, with the loss ||r(x)||^2 and pairs (x_j, r_j = r(x_j)), oldest first:

    DX, DR        differences of neighbors, columns x_{j+1} - x_j and r_{j+1} - r_j
    E = DR T      columns E_j = r_k - r_j, the way of the residual from pair j to the newest pair k, T lower triangular
    gamma         coefficients of a candidate, x+ = x_k + sum_j gamma_j (x_j - x_k) = x_k - DX T gamma

To first order r(x+) = r_k - E gamma, so that gamma solves a linear least-squares problem.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from aadl.mixing import Gram, Mixing, mixing_coefficients, predicted_square

LARGEST_DAMPING = 1e3
GOOD, BAD = 0.75, 0.25
"""Gain ratios above and below which the damping falls and rises."""
UNDONE, STEPS = 2, 5
"""Normalized steps of the optimizer that a candidate has to survive, and that it has to be worth."""
NOISE = 16
"""Length of a column, in units of rounding of r, below which the column is nothing but rounding."""


class Solution(NamedTuple):
    """Coefficients of a candidate."""

    coefficients: Tensor
    """T gamma, shape (columns,): x+ = x_k - DX coefficients."""
    predicted: float
    """||r_k - E gamma||^2."""
    mixing: Mixing
    """gamma, the numerical rank, the condition number and the length of the coefficients."""


def solve(gram: Gram, damping: float, rounding: float, cutoff: float) -> Solution:
    """Minimize ||r_k - E gamma||^2 + damping ||D gamma||^2 with D = diag(||E_j||).

    Args:
        gram: DR' DR, DR' r_k and ||r_k||^2 of the columns to use.
        damping: Levenberg-Marquardt factor relative to unit columns, >= 0.
        rounding: unit of rounding of the residuals; columns with ||E_j|| <= NOISE rounding ||r_k|| are left out.
        cutoff: smallest eigenvalue of the products of unit columns, relative to the largest, that is not rounding.

    Source: Washio and Oosterlee, ETNA 6 (1997), in normal equations of unit columns.
    """
    count = gram.projection.numel()
    ways = torch.ones(count, count, dtype=torch.float64, device="cpu").tril()
    turned = Gram(ways.T @ gram.matrix @ ways, ways.T @ gram.projection, gram.square)
    noise = torch.full_like(gram.projection, (NOISE * rounding) ** 2 * gram.square)
    mixing = mixing_coefficients(turned, damping, cutoff, noise)
    return Solution(ways @ mixing.gamma, predicted_square(turned, mixing.gamma), mixing)


def change_by_steps(gram: Gram) -> float:
    """How much the sum of squares must fall for a candidate to survive steps that are as long wherever they begin.

    The columns of DR are what the last steps changed the residuals by. In the mean, the next one adds their square to
    the sum of squares, wherever the candidate is; and the optimizer gains by itself what it has gained before.

    Args:
        gram: DR' DR, DR' r_k and ||r_k||^2, with at least one column.

    Returns:
        max(UNDONE mean ||r_{j+1} - r_j||^2, STEPS mean(||r_j||^2 - ||r_{j+1}||^2)).
    """
    gained = float(gram.matrix.sum() - 2 * gram.projection.sum())  # ||r_0||^2 - ||r_k||^2, as r_0 = r_k - DR 1
    return max(UNDONE * float(gram.matrix.trace()), STEPS * gained) / gram.projection.numel()


def gain_ratio(before: float, predicted: float, after: float) -> float:
    """(||r_k||^2 - ||r+||^2) / (||r_k||^2 - ||r_k - E gamma||^2): gained over predicted decrease."""
    decrease = before - predicted
    return (before - after) / decrease if decrease > 0 else 0.0


def next_damping(damping: float, ratio: float, accepted: bool, floor: float) -> float:
    """Levenberg-Marquardt's rule: a third after a good prediction, four times as much after a bad one."""
    if accepted and ratio > GOOD:
        damping /= 3
    elif not accepted or ratio < BAD:
        damping *= 4
    return within_bounds(damping, floor)


def within_bounds(damping: float, floor: float) -> float:
    """The damping, not below `floor` and not above LARGEST_DAMPING; 0 where the floor is 0, which switches it off."""
    return max(min(damping, LARGEST_DAMPING), floor) if floor else 0.0
