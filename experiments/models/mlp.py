"""Multi-layer perceptron, with its exact derivatives for differential equations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from experiments.models import derivatives as rules
from experiments.models.derivatives import Derivatives as Derivatives  # part of this module's interface
from experiments.models.derivatives import Parameters, Plan


class Sine(nn.Module):
    """sin(z)."""

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.sin(inputs)


ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
    "sin": Sine,
}

CHUNK_BYTES = 1 << 21
"""Of what a layer carries for a chunk of points: the few that are used at a time stay in the cache."""


class MLP(nn.Module):
    """Fully connected network, `h_{l+1} = activation(W_l h_l + b_l)`, linear in its last layer.

    `sizes` are widths from input to output, at least two, each >= 1, and `activation` is one of `ACTIVATIONS`.
    """

    def __init__(self, sizes: Sequence[int], activation: str = "tanh") -> None:
        super().__init__()
        if len(sizes) < 2 or any(size < 1 for size in sizes):
            raise ValueError(f"sizes must be at least two integers >= 1, got {tuple(sizes)}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.linears = nn.ModuleList(nn.Linear(inputs, outputs) for inputs, outputs in pairwise(sizes))
        self.activation = ACTIVATIONS[activation]()
        self._sizes, self._activation_name = tuple(sizes), activation

    def forward(self, inputs: Tensor) -> Tensor:
        """Maps `(rows, sizes[0])` to `(rows, sizes[-1])`."""
        hidden: torch.Tensor = inputs
        for linear in self.linears[:-1]:
            hidden = self.activation(linear(hidden))
        return self.linears[-1](hidden)

    def directions(self) -> Tensor:
        """Orthonormal columns (d, r), r = min(d, sizes[1]), whose span contains the rows of W_1's spatial columns.

        The network depends on x through W_1 x only, so the Laplacian sums over these columns instead of all d. A
        direction q orthogonal to them has W_1 q = 0 and enters quadratically in W_1 q: neither it nor its first
        derivative with respect to W_1 counts, so the columns are constants. Second derivatives are not covered.
        """
        return orthonormal_rows(self._first_weight()[:, :-1]).T

    def derivatives(
        self,
        points: Tensor,
        directions: Tensor | None = None,
        *,
        gradient_square: bool = True,
        compiles: bool = False,
    ) -> Derivatives:
        """The derivatives of u at points (N, d + 1), space first and time last, exact.

        They are differentiable once with respect to the parameters; the points are constants.

        Args:
            points: (N, d + 1), d >= 1.
            directions: (d, r); the Laplacian and the sum of squares are over these. Default: `directions()`.
            gradient_square: whether it is wanted; without it, a column of NaN that costs nothing (d > 1).
            compiles: run through `torch.compile`, which compiles again for every number of points.

        Raises:
            ValueError: a network without hidden layer or with more than one output, an activation without second
                derivative, or a shape that does not fit.
        """
        self._check(points)
        lanes, plan = self._lanes(directions, gradient_square)
        outputs = rules.outputs_of(points, lanes, self._pairs(), plan, compiles)
        return _derivatives_from(outputs, plan)

    def chunked_derivatives(
        self, points: Tensor, chunk: int | None = None, *, gradient_square: bool = True, compiles: bool = False
    ) -> Iterator[tuple[slice, Derivatives]]:
        """Slices of the points with the derivatives there; what is used at once takes memory for one chunk alone.

        `chunk` points are computed at a time, by default `default_chunk`, and compiled with the same size, so that one
        compilation serves them; the other arguments are those of `derivatives`.
        """
        _keep_freed_memory()
        slices = list(chunks(len(points), chunk or self.default_chunk(gradient_square)))
        directions = self.directions() if points.shape[1] > 2 else None
        for rows in slices:
            own, missing = points[rows], slices[0].stop - (rows.stop - rows.start)
            if compiles and missing:
                own = torch.cat([own, own[-1:].expand(missing, -1)])
            u = self.derivatives(own, directions, gradient_square=gradient_square, compiles=compiles)
            yield rows, u if len(own) == rows.stop - rows.start else Derivatives(*(each[:-missing] for each in u))

    def residual_jacobian(
        self,
        points: Tensor,
        residual: Callable[[Derivatives, slice], Tensor],
        chunk: int | None = None,
        *,
        gradient_square: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """A residual (N, 1) and its derivatives (N, P) with respect to every parameter, both detached.

        Columns are in the order of `parameters_to_vector(self.parameters())`. ValueError as `derivatives`.

        Args:
            points: (N, d + 1).
            residual: (derivatives at the points of a slice, that slice) -> (rows, 1), each row a function of its own
                point only.
            chunk: points at a time; bounds the memory beside the result. Default: `default_chunk`.
            gradient_square: as for `derivatives`.
        """
        self._check(points)
        parameters = self._detached()
        lanes, plan = self._lanes(None, gradient_square)
        jacobian = points.new_empty(len(points), sum(p.numel() for pair in parameters for p in pair))
        residuals = points.new_empty(len(points), 1)
        for rows in chunks(len(points), chunk or self.default_chunk()):
            with torch.no_grad():
                outputs, layers, last = rules.propagate(points[rows], lanes, parameters, plan)
            with torch.enable_grad():
                result = residual(_derivatives_from(outputs.requires_grad_(), plan), rows)
            (adjoints,) = torch.autograd.grad(result.sum(), outputs)
            residuals[rows] = result.detach()
            with torch.no_grad():
                rules.fill_jacobian(jacobian[rows], adjoints, layers, last, parameters, plan)
        return residuals, jacobian

    def value_jacobian(self, points: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        """u (N, 1) at points (N, d + 1) and the derivatives (N, P) of factor * u with respect to every parameter.

        Both are detached; `factor` (N, 1) has one for each point. ValueError as `derivatives`.
        """
        self._check(points)
        parameters, rule = self._detached(), rules.RULES[self._activation_name]
        jacobian = points.new_empty(len(points), sum(p.numel() for pair in parameters for p in pair))
        values = points.new_empty(len(points), 1)
        with torch.no_grad():
            for rows in chunks(len(points), self.default_chunk()):
                values[rows, 0], inputs = rules.propagate_values(points[rows], parameters, rule)
                rules.fill_jacobian_of_values(jacobian[rows], factor[rows, 0], inputs, parameters)
        return values, jacobian

    def default_chunk(self, gradient_square: bool = True) -> int:
        """Points of which a layer carries `CHUNK_BYTES`: many for the processor, few for its cache.

        The rows of the Laplacian count where there are as many for each point: beyond the first hidden layer, or, where
        the sum of their squares is wanted, beyond the input.
        """
        num_space, weight = self._sizes[0] - 1, self._first_weight()
        lanes = 3
        if num_space > 1 and (gradient_square or len(self._sizes) > 3):
            lanes += min(num_space, self._sizes[1])
        return max(16, CHUNK_BYTES // (lanes * max(self._sizes[1:]) * weight.element_size()))

    def _pairs(self) -> Parameters:
        flat = list(self.linears.parameters())
        return list(zip(flat[::2], flat[1::2], strict=True))

    def _first_weight(self) -> Tensor:
        return self._pairs()[0][0].detach()

    def _detached(self) -> Parameters:
        return [(weight.detach(), bias.detach()) for weight, bias in self._pairs()]

    def _check(self, points: Tensor) -> None:
        columns = self._sizes[0]
        if self._sizes[-1] != 1 or len(self._sizes) < 3 or columns < 2:
            raise ValueError(
                "derivatives need a network of space and time with hidden layers and one output, got sizes "
                f"{self._sizes}"
            )
        if self._activation_name not in rules.RULES:
            raise ValueError(
                f"derivatives need an activation with a second derivative ({', '.join(rules.RULES)}), "
                f"got {self._activation_name!r}"
            )
        if points.ndim != 2 or points.shape[1] != columns:
            raise ValueError(f"points must have shape (N, {columns}), got {tuple(points.shape)}")

    def _lanes(self, directions: Tensor | None, gradient_square: bool) -> tuple[Tensor, Plan]:
        """Zeros, time, sum of the spatial axes and the directions (K, d + 1); with d = 1 the sum is the direction."""
        weight = self._first_weight()
        num_space = self._sizes[0] - 1
        rule = rules.RULES[self._activation_name]
        shared = num_space == 1 and directions is None
        rows = (self.directions() if directions is None else directions.detach()).T
        lanes = weight.new_zeros(3 if shared else 3 + len(rows), num_space + 1)
        lanes[1, -1] = 1
        lanes[2, :-1] = 1
        if shared:
            return lanes, Plan(rule, 2, 3)
        lanes[3:, :-1] = rows
        return lanes, Plan(rule, 3, len(lanes) if gradient_square else 3)


def _keep_freed_memory() -> None:
    """Makes glibc keep what is freed from now on: it adapts to the largest block (up to 32 MB) it saw freed.

    Else it returns the memory of each chunk to the system and faults it in again for the next, a fifth of the time. The
    block is never written to and takes no memory.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


def chunks(count: int, size: int) -> Iterator[slice]:
    """As few slices as a size of at most `size` allows, all of one length but the last, which may be shorter."""
    length = math.ceil(count / math.ceil(count / size)) if count else size
    for start in range(0, count, length):
        yield slice(start, min(start + length, count))


def orthonormal_rows(matrix: Tensor) -> Tensor:
    """Orthonormal rows (r, d), r = min(d, h), by QR, whose span contains the rows of (h, d); the identity if d <= h."""
    outputs, inputs = matrix.shape
    if inputs <= outputs:
        return torch.eye(inputs, dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.qr(matrix.T).Q.T


def _derivatives_from(outputs: Tensor, plan: Plan) -> Derivatives:
    value, laplacian, time, gradient_sum = outputs[:4].unsqueeze(-1).unbind()
    if plan.first_row == 2:
        square = gradient_sum.square()
    elif plan.num_outputs > plan.first_row:
        square = outputs[1 + plan.first_row :].square().sum(0).unsqueeze(-1)
    else:
        square = torch.full_like(value, math.nan, requires_grad=False)
    return Derivatives(value, time, gradient_sum, laplacian, square)
