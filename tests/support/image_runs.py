"""Small runs of image classification for the tests: four classes of fractals, a narrow ResNet18."""

import copy

from data_loaders.fractals.sets import FractalImages, Settings
from experiments.catalog import parse_config
from experiments.runs.config import expand_runs

SGD = {"name": "SGD", "lr": 0.02, "momentum": 0.9, "weight_decay": 1e-4}
AADL = {"store_each_nth": 1, "frequency": 2, "wait_iterations": 1, "history_depth": 2, "fused": False}
PUBLISHED = {"history_depth": 3, "frequency": 2, "wait_iterations": 0, "safeguard": True, "average": True}
SET = Settings(num_classes=4, images_per_class=12, validation_per_class=5, size=24, seed=3)

RAW = {
    "experiment": "imagenet",
    "scale": "test",
    "seeds": [0],
    "problem": {
        "data": "folder",
        "model": "resnet18",
        "width": 8,
        "image_size": 24,
        "resize": 24,
        "statistics_images": 20,
        "statistics_batch": 8,
        "evaluation_batch": 8,
    },
    "training": {"epochs": 2, "batch_size": 16, "schedule": "cosine", "warmup_epochs": 0.5},
    "variants": {"sgd": {"label": "plain SGD", "optimizer": SGD}},
}


def image_set(folder):
    """Makes the images, one file each; returns the folder."""
    for split, name in (("train", "train"), ("validation", "val")):
        images = FractalImages(SET, split)
        for index in range(len(images)):
            path = folder / name / images.name(index)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(images.read(index))
    return folder


def raw_config(folder, variant=None, *, problem=None, training=None):
    """A raw configuration with one variant, "one"."""
    raw = copy.deepcopy(RAW)
    raw["problem"] |= {"data_path": str(folder)} | (problem or {})
    raw["training"] |= training or {}
    raw["variants"] = {"one": {"optimizer": SGD} | (variant or {})}
    return raw


def image_run(folder, variant=None, **changes):
    """The run of such a configuration."""
    (run,) = expand_runs(parse_config(raw_config(folder, variant, **changes)))
    return run
