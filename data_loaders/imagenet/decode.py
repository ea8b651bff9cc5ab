"""From encoded bytes to squares of pixels: decoders, random and central crops."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_loaders.imagenet.pictures import POLICIES, ImageError, open_image, orientation, to_rgb

if TYPE_CHECKING:
    from torch import Tensor  # imported where it is used: packing and reading start faster without torch

DECODERS = ("pillow", "torchvision")
NEEDS = {"pillow": "PIL", "torchvision": "torchvision.io"}

SMALLEST = 0.08  # area of a random crop, as a share of the image's
ASPECT = (3 / 4, 4 / 3)  # its width over its height
ATTEMPTS = 10
NUM_UNIFORM = 2 * ATTEMPTS + 3  # random numbers of an augmentation: area and aspect of every attempt, x, y, flip

Pixels = NDArray[np.uint8]
"""(height, width, 3)."""


@dataclass(frozen=True)
class Decoding:
    """How images become pixels.

    Attributes:
        size: side of the square crop, in pixels.
        resize: length of the short side before the central crop at evaluation, in pixels, at least `size`.
        decoder: one of `DECODERS`; torchvision need not be installed.
        on_corrupt: what an unreadable image does: "skip" it, count it and go on, or "stop".
        smallest_crop: least area of a random crop, as a share of the image's, in (0, 1].
        exif_orientation: whether images are turned as their EXIF orientation says.
    """

    size: int
    resize: int
    decoder: str = "pillow"
    on_corrupt: str = "skip"
    smallest_crop: float = SMALLEST
    exif_orientation: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("decoder", DECODERS), ("on_corrupt", POLICIES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be {' or '.join(allowed)}, got {getattr(self, name)!r}")
        if not 1 <= self.size <= self.resize:
            raise ValueError(f"size must be at least 1 and at most resize, {self.resize} pixels, got {self.size}")
        if not 0 < self.smallest_crop <= 1:
            raise ValueError(f"smallest_crop must be a share in (0, 1], got {self.smallest_crop}")


@dataclass(frozen=True)
class Crop:
    """Part of an image, in pixels, that becomes the square; fractions are allowed; mirrored where `flip`."""

    left: float
    top: float
    width: float
    height: float
    flip: bool = False

    def pixels(self) -> tuple[int, int, int, int, bool]:
        """Left, top, width, height, flip of a crop of whole pixels."""
        return int(self.left), int(self.top), int(self.width), int(self.height), self.flip


# ---- crops -----------------------------------------------------------------------------------------------------------


def random_crop(width: int, height: int, numbers: list[float], smallest: float = SMALLEST) -> Crop:
    """Crop of a random area and aspect at a random place, mirrored in half of the cases.

    Area uniform in `smallest` to 1 of the image's, aspect log-uniform in 3/4 to 4/3; if ten attempts do not fit, the
    largest central crop with an aspect in that range (Szegedy et al. 2015; torchvision's RandomResizedCrop). There are
    NUM_UNIFORM numbers in [0, 1).
    """
    x, y, flip = numbers[-3], numbers[-2], numbers[-1] < 0.5
    low, high = math.log(ASPECT[0]), math.log(ASPECT[1])
    for attempt in range(ATTEMPTS):
        area = width * height * (smallest + (1.0 - smallest) * numbers[2 * attempt])
        aspect = math.exp(low + (high - low) * numbers[2 * attempt + 1])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return Crop(int(x * (width - w + 1)), int(y * (height - h + 1)), w, h, flip)
    w = min(width, max(1, round(height * ASPECT[1])))
    h = min(height, max(1, round(width / ASPECT[0])))
    return Crop((width - w) // 2, (height - h) // 2, w, h, flip)


def central_place(width: int, height: int, size: int, resize: int) -> tuple[int, int, int, int]:
    """Width and height of a resized image, left and top of its central square, in pixels, rounded as by torchvision."""
    short = min(width, height)
    new_width, new_height = int(resize * width / short), int(resize * height / short)
    return new_width, new_height, round((new_width - size) / 2), round((new_height - size) / 2)


def central_crop(width: int, height: int, size: int, resize: int) -> Crop:
    """The part of the original image that the central square shows, see `central_place`."""
    new_width, new_height, left, top = central_place(width, height, size, resize)
    x, y = width / new_width, height / new_height
    return Crop(left * x, top * y, min(size * x, width - left * x), min(size * y, height - top * y))


# ---- decoders --------------------------------------------------------------------------------------------------------


class Decoder:
    """Decodes, crops and resizes one image after the other.

    Resizing is bilinear with antialiasing (the triangle filter of Pillow and of torch's interpolate). What an image
    shows is decided by `data_loaders.imagenet.pictures`; another decoder than Pillow reads only RGB and gray images
    without transparency, and Pillow those that it refuses, of which there are `num_fallbacks` so far. Draft decoding is
    not used because it changes pixels. ValueError where the decoder does not import.
    """

    def __init__(self, decoding: Decoding) -> None:
        self.decoding = decoding
        self.num_fallbacks = 0
        self._first: Callable[[bytes, int, int, list[float] | None], Pixels] | None = None
        if decoding.decoder == "torchvision":
            self._first = _WithTorchvision(decoding)

    def __call__(self, data: bytes, numbers: list[float] | None) -> Pixels:
        """The square, (size, size, 3): a random crop by numbers, else the central one; ImageError if unreadable."""
        image = open_image(data)
        first = self._first if self._first is not None and self._is_plain(image) else None
        if first is not None:
            with suppress(Exception):  # whatever a library raises on an image that it does not take
                return first(data, *image.size, numbers)
        square = self._with_pillow(image, numbers)
        self.num_fallbacks += first is not None
        return square

    def _is_plain(self, image: Image.Image) -> bool:
        """Whether all libraries show the same; they disagree on other modes, transparency and orientation."""
        plain = image.mode in ("RGB", "L") and "transparency" not in image.info
        return plain and not (self.decoding.exif_orientation and orientation(image) != 1)

    def _with_pillow(self, image: Image.Image, numbers: list[float] | None) -> Pixels:
        size = self.decoding.size
        picture = to_rgb(image, self.decoding.exif_orientation)
        if numbers is None:
            crop = central_crop(*picture.size, size, self.decoding.resize)
        else:
            crop = random_crop(*picture.size, numbers, self.decoding.smallest_crop)
        box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
        square = picture.resize((size, size), Image.Resampling.BILINEAR, box=box)
        if crop.flip:
            square = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.frombuffer(square.tobytes(), np.uint8).reshape(size, size, 3)  # asarray takes half as long again


def check_decoder(name: str) -> ModuleType:
    """The module that a decoder needs; raises ValueError, in one sentence, where it does not import."""
    try:
        return importlib.import_module(NEEDS[name])
    except Exception as error:  # a broken installation raises anything, RuntimeError and OSError included
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"decoder {name!r} needs {NEEDS[name]}, which does not import here ({reason}): install it, or choose pillow"
        ) from None


class _WithTorchvision:
    """torchvision's decoder and torch's resizing, which takes no pixel from beyond the crop."""

    def __init__(self, decoding: Decoding) -> None:
        import torch

        module = check_decoder("torchvision")
        self.decoding = decoding
        self.decode = partial(module.decode_image, mode=module.ImageReadMode.RGB)
        self.as_tensor = partial(torch.frombuffer, dtype=torch.uint8)

    def __call__(self, data: bytes, width: int, height: int, numbers: list[float] | None) -> Pixels:
        image: Tensor = self.decode(self.as_tensor(data))
        if image.itemsize != 1 or image.shape != (3, height, width):
            raise ImageError(f"it was decoded to {tuple(image.shape)}, {image.dtype}")
        size = self.decoding.size
        if numbers is None:
            new_width, new_height, left, top = central_place(width, height, size, self.decoding.resize)
            square = _resized(image, new_width, new_height)[:, top : top + size, left : left + size]
        else:
            x, y, w, h, flip = random_crop(width, height, numbers, self.decoding.smallest_crop).pixels()
            square = _resized(image[:, y : y + h, x : x + w], size, size)
            square = square.flip(2) if flip else square
        return square.permute(1, 2, 0).numpy()


def _resized(image: Tensor, width: int, height: int) -> Tensor:
    from torch.nn.functional import interpolate

    return interpolate(image[None], (height, width), mode="bilinear", antialias=True)[0]
