"""Shapes of the parameters of two networks, grouped as FSDP2 would shard them: no torchvision, no memory."""

from __future__ import annotations

import math

Shape = tuple[int, ...]

RESNET50_BLOCKS = (3, 4, 6, 3)
"""Bottleneck blocks in the four stages."""
EXPANSION = 4
CLASSES = 1000

WIDTH = 4096
HIDDEN = 11008
LAYERS = 32
VOCABULARY = 64_000


def resnet50_shapes() -> list[Shape]:
    """Shapes of the 161 parameters (25,557,032 numbers) of ResNet50, in the order of torchvision's `resnet50`."""
    return [shape for unit in resnet50_units() for shape in unit]


def resnet50_units() -> list[list[Shape]]:
    """The same by unit: stem, 16 bottleneck blocks, classifier."""
    units, inputs = [_convolution(3, 64, 7)], 64
    for stage, blocks in enumerate(RESNET50_BLOCKS):
        width = 64 * 2**stage
        for block in range(blocks):
            unit = _convolution(inputs, width, 1) + _convolution(width, width, 3)
            unit += _convolution(width, EXPANSION * width, 1)
            if block == 0:
                unit += _convolution(inputs, EXPANSION * width, 1)
            units.append(unit)
            inputs = EXPANSION * width
    return [*units, [(CLASSES, inputs), (CLASSES,)]]


def decoder_units() -> list[list[Shape]]:
    """A decoder-only transformer of 7,000,559,616 numbers: embedding, 32 layers, output projection.

    A layer has query, key, value and output projections, a gated feed-forward part, and two norms.
    """
    attention: list[Shape] = [(WIDTH, WIDTH)] * 4
    feed_forward: list[Shape] = [(HIDDEN, WIDTH), (HIDDEN, WIDTH), (WIDTH, HIDDEN)]
    layer = attention + feed_forward + [(WIDTH,), (WIDTH,)]
    return [[(VOCABULARY, WIDTH)], *([layer] * LAYERS), [(WIDTH,), (VOCABULARY, WIDTH)]]


def count_elements(units: list[list[Shape]]) -> int:
    """Numbers in all parameters."""
    return sum(math.prod(shape) for unit in units for shape in unit)


def _convolution(inputs: int, outputs: int, size: int) -> list[Shape]:
    """A convolution without bias, and the scale and shift of the batch normalization after it."""
    return [(outputs, inputs, size, size), (outputs,), (outputs,)]
