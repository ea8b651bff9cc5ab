"""experiments.models: derivatives of the network against autograd, in float64."""

import re
import shutil

import pytest
import torch
from by_autograd import derivatives, gradients
from torch._dynamo.utils import counters
from torch.nn.utils import parameters_to_vector

from experiments.models.derivatives import RULES
from experiments.models.mlp import MLP

SMOOTH = list(RULES)
TOLERANCE = 1e-10


def network(sizes, activation="tanh", seed=0):
    """A network with larger weights than the default ones, so that second derivatives count."""
    torch.manual_seed(seed)
    model = MLP(sizes, activation).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.7)
    return model


def points_of(count, columns, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, columns, dtype=torch.float64, generator=generator) * 2 - 1


def nonlinear(outputs, wrong=0.0):
    """A loss that mixes all five, not symmetric in any two."""
    value, time, gradient_sum, laplacian, square = outputs
    residual = (1 + wrong) * time + value * gradient_sum - 0.3 * laplacian + 0.2 * square * value + torch.sin(square)
    return (residual.square() + 0.1 * residual * laplacian).mean()


def difference(ours, theirs):
    """The largest relative difference, each tensor against its own largest element."""
    pairs = [(a.detach(), b.detach()) for a, b in zip(ours, theirs, strict=True)]
    assert all(a.shape == b.shape for a, b in pairs)
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-3)) for a, b in pairs)


def assert_equal_to_autograd(model, points, **options):
    ours, theirs = model.derivatives(points, **options), derivatives(model, points)
    assert difference(ours, theirs) < TOLERANCE
    wanted = gradients(model, nonlinear(theirs))
    assert difference(gradients(model, nonlinear(ours)), wanted) < TOLERANCE
    assert difference(gradients(model, nonlinear(model.derivatives(points, **options), wrong=1e-4)), wanted) > 1e-7


def set_first_weight(model, singular_values):
    """A first layer with these singular values of its spatial part."""
    weight = model.linears[0].weight
    with torch.no_grad():
        left, _, right = torch.linalg.svd(weight[:, :-1], full_matrices=False)
        weight[:, :-1] = left @ torch.diag(singular_values.to(weight)) @ right


# ---- derivatives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes", [(2, 7, 1), (2, 8, 6, 5, 1), (4, 7, 6, 1), (8, 7, 5, 1), (13, 6, 1), (13, 6, 9, 5, 1), (5, 1, 1)], ids=str
)
def test_derivatives_are_those_of_autograd(sizes):
    assert_equal_to_autograd(network(sizes), points_of(9, sizes[0]))


@pytest.mark.parametrize("activation", SMOOTH)
@pytest.mark.parametrize("sizes", [(2, 6, 5, 1), (9, 5, 7, 1)], ids=str)
def test_any_smooth_activation(sizes, activation):
    assert_equal_to_autograd(network(sizes, activation), points_of(9, sizes[0]))


@pytest.mark.parametrize("outcome", ["ill-conditioned", "rank-deficient", "zero"])
@pytest.mark.parametrize("sizes", [(5, 9, 6, 1), (7, 6, 6, 1), (30, 8, 6, 1)], ids=str)
def test_first_layers_of_any_condition(sizes, outcome):
    model = network(sizes)
    number = min(sizes[0] - 1, sizes[1])
    values = torch.logspace(0, -12, number, dtype=torch.float64) * 2
    if outcome == "rank-deficient":
        values[number // 2 :] = 0
    set_first_weight(model, values * (outcome != "zero"))
    assert_equal_to_autograd(model, points_of(9, sizes[0]))


def test_any_complete_basis_gives_the_same_and_an_incomplete_one_does_not():
    model, points = network((6, 8, 4, 1)), points_of(5, 6)
    rotation = torch.linalg.qr(points_of(5, 5, seed=3)).Q
    wanted = model.derivatives(points)
    assert difference(model.derivatives(points, rotation), wanted) < TOLERANCE
    assert difference(model.derivatives(points, rotation[:, :4]), wanted) > 1e-3


@pytest.mark.parametrize("sizes", [(9, 5, 7, 1), (2, 5, 1)], ids=str)
def test_without_the_sum_of_squares_the_others_are_the_same(sizes):
    model, points = network(sizes), points_of(5, sizes[0])
    full, without = model.derivatives(points), model.derivatives(points, gradient_square=False)
    assert difference(without[:4], full[:4]) < TOLERANCE
    assert bool(without.gradient_square.isnan().all()) == (sizes[0] > 2)


@pytest.mark.parametrize("activation", SMOOTH)
@pytest.mark.parametrize("sizes", [(2, 5, 1), (2, 5, 7, 1), (9, 5, 7, 6, 1)], ids=str)
@pytest.mark.parametrize("gradient_square", [True, False])
def test_without_an_adjoint_the_numbers_are_the_same(sizes, activation, gradient_square):
    model = network(sizes, activation)
    for count in (0, 1, 13):
        points = points_of(count, sizes[0])
        with torch.no_grad():
            alone = model.derivatives(points, gradient_square=gradient_square)
        both = model.derivatives(points, gradient_square=gradient_square)
        for left, right in zip(alone, both, strict=True):
            torch.testing.assert_close(left, right.detach(), rtol=1e-12, atol=1e-13, equal_nan=True)
            assert not left.requires_grad


def test_float32_stays_float32():
    model, points = network((9, 5, 7, 1)).float(), points_of(5, 9).float()
    outputs = model.derivatives(points)
    assert {each.dtype for each in outputs} == {torch.float32}
    assert difference(outputs, derivatives(model, points)) < 1e-4


def test_what_has_no_second_derivative_or_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"second derivative .*got 'relu'"):
        MLP((3, 4, 1), "relu").derivatives(torch.zeros(2, 3))
    for sizes in ((3, 4, 2), (3, 1), (1, 4, 1)):
        with pytest.raises(ValueError, match=rf"one output, got sizes {re.escape(str(sizes))}"):
            MLP(sizes).derivatives(torch.zeros(2, sizes[0]))
    with pytest.raises(ValueError, match=r"shape \(N, 3\), got \(2, 4\)"):
        MLP((3, 4, 1)).derivatives(torch.zeros(2, 4))


# ---- per-sample Jacobian ---------------------------------------------------------------------------------------------


def burgers(u, rows):
    return u.time + u.value * u.gradient_sum - 0.1 * u.laplacian + 0.3 * u.gradient_square.sin()


def jacobian_by_autograd(model, points, residual):
    values = residual(derivatives(model, points), slice(0, len(points)))
    return values.detach(), torch.stack([parameters_to_vector(gradients(model, value)) for value in values[:, 0]])


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize(
    ("sizes", "activation"),
    [((2, 6, 5, 4, 1), "tanh"), ((2, 6, 1), "gelu"), ((14, 5, 6, 1), "silu"), ((14, 12, 11, 1), "tanh")],
    ids=str,
)
def test_per_sample_jacobian(sizes, activation, chunk):
    model, points = network(sizes, activation), points_of(8, sizes[0])
    ours = model.residual_jacobian(points, burgers, chunk)
    theirs = jacobian_by_autograd(model, points, burgers)
    assert not ours[0].requires_grad and not ours[1].requires_grad
    assert difference(ours, theirs) < TOLERANCE
    wrong = model.residual_jacobian(points, lambda u, rows: burgers(u, rows) + 1e-4 * u.time, chunk)
    assert difference(wrong, theirs) > 1e-7


# ---- chunks ----------------------------------------------------------------------------------------------------------


def accumulated(model, points, **options):
    """The mean square of the residual and its gradients, chunk by chunk."""
    model.zero_grad()
    parts = []
    for rows, u in model.chunked_derivatives(points, **options):
        parts.append(burgers(u, rows).square().sum() / len(points))
        parts[-1].backward()
    return [sum(parts), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("sizes", [(2, 6, 5, 1), (12, 5, 6, 1)], ids=str)
@pytest.mark.parametrize("chunk", [None, 1, 4, 100])
def test_chunks_add_up_to_the_whole(sizes, chunk):
    model, points = network(sizes), points_of(11, sizes[0])
    whole = burgers(model.derivatives(points), slice(0, 11)).square().mean()
    assert difference(accumulated(model, points, chunk=chunk), [whole, *gradients(model, whole)]) < 1e-12


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, g++")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own modules
@pytest.mark.parametrize(
    ("sizes", "dtype", "tolerance"),
    [((12, 5, 6, 1), torch.float32, 1e-4), ((2, 6, 5, 1), torch.float64, 1e-11)],
    ids=str,
)
def test_compiled_is_the_same_and_compiles_once_for_chunks_of_any_length(sizes, dtype, tolerance):
    model, points = network(sizes).to(dtype), points_of(11, sizes[0]).to(dtype)
    wanted = accumulated(model, points, chunk=4)
    before = counters["stats"]["unique_graphs"]
    for _ in range(2):
        compiled = accumulated(model, points, chunk=4, compiles=True)  # 4, 4 and 3 points
        assert difference(compiled, wanted) < tolerance
    assert counters["stats"]["unique_graphs"] == before + 2  # forward and backward


def test_rows_of_the_laplacian_count_where_there_are_as_many_for_each_point():
    """Beyond the first hidden layer, and where the sum of their squares is wanted."""
    flat, deep = MLP((3, 64, 1)), MLP((3, 64, 64, 1))
    assert deep.default_chunk(False) == deep.default_chunk() == flat.default_chunk() < flat.default_chunk(False)
