"""The training problem of a physics-informed network: points, loss, errors and fields of one run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_loaders.collocation import adaptive_points, uniform_points
from experiments.distributed.devices import device_of
from experiments.distributed.ranks import Ranks
from experiments.models.mlp import MLP, Derivatives, accumulate_gradient, chunks
from experiments.pinn.equation import Equation, compose
from experiments.pinn.equations import load_equation
from experiments.pinn.settings import PinnConfig
from experiments.settings.run_config import RunConfig
from experiments.training.problem import Description, Field, Observer, Problem, Residuals

ADAPTIVE_SHARE = 0.5
"""Of the interior points that `adaptive_pool` gives; the others stay spread over the domain."""
TRAINED, POOL, CHOICE, UNSEEN, OTHERS = (0, 1), 2, 3, (4, 5), (6, 7)
"""Streams of random numbers of a draw: interior points and conditions, or what `adaptive_pool` needs."""
TEST_CHUNK = 8192
"""Points of test sets and fields that are evaluated at a time."""

Lift = tuple[Derivatives, Derivatives]


class Points(NamedTuple):
    """Collocation points of this rank, (rows, num_space + 1), and what the equation says of them alone.

    Attributes:
        interior: where the residual is asked for.
        source: (rows, 1), at the interior points.
        lift: at the interior points; None with soft conditions.
        conditions: points of the initial and boundary conditions.
        values: (rows, 1), of the solution there.
        condition_lift: there.
        num_interior: interior points of all ranks.
        num_conditions: condition points of all ranks.
    """

    interior: Tensor
    source: Tensor
    lift: Lift | None
    conditions: Tensor
    values: Tensor
    condition_lift: Lift | None
    num_interior: int
    num_conditions: int


class Test(NamedTuple):
    """A set of test points, the lift there (None with soft conditions), and the exact values in float64."""

    points: Tensor
    lift: Lift | None
    exact: Tensor


def describe(config: PinnConfig) -> Description:
    """What determines the points and the solution: the equation, its options and the text of a user's file."""
    text = json.dumps([config.equation, config.options], sort_keys=True)
    if config.equation.endswith(".py"):
        text += (Path(config.folder) / config.equation).read_text(encoding="utf-8")
    equation = _equation(config)
    note = f"{equation.label}: {equation.degenerate}" if equation.degenerate else ""
    return Description("computed", hashlib.sha256(text.encode()).hexdigest()[:16], None, note)


def build(config: RunConfig, ranks: Ranks) -> Problem:
    """The problem of one run: minimize mean r^2 + condition_weight mean (u - u_condition)^2.

    The seed of the run sets the initial weights (drawn in float32, whatever the dtype) and the points. Every rank draws
    all points and keeps each world_size-th; its sums are scaled so that the mean over ranks is the loss, whether the
    points can be divided evenly or not, and one all-reduce averages gradients and loss.
    """
    problem = config.problem
    assert isinstance(problem, PinnConfig)
    device, dtype = device_of(ranks), getattr(torch, problem.dtype)
    equation = _equation(problem)
    torch.manual_seed(config.seed)
    sizes = (equation.num_space + 1, *problem.hidden_sizes, 1)
    model = MLP(sizes, problem.activation).to(device, dtype)
    collocation = _Collocation(equation, problem, config.seed, ranks)
    loss = _Loss(equation, problem, ranks)
    if problem.compile:  # now, for the clock of the training is not to count it
        loss.backward(model, collocation.at(model, 0))
        model.zero_grad()
    reference, predictors = _reference(problem.equation, json.dumps(problem.options, sort_keys=True), problem.folder)
    tests = {}
    for name, (points, exact) in reference.items():
        own = points.to(device)
        lift = _cast(equation.lift(own), dtype) if problem.conditions == "hard" else None
        tests[name] = Test(own.to(dtype), lift, exact.to(device))

    unseen = collocation.unseen()

    def evaluate(network: nn.Module) -> dict[str, float]:
        values = loss.parts(network, collocation.now)
        for name, test in list(tests.items())[:1]:
            values |= {f"metrics/validation/{key}_{name}": value for key, value in _errors(network, test).items()}
        return values | {"metrics/validation/loss": loss.parts(network, unseen)["metrics/train/loss"]}

    def least_squares(check_points: int | None = None) -> Residuals:
        def solved() -> Tensor:
            return loss.residuals(model, collocation.now)

        def checked() -> Tensor:
            assert check_points is not None
            return loss.residuals(model, collocation.others(check_points))

        return Residuals(solved, None if check_points is None else checked)

    def finish(network: nn.Module) -> dict[str, float]:
        return {f"{key}_{name}": e for name, test in tests.items() for key, e in _errors(network, test).items()}

    def fields(network: nn.Module) -> dict[str, Field]:
        return _fields(network, equation, problem, collocation.whole)

    return Problem(
        model=model,
        epoch_batches=None,
        loss=loss.value,
        evaluate=evaluate,
        data_source="computed",
        data_digest=describe(problem).digest,
        points=collocation.at,
        backward=loss.backward,
        residuals=loss.residuals,
        linearize=loss.linearize,
        least_squares=least_squares,
        finish=finish,
        fields=fields,
        reset_on_new_data=problem.history_on_resample == "reset",
        state=collocation.state_dict,
        restore=collocation.load_state_dict,
        best_by=next((f"metrics/validation/relative_l2_{name}" for name in tests), "metrics/train/loss"),
        attributes={
            "equation": equation.label,
            "degenerate": equation.degenerate,
            "num_space": equation.num_space,
            "predictors": json.dumps(predictors),
        },
    )


def _equation(config: PinnConfig) -> Equation:
    return load_equation(config.equation, config.options, config.folder)


@lru_cache(maxsize=4)
def _reference(
    name: str, options: str, folder: str
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, dict[str, float]]]:
    """Test sets with their solutions, and the relative L2 errors of the trivial predictors by test set; kept.

    An equation without a known solution has neither.
    """
    equation = load_equation(name, json.loads(options), folder)
    try:
        reference = equation.reference()
    except NotImplementedError:
        return {}, {}
    predictors: dict[str, dict[str, float]] = {}
    for key, (points, exact) in reference.items():
        norm = float(torch.linalg.vector_norm(exact))
        predictors[key] = {
            rival: float(torch.linalg.vector_norm(predict(points) - exact)) / norm if norm > 0 else math.nan
            for rival, predict in equation.predictors().items()
        }
    return reference, predictors


class _Collocation:
    """The points of a run.

    Attributes:
        present: points of this rank, None before the first call of `at`.
        whole: interior points of all ranks.
    """

    def __init__(self, equation: Equation, config: PinnConfig, seed: int, ranks: Ranks) -> None:
        self._equation, self._config, self._seed, self._ranks = equation, config, seed, ranks
        self._count = -1
        self.present: Points | None = None
        self.whole = torch.empty(0, equation.num_space + 1)
        self._others: tuple[tuple[int, int], Points] | None = None

    @property
    def now(self) -> Points:
        """The present points."""
        assert self.present is not None
        return self.present

    def unseen(self) -> Points:
        """As many points as a draw has, none of which training sees; the same ones whenever it is asked for them."""
        return self._drawn(self._config.num_points, 0, UNSEEN)

    def others(self, count: int) -> Points:
        """`count` interior points beside the present ones, and as many conditions as these have; drawn with them."""
        key = self._count, count
        if self._others is None or self._others[0] != key:
            self._others = key, self._drawn(count, self._count, OTHERS)
        return self._others[1]

    def at(self, network: nn.Module, iteration: int) -> Points:
        """The points of this rank at an iteration; drawn anew after each `resample_every` iterations."""
        every = self._config.resample_every
        count = 0 if every is None else iteration // every
        if self.present is None or count != self._count:
            self._count = count
            self.present = self._draw(network)
        return self.present

    def state_dict(self) -> dict[str, Any]:
        """How often points were drawn, and the interior ones: adapted points depend on the weights of their time."""
        return {"count": self._count, "whole": self.whole}

    def load_state_dict(self, state: Mapping[str, Any]) -> Points:
        """The saved points, which are the present ones again."""
        self._count = state["count"]
        self.present = self._trained(state["whole"])
        return self.present

    def _draw(self, network: nn.Module) -> Points:
        config = self._config
        interior = self._interior(config.num_points, self._seed_of(TRAINED[0]))
        if config.adaptive_pool is not None and self._count > 0:
            interior = self._adapted(network, interior, config.adaptive_pool)
        return self._trained(interior)

    def _trained(self, interior: Tensor) -> Points:
        """The interior points as the present ones, with the conditions that belong to them."""
        self.whole = interior
        return self._of_this_rank(interior, self._seed_of(TRAINED[1]))

    def _drawn(self, num_interior: int, count: int, streams: tuple[int, int]) -> Points:
        """Interior points and conditions of a draw of their own."""
        interior, conditions = (self._seed_of(stream, count) for stream in streams)
        return self._of_this_rank(self._interior(num_interior, interior), conditions)

    def _interior(self, count: int, seed: int) -> Tensor:
        equation = self._equation
        return equation.sample(uniform_points(self._config.sampler, count, equation.num_space + 1, seed))

    def _of_this_rank(self, interior: Tensor, seed: int) -> Points:
        """This rank's part of interior points and of conditions that are drawn with a seed."""
        config, equation, columns = self._config, self._equation, self._equation.num_space + 1
        own = slice(self._ranks.rank, None, self._ranks.world_size)
        conditions, values = torch.empty(0, columns, dtype=torch.float64), torch.empty(0, 1, dtype=torch.float64)
        if config.num_conditions > 0:
            uniform = uniform_points(config.sampler, config.num_conditions, columns, seed)
            conditions, values = equation.conditions(uniform)
        points = _prepared(self._equation, config, device_of(self._ranks), interior[own], conditions[own], values[own])
        return points._replace(num_interior=len(interior), num_conditions=len(conditions))

    def _adapted(self, network: nn.Module, interior: Tensor, size: int) -> Tensor:
        """Half of the points replaced by points of a fresh pool where the residual is large.

        Rank 0 decides, for on different machines the residuals may differ in their last digits. A residual that is not
        finite leaves the points as they are: the run is about to be recorded as diverged.
        """
        config, equation = self._config, self._equation
        pool = self._interior(size, self._seed_of(POOL))
        empty = pool[:0]
        prepared = _prepared(equation, config, device_of(self._ranks), pool, empty, empty[:, :1])
        with torch.no_grad():
            residual = _residual(equation, network, prepared, config.chunk_points).cpu()
        if bool(residual.isfinite().all()):
            num_adapted = round(ADAPTIVE_SHARE * len(interior))
            if num_adapted > 0:
                chosen = adaptive_points(pool, residual, num_adapted, self._seed_of(CHOICE))
                # The rows that stay are spread over the set, whose order may mean something.
                keep = torch.linspace(0, len(interior) - 1, len(interior) - num_adapted).round().long()
                interior = torch.cat([interior[keep], chosen])
        if self._ranks.world_size > 1:
            shared = interior.to(device_of(self._ranks))
            dist.broadcast(shared, src=0)
            interior = shared.cpu()
        return interior

    def _seed_of(self, stream: int, count: int | None = None) -> int:
        """A seed for each stream of each draw, by default the present one."""
        numbers = self._seed, self._count if count is None else count, stream
        return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _prepared(
    equation: Equation, config: PinnConfig, device: torch.device, interior: Tensor, conditions: Tensor, values: Tensor
) -> Points:
    """Points on the device, with what the equation says of them: computed in float64, rounded to the dtype."""
    dtype, is_hard = getattr(torch, config.dtype), config.conditions == "hard"
    interior, conditions = interior.to(device), conditions.to(device)
    return Points(
        interior=interior.to(dtype),
        source=equation.source(interior).to(dtype),
        lift=_cast(equation.lift(interior), dtype) if is_hard else None,
        conditions=conditions.to(dtype),
        values=values.to(device, dtype),
        condition_lift=_cast(equation.lift(conditions), dtype) if is_hard else None,
        num_interior=len(interior),
        num_conditions=len(conditions),
    )


class _Loss:
    """mean r^2 + weight mean (u - value)^2 on the points of all ranks, by several routes."""

    def __init__(self, equation: Equation, config: PinnConfig, ranks: Ranks) -> None:
        self._equation, self._config, self._ranks = equation, config, ranks
        self._slopes: Tensor | None = None  # weights of the residuals at the last linearization

    def backward(self, network: nn.Module, points: Points, observe: Observer | None = None) -> Tensor:
        """The loss; its gradient is added to that of the parameters, chunk by chunk.

        The residuals are made on the way to the loss; `observe` is handed them at no further cost.
        """
        assert isinstance(network, MLP)
        size, equation = self._ranks.world_size, self._equation
        interior, error = [], None

        def loss_sum(u: Derivatives, rows: slice) -> Tensor:
            residual = self._scaled(_residual_of(equation, u, points, rows), rows)
            interior.append(residual.detach())
            return size * residual.square().sum()

        loss = accumulate_gradient(
            network,
            points.interior,
            loss_sum,
            chunk=self._config.chunk_points,
            count=points.num_interior,
            gradient_square=equation.uses_gradient_square,
            compiles=self._config.compile,
        )
        if points.num_conditions > 0:
            weight = size * self._config.condition_weight / points.num_conditions
            error = self._value(network, points) - points.values
            conditions = weight * error.square().sum()
            conditions.backward()
            loss = loss + conditions.detach()
        if observe is not None:
            inside = torch.cat(interior) if interior else points.interior[:, :1]
            observe(self._weighted(inside, None if error is None else error.detach(), points))
        return self._averaged(network, loss)

    def value(self, network: nn.Module, points: Points) -> Tensor:
        """The loss on the points of this rank, differentiable: its mean over ranks is the loss."""
        residual = self._scaled(_residual(self._equation, network, points, None), slice(None))
        loss = residual.square().sum() / points.num_interior
        if points.num_conditions > 0:
            error = (self._value(network, points) - points.values).square().sum() / points.num_conditions
            loss = loss + self._config.condition_weight * error
        return self._ranks.world_size * loss

    def parts(self, network: nn.Module, points: Points) -> dict[str, float]:
        """The loss and its parts, as series."""
        pde = _residual(self._equation, network, points, self._config.chunk_points).double().square().sum()
        error = (self._value(network, points) - points.values).double().square().sum()
        sums = torch.stack([pde, error])
        if self._ranks.world_size > 1:
            dist.all_reduce(sums)
        pde_loss = float(sums[0]) / points.num_interior
        if points.num_conditions == 0:
            return {"metrics/train/loss": pde_loss, "metrics/train/pde_loss": pde_loss}
        condition_loss = float(sums[1]) / points.num_conditions
        return {
            "metrics/train/loss": pde_loss + self._config.condition_weight * condition_loss,
            "metrics/train/pde_loss": pde_loss,
            "metrics/train/condition_loss": condition_loss,
        }

    def residuals(self, network: nn.Module, points: Points) -> Tensor:
        """Residuals of this rank (rows,), weighted so that the loss is the sum of the squares of those of all ranks."""
        with torch.no_grad():
            interior = _residual(self._equation, network, points, self._config.chunk_points)
            interior = self._scaled(interior, slice(None))
            return self._weighted(interior, self._value(network, points) - points.values, points)

    def linearize(self, network: nn.Module, points: Points, observe: Observer | None = None) -> tuple[Tensor, Tensor]:
        """The residuals (rows,), which `observe` is handed, and their Jacobian (rows, parameters). Single process."""
        assert isinstance(network, MLP)
        equation = self._equation
        if self._config.slope_weight:
            self._slopes = self._slope_weights(network, points)

        def residual(u: Derivatives, rows: slice) -> Tensor:
            return self._scaled(_residual_of(equation, u, points, rows), rows)

        def error(u: Derivatives, rows: slice) -> Tensor:
            return _lifted(u.value, _rows(points.condition_lift, rows)) - points.values[rows]

        interior, jacobian = network.residual_jacobian(
            points.interior, residual, self._config.chunk_points, gradient_square=equation.uses_gradient_square
        )
        if len(points.conditions) == 0:
            residuals = self._weighted(interior, None, points)
            jacobian /= math.sqrt(len(points.interior))
        else:
            condition, condition_jacobian = network.residual_jacobian(points.conditions, error, values_only=True)
            residuals = self._weighted(interior, condition, points)
            weights = self._weighted(torch.ones_like(interior), torch.ones_like(condition), points)
            jacobian = torch.cat([jacobian, condition_jacobian]).mul_(weights.unsqueeze(1))
        if observe is not None:
            observe(residuals)
        return residuals, jacobian

    def _scaled(self, residual: Tensor, rows: slice) -> Tensor:
        return residual if self._slopes is None else residual * self._slopes[rows]

    def _slope_weights(self, network: MLP, points: Points) -> Tensor:
        """1 / (1 + |sum_i u_{x_i}|), (N, 1)."""
        with torch.no_grad():
            parts = _derivatives(network, points, self._equation.num_space, self._config.chunk_points, False)
            return torch.cat([1 / (1 + u.gradient_sum.abs()) for _, u in parts])

    def _weighted(self, interior: Tensor, condition: Tensor | None, points: Points) -> Tensor:
        parts = [interior / math.sqrt(points.num_interior)]
        if condition is not None and points.num_conditions > 0:
            parts.append(condition * math.sqrt(self._config.condition_weight / points.num_conditions))
        return torch.cat(parts).squeeze(1)

    def _value(self, network: nn.Module, points: Points) -> Tensor:
        return _lifted(network(points.conditions), points.condition_lift)

    def _averaged(self, network: nn.Module, loss: Tensor) -> Tensor:
        """The mean of loss and gradients over ranks, by one all-reduce."""
        if self._ranks.world_size == 1:
            return loss
        parameters = list(network.parameters())
        flat = torch.cat(
            [
                loss.reshape(1),
                *(torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters),
            ]
        )
        dist.all_reduce(flat)
        flat /= self._ranks.world_size
        start = 1
        for p in parameters:
            p.grad = flat[start : start + p.numel()].view_as(p)
            start += p.numel()
        return flat[0]


def _residual_of(equation: Equation, u: Derivatives, points: Points, rows: slice) -> Tensor:
    """The residual (rows, 1) of the network whose derivatives at some of the points are `u`."""
    u = _composed(u, points.lift, rows, equation.num_space)
    return equation.residual(points.interior[rows], u, points.source[rows])


def _residual(equation: Equation, network: nn.Module, points: Points, chunk: int | None) -> Tensor:
    """The residual (N, 1) at all interior points."""
    parts = [
        equation.residual(points.interior[rows], u, points.source[rows])
        for rows, u in _derivatives(network, points, equation.num_space, chunk, equation.uses_gradient_square)
    ]
    return torch.cat(parts) if parts else points.interior[:, :1]


def _derivatives(
    network: nn.Module, points: Points, num_space: int, chunk: int | None, gradient_square: bool
) -> Iterator[tuple[slice, Derivatives]]:
    """Slices of the interior points, and the derivatives of the solution there."""
    assert isinstance(network, MLP)
    directions = network.directions() if num_space > 1 else None
    for rows in chunks(len(points.interior), chunk or network.default_chunk(gradient_square)):
        u = network.derivatives(points.interior[rows], directions, gradient_square=gradient_square)
        yield rows, _composed(u, points.lift, rows, num_space)


def _composed(u: Derivatives, lift: Lift | None, rows: slice, num_space: int) -> Derivatives:
    own = _rows(lift, rows)
    return u if own is None else compose(*own, u, num_space)


def _lifted(value: Tensor, lift: Lift | None) -> Tensor:
    return value if lift is None else lift[0].value + lift[1].value * value


def _rows(lift: Lift | None, rows: slice) -> Lift | None:
    if lift is None:
        return None
    a, b = lift
    return Derivatives(*(each[rows] for each in a)), Derivatives(*(each[rows] for each in b))


def _cast(lift: Lift | None, dtype: torch.dtype) -> Lift:
    assert lift is not None  # checked with the configuration
    a, b = lift
    return Derivatives(*(each.to(dtype) for each in a)), Derivatives(*(each.to(dtype) for each in b))


def _values(network: nn.Module, points: Tensor, lift: Lift | None) -> Tensor:
    """u (N, 1) in float64."""
    parts = [network(part) for part in points.split(TEST_CHUNK)]
    return _lifted(torch.cat(parts), lift).double()


def _errors(network: nn.Module, test: Test) -> dict[str, float]:
    """||u - exact|| / ||exact||, mean and maximum of |u - exact|."""
    error = _values(network, test.points, test.lift) - test.exact
    return {
        "relative_l2": float(torch.linalg.vector_norm(error) / torch.linalg.vector_norm(test.exact)),
        "mean_absolute_error": float(error.abs().mean()),
        "max_error": float(error.abs().max()),
    }


def _fields(network: nn.Module, equation: Equation, config: PinnConfig, collocation: Tensor) -> dict[str, Field]:
    """Solution, exact solution and residual on the equation's grid, and the last interior points; {} without a grid."""
    grid = equation.grid()
    if grid is None:
        return {}
    x, t = (axis.double() for axis in grid)
    shape = (len(x), len(t))
    whole = torch.cartesian_prod(x, t)
    points = _prepared(equation, config, next(network.parameters()).device, whole, whole[:0], whole[:0, :1])

    def on_grid(values: Tensor, long_name: str) -> Field:
        return Field(("x", "t"), values.double().reshape(shape).cpu().numpy(), "1", long_name)

    fields = {
        "x": Field(("x",), x.numpy(), "1", "space"),
        "t": Field(("t",), t.numpy(), "1", "time"),
        "u": on_grid(_values(network, points.interior, points.lift), "solution of the network"),
        "pde_residual": on_grid(
            _residual(equation, network, points, config.chunk_points),
            "left side minus right side of the equation",
        ),
        "point": Field(("point",), np.arange(len(collocation)), "1", "number of the collocation point"),
        "collocation_x": Field(("point",), collocation[:, 0].numpy(), "1", "space coordinate of the interior points"),
        "collocation_t": Field(("point",), collocation[:, 1].numpy(), "1", "time coordinate of the interior points"),
    }
    with contextlib.suppress(NotImplementedError):  # a solution that is not known
        fields["exact"] = on_grid(equation.exact(whole), "exact solution")
    return fields
