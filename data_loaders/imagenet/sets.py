"""The images of a split, whether packed or in folders, and whether training and validation fit together."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from data_loaders.imagenet.folder import FOLDERS, FolderImages, Images
from data_loaders.imagenet.packed import PackedImages
from data_loaders.imagenet.shards import find_shards


def open_images(root: str | os.PathLike[str], split: str) -> Images:
    """The images of a split, packed or in folders; packed ones are preferred.

    The root holds shards `<split>-00000-of-*.h5`, or `train/` and `val/` (or `validation/`).

    Raises:
        FileNotFoundError: there is neither form.
        ValueError: shards or folders are not as they should be; one sentence says how.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise FileNotFoundError(f"ImageNet: {root} {'is not a folder' if folder.exists() else 'does not exist'}")
    if find_shards(folder, split):
        return PackedImages(folder, split)
    if not any((folder / name).is_dir() for name in FOLDERS[split]):
        raise FileNotFoundError(
            f"ImageNet: {root} holds neither packed images ({split}-00000-of-*.h5) nor a folder "
            f"{' or '.join(FOLDERS[split])}"
        )
    return FolderImages(folder, split)


def check_pair(train: Images, validation: Images) -> None:
    """Raises ValueError, naming them, where the classes of both sets differ or a class has no image."""
    if train.class_names != validation.class_names:
        first, second = set(train.class_names), set(validation.class_names)
        differences = [
            f"{len(only)} only in {name} ({', '.join(sorted(only)[:5])}{', ...' if len(only) > 5 else ''})"
            for name, only in (("train", first - second), ("validation", second - first))
            if only
        ]
        how = "; ".join(differences) or "in another order"
        raise ValueError(f"train has {len(first)} classes and validation {len(second)}: {how}")
    for name, images in (("train", train), ("validation", validation)):
        counts = np.bincount(images.labels, minlength=len(images.class_names))
        empty = [images.class_names[each] for each in np.flatnonzero(counts == 0)]
        if empty:
            more = f", ... ({len(empty)} classes)" if len(empty) > 5 else ""
            raise ValueError(f"{name} has no image of {', '.join(empty[:5])}{more}")
