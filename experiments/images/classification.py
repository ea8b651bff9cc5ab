"""Exact evaluation of a classifier: every image counts once, in integers, on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments.training.batchnorm import in_eval_mode


class Counts(NamedTuple):
    """Sums over the images of a set that could be read, at least one.

    Attributes:
        num_unreadable: images that could not, and are in no other number.
        num_top1, num_top5: whose class has the largest logit, or is among the five largest.
        loss_sum: of the cross entropies, in float64.
    """

    num_images: int
    num_unreadable: int
    num_top1: int
    num_top5: int
    loss_sum: float

    def series(self, prefix: str = "") -> dict[str, float]:
        """Mean loss, accuracies in [0, 1] and numbers of images, by the name of their series."""
        group = f"metrics/validation/{prefix}"
        return {
            f"{group}loss": self.loss_sum / self.num_images,
            f"{group}top1": self.num_top1 / self.num_images,
            f"{group}top5": self.num_top5 / self.num_images,
            f"{group}num_correct_top1": float(self.num_top1),
            f"{group}num_correct_top5": float(self.num_top5),
            f"{group}num_images": float(self.num_images),
        }


def evaluate_exactly(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    forward: Callable[[Tensor], Tensor],
    *,
    num_images: int,
    num_unreadable: Callable[[], int],
    world_size: int,
) -> Counts:
    """Counts over the images of all ranks, by one reduction at the end, and the proof that no image is missing.

    The model is in eval mode meanwhile. Sums stay on the device and the host waits for them once, at the end.

    Args:
        model: the bare module; batches are brought to the device of its parameters.
        batches: (images, labels) of this rank; ranks may have different numbers of them, and none, but no padding.
        forward: images as they come, on the device -> logits (B, classes).
        num_images: size of the set, over all ranks.
        num_unreadable: called after the last batch; images of this rank that were in no batch as they cannot be read.
        world_size: number of ranks, all of which must call.

    Raises:
        RuntimeError: images that were evaluated or unreadable do not add up to `num_images`, none can be read, or
            another rank failed.
    """
    device = next(model.parameters()).device
    evaluated, unreadable, failure = 0, 0, None
    hits = torch.zeros(2, dtype=torch.int64, device=device)
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    try:
        with torch.no_grad(), in_eval_mode(model):
            for images, labels in batches:
                images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
                logits = forward(images)
                hits += hits_of(logits, labels)
                loss_sum += cross_entropy(logits, labels, reduction="none").sum(dtype=torch.float64)
                evaluated += len(images)
        unreadable = num_unreadable()
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
    if not evaluated:
        raise RuntimeError(f"none of the {num_images} validation images can be read")
    return Counts(evaluated, unreadable, top1, top5, total)


def hits_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Numbers of images (B, classes) whose label, in [0, classes), is first and among the first five, int64 (2,).

    Classes are in descending order of their logits, equal ones in the order of the classes, on every device. With up to
    five classes, all are among the first five. An image with a NaN among its logits is no hit.
    """
    own = logits.gather(1, labels.unsqueeze(1))
    before = torch.arange(logits.shape[1], device=logits.device) < labels.unsqueeze(1)
    rank = ((logits > own) | ((logits == own) & before)).sum(1)
    valid = ~logits.isnan().any(1)
    return torch.stack([((rank < places) & valid).sum() for places in (1, 5)])
