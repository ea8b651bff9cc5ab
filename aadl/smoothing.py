"""Moving average of the history, and the criterion that switches it on, both in coefficient space.

The average of p consecutive pairs of an affine map is again a pair of that map, so a window mean never has to be
written over the parameters: it is a linear change of the mixing problem. With f_i = f_k - DF T_i (mixing.tail_sums)
and T the running means of p rows of that matrix,

    mean residual            fbar_i = f_k - DF T_i
    smoothed differences     Dfbar_i = DF (T_i - T_{i+1})
    mean mapped iterate      gbar_k = g_k - DG T_last.

Mixing of the smoothed pairs, x+ = gbar_k - DGbar c, is mixing of the stored ones with gamma = T_last + S c, where
S holds T_i - T_{i+1} as columns. The stored pairs stay true pairs, and switching costs no pass over memory.
"""

from __future__ import annotations

import math
from itertools import pairwise

from torch import Tensor

from aadl.mixing import Gram, Mixing, mixing_coefficients, predicted_square, residual_squares, tail_sums

DEFAULT_WINDOW = 3
"""Pairs averaged: enough to damp an oscillation, too few to lag behind (docs/method.md)."""


def relative_standard_deviation(gram: Gram, consecutive: list[bool]) -> float:
    """Relative standard deviation between consecutive updates.

    Two updates have mean (f_{j+1} + f_j) / 2 and standard deviation ||f_{j+1} - f_j|| / 2. With the updates scaled to
    unit length, u = f / ||f||, so that fast convergence is not taken for noise, and pooled over the stored columns j
    whose second update starts where the first ended,

        s^2 = sum_j ||u_{j+1} - u_j||^2 / sum_j ||u_{j+1} + u_j||^2.

    Parallel updates give 0, independent zero-mean updates give 1, updates that alternate in sign give infinity.

    Args:
        gram: inner products of the columns, oldest first.
        consecutive: per column, whether no acceleration or revert lies between its two updates.

    Returns:
        s, or nan when no column qualifies (none is consecutive, or an update is zero).
    """
    squares, differences = residual_squares(gram), gram.matrix.diagonal().tolist()
    cosines = []
    for j, (square, following) in enumerate(pairwise(squares)):
        lengths = 2 * math.sqrt(square * following)
        if consecutive[j] and lengths > 0:
            cosines.append(min(1.0, max(-1.0, (square + following - differences[j]) / lengths)))
    if not cosines:
        return math.nan
    mean = sum(cosines) / len(cosines)
    return math.sqrt((1 - mean) / (1 + mean)) if mean > -1 else math.inf


def noise_square(gram: Gram, consecutive: list[bool]) -> float:
    """Variance of one update, estimated as half the mean of ||f_{j+1} - f_j||^2 over consecutive updates (or 0)."""
    squares = [square for square, flag in zip(gram.matrix.diagonal().tolist(), consecutive, strict=True) if flag]
    return sum(squares) / (2 * len(squares)) if squares else 0.0


def switch(active: bool, deviation: float, tolerance: float) -> bool:
    """Hysteresis: on above the tolerance, off below half of it, unchanged between (and when nothing is known)."""
    if active:
        return not deviation < tolerance / 2
    return deviation > tolerance


def smoothed_coefficients(
    gram: Gram, window: int, regularization: float, eigenvalue_cutoff: float, noise: Tensor | None = None
) -> Mixing:
    """Mixing coefficients gamma = T_last + S c of the pairs smoothed by a mean over `window` pairs (see above).

    With as many pairs as the window, or fewer, the result is the plain mean of the mapped iterates.
    """
    columns = gram.projection.numel()
    window = min(window, columns + 1)
    means = tail_sums(columns).unfold(0, window, 1).mean(-1)
    last = means[-1]
    change = (means[:-1] - means[1:]).T
    smooth = Gram(
        change.T @ gram.matrix @ change,
        change.T @ (gram.projection - gram.matrix @ last),
        predicted_square(gram, last),
    )
    if smooth.projection.numel() == 0:
        return Mixing(last, last, columns, math.nan, 0.0)
    # a smoothed difference is that of two updates, divided by the window
    noise = None if noise is None else noise.unfold(0, window, 1).amax(-1) / window**2
    mixing = mixing_coefficients(smooth, regularization, eigenvalue_cutoff, noise)
    gamma = last + change @ mixing.gamma
    return mixing._replace(gamma=gamma, mean=last, numerical_rank=max(mixing.numerical_rank, 1))


def window_mean(columns: int, window: int) -> Tensor:
    """Coefficients gamma of the plain mean of the newest `window` mapped iterates."""
    window = min(window, columns + 1)
    return tail_sums(columns)[-window:].mean(0)
