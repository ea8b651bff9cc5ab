"""The set of fractals: speed, and whether a network learns it: `python -m benchmarks.fractals` (`--quick`: seconds).

Two ways to points of an attractor, images per second of processor time, how far classes are apart, and the accuracy of
a small residual network against epochs. --docs puts the tables into docs/reports/fractals.md and draws its figures. It
takes some three minutes on two cores.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from numpy.random import RandomState
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.machine import ROOT
from benchmarks.tables import markdown, origin, put_into_page
from data_loaders.fractals.drawing import (
    USUAL,
    System,
    Variation,
    attractor,
    circle,
    class_system,
    complex_maps,
    count,
    draw,
    num_points,
    perturbed,
    random_generator,
)
from data_loaders.fractals.sets import VALIDATION, Settings, encode

SPEED_SIZES = (32, 64, 224)


# ---- points ----------------------------------------------------------------------------------------------------------


def chaos_game(system: System, number: int, random: RandomState, chains: int = 1024) -> NDArray[np.complex64]:
    """`number` points by random walks, many side by side; the first 16 steps only lead onto the attractor."""
    maps, ends = complex_maps(system), np.cumsum(system.probabilities)
    ends[-1] = 1.0
    points = np.zeros(chains, np.complex64)
    visited = np.empty((number // chains, chains), np.complex64)
    for step in range(-16, len(visited)):
        a, b, c = maps.take(ends.searchsorted(random.random_sample(chains), side="right"), axis=1)
        points = a * points + b * points.conj() + c
        if step >= 0:
            visited[step] = points
    return visited.ravel()


@dataclass(frozen=True)
class Speed:
    """Milliseconds of processor time an image of `size` pixels."""

    size: int
    points: int
    expansion: float
    chaos_game: float
    drawing: float
    encoding: float
    stored_bytes: float


def speed(size: int, images: int, repeats: int = 5) -> Speed:
    """Median over repeats of the mean over images of as many classes; the classes' systems are known before."""
    systems = [class_system(0, index) for index in range(images)]
    random = RandomState(0)
    number = num_points(size)
    settings = Settings(images, images, images, size)
    files = [encode(settings, "train", index, 0) for index in range(images)]

    def milliseconds(call: Callable[[int], object]) -> float:
        times = []
        for _ in range(repeats):
            start = time.process_time()
            for index in range(images):
                call(index)
            times.append(1e3 * (time.process_time() - start) / images)
        return median(times)

    return Speed(
        size,
        number,
        milliseconds(lambda index: attractor(systems[index], number)),
        milliseconds(lambda index: chaos_game(systems[index], number, random)),
        milliseconds(lambda index: draw(0, index, 0, size)),
        milliseconds(lambda index: encode(settings, "train", index, 0)),
        mean(len(file) for file in files),
    )


def own_class_is_nearest(num_classes: int) -> float:
    """Share of instances whose picture is nearest to that of their own class, of `num_classes`.

    Pictures are logarithmic densities of 32 x 32 cells of the circumscribed square; instances have perturbed maps,
    but no rotation, reflection, scale, place or color: what remains is how far the systems themselves are apart.
    """

    def picture(system: System) -> NDArray[np.float64]:
        points = attractor(system, 4096)
        center, radius = circle(points)
        return np.log1p(count((points - center) * (16 / radius), 32)).ravel()

    systems = [class_system(0, index) for index in range(num_classes)]
    classes = np.stack([picture(system) for system in systems])
    hits = 0
    for index, system in enumerate(systems):
        instance = picture(perturbed(system, random_generator(0, index, 1)))
        hits += int(np.square(classes - instance).sum(axis=1).argmin() == index)
    return hits / num_classes


# ---- learning --------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Two 3 x 3 convolutions around a shortcut, which halve the sides."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, 2, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, images: Tensor) -> Tensor:
        return functional.relu(self.main(images) + self.shortcut(images))


def small_network(num_classes: int, width: int = 16) -> nn.Sequential:
    """A residual network of eight layers."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 1, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        Block(width, width),
        Block(width, 2 * width),
        Block(2 * width, 4 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, num_classes),
    )


@dataclass(frozen=True)
class Task:
    """What the network learns: `images` training and `validation` images of each of the classes."""

    classes: int = 10
    images: int = 150
    validation: int = 50
    size: int = 32
    epochs: int = 10
    variation: Variation = USUAL
    shuffled: bool = False


def images_of(task: Task, first: int, number: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images (N, 3, size, size) in [-1, 1], labels (N,), class by class."""
    keys = [(index, first + instance) for index in range(task.classes) for instance in range(number)]
    pixels = np.stack([draw(seed, index, instance, task.size, task.variation) for index, instance in keys])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    return images.contiguous(), torch.tensor([index for index, _ in keys])


def learn(task: Task, seed: int) -> list[float]:
    """Accuracy on the validation images after each epoch; the seed is of the classes, weights and order.

    SGD with Nesterov momentum 0.9, batches of 50, weight decay 5e-4, learning rate up to 0.1 and down (one cycle),
    random mirror images; no other augmentation.
    """
    torch.manual_seed(seed)
    images, labels = images_of(task, 0, task.images, seed)
    validation_images, validation_labels = images_of(task, VALIDATION, task.validation, seed)
    if task.shuffled:
        labels = labels[torch.randperm(len(labels))]
    network = small_network(task.classes)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = task.epochs * math.ceil(len(labels) / 50)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps + 1)
    accuracies = []
    for _ in range(task.epochs):
        network.train()
        for rows in torch.randperm(len(labels)).split(50):
            batch = images[rows].flip(3) if torch.rand(()) < 0.5 else images[rows]
            loss = functional.cross_entropy(network(batch), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        network.eval()
        with torch.no_grad():
            right = network(validation_images).argmax(1) == validation_labels
        accuracies.append(float(right.float().mean()))
    return accuracies


WEAKER = USUAL._replace(
    angle=0.06, stretch=0.04, shift=0.04, scale=(0.7, 1.05), place=0.08, background=(0.1, 0.4), contrast=(0.25, 0.55)
)._replace(wave=0.06)
VARIANTS: dict[str, tuple[Task, str]] = {
    "usual": (Task(), "the variation of the set"),
    "weaker": (Task(variation=WEAKER), "about two thirds of it"),
    "stronger": (Task(variation=USUAL._replace(rotation=math.pi)), "rotation to all sides"),
    "any color": (Task(variation=USUAL._replace(background=(0.0, 1.0), contrast=(-0.6, 0.6))), "brighter or darker"),
    "20 classes": (Task(classes=20, images=100), "the variation of the set, 20 classes"),
    "shuffled": (Task(shuffled=True), "labels of the training set shuffled"),
}
SEEDS = {"usual": 3, "shuffled": 2}
"""More than one where a claim hangs on it."""
STYLES = {
    "usual": ("#D55E00", "-"),
    "weaker": ("#56B4E9", "-"),
    "stronger": ("#0072B2", "-"),
    "any color": ("#009E73", (0, (4, 2))),
    "20 classes": ("#E69F00", (0, (6, 1.5, 1, 1.5))),
    "shuffled": ("#333333", (0, (1, 1.5))),
}

Curves = dict[str, list[list[float]]]
"""Accuracies by variant, seed and epoch."""


def learn_all() -> Curves:
    """All variants, each run in one thread, two at a time."""
    runs = [(name, seed) for name in VARIANTS for seed in range(SEEDS.get(name, 1))]
    context = multiprocessing.get_context("spawn")
    curves: Curves = {}
    with ProcessPoolExecutor(2, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = [pool.submit(learn, VARIANTS[name][0], seed) for name, seed in runs]
        for (name, seed), future in zip(runs, futures, strict=True):
            curves.setdefault(name, []).append(future.result())
            print(f"# {name}, seed {seed}: {future.result()[-1]:.0%}", file=sys.stderr, flush=True)
    return curves


# ---- report ----------------------------------------------------------------------------------------------------------


def speed_table(speeds: Sequence[Speed]) -> str:
    """Milliseconds and images a second, by size."""
    header = ["pixels", "points", "expansion, ms", "chaos game, ms", "images/s, drawn", "images/s, with JPEG"]
    rows = [
        [
            f"{s.size}", f"{s.points:,}", f"{s.expansion:.2f}", f"{s.chaos_game:.2f}",
            f"{1e3 / s.drawing:,.0f}", f"{1e3 / s.encoding:,.0f}", f"{s.stored_bytes / 1e3:.1f}",
        ]
        for s in speeds
    ]  # fmt: skip
    return markdown([*header, "kB an image"], rows)


def learning_table(curves: Curves) -> str:
    """Accuracies after some epochs: the mean, and the range where there are several seeds."""
    epochs = [epoch for epoch in (1, 2, 5, 10) if epoch <= len(next(iter(curves.values()))[0])]
    rows = []
    for name, runs in curves.items():
        cells = []
        for epoch in epochs:
            values = [run[epoch - 1] for run in runs]
            spread = f" [{min(values):.0%} .. {max(values):.0%}]" if len(values) > 1 else ""
            cells.append(f"{mean(values):.0%}{spread}")
        rows.append([VARIANTS[name][1], *cells, str(len(runs))])
    return markdown(["variation", *(f"epoch {epoch}" for epoch in epochs), "seeds"], rows)


def draw_figures(curves: Curves, folder: Path) -> None:
    """fractals.png and fractals_learning.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from experiments.records.figures import RC, frame, legend_line

    rows = [
        np.concatenate([np.pad(draw(0, c, i, 80), ((2, 2), (2, 2), (0, 0)), constant_values=255) for i in range(12)], 1)
        for c in range(10)
    ]
    plt.imsave(folder / "fractals.png", np.concatenate(rows))
    with plt.rc_context(RC):
        figure, axes = plt.subplots(figsize=(8.0, 5.4))
        handles = {}
        for name, runs in curves.items():
            color, style = STYLES[name]
            epochs = range(1, len(runs[0]) + 1)
            values = 100 * np.array(runs)
            axes.plot(epochs, values.mean(axis=0), color=color, linestyle=style)
            axes.fill_between(epochs, values.min(axis=0), values.max(axis=0), color=color, alpha=0.15, linewidth=0)
            handles[f"{VARIANTS[name][1]} ({len(runs)} seed{'s' * (len(runs) > 1)})"] = legend_line(color, style)
        task = Task()
        for classes, words in ((task.classes, "chance"), (20, "chance, 20 classes")):
            axes.axhline(100 / classes, color="#999999", linewidth=1, linestyle=(0, (1, 2)))
            place: dict[str, Any] = {
                "xycoords": axes.get_yaxis_transform(),
                "va": "center",
                "fontsize": 7.5,
                "color": "#666666",
            }
            axes.annotate(words, (1.01, 100 / classes), **place)
        axes.set(xlabel="epoch", ylabel="validation accuracy (%)", ylim=(0, 100))
        head = f"A residual network of eight layers on fractals of {task.size} pixels: how soon it learns the classes"
        notes = (
            f"{task.classes} classes unless said otherwise; SGD, batches of 50, {task.epochs} epochs",
            "line: mean of the seeds, band: minimum to maximum",
        )
        lines = [(note, "#444444") for note in notes]
        frame(figure, (head, "#111111"), lines, "python -m benchmarks.fractals --docs", handles)
        figure.savefig(folder / "fractals_learning.png", metadata={"Software": None})
        plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints, and with --docs writes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fractals", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few images, a small task")
    parser.add_argument("--docs", action="store_true", help="put the tables into docs/reports/fractals.md")
    options = parser.parse_args(arguments)
    if options.quick and options.docs:
        parser.error("--docs writes about all cases")
    torch.set_num_threads(1)
    speeds = [speed(size, 8 if options.quick else 100) for size in SPEED_SIZES]
    nearest = 50 if options.quick else 1000
    share = own_class_is_nearest(nearest)
    curves = {"usual": [learn(Task(4, 20, 10, epochs=2), 0)]} if options.quick else learn_all()
    blocks = {
        "origin": origin("python -m benchmarks.fractals --docs"),
        "classes": f"Of {nearest:,} instances with perturbed maps (no rotation, reflection, scale, place or color), "
        f"{share:.1%} are nearest to the picture of their own class among {nearest:,}.",
        "speed": speed_table(speeds),
        "learning": learning_table(curves),
    }
    print("\n\n".join(blocks.values()))
    if options.docs:
        put_into_page("fractals", blocks)
        draw_figures(curves, ROOT / "docs" / "figures")


if __name__ == "__main__":
    main()
