"""Exact evaluation of a classifier: every image counts once, in integers, on any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.training.batchnorm import in_eval_mode, refuse_wrapped

PER_IMAGE_CROSS_ENTROPY: Callable[[Tensor, Tensor], Tensor] = partial(F.cross_entropy, reduction="none")


@dataclass(frozen=True)
class Counts:
    """Sums over the images of a set that could be read.

    Attributes:
        num_images: that were evaluated.
        num_unreadable: that were not, and are in no other number.
        num_top1: whose class has the largest logit.
        num_top5: whose class is among the five largest.
        loss_sum: of the losses, in float64.
    """

    num_images: int
    num_unreadable: int
    num_top1: int
    num_top5: int
    loss_sum: float

    @property
    def loss(self) -> float:
        """Mean over the images; NaN without any."""
        return self._mean(self.loss_sum)

    @property
    def top1(self) -> float:
        """Accuracy in [0, 1]; NaN without any image."""
        return self._mean(self.num_top1)

    @property
    def top5(self) -> float:
        """Accuracy in [0, 1] with five guesses; NaN without any image."""
        return self._mean(self.num_top5)

    def _mean(self, total: float) -> float:
        return total / self.num_images if self.num_images else math.nan


def evaluate_exactly(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor] = PER_IMAGE_CROSS_ENTROPY,
    *,
    num_images: int,
    num_unreadable: Callable[[], int] | None = None,
    forward: Callable[[Tensor], Tensor] | None = None,
    world_size: int = 1,
) -> Counts:
    """Counts over the images of all ranks, by one reduction at the end, and the proof that no image is missing.

    The model is in eval mode meanwhile. Sums stay on the device and the host waits for them once, at the end.

    Args:
        model: the bare module, not DistributedDataParallel; batches are brought to the device of its parameters.
        batches: (images, labels) of this rank; ranks may have different numbers of them, and none, but no padding.
        loss: (logits (B, classes) in float32 or float64, labels (B,)) -> losses (B,), one an image.
        num_images: size of the set, over all ranks.
        num_unreadable: called after the last batch; images of this rank that were in no batch as they cannot be read.
        forward: images as they come, on the device -> logits (B, classes); None: the model.
        world_size: number of ranks, all of which must call.

    Raises:
        ValueError: a DistributedDataParallel model, or losses or logits of another shape.
        RuntimeError: images that were evaluated or unreadable do not add up to `num_images`, or another rank failed.
    """
    refuse_wrapped(model)
    device = next(model.parameters()).device
    evaluated, unreadable, failure = 0, 0, None
    hits = torch.zeros(2, dtype=torch.int64, device=device)
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    try:
        with torch.no_grad(), in_eval_mode(model):
            for images, labels in batches:
                images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
                logits = forward(images) if forward is not None else model(images)
                losses = _losses(loss, logits, labels, len(images))
                hits += hits_of(logits, labels)
                loss_sum += losses.sum(dtype=torch.float64)
                evaluated += len(images)
        unreadable = num_unreadable() if num_unreadable is not None else 0
    except Exception as error:  # raised when the other ranks, which wait for this one, know
        failure = error
    counts = torch.tensor([evaluated, unreadable, int(failure is not None)], dtype=torch.float64)
    # Integers are exact in float64 up to 2^53, so that one reduction does for all.
    sums = torch.cat([counts.to(device, non_blocking=True), hits.double(), loss_sum.reshape(1)])
    if world_size > 1:
        dist.all_reduce(sums)
    *integers, total = sums.tolist()
    evaluated, unreadable, num_failed, top1, top5 = map(int, integers)
    if failure is not None:
        raise failure
    if num_failed:
        raise RuntimeError(f"the evaluation is not complete: {num_failed} of {world_size} ranks failed")
    if evaluated + unreadable != num_images:
        raise RuntimeError(
            f"the evaluation saw {evaluated} images and {unreadable} unreadable ones, but the set has {num_images}: "
            "every image must be given to one rank, once"
        )
    return Counts(evaluated, unreadable, top1, top5, total)


def _losses(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, labels: Tensor, num_images: int) -> Tensor:
    if logits.ndim != 2 or len(logits) != num_images:
        raise ValueError(f"logits must be (images, classes) = ({num_images}, ...), got {tuple(logits.shape)}")
    losses = loss(logits if logits.dtype == torch.float64 else logits.float(), labels)
    if losses.shape != (num_images,):
        raise ValueError(f"loss must return one number an image, ({num_images},), got {tuple(losses.shape)}")
    return losses


def hits_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Numbers of images whose label is first, and among the first five, int64 (2,).

    Classes are in descending order of their logits, equal ones in the order of the classes, on every device. With up to
    five classes, all are among the first five. An image with a NaN among its logits is no hit.

    Args:
        logits: (B, classes).
        labels: (B,), integers in [0, classes).
    """
    own = logits.gather(1, labels.unsqueeze(1))
    before = torch.arange(logits.shape[1], device=logits.device) < labels.unsqueeze(1)
    rank = ((logits > own) | ((logits == own) & before)).sum(1)
    valid = ~logits.isnan().any(1)
    return torch.stack([((rank < places) & valid).sum() for places in (1, 5)])
