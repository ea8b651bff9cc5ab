"""What an experiment is: its settings, its data, its problem, its figures and its tables."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from experiments.distributed.ranks import Ranks
from experiments.records.reading import say
from experiments.settings.checks import read_settings
from experiments.settings.run_config import ExperimentConfig, RunConfig, VariantConfig
from experiments.training.components import check_scheduler, needs_residuals, optimizers, read_component, schedulers
from experiments.training.problem import Description, Problem

Note = Callable[[str], None]


class Merit(NamedTuple):
    """The series of a record by which variants are judged, and whether more of it is better."""

    series: str
    more_is_better: bool = False


class Experiment(ABC):
    """A kind of experiment; its package exports one object, which a line of `experiments.catalog` names.

    A subclass sets the two classes of settings and defines `describe` and `build`. Everything else has a default, which
    fits a network that is trained by epochs on data in memory.

    Attributes:
        problem_settings: dataclass of the settings of the problem; a class attribute `of_the_machine` lists those that
            change no number, as where data lies.
        training_settings: dataclass of the settings of the training.
        studies: studies that a configuration may ask for.
        variant_keys: keys of a variant, beside those that every experiment has: "mean_epochs", "then", "baseline",
            "problem" and "training".
        probes: keyword arguments of `Problem.least_squares`, integers >= 1, which an acceleration by residuals may set.
        is_least_squares: whether the loss is a sum of squares, which an acceleration by residuals needs.
        runs_in_turn: whether a run uses the whole machine, so that runs never share it.
        loss_name: what figures and tables call the loss.
    """

    problem_settings: ClassVar[type[Any]]
    training_settings: ClassVar[type[Any]]
    studies: ClassVar[tuple[str, ...]] = ("learning_rate",)
    variant_keys: ClassVar[tuple[str, ...]] = ()
    probes: ClassVar[tuple[str, ...]] = ()
    is_least_squares: ClassVar[bool] = False
    runs_in_turn: ClassVar[bool] = False
    loss_name: ClassVar[str] = "loss"

    # ---- a run ----

    @abstractmethod
    def describe(self, problem: Any) -> Description:
        """What is known of the data before a run.

        Raises:
            ValueError: the data is not as it must be.
            OSError: the data cannot be read.
        """

    @abstractmethod
    def build(self, run: RunConfig, ranks: Ranks) -> Problem:
        """The problem of a run; all ranks call it.

        Raises:
            ValueError: the data is not as it must be, or cannot be divided among the ranks.
            OSError: the data cannot be read.
        """

    def num_threads(self, training: Any) -> int:
        """Threads of torch in a rank."""
        return int(getattr(training, "num_threads", 1))

    def global_batch(self, training: Any, ranks: Ranks) -> int | None:
        """Rows in a step over all ranks, where the settings may give those of one rank; None where they never do."""
        return None

    def data_seconds(self, problem: Any) -> float | None:
        """Seconds that ranks wait for each other while the data is opened or made; None for those of a collective."""
        return None

    # ---- its settings ----

    def read_problem(self, raw: Any, where: str, folder: str | Path) -> Any:
        """The settings of the problem; a path in them starts at `folder`."""
        return read_settings(self.problem_settings, raw, where)

    def read_training(self, raw: Any, where: str) -> Any:
        """The settings of the training."""
        training = read_settings(self.training_settings, raw, where)
        if getattr(training, "scheduler", None) is None:
            return training
        scheduler = read_component(training.scheduler, schedulers(), f"{where}.scheduler")
        check_scheduler(scheduler, f"{where}.scheduler")
        return replace(training, scheduler=scheduler)

    def optimizers(self) -> dict[str, Any]:
        """The optimizers that a configuration may name."""
        return {name: kind for name, kind in optimizers().items() if not needs_residuals(name)}

    def in_steps(self, settings: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The settings of an acceleration with every cadence as a number of steps, for checks before a run."""
        return dict(settings)

    def check(self, problem: Any, training: Any, variant: VariantConfig, where: str) -> None:
        """Refuses settings of a variant that do not go together.

        Raises:
            ValueError: they do not.
        """

    def check_rows(self, config: ExperimentConfig, num_rows: int) -> None:
        """Refuses settings that the size of the training set contradicts.

        Raises:
            ValueError: it does.
        """

    def training_of_study(self, training: Any, num_rows: int, size: int, steps: int) -> Any:
        """The settings of a training of about `steps` steps with batches of `size` rows, whose updates are measured."""
        raise NotImplementedError

    # ---- its results ----

    def merit(self, series: Collection[str]) -> Merit:
        """The main figure of merit of a run whose record has these series."""
        return Merit("metrics/validation/loss")

    def trained(self, problem: Mapping[str, Any]) -> str:
        """What is trained on what, in words for titles, by the settings of the problem in a record; "": the name."""
        return ""

    def draw(self, folder: Path, note: Note = say) -> list[Path]:
        """Draws the figures of the records in a folder; returns their paths. `note` gets a line a record left out."""
        from experiments.records.compare import read_comparison  # here, because runs need no matplotlib
        from experiments.records.training_figures import draw_training_figures

        comparison = read_comparison(folder, note)
        trained = self.trained(comparison.any_run.config["problem"])
        return draw_training_figures(replace(comparison, trained=trained), self.loss_name)

    def table(self, folder: Path, note: Note = say) -> str:
        """Writes the tables of the records in a folder to summary.md; returns them. `note` is that of `draw`."""
        from experiments.records.compare import read_comparison
        from experiments.records.summarize import summarize

        return summarize(read_comparison(folder, note), self.loss_name)
