"""Random iterated function systems and pictures of their attractors.

A class is a system of 3 to 8 contracting affine maps w_i. Its attractor, the set A with A = union of w_i(A), is what
the images of the class show; they differ in the parameters of the maps (a little), in rotation, reflection, scale and
place, and in the colors of figure and background. After H. Kataoka et al., "Pre-training without Natural Images", ACCV
2020, with the maps given by angles and singular values.

An image depends on (seed, class, instance) alone.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.random import PCG64, RandomState, SeedSequence
from numpy.typing import NDArray

VERSION = 1
"""Of the pictures: a change that draws others raises it, so that a set made before is not taken for the same."""

# ---- classes ---------------------------------------------------------------------------------------------------------

NUM_MAPS = (3, 8)
SINGULAR_VALUES = (0.25, 0.9)
CONTRACTION = 0.95  # largest singular value of an instance, whatever its perturbation
LARGEST_PROBABILITY = 0.6
OVERLAP = (0.45, 1.25)  # of sum |det|: below it is dust, above it the copies cover each other and become a cloud
FILLED = (0.2, 0.5)  # share of CHECKED x CHECKED cells of the circumscribed square that the attractor must meet
CHECKED = 32


class System(NamedTuple):
    """Maps w(z) = R(first) diag(stretch) R(second) z + shift of an IFS, arrays with an entry a map.

    R is a rotation by an angle in radians; the second column of `stretch` (maps, 2) is negative for a reflection;
    `shift` is complex, x + iy.
    """

    first: NDArray[np.float64]
    second: NDArray[np.float64]
    stretch: NDArray[np.float64]
    shift: NDArray[np.complex128]

    @property
    def probabilities(self) -> NDArray[np.float64]:
        """|det| of each map over their sum: points are then spread evenly over the attractor."""
        areas = np.abs(self.stretch.prod(axis=1))
        return np.asarray(areas / areas.sum())


def random_generator(seed: int, class_index: int, part: int) -> RandomState:
    """The numbers of a class (part 0) or of its instance part - 1; RandomState, since its streams are frozen."""
    return RandomState(PCG64(SeedSequence(seed, spawn_key=(class_index, part))))


@lru_cache(maxsize=1 << 14)
def class_system(seed: int, class_index: int) -> System:
    """The first random system of the class that fills a reasonable share of its picture; about 2 ms, then kept."""
    random = random_generator(seed, class_index, 0)
    while True:
        system = _random_system(random)
        overlap = np.abs(system.stretch.prod(axis=1)).sum()
        if system.probabilities.max() <= LARGEST_PROBABILITY and OVERLAP[0] <= overlap <= OVERLAP[1]:
            points = attractor(system, 4 * CHECKED**2)
            center, radius = circle(points)
            filled = (count((points - center) * (CHECKED / (2 * radius)), CHECKED) > 0).mean()
            if FILLED[0] <= filled <= FILLED[1]:
                return system


def _random_system(random: RandomState) -> System:
    num_maps = random.randint(NUM_MAPS[0], NUM_MAPS[1] + 1)
    first, second = random.uniform(-math.pi, math.pi, (2, num_maps))
    large = random.uniform(*SINGULAR_VALUES, num_maps)
    small = large * random.uniform(0.2, 1.0, num_maps) * np.where(random.uniform(size=num_maps) < 0.5, 1, -1)
    x, y = random.uniform(-1.0, 1.0, (2, num_maps))
    return System(first, second, np.stack([large, small], axis=1), x + 1j * y)


# ---- points of the attractor -----------------------------------------------------------------------------------------

NUM_SEEDS = 256
_SHUFFLES = [RandomState(step).permutation(NUM_SEEDS) for step in range(16)]
"""Who follows whom in each of the steps that contract the seeds onto the attractor."""


def num_points(size: int) -> int:
    """Points of an image with `size` x `size` pixels: the least power of two that gives every pixel two."""
    return max(2048, 1 << (2 * size**2 - 1).bit_length())


def attractor(system: System, number: int) -> NDArray[np.complex64]:
    """`number` points x + iy, spread over the attractor by its invariant measure; rounded up to NUM_SEEDS 2^k.

    Deterministic expansion instead of a random walk: a set of points is replaced by the union of its images, each map
    taking as many points as its probability says, so that parts are visited in exact proportion. NUM_SEEDS points
    are contracted onto the attractor, then the set doubles until it is large enough.
    """
    maps = complex_maps(system)
    ends = np.cumsum(system.probabilities)
    points = _on_attractor(maps, np.rint(ends * NUM_SEEDS).astype(np.int64))
    while len(points) < number:
        points = _doubled(points, maps, ends)
    return points


def _on_attractor(maps: NDArray[np.complex64], stops: NDArray[np.int64]) -> NDArray[np.complex64]:
    """NUM_SEEDS points; map i is applied to those from stops[i - 1] to stops[i]."""
    points = np.zeros(NUM_SEEDS, np.complex64)
    a, b, c = np.repeat(maps, np.diff(stops, prepend=0), axis=1)
    for shuffled in _SHUFFLES:
        points = points.take(shuffled)
        points = a * points + b * points.conj() + c
    return points


def _doubled(
    points: NDArray[np.complex64], maps: NDArray[np.complex64], ends: NDArray[np.float64]
) -> NDArray[np.complex64]:
    """Twice as many points; `ends` are the cumulative probabilities of the maps."""
    parents = _parents(len(points))
    doubled = np.empty(len(parents), np.complex64)
    start = 0
    for (a, b, c), stop in zip(maps.T, np.rint(ends * len(parents)).astype(np.int64).tolist(), strict=True):
        chosen, mapped = points.take(parents[start:stop]), doubled[start:stop]
        np.multiply(chosen, a, out=mapped)
        np.conjugate(chosen, out=chosen)
        chosen *= b
        mapped += chosen
        mapped += c
        start = stop
    return doubled


def complex_maps(system: System) -> NDArray[np.complex64]:
    """(3, maps): a, b, c of the maps as w(z) = a z + b conj(z) + c."""
    both, difference = system.stretch.sum(axis=1) / 2, (system.stretch[:, 0] - system.stretch[:, 1]) / 2
    turn = np.exp(1j * (system.first + system.second)), np.exp(1j * (system.first - system.second))
    return np.stack([turn[0] * both, turn[1] * difference, system.shift]).astype(np.complex64)


@lru_cache(maxsize=64)
def _parents(count: int) -> NDArray[np.intp]:
    """Which of `count` points each of the next 2 `count` comes from.

    Steps by the golden ratio: points lie in the order of their maps, so any run of parents, such as those of one
    map, covers all parts of the attractor evenly.
    """
    parents = np.arange(2 * count, dtype=np.intp) * (int(0.6180339887 * count) | 1) % count
    parents.flags.writeable = False
    return parents


def circle(points: NDArray[np.complex64]) -> tuple[complex, float]:
    """Center of the bounding box and largest distance from it, of some thousand of the points."""
    some = points[:: max(1, len(points) >> 12)]
    x, y = some.real, some.imag
    center = complex(x.min() + x.max(), y.min() + y.max()) / 2
    return center, float(np.abs(some - np.complex64(center)).max())


def count(points: NDArray[np.complex64], size: int) -> NDArray[np.intp]:
    """Points in each pixel of (size, size), whose middle is the origin; those outside are left out."""
    side = size + 2  # a border of one pixel takes what lies outside
    places = points.view(np.float32) + np.float32(size / 2 + 1)
    np.clip(places, 0, side - 1, out=places)
    np.trunc(places, out=places)
    cells = places[1::2] * np.float32(side) + places[0::2]  # exact: below 2^24
    counts = np.bincount(cells.astype(np.intp), minlength=side**2)
    return counts.reshape(side, side)[1:-1, 1:-1]


# ---- images ----------------------------------------------------------------------------------------------------------

BRIGHT = 8  # points in a pixel that give it the full color
SIZES = (8, 2048)


class Variation(NamedTuple):
    """How far the instances of a class are apart; docs/reports/fractals.md says how the values were chosen.

    Attributes:
        angle: standard deviation of both angles of each map, in radians.
        stretch: of the logarithms of its singular values.
        shift: of each coordinate of its translation, which the class draws from [-1, 1].
        rotation: largest angle of the whole picture, in radians, to both sides.
        scale: radius of the circumscribed circle relative to half the picture, from and to.
        place: largest displacement relative to the picture.
        background: color in every channel, from and to, of [0, 1].
        contrast: by which the figure is brighter in every channel, from and to.
        wave: largest amplitude of the waves of color.
    """

    angle: float = 0.1
    stretch: float = 0.06
    shift: float = 0.06
    rotation: float = math.pi / 6
    scale: tuple[float, float] = (0.55, 1.1)
    place: float = 0.15
    background: tuple[float, float] = (0.0, 0.5)
    contrast: tuple[float, float] = (0.1, 0.6)
    wave: float = 0.12

    def times(self, factor: float) -> Variation:
        """Instances that are `factor` times as far apart, in [0, 2]: ranges around the same middle, kept to colors."""

        def scaled(ends: tuple[float, float], least: float = 0.0) -> tuple[float, float]:
            inwards = (1 - factor) * (ends[1] - ends[0]) / 2  # 0 for the factor 1, whose values stay to the last bit
            return max(least, ends[0] + inwards), ends[1] - inwards

        return Variation(
            angle=factor * self.angle,
            stretch=factor * self.stretch,
            shift=factor * self.shift,
            rotation=factor * self.rotation,
            scale=scaled(self.scale, 0.1),
            place=factor * self.place,
            background=scaled(self.background),
            contrast=scaled(self.contrast, 0.02),
            wave=factor * self.wave,
        )


USUAL = Variation()


def draw(seed: int, class_index: int, instance: int, size: int, variation: Variation = USUAL) -> NDArray[np.uint8]:
    """One image, uint8 (size, size, 3); the same for the same arguments, in any process.

    Args:
        seed: of the set, in [0, 2^63).
        class_index: in [0, 2^31).
        instance: in [0, 2^32 - 2].
        size: pixels, in [8, 2048].
        variation: between the instances of a class.
    """
    random = random_generator(seed, class_index, instance + 1)
    points = attractor(perturbed(class_system(seed, class_index), random, variation), num_points(size))
    if random.uniform() < 0.5:
        points = points.conj()
    center, radius = circle(points)
    turn = np.exp(1j * random.uniform(-variation.rotation, variation.rotation))
    factor = random.uniform(*variation.scale) * size / (2 * radius) * turn
    place = complex(*random.uniform(-variation.place, variation.place, 2)) * size
    points = points * np.complex64(factor) + np.complex64(place - factor * center)
    return _colored(count(points, size), random, variation)


def perturbed(system: System, random: RandomState, variation: Variation = USUAL) -> System:
    """The system of an instance, with contractions again."""
    first, second, large, small, x, y = random.standard_normal((6, len(system.shift)))
    stretch = system.stretch * np.exp(variation.stretch * np.stack([large, small], axis=1))
    return System(
        system.first + variation.angle * first,
        system.second + variation.angle * second,
        np.clip(stretch, -CONTRACTION, CONTRACTION),
        system.shift + variation.shift * (x + 1j * y),
    )


def _colored(counts: NDArray[np.intp], random: RandomState, variation: Variation) -> NDArray[np.uint8]:
    """Figure and background with colors that wave along the rows plus along the columns."""
    size = len(counts)
    opacity = np.log1p(np.arange(BRIGHT + 1)) / math.log1p(BRIGHT)
    share = opacity.astype(np.float32).take(counts, mode="clip")
    color = 255 * random.uniform(*variation.background, (3, 1))
    step = 255 * random.uniform(*variation.contrast, (3, 1))
    wave = variation.wave
    rows, columns = _waves(size, random, wave) + color, _waves(size, random, wave)
    figure_rows, figure_columns = _waves(size, random, wave) + step, _waves(size, random, wave)
    image = _sum(figure_rows, figure_columns)
    image *= share
    image += _sum(rows, columns)
    np.clip(image, 0, 255, out=image)
    return np.ascontiguousarray(image.astype(np.uint8).transpose(1, 2, 0))


def _waves(size: int, random: RandomState, wave: float) -> NDArray[np.float64]:
    """(3, size): a sine a channel, of at most two periods."""
    amplitude, periods, phase = random.uniform(size=(3, 3, 1))
    angle = 2 * math.pi * (np.arange(size) / size * 2 * periods + phase)
    return np.asarray(255 * wave * amplitude * np.sin(angle))


def _sum(rows: NDArray[np.float64], columns: NDArray[np.float64]) -> NDArray[np.float32]:
    return rows.astype(np.float32)[:, :, None] + columns.astype(np.float32)[:, None, :]


def check_integer(name: str, value: int, low: int, high: int) -> None:
    """Raises ValueError unless `value` is an integer in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
        raise ValueError(f"{name} must be an integer in [{low}, {high}], got {value!r}")
