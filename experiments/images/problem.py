"""Image classification: ResNets on ImageNet1k in any of its layouts, or on fractals where there is none."""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler

from data_loaders.imagenet.decode import Decoding
from data_loaders.imagenet.loaders import EvaluationLoader, TrainLoader
from experiments.distributed.devices import device_of, safe_start_method
from experiments.distributed.ranks import Ranks
from experiments.images.classification import Counts, evaluate_exactly
from experiments.images.data import description_of, open_sets
from experiments.images.epochs import ImageEpochs, scaled_rate, step_scheduler
from experiments.images.network import forward_pass, make_network
from experiments.images.resnet import parameter_groups
from experiments.images.settings import ImageConfig, ImageTrainingConfig
from experiments.settings.kinds import Component
from experiments.settings.run_config import RunConfig
from experiments.training.batchnorm import broadcast_buffers, recompute_statistics, untouched_buffers
from experiments.training.closure import AccumulatedClosure
from experiments.training.components import make_optimizer
from experiments.training.plan import Plan
from experiments.training.problem import Problem, weights_of
from experiments.training.stage import Stage

Batch = tuple[Tensor, Tensor]


class ImageProblem(Problem):
    """Cross entropy of a network on images with labels.

    A validation evaluates every image once, with the running statistics of BatchNorm that the training left ("stale",
    those of rank 0) and with statistics that it recomputes for the present weights; it leaves no trace in the model.
    The run's seed sets the initial weights, the order of the images and their augmentation, whatever the number of
    ranks or of workers.

    Raises:
        ValueError: settings that do not fit the data, the device or the number of ranks.
        OSError: data or initial weights cannot be read.
    """

    times_acceleration = True

    def __init__(self, run: RunConfig[ImageConfig, ImageTrainingConfig], ranks: Ranks) -> None:
        settings, training = run.problem, run.training
        device, self._batch_images = device_of(ranks), training.global_batch(ranks)
        check_settings(settings, training, ranks, device)
        sets = train_set, validation_set = open_sets(settings, ranks)
        model = make_network(settings, training, run.seed, len(train_set.class_names), device)
        decoding = Decoding(
            settings.image_size,
            settings.resize,
            settings.decoder,
            settings.on_unreadable,
            settings.smallest_crop,
            settings.exif_orientation,
        )
        share: dict[str, Any] = {
            "rank": ranks.rank,
            "world_size": ranks.world_size,
            "num_workers": settings.num_workers,
            "start_method": safe_start_method(),
            "pin_memory": device.type == "cuda",
        }
        self._train = TrainLoader(train_set, decoding, batch_size=self._batch_images, seed=run.seed, **share)
        self._validation = EvaluationLoader(validation_set, decoding, batch_size=settings.evaluation_batch, **share)
        self._settings, self._training, self._ranks, self._device = settings, training, ranks, device
        self._forward = forward_pass(training, device)
        self._settings_of_torch = set_torch(training, device)
        attributes = {
            "classification": settings.model,
            "num_classes": len(train_set.class_names),
            "num_train_images": len(train_set),
            "num_validation_images": len(validation_set),
            "num_parameters": sum(p.numel() for p in model.parameters()),
            "steps_per_epoch": self._train.steps_per_epoch,
            "batch_images": self._batch_images,
            "deterministic": training.deterministic,
        }
        description = description_of(settings, sets)
        super().__init__(model, data_source=description.source, data_digest=description.digest, attributes=attributes)
        self.steps_per_epoch = self._train.steps_per_epoch

    # ---- training ----

    def plan(self) -> Plan:
        training = self._training
        return ImageEpochs(
            self.batches,
            training.epochs,
            self._schedule,
            steps_per_epoch=self._train.steps_per_epoch,
            batch_images=self._batch_images,
            evaluate_every=training.evaluate_every,
            measures_updates=training.measure_updates,
        )

    def batches(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """The batches of this rank in an epoch, from a step on: uint8 images and labels, as the loader reads them."""
        return self._train.batches(epoch, first)

    def _schedule(self, optimizer: torch.optim.Optimizer) -> LRScheduler:
        return step_scheduler(optimizer, self._training, self._train.steps_per_epoch, self._batch_images)

    def optimizer(self, component: Component) -> torch.optim.Optimizer:
        """The optimizer with the rate of the batch; weight decay may leave BatchNorm and biases alone."""
        arguments = dict(component.arguments)
        if self._training.reference_batch is not None:
            arguments["lr"] *= scaled_rate(self._training, self._batch_images)
        exempts = self._training.exempt_norm_and_bias
        parameters = parameter_groups(self.model) if exempts else self.model.parameters()
        return make_optimizer(Component(component.name, arguments), parameters)

    def closure(self, stages: Sequence[Stage], ranks: Ranks) -> AccumulatedClosure:
        """Gradients over parts of a batch; between the ranks torch averages them, and no rank sends buffers."""
        model, training, device = self.model, self._training, self._device
        if ranks.world_size > 1:
            # Ranks send buffers before an evaluation and before a save, when somebody looks at them.
            model = DistributedDataParallel(
                model,
                device_ids=[device] if device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                **_without_buffers(),
            )
        if training.compile:
            model = torch.compile(model)  # type: ignore[assignment]
        scaler = torch.amp.GradScaler(device.type, enabled=training.precision == "float16")
        return AccumulatedClosure(self, model, stages, training.accumulate, scaler)

    def to_device(self, batch: Batch) -> Batch:
        return batch[0].to(self._device, non_blocking=True), batch[1].to(self._device, non_blocking=True)

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        smoothing = self._training.label_smoothing
        return cross_entropy(self._forward(network, batch[0]), batch[1], label_smoothing=smoothing)

    # ---- evaluation ----

    def evaluate(self, network: nn.Module) -> dict[str, float]:
        begin = time.perf_counter()
        with untouched_buffers(network):
            broadcast_buffers(network, self._ranks.world_size)
            stale = self._counts(network)
            start = time.perf_counter()
            self._recompute_statistics(network)
            seconds = time.perf_counter() - start
            renewed = self._counts(network)
        times = {"timing/batchnorm_seconds": seconds, "timing/evaluation_seconds": time.perf_counter() - begin}
        return renewed.series() | stale.series("stale_") | times

    def _recompute_statistics(self, network: nn.Module) -> None:
        """Replaces the statistics of BatchNorm by those of training images with the present weights."""
        settings = self._settings
        count = min(settings.statistics_images, len(self._train.images))
        count -= count % settings.statistics_batch == 1  # an image alone may have a single value in a channel
        batches = self._train.statistics_batches(count, settings.statistics_batch)
        recompute_statistics(
            network,
            (images.to(self._device, non_blocking=True) for images in batches),
            forward=lambda images: self._forward(network, images),
            world_size=self._ranks.world_size,
        )

    def _counts(self, network: nn.Module) -> Counts:
        return evaluate_exactly(
            network,
            self._validation.batches(),
            lambda images: self._forward(network, images),
            num_images=len(self._validation.images),
            num_unreadable=lambda: self._validation.num_unreadable,
            world_size=self._ranks.world_size,
        )

    # ---- a run that stops, goes on and ends ----

    def synchronize(self) -> None:
        broadcast_buffers(self.model, self._ranks.world_size)

    def state(self) -> dict[str, list[int]]:
        """Indices of the images that a rank could not read, by set."""
        return {name: self._unreadable(loader) for name, loader in self._loaders().items()}

    def restore(self, state: Mapping[str, list[int]]) -> None:
        for name, loader in self._loaders().items():
            loader.unreadable.update(dict.fromkeys(state[name], "as an earlier process found"))

    def _loaders(self) -> dict[str, TrainLoader | EvaluationLoader]:
        return {"train": self._train, "validation": self._validation}

    def _unreadable(self, loader: TrainLoader | EvaluationLoader) -> list[int]:
        """Indices of the images that a rank could not read; all ranks call."""
        unreadable = torch.zeros(len(loader.images), dtype=torch.uint8)
        unreadable[list(loader.unreadable)] = 1
        unreadable = unreadable.to(self._device)
        if self._ranks.world_size > 1:
            dist.all_reduce(unreadable, dist.ReduceOp.MAX)
        indices: list[int] = unreadable.nonzero().flatten().tolist()
        return indices

    def finish(self, network: nn.Module) -> dict[str, Any]:
        return {f"num_unreadable_{name}_images": len(indices) for name, indices in self.state().items()}

    def export(self, network: nn.Module) -> dict[str, Tensor]:
        """The weights, with statistics of BatchNorm that are recomputed for them."""
        with untouched_buffers(network):
            broadcast_buffers(network, self._ranks.world_size)
            self._recompute_statistics(network)
            return weights_of(network)

    def close(self) -> None:
        self._train.close()
        self._validation.close()
        self._settings_of_torch()


def check_settings(problem: ImageConfig, training: ImageTrainingConfig, ranks: Ranks, device: torch.device) -> None:
    """Raises ValueError for a setting that the device or the number of ranks does not allow."""
    batch = training.global_batch(ranks)
    if batch % (ranks.world_size * training.accumulate):
        raise ValueError(
            f"training.batch_size must be a multiple of ranks times accumulate, {ranks.world_size} x "
            f"{training.accumulate}, got {batch}"
        )
    if batch // (ranks.world_size * training.accumulate) < 2 and problem.image_size <= 32:
        raise ValueError(
            f"training.batch_size must leave every rank 2 images or more, because BatchNorm has a single value of an "
            f"image at the end of the network, got {batch} for {ranks.world_size} ranks and accumulate "
            f"{training.accumulate}"
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


def set_torch(training: ImageTrainingConfig, device: torch.device) -> Callable[[], None]:
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


def _without_buffers() -> dict[str, Any]:
    """What keeps DistributedDataParallel from sending buffers; torch 2.13 has another name for it."""
    is_new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    return {"forward_sync_buffers" if is_new else "broadcast_buffers": False}
