"""A hunt for trainings that acceleration harms where nothing sees the loss: random cases of tiny linear models.

Each number is a case, drawn by a generator with this seed: a loss, an optimizer, its learning rate (one or two groups),
clipping, weight decay, the batch and the seed of the data. Of every case that plain training does not blow up, `end`
and `way` compare the accelerated training without a closure with it (see `benchmarks.linear_losses`). With --control
the other training is a plain one, too, from weights a thousandth longer: what it shows is chance. Rules and constants
are chosen on the cases 0 to 299, and reported on those from 1000 on:

    python -m benchmarks.hunt --first 1000 --cases 300

With pytorch_optimizer installed its optimizers take part; without it the numbers are other cases.
"""

from __future__ import annotations

import argparse
import math
import random
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from benchmarks.linear_losses import LOSSES, ROWS, SMOOTH, Case, SignDescent, ratios, train
from benchmarks.tables import markdown

END, WAY = 1.1, 2.0
"""Larger ratios to plain training count as harm."""
OTHERS = (
    "ADOPT", "AdaBelief", "AdaBound", "AdamP", "Adan", "AvaGrad", "CAME", "LARS", "Lamb", "LaProp", "Lion", "QHAdam",
    "StableAdamW", "Tiger", "VSGD", "Yogi",
)  # fmt: skip
"""Of pytorch_optimizer."""


def optimizers() -> dict[str, tuple[Callable[..., torch.optim.Optimizer], bool]]:
    """The class (or a function) by name, and whether it takes weight_decay."""
    o = torch.optim
    result: dict[str, tuple[Callable[..., o.Optimizer], bool]] = {
        "sgd": (o.SGD, True),
        "momentum 0.9": (lambda p, **given: o.SGD(p, momentum=0.9, **given), True),
        "momentum 0.98": (lambda p, **given: o.SGD(p, momentum=0.98, **given), True),
        "nesterov 0.9": (lambda p, **given: o.SGD(p, momentum=0.9, nesterov=True, **given), True),
        "signsgd": (lambda p, **given: SignDescent(p, momentum=False, **given), False),
        "RMSprop momentum": (lambda p, **given: o.RMSprop(p, momentum=0.9, **given), True),
    }
    own = ("Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta", "Adafactor", "ASGD")
    result |= {name: (getattr(o, name), True) for name in own}
    try:
        import pytorch_optimizer
    except ImportError:
        return result | {"Lion": (lambda p, **given: SignDescent(p, momentum=True, **given), False)}
    return result | {name: (getattr(pytorch_optimizer, name), True) for name in OTHERS}


class Drawn(NamedTuple):
    """A case of the hunt."""

    number: int
    case: Case
    rate: float
    groups: bool
    clipping: str
    decay: float
    seed: int

    def make(self, parameters: list[Tensor], factor: float = 1.0) -> torch.optim.Optimizer:
        """The optimizer, of weights that are `factor` times as long; with groups the bias has five times the rate."""
        weight, bias = parameters
        weight.data *= factor
        groups: Any = [{"params": [weight]}, {"params": [bias], "lr": 5 * self.rate}] if self.groups else parameters
        given = {"weight_decay": self.decay} if self.decay else {}
        return optimizers()[self.case.optimizer][0](groups, lr=self.rate, **given)

    def clip(self, parameters: list[Tensor]) -> None:
        """Clip the gradients."""
        if self.clipping == "norm 1":
            clip_grad_norm_(parameters, 1.0)
        elif self.clipping == "value 0.05":
            clip_grad_value_(parameters, 0.05)

    def ratios(self, steps: int, control: bool) -> tuple[float, float] | None:
        """(end, way), inf where only the other training blows up; None where plain training does."""
        plain = train(self.case, self.seed, steps, None, self.make, self.clip)[0]
        if not all(map(math.isfinite, plain)):
            return None
        settings, make = (None, partial(self.make, factor=1.001)) if control else ({"safeguard": "residual"}, self.make)
        other = train(self.case, self.seed, steps, settings, make, self.clip)[0]
        return ratios(plain, other) if all(map(math.isfinite, other)) else (math.inf, math.inf)

    def cells(self) -> list[str]:
        """What it is, for a table."""
        groups = " and 5 times" if self.groups else ""
        about = [self.case.loss, self.case.optimizer, f"{self.rate:g}{groups}", str(self.case.batch)]
        return [str(self.number), *about, self.clipping, f"{self.decay:g}"]


def draw(number: int) -> Drawn:
    """The case of this number."""
    chance = random.Random(number)
    loss, optimizer = chance.choice([*LOSSES, *SMOOTH]), chance.choice([*optimizers()])
    case = Case(loss, optimizer, torch.float32, chance.choice([ROWS, ROWS, 16, 10]))
    rate, groups = chance.choice([1e-3, 3e-3, 1e-2, 3e-2, 1e-1]), chance.random() < 0.25
    clipping, decay = chance.choice(["", "", "", "norm 1", "value 0.05"]), chance.choice([0.0, 0.0, 0.01, 0.1])
    takes_decay = optimizers()[optimizer][1]
    return Drawn(number, case, rate, groups, clipping, decay if takes_decay else 0.0, chance.randrange(1000))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=1000)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--control", action="store_true", help="plain training against plain training")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # nothing was accepted, and the like
    numbers = range(arguments.first, arguments.first + arguments.cases)
    found = [(drawn, drawn.ratios(arguments.steps, arguments.control)) for drawn in map(draw, numbers)]
    kept = [(*pair, drawn) for drawn, pair in found if pair is not None]
    print(f"{len(kept)} of {len(found)} cases, {len(optimizers())} optimizers, {arguments.steps} steps")
    harmed = sum(end > END or way > WAY for end, way, _ in kept)
    at_end, on_way = sum(end > END for end, _, _ in kept), sum(way > WAY for _, way, _ in kept)
    print(f"{harmed} harmed: {at_end} above {END} at the end, {on_way} above {WAY} on the way")
    better, ends = sum(end < 0.9 for end, _, _ in kept), sorted(end for end, _, _ in kept)
    print(f"{better} below 0.9 at the end, median {ends[len(ends) // 2]:.3f}\n")
    worst = sorted(kept, key=lambda case: max(case[0] / END, case[1] / WAY), reverse=True)[:10]
    rows = [[*drawn.cells(), f"{end:.2f}", f"{way:.2f}"] for end, way, drawn in worst]
    print(markdown(["case", "loss", "optimizer", "rate", "batch", "clipping", "decay", "end", "way"], rows))


if __name__ == "__main__":
    main()
