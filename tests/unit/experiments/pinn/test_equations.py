"""Every equation: the exact solution has no residual and others have; lifts, loading by name and from a file."""

import contextlib

import by_autograd
import pytest
import torch
from heat import HEAT, write_heat

from data_loaders.collocation import uniform_points
from experiments.models.mlp import Derivatives
from experiments.pinn.accuracy import solutions
from experiments.pinn.burgers import Burgers2d, Burgers100d, TwoBody
from experiments.pinn.equation import Equation, compose
from experiments.pinn.equations import load_equation

CASES = [
    Burgers2d(),
    Burgers2d(nu=0.01, graded=0.5),
    Burgers100d(),
    Burgers100d(dimension=2),
    TwoBody(),
    TwoBody(dimension=3, amplitude=1.0, deviation=1.0),
]
case = pytest.mark.parametrize("equation", CASES, ids=lambda equation: equation.label)


def derivatives(function, points):
    return Derivatives(*(part.detach() for part in by_autograd.derivatives(function, points)))


def points_of(equation, count=8):
    return equation.sample(uniform_points("sobol", count, equation.num_space + 1, 5))


def largest_terms(equation, points, u, source):
    """The sum of the sizes of the terms: residuals where one derivative after the other is kept."""
    zero = torch.zeros_like(u.value)
    kept = [Derivatives(zero, u.time, zero, zero, zero), Derivatives(u.value, zero, u.gradient_sum, zero, zero)]
    kept += [Derivatives(zero, zero, zero, u.laplacian, zero), Derivatives(zero, zero, zero, zero, u.gradient_square)]
    return source.abs() + sum(equation.residual(points, part, zero).abs() for part in kept)


@case
def test_exact_solution_has_no_residual_and_others_have(equation):
    points = points_of(equation)
    source = equation.source(points)

    def relative_residual(function):
        u = derivatives(function, points)
        return equation.residual(points, u, source).abs() / largest_terms(equation, points, u, source)

    assert relative_residual(equation.exact).max() < 1e-12
    assert relative_residual(lambda p: 1.01 * equation.exact(p)).max() > 1e-5
    assert relative_residual(lambda p: equation.exact(p) * (1 + 0.01 * p[:, -1:])).max() > 1e-5


@case
def test_conditions_are_values_of_the_solution(equation):
    points, values = equation.conditions(uniform_points("latin_hypercube", 16, equation.num_space + 1, 0))
    assert points.shape == (16, equation.num_space + 1) and values.shape == (16, 1)
    torch.testing.assert_close(values, equation.exact(points), rtol=1e-13, atol=1e-14 * float(values.abs().max()))


@case
def test_lift_meets_the_conditions_and_leaves_room_for_the_solution(equation):
    if isinstance(equation, Burgers100d):
        assert equation.lift(points_of(equation)) is None
        return
    points = points_of(equation)
    for index, part in enumerate(equation.lift(points)):
        expected = derivatives(lambda p, index=index: equation.lift(p)[index].value + 0 * p.pow(3).sum(), points)
        for name, found, right in zip(part._fields, part, expected, strict=True):
            torch.testing.assert_close(
                found, right, rtol=1e-11, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
            )
    if isinstance(equation, Burgers2d):
        given, values = equation.conditions(uniform_points("sobol", 64, 2, 0))
    else:
        given = points.clone()
        given[:, -1] = 0.0
        values = equation.exact(given)
    a, b = equation.lift(given)
    torch.testing.assert_close(a.value, values, rtol=0, atol=1e-14)
    assert float(b.value.abs().max()) < 1e-15 < float(equation.lift(points)[1].value.abs().max())


@case
def test_product_rule_equals_autograd(equation):
    """With the lift in front of a function of all inputs, also where |grad u|^2 is not offered."""
    if equation.lift(points_of(equation)) is None:
        return

    def network(p):
        return torch.tanh(p.sum(dim=1, keepdim=True) + 0.3 * p[:, -1:] * p[:, :1])

    def lifted(p):
        a, b = equation.lift(p)
        return a.value + b.value * network(p)

    points = points_of(equation)
    found = compose(*equation.lift(points), derivatives(network, points), equation.num_space)
    expected = derivatives(lifted, points)
    names = found._fields if equation.num_space == 1 else found._fields[:-1]
    for name in names:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-10, atol=1e-10)
    assert equation.num_space == 1 or bool(found.gradient_square.isnan().all())


@case
def test_equations_work_in_the_dtype_of_the_points(equation):
    uniform = uniform_points("sobol", 16, equation.num_space + 1, 1)
    points, single = equation.sample(uniform), equation.sample(uniform).float()
    assert equation.sample(uniform.float()).dtype == torch.float32
    assert equation.conditions(uniform.float())[0].dtype == torch.float32
    u = Derivatives(*torch.rand(5, 16, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    source = equation.source(single)
    residual = equation.residual(single, Derivatives(*(part.float() for part in u)), source)
    assert source.dtype == residual.dtype == torch.float32
    expected = equation.residual(points, u, equation.source(points))
    torch.testing.assert_close(residual.double(), expected, rtol=1e-3, atol=1e-4)
    for part in equation.lift(single) or ():
        assert {value.dtype for value in part} == {torch.float32}
    for predict in equation.predictors().values():
        assert predict(single).dtype == torch.float32 and predict(single).shape == (16, 1)


@case
def test_test_points_are_always_the_same_and_lie_where_training_points_do(equation):
    first, again = equation.test_points(), equation.test_points()
    assert list(first) == list(again) and all(torch.equal(first[name], again[name]) for name in first)
    for points in first.values():
        assert points.dtype == torch.float64 and points.shape[1] == equation.num_space + 1
    main = next(iter(first.values()))
    other = equation.sample(uniform_points("sobol", 2048, equation.num_space + 1, 9))
    torch.testing.assert_close(main.std(dim=0).mean(), other.std(dim=0).mean(), rtol=0.3, atol=0)


def test_a_set_of_test_points_may_be_one_point_but_not_none(tmp_path):
    x = "torch.linspace(0, 1, 11, dtype=torch.float64)"
    write_heat(tmp_path, HEAT.replace(x, "torch.full((1,), 0.5, dtype=torch.float64)"))
    assert len(solutions(load_equation("heat.py", {}, tmp_path))["grid"][0]) == 1
    write_heat(tmp_path, HEAT.replace(x, "torch.zeros(0, dtype=torch.float64)"), "empty.py")
    with pytest.raises(ValueError, match=r"'grid' must be a tensor of shape \(1, 2\), got \(0, 2\)"):
        load_equation("empty.py", {}, tmp_path)


def test_an_equation_is_loaded_from_a_file(tmp_path):
    path = write_heat(tmp_path, HEAT)
    for name in ("heat.py", str(path)):
        equation = load_equation(name, {"mode": 2}, tmp_path)
        assert isinstance(equation, Equation) and equation.label == "heat equation, mode 2"
    points = points_of(equation)
    u = derivatives(equation.exact, points)
    assert equation.residual(points, u, equation.source(points)).abs().max() < 1e-13
    assert equation.lift(points) is None and equation.grid() is None and not equation.degenerate
    assert list(solutions(equation)) == ["grid"] and list(equation.predictors()) == ["zero"]
    with pytest.raises(ValueError, match=r"heat\.py is not a file"):
        load_equation("heat.py", {}, tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = (", "cannot be imported: SyntaxError: .*line 1"),
        ("from experiments.pinn.burgers import TwoBody", "must define exactly one .*, it defines none"),
        (HEAT + "\n    class Second(Heat):\n        pass\n", "exactly one .*, it defines Heat, Second"),
        (HEAT.replace("return uniform", "return uniform[:, :1]"), "sample must be .* shape .3, 2., got .3, 1."),
        (HEAT.replace("def residual(", "def pde("), "equation Heat does not define residual"),
        (HEAT.replace("num_space = 1", ""), "Heat: num_space must be an integer >= 1, got None"),
        (HEAT.replace("def test_points(", "def points("), "equation Heat does not define test_points"),
        (HEAT.replace("points, self.exact(points)", "points, self.exact(points)[:, 0]"), r"values of conditions must"),
        (HEAT.replace("self.diffusivity * u.laplacian", "points"), r"residual must be .* shape .3, 1., got .3, 2."),
        (HEAT.replace("u.laplacian", "u.lap"), r"Heat: residual failed: AttributeError: .* has no attribute 'lap'"),
        (HEAT.replace("num_space = 1", "num_space = math.po"), r"imported: AttributeError: .*heat\.py, line 10\)"),
        (HEAT.replace("= diffusivity, mode", "= {}['x']"), r"Heat: __init__ failed: KeyError: 'x' \(.*line 13\)"),
        (HEAT.replace("num_space = 1", "num_space = True"), "Heat: num_space must be an integer >= 1, got True"),
        (HEAT.replace('f"heat equation, mode {mode}"', "mode"), "Heat: label must be a text, got 1"),
        (HEAT.replace("return points, self.exact(points)", "return points"), "two tensors, points .*, got Tensor"),
        (
            HEAT.replace("points, self.exact(points)", "points, torch.zeros(len(points), 1)").replace(
                "* torch.sin(k * points[:, :1])", "[:, 0] * torch.sin(k * points[:, 0])"
            ),
            r"exact must be a tensor of shape \(3, 1\), got \(3,\)",
        ),
        (HEAT.replace("cartesian_prod(x, x)", "cartesian_prod(x, x, x)"), r"points 'grid' must be .*got \(3, 3\)"),
        (HEAT.replace('{"grid": torch.cartesian_prod(x, x)}', "x"), "test_points must return a mapping .*got Tensor"),
        (HEAT.replace("return u.time -", "return 1e400 + u.time -"), "residual must be finite, got inf"),
        (HEAT + "\n        def source(self, points):\n            return None\n", "source must be a .* NoneType"),
        (
            HEAT + '\n        def predictors(self):\n            return {"flat": lambda points: points[:, 0]}\n',
            r"predictor 'flat' must be a tensor of shape \(3, 1\), got \(3,\)",
        ),
        (
            HEAT + '\n        def predictors(self):\n            return {"flat": lambda points: points.colour}\n',
            r"predictor 'flat' failed: AttributeError: .*heat\.py",
        ),
        (
            HEAT + "\n        def grid(self):\n            return torch.zeros(3, 2), torch.zeros(3)\n",
            r"coordinates x of grid must be a tensor of shape \(6,\), got \(3, 2\)",
        ),
        (HEAT + "\n        def grid(self):\n            return torch.zeros(3)\n", "grid must be None, or .*got Tensor"),
    ],
)
def test_a_file_that_defines_no_equation_is_explained(tmp_path, text, message):
    write_heat(tmp_path, text)
    with pytest.raises(ValueError, match=message) as caught:
        load_equation("heat.py", {}, tmp_path)
    assert "\n" not in str(caught.value)


SECOND_COLUMN = (
    HEAT.replace("num_space = 1", "num_space = 2")
    .replace("[uniform[:, :1]", "[uniform[:, :2]")
    .replace("* points[:, 1:])", "* points[:, 2:])")
    .replace("cartesian_prod(x, x)", "cartesian_prod(x, x, x)")
)


@pytest.mark.parametrize(
    ("factor", "square", "more", "is_covered"),
    [
        ("1", "0", "", True),
        ("1", "1", "", False),
        ("1", "0", "\n        uses_gradient_square = True\n", False),
        ("points[:, 1:2]", "0", "", False),  # depends on space, whatever is said of its derivatives
    ],
)
def test_a_lift_that_the_product_rule_does_not_cover_is_refused(tmp_path, factor, square, more, is_covered):
    lift = f"""
        def lift(self, points):
            from experiments.models.mlp import Derivatives
            zero = torch.zeros_like(points[:, :1])
            b = Derivatives(points[:, -1:] * {factor}, zero + {factor}, zero, zero, zero + {square})
            return Derivatives(zero, zero, zero, zero, zero * math.nan), b
    """
    write_heat(tmp_path, SECOND_COLUMN + lift + more)
    refusal = pytest.raises(ValueError, match="Heat: with 2 spatial columns a lift needs a factor b that depends on")
    with contextlib.nullcontext() if is_covered else refusal:
        assert load_equation("heat.py", {}, tmp_path).num_space == 2


LIFT = """
        def lift(self, points):
            from experiments.models.mlp import Derivatives
            x, t = points.detach().split(1, dim=1)
            zero, sine, cosine = torch.zeros_like(x), torch.sin(20 * x), 20 * torch.cos(20 * x)
            b = x * (1 - x) * t
            b_x = (1 - 2 * x) * t
            a = Derivatives(sine, zero, cosine, -400 * sine, cosine**2)
            return a, Derivatives(b, x * (1 - x), b_x, -2 * t, b_x**2)
"""


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("(b, x * (1 - x),", "(b, x,", r"Heat: time of b of the lift must be 0\.\d+ at a point, by diff.*, got 0\.\d+"),
        ("(1 - 2 * x) * t", "(1 + 2 * x) * t", "gradient_sum of b of the lift must be"),
        ("-2 * t", "2 * t", "laplacian of b of the lift must be"),
        ("zero, cosine,", "zero, cosine / 20,", "gradient_sum of a of the lift must be"),
        ("-400 * sine", "-20 * sine", "laplacian of a of the lift must be"),
        ("(sine, zero,", "(sine, zero + 1,", "time of a of the lift must be"),
        ("(sine, zero,", "(sine[:, 0], zero,", r"value of a of the lift must be .* shape \(3, 1\), got \(3,\)"),
        ("return a, D", "return D", "lift must return None or two Derivatives, of a and b, got Derivatives|5 values"),
    ],
)
def test_a_lift_with_a_wrong_derivative_is_refused(tmp_path, right, wrong, message):
    write_heat(tmp_path, HEAT + LIFT)
    assert load_equation("heat.py", {}, tmp_path)
    assert right in LIFT
    write_heat(tmp_path, HEAT + LIFT.replace(right, wrong))
    with pytest.raises(ValueError, match=message):
        load_equation("heat.py", {}, tmp_path)


def test_a_residual_that_reads_the_gradient_says_so(tmp_path):
    reads = SECOND_COLUMN.replace("return u.time -", "return u.gradient_square + u.time -")
    write_heat(tmp_path, reads)
    with pytest.raises(ValueError, match=r"reads u\.gradient_square, so uses_gradient_square must be True, got False"):
        load_equation("heat.py", {}, tmp_path)
    write_heat(tmp_path, reads + "\n        uses_gradient_square = True\n")
    assert load_equation("heat.py", {}, tmp_path).num_space == 2


def test_a_grid_is_of_one_spatial_column(tmp_path):
    grid = "\n        def grid(self):\n            return torch.zeros(3), torch.zeros(3)\n"
    write_heat(tmp_path, SECOND_COLUMN + grid)
    with pytest.raises(ValueError, match=r"grid must be None, or .* one spatial column, got 2 values with num_space"):
        load_equation("heat.py", {}, tmp_path)


def test_a_constructor_may_take_any_options(tmp_path):
    text = HEAT.replace("diffusivity=0.1, mode=1", "diffusivity, *rest, mode=1, **more")
    write_heat(tmp_path, text)
    assert load_equation("heat.py", {"diffusivity": 0.2, "other": 1}, tmp_path).diffusivity == 0.2
    with pytest.raises(ValueError, match=r"missing a required argument: 'diffusivity'; it takes diffusivity, rest"):
        load_equation("heat.py", {}, tmp_path)


def test_the_solution_is_evaluated_in_blocks(monkeypatch):
    equation = TwoBody(dimension=4)
    whole = solutions(equation)["sobol"][1]
    sizes, exact = [], equation.exact
    monkeypatch.setattr("experiments.pinn.accuracy.BLOCK_ELEMENTS", 4 * 3000)
    monkeypatch.setattr(equation, "exact", lambda points: sizes.append(len(points)) or exact(points))
    torch.testing.assert_close(solutions(equation)["sobol"][1], whole, rtol=1e-14, atol=1e-14)
    assert sizes == [3000, 3000, 3000, 1000]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("burgers", {}, "must be one of burgers_2d, burgers_100d, two_body, or the path of a .py file, got 'burgers'"),
        ("burgers_2d", {"viscosity": 1}, "fit equation Burgers2d: got an unexpected .* 'viscosity'; it takes nu"),
        ("burgers_2d", {"nu": 0}, "nu must be greater than or equal to 0.000318"),
        ("heat.py", {"nu": 1}, "fit equation Heat: got an unexpected .* 'nu'; it takes diffusivity, mode"),
    ],
)
def test_wrong_names_and_options_are_explained(tmp_path, name, options, message):
    write_heat(tmp_path, HEAT)
    with pytest.raises(ValueError, match=message):
        load_equation(name, options, tmp_path)


def test_an_equation_without_a_known_solution_is_loaded(tmp_path):
    text = HEAT.replace("def exact(", "def values(").replace("self.exact(", "self.values(")
    write_heat(tmp_path, text.replace("def test_points(", "def points("))
    assert solutions(load_equation("heat.py", {}, tmp_path)) == {}
