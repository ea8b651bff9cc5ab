"""What an experiment is: its settings, its data, its problem, its figures and its tables."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple

from experiments.distributed.ranks import Ranks
from experiments.records.reading import say
from experiments.settings.run_config import ExperimentConfig, P, RunConfig, T, VariantConfig
from experiments.training.components import needs_residuals, optimizers
from experiments.training.problem import Description, Problem

Note = Callable[[str], None]


class Merit(NamedTuple):
    """The series of a record by which variants are judged, and whether more of it is better."""

    series: str
    more_is_better: bool = False


class Experiment(ABC, Generic[P, T]):
    """A kind of experiment; its package exports one object, which a line of `experiments.catalog` names.

    P and T are the classes of its settings. A subclass names them and defines `describe` and `build`. Everything else
    has a default, which fits a network that is trained by epochs on data in memory.

    Attributes:
        problem_settings: P, the settings of the problem; a class attribute `of_the_machine` lists those that change no
            number, as where data lies. Its validators find the folder of the configuration in their context.
        training_settings: T, the settings of the training.
        studies: studies that a configuration may ask for.
        variant_keys: keys of a variant, beside those that every experiment has: "mean_epochs", "then", "baseline",
            "problem" and "training".
        probes: keyword arguments of `Problem.least_squares`, integers >= 1, which an acceleration by residuals may set.
        is_least_squares: whether the loss is a sum of squares, which an acceleration by residuals needs.
        runs_in_turn: whether a run uses the whole machine, so that runs never share it.
        nominal_steps: steps in an epoch where cadences may be texts as "2 epochs", for checks before the data is known;
            None where cadences count steps alone.
        loss_name: what figures and tables call the loss.
    """

    problem_settings: type[P]
    training_settings: type[T]
    studies: ClassVar[tuple[str, ...]] = ("learning_rate",)
    variant_keys: ClassVar[tuple[str, ...]] = ()
    probes: ClassVar[tuple[str, ...]] = ()
    is_least_squares: ClassVar[bool] = False
    runs_in_turn: ClassVar[bool] = False
    nominal_steps: ClassVar[int | None] = None
    loss_name: ClassVar[str] = "loss"

    # ---- a run ----

    @abstractmethod
    def describe(self, problem: P) -> Description:
        """What is known of the data before a run; ValueError where it is not as it must be, OSError if unreadable."""

    @abstractmethod
    def build(self, run: RunConfig[P, T], ranks: Ranks) -> Problem:
        """The problem of a run; all ranks call it. It raises what `describe` does."""

    def num_threads(self, training: T) -> int:
        return int(getattr(training, "num_threads", 1))

    def global_batch(self, training: T, ranks: Ranks) -> int | None:
        """Rows in a step over all ranks, where the settings may give those of one rank; None where they never do."""
        return None

    def data_seconds(self, problem: P) -> float | None:
        """Seconds that ranks wait for each other while the data is opened or made; None for those of a collective."""
        return None

    # ---- its settings ----

    def optimizers(self) -> dict[str, Any]:
        return {name: kind for name, kind in optimizers().items() if not needs_residuals(name)}

    def check(self, problem: P, training: T, variant: VariantConfig) -> None:
        """Raises ValueError for settings of a variant that do not go together."""

    def check_rows(self, config: ExperimentConfig[P, T], num_rows: int) -> None:
        """Raises ValueError for settings that the size of the training set contradicts."""

    def training_of_study(self, training: T, num_rows: int, size: int, steps: int) -> T:
        """The settings of a training of about `steps` steps with batches of `size` rows, whose updates are measured.

        Not to be defined where `studies` has no "batch_size": configurations that name such a study are refused there.
        """
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
        trained = self.trained(comparison.runs[0].config["problem"])
        return draw_training_figures(replace(comparison, trained=trained), self.loss_name)

    def table(self, folder: Path, note: Note = say) -> str:
        """Writes the tables of the records in a folder to summary.md; returns them. `note` is that of `draw`."""
        from experiments.records.compare import read_comparison
        from experiments.records.summarize import summarize

        return summarize(read_comparison(folder, note), self.loss_name)
