"""Shapes of the parameters of two networks, grouped as FSDP2 would shard them."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from experiments.images.resnet import resnet50

Shape = tuple[int, ...]
WIDTH, HIDDEN, LAYERS, VOCABULARY = 4096, 11008, 32, 64_000


def resnet50_units() -> list[list[Shape]]:
    """Stem, 16 bottleneck blocks and classifier of ResNet50 (161 tensors, 25,557,032 numbers)."""
    with torch.device("meta"):
        model = resnet50()
    stages = (model.layer1, model.layer2, model.layer3, model.layer4)
    stem: nn.Module = nn.Sequential(model.conv1, model.bn1)
    units = [stem, *(block for stage in stages for block in stage), model.fc]
    return [[tuple(parameter.shape) for parameter in unit.parameters()] for unit in units]


def decoder_units() -> list[list[Shape]]:
    """A decoder-only transformer of 7,000,559,616 numbers: embedding, 32 layers, output projection.

    A layer has query, key, value and output projections, a gated feed-forward part, and two norms.
    """
    attention: list[Shape] = [(WIDTH, WIDTH)] * 4
    feed_forward: list[Shape] = [(HIDDEN, WIDTH), (HIDDEN, WIDTH), (WIDTH, HIDDEN)]
    layer = attention + feed_forward + [(WIDTH,), (WIDTH,)]
    return [[(VOCABULARY, WIDTH)], *([layer] * LAYERS), [(WIDTH,), (VOCABULARY, WIDTH)]]


def count_elements(units: Iterable[Iterable[Shape]]) -> int:
    """Numbers in all parameters."""
    return sum(math.prod(shape) for unit in units for shape in unit)
