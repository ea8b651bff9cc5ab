"""Settings of image classification: data, network, training."""

from __future__ import annotations

from operator import not_
from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from experiments.distributed.ranks import Ranks
from experiments.settings.kinds import Items, Share, Text
from experiments.settings.schema import Settings

Two = Annotated[int, Field(ge=2)]
"""An integer >= 2."""
LessThanOne = Annotated[float, Field(ge=0, lt=1)]
"""A number in [0, 1)."""


class ImageConfig(Settings):
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
        stage_seconds: that the ranks wait for each other while the data is opened or made.
        statistics_images: training images for the statistics of BatchNorm, computed again before a validation.
        statistics_batch: images in a batch of them, which is what deeper layers are normalized over.
        evaluation_batch: images per rank and batch of the validation.
    """

    data: Literal["fractals", "folder"] = "fractals"
    data_path: Text | None = None
    num_classes: Annotated[int, Field(ge=2, lt=100_000)] = 10
    images_per_class: PositiveInt = 100
    validation_per_class: PositiveInt = 50
    data_size: Annotated[int, Field(ge=8, le=4096)] = 64
    data_seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    data_variation: Annotated[float, Field(gt=0, le=2)] = 1.0
    model: Literal["resnet18", "resnet50"] = "resnet50"
    width: Annotated[int, Field(ge=1, le=1024)] = 64
    stem: Literal["imagenet", "small"] = "imagenet"
    zero_init_residual: bool = False
    fc_std: PositiveFloat | None = None
    initial_weights: Text | None = None
    image_size: Annotated[int, Field(ge=8, le=4096)] = 224
    resize: Annotated[int, Field(ge=8, le=8192)] = 256
    smallest_crop: Annotated[float, Field(gt=0, le=1)] = 0.08
    decoder: Literal["pillow", "torchvision"] = "pillow"
    # Records from before this setting leave it out, and stay records of the same runs.
    exif_orientation: bool = Field(False, exclude_if=not_)
    on_unreadable: Literal["skip", "stop"] = "skip"
    num_workers: Annotated[int, Field(ge=0, le=256)] = 0
    stage_seconds: PositiveFloat = 3600.0
    statistics_images: Two = 2048
    statistics_batch: Two = 64
    evaluation_batch: PositiveInt = 256

    of_the_machine: ClassVar = ("data_path", "start_method", "stage_folder", "num_workers", "stage_seconds")
    """Settings that change no number: the digest identifies the data. Only older records have "start_method" and
    "stage_folder"."""
    removed_keys: ClassVar = {"start_method": "leave it out"}

    @model_validator(mode="after")
    def _contain_the_crop(self) -> ImageConfig:
        if self.resize < self.image_size:
            raise ValueError(f"resize must be at least image_size = {self.image_size}, got {self.resize}")
        return self


class ImageTrainingConfig(Settings):
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

    epochs: PositiveInt = 90
    batch_size: PositiveInt | None = None
    batch_size_per_rank: PositiveInt | None = None
    accumulate: PositiveInt = 1
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    channels_last: bool = False
    compile: bool = False
    sync_batchnorm: bool = False
    label_smoothing: LessThanOne = 0.0
    reference_batch: PositiveInt | None = None
    warmup_epochs: NonNegativeFloat = 0.0
    warmup_start: LessThanOne | None = None
    schedule: Literal["constant", "cosine", "polynomial", "step"] = "cosine"
    power: PositiveFloat = 2.0
    final_share: LessThanOne = 0.0
    milestones: Items[PositiveFloat] = ()
    gamma: Share = 0.1
    exempt_norm_and_bias: bool = False
    evaluate_every: PositiveInt = 1
    num_threads: PositiveInt = 1
    deterministic: bool = False
    measure_updates: bool = False

    @model_validator(mode="after")
    def _have_one_batch_size(self) -> ImageTrainingConfig:
        if (self.batch_size is None) == (self.batch_size_per_rank is None):
            raise ValueError(
                f"one of batch_size and batch_size_per_rank must be given, got {self.batch_size} and "
                f"{self.batch_size_per_rank}"
            )
        return self

    @model_validator(mode="after")
    def _have_a_schedule(self) -> ImageTrainingConfig:
        milestones, epochs = list(self.milestones), self.epochs
        if self.schedule == "step" and not milestones:
            raise ValueError("milestones must be a list of epochs with schedule step, got []")
        if milestones != sorted(set(milestones)):
            raise ValueError(f"milestones must ascend, got {milestones}")
        if milestones and milestones[-1] >= epochs:
            raise ValueError(f"milestones must be below epochs = {epochs}, got {milestones}")
        if self.warmup_epochs >= epochs:
            raise ValueError(f"warmup_epochs must be below epochs = {epochs}, got {self.warmup_epochs:g}")
        return self

    def global_batch(self, ranks: Ranks) -> int:
        if self.batch_size is not None:
            return self.batch_size
        assert self.batch_size_per_rank is not None  # checked
        return self.batch_size_per_rank * ranks.world_size
