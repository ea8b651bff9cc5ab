"""ResNet50 in torch.nn alone: its parameter shapes, and what acceleration adds to a training step on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from torch import nn

import aadl
from benchmarks.machine import time_call

BATCH = 256


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around a shortcut, which is projected where shapes change."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            *_normalized(channels, width, 1, 1),
            nn.ReLU(inplace=True),
            *_normalized(width, width, 3, stride),
            nn.ReLU(inplace=True),
            *_normalized(width, 4 * width, 1, 1),
        )
        same = channels == 4 * width and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(*_normalized(channels, 4 * width, 1, stride))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.relu(self.main(image) + self.shortcut(image))
        return result


def resnet50(classes: int = 1000) -> nn.Sequential:
    """He, Zhang, Ren, Sun 2016, with the stride in the 3x3 convolution; 25,557,032 parameters in 161 tensors."""
    layers: list[nn.Module] = [*_normalized(3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 << stage
        for block in range(blocks):
            layers.append(Bottleneck(channels, width, 2 if stage and not block else 1))
            channels = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def training_share(
    settings: Sequence[dict[str, Any]], device: str, batch: int = BATCH, macro_steps: int = 20, image: int = 224
) -> list[dict[str, Any]]:
    """Acceleration every 2 macro-steps of 10 steps, as a share of the plain training step.

    Training is bfloat16 autocast on one random batch, channels_last, SGD with momentum. Plain and accelerated
    macro-steps are timed in turn over whole steps: zero_grad, forward, backward, optimizer.step.

    Args:
        settings: keyword arguments of `aadl.accelerate` besides the schedule, one entry per row.
        device: of the training.
        batch: images.
        macro_steps: timed with and without acceleration; an even number.
        image: pixels of a side.

    Returns:
        One row per entry: seconds of a plain step and of an accelerated one, the share, and candidates accepted.
    """
    model = resnet50().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(batch, 3, image, image, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(1000, (batch,), device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def ten_steps() -> None:
        for _ in range(10):
            optimizer.zero_grad()
            with torch.autocast(torch.device(device).type, torch.bfloat16):
                loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()

    def seconds() -> float:
        """Of a step, from pairs of macro-steps, one of which accelerates."""
        pairs = [time_call(ten_steps, device) + time_call(ten_steps, device) for _ in range(macro_steps // 2)]
        return median(pairs) / 20

    ten_steps()
    rows = []
    for extra in settings:
        plain = seconds()
        aadl.accelerate(optimizer, store_each_nth=10, frequency=20, safeguard=False, **extra)
        for _ in range(12):  # the history is full
            ten_steps()
        counts = aadl.accelerator_of(optimizer).statistics
        earlier = counts["accepted"]
        accelerated = seconds()
        accepted = counts["accepted"] - earlier
        if not accepted:
            raise RuntimeError(f"no candidate was taken, so nothing was measured: {counts}")
        aadl.remove_acceleration(optimizer)
        plain = median((plain, seconds()))
        share = accelerated / plain - 1
        rows.append({**extra, "plain": plain, "accelerated": accelerated, "share": share, "accepted": accepted})
    return rows


def _normalized(channels: int, width: int, kernel: int, stride: int) -> list[nn.Module]:
    """A convolution without bias and its batch normalization."""
    return [nn.Conv2d(channels, width, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(width)]
