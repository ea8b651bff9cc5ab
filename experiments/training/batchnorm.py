"""Running statistics of BatchNorm: recomputed exactly, left alone by trials, made the same on all ranks.

The running statistics of training are moving averages over some ten batches of one rank, taken while the weights moved.
After an extrapolation or an average of weights they belong to a network that was never there; the recomputed ones
belong to the weights as they are. With n_i, m_i, M_i the number of values of a channel in batch i of any rank, their
mean and the sum of their squared deviations,

    n = sum n_i,    running_mean = m = sum n_i m_i / n,    running_var = sum [M_i + n_i (m_i - m)^2] / (n - 1),

so the variance has the part between the batches. A layer sees what the layers before it made with the statistics of
the batch, as in training. So batches are the unit: the same batches give the same statistics however they are dealt.
Sources: "precise BatchNorm", Wu and Johnson, arXiv 2105.07576, section 3; the update of n, m and M: Chan, Golub and
LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

# ---- recomputing -----------------------------------------------------------------------------------------------------


def recompute_statistics(
    model: nn.Module,
    batches: Iterable[Tensor],
    *,
    forward: Callable[[Tensor], Any] | None = None,
    world_size: int = 1,
) -> int:
    """Replaces the running mean and variance of every BatchNorm layer by those over all images of all ranks.

    BatchNorm normalizes by the statistics of the batch, all other modules are in eval mode (no dropout), and nothing is
    compiled. Only running means and variances change: modes, momentum, num_batches_tracked, gradients and random
    generators are as before. SyncBatchNorm does not communicate. Values are summed up on the device in float64; the
    host waits for it once, at the end. A layer that no image reaches keeps its statistics. Where ranks are summed up,
    means cancel: a relative error of the variance of some 1e-16 (1 + mean^2 / variance), far below that of inputs in
    float32.

    Args:
        model: the bare module, not DistributedDataParallel. Its buffers may differ between the ranks.
        batches: images of this rank, (B, ...) each; ranks may have different numbers of them, and none.
        forward: called with a batch (normalization, autocast, model); None: the model.
        world_size: number of ranks, all of which must call.

    Returns:
        Number of images, over all ranks; 0, without looking at a batch, for a model without running statistics.

    Raises:
        ValueError: a DistributedDataParallel model, or a channel with one value in a batch.
        RuntimeError: no image on any rank, a forward pass that reaches no BatchNorm layer, or a failure on another
            rank. The model is then as it was, as after any other exception.
    """
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError("model must be the bare module, not DistributedDataParallel: pass model.module")
    layers = [
        module for module in model.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]
    if not layers:
        return 0
    moments = _Moments(layers)
    forward = model if forward is None else forward
    num_images, failure = 0, None
    try:
        with in_eval_mode(model), moments.observing():
            for images in batches:
                if len(images) > 0:
                    num_images += len(images)
                    forward(images)
                    moments.merge(0, len(layers))
    except Exception as error:  # raised when the other ranks, which wait for this one, know
        failure = error
    head = [num_images, int(failure is not None)]
    (num_images, num_failed), counts, mean, squares = moments.over_ranks(head, world_size)
    if failure is not None:
        raise failure
    if num_failed:
        raise RuntimeError(f"BatchNorm statistics were not recomputed: {num_failed} of {world_size} ranks failed")
    if num_images == 0:
        raise RuntimeError("BatchNorm statistics cannot be recomputed: there is no image on any rank")
    if not any(counts):
        raise RuntimeError("BatchNorm statistics cannot be recomputed: forward reaches no BatchNorm layer of the model")
    moments.write(counts, mean, squares)
    return num_images


class _Moments:
    """Number of values, mean and sum of squared deviations of every channel of the layers: of this rank, so far.

    The layers write the statistics of a batch to vectors of their own; all layers together are merged after it.
    """

    def __init__(self, layers: list[_BatchNorm]) -> None:
        means = [layer.running_mean for layer in layers if layer.running_mean is not None]
        self.device = means[0].device
        self._layers = layers
        self._batch_mean = [torch.zeros_like(mean) for mean in means]
        self._batch_var = [torch.zeros_like(mean) for mean in means]
        self._batch_count = [0] * len(layers)
        sizes = [layer.num_features for layer in layers]
        self._starts = [0, *accumulate(sizes)]
        repeats = torch.tensor(sizes).to(self.device, non_blocking=True)
        self._layer_of_channel = torch.repeat_interleave(repeats, output_size=self._starts[-1])
        self._count = torch.zeros(len(layers), dtype=torch.float64, device=self.device)
        self._mean, self._squares = torch.zeros(2, self._starts[-1], dtype=torch.float64, device=self.device)

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Layers normalize by the statistics of the batch and note them; their own statistics are not touched."""
        cuda = [self.device] if self.device.type == "cuda" else []
        replaced = [vars(layer).get("forward") for layer in self._layers]
        # Compiled code would not see the replaced methods.
        with torch.no_grad(), torch.random.fork_rng(cuda), torch.compiler.set_stance("force_eager"):
            try:
                for number, layer in enumerate(self._layers):
                    vars(layer)["forward"] = partial(self._normalize, number)
                yield
            finally:
                for layer, method in zip(self._layers, replaced, strict=True):
                    vars(layer).pop("forward")
                    if method is not None:
                        vars(layer)["forward"] = method

    def _normalize(self, number: int, inputs: Tensor) -> Tensor:
        """`forward` of a layer. With momentum 1 the running statistics are those of the batch: no second pass."""
        if self._batch_count[number]:  # called before in this batch
            self.merge(number, number + 1)
        layer = self._layers[number]
        self._batch_count[number] = inputs.numel() // inputs.shape[1]
        mean, var = self._batch_mean[number], self._batch_var[number]
        return F.batch_norm(inputs, mean, var, layer.weight, layer.bias, training=True, momentum=1.0, eps=layer.eps)

    def merge(self, first: int, last: int) -> None:
        """Chan's update with the present batch, for layers first to last - 1, without waiting for the device."""
        channels = slice(self._starts[first], self._starts[last])
        added = torch.tensor(self._batch_count[first:last], dtype=torch.float64).to(self.device, non_blocking=True)
        self._batch_count[first:last] = [0] * (last - first)
        count = self._count[first:last]
        share = added / (count + added).clamp(min=1)  # 0 for a layer that was not called
        factors = torch.stack([share, share * count, (added - 1).clamp(min=0)])
        share, between, within = factors[:, self._layer_of_channel[channels] - first]
        batch_mean = torch.cat(self._batch_mean[first:last]).double()
        batch_var = torch.cat(self._batch_var[first:last]).double()  # unbiased
        mean, squares = self._mean[channels], self._squares[channels]
        difference = batch_mean - mean
        squares += batch_var * within + difference.square() * between
        mean += difference * share
        count += added

    def over_ranks(self, head: list[int], world_size: int) -> tuple[list[int], list[int], Tensor, Tensor]:
        """Sums over the ranks, by one reduction: those of `head`, counts of the layers, means, squared deviations."""
        numbers = torch.cat([torch.tensor(head, dtype=torch.float64).to(self.device, non_blocking=True), self._count])
        mean, squares = self._mean, self._squares
        if world_size > 1:
            count = self._count[self._layer_of_channel]
            sums = torch.cat([numbers, count * mean, squares + count * mean.square()])
            dist.all_reduce(sums)
            numbers, mean, squares = sums.split([len(numbers), len(mean), len(mean)])
            count = numbers[len(head) :][self._layer_of_channel].clamp(min=1)
            mean = mean / count
            squares = (squares - count * mean.square()).clamp(min=0)
        integers = [int(number) for number in numbers.tolist()]  # the host waits
        return integers[: len(head)], integers[len(head) :], mean, squares

    def write(self, counts: list[int], mean: Tensor, squares: Tensor) -> None:
        """Writes mean and unbiased variance to the layers with a count above 0."""
        sizes = [layer.num_features for layer in self._layers]
        pairs: list[tuple[Tensor, Tensor]] = []
        for layer, count, layer_mean, layer_squares in zip(
            self._layers, counts, mean.split(sizes), squares.split(sizes), strict=True
        ):
            if count > 0:
                assert layer.running_mean is not None and layer.running_var is not None
                pairs += [(layer.running_mean, layer_mean), (layer.running_var, layer_squares / (count - 1))]
        torch._foreach_copy_([target for target, _ in pairs], [value for _, value in pairs])


# ---- modes and buffers -----------------------------------------------------------------------------------------------


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """All modules are in eval mode inside, by their flags alone: `train` of a module may keep some layers frozen."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def untouched_buffers(model: nn.Module) -> Iterator[None]:
    """Restores every buffer bit for bit and keeps its tensor, for trial evaluations in train mode."""
    tables = [(module, dict(module._buffers)) for module in model.modules()]
    groups = [(group, [tensor.clone() for tensor in group]) for group in _by_type(model)]
    try:
        yield
    finally:
        for module, table in tables:  # some modules replace their buffers instead of writing to them
            module._buffers.clear()
            module._buffers.update(table)
        with torch.no_grad():
            for group, copies in groups:
                torch._foreach_copy_(group, copies)


def broadcast_buffers(model: nn.Module, world_size: int) -> None:
    """Writes the buffers of rank 0 to those of all ranks, all of which must call; one message for each dtype.

    For models that train with DistributedDataParallel(broadcast_buffers=False): before an evaluation with the running
    statistics of training, and before a checkpoint.
    """
    if world_size == 1:
        return
    with torch.no_grad():
        for group in _by_type(model):
            flat = torch.cat([tensor.reshape(-1) for tensor in group])
            dist.broadcast(flat, src=0)
            values = flat.split([tensor.numel() for tensor in group])
            torch._foreach_copy_(group, [value.view_as(tensor) for value, tensor in zip(values, group, strict=True)])


def _by_type(model: nn.Module) -> list[list[Tensor]]:
    """All buffers once, in groups of one dtype and device."""
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
    for buffer in model.buffers():
        groups[buffer.dtype, buffer.device].append(buffer)
    return list(groups.values())
