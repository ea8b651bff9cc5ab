"""The network of a run: its initial weights, its forward pass, and what the optimizer gets of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from experiments.images.resnet import MODELS
from experiments.images.settings import ImageConfig, ImageTrainingConfig
from experiments.records.reading import read_weights

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the channels of ImageNet1k, in [0, 1]; those that torchvision's weights expect."""


def make_network(
    problem: ImageConfig, training: ImageTrainingConfig, seed: int, num_classes: int, device: torch.device
) -> nn.Module:
    """The network on its device, initialized from the seed or, with the errors of `load_weights`, from a file."""
    torch.manual_seed(seed)
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
    """Loads a state_dict saved by torch.save, or that of a record; ValueError where it is not one of this network."""
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


def forward_pass(training: ImageTrainingConfig, device: torch.device) -> Callable[[nn.Module, Tensor], Tensor]:
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
