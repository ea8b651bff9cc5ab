"""Image classification: ResNets on ImageNet1k in any of its layouts, or on fractals where there is none."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from data_loaders.fractals import sets as fractals
from data_loaders.imagenet.decode import Decoding
from data_loaders.imagenet.folder import Images
from data_loaders.imagenet.loaders import EvaluationLoader, TrainLoader
from data_loaders.imagenet.pictures import ImageError
from data_loaders.imagenet.sets import check_pair, open_images
from data_loaders.workers import num_cores
from experiments.distributed.devices import device_of, safe_start_method
from experiments.distributed.ranks import Ranks
from experiments.distributed.together import by_each, by_first, check_same
from experiments.images.classification import Counts, evaluate_exactly
from experiments.images.resnet import MODELS, parameter_groups
from experiments.images.settings import ImageConfig, ImageTrainingConfig
from experiments.records.reading import read_weights
from experiments.settings.run_config import RunConfig
from experiments.training.batchnorm import broadcast_buffers, recompute_statistics, untouched_buffers
from experiments.training.problem import Description, Problem, weights_of

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the channels of ImageNet1k, in [0, 1]; those that torchvision's weights expect."""
DATA_FOLDER = Path(__file__).resolve().parents[2] / "data"
PATH_VARIABLE = "AADL_IMAGENET_DIR"
DATA_SETTINGS = (
    "data", "data_path", "num_classes", "images_per_class", "validation_per_class", "data_size", "data_seed",
    "data_variation", "stage_seconds",
)  # fmt: skip
"""Of the problem: runs that have them in common share the opened sets."""
SAMPLE = 32
"""Images of a set that a node reads to see whether it has the same as the others."""
Batch = tuple[Tensor, Tensor]
Sets = tuple[Images, Images]


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
    """The images, before any run, opened by this process; fractals are made on first use.

    Raises:
        ValueError: no folder was named, or its classes are not those of a training and a validation set.
        OSError: it cannot be read, or the fractals cannot be written.
    """
    return _description(config, _first_sets(config))


def _description(config: ImageConfig, sets: Sets) -> Description:
    train, validation = sets
    digest = hashlib.sha256(f"{train.digest} {validation.digest}".encode()).hexdigest()[:16]
    return Description(config.data if config.data == "fractals" else train.source, digest, len(train))


# ---- the sets --------------------------------------------------------------------------------------------------------


def _first_sets(config: ImageConfig) -> Sets:
    """The sets as a single process makes and opens them."""
    folder = data_folder(config)
    if config.data == "fractals":
        settings = _fractal_settings(config)
        fractals.ensure(folder, packed=True, num_workers=num_cores(), **settings)
    return _open(folder)


@lru_cache(maxsize=2)
def _open(folder: Path) -> Sets:
    """The training and the validation set; kept, for a listing of folders takes its time."""
    train, validation = open_images(folder, "train"), open_images(folder, "validation")
    check_pair(train, validation)
    return train, validation


def open_sets(config: ImageConfig, ranks: Ranks) -> Sets:
    """The training and the validation set of all ranks, kept for the runs of this process.

    Rank 0 makes fractals, lists folders and reads headers, for thousands of ranks that did so would overwhelm a shared
    file system; the others get what it found. A job may have copied the sets to a folder on each node.

    Raises:
        ValueError, OSError: as `describe`, or a node does not find the sets; the same on all ranks.
    """
    data = replace(ImageConfig(), **{name: getattr(config, name) for name in DATA_SETTINGS})
    return _open_sets(data, ranks, os.environ.get(PATH_VARIABLE))


@lru_cache(maxsize=2)
def _open_sets(config: ImageConfig, ranks: Ranks, _: str | None) -> Sets:
    sets = by_first(ranks, lambda: _first_sets(config), "opening the images", config.stage_seconds)
    here = by_each(ranks, lambda: _sets_at(data_folder(config), sets), "looking for the images", config.stage_seconds)
    # Once a node: another copy of the same names would train in silence, an incomplete one on what replaces the rest.
    sample = _sample_checksum(here) if ranks.local_rank == 0 else None
    check_same(ranks, sample, f"the checksum of some images in {data_folder(config)}", config.stage_seconds)
    return here


def _sets_at(folder: Path, sets: Sets) -> Sets:
    train, validation = (images.at(folder) for images in sets)
    for images in (train, validation):
        if not images.folder.is_dir():
            raise FileNotFoundError(f"{images.folder} does not exist here, though the images were found on rank 0")
    return train, validation


def _sample_checksum(sets: Sets) -> str:
    """CRC-32 of evenly spaced images; of one that cannot be read its index counts."""
    checksum = 0
    for images in sets:
        for index in sorted({place * (len(images) - 1) // (SAMPLE - 1) for place in range(SAMPLE)}):
            try:
                data = images.read(index)
            except (OSError, ImageError):
                data = str(index).encode()
            checksum = zlib.crc32(data, checksum)
    return f"{checksum:08x}"


# ---- the problem -----------------------------------------------------------------------------------------------------


def build(config: RunConfig, ranks: Ranks) -> Problem:
    """The classification problem of one run.

    The seed of the run sets the initial weights, the order of the images and their augmentation; none of it depends on
    the number of ranks or of workers. A validation evaluates every image once, with the running statistics of BatchNorm
    that the training left ("stale", those of rank 0) and with statistics computed anew for these very weights; it
    leaves no trace in the model.

    Raises:
        ValueError: settings that do not fit the data, the device or the number of ranks.
        OSError: data or initial weights cannot be read.
    """
    problem, training = config.problem, config.training
    assert isinstance(problem, ImageConfig) and isinstance(training, ImageTrainingConfig)
    device = device_of(ranks)
    _check(problem, training, ranks, device)
    sets = train_set, validation_set = open_sets(problem, ranks)
    description = _description(problem, sets)
    model = _model(config, len(train_set.class_names), device)
    decoding = Decoding(
        problem.image_size,
        problem.resize,
        problem.decoder,
        problem.on_unreadable,
        problem.smallest_crop,
        problem.exif_orientation,
    )
    share: dict[str, Any] = {
        "rank": ranks.rank,
        "world_size": ranks.world_size,
        "num_workers": problem.num_workers,
        "start_method": safe_start_method(problem.start_method),
        "pin_memory": device.type == "cuda",
    }
    batch_size = training.global_batch(ranks)
    loader = TrainLoader(train_set, decoding, batch_size=batch_size, seed=config.seed, **share)
    validation = EvaluationLoader(validation_set, decoding, batch_size=problem.evaluation_batch, **share)
    forward = _forward(training, device)

    def to_device(batch: Batch) -> Batch:
        return batch[0].to(device, non_blocking=True), batch[1].to(device, non_blocking=True)

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy(forward(network, batch[0]), batch[1], label_smoothing=training.label_smoothing)

    def renewed(network: nn.Module) -> None:
        count = min(problem.statistics_images, len(train_set))
        count -= count % problem.statistics_batch == 1  # an image alone may have a single value in a channel
        batches = loader.statistics_batches(count, problem.statistics_batch)
        recompute_statistics(
            network,
            (images.to(device, non_blocking=True) for images in batches),
            forward=lambda images: forward(network, images),
            world_size=ranks.world_size,
        )

    def counts(network: nn.Module) -> Counts:
        found = evaluate_exactly(
            network,
            validation.batches(),
            forward=lambda images: forward(network, images),
            num_images=len(validation_set),
            num_unreadable=lambda: validation.num_unreadable,
            world_size=ranks.world_size,
        )
        if not found.num_images:
            raise RuntimeError(f"none of the {len(validation_set)} validation images can be read")
        return found

    def evaluate(network: nn.Module) -> dict[str, float]:
        with untouched_buffers(network):
            broadcast_buffers(network, ranks.world_size)
            stale = counts(network)
            start = time.perf_counter()
            renewed(network)
            seconds = time.perf_counter() - start
            return _series(counts(network)) | _series(stale, "stale_") | {"timing/batchnorm_seconds": seconds}

    def export(network: nn.Module) -> dict[str, Tensor]:
        with untouched_buffers(network):
            broadcast_buffers(network, ranks.world_size)
            renewed(network)
            return weights_of(network)

    both: dict[str, TrainLoader | EvaluationLoader] = {"train": loader, "validation": validation}

    def unreadable() -> dict[str, list[int]]:
        return {name: _unreadable(each, ranks, device) for name, each in both.items()}

    def restore(earlier: Mapping[str, list[int]]) -> None:
        for name, each in both.items():
            each.unreadable.update(dict.fromkeys(earlier[name], "as an earlier process found"))

    def finish(network: nn.Module) -> dict[str, Any]:
        return {f"num_unreadable_{name}_images": len(indices) for name, indices in unreadable().items()}

    def close() -> None:
        loader.close()
        validation.close()
        settings_of_torch()

    settings_of_torch = _set_torch(training, device)
    return Problem(
        model=model,
        epoch_batches=loader.batches,
        to_device=to_device,
        loss=loss,
        evaluate=evaluate,
        data_source=description.source,
        data_digest=description.digest,
        finish=finish,
        state=unreadable,
        restore=restore,
        steps_per_epoch=loader.steps_per_epoch,
        batch_images=batch_size,
        parameters=lambda arguments: _parameters(model, training, arguments),
        export=export,
        synchronize=lambda: broadcast_buffers(model, ranks.world_size),
        close=close,
        attributes={
            "classification": problem.model,
            "num_classes": len(train_set.class_names),
            "num_train_images": len(train_set),
            "num_validation_images": len(validation_set),
            "num_parameters": sum(p.numel() for p in model.parameters()),
            "steps_per_epoch": loader.steps_per_epoch,
            "batch_images": batch_size,
            "deterministic": training.deterministic,
        },
    )


def _check(problem: ImageConfig, training: ImageTrainingConfig, ranks: Ranks, device: torch.device) -> None:
    """What the device and the number of ranks allow."""
    batch = training.global_batch(ranks)
    if batch % (ranks.world_size * training.accumulate):
        raise ValueError(
            f"training.batch_size must be a multiple of ranks times accumulate, {ranks.world_size} x "
            f"{training.accumulate}, got {batch}"
        )
    if batch // (ranks.world_size * training.accumulate) < 2 and problem.image_size <= 32:
        raise ValueError(
            f"training.batch_size must leave every rank 2 images or more, for BatchNorm has a single value of them at "
            f"the end of the network, got {batch} for {ranks.world_size} ranks and accumulate {training.accumulate}"
        )
    if training.sync_batchnorm and device.type != "cuda":
        raise ValueError("training.sync_batchnorm must be false on CPUs: torch's SyncBatchNorm is for GPUs, got true")
    if training.precision == "bfloat16" and device.type == "cuda":
        with torch.cuda.device(device):
            if not torch.cuda.is_bf16_supported(including_emulation=False):
                name = torch.cuda.get_device_name(device)
                raise ValueError(
                    f"training.precision must be float32 or float16 on {name}, which has no bfloat16, got bfloat16"
                )


def _set_torch(training: ImageTrainingConfig, device: torch.device) -> Callable[[], None]:
    """Makes torch reproducible or, on a GPU, lets cuDNN try which algorithm is fastest; returns what undoes it."""
    before = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    benchmark = torch.backends.cudnn.benchmark

    def undo() -> None:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark

    if training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first use
    torch.use_deterministic_algorithms(training.deterministic)
    torch.backends.cudnn.benchmark = device.type == "cuda" and not training.deterministic
    return undo


def _model(config: RunConfig, num_classes: int, device: torch.device) -> nn.Module:
    problem, training = config.problem, config.training
    assert isinstance(problem, ImageConfig) and isinstance(training, ImageTrainingConfig)
    torch.manual_seed(config.seed)
    names = ("zero_init_residual", "fc_std", "stem", "width")
    options: dict[str, Any] = {name: getattr(problem, name) for name in names}
    model: nn.Module = MODELS[problem.model](num_classes, **options)
    if problem.initial_weights is not None:
        load_weights(model, Path(problem.initial_weights))
    if training.sync_batchnorm:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    memory_format = torch.channels_last if training.channels_last else torch.preserve_format
    return model.to(device, memory_format=memory_format)  # type: ignore[call-overload]


def load_weights(model: nn.Module, path: Path) -> None:
    """Loads a state_dict saved by torch.save, torchvision's for instance, or that of a record.

    Raises:
        ValueError: the file holds no weights of this network.
        OSError: it cannot be read.
    """
    state = _read_state(path)
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"the weights {path} are not those of this network: {text[:300]}") from None


def _read_state(path: Path) -> Any:
    try:
        if path.suffix != ".h5":
            return torch.load(path, map_location="cpu", weights_only=True)
        weights = read_weights(path)
    except OSError as error:
        raise OSError(f"the weights {path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # torch raises many kinds for a file that is none of its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} holds no weights, saved by torch.save or in a record: {reason}") from None
    if not weights:
        raise ValueError(f"{path} is a record without weights: `--set save.weights=true` makes one with them")
    return weights


def _parameters(model: nn.Module, training: ImageTrainingConfig, arguments: Mapping[str, Any]) -> Any:
    """What the optimizer gets; the groups without exemption have the optimizer's own weight decay."""
    if not training.exempt_norm_and_bias:
        return model.parameters()
    groups = parameter_groups(model, 1.0, exempt=True)
    for group in groups:
        if group["weight_decay"] != 0.0:
            del group["weight_decay"]
    return groups


def _forward(training: ImageTrainingConfig, device: torch.device) -> Callable[[nn.Module, Tensor], Tensor]:
    """(network, uint8 images (B, 3, H, W) on the device) -> logits (B, classes) in float32."""
    mean = torch.tensor(MEAN, device=device).view(1, 3, 1, 1) * 255
    deviation = torch.tensor(DEVIATION, device=device).view(1, 3, 1, 1) * 255
    memory_format = torch.channels_last if training.channels_last else torch.contiguous_format
    dtype = getattr(torch, training.precision)

    def forward(network: nn.Module, images: Tensor) -> Tensor:
        normalized = ((images.float() - mean) / deviation).contiguous(memory_format=memory_format)
        autocast = torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()
        with autocast:
            return cast(Tensor, network(normalized)).float()

    return forward


def _series(counts: Counts, prefix: str = "") -> dict[str, float]:
    group = f"metrics/validation/{prefix}"
    return {
        f"{group}loss": counts.loss,
        f"{group}top1": counts.top1,
        f"{group}top5": counts.top5,
        f"{group}num_correct_top1": float(counts.num_top1),
        f"{group}num_correct_top5": float(counts.num_top5),
        f"{group}num_images": float(counts.num_images),
    }


def _unreadable(loader: TrainLoader | EvaluationLoader, ranks: Ranks, device: torch.device) -> list[int]:
    """Indices of the images that a rank could not read."""
    unreadable = torch.zeros(len(loader.images), dtype=torch.uint8)
    unreadable[list(loader.unreadable)] = 1
    unreadable = unreadable.to(device)
    if ranks.world_size > 1:
        dist.all_reduce(unreadable, dist.ReduceOp.MAX)
    indices: list[int] = unreadable.nonzero().flatten().tolist()
    return indices
