"""ResNet18 and ResNet50, with the names and shapes of torchvision's, so that weights travel both ways.

Sources: He et al., arXiv 1512.03385; for ResNet50 the variant "v1.5", whose bottlenecks stride in the 3x3 convolution
and not in the first 1x1; initial weights after He et al., arXiv 1502.01852; options after Goyal et al., arXiv
1706.02677.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class BasicBlock(nn.Module):
    """relu(shortcut(x) + bn(conv3x3(relu(bn(conv3x3(x)))))): `inputs` channels come in, `width` go out.

    The first convolution has the stride; `downsample` is the shortcut where the shape changes.
    """

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = _convolution(inputs, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _convolution(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, width, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        y += x if self.downsample is None else self.downsample(x)
        return F.relu(y, inplace=True)


class Bottleneck(nn.Module):
    """relu(shortcut(x) + bn(conv1x1(relu(bn(conv3x3(relu(bn(conv1x1(x))))))))): 4 `width` channels go out.

    The 3x3 convolution has `width` channels and the stride; `downsample` is the shortcut where the shape changes.
    """

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = _convolution(inputs, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _convolution(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _convolution(width, width * self.expansion, 1)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, 4 width, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        return F.relu(y, inplace=True)


class ResNet(nn.Module):
    """A stem, four stages of residual blocks, the mean over the image, and a linear layer.

    The names, shapes, order and dtypes of its state_dict are torchvision's, and so are its initial weights under the
    same seed, unless an option says otherwise.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        depths: blocks in each of the four stages.
        num_classes: outputs, >= 1.
        zero_init_residual: the last BatchNorm weight of every block starts at 0, so that blocks start as the identity.
        fc_std: the last layer starts with weights from N(0, fc_std^2) and biases 0 (0.01 in Goyal et al.); None: with
            torch's default.
        stem: "imagenet": a 7x7 convolution of stride 2, then max-pooling of stride 2; "small", for images of 32 to 64
            pixels: a 3x3 convolution of stride 1 without pooling. "conv1.weight" is then (width, 3, 3, 3), and neither
            loads the weights of the other.
        width: channels of the first stage, >= 1, which double with each stage; torchvision's have 64.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        num_classes: int = 1000,
        *,
        zero_init_residual: bool = False,
        fc_std: float | None = None,
        stem: str = "imagenet",
        width: int = 64,
    ) -> None:
        super().__init__()
        self.stem = stem
        self.conv1 = _convolution(3, width, 7, 2) if stem == "imagenet" else _convolution(3, width, 3)
        self.bn1 = nn.BatchNorm2d(width)
        outputs = [width * 2**stage * block.expansion for stage in range(4)]
        self.layer1 = _stage(block, width, width, depths[0], 1)
        self.layer2 = _stage(block, outputs[0], 2 * width, depths[1], 2)
        self.layer3 = _stage(block, outputs[1], 4 * width, depths[2], 2)
        self.layer4 = _stage(block, outputs[2], 8 * width, depths[3], 2)
        self.fc = nn.Linear(outputs[3], num_classes)
        self._initialize(zero_init_residual, fc_std)

    def _initialize(self, zero_init_residual: bool, fc_std: float | None) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Bottleneck) and zero_init_residual:
                nn.init.zeros_(module.bn3.weight)
            elif isinstance(module, BasicBlock) and zero_init_residual:
                nn.init.zeros_(module.bn2.weight)
        if fc_std is not None:
            nn.init.normal_(self.fc.weight, std=fc_std)
            nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Normalized images (B, 3, H, W) to logits (B, num_classes)."""
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)
        if self.stem == "imagenet":
            x = F.max_pool2d(x, 3, stride=2, padding=1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def resnet18(num_classes: int = 1000, **options: Any) -> ResNet:
    """ResNet18 (11,689,512 parameters with 1000 classes); options as in `ResNet`."""
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes, **options)


def resnet50(num_classes: int = 1000, **options: Any) -> ResNet:
    """ResNet50 v1.5 (25,557,032 parameters with 1000 classes); options as in `ResNet`."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, **options)


MODELS: dict[str, Callable[..., ResNet]] = {"resnet18": resnet18, "resnet50": resnet50}


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups for an optimizer: weights with its weight decay, BatchNorm (by its type) and biases without any."""
    exempt = {
        id(parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(module, _BatchNorm) or name == "bias"
    }
    parameters = list(model.parameters())
    return [
        {"params": [parameter for parameter in parameters if id(parameter) not in exempt]},
        {"params": [parameter for parameter in parameters if id(parameter) in exempt], "weight_decay": 0.0},
    ]


def _convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    """Without bias, because a BatchNorm follows; padded so that stride 1 keeps the shape."""
    return nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, bias=False)


def _stage(
    block: type[BasicBlock] | type[Bottleneck], inputs: int, width: int, depth: int, stride: int
) -> nn.Sequential:
    """`depth` blocks, of which the first has the stride and, where the shape changes, a projection as shortcut."""
    outputs = width * block.expansion
    downsample = None
    if stride != 1 or inputs != outputs:
        downsample = nn.Sequential(_convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
    blocks = [block(inputs, width, stride, downsample)]
    blocks += [block(outputs, width, 1, None) for _ in range(depth - 1)]
    return nn.Sequential(*blocks)
