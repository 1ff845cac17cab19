"""Mixed operations of a gradient search: weighted sums of the operations an edge may become
(Liu et al., DARTS, ICLR 2019; Zhang et al., IR-NAS, CVPR 2020, section 3.1)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nasfast.models.layers import Conv2d
from nasfast.ops import DeformConv2d
from nasfast.spaces.ir_nas import PRIMITIVES

Norm = Literal["batch", "none"]


def _norm(channels: int, norm: Norm, affine: bool) -> nn.Module:
    return nn.BatchNorm2d(channels, affine=affine) if norm == "batch" else nn.Identity()


class ConvBranch(nn.Module):
    """3x3 convolution, BatchNorm."""

    def __init__(self, channels: int, norm: Norm, affine: bool, dilation: int = 1) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, dilation)
        self.bn = _norm(channels, norm, affine)

    def forward(self, r: Tensor) -> Tensor:  # [N, C, H, W]
        out: Tensor = self.bn(self.conv(r))
        return out


class SepBranch(nn.Module):
    """Depthwise 3x3, pointwise, BatchNorm, ReLU, and the first three again."""

    def __init__(self, channels: int, norm: Norm, affine: bool) -> None:
        super().__init__()
        self.depthwise1 = Conv2d(channels, channels, 3, groups=channels)
        self.pointwise1 = Conv2d(channels, channels, 1)
        self.bn1 = _norm(channels, norm, affine)
        self.depthwise2 = Conv2d(channels, channels, 3, groups=channels)
        self.pointwise2 = Conv2d(channels, channels, 1)
        self.bn2 = _norm(channels, norm, affine)

    def forward(self, r: Tensor) -> Tensor:  # [N, C, H, W]
        inner = self.bn1(self.pointwise1(self.depthwise1(r)))
        out: Tensor = self.bn2(self.pointwise2(self.depthwise2(F.relu(inner))))
        return out


class DeformBranch(nn.Module):
    """Modulated deformable 3x3 convolution (DCNv2), BatchNorm. D groups of C / D channels have own
    offsets; those are initialised like any convolution, not to zero."""

    def __init__(self, channels: int, norm: Norm, affine: bool, offset_groups: int) -> None:
        super().__init__()
        if channels % offset_groups:
            raise ValueError(
                f"def3x3: wanted channels in {offset_groups} groups that share offsets, got "
                f"{channels}; choose a width that divides"
            )
        self.offset = nn.Conv2d(channels, 27 * offset_groups, 3, padding=1)
        self.deform = DeformConv2d(channels, channels, 3, padding=1)
        self.bn = _norm(channels, norm, affine)

    def forward(self, r: Tensor) -> Tensor:  # [N, C, H, W]
        out = self.offset(r)  # [N, D * 27, H, W]
        taps = out.shape[1] // 3
        out = self.bn(self.deform(r, out[:, : 2 * taps], out[:, 2 * taps :].sigmoid()))
        assert isinstance(out, Tensor)
        return out


def make_branch(
    primitive: str, channels: int, norm: Norm = "batch", affine: bool = True, offset_groups: int = 2
) -> nn.Module:
    """A primitive with weights, on the ReLU of a state: ``[N, C, H, W]`` to the same shape."""
    if primitive == "sep3x3":
        return SepBranch(channels, norm, affine)
    if primitive == "def3x3":
        return DeformBranch(channels, norm, affine, offset_groups)
    return ConvBranch(channels, norm, affine, dilation={"conv3x3": 1, "dil3x3": 2}[primitive])


class PlainMixedOp(nn.Module):
    """The mixed operation in eager PyTorch, as published: every primitive has its own ReLU.

    Args:
        channels: C, divisible by ``offset_groups``.
        primitives: names out of PRIMITIVES, in the order of ``weights``.
        norm: ``"batch"`` or ``"none"``: what follows the convolutions.
        affine: whether BatchNorm has a scale and a shift.
        offset_groups: groups of channels with own offsets in def3x3.

    Raises:
        ValueError: an unknown primitive, an unknown norm, or channels that do not divide.
    """

    def __init__(
        self,
        channels: int,
        primitives: Sequence[str] = PRIMITIVES,
        norm: Norm = "batch",
        affine: bool = False,
        offset_groups: int = 2,
    ) -> None:
        super().__init__()
        for name in primitives:
            if name not in PRIMITIVES:
                raise ValueError(
                    f"MixedOp: wanted primitives out of {', '.join(PRIMITIVES)}, got {name!r}"
                )
        if norm not in ("batch", "none"):
            raise ValueError(f'MixedOp: wanted norm "batch" or "none", got {norm!r}')
        self.primitives = tuple(primitives)
        self.ops = nn.ModuleDict(
            {
                name: make_branch(name, channels, norm, affine, offset_groups)
                for name in self.primitives
                if name not in ("skip", "none")
            }
        )

    def forward(
        self,
        x: Tensor,  # [N, C, H, W]
        weights: Tensor,  # [K]
        active: Iterable[int] | None = None,
        into: Tensor | None = None,  # [N, C, H, W]
    ) -> Tensor:  # [N, C, H, W]
        """Sum over primitives of weight times output.

        Args:
            x: the state.
            weights: factor of each primitive.
            active: positions of the primitives to run; None runs all.
            into: added to the result.
        """
        total = into
        for k in range(len(self.primitives)) if active is None else active:
            term = weights[k] * self._run(self.primitives[k], x)
            total = term if total is None else total + term
        return torch.zeros_like(x) if total is None else total

    def _run(self, primitive: str, x: Tensor) -> Tensor:
        if primitive == "skip":
            return x
        if primitive == "none":
            return torch.zeros_like(x)
        out: Tensor = self.ops[primitive](F.relu(x))
        return out


class MixedOp(PlainMixedOp):
    def __init__(
        self,
        channels: int,
        primitives: Sequence[str] = PRIMITIVES,
        norm: Norm = "batch",
        affine: bool = False,
        memory: str = "save",
        offset_groups: int = 2,
    ) -> None:
        super().__init__(channels, primitives, norm, affine, offset_groups)
