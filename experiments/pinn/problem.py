"""The training problem of a physics-informed network: an equation, a network, and points of one run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.distributed.devices import device_of
from experiments.distributed.ranks import Ranks
from experiments.models.mlp import MLP
from experiments.pinn.accuracy import errors_on, fields_of, predictor_errors, reference_sets
from experiments.pinn.equations import load_equation
from experiments.pinn.loss import Loss
from experiments.pinn.points import Collocation
from experiments.pinn.residual import Points
from experiments.pinn.settings import PinnConfig, PinnTrainingConfig
from experiments.settings.run_config import RunConfig
from experiments.training.closure import Closure
from experiments.training.iterations import Iterations
from experiments.training.plan import schedule_of
from experiments.training.problem import Description, Field, Observer, Problem, Residuals
from experiments.training.stage import Stage


def describe(config: PinnConfig) -> Description:
    """What determines points and solution: equation, options, a user's file; ValueError where nothing would train."""
    equation = load_equation(config.equation, config.options, config.folder)
    Collocation(equation, config.model_copy(update={"num_points": 1}), 0, Ranks())  # conditions must yield points
    note = f"{equation.label}: {equation.degenerate}" if equation.degenerate else ""
    return Description("computed", digest_of(config), None, note)


def digest_of(config: PinnConfig) -> str:
    text = json.dumps([config.equation, config.options], sort_keys=True)
    if config.equation.endswith(".py"):
        text += (Path(config.folder) / config.equation).read_text(encoding="utf-8")
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class PinnProblem(Problem):
    """Minimizes mean r^2 + condition_weight mean (u - u_condition)^2 on points that are sampled.

    Every rank has a part of the points; its sums are scaled so that the mean over ranks is the loss, whether the points
    can be divided evenly or not, and one all-reduce averages gradients and loss. The run's seed sets the initial
    weights (drawn in float32, whatever the dtype) and the points.
    """

    def __init__(self, run: RunConfig[PinnConfig, PinnTrainingConfig], ranks: Ranks) -> None:
        settings, training = run.problem, run.training
        equation = load_equation(settings.equation, settings.options, settings.folder)
        torch.manual_seed(run.seed)
        sizes = (equation.num_space + 1, *settings.hidden_sizes, 1)
        model = MLP(sizes, settings.activation).to(device_of(ranks), getattr(torch, settings.dtype))
        self._equation, self._settings, self._training = equation, settings, training
        self._collocation = Collocation(equation, settings, run.seed, ranks)
        self._loss = Loss(equation, settings, ranks)
        if settings.compile:  # now, so that the clock of the training does not count it
            self._loss.backward(model, self._collocation.at(model, 0))
            model.zero_grad()
        self._tests = reference_sets(equation, settings, device_of(ranks))
        self._unseen = self._collocation.unseen()
        attributes = {
            "equation": equation.label,
            "degenerate": equation.degenerate,
            "num_space": equation.num_space,
            "predictors": json.dumps(predictor_errors(settings)),
        }
        super().__init__(model, data_source="computed", data_digest=digest_of(settings), attributes=attributes)

    # ---- training ----

    def plan(self) -> Iterations:
        training = self._training
        return Iterations(
            self.points,
            training.iterations,
            training.evaluate_every,
            schedule_of(training.scheduler),
            max_seconds=training.max_seconds,
            resets_history=self._settings.history_on_resample == "reset",
            measures_updates=training.measure_updates,
        )

    def points(self, network: nn.Module, iteration: int) -> Points:
        """The points of this rank at an iteration; the same object as long as they are the same."""
        return self._collocation.at(network, iteration)

    def closure(self, stages: Sequence[Stage], ranks: Ranks) -> Closure:
        """Passes through the bare model: `backward` averages over the ranks itself."""
        return Closure(self, self.model, stages)

    def loss(self, network: nn.Module, batch: Points) -> Tensor:
        return self._loss.value(network, batch)

    def backward(self, network: nn.Module, batch: Points, observe: Observer | None = None) -> Tensor:
        return self._loss.backward(network, batch, observe)

    def linearize(self, network: nn.Module, batch: Points, observe: Observer | None = None) -> tuple[Tensor, Tensor]:
        return self._loss.linearize(network, batch, observe)

    @torch.no_grad()
    def residuals(self, network: nn.Module, batch: Points) -> Tensor:
        return self._loss.residuals(network, batch)

    def least_squares(self, check_points: int | None = None) -> Residuals:
        """The residuals on the present points; `check_points` others, drawn with them, judge the acceleration."""

        points = self._collocation
        if check_points is None:
            return Residuals(lambda: self.residuals(self.model, points.present))
        return Residuals(
            lambda: self.residuals(self.model, points.present),
            lambda: self.residuals(self.model, points.others(check_points)),
        )

    # ---- evaluation ----

    def evaluate(self, network: nn.Module) -> dict[str, float]:
        values = self._loss.parts(network, self._collocation.present)
        for name, test in list(self._tests.items())[:1]:
            values |= {f"metrics/validation/{key}_{name}": value for key, value in errors_on(network, test).items()}
        return values | {"metrics/validation/loss": self._loss.parts(network, self._unseen)["metrics/train/loss"]}

    def finish(self, network: nn.Module) -> dict[str, float]:
        return {f"{key}_{name}": e for name, test in self._tests.items() for key, e in errors_on(network, test).items()}

    def fields(self, network: nn.Module) -> dict[str, Field]:
        return fields_of(network, self._equation, self._settings, self._collocation.whole)

    # ---- a run that stops and goes on ----

    def state(self) -> dict[str, Any]:
        return self._collocation.state_dict()

    def restore(self, state: Mapping[str, Any]) -> Points:
        return self._collocation.load_state_dict(state)
