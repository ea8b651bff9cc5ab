"""Coefficient space: small Gram matrices in, mixing coefficients out.

Everything here is float64 on the host and of size m x m, m = history_depth. Symbols:

    f_k = g_k - x_k                 residual of the newest pair
    DF, DG                          differences of residuals and of mapped iterates, columns oldest first
    G = DF' DF,  h = DF' f_k        Gram matrix and projection
    gamma                           unconstrained mixing coefficients, x+ = g_k - DG gamma  (relaxation 1)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

DAMPING = 1.0


class Gram(NamedTuple):
    """Inner products of the stored residual differences and the newest residual."""

    matrix: Tensor
    """DF' DF, shape (columns, columns)."""
    projection: Tensor
    """DF' f_k, shape (columns,)."""
    square: float
    """||f_k||^2."""
    rounding: float = 0.0
    """(eps ||g_k||)^2: what one rounding of the parameters can add to a residual."""
    jump: float = 0.0
    """||s||^2, with s = x_k - g_{k-1} the way from the last mapped iterate to the start of the newest pair."""
    along: float = 0.0
    """<f_k, s>."""


class Mixing(NamedTuple):
    """Solution of one mixing problem."""

    gamma: Tensor
    """Coefficients, shape (columns,); zero for columns that were not used."""
    mean: Tensor
    """Coefficients of the mean residual the columns were fitted to, f_k - DF mean; zeros without averaging."""
    numerical_rank: int
    """Eigenvalues kept; 0 when nothing can be extrapolated."""
    condition_number: float
    """Condition number of the column-equilibrated DF, restricted to the kept eigenvalues (nan at rank 0)."""
    coefficient_norm: float
    """||D gamma|| / ||f_k|| with D = diag(||Df_j||): the coefficients in units of unit columns."""


def balancing_weights(parts: dict[str, Gram]) -> dict[str, float]:
    """Weights that bring parameters and momentum to equal size: the ratio of the traces of their Gram matrices."""
    traces = {kind: float(part.matrix.trace()) for kind, part in parts.items()}
    own = traces["parameters"]
    return {kind: own / trace if trace > 0 and own > 0 else 1.0 for kind, trace in traces.items()}


def joined(parts: dict[str, Gram], weights: dict[str, float], scales: list[float]) -> Gram:
    """One Gram record of all parts, weighted; `scales` multiply the residual columns of the parameters."""
    total = Gram(host_tensor(0.0), host_tensor(0.0), 0.0)
    scaled = any(scale != 1 for scale in scales)
    for kind, part in parts.items():
        if scaled and kind == "parameters":
            factor = host_tensor(scales)
            part = part._replace(matrix=factor.outer(factor) * part.matrix, projection=factor * part.projection)
        weight = weights[kind]
        total = Gram(
            total.matrix + weight * part.matrix,
            total.projection + weight * part.projection,
            total.square + weight * part.square,
            total.rounding + weight * part.rounding,
            total.jump + weight * part.jump,
            total.along + weight * part.along,
        )
    return total


def packed(gram: Gram, others: list[float]) -> Tensor:
    """A Gram record and other numbers as one vector of columns (columns + 3) / 2 + 4 + len(others) elements."""
    columns = gram.projection.numel()
    upper = torch.ones(columns, columns, dtype=torch.bool, device="cpu").triu()
    return torch.cat([gram.matrix[upper], gram.projection, host_tensor([*gram[2:], *others])])


def unpacked(message: Tensor, columns: int) -> tuple[Gram, list[float]]:
    """The Gram record and the other numbers that `packed` joined."""
    matrix = torch.zeros(columns, columns, dtype=torch.float64, device="cpu")
    upper = torch.ones(columns, columns, dtype=torch.bool, device="cpu").triu()
    lengths = [columns * (columns + 1) // 2, columns, message.numel() - columns * (columns + 3) // 2]
    products, projection, numbers = torch.split(message, lengths)
    matrix[upper] = products
    values = numbers.tolist()
    return Gram(matrix + matrix.triu(1).T, projection, *values[:4]), values[4:]


@cache
def needed_products(stale: tuple[int, ...], count: int) -> Tensor:
    """Which of the products, shape (len(stale) + 1, count + 1), are not known by symmetry from another one."""
    last = len(stale)
    known = {(i, stale[j]) for i in range(last) for j in range(i)} | {(i, count) for i in range(last)}
    indices = [i * (count + 1) + j for i in range(last + 1) for j in range(count + 1) if (i, j) not in known]
    return torch.tensor(indices, dtype=torch.int64, device="cpu")


def filled_products(part: Tensor, needed: Tensor, shape: tuple[int, int], stale: Sequence[int]) -> Tensor:
    """All products, those known by symmetry filled in."""
    products = torch.zeros(shape, dtype=torch.float64, device="cpu")
    products.view(-1)[needed] = part
    for i, slot in enumerate(stale):
        for j in range(i):
            products[i, stale[j]] = products[j, slot]
        products[i, -1] = products[-1, slot]
    return products


def mixing_coefficients(
    gram: Gram, regularization: float, eigenvalue_cutoff: float, noise: Tensor | None = None
) -> Mixing:
    """Minimize ||f_k - DF gamma||^2 + regularization * ||D gamma||^2 from inner products alone.

    With D = diag(||Df_j||), the equilibrated Gram matrix D^-1 G D^-1 = V diag(w) V' is truncated at
    w_i > eigenvalue_cutoff * max(w) and

        gamma = D^-1 V diag(1 / (w + regularization)) V' D^-1 h.

    Equilibration makes `regularization` dimensionless and rescaling of a column harmless. A Gram matrix accumulated
    in float64 from float32 columns loses nothing against an orthogonal factorization before condition numbers of
    about 5e8, which float32 columns cannot resolve.

    Args:
        gram: inner products of the columns.
        regularization: Tikhonov factor relative to unit columns, >= 0.
        eigenvalue_cutoff: eigenvalues below this fraction of the largest are dropped, >= 0.
        noise: square of the length that rounding can give each column, shape (columns,); None for zeros. Shorter
            columns are left out, and the others are damped by noise_i / ||Df_i||^2 more than `regularization`.

    Source: Walker and Ni, SIAM J. Numer. Anal. 49 (2011), eq. (2.2), in normal equations.
    """
    nothing = torch.zeros_like(gram.projection)
    squares = gram.matrix.diagonal()
    noise = nothing if noise is None else noise
    inverse = squares.rsqrt().where(squares > noise, 0.0)
    unit = gram.matrix * inverse.outer(inverse)
    right = gram.projection * inverse
    if not (gram.square > 0 and math.isfinite(gram.square + float(unit.sum() + right.sum()))):
        return Mixing(nothing, nothing, 0, math.nan, 0.0)
    damped = unit + (DAMPING * noise * inverse.square()).diag()
    eigenvalues, vectors = torch.linalg.eigh(damped)
    values = eigenvalues.tolist()
    kept = [value for value in values if value > eigenvalue_cutoff * values[-1] and value > 0]
    if not kept:
        return Mixing(nothing, nothing, 0, math.nan, 0.0)
    weights = [0.0] * (len(values) - len(kept)) + [1 / (value + regularization) for value in kept]
    scaled = vectors @ (host_tensor(weights) * (right @ vectors))
    coefficient_norm = float(scaled.norm()) / math.sqrt(gram.square)
    return Mixing(inverse * scaled, nothing, len(kept), math.sqrt(kept[-1] / kept[0]), coefficient_norm)


def predicted_square(gram: Gram, gamma: Tensor) -> float:
    """||f_k - DF gamma||^2 = ||f_k||^2 - 2 h' gamma + gamma' G gamma, never below zero."""
    value = gram.square - 2 * float(gram.projection @ gamma) + float(gamma @ gram.matrix @ gamma)
    return max(value, 0.0)


def residual_squares(gram: Gram) -> list[float]:
    """||f_i||^2 of all columns + 1 pairs, oldest first.

    From f_i = f_{i+1} - Df_i and <Df_i, f_{i+1}> = h_i - sum_{j > i} G_ij.
    """
    inner = (gram.projection - gram.matrix.triu(1).sum(1)).tolist()
    squares = [gram.square]
    for product, square in zip(reversed(inner), reversed(gram.matrix.diagonal().tolist()), strict=True):
        squares.append(squares[-1] - 2 * product + square)
    return [square if square > 0 or math.isnan(square) else 0.0 for square in reversed(squares)]


def tail_sums(columns: int) -> Tensor:
    """Matrix T of shape (columns + 1, columns) with f_i = f_k - DF T[i]: row i holds ones from column i on."""
    return torch.ones(columns + 1, columns, dtype=torch.float64, device="cpu").triu()


def usable_suffix(gram: Gram, ages: list[int], maximal_age: int, maximal_growth: float) -> int:
    """Number of newest columns to use: older pairs are cut at the first one that is too old or too large.

    A column is too old when it was stored more than `maximal_age` macro-steps ago, and too large when its older
    residual exceeds `maximal_growth` times the newest one (adaptive depth: it belongs to another regime).
    """
    squares = residual_squares(gram)
    bound = maximal_growth**2 * gram.square
    count = 0
    for age, square in zip(reversed(ages), reversed(squares[:-1]), strict=True):
        if age > maximal_age or not square <= bound:
            break
        count += 1
    return count


def host_tensor(values: float | list[float] | list[list[float]]) -> Tensor:
    """Float64 on the host, whatever the default device and dtype are."""
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def newest(gram: Gram, count: int) -> Gram:
    """The Gram record of the newest `count` columns."""
    start = gram.projection.numel() - count
    return gram._replace(matrix=gram.matrix[start:, start:], projection=gram.projection[start:])
