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
        """Elementwise."""
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

    Args:
        sizes: widths from input to output, at least two, each >= 1.
        activation: one of `ACTIVATIONS`.

    Raises:
        ValueError: fewer than two sizes, a size below 1, or an unknown activation.
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

    def value_gradient_laplacian(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """u (N, 1), its gradient (N, d) and its Laplacian (N, 1) over all columns of x (N, d), exact.

        They can be differentiated once.

        Raises:
            ValueError: more than one output, an activation without second derivative, or x of another shape.
        """
        self._check(x)
        parameters, columns = self._pairs(), x.shape[1]
        rows = orthonormal_rows(self._first_weight())
        lanes = torch.cat([torch.zeros_like(rows[:1]), rows])
        plan = Plan(self._rule(), 1, len(lanes) if len(rows) == columns else 1)
        value, laplacian, *gradient = rules.outputs_of(x, lanes, parameters, plan).unsqueeze(-1)
        if gradient:
            return value, torch.cat(gradient, 1), laplacian
        return value, self._gradient(x), laplacian

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
        """The derivatives of u at points (N, d + 1), space first and time last; exact, and differentiable once.

        Args:
            points: (N, d + 1), d >= 1.
            directions: (d, r); the Laplacian and the sum of squares are over these. Default: `directions()`.
            gradient_square: whether it is wanted; without it, a column of NaN that costs nothing (d > 1).
            compiles: run through `torch.compile`, which compiles again for every number of points.

        Raises:
            ValueError: more than one output, an activation without second derivative, or a shape that does not fit.
        """
        self._check(points, time=True)
        lanes, plan = self._lanes(directions, gradient_square)
        outputs = rules.outputs_of(points, lanes, self._pairs(), plan, compiles)
        return _derivatives_from(outputs, plan)

    def residual_jacobian(
        self,
        points: Tensor,
        residual: Callable[[Derivatives, slice], Tensor],
        chunk: int | None = None,
        *,
        directions: Tensor | None = None,
        gradient_square: bool = True,
        values_only: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """A residual (N, 1) and its derivatives (N, P) with respect to every parameter, both detached.

        Args:
            points: (N, d + 1).
            residual: (derivatives at the points of a slice, that slice) -> (rows, 1), each row a function of its own
                point only.
            chunk: points at a time; bounds the memory beside the result. Default: `default_chunk`.
            directions: as for `derivatives`.
            gradient_square: as for `derivatives`.
            values_only: the residual uses the value only; the derivatives are NaN.

        Returns:
            The residual and its Jacobian, columns in the order of `parameters_to_vector(self.parameters())`.

        Raises:
            ValueError: as `derivatives`.
        """
        self._check(points, time=not values_only)
        parameters = [(weight.detach(), bias.detach()) for weight, bias in self._pairs()]
        size = chunk or self.default_chunk()
        jacobian = points.new_empty(len(points), sum(p.numel() for pair in parameters for p in pair))
        residuals = points.new_empty(len(points), 1)
        lanes, plan = (None, None) if values_only else self._lanes(directions, gradient_square)
        for rows in chunks(len(points), size):
            with torch.no_grad():
                if lanes is None or plan is None:
                    outputs, inputs = rules.propagate_values(points[rows], parameters, self._rule())
                elif len(parameters) == 1:
                    outputs = rules.outputs_of(points[rows], lanes, parameters, plan)
                else:
                    outputs, layers, last = rules.propagate(points[rows], lanes, parameters, plan)
            with torch.enable_grad():
                outputs.requires_grad_()
                u = _value_alone(outputs) if plan is None else _derivatives_from(outputs, plan)
                result = residual(u, rows)
            (adjoints,) = torch.autograd.grad(result.sum(), outputs)
            residuals[rows] = result.detach()
            with torch.no_grad():
                if lanes is None or plan is None:
                    rules.fill_jacobian_of_values(jacobian[rows], adjoints, inputs, parameters)
                elif len(parameters) == 1:
                    jacobian[rows, :-1] = adjoints[:1].T * points[rows] + adjoints[1:].T @ lanes[: plan.num_outputs]
                    jacobian[rows, -1] = adjoints[0]
                else:
                    rules.fill_jacobian(jacobian[rows], adjoints, layers, last, parameters, plan)
        return residuals, jacobian

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

    def _rule(self) -> rules.Rule:
        return rules.RULES[self._activation_name]

    def _check(self, points: Tensor, time: bool = False) -> None:
        columns = self._sizes[0]
        if self._sizes[-1] != 1:
            raise ValueError(f"derivatives need a network with one output, got sizes {self._sizes}")
        if self._activation_name not in rules.RULES:
            raise ValueError(
                f"derivatives need an activation with a second derivative ({', '.join(rules.RULES)}), "
                f"got {self._activation_name!r}"
            )
        if points.ndim != 2 or points.shape[1] != columns:
            raise ValueError(f"points must have shape (N, {columns}), got {tuple(points.shape)}")
        if time and columns < 2:
            raise ValueError("points need at least one spatial column and time, got a network with one input")

    def _lanes(self, directions: Tensor | None, gradient_square: bool) -> tuple[Tensor, Plan]:
        """Zeros, time, sum of the spatial axes and the directions (K, d + 1); with d = 1 the sum is the direction."""
        weight = self._first_weight()
        num_space = self._sizes[0] - 1
        if directions is not None and (directions.ndim != 2 or len(directions) != num_space):
            raise ValueError(f"directions must have shape ({num_space}, r), got {tuple(directions.shape)}")
        shared = num_space == 1 and directions is None
        rows = (self.directions() if directions is None else directions.detach()).T
        lanes = weight.new_zeros(3 if shared else 3 + len(rows), num_space + 1)
        lanes[1, -1] = 1
        lanes[2, :-1] = 1
        if shared:
            return lanes, Plan(self._rule(), 2, 3)
        lanes[3:, :-1] = rows
        return lanes, Plan(self._rule(), 3, len(lanes) if gradient_square else 3)

    def _gradient(self, x: Tensor) -> Tensor:
        """du/dx (N, d), by the chain rule from the last layer to the first."""
        parameters, slopes, value = self._pairs(), [], x
        for weight, bias in parameters[:-1]:
            value, first, _ = self._rule().values(torch.addmm(bias, value, weight.T))
            slopes.append(first)
        gradient = parameters[-1][0].expand(len(x), -1)
        for (weight, _), first in zip(reversed(parameters[:-1]), reversed(slopes), strict=True):
            gradient = (gradient * first) @ weight
        return gradient


def accumulate_gradient(
    model: MLP,
    points: Tensor,
    loss_sum: Callable[[Derivatives, slice], Tensor],
    *,
    chunk: int | None = None,
    count: int | None = None,
    gradient_square: bool = True,
    compiles: bool = False,
) -> Tensor:
    """The mean of a loss over points, (1/N) sum_n loss_n; adds its gradient to that of the parameters.

    Chunk by chunk, forward and `Tensor.backward`, so that memory does not grow with N.

    Args:
        model: the network.
        points: (N, d + 1).
        loss_sum: (derivatives at the points of a slice, that slice) -> scalar, the sum of the losses of these points.
        chunk: points at a time. Default: `model.default_chunk()`.
        count: N of the mean. Default: the number of points; where others hold more of them, their total.
        gradient_square: as for `MLP.derivatives`.
        compiles: as for `MLP.derivatives`; all chunks have the same size, so that one compilation serves them.

    Returns:
        The mean, detached.
    """
    total = points.new_zeros(())
    _keep_freed_memory()
    slices = list(chunks(len(points), chunk or model.default_chunk(gradient_square)))
    size = max((rows.stop - rows.start for rows in slices), default=0)
    directions = model.directions() if points.shape[1] > 2 else None
    for rows in slices:
        length = rows.stop - rows.start
        own = _padded(points[rows], size) if compiles else points[rows]
        u = model.derivatives(own, directions, gradient_square=gradient_square, compiles=compiles)
        if len(own) > length:
            u = Derivatives(*(each[:length] for each in u))
        loss = loss_sum(u, rows) / (count or len(points))
        loss.backward()
        total += loss.detach()
    return total


def _keep_freed_memory() -> None:
    """Makes glibc keep what is freed from now on: it adapts to the largest block (up to 32 MB) it saw freed.

    Else it returns the memory of each chunk to the system and faults it in again for the next, a fifth of the time. The
    block is never written to and takes no memory.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


def chunks(count: int, size: int) -> Iterator[slice]:
    """As few slices as a size of at most `size` allows, all of one length but the last, which may be shorter."""
    if size < 1:
        raise ValueError(f"chunk must be at least 1, got {size}")
    length = math.ceil(count / math.ceil(count / size)) if count else size
    for start in range(0, count, length):
        yield slice(start, min(start + length, count))


def orthonormal_rows(matrix: Tensor) -> Tensor:
    """Orthonormal rows (r, d), r = min(d, h), whose span contains the rows of a matrix (h, d); the identity if d <= h.

    From a QR decomposition of the transpose, which leaves out no direction of a matrix of deficient rank.
    """
    outputs, inputs = matrix.shape
    if inputs <= outputs:
        return torch.eye(inputs, dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.qr(matrix.T).Q.T


def _padded(points: Tensor, size: int) -> Tensor:
    missing = size - len(points)
    return torch.cat([points, points[-1:].expand(missing, -1)]) if missing > 0 else points


def _derivatives_from(outputs: Tensor, plan: Plan) -> Derivatives:
    value, laplacian, time, gradient_sum = outputs[:4].unsqueeze(-1).unbind()
    if plan.first_row == 2:
        square = gradient_sum.square()
    elif plan.num_outputs > plan.first_row:
        square = outputs[1 + plan.first_row :].square().sum(0).unsqueeze(-1)
    else:
        square = torch.full_like(value, math.nan, requires_grad=False)
    return Derivatives(value, time, gradient_sum, laplacian, square)


def _value_alone(outputs: Tensor) -> Derivatives:
    value = outputs.unsqueeze(-1)
    missing = torch.full_like(value, math.nan, requires_grad=False)
    return Derivatives(value, missing, missing, missing, missing)
