"""ResNet and ResNeXt (He et al., CVPR 2016; Xie et al., CVPR 2017) with torchvision's key names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from nasfast.encoders.base import Encoder, FeatureInfo, tensor_mismatch
from nasfast.utils.errors import UserError


class Form(NamedTuple):
    """A published size."""

    blocks: tuple[int, int, int, int]
    """Bottlenecks of layer1 to layer4."""
    groups: int = 1
    """Of the 3x3 convolutions."""
    base: int = 64
    """Channels of a group in layer1, at one group of them all."""


FORMS = {
    "resnet50": Form((3, 4, 6, 3)),
    "resnet101": Form((3, 4, 23, 3)),
    "resnext101_32x8d": Form((3, 4, 23, 3), 32, 8),
    "resnext101_64x4d": Form((3, 4, 23, 3), 64, 4),
}
"""By torchvision's names."""
_HEAD = re.compile(r"fc\.")
_COUNTER = "num_batches_tracked"


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that never changes: statistics, scale and shift are those it was loaded with."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        weight, bias = self.weight.detach(), self.bias.detach()
        del self.weight, self.bias
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        assert self.running_mean is not None
        assert self.running_var is not None
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        shape = (1, -1, 1, 1)
        return (x * scale.view(shape).to(x.dtype)).add_(shift.view(shape).to(x.dtype))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with BatchNorm, and the shortcut."""

    def __init__(
        self, in_channels: int, planes: int, stride: int, form: Form, first: bool, norm: type[Any]
    ) -> None:
        super().__init__()
        width, out = planes * form.base * form.groups // 64, 4 * planes
        steps = (stride, 1) if first else (1, stride)
        self.conv1 = nn.Conv2d(in_channels, width, 1, steps[0], bias=False)
        self.bn1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, steps[1], 1, groups=form.groups, bias=False)
        self.bn2 = norm(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = norm(out)
        self.downsample = (
            nn.Sequential(nn.Conv2d(in_channels, out, 1, stride, bias=False), norm(out))
            if stride > 1 or in_channels != out
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)), inplace=True)


class ResNet(Encoder):
    """A residual network as an encoder: taps C2 to C5 at strides 4, 8, 16 and 32.

    Args:
        size: a name of FORMS.
        stride_in_1x1: the first bottleneck of a layer has its stride in the first 1x1 convolution,
            as in Caffe's weights and in the published detectors, not in the 3x3 as in those of
            torchvision; names and shapes are the same.
        frozen_norm: BatchNorm never changes, as in trainings of detectors; else it is learned.

    Shapes: ``[N, 3, H, W]`` to maps of 256, 512, 1024 and 2048 channels.
    """

    name = "resnet"

    def __init__(
        self, size: str = "resnet50", *, stride_in_1x1: bool = False, frozen_norm: bool = True
    ) -> None:
        super().__init__()
        if size not in FORMS:
            raise UserError(f"encoder: expected one of {', '.join(FORMS)}, got {size!r}")
        self.size, self.stride_in_1x1, self.frozen_norm = size, stride_in_1x1, frozen_norm
        norm: type[nn.BatchNorm2d] = FrozenBatchNorm2d if frozen_norm else nn.BatchNorm2d
        form, channels = FORMS[size], 64
        self.conv1 = nn.Conv2d(3, channels, 7, 2, 3, bias=False)
        self.bn1 = norm(channels)
        info = []
        for index, count in enumerate(form.blocks):
            planes, stride, blocks = 64 << index, 1 if index == 0 else 2, []
            for k in range(count):
                step = stride if k == 0 else 1
                blocks.append(Bottleneck(channels, planes, step, form, stride_in_1x1, norm))
                channels = 4 * planes
            self.add_module(f"layer{index + 1}", nn.Sequential(*blocks))
            info.append(FeatureInfo(f"layer{index + 1}", channels, 4 << index))
        self.feature_info = tuple(info)

    def forward(self, images: Tensor) -> list[Tensor]:
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)
        x = F.max_pool2d(x, 3, 2, 1)
        taps = []
        for tap in self.feature_info:
            x = self.get_submodule(tap.module)(x)
            taps.append(x)
        return taps

    @property
    def label(self) -> str:
        return self.size

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "size": self.size,
            "stride_in_1x1": self.stride_in_1x1,
            "frozen_norm": self.frozen_norm,
        }

    def first(self) -> list[nn.Module]:
        return [self.conv1, self.bn1, self.get_submodule("layer1")]

    def load_strict(self, state: Mapping[str, Tensor], source: str) -> None:
        own, given = self.state_dict(), self.check(state, source)
        self.load_state_dict({k: v.to(own[k].dtype) for k, v in given.items()}, strict=False)

    def check(self, state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
        """The part of a state dict that `load_strict` loads.

        Raises:
            UserError: as that says.
        """
        own = self.state_dict()
        given = {k: v for k, v in state.items() if not _HEAD.match(k)}
        needed = {k: v for k, v in own.items() if k in given or not k.endswith(_COUNTER)}
        problem = tensor_mismatch(needed, given)
        if problem:
            raise UserError(
                f"{self.size} weights {source}: {problem}. Expected torchvision's {self.size} "
                "state dict; convert the key names or give another file."
            )
        return given


def size_of(state: Mapping[str, Tensor]) -> str | None:
    """The name in FORMS of the network whose weights these are, by depth and shapes; of another
    ResNet its blocks and groups in words; None of what is no ResNet."""
    if not any(key.startswith("layer1.") for key in state):
        return None
    blocks = tuple(
        len({key.split(".")[1] for key in state if key.startswith(f"layer{layer}.")})
        for layer in range(1, 5)
    )
    counts = ", ".join(map(str, blocks))
    weight = state.get("layer1.0.conv2.weight")
    if weight is None or weight.dim() != 4 or "layer1.0.conv3.weight" not in state:
        return f"a ResNet of {counts} basic blocks"
    base = max(1, weight.shape[1])
    groups = weight.shape[0] // base
    found = (size for size, form in FORMS.items() if form == (blocks, groups, base))
    return next(found, f"a ResNet of {counts} blocks with {groups} groups of {base} channels")
