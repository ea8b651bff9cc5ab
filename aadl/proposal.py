"""From inner products to the coefficients of a candidate: which columns, averaged or not, and whether they will do."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from aadl import mixing, smoothing
from aadl.mixing import Gram, Mixing, host_tensor
from aadl.settings import Settings

MAXIMAL_COEFFICIENT_NORM = 1e8
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


def propose(gram: Gram, ages: list[int], averaging: bool, settings: Settings, stored: torch.dtype) -> Proposal:
    """Coefficients for all columns, zero for those left out.

    Args:
        gram: inner products at the present learning rate, columns oldest first.
        ages: macro-steps since each column was stored.
        averaging: whether the moving average is on.
        settings: acceleration_type, average_window, regularization; without safeguard all columns are used.
        stored: dtype of the history, which bounds the eigenvalues that mean anything.
    """
    used = len(ages)
    if settings.safeguard:
        used = mixing.usable_suffix(gram, ages, MAXIMAL_AGE * settings.history_depth, MAXIMAL_GROWTH)
    part = mixing.newest(gram, used)
    cutoff = settings.eigenvalue_cutoff(stored)
    window = settings.average_window or smoothing.DEFAULT_WINDOW
    if settings.acceleration_type == "identity":
        mean = smoothing.window_mean(used, window)
        solution = Mixing(mean, mean, used, math.nan, 0.0)
    elif averaging:
        solution = smoothing.smoothed_coefficients(part, window, settings.regularization, cutoff)
    else:
        solution = mixing.mixing_coefficients(part, settings.regularization, cutoff)
    refused = ""
    if solution.numerical_rank == 0:
        refused = "rank"
    elif settings.safeguard and not solution.coefficient_norm <= MAXIMAL_COEFFICIENT_NORM:
        refused = "coefficients"
    left_out = host_tensor([0.0] * (len(ages) - used))
    gamma = torch.cat([left_out, solution.gamma])
    solution = solution._replace(gamma=gamma, mean=torch.cat([left_out, solution.mean]))
    return Proposal(solution, mixing.predicted_square(gram, gamma), refused)
