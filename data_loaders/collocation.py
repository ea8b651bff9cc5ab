"""Points of the unit cube for collocation: random, Latin hypercube, scrambled Sobol and residual-adaptive."""

from __future__ import annotations

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
    - "sobol": the first points of a Sobol sequence, scrambled by `seed` (Owen 1998; torch's SobolEngine), at most
      MAX_SOBOL_COUNT of MAX_SOBOL_DIMENSION. Powers of two are the counts it balances best.
    """
    if kind == "sobol":
        return SobolEngine(dimension, scramble=True, seed=seed).draw(count, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    jitter = torch.rand(count, dimension, generator=generator, dtype=torch.float64)
    if kind == "random":
        return jitter
    strata = torch.stack([torch.randperm(count, generator=generator) for _ in range(dimension)], dim=1)
    return ((strata + jitter) / count).clamp_(max=1.0 - torch.finfo(torch.float64).eps / 2)


def adaptive_points(pool: Tensor, residual: Tensor, count: int, seed: int) -> Tensor:
    """Draws `count` different rows of `pool`, more of them where the residual is large.

    p ~ |r| / mean |r| + 1, without replacement (RAD: C. Wu et al., Computer Methods in Applied Mechanics and
    Engineering 403, 2023, eq. 2).

    Args:
        pool: (M, columns), on any device, M at most MAX_POOL.
        residual: (M,) or (M, 1), finite.
        count: 1 to M.
        seed: of the draw.
    """
    size = residual.detach().reshape(-1).to("cpu", torch.float64).abs()
    largest = float(size.max())
    size = size / largest if largest > 0 else torch.ones_like(size)  # scaled: no mean overflows
    weight = size / size.mean() + 1.0
    chosen = torch.multinomial(weight, count, replacement=False, generator=torch.Generator().manual_seed(seed))
    return pool[chosen.to(pool.device)]


def normal(uniform: Tensor, deviation: float | Tensor) -> Tensor:
    """`deviation` times the inverse normal distribution function of numbers in [0, 1].

    0 and 1 are moved inwards by half a rounding unit: 8.2 deviations in float64, 5.4 in float32, on both sides.
    """
    margin = torch.finfo(uniform.dtype).eps / 2
    return deviation * torch.special.ndtri(uniform.clamp(margin, 1 - margin))
