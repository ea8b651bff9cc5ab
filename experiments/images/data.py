"""Where the images are: fractals or a folder, opened once for all ranks."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from data_loaders.fractals import sets as fractals
from data_loaders.imagenet.folder import Images
from data_loaders.imagenet.pictures import ImageError
from data_loaders.imagenet.sets import check_pair, open_images
from data_loaders.workers import num_cores
from experiments.distributed.ranks import Ranks
from experiments.distributed.together import by_each, by_first, check_same
from experiments.images.settings import ImageConfig
from experiments.training.problem import Description

DATA_FOLDER = Path(__file__).resolve().parents[2] / "data"
PATH_VARIABLE = "AADL_IMAGENET_DIR"
DATA_SETTINGS = (
    "data", "data_path", "num_classes", "images_per_class", "validation_per_class", "data_size", "data_seed",
    "data_variation", "stage_seconds",
)  # fmt: skip
"""Settings of the problem that determine the sets: runs that have them in common share the opened sets."""
SAMPLE = 32
"""Images of a set that a node reads to see whether it has the same as the others."""

Sets = tuple[Images, Images]
"""The training and the validation set."""


def data_folder(config: ImageConfig, env: Mapping[str, str] = os.environ) -> Path:
    """Where the images are, or will be; raises ValueError where no folder was named."""
    if config.data == "fractals":
        name = "fractals-" + "-".join(str(value) for value in _fractal_settings(config).values())
        return Path(config.data_path).expanduser() if config.data_path is not None else DATA_FOLDER / name
    path = config.data_path or env.get(PATH_VARIABLE)
    if not path:
        raise ValueError(f"problem.data_path must name the folder of the images, or {PATH_VARIABLE} must, got neither")
    return Path(path).expanduser()


def _fractal_settings(config: ImageConfig) -> dict[str, Any]:
    return {
        "num_classes": config.num_classes,
        "images_per_class": config.images_per_class,
        "validation_per_class": config.validation_per_class,
        "size": config.data_size,
        "seed": config.data_seed,
        "variation": config.data_variation,
    }


def describe(config: ImageConfig) -> Description:
    """The images before any run, opened by this process; the first use makes fractals."""
    return description_of(config, _first_sets(config))


def description_of(config: ImageConfig, sets: Sets) -> Description:
    train, validation = sets
    digest = hashlib.sha256(f"{train.digest} {validation.digest}".encode()).hexdigest()[:16]
    return Description(config.data if config.data == "fractals" else train.source, digest, len(train))


def open_sets(config: ImageConfig, ranks: Ranks) -> Sets:
    """The training and the validation set of all ranks; all runs of this process share them.

    Rank 0 makes fractals, lists folders and reads headers, because thousands of ranks that did so would overwhelm a
    shared file system; the others receive what it found. A job may have copied the sets to a folder on each node.

    Raises:
        ValueError: no folder was named, or its classes are not those of a training and a validation set.
        OSError: it cannot be read, a node does not find it, or the fractals cannot be written.
    """
    data = ImageConfig(**{name: getattr(config, name) for name in DATA_SETTINGS})
    return _open_sets(data, ranks, os.environ.get(PATH_VARIABLE))


@lru_cache(maxsize=2)
def _open_sets(config: ImageConfig, ranks: Ranks, _: str | None) -> Sets:
    sets = by_first(ranks, lambda: _first_sets(config), "opening the images", config.stage_seconds)
    here = by_each(ranks, lambda: _sets_at(data_folder(config), sets), "looking for the images", config.stage_seconds)
    # Once a node: another copy of the same names would train in silence, an incomplete one on what replaces the rest.
    sample = _sample_checksum(here) if ranks.local_rank == 0 else None
    check_same(ranks, sample, f"the checksum of some images in {data_folder(config)}", config.stage_seconds)
    return here


def _first_sets(config: ImageConfig) -> Sets:
    """The sets as a single process makes and opens them."""
    folder = data_folder(config)
    if config.data == "fractals":
        fractals.ensure(folder, fractals.Settings(**_fractal_settings(config)), num_workers=num_cores())
    return _open(folder)


@lru_cache(maxsize=2)
def _open(folder: Path) -> Sets:
    """The training and the validation set of a folder; cached, because listing folders takes time."""
    train, validation = open_images(folder, "train"), open_images(folder, "validation")
    check_pair(train, validation)
    return train, validation


def _sets_at(folder: Path, sets: Sets) -> Sets:
    train, validation = (images.at(folder) for images in sets)
    for images in (train, validation):
        if not images.folder.is_dir():
            raise FileNotFoundError(f"{images.folder} does not exist here, though the images were found on rank 0")
    return train, validation


def _sample_checksum(sets: Sets) -> str:
    """CRC-32 of evenly spaced images; one that cannot be read contributes its index."""
    checksum = 0
    for images in sets:
        for index in sorted({place * (len(images) - 1) // (SAMPLE - 1) for place in range(SAMPLE)}):
            try:
                data = images.read(index)
            except (OSError, ImageError):
                data = str(index).encode()
            checksum = zlib.crc32(data, checksum)
    return f"{checksum:08x}"
