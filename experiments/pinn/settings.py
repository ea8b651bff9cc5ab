"""Settings of physics-informed networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from data_loaders.collocation import KINDS, MAX_POOL
from experiments.models.derivatives import RULES
from experiments.settings.checks import (
    BOOLEAN,
    OPTIONS,
    SCHEDULER,
    SOME_SIZES,
    TEXT,
    Component,
    choice,
    integer,
    number,
    optional,
    setting,
)


@dataclass(frozen=True)
class PinnConfig:
    """A physics-informed network: the equation, the network, and the points where the equation is asked for.

    Attributes:
        equation: a key of `experiments.pinn.equations.EQUATIONS`, or a Python file, relative to the configuration's.
        options: arguments of the equation.
        hidden_sizes: widths of the hidden layers; the inputs are those of the equation, the output is one.
        activation: smooth, for the equation differentiates it twice.
        dtype: of weights and points. Points, sources and solutions are computed in float64 and rounded to it.
        conditions: "soft": the mean squared error on `num_conditions` points of the initial and boundary conditions is
            added to the loss, times `condition_weight`; "hard": the equation's lift meets them for every network.
        sampler: of the points.
        num_points: interior points, over all ranks.
        num_conditions: points of the conditions, over all ranks; 0 with hard conditions only.
        condition_weight: see `conditions`.
        resample_every: iterations after which all points are drawn again; null: never.
        adaptive_pool: from the first resampling on, half of the interior points are drawn from this many fresh ones,
            more of them where the residual of the network is large (`adaptive_points`); null: none are.
        history_on_resample: "reset": the memories of L-BFGS and of aadl start empty with the points; "keep": they stay.
            Neither the moments of Adam nor the window of the published scheme is touched.
        slope_weight: divides the residuals by 1 + |sum_i u_{x_i}| of the network at the last linearization, which keeps
            steep fronts from ruling the sum of squares; for optimizers that linearize. Recorded losses are without it.
        chunk_points: interior points that are differentiated at a time, which bounds the memory; null: a cache full.
        compile: whether torch.compile compiles the residual.
    """

    equation: str = setting(TEXT)
    options: dict[str, Any] = setting(OPTIONS, {})  # noqa: RUF009
    hidden_sizes: tuple[int, ...] = setting(SOME_SIZES, (20,) * 8)
    activation: str = setting(choice(*RULES), "tanh")
    dtype: str = setting(choice("float32", "float64"), "float32")
    conditions: str = setting(choice("soft", "hard"), "soft")
    sampler: str = setting(choice(*KINDS), "latin_hypercube")
    num_points: int = setting(integer(1), 4096)
    num_conditions: int = setting(integer(0), 400)
    condition_weight: float = setting(number(0.0), 1.0)
    resample_every: int | None = setting(optional(integer(1)), None)
    adaptive_pool: int | None = setting(optional(integer(1, MAX_POOL + 1)), None)
    history_on_resample: str = setting(choice("reset", "keep"), "reset")
    slope_weight: bool = setting(BOOLEAN, False)
    chunk_points: int | None = setting(optional(integer(1)), None)
    compile: bool = setting(BOOLEAN, False)
    folder: str = ""
    """Where the configuration's file is. No setting, and no part of a run's identity."""


@dataclass(frozen=True)
class PinnTrainingConfig:
    """Training by iterations, which are evaluations of the gradient, however many of them a step takes.

    Attributes:
        iterations: the run ends with the step that reaches them.
        evaluate_every: iterations between two evaluations.
        scheduler: steps once an iteration.
        max_seconds: of training; the run ends with the step that reaches them. null: no limit.
        num_threads: of torch.
        measure_updates: whether the relative standard deviation of consecutive updates is recorded.
    """

    iterations: int = setting(integer(1), 2000)
    evaluate_every: int = setting(integer(1), 100)
    scheduler: Component | None = setting(SCHEDULER, None)  # noqa: RUF009
    max_seconds: float | None = setting(optional(number(0.0)), None)
    num_threads: int = setting(integer(1), 1)
    measure_updates: bool = setting(BOOLEAN, False)
