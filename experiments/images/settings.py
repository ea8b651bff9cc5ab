"""Settings of image classification: data, network, training; and cadences given in epochs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from experiments.distributed.ranks import Ranks
from experiments.settings.checks import BOOLEAN, TEXT, Kind, choice, integer, number, optional, sequence, setting


def _up_to(high: float) -> Kind:
    """A number in (0, high]."""
    return Kind(f"a number in (0, {high:g}]", number(0.0, math.nextafter(high, math.inf)).parse)


@dataclass(frozen=True)
class ImageConfig:
    """Images with labels, and the network.

    Attributes:
        data: "fractals": images that are computed on first use, for machines without ImageNet; "folder": the user's, in
            folders of classes or packed, see `data_loaders.imagenet.sets`.
        data_path: the folder; with fractals where they are kept, null for data/. "folder" needs it, or the environment
            variable AADL_IMAGENET_DIR.
        num_classes, images_per_class, validation_per_class, data_size, data_seed: of the fractals, data_size in pixels.
        data_variation: of the fractals: how far those of a class are apart; 1 is the usual, more is harder.
        model: ResNet-18 or ResNet-50 v1.5.
        width: channels of its first stage; 64 are those of ResNet-18 and 50, fewer make a network for small machines.
        stem: "imagenet" (7x7, stride 2, pooling) or "small" (3x3, no pooling), for images of 32 pixels or so.
        zero_init_residual: whether the last BatchNorm of every residual block starts with gamma = 0 (Goyal et al.).
        fc_std: standard deviation of the last layer's random weights; null: torch's.
        initial_weights: a state_dict saved by torch.save, torchvision's for instance, or a record (.h5) with weights;
            null for random ones.
        image_size: pixels of a crop, for training and validation.
        resize: short side at validation before the center is cropped.
        smallest_crop: least area of a random training crop, as a share of the image's; more for small images.
        decoder: what decodes JPEG.
        exif_orientation: whether images are turned as their EXIF orientation says; published numbers of ImageNet are
            without it.
        on_unreadable: "skip": broken images are named, counted and left out; "stop": the first one ends the run.
        num_workers: processes that decode, per rank; 0: the rank decodes.
        start_method: of these processes; "auto": forkserver where MPI or a GPU is in use.
        stage_seconds: that the ranks wait for each other while the data is opened or made.
        statistics_images: training images from which the statistics of BatchNorm are computed anew before a validation.
        statistics_batch: images in a batch of them, which is what deeper layers are normalized over.
        evaluation_batch: images per rank and batch of the validation.
    """

    data: str = setting(choice("fractals", "folder"), "fractals")
    data_path: str | None = setting(optional(TEXT), None)
    num_classes: int = setting(integer(2, 100_000), 10)
    images_per_class: int = setting(integer(1), 100)
    validation_per_class: int = setting(integer(1), 50)
    data_size: int = setting(integer(8, 4097), 64)
    data_seed: int = setting(integer(0, 2**31), 0)
    data_variation: float = setting(_up_to(2.0), 1.0)
    model: str = setting(choice("resnet18", "resnet50"), "resnet50")
    width: int = setting(integer(1, 1025), 64)
    stem: str = setting(choice("imagenet", "small"), "imagenet")
    zero_init_residual: bool = setting(BOOLEAN, False)
    fc_std: float | None = setting(optional(number(0.0)), None)
    initial_weights: str | None = setting(optional(TEXT), None)
    image_size: int = setting(integer(8, 4097), 224)
    resize: int = setting(integer(8, 8193), 256)
    smallest_crop: float = setting(_up_to(1.0), 0.08)
    decoder: str = setting(choice("pillow", "torchvision"), "pillow")
    exif_orientation: bool = setting(BOOLEAN, False, added_later=True)
    on_unreadable: str = setting(choice("skip", "stop"), "skip")
    num_workers: int = setting(integer(0, 257), 0)
    start_method: str = setting(choice("auto", "forkserver", "spawn", "fork"), "auto")
    stage_seconds: float = setting(number(0.0), 3600.0)
    statistics_images: int = setting(integer(2), 2048)
    statistics_batch: int = setting(integer(2), 64)
    evaluation_batch: int = setting(integer(1), 256)

    of_the_machine: ClassVar = ("data_path", "num_workers", "start_method", "stage_folder", "stage_seconds")
    """Settings that change no number: the digest identifies the data. `stage_folder` stands in older records."""


@dataclass(frozen=True)
class ImageTrainingConfig:
    """Training by epochs of full batches, the learning rate by steps.

    Attributes:
        epochs: passes over the training set.
        batch_size: images in a step, over all ranks; or
        batch_size_per_rank: images in a step of one rank. One of the two is given.
        accumulate: parts of a rank's batch that are differentiated one after the other.
        precision: "float32", or what autocast computes in; "float16" with a GradScaler.
        channels_last: memory format of images and weights.
        compile: whether torch.compile compiles the network for training.
        sync_batchnorm: whether BatchNorm normalizes over the batches of all ranks; GPUs only.
        label_smoothing: share of the label spread over all classes, for training; the validation loss is without it.
        reference_batch: the optimizer's lr is meant for batches of this size and is multiplied by batch / reference
            (linear scaling); null: it is taken as it is.
        warmup_epochs: in which the rate rises linearly to its full value,
        warmup_start: from this share of it; null: from that of the reference batch.
        schedule: afterwards constant; "cosine" or "polynomial" of the given `power` down to `final_share` at the end;
            or "step": times `gamma` at each of the `milestones`, in epochs from the start.
        exempt_norm_and_bias: whether weight decay leaves BatchNorm and biases alone.
        evaluate_every: epochs between two validations; the last epoch always has one.
        num_threads: of torch, per rank.
        deterministic: whether torch uses deterministic algorithms alone. On a GPU, a run that was stopped and taken up
            again has the bits of one that was not only with this; without it cuDNN takes the fastest algorithms.
        measure_updates: whether the relative standard deviation of consecutive updates is recorded.
    """

    epochs: int = setting(integer(1), 90)
    batch_size: int | None = setting(optional(integer(1)), None)
    batch_size_per_rank: int | None = setting(optional(integer(1)), None)
    accumulate: int = setting(integer(1), 1)
    precision: str = setting(choice("float32", "bfloat16", "float16"), "float32")
    channels_last: bool = setting(BOOLEAN, False)
    compile: bool = setting(BOOLEAN, False)
    sync_batchnorm: bool = setting(BOOLEAN, False)
    label_smoothing: float = setting(number(0.0, 1.0, closed_low=True), 0.0)
    reference_batch: int | None = setting(optional(integer(1)), None)
    warmup_epochs: float = setting(number(0.0, closed_low=True), 0.0)
    warmup_start: float | None = setting(optional(number(0.0, 1.0, closed_low=True)), None)
    schedule: str = setting(choice("constant", "cosine", "polynomial", "step"), "cosine")
    power: float = setting(number(0.0), 2.0)
    final_share: float = setting(number(0.0, 1.0, closed_low=True), 0.0)
    milestones: tuple[float, ...] = setting(
        Kind("a list of epochs", lambda value: () if not value else sequence(number(0.0)).parse(value)), ()
    )
    gamma: float = setting(number(0.0, 1.0), 0.1)
    exempt_norm_and_bias: bool = setting(BOOLEAN, False)
    evaluate_every: int = setting(integer(1), 1)
    num_threads: int = setting(integer(1), 1)
    deterministic: bool = setting(BOOLEAN, False)
    measure_updates: bool = setting(BOOLEAN, False)

    def global_batch(self, ranks: Ranks) -> int:
        """Images in a step, over all ranks."""
        if self.batch_size is not None:
            return self.batch_size
        assert self.batch_size_per_rank is not None  # checked
        return self.batch_size_per_rank * ranks.world_size


def check_image_settings(problem: ImageConfig, training: ImageTrainingConfig, where: str = "") -> None:
    """What one setting alone does not show.

    Raises:
        ValueError: settings that do not go together.
    """
    if (training.batch_size is None) == (training.batch_size_per_rank is None):
        raise ValueError(
            f"{where}training must have one of batch_size and batch_size_per_rank, got "
            f"{training.batch_size} and {training.batch_size_per_rank}"
        )
    if problem.resize < problem.image_size:
        raise ValueError(
            f"{where}problem.resize must be at least image_size = {problem.image_size}, got {problem.resize}"
        )
    if training.schedule == "step" and not training.milestones:
        raise ValueError(f"{where}training.milestones must be a list of epochs with schedule step, got []")
    if list(training.milestones) != sorted(training.milestones):
        raise ValueError(f"{where}training.milestones must ascend, got {list(training.milestones)}")
    if training.milestones and training.milestones[-1] >= training.epochs:
        raise ValueError(
            f"{where}training.milestones must be below epochs = {training.epochs}, got {list(training.milestones)}"
        )
    if training.warmup_epochs >= training.epochs:
        raise ValueError(
            f"{where}training.warmup_epochs must be below epochs = {training.epochs}, got {training.warmup_epochs:g}"
        )


CADENCES = ("wait_iterations", "store_each_nth", "frequency")
"""Arguments of an acceleration that count optimizer steps and may be given in epochs, as `2 epochs`."""
NOMINAL_STEPS = 100
"""In an epoch, for checks before the data is known."""


def in_steps(settings: Mapping[str, Any], steps_per_epoch: int, where: str = "acceleration") -> dict[str, Any]:
    """The arguments of an acceleration with cadences in optimizer steps; `1 epoch` is `steps_per_epoch`, at least 1.

    Raises:
        ValueError: a text that is no number of epochs.
    """
    steps = dict(settings)
    for name in CADENCES:
        text = settings.get(name)
        if not isinstance(text, str):
            continue
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*epochs?\s*", text)
        epochs = float(match[1]) if match else math.nan
        if not (epochs > 0 or (epochs == 0 and name == "wait_iterations")):
            raise ValueError(f"{where}.{name} must be an integer or a number of epochs, as '2 epochs', got {text!r}")
        steps[name] = max(round(epochs * steps_per_epoch), 0 if name == "wait_iterations" else 1)
    return steps
