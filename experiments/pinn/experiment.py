"""Physics-informed networks as an experiment of the suite: equations of its own, and those of users."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from data_loaders.collocation import MAX_SOBOL_COUNT, MAX_SOBOL_DIMENSION
from experiments.distributed.ranks import Ranks
from experiments.pinn import problem
from experiments.pinn.equation import Equation
from experiments.pinn.equations import load_equation
from experiments.pinn.settings import PinnConfig, PinnTrainingConfig
from experiments.records.reading import say
from experiments.runs.experiment import Experiment, Merit, Note
from experiments.settings.run_config import RunConfig, VariantConfig
from experiments.training.components import needs_residuals, optimizers, solves_residuals
from experiments.training.problem import Description, Problem

_CENTER = torch.full((1, 1), 0.5, dtype=torch.float64)


class PinnExperiment(Experiment):
    """Networks that solve an equation; with `check_points` a candidate must be better on so many other points too."""

    problem_settings = PinnConfig
    training_settings = PinnTrainingConfig
    variant_keys = ("problem", "training", "then", "baseline")
    probes = ("check_points",)
    is_least_squares = True

    def describe(self, settings: PinnConfig) -> Description:
        return problem.describe(settings)

    def build(self, run: RunConfig, ranks: Ranks) -> Problem:
        return problem.PinnProblem(run, ranks)

    def optimizers(self) -> dict[str, Any]:
        """All: the residuals can be linearized."""
        return optimizers()

    def read_problem(self, raw: Any, where: str, folder: str | Path) -> PinnConfig:
        """Makes the equation once, so that what it refuses is refused before any run."""
        config: PinnConfig = super().read_problem(raw, where, folder)
        try:
            equation = load_equation(config.equation, config.options, folder)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: {error}") from None
        _check_points(config, equation, where)
        return replace(config, folder=str(folder))

    def check(self, settings: PinnConfig, training: PinnTrainingConfig, variant: VariantConfig, where: str) -> None:
        stages: list[Any] = [variant, *([variant.then] if variant.then is not None else [])]
        if any(solves_residuals(stage.acceleration) for stage in stages):
            _check_residuals_stay(settings, where)
        for stage in stages if settings.slope_weight else ():
            if not needs_residuals(stage.optimizer.name):
                raise ValueError(
                    f"{where}: problem.slope_weight must be false for {stage.optimizer.name}, which does not "
                    "linearize; it must be an optimizer that does, as LevenbergMarquardt"
                )
        if variant.then is not None and variant.then.after >= training.iterations:
            raise ValueError(
                f"{where}.then.after must be below the {training.iterations} iterations of the run, "
                f"got {variant.then.after}"
            )

    def merit(self, series: Collection[str]) -> Merit:
        """The error of the solution; the loss where the equation has no solution to compare with."""
        errors = [name for name in series if name.startswith("metrics/validation/relative_l2_")]
        return Merit(errors[0]) if errors else super().merit(series)

    def draw(self, folder: Path, note: Note = say) -> list[Path]:
        from experiments.pinn.compare import read_groups  # here, because runs need no matplotlib
        from experiments.pinn.figures import draw_pinn_figures

        return draw_pinn_figures(read_groups(folder, self, note))

    def table(self, folder: Path, note: Note = say) -> str:
        from experiments.pinn.compare import read_groups
        from experiments.pinn.tables import summarize_pinn

        return summarize_pinn(read_groups(folder, self, note))


def _check_points(config: PinnConfig, equation: Equation, where: str) -> None:
    """Numbers of points, and the conditions, against the equation."""
    columns = equation.num_space + 1
    largest = max(config.num_points, config.num_conditions, config.adaptive_pool or 0)
    if config.sampler == "sobol" and columns > MAX_SOBOL_DIMENSION:
        raise ValueError(
            f"{where}.sampler must not be sobol for an equation of {columns} dimensions: Sobol points have at most "
            f"{MAX_SOBOL_DIMENSION}"
        )
    if config.sampler == "sobol" and largest > MAX_SOBOL_COUNT:
        raise ValueError(f"{where}: there are at most {MAX_SOBOL_COUNT} Sobol points, got {largest}")
    if config.conditions == "soft" and config.num_conditions == 0:
        raise ValueError(f"{where}.num_conditions must be an integer >= 1 with soft conditions, got 0")
    if config.conditions == "hard" and equation.lift(equation.sample(_CENTER.repeat(1, columns))) is None:
        raise ValueError(f"{where}.conditions must be soft, because {equation.label} offers no lift, got 'hard'")
    if config.adaptive_pool is not None and config.resample_every is None:
        raise ValueError(f"{where}.adaptive_pool must be null where resample_every is, got {config.adaptive_pool}")
    if config.adaptive_pool is not None and config.adaptive_pool < config.num_points:
        raise ValueError(
            f"{where}.adaptive_pool must be at least num_points = {config.num_points}, got {config.adaptive_pool}"
        )


def _check_residuals_stay(config: PinnConfig, where: str) -> None:
    """Residuals on other points, or of other weights, do not belong into one history."""
    if config.slope_weight:
        raise ValueError(
            f"{where}: problem.slope_weight must be false with nonlinear_gmres, because it changes the weights at "
            "each linearization, got true"
        )
    if config.resample_every is not None and config.history_on_resample != "reset":
        raise ValueError(
            f"{where}: problem.history_on_resample must be reset with nonlinear_gmres where points are redrawn, got "
            f"{config.history_on_resample!r}"
        )


EXPERIMENT = PinnExperiment()
