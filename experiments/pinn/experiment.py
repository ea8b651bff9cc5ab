"""Physics-informed networks as an experiment of the suite: equations of its own, and those of users."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from experiments.distributed.ranks import Ranks
from experiments.pinn import problem
from experiments.pinn.settings import PinnConfig, PinnTrainingConfig
from experiments.records.reading import say
from experiments.runs.experiment import Experiment, Merit, Note
from experiments.settings.run_config import RunConfig, VariantConfig
from experiments.training.components import needs_residuals, optimizers, solves_residuals
from experiments.training.problem import Description, Problem


class PinnExperiment(Experiment[PinnConfig, PinnTrainingConfig]):
    """Networks that solve an equation; with `check_points` a candidate must be better on so many other points too."""

    problem_settings = PinnConfig
    training_settings = PinnTrainingConfig
    variant_keys = ("problem", "training", "then", "baseline")
    probes = ("check_points",)
    is_least_squares = True

    def describe(self, settings: PinnConfig) -> Description:
        return problem.describe(settings)

    def build(self, run: RunConfig[PinnConfig, PinnTrainingConfig], ranks: Ranks) -> Problem:
        return problem.PinnProblem(run, ranks)

    def optimizers(self) -> dict[str, Any]:
        """All: the residuals can be linearized."""
        return optimizers()

    def check(self, settings: PinnConfig, training: PinnTrainingConfig, variant: VariantConfig) -> None:
        stages: list[Any] = [variant, *([variant.then] if variant.then is not None else [])]
        if any(solves_residuals(stage.acceleration) for stage in stages):
            _check_residuals_stay(settings)
        for stage in stages if settings.slope_weight else ():
            if not needs_residuals(stage.optimizer.name):
                raise ValueError(
                    f"problem.slope_weight must be false for {stage.optimizer.name}, which does not "
                    "linearize; it must be an optimizer that does, as LevenbergMarquardt"
                )
        if variant.then is not None and variant.then.after >= training.iterations:
            raise ValueError(
                f"then.after must be below the {training.iterations} iterations of the run, got {variant.then.after}"
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


def _check_residuals_stay(config: PinnConfig) -> None:
    """Residuals on other points, or of other weights, do not belong into one history."""
    if config.slope_weight:
        raise ValueError(
            "problem.slope_weight must be false with nonlinear_gmres, because it changes the weights at "
            "each linearization, got true"
        )
    if config.resample_every is not None and config.history_on_resample != "reset":
        raise ValueError(
            f"problem.history_on_resample must be reset with nonlinear_gmres where points are redrawn, got "
            f"{config.history_on_resample!r}"
        )


EXPERIMENT = PinnExperiment()
