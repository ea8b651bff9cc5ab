"""Image classification as an experiment of the suite."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from experiments.distributed.ranks import Ranks
from experiments.images import data, problem
from experiments.images.settings import ImageConfig, ImageTrainingConfig
from experiments.records.compare import read_comparison
from experiments.records.reading import say
from experiments.runs.experiment import Experiment, Merit, Note
from experiments.settings.run_config import RunConfig, VariantConfig
from experiments.training.optimizers import LINE_SEARCHES
from experiments.training.problem import Description, Problem


class ImageExperiment(Experiment[ImageConfig, ImageTrainingConfig]):
    """ResNets on ImageNet, or on fractals; a run uses all processors or devices that there are."""

    problem_settings = ImageConfig
    training_settings = ImageTrainingConfig
    studies = ("learning_rate", "batch_size")
    variant_keys = ("mean_epochs",)
    runs_in_turn = True
    nominal_steps = 100

    def describe(self, settings: ImageConfig) -> Description:
        return data.describe(settings)

    def build(self, run: RunConfig[ImageConfig, ImageTrainingConfig], ranks: Ranks) -> Problem:
        return problem.ImageProblem(run, ranks)

    def global_batch(self, training: ImageTrainingConfig, ranks: Ranks) -> int:
        return training.global_batch(ranks)

    def data_seconds(self, settings: ImageConfig) -> float:
        return settings.stage_seconds

    def optimizers(self) -> dict[str, Any]:
        """Line searches need gradients where no batch was differentiated."""
        line_searches = {kind.__name__ for kind in LINE_SEARCHES}
        return {name: kind for name, kind in super().optimizers().items() if name not in line_searches}

    def check(self, settings: ImageConfig, training: ImageTrainingConfig, variant: VariantConfig) -> None:
        if training.reference_batch is not None and "lr" not in variant.optimizer.arguments:
            raise ValueError("optimizer.lr must be given, because training.reference_batch scales it")
        if training.precision == "float16" and variant.optimizer.arguments.get("fused"):
            # It skips an overflow within the step, unseen: an acceleration would take it for a step of length zero.
            raise ValueError("optimizer.fused must be false with precision float16, got true")

    def training_of_study(
        self, training: ImageTrainingConfig, num_rows: int, size: int, steps: int
    ) -> ImageTrainingConfig:
        if size > num_rows:
            raise ValueError(f"a batch of {size} images is larger than the training set of {num_rows}")
        epochs = max(1, round(steps / (num_rows // size)))  # only whole batches of images are trained on
        if training.warmup_epochs >= epochs:
            raise ValueError(
                f"studies.batch_size.steps must be more than training.warmup_epochs = {training.warmup_epochs:g} take, "
                f"got {steps}, which are {epochs} epochs with batches of {size} images"
            )
        batch = {"batch_size": size, "batch_size_per_rank": None}
        return training.model_copy(update=batch | {"epochs": epochs, "evaluate_every": epochs, "measure_updates": True})

    def merit(self, series: Collection[str]) -> Merit:
        return Merit("metrics/validation/top1", more_is_better=True)

    def draw(self, folder: Path, note: Note = say) -> list[Path]:
        from experiments.images.figures import draw_image_figures  # here, because runs need no matplotlib

        return draw_image_figures(read_comparison(folder, note, ImageConfig.of_the_machine))

    def table(self, folder: Path, note: Note = say) -> str:
        from experiments.images.tables import summarize_images

        return summarize_images(read_comparison(folder, note, ImageConfig.of_the_machine))


EXPERIMENT = ImageExperiment()
