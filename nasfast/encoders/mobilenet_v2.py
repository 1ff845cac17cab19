"""MobileNet-v2 (Sandler et al., CVPR 2018) as an encoder, with torchvision's key names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nasfast.encoders.base import Encoder, FeatureInfo, tensor_mismatch
from nasfast.ops.convolution import StridedDepthwiseConv2d
from nasfast.utils.errors import UserError

# expansion t, channels c, repeats n, stride s: table 2 of the paper
_ROWS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
_TAPPED_ROWS = (1, 2, 4, 6)
_ROWS_KEYS = re.compile(r"features\.(\d+)\.|classifier\.")
MAX_WIDTH = 10
"""Of the channel multiplier: what is larger is a slip, or a damaged file."""
_COUNTER = "num_batches_tracked"


def _divisible_by_8(channels: float) -> int:
    """Round to a multiple of 8 without losing more than 10 % (Howard et al., MobileNets)."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def _conv_bn_relu6(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    conv = StridedDepthwiseConv2d if groups > 1 and stride > 1 else nn.Conv2d
    return nn.Sequential(
        conv(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU6(inplace=True),
    )


class InvertedResidual(nn.Module):
    """Expand 1x1, depthwise 3x3, project 1x1 without activation; residual where shapes allow."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        expansion: int,
        expand: bool = True,
    ) -> None:
        super().__init__()
        hidden = in_channels * expansion
        first = [_conv_bn_relu6(in_channels, hidden, 1)] if expand else []
        self.residual = stride == 1 and in_channels == out_channels
        self.conv = nn.Sequential(
            *first,
            _conv_bn_relu6(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return x + y if self.residual else y


class MobileNetV2(Encoder):
    """MobileNet-v2 as an encoder: taps at strides 4, 8, 16 and 32.

    Args:
        width: channel multiplier; at 1.0 the taps have 24, 32, 96 and 320 channels.
        expand_first: whether the first block, which expands nothing, has the 1x1 convolution of the
            others all the same: so in the networks of Fast NAS, not in torchvision's weights.
        rows: how many rows of the paper's table 2 there are, from the first; with 3 the taps are
            those at strides 4 and 8.

    Raises:
        UserError: a width that is not above 0 and at most MAX_WIDTH.

    Shapes: ``[N, 3, H, W]`` to a list of ``[N, C_i, ceil(H / s_i), ceil(W / s_i)]``.
    """

    name = "mobilenet_v2"

    def __init__(
        self, width: float = 1.0, *, expand_first: bool = False, rows: int = len(_ROWS)
    ) -> None:
        super().__init__()
        if isinstance(width, bool) or not isinstance(width, (int, float)):
            raise TypeError(f"width: expected a number, got {width!r}")
        if not 0 < width <= MAX_WIDTH:
            raise UserError(
                f"mobilenet_v2: expected a width above 0 and at most {MAX_WIDTH}, got {width}; "
                "published are 0.35 to 1.4"
            )
        self.width, self.expand_first = float(width), expand_first
        channels = _divisible_by_8(32 * width)
        blocks: list[nn.Module] = [_conv_bn_relu6(3, channels, 3, stride=2)]
        info: list[FeatureInfo] = []
        total_stride = 2
        for row, (expansion, c, repeats, stride) in enumerate(_ROWS[:rows]):
            out_channels = _divisible_by_8(c * width)
            total_stride *= stride
            for repeat in range(repeats):
                step = stride if repeat == 0 else 1
                expand = expansion != 1 or expand_first
                blocks.append(InvertedResidual(channels, out_channels, step, expansion, expand))
                channels = out_channels
            if row in _TAPPED_ROWS:
                info.append(FeatureInfo(f"features.{len(blocks) - 1}", channels, total_stride))
        self.features = nn.Sequential(*blocks)
        self.feature_info = tuple(info)
        self._taps = frozenset(int(tap.module.split(".")[1]) for tap in info)

    def forward(self, images: Tensor) -> list[Tensor]:
        taps, x = [], images
        for index, block in enumerate(self.features):
            x = block(x)
            if index in self._taps:
                taps.append(x)
        return taps

    @property
    def label(self) -> str:
        return f"{self.name} x{self.width:g}"

    def describe(self) -> dict[str, Any]:
        expand = {"expand_first": True} if self.expand_first else {}
        return {"name": self.name, "width": self.width} | expand

    def first(self) -> list[nn.Module]:
        return [self.features[0], self.features[1]]

    def load_strict(self, state: Mapping[str, Tensor], source: str) -> None:
        """Load a torchvision-style state dict; the classification head, and rows that this encoder
        has not, may be present. Where the weights lack the 1x1 convolution of the first block, it
        becomes the identity.

        Raises:
            UserError: a key is missing, unknown or of another shape; the message names it.
        """
        own, given = self.state_dict(), self.check(state, source)
        self.load_state_dict({k: v.to(own[k].dtype) for k, v in given.items()}, strict=False)

    def check(self, state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
        """The part of a torchvision-style state dict that `load_strict` loads.

        Raises:
            UserError: as that says.
        """
        own = self.state_dict()
        given = {k: v for k, v in state.items() if self._has(k)}
        if self.expand_first and "features.1.conv.1.weight" in given:
            given = _with_identity(given)
        needed = {k: v for k, v in own.items() if k in given or not k.endswith(_COUNTER)}
        problem = tensor_mismatch(needed, given)
        if problem:
            raise UserError(
                f"mobilenet_v2 weights {source}: {problem}. "
                f"Expected torchvision's mobilenet_v2 state dict at width {self.width:g}"
                f"{' with a 1x1 convolution in its first block' if self.expand_first else ''}; "
                "convert the key names or give another file."
            )
        return given

    def _has(self, key: str) -> bool:
        """Whether a key is of this encoder, and not of the classification head or of later rows."""
        found = _ROWS_KEYS.match(key)
        return not found or (found[1] is not None and int(found[1]) < len(self.features))


def _with_identity(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of torchvision's form, with a 1x1 convolution and BatchNorm in the first block that
    change nothing.

    Their input is the stem's, in 0..6, so that the ReLU6 does nothing either. BatchNorm gets the
    mean and variance that a channel has if it was normally distributed before that ReLU6, and gives
    them back: in training, where it takes those of the batch, it does not change much either.
    """
    first = re.compile(r"features\.1\.conv\.(\d)\.")
    moved = {
        first.sub(lambda at: f"features.1.conv.{int(at[1]) + 1}.", key): value
        for key, value in state.items()
    }
    scale, shift = (state.get(f"features.0.1.{name}") for name in ("weight", "bias"))
    if scale is None or shift is None or scale.shape != shift.shape or scale.dim() != 1:
        return moved  # the weights lack more
    normal = torch.special.ndtri(torch.linspace(0, 1, 1026, dtype=torch.float64)[1:-1])
    values = torch.outer(normal, scale.double()) + shift.double()
    mean, variance = values.clamp(0, 6).mean(0), values.clamp(0, 6).var(0)
    return moved | {
        "features.1.conv.0.0.weight": torch.eye(len(scale))[..., None, None],
        "features.1.conv.0.1.running_mean": mean,
        "features.1.conv.0.1.running_var": variance,
        "features.1.conv.0.1.weight": (variance + nn.BatchNorm2d(1).eps).sqrt(),
        "features.1.conv.0.1.bias": mean,
    }
