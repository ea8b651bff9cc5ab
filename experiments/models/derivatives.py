"""Exact derivatives of a multi-layer perceptron by forward propagation, with hand-written adjoints.

Carried through the layers, for N points: the value h (N, width), the Laplacian l (N, width) and the derivatives T
(K, N, width) along K constant directions v_k. With z = W h + b and the activation f,

    h <- f(z)    T_k <- f'(z) W T_k    l <- f'(z) W l + f''(z) sum_rows (W T_k)^2,

where rows are the directions over which the Laplacian sums. In the first layer W T_k = W v_k is the same for all points
and l = 0. What a point costs depends on the number of directions, not on the dimension.
Source: forward Laplacian, Li et al., arXiv 2307.08214.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# ---- activations -----------------------------------------------------------------------------------------------------


class Rule(NamedTuple):
    """Derivatives of an activation: z -> f, f', f'' and (z, f, f', f'') -> f'''."""

    values: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    third: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _tanh(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    value = torch.tanh(z)
    first = 1 - value * value
    return value, first, (value * first).mul_(-2)


def _sin(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    value = torch.sin(z)
    return value, torch.cos(z), -value


def _differentiated(function: Callable[[Tensor], Tensor]) -> Rule:
    """The rule of a smooth function of single numbers, by automatic differentiation: slower than written formulas."""

    def derivative(of: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return torch.func.grad(lambda z: of(z).sum())

    first = derivative(function)
    second = derivative(first)
    third = derivative(second)
    return Rule(lambda z: (function(z), first(z), second(z)), lambda z, *_: third(z))


RULES: dict[str, Rule] = {
    "tanh": Rule(_tanh, lambda z, value, first, second: torch.addcmul(4 * first, first, first, value=-6)),
    "sin": Rule(_sin, lambda z, value, first, second: -first),
    "sigmoid": _differentiated(torch.sigmoid),
    "silu": _differentiated(torch.nn.functional.silu),
    "gelu": _differentiated(torch.nn.functional.gelu),
}
"""By the names of `ACTIVATIONS`; without those that have no second derivative."""


# ---- propagation -----------------------------------------------------------------------------------------------------


class Derivatives(NamedTuple):
    """u, u_t, sum_i u_{x_i}, sum_i u_{x_i x_i} and sum_i u_{x_i}^2 over the spatial columns, each (N, 1)."""

    value: Tensor
    time: Tensor
    gradient_sum: Tensor
    laplacian: Tensor
    gradient_square: Tensor


class Plan(NamedTuple):
    """What is carried through the layers, in lanes: the Laplacian is lane 0, the others are directions.

    Attributes:
        rule: of the activation.
        first_row: the Laplacian sums over the directions from this lane on, the rows.
        num_outputs: lanes that are returned, the first ones: `first_row` or all.
    """

    rule: Rule
    first_row: int
    num_outputs: int


class Layer(NamedTuple):
    """What the adjoint needs of a hidden layer: its inputs, its pre-activations and what the activation made of them.

    `lanes` (inputs, K, N) and `slopes` = W lanes (width, K, N); in the first layer, where they are the same for all
    points, with 1 in the place of N. `square` is the sum of the squared rows of `slopes`. All others (width, N): points
    come last, because products of a small matrix with a wide one are the fastest, and rows are then long.
    """

    value: Tensor
    lanes: Tensor
    z: Tensor
    slopes: Tensor
    square: Tensor
    output: Tensor
    first: Tensor
    second: Tensor


class Adjoint(NamedTuple):
    """Adjoints of the pre-activations of a layer, z (width, N) and slopes (width, K, N), and the inputs it had."""

    z: Tensor
    slopes: Tensor
    value: Tensor
    lanes: Tensor


Parameters = Sequence[tuple[Tensor, Tensor]]
"""Weight (outputs, inputs) and bias (outputs) of every layer."""


_onednn_linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def _times(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, by oneDNN where it can: on processors not by Intel twice as fast as MKL, which `@` calls."""
    if _onednn_linear is None or left.dtype != torch.float32 or left.device.type != "cpu":
        return left @ right
    if torch.compiler.is_compiling():  # whose own lowering of oneDNN takes constant weights only
        return torch.ops.aadl_experiments.times(left, right)
    return _onednn_linear(left, right.T, None, "none", [], "")


_operators = torch.library.Library("aadl_experiments", "DEF")
_operators.define("times(Tensor left, Tensor right) -> Tensor")
_operators.impl("times", _times, "CPU")
_operators.impl("times", lambda left, right: left.new_empty(len(left), right.shape[1]), "Meta")


def _through(weight: Tensor, lanes: Tensor) -> Tensor:
    """The product of a weight with every column of lanes (inputs, K, N)."""
    return _times(weight, lanes.flatten(1)).unflatten(1, lanes.shape[1:])


def propagate(
    points: Tensor, lanes: Tensor, parameters: Parameters, plan: Plan
) -> tuple[Tensor, list[Layer], tuple[Tensor, Tensor]]:
    """Value and first lanes, (1 + num_outputs, N), and what the adjoint needs.

    Args:
        points: (N, inputs).
        lanes: (K, inputs); zeros (the Laplacian of the inputs), then the directions.
        parameters: of at least two layers, the last one with one output.
        plan: what is wanted.

    Returns:
        The outputs, the hidden layers, and the inputs of the last layer.
    """
    layers: list[Layer] = []
    value, lanes = points.T, lanes.T.unsqueeze(2)
    for number, (weight, bias) in enumerate(parameters[:-1]):
        z = _times(weight, value).add_(bias.unsqueeze(1))
        slopes = _through(weight, lanes)
        square = _squares(slopes, plan)
        output, first, second = plan.rule.values(z)
        layers.append(Layer(value, lanes, z, slopes, square, output, first, second))
        used = plan.num_outputs if number == len(parameters) - 2 else slopes.shape[1]
        value, lanes = output, first.unsqueeze(1) * slopes[:, :used]
        lanes[:, 0].addcmul_(second, square)
    return _last_layer(value, lanes, parameters[-1]), layers, (value, lanes)


def propagate_alone(points: Tensor, lanes: Tensor, parameters: Parameters, plan: Plan) -> Tensor:
    """The outputs of `propagate` where no adjoint follows, in two thirds of the time.

    One array (width, 1 + K, N) holds value and lanes of a layer, which one product takes through the next, and is
    written over by the activation.
    """
    weight, bias = parameters[0]
    z, slopes = _times(weight, points.T).add_(bias.unsqueeze(1)), _through(weight, lanes.T.unsqueeze(2))
    state = z.new_empty(len(z), 1 + len(lanes), len(points))
    for number, (weight, bias) in enumerate(parameters[:-1]):
        if number:
            state = _through(weight, state)
            z, slopes = state[:, 0].add_(bias.unsqueeze(1)), state[:, 1:]
        square = _squares(slopes, plan)
        value, first, second = plan.rule.values(z)
        state[:, 0] = value
        used = plan.num_outputs if number == len(parameters) - 2 else len(lanes)
        torch.mul(slopes[:, :used], first.unsqueeze(1), out=state[:, 1 : 1 + used])
        state[:, 1].addcmul_(second, square)
    return _last_layer(state[:, 0], state[:, 1 : 1 + used], parameters[-1])


def _squares(slopes: Tensor, plan: Plan) -> Tensor:
    rows = slopes[:, plan.first_row :]
    return rows.square().sum(1) if rows.shape[1] > 1 else rows[:, 0].square()


def _last_layer(value: Tensor, lanes: Tensor, parameters: tuple[Tensor, Tensor]) -> Tensor:
    """Value and lanes, (1 + lanes, N), of the one output."""
    weight, bias = parameters
    return torch.cat([torch.addmm(bias, weight, value), (weight @ lanes.flatten(1)).view(lanes.shape[1:])])


def pull_back(
    adjoints: Tensor,
    layers: Sequence[Layer],
    last: tuple[Tensor, Tensor],
    parameters: Parameters,
    plan: Plan,
    *,
    sums: bool = False,
) -> Iterator[Adjoint]:
    """Adjoints of the layers, the last one first.

    Args:
        adjoints: (1 + num_outputs, N), of the outputs of `propagate`.
        layers: from `propagate`.
        last: from `propagate`.
        parameters: as given to it.
        plan: as given to it.
        sums: of the first layer's slopes, which all points share, the sum (width, K, 1) of the adjoints.
    """
    yield Adjoint(adjoints[:1], adjoints[1:].unsqueeze(0), *last)
    column, row = parameters[-1][0].T, plan.first_row
    value, lanes = column * adjoints[0], column.unsqueeze(2) * adjoints[1:]
    for number in reversed(range(len(layers))):
        layer, used = layers[number], lanes.shape[1]
        # z acts by f(z), by the factor f'(z) of all lanes, and by the factor f''(z) of the squares
        third = plan.rule.third(layer.z, layer.output, layer.first, layer.second)
        z = (layer.first * value).addcmul_(layer.second, (lanes * layer.slopes[:, :used]).sum(1))
        z.addcmul_(third, layer.square * lanes[:, 0])
        bent = (layer.second * lanes[:, 0]).unsqueeze(1)
        if sums and not number:  # summed before the rows are as many as they are
            slopes, bent = torch.bmm(lanes, layer.first.unsqueeze(2)), bent.sum(2, keepdim=True)
        else:
            slopes = layer.first.unsqueeze(1) * lanes
        if used == row:
            slopes = torch.cat([slopes, bent.mul_(2) * layer.slopes[:, row:]], 1)
        else:
            slopes[:, row:].addcmul_(bent, layer.slopes[:, row:], value=2)
        yield Adjoint(z, slopes, layer.value, layer.lanes)
        if number:
            weight = parameters[number][0]
            value, lanes = _times(weight.T, z), _through(weight.T, slopes)


def _gradients(
    adjoints: Tensor, layers: Sequence[Layer], last: tuple[Tensor, Tensor], parameters: Parameters, plan: Plan
) -> list[Tensor]:
    """Gradients in the order of the parameters."""
    gradients: list[Tensor] = []
    for adjoint in pull_back(adjoints, layers, last, parameters, plan, sums=True):
        weight = _times(adjoint.slopes.flatten(1), adjoint.lanes.flatten(1).T)
        gradients[:0] = [weight + _times(adjoint.z, adjoint.value.T), adjoint.z.sum(1)]
    return gradients


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


class _Outputs(torch.autograd.Function):
    """The outputs of `propagate` as a function of the parameters."""

    @staticmethod
    def forward(ctx: Any, points: Tensor, lanes: Tensor, plan: Plan, compiles: bool, *flat: Tensor) -> Tensor:
        parameters = list(zip(flat[::2], flat[1::2], strict=True))
        function = _compiled(propagate) if compiles else propagate
        outputs, ctx.layers, ctx.last = function(points, lanes, parameters, plan)
        ctx.save_for_backward(*flat)
        ctx.plan, ctx.compiles = plan, compiles
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, adjoints: Tensor) -> tuple[Any, ...]:
        flat = ctx.saved_tensors
        parameters = list(zip(flat[::2], flat[1::2], strict=True))
        function = _compiled(_gradients) if ctx.compiles else _gradients
        gradients = function(adjoints.contiguous(), ctx.layers, ctx.last, parameters, ctx.plan)
        return None, None, None, None, *gradients


def outputs_of(points: Tensor, lanes: Tensor, parameters: Parameters, plan: Plan, compiles: bool = False) -> Tensor:
    """Value and first lanes (1 + num_outputs, N), differentiable once with respect to the parameters.

    Args:
        points: (N, inputs).
        lanes: (K, inputs); zeros, then the directions, constants.
        parameters: of at least two layers, the last one with one output.
        plan: what is wanted.
        compiles: run through `torch.compile`, which compiles again for every shape.
    """
    if not torch.is_grad_enabled() and not compiles:
        return propagate_alone(points, lanes, parameters, plan)
    return _Outputs.apply(points, lanes, plan, compiles, *(tensor for pair in parameters for tensor in pair))


# ---- per-sample Jacobian ---------------------------------------------------------------------------------------------


def propagate_values(points: Tensor, parameters: Parameters, rule: Rule) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Values (N,), and the input of every layer with the slope of the activation that made it (ones for the points)."""
    inputs = [(points, torch.ones_like(points))]
    for weight, bias in parameters[:-1]:
        value, first, _ = rule.values(torch.addmm(bias, inputs[-1][0], weight.T))
        inputs.append((value, first))
    weight, bias = parameters[-1]
    return inputs[-1][0] @ weight[0] + bias, inputs


def fill_jacobian_of_values(
    rows: Tensor, adjoint: Tensor, inputs: Sequence[tuple[Tensor, Tensor]], parameters: Parameters
) -> None:
    """Writes d residual / d parameters (N, P) into `rows`, from the adjoint (N,) of the values."""
    z = adjoint.unsqueeze(-1)
    for (value, first), (weight, _), (weight_rows, bias_rows) in zip(
        reversed(inputs), reversed(parameters), reversed(_blocks(rows, parameters)), strict=True
    ):
        torch.mul(z.unsqueeze(2), value.unsqueeze(1), out=weight_rows)
        bias_rows.copy_(z)
        z = (z @ weight) * first


def fill_jacobian(
    rows: Tensor,
    adjoints: Tensor,
    layers: Sequence[Layer],
    last: tuple[Tensor, Tensor],
    parameters: Parameters,
    plan: Plan,
) -> None:
    """Writes d residual / d parameters (N, P) into `rows`; see `pull_back` for the other arguments."""
    steps = pull_back(adjoints, layers, last, parameters, plan)
    for adjoint, (weight_rows, bias_rows) in zip(steps, reversed(_blocks(rows, parameters)), strict=True):
        _fill_weight(weight_rows, adjoint)
        bias_rows.copy_(adjoint.z.T)


FEW_LANES = 8
"""Up to here outer products are added up one by one; a batch of small matrix products pays beyond."""


def _fill_weight(rows: Tensor, adjoint: Adjoint) -> None:
    """rows (N, width, inputs) = sum of the outer products of adjoints and inputs, sample by sample."""
    torch.mul(adjoint.z.T.unsqueeze(2), adjoint.value.T.contiguous().unsqueeze(1), out=rows)
    slopes, lanes = adjoint.slopes.permute(1, 2, 0).contiguous(), adjoint.lanes.permute(1, 2, 0).contiguous()
    if len(slopes) <= FEW_LANES:
        for slope, lane in zip(slopes, lanes, strict=True):
            rows.addcmul_(slope.unsqueeze(2), lane.unsqueeze(1))
    elif lanes.shape[1] == 1:
        rows.add_(torch.tensordot(slopes, lanes[:, 0], dims=([0], [0])))
    else:
        rows.add_(torch.bmm(slopes.permute(1, 2, 0), lanes.transpose(0, 1)))


def _blocks(rows: Tensor, parameters: Parameters) -> list[tuple[Tensor, Tensor]]:
    """Views of the columns of each weight (N, width, inputs) and bias (N, width)."""
    ends = [0]
    for weight, bias in parameters:
        ends += [ends[-1] + weight.numel(), ends[-1] + weight.numel() + bias.numel()]
    parts = [rows[:, start:end] for start, end in pairwise(ends)]
    shapes = [weight.shape for weight, _ in parameters]
    return [(part.unflatten(1, shape), bias) for part, bias, shape in zip(parts[::2], parts[1::2], shapes, strict=True)]
