"""Settings of physics-informed networks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, PrivateAttr, ValidationInfo, model_validator

from data_loaders.collocation import KINDS, MAX_POOL, MAX_SOBOL_COUNT, MAX_SOBOL_DIMENSION
from experiments.models.derivatives import RULES
from experiments.pinn.equation import Equation
from experiments.pinn.equations import load_equation
from experiments.settings.kinds import Items, Named, Text, one_of
from experiments.settings.schema import Settings

_CENTER = torch.full((1, 1), 0.5, dtype=torch.float64)


class PinnConfig(Settings):
    """A physics-informed network: the equation, the network, and the points where the equation is asked for.

    Attributes:
        equation: a key of `experiments.pinn.equations.EQUATIONS`, or a Python file, relative to the configuration's.
        options: arguments of the equation.
        hidden_sizes: widths of the hidden layers; the inputs are those of the equation, the output is one.
        activation: smooth, because the equation differentiates it twice.
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

    equation: Text
    options: dict[str, Any] = Field(default={})
    hidden_sizes: Annotated[Items[PositiveInt], Field(min_length=1)] = (20,) * 8
    activation: Annotated[str, one_of(RULES)] = "tanh"
    dtype: Literal["float32", "float64"] = "float32"
    conditions: Literal["soft", "hard"] = "soft"
    sampler: Annotated[str, one_of(KINDS)] = "latin_hypercube"
    num_points: PositiveInt = 4096
    num_conditions: NonNegativeInt = 400
    condition_weight: PositiveFloat = 1.0
    resample_every: PositiveInt | None = None
    adaptive_pool: Annotated[int, Field(ge=1, le=MAX_POOL)] | None = None
    history_on_resample: Literal["reset", "keep"] = "reset"
    slope_weight: bool = False
    chunk_points: PositiveInt | None = None
    compile: bool = False
    _folder: Path = PrivateAttr()

    @property
    def folder(self) -> Path:
        """Where the configuration's file is. It is no part of a run's identity."""
        return self._folder

    @model_validator(mode="after")
    def _fit_the_equation(self, info: ValidationInfo) -> PinnConfig:
        """Makes the equation once, so that what it refuses is refused before any run."""
        self._folder = Path((info.context or {}).get("folder", "."))
        try:
            equation = load_equation(self.equation, self.options, self.folder)
        except TypeError as error:
            raise ValueError(str(error)) from None
        _check_points(self, equation)
        return self


def _check_points(config: PinnConfig, equation: Equation) -> None:
    columns = equation.num_space + 1
    largest = max(config.num_points, config.num_conditions, config.adaptive_pool or 0)
    if config.sampler == "sobol" and columns > MAX_SOBOL_DIMENSION:
        raise ValueError(
            f"sampler must not be sobol for an equation of {columns} dimensions: Sobol points have at most "
            f"{MAX_SOBOL_DIMENSION}"
        )
    if config.sampler == "sobol" and largest > MAX_SOBOL_COUNT:
        raise ValueError(f"there are at most {MAX_SOBOL_COUNT} Sobol points, got {largest}")
    if config.conditions == "soft" and config.num_conditions == 0:
        raise ValueError("num_conditions must be an integer >= 1 with soft conditions, got 0")
    if config.conditions == "hard" and equation.lift(equation.sample(_CENTER.repeat(1, columns))) is None:
        raise ValueError(f"conditions must be soft, because {equation.label} offers no lift, got 'hard'")
    if config.adaptive_pool is not None and config.resample_every is None:
        raise ValueError(f"adaptive_pool must be null where resample_every is, got {config.adaptive_pool}")
    if config.adaptive_pool is not None and config.adaptive_pool < config.num_points:
        raise ValueError(f"adaptive_pool must be at least num_points = {config.num_points}, got {config.adaptive_pool}")


class PinnTrainingConfig(Settings):
    """Training by iterations, which are evaluations of the gradient, however many of them a step takes.

    Attributes:
        iterations: the run ends with the step that reaches them.
        evaluate_every: iterations between two evaluations.
        scheduler: steps once an iteration.
        max_seconds: of training; the run ends with the step that reaches them. null: no limit.
        num_threads: of torch.
        measure_updates: whether the relative standard deviation of consecutive updates is recorded.
    """

    iterations: PositiveInt = 2000
    evaluate_every: PositiveInt = 100
    scheduler: Named | None = None
    max_seconds: PositiveFloat | None = None
    num_threads: PositiveInt = 1
    measure_updates: bool = False
