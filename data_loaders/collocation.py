"""Points of the unit cube for collocation: random, Latin hypercube, scrambled Sobol and residual-adaptive."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

KINDS = ("random", "latin_hypercube", "sobol")
MAX_SOBOL_DIMENSION = SobolEngine.MAXDIM
MAX_SOBOL_COUNT = 2**SobolEngine.MAXBIT
MAX_POOL = 2**24  # categories that torch.multinomial takes


def uniform_points(kind: str, count: int, dimension: int, seed: int) -> Tensor:
    """Points that fill the unit cube, (count, dimension), float64 in [0, 1), determined by the arguments alone.

    - "random": independent.
    - "latin_hypercube": each column has one point in each of `count` intervals of equal width (McKay et al. 1979).
    - "sobol": the first points of a Sobol sequence, scrambled by `seed` (Owen 1998; torch's SobolEngine). Powers of two
      are the counts it balances best.

    Raises:
        ValueError: an unknown kind, a count or dimension below 1, or more than the Sobol sequence has.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    for name, number in (("count", count), ("dimension", dimension)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    if kind == "sobol":
        return _sobol(count, dimension, seed)
    generator = torch.Generator().manual_seed(seed)
    jitter = torch.rand(count, dimension, generator=generator, dtype=torch.float64)
    if kind == "random":
        return jitter
    strata = torch.stack([torch.randperm(count, generator=generator) for _ in range(dimension)], dim=1)
    return ((strata + jitter) / count).clamp_(max=_below_one(torch.float64))


def adaptive_points(
    pool: Tensor, residual: Tensor, count: int, seed: int, power: float = 1.0, offset: float = 1.0
) -> Tensor:
    """Draws `count` different rows of `pool`, more of them where the residual is large.

    p ~ |r|^power / mean(|r|^power) + offset, without replacement (RAD: C. Wu et al., Computer Methods in Applied
    Mechanics and Engineering 403, 2023, eq. 2).

    Args:
        pool: (M, columns), on any device, M at most 2^24.
        residual: (M,) or (M, 1), finite.
        count: 1 to M; without offset, at most the number of rows whose residual is not zero.
        power: > 0; the larger, the stronger the concentration.
        offset: >= 0; the larger, the closer to the uniform law.

    Raises:
        ValueError: an argument outside its range.
    """
    rows = len(pool)
    if residual.numel() != rows:
        raise ValueError(f"residual must have one value a row of the pool ({rows}), got {residual.numel()}")
    if not 1 <= count <= rows:
        raise ValueError(f"count must be in 1 to {rows}, the rows of the pool, got {count}")
    if rows > MAX_POOL:
        raise ValueError(f"the pool may have at most {MAX_POOL} rows, got {rows}")
    if not (math.isfinite(power) and power > 0):
        raise ValueError(f"power must be finite and > 0, got {power}")
    if not (math.isfinite(offset) and offset >= 0):
        raise ValueError(f"offset must be finite and >= 0, got {offset}")
    size = residual.detach().reshape(-1).to("cpu", torch.float64).abs()
    if not bool(torch.isfinite(size).all()):
        raise ValueError("residual must be finite, got a NaN or an infinity")
    largest = float(size.max())
    size = (size / largest if largest > 0 else torch.ones_like(size)) ** power  # scaled: no power overflows
    weight = size / size.mean() + offset
    if int((weight > 0).sum()) < count:
        raise ValueError(
            f"only {int((weight > 0).sum())} rows have a residual, too few for count = {count}; set offset > 0"
        )
    chosen = torch.multinomial(weight, count, replacement=False, generator=torch.Generator().manual_seed(seed))
    return pool[chosen.to(pool.device)]


def normal(uniform: Tensor, deviation: float | Tensor) -> Tensor:
    """`deviation` times the inverse normal distribution function of numbers in [0, 1].

    0 and 1 are moved inwards by half a rounding unit: 8.2 deviations in float64, 5.4 in float32, on both sides.
    """
    margin = torch.finfo(uniform.dtype).eps / 2
    return deviation * torch.special.ndtri(uniform.clamp(margin, 1 - margin))


def _sobol(count: int, dimension: int, seed: int) -> Tensor:
    if dimension > MAX_SOBOL_DIMENSION:
        raise ValueError(f"the Sobol sequence has at most {MAX_SOBOL_DIMENSION} dimensions, got {dimension}")
    if count > MAX_SOBOL_COUNT:
        raise ValueError(f"the Sobol sequence has at most {MAX_SOBOL_COUNT} points, got {count}")
    return SobolEngine(dimension, scramble=True, seed=seed).draw(count, dtype=torch.float64)


def _below_one(dtype: torch.dtype) -> float:
    return 1.0 - torch.finfo(dtype).eps / 2
