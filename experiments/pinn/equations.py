"""The equations by name, and those of users' files; each is tried on a few points before anything is trained."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.models.mlp import Derivatives
from experiments.pinn.burgers import Burgers2d, Burgers100d, TwoBody
from experiments.pinn.equation import Equation
from experiments.settings.suggestion import did_you_mean

EQUATIONS: dict[str, type[Equation]] = {
    "burgers_2d": Burgers2d,
    "burgers_100d": Burgers100d,
    "two_body": TwoBody,
}
"""What `problem.equation` may name, beside a Python file."""


def load_equation(name: str, options: Mapping[str, Any], folder: str | Path) -> Equation:
    """The equation that a configuration asks for.

    Args:
        name: a key of `EQUATIONS`, or the path of a Python file, from `folder` on, that defines exactly one subclass of
            `Equation`.
        options: keyword arguments of its constructor.
        folder: where the configuration's file is.

    Raises:
        ValueError: no such equation, a file that does not define one, options that it does not take, or a method that
            fails, or returns what it must not, on a few points; one sentence.
    """
    if name.endswith(".py"):
        chosen = _equation_in(Path(folder) / name)
    elif name in EQUATIONS:
        chosen = EQUATIONS[name]
    else:
        raise ValueError(
            f"equation must be one of {', '.join(EQUATIONS)}, or the path of a .py file, got {name!r}"
            f"{did_you_mean(name, EQUATIONS)}"
        )
    equation = _made(chosen, options)
    points = _check_training(equation)
    _check_lift(equation, points)
    if name.endswith(".py"):  # those of the suite have tests, and much to compute
        _check_solution(equation, points)
    return equation


def _equation_in(path: Path) -> type[Equation]:
    """The one subclass of `Equation` that the file defines."""
    if not path.is_file():
        raise ValueError(f"equation: {path} is not a file")
    name = "equation_" + hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # the suffix is .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ValueError(f"equation: {path} cannot be imported: {_sentence(error, spec.origin or '')}") from None
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Equation) and value.__module__ == name
    ]
    if len(found) != 1:
        names = ", ".join(value.__name__ for value in found) or "none"
        raise ValueError(f"equation: {path} must define exactly one subclass of Equation, it defines {names}")
    return found[0]


def _made(chosen: type[Equation], options: Mapping[str, Any]) -> Equation:
    """The equation with its options, which has all that it must define."""
    name, signature = chosen.__name__, inspect.signature(chosen)
    missing = sorted(chosen.__abstractmethods__)
    if chosen.exact is not Equation.exact and chosen.test_points is Equation.test_points:
        missing.append("test_points")
    if missing:
        raise ValueError(f"equation {name} does not define {', '.join(missing)}")
    try:
        signature.bind(**options)
    except TypeError as error:
        takes = ", ".join(signature.parameters) or "none"
        raise ValueError(f"options do not fit equation {name}: {error}; it takes {takes}") from None
    try:
        equation = chosen(**options)
    except ValueError:
        raise  # what the equation says of its options
    except Exception as error:
        raise ValueError(_failed(chosen, "__init__", error)) from None
    num_space, label = (getattr(equation, attribute, None) for attribute in ("num_space", "label"))
    if type(num_space) is not int or num_space < 1:
        raise ValueError(f"equation {name}: num_space must be an integer >= 1, got {num_space!r}")
    if not isinstance(label, str):
        raise ValueError(f"equation {name}: label must be a text, got {label!r}")
    return equation


def _call(equation: Equation, method: str, *arguments: Any) -> Any:
    """What a method returns; a mistake in it becomes one sentence."""
    try:
        return getattr(equation, method)(*arguments)
    except Exception as error:
        if method == "exact" and isinstance(error, NotImplementedError):
            raise  # a solution that is not known
        raise ValueError(_failed(type(equation), method, error)) from None


def _failed(chosen: type[Equation], method: str, error: Exception) -> str:
    file = getattr(sys.modules[chosen.__module__], "__file__", None) or ""
    return f"equation {chosen.__name__}: {method} failed: {_sentence(error, file)}"


def _sentence(error: Exception, file: str) -> str:
    """The error in one line, and the last line of the file that it came through."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f"{text} ({file}, line {lines[-1]})" if lines else text


def _column(equation: Equation, method: str, *arguments: Any) -> Tensor:
    """What a method returns, which is one finite number for each of the points, the first argument."""
    found = _call(equation, method, *arguments)
    _check_array(equation, method, found, (len(arguments[0]), 1))
    return found


def _check_array(equation: Equation, what: str, found: Any, shape: tuple[int, ...], finite: bool = True) -> None:
    name = type(equation).__name__
    if not isinstance(found, Tensor) or tuple(found.shape) != shape:
        got = tuple(found.shape) if isinstance(found, Tensor) else _kind(found)
        raise ValueError(f"equation {name}: {what} must be a tensor of shape {shape}, got {got}")
    if finite and not bool(found.isfinite().all()):
        raise ValueError(f"equation {name}: {what} must be finite, got {float(found[~found.isfinite()][0])}")


def _is_pair(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2


def _kind(value: Any) -> str:
    return f"{len(value)} values" if isinstance(value, (tuple, list)) else type(value).__name__


def _check_training(equation: Equation) -> Tensor:
    """What training asks for, on three points, which are returned."""
    name, columns = type(equation).__name__, equation.num_space + 1
    generator = torch.Generator().manual_seed(0)
    uniform, values = (0.25 + 0.5 * torch.rand(3, n, generator=generator, dtype=torch.float64) for n in (columns, 5))
    points: Tensor = _call(equation, "sample", uniform)
    _check_array(equation, "sample", points, (3, columns))
    pair = _call(equation, "conditions", uniform)
    if not _is_pair(pair) or not isinstance(pair[0], Tensor):
        raise ValueError(f"equation {name}: conditions must return two tensors, points and values, got {_kind(pair)}")
    _check_array(equation, "points of conditions", pair[0], (len(pair[0]), columns))
    _check_array(equation, "values of conditions", pair[1], (len(pair[0]), 1))
    source = _column(equation, "source", points)
    u = Derivatives(*values.split(1, dim=1))
    _column(equation, "residual", points, u, source)
    if equation.num_space > 1 and not equation.uses_gradient_square:  # then the network does not compute it
        u = u._replace(gradient_square=torch.full_like(u.value, torch.nan))
        if not bool(_call(equation, "residual", points, u, source).isfinite().all()):
            raise ValueError(
                f"equation {name}: residual reads u.gradient_square, so uses_gradient_square must be True, got "
                f"{equation.uses_gradient_square!r}"
            )
    return points


def _check_solution(equation: Equation, points: Tensor) -> None:
    """What errors, fields and trivial rivals are computed from, on a few points."""
    name, columns = type(equation).__name__, equation.num_space + 1
    for rival, predict in _mapping(equation, "predictors").items():
        try:
            predicted = predict(points)
        except Exception as error:
            raise ValueError(_failed(type(equation), f"predictor {rival!r}", error)) from None
        _check_array(equation, f"predictor {rival!r}", predicted, (len(points), 1))
    grid = _call(equation, "grid")
    if grid is not None:
        if equation.num_space != 1 or not _is_pair(grid):
            raise ValueError(
                f"equation {name}: grid must be None, or coordinates x and t with one spatial column, got "
                f"{_kind(grid)} with num_space = {equation.num_space}"
            )
        for axis, found in zip("xt", grid, strict=True):
            _check_array(equation, f"coordinates {axis} of grid", found, (getattr(found, "numel", int)(),))
    try:
        _column(equation, "exact", points)
    except NotImplementedError:
        return
    for key, found in _mapping(equation, "test_points").items():
        has_rows = isinstance(found, Tensor) and found.ndim > 0
        some = found[:3] if has_rows else found
        _check_array(equation, f"first test points {key!r}", some, (max(1, len(some)) if has_rows else 3, columns))
        _column(equation, "exact", some)


def _mapping(equation: Equation, method: str) -> Mapping[str, Any]:
    found = _call(equation, method)
    if not isinstance(found, Mapping):
        raise ValueError(
            f"equation {type(equation).__name__}: {method} must return a mapping from names, got {_kind(found)}"
        )
    return found


def _check_lift(equation: Equation, points: Tensor) -> None:
    """Shapes of a lift, its derivatives against differences, and what `compose` assumes of it."""
    name, num_space = type(equation).__name__, equation.num_space
    lift = _call(equation, "lift", points)
    if lift is None:
        return
    if not _is_pair(lift) or not all(isinstance(part, Derivatives) for part in lift):
        raise ValueError(f"equation {name}: lift must return None or two Derivatives, of a and b, got {_kind(lift)}")
    for index, part in enumerate(lift):
        for entry, found in zip(part._fields, part, strict=True):
            what, is_used = f"{entry} of {'ab'[index]} of the lift", entry != "gradient_square"
            _check_array(equation, what, found, (len(points), 1), finite=is_used)
    if num_space > 1:
        moved = torch.cat([points[:, :-1].roll(1, dims=0), points[:, -1:]], dim=1)  # other x at the same t
        b, b_moved = lift[1], _call(equation, "lift", moved)[1]
        depends = any(bool(part.any()) for part in (b.gradient_sum, b.laplacian, b.gradient_square))
        if equation.uses_gradient_square or depends or not torch.allclose(b.value, b_moved.value, rtol=1e-12, atol=0):
            raise ValueError(
                f"equation {name}: with {num_space} spatial columns a lift needs a factor b that depends on time "
                "only, and a residual without gradient_square"
            )
    for entry in ("time", "gradient_sum", *(["laplacian"] if num_space == 1 else [])):
        for index, part in enumerate(lift):
            _check_derivative(equation, points, index, entry, getattr(part, entry))


def _check_derivative(equation: Equation, points: Tensor, index: int, entry: str, claimed: Tensor) -> None:
    """A derivative of a or b against differences of two steps, whose own error is what they differ by."""
    columns = slice(-1, None) if entry == "time" else slice(-1)

    def difference(step: float) -> Tensor:
        """Fourth order, along time or along the sum of the spatial columns."""
        values = []
        for count in (-2, -1, 0, 1, 2):
            moved = points.clone()
            moved[:, columns] += count * step
            values.append(_call(equation, "lift", moved)[index].value)
        far_left, left, center, right, far_right = values
        if entry == "laplacian":
            return (16 * (left + right) - far_left - far_right - 30 * center) / (12 * step**2)
        return (8 * (right - left) - (far_right - far_left)) / (12 * step)

    step = 3e-3 * (float(points[:, columns].std(dim=0).mean()) or 1.0)
    fine, coarse = difference(step), difference(2 * step)
    value = _call(equation, "lift", points)[index].value
    rounding = 50 * torch.finfo(value.dtype).eps * float(value.abs().max()) / step ** (2 if entry == "laplacian" else 1)
    allowed = 1e-3 * torch.maximum(claimed.abs(), fine.abs()) + 10 * (fine - coarse).abs() + 1e-6 + rounding
    wrong = (claimed - fine).abs() > allowed  # not where the lift is NaN beside the domain
    if bool(wrong.any()):
        raise ValueError(
            f"equation {type(equation).__name__}: {entry} of {'ab'[index]} of the lift must be "
            f"{float(fine[wrong][0]):.6g} at a point, by differences of its value, got {float(claimed[wrong][0]):.6g}"
        )
