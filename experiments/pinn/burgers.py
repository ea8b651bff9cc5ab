"""Burgers equations in two and in a hundred dimensions, with their exact solutions.

`dimension` counts all inputs, time included. Residuals are left side minus right side.
"""

from __future__ import annotations

import math
from functools import cached_property, lru_cache
from typing import Annotated

import numpy as np
import torch
from numpy.polynomial.hermite import hermgauss
from pydantic import Field, PositiveFloat
from torch import Tensor

from data_loaders.collocation import MAX_SOBOL_DIMENSION, normal, uniform_points
from experiments.models.mlp import Derivatives
from experiments.pinn.equation import Equation, Predictor
from experiments.settings.schema import read_settings

NUM_TEST_POINTS = 10_000
MAX_TEST_ELEMENTS = 2**25  # coordinates of the test points: 256 MB
TEST_SEED = 20_240_101  # of the scramble of the test points, unlike the seed of a run
VISCOSITIES = (0.001 / math.pi, 1.0)  # where the solution was found exact to 5e-14; below, rounding is amplified
Dimension = Annotated[int, Field(ge=2, le=MAX_SOBOL_DIMENSION)]
BLOCK_ELEMENTS = 2**19  # of the (points, nodes) tables that a quadrature holds at a time: 4 MB each


class Burgers2d(Equation):
    """Viscous Burgers equation in (x, t), u_t + u u_x - nu u_xx = 0 on [-1, 1] x [0, 1].

    u(x, 0) = -sin(pi x), u(-1, t) = u(1, t) = 0. Conditions: half of the points on the initial line, a quarter on each
    side. Hard conditions: u = -sin(pi x) + t (1 - x^2) N. The solution is that of Cole and Hopf (Basdevant et al.,
    Computers & Fluids 14, 1986), by quadrature, see `cole_hopf`.

    Args:
        nu: viscosity, 0.001/pi to 1; 0.01/pi as published.
        graded: share of the interior points, in [0, 1], that is concentrated around the layer at x = 0 by
            x = nu sinh(w asinh(1/nu)), w uniform in [-1, 1]: uniform in log |x| for |x| >> nu. None as published.

    Raises:
        ValueError: an option outside its range.
    """

    num_space = 1

    def __init__(self, nu: float = 0.01 / math.pi, graded: float = 0.0) -> None:
        self.nu: float = read_settings(Annotated[float, Field(ge=VISCOSITIES[0], le=VISCOSITIES[1])], nu, "nu")
        self.graded: float = read_settings(Annotated[float, Field(ge=0, le=1)], graded, "graded")
        published = math.isclose(self.nu, 0.01 / math.pi, rel_tol=1e-12)
        self.label = f"2d Burgers, nu = {'0.01/pi' if published else f'{self.nu:.6g}'}"

    def sample(self, uniform: Tensor) -> Tensor:
        x, t = uniform.split(1, dim=1)
        if self.graded > 0:
            near = x < self.graded
            rest = (x - self.graded) / max(1 - self.graded, 1e-300)
            x = torch.where(near, self._concentrate(2 * x / self.graded - 1), 2 * rest - 1)
        else:
            x = 2 * x - 1
        return torch.cat([x, t], dim=1)

    def conditions(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """The first coordinate picks the part: below 1/2 the initial line, then x = -1 up to 3/4, then x = 1.

        So a Latin hypercube or a Sobol set whose number of points is a multiple of 4 is divided exactly.
        """
        first, t = uniform.split(1, dim=1)
        initial = first < 0.5
        x = torch.where(initial, 4 * first - 1, torch.where(first < 0.75, -1.0, 1.0).to(first))
        t = torch.where(initial, 0.0, t)
        return torch.cat([x, t], dim=1), torch.where(initial, -torch.sin(math.pi * x), 0.0)

    def residual(self, points: Tensor, u: Derivatives, source: Tensor) -> Tensor:
        return u.time + u.value * u.gradient_sum - self.nu * u.laplacian

    def lift(self, points: Tensor) -> tuple[Derivatives, Derivatives]:
        x, t = points.split(1, dim=1)
        zero, sine, slope = torch.zeros_like(x), torch.sin(math.pi * x), -math.pi * torch.cos(math.pi * x)
        b_x = -2 * x * t
        return (
            Derivatives(-sine, zero, slope, math.pi**2 * sine, slope.square()),
            Derivatives(t * (1 - x.square()), 1 - x.square(), b_x, -2 * t, b_x.square()),
        )

    def exact(self, points: Tensor) -> Tensor:
        return cole_hopf(points, self.nu)

    def grid(self) -> tuple[Tensor, Tensor]:
        return torch.linspace(-1, 1, 256, dtype=torch.float64), torch.arange(100, dtype=torch.float64) / 100

    def test_points(self) -> dict[str, Tensor]:
        """ "grid": the 256 x 100 points of `grid`, t up to 0.99, and "graded": 1025 x 201 points, t up to 1.

        "graded" has x = nu sinh(w asinh(1/nu)) at equidistant w in [-1, 1], x = 0 included. Time runs fastest.
        """
        w, t = torch.linspace(-1, 1, 1025, dtype=torch.float64), torch.linspace(0, 1, 201, dtype=torch.float64)
        return {"grid": torch.cartesian_prod(*self.grid()), "graded": torch.cartesian_prod(self._concentrate(w), t)}

    def predictors(self) -> dict[str, Predictor]:
        return super().predictors() | {"frozen initial condition": lambda points: -torch.sin(math.pi * points[:, :1])}

    def _concentrate(self, w: Tensor) -> Tensor:
        return (self.nu * torch.sinh(w * math.asinh(1 / self.nu))).clamp(-1, 1)


def cole_hopf(points: Tensor, nu: float) -> Tensor:
    """u of the 2d Burgers problem at points (x, t), t >= 0, (N, 1) in float64, differentiable.

    With the nodes z_k and weights w_k of `_quadrature`, y_k = x - z_k sqrt(4 nu t) and p_k ~ w_k exp(-c cos(pi y_k)),
    c = 1 / (2 pi nu), summing to one, u = -sum p_k sin(pi y_k): an average with positive weights, which are formed from
    logarithms. So nothing cancels, overflows or is divided by t.
    """
    points = points.to(torch.float64)
    z, log_weight = (part.to(points.device) for part in _quadrature(nu))
    c = 1 / (2 * math.pi * nu)
    parts = []
    for block in points.split(max(1, BLOCK_ELEMENTS // len(z))):
        angle = math.pi * (block[:, :1] - z * torch.sqrt(4 * nu * block[:, 1:]))
        p = torch.softmax(log_weight - c * torch.cos(angle), dim=1)
        parts.append(-(p * torch.sin(angle)).sum(dim=1, keepdim=True))
    return torch.cat(parts)


@lru_cache(maxsize=4)
def _quadrature(nu: float) -> tuple[Tensor, Tensor]:
    """Nodes z_k and logarithms of their weights for integrals with e^{-z^2}, up to a factor.

    120 Gauss-Hermite nodes for 0.005/pi <= nu <= 0.03. At x = 0, t = 1 the integrand has two humps at
    |z| = 0.34 / sqrt(nu), which for smaller nu are out of their reach, and for larger nu it oscillates between them
    (nu = 0.5: an error of 2e-8). There, the trapezoidal rule with step 0.1 up to 7 beyond the humps.
    """
    if 0.005 / math.pi <= nu <= 0.03:
        z, weight = hermgauss(120)
        return torch.from_numpy(z), torch.from_numpy(np.log(weight))
    num_steps = math.ceil((0.34 / math.sqrt(nu) + 7) / 0.1)
    nodes = 0.1 * torch.arange(-num_steps, num_steps + 1, dtype=torch.float64)
    return nodes, -nodes.square()


class _NormalLaw(Equation):
    """u_t + u sum_i u_{x_i} - Lap u = f with t uniform in [0, 1], x normal, errors on 10,000 fixed Sobol points.

    The conditions are labelled interior points of the same law, as published. Above 3,355 dimensions the test points
    are fewer, so that they take 256 MB: 3,355 in 10,000 dimensions.
    """

    def __init__(self, dimension: int, deviation: float) -> None:
        self.num_space: int = read_settings(Dimension, dimension, "dimension") - 1
        self.deviation: float = read_settings(PositiveFloat, deviation, "deviation")

    def sample(self, uniform: Tensor) -> Tensor:
        return torch.cat([normal(uniform[:, :-1], self.deviation), uniform[:, -1:]], dim=1)

    def conditions(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        points = self.sample(uniform)
        return points, self.exact(points)

    def residual(self, points: Tensor, u: Derivatives, source: Tensor) -> Tensor:
        return u.time + u.value * u.gradient_sum - u.laplacian - source

    def test_points(self) -> dict[str, Tensor]:
        """Returns as "sobol" the same 10,000 scrambled Sobol points of the law; fewer where they exceed 256 MB."""
        columns = self.num_space + 1
        count = min(NUM_TEST_POINTS, MAX_TEST_ELEMENTS // columns)
        return {"sobol": self.sample(uniform_points("sobol", count, columns, TEST_SEED))}


class TwoBody(_NormalLaw):
    """u_t + u sum_i u_{x_i} - Lap u = f with a well-scaled solution in which neighboring coordinates interact.

    u = amplitude e^{-t} m^{-1/2} sum_{i=1}^m c_i sin(phi_i), phi_i = x_i + cos x_{i+1} + x_{i+1} cos x_i,
    c_i = sign sin(2 pi i g), g = (sqrt(5) - 1)/2, m = dimension - 2. x ~ deviation N(0, 1), t ~ U[0, 1].

    With the default options u has mean 0 and rms 0.63, the Laplacian 2.2 and the advection 1.3; the best multiples of
    e^{-t} that are linear and quadratic in x (without mixed terms) have relative L2 errors of about 0.59 and 0.43, in
    1,000 dimensions as well.
    Hard conditions: u = u(x, 0) + t N; uniqueness then rests on the law of x. `amplitude` dials the nonlinearity.

    Args:
        dimension: 3 to 21,201.
        amplitude: > 0.
        deviation: of x, > 0.

    Raises:
        ValueError: an option outside its range.
    """

    def __init__(self, dimension: int = 100, amplitude: float = 3.0, deviation: float = 0.5) -> None:
        super().__init__(read_settings(Annotated[int, Field(ge=3)], dimension, "dimension"), deviation)
        self.amplitude: float = read_settings(PositiveFloat, amplitude, "amplitude")
        self.label = f"{dimension}d Burgers, two-body solution"

    def source(self, points: Tensor) -> Tensor:
        """f = -u + u sum_i u_{x_i} - Lap u of the solution."""
        u = self._solution(points[:, :-1], torch.exp(-points[:, -1:]))
        return u.time + u.value * u.gradient_sum - u.laplacian

    def exact(self, points: Tensor) -> Tensor:
        x = points[:, :-1]
        return self._scale(torch.exp(-points[:, -1:])) * (torch.sin(_phase(x, torch.cos(x))) @ self._signs.to(x))

    def lift(self, points: Tensor) -> tuple[Derivatives, Derivatives]:
        t = points[:, -1:]
        one, zero = torch.ones_like(t), torch.zeros_like(t)
        return self._solution(points[:, :-1], one)._replace(time=zero), Derivatives(t, one, zero, zero, zero)

    def predictors(self) -> dict[str, Predictor]:
        """The zero function, and the best e^{-t} (1, x) and e^{-t} (1, x, x^2) under the law of the points."""
        return super().predictors() | {
            "linear": lambda points: self._projection(points, 1),
            "quadratic": lambda points: self._projection(points, 2),
        }

    def _projection(self, points: Tensor, degree: int) -> Tensor:
        """The least-squares fit of e^{-t} times a polynomial without mixed terms, `degree` 1 or 2.

        Under the law of the points 1, x_i and x_i^2 - deviation^2 are orthogonal and t is independent of x, so that
        the fit is one projection for each column, of integrals over the two coordinates of a phase.
        """
        x, (mean, linear, quadratic) = points[:, :-1], (part.to(points) for part in self._projections)
        fit = mean + x @ linear
        if degree == 2:
            fit = fit + (x.square() - self.deviation**2) @ quadratic
        return self._scale(torch.exp(-points[:, -1:])) * fit

    def _solution(self, x: Tensor, decay: Tensor) -> Derivatives:
        """u and its derivatives where `decay` is e^{-t}."""
        cos, sin = torch.cos(x), torch.sin(x)
        b, cos_a, sin_a, cos_b, sin_b = x[:, 1:], cos[:, :-1], sin[:, :-1], cos[:, 1:], sin[:, 1:]
        phi, phi_a, phi_b, sign = _phase(x, cos), 1 - b * sin_a, cos_a - sin_b, self._signs.T.to(x)
        cos_phi, sin_phi = sign * torch.cos(phi), sign * torch.sin(phi)
        gradient = torch.nn.functional.pad(cos_phi * phi_a, (0, 1)) + torch.nn.functional.pad(cos_phi * phi_b, (1, 0))
        curvature = -cos_phi * (b * cos_a + cos_b) - sin_phi * (phi_a.square() + phi_b.square())
        scale = self._scale(decay)
        value = scale * sin_phi.sum(dim=1, keepdim=True)
        return Derivatives(
            value=value,
            time=-value,
            gradient_sum=scale * gradient.sum(dim=1, keepdim=True),
            laplacian=scale * curvature.sum(dim=1, keepdim=True),
            gradient_square=scale.square() * gradient.square().sum(dim=1, keepdim=True),
        )

    def _scale(self, decay: Tensor) -> Tensor:
        return self.amplitude / math.sqrt(self.num_space - 1) * decay

    @cached_property
    def _signs(self) -> Tensor:
        """c_i, (m, 1)."""
        index = torch.arange(1, self.num_space, dtype=torch.float64)
        return torch.sign(torch.sin(2 * math.pi * (index * ((math.sqrt(5) - 1) / 2) % 1))).unsqueeze(1)

    @cached_property
    def _projections(self) -> tuple[Tensor, Tensor, Tensor]:
        """Coefficients of 1, x_i and x_i^2 - deviation^2 for sum_i c_i sin(phi_i): (), (d, 1), (d, 1)."""
        node, weight = _normal_nodes(self.deviation)
        sine = torch.sin(_phase(torch.cartesian_prod(node, node), torch.cartesian_prod(node.cos(), node.cos())))
        table = sine.reshape(len(node), len(node))  # by x_i and x_{i+1}
        parts = []
        for feature in (node, node.square() - self.deviation**2):
            norm = weight @ feature.square()
            first, second = (weight * feature) @ table @ weight / norm, weight @ table @ (weight * feature) / norm
            pad = torch.nn.functional.pad
            parts.append(pad(first * self._signs, (0, 0, 0, 1)) + pad(second * self._signs, (0, 0, 1, 0)))
        return weight @ table @ weight * self._signs.sum(), parts[0], parts[1]


def _normal_nodes(deviation: float) -> tuple[Tensor, Tensor]:
    """Nodes and weights, summing to one, over deviation N(0, 1), for deviations up to 3: the trapezoidal rule."""
    z = torch.linspace(-9, 9, 401, dtype=torch.float64)
    return deviation * z, torch.softmax(-z.square() / 2, dim=0)


def _phase(x: Tensor, cos: Tensor) -> Tensor:
    """phi_i = x_i + cos x_{i+1} + x_{i+1} cos x_i."""
    return x[:, :-1] + cos[:, 1:] + x[:, 1:] * cos[:, :-1]


class Burgers100d(_NormalLaw):
    """The published problem, u_t + u sum_i u_{x_i} - Lap u = f with u = e^{-t} prod_i (x_i^2 - 1), x ~ 0.5 N(0, 1).

    It is degenerate, see `degenerate`: at a typical point |u| is 1e-15, and rescaling does not help, because all of the
    energy of u sits in points that no sample holds. Kept for reproduction; `TwoBody` has the same equation.

    Args:
        dimension: 2 to 21,201.

    Raises:
        ValueError: an option outside its range.
    """

    def __init__(self, dimension: int = 100) -> None:
        super().__init__(dimension, 0.5)
        self.label = f"{dimension}d Burgers, product solution"
        typical = math.exp(-0.3456 * self.num_space - 0.5)  # mean of ln |x^2 - 1| is -0.3456, that of t 0.5
        self.degenerate = (
            f"degenerate: |u| is about {typical:.0e} at a typical point, the zero function is better than any training"
        )

    def source(self, points: Tensor) -> Tensor:
        """f = -u + u sum_i 2 x_i P_i - sum_i 2 P_i, P_i = e^{-t} prod_{j != i} (x_j^2 - 1), formed without division."""
        x, u = points[:, :-1], self.exact(points)
        others = torch.exp(-points[:, -1:]) * _products_of_others(x.square() - 1)
        return -u + u * (2 * x * others).sum(dim=1, keepdim=True) - (2 * others).sum(dim=1, keepdim=True)

    def exact(self, points: Tensor) -> Tensor:
        return torch.exp(-points[:, -1:]) * (points[:, :-1].square() - 1).prod(dim=1, keepdim=True)


def _products_of_others(factors: Tensor) -> Tensor:
    """prod_{j != i} of the factors of each row, for every i, from running products from both ends."""
    one = torch.ones_like(factors[:, :1])
    before = torch.cat([one, factors[:, :-1]], dim=1).cumprod(dim=1)
    after = torch.cat([one, factors.flip(1)[:, :-1]], dim=1).cumprod(dim=1).flip(1)
    return before * after
