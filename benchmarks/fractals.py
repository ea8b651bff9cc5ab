"""The set of fractals: speed, and whether a network learns it: `python -m benchmarks.fractals` (`--quick`: seconds).

Images per second of processor time, how far classes are apart, and the accuracy of a small residual network against
epochs. --docs puts the tables into docs/reports/fractals.md. It takes some five minutes on one core.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, median

import numpy as np
import torch
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
    count,
    draw,
    num_points,
    perturbed,
    random_generator,
)
from data_loaders.fractals.sets import VALIDATION, Settings, encode

SPEED_SIZES = (32, 64, 224)


# ---- drawing ---------------------------------------------------------------------------------------------------------


def speed(size: int, images: int, repeats: int = 5) -> list[str]:
    """A row of the table: medians over repeats of the mean over images of as many classes, which are known before."""
    systems = [class_system(0, index) for index in range(images)]
    number = num_points(size)
    settings = Settings(images, images, images, size)
    kilobytes = mean(len(encode(settings, "train", index, 0)) for index in range(images)) / 1e3

    def milliseconds(call: Callable[[int], object]) -> float:
        """Of processor time an image."""
        times = []
        for _ in range(repeats):
            start = time.process_time()
            for index in range(images):
                call(index)
            times.append(1e3 * (time.process_time() - start) / images)
        return median(times)

    expansion = milliseconds(lambda index: attractor(systems[index], number))
    drawing = milliseconds(lambda index: draw(0, index, 0, size))
    encoding = milliseconds(lambda index: encode(settings, "train", index, 0))
    rates = [f"{1e3 / drawing:,.0f}", f"{1e3 / encoding:,.0f}"]
    return [f"{size}", f"{number:,}", f"{expansion:.2f}", *rates, f"{kilobytes:.1f}"]


SPEED_HEADER = ["pixels", "points", "expansion, ms", "images/s, drawn", "images/s, with JPEG", "kB an image"]


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


TASKS = {
    "the variation of the set": (Task(), 3),
    "half of it": (Task(variation=USUAL.times(0.5)), 1),
    "labels of the training set shuffled": (Task(shuffled=True), 2),
}
"""What is learned, on how many seeds."""


# ---- report ----------------------------------------------------------------------------------------------------------


def learning_table(tasks: dict[str, tuple[Task, int]]) -> str:
    """Accuracies after some epochs: the mean, and the range where there are several seeds."""
    rows = []
    for name, (task, num_seeds) in tasks.items():
        epochs = [epoch for epoch in (1, 2, 5, 10) if epoch <= task.epochs]
        runs = [learn(task, seed) for seed in range(num_seeds)]
        print(f"# {name}: {[f'{run[-1]:.0%}' for run in runs]}", file=sys.stderr, flush=True)
        cells = []
        for epoch in epochs:
            values = [run[epoch - 1] for run in runs]
            spread = f" [{min(values):.0%} .. {max(values):.0%}]" if len(values) > 1 else ""
            cells.append(f"{mean(values):.0%}{spread}")
        rows.append([name, *cells, str(num_seeds)])
    return markdown(["variation", *(f"epoch {epoch}" for epoch in epochs), "seeds"], rows)


def draw_classes() -> None:
    """Draws docs/figures/fractals.png: ten classes, twelve instances of each."""
    import matplotlib.pyplot as plt

    border = ((2, 2), (2, 2), (0, 0))
    images = [[np.pad(draw(0, row, i, 80), border, constant_values=255) for i in range(12)] for row in range(10)]
    plt.imsave(ROOT / "docs" / "figures" / "fractals.png", np.concatenate([np.concatenate(row, 1) for row in images]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints, and with --docs writes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fractals", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few images, a small task")
    parser.add_argument("--docs", action="store_true", help="put the tables into docs/reports/fractals.md")
    options = parser.parse_args(arguments)
    if options.quick and options.docs:
        parser.error("--docs writes about all cases")
    torch.set_num_threads(1)
    nearest = 50 if options.quick else 1000
    share = own_class_is_nearest(nearest)
    blocks = {
        "origin": origin("python -m benchmarks.fractals --docs"),
        "classes": f"Of {nearest:,} instances with perturbed maps (no rotation, reflection, scale, place or color), "
        f"{share:.1%} are nearest to the picture of their own class among {nearest:,}.",
        "speed": markdown(SPEED_HEADER, [speed(size, 8 if options.quick else 100) for size in SPEED_SIZES]),
        "learning": learning_table({"a small task": (Task(4, 20, 10, epochs=2), 1)} if options.quick else TASKS),
    }
    print("\n\n".join(blocks.values()))
    if options.docs:
        put_into_page("fractals", blocks)
        draw_classes()


if __name__ == "__main__":
    main()
