"""Mixed operations of a gradient search: weighted sums of the operations an edge may become
(Liu et al., DARTS, ICLR 2019; Zhang et al., IR-NAS, CVPR 2020, section 3.1)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nasfast.models.layers import Conv2d
from nasfast.ops import Branches, DeformConv2d, mixed_op
from nasfast.ops.mixed_op import FACTORS, MAPS
from nasfast.spaces.ir_nas import PRIMITIVES
from nasfast.utils.errors import UserError

Norm = Literal["batch", "none"]
Memory = Literal["save", "recompute"]


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
            raise UserError(
                f"def3x3: expected channels in {offset_groups} groups that share offsets, got "
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


def build_branch(
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
                    f"MixedOp: expected primitives out of {', '.join(PRIMITIVES)}, got {name!r}"
                )
        if norm not in ("batch", "none"):
            raise ValueError(f'MixedOp: expected norm "batch" or "none", got {norm!r}')
        self.primitives = tuple(primitives)
        self.ops = nn.ModuleDict(
            {
                name: build_branch(name, channels, norm, affine, offset_groups)
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
    """:class:`PlainMixedOp` in one pass (:func:`nasfast.ops.mixed_op`).

    Results, parameters and state dict are the same; time and memory are a fraction.

    Args:
        memory: ``"save"`` keeps the branches' results before normalisation for the backward pass;
            ``"recompute"`` keeps the state alone and computes them again.
    """

    def __init__(
        self,
        channels: int,
        primitives: Sequence[str] = PRIMITIVES,
        norm: Norm = "batch",
        affine: bool = False,
        memory: Memory = "save",
        offset_groups: int = 2,
    ) -> None:
        if memory not in get_args(Memory):
            raise ValueError(
                f'MixedOp: expected memory "save" or "recompute", got {memory!r}; '
                '"recompute" keeps less'
            )
        super().__init__(channels, primitives, norm, affine, offset_groups)
        self.memory = memory
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        slots = {"conv3x3": "bn", "sep3x3": "bn2", "dil3x3": "bn", "def3x3": "bn"}
        norms = [(i, name, slots[name]) for i, name in enumerate(FACTORS[:4]) if name in self.ops]
        if "sep3x3" in self.ops:
            norms.append((MAPS.index("inner"), "sep3x3", "bn1"))
        self._norms = norms if norm == "batch" else []

    def forward(
        self,
        x: Tensor,
        weights: Tensor,
        active: Iterable[int] | None = None,
        into: Tensor | None = None,
    ) -> Tensor:
        runs = {
            self.primitives[k] for k in (range(len(self.primitives)) if active is None else active)
        }
        if runs <= {"none"}:
            return torch.zeros_like(x) if into is None else into
        norms = [(at, self._norm_of(name, bn)) for at, name, bn in self._norms if name in runs]
        scale, shift = self._scale_and_shift(norms)
        output, statistics = mixed_op(
            x,
            self._factors(weights, runs),
            self._branches(runs),
            scale,
            shift,
            batch_norm=self.training and bool(self._norms),
            eps=norms[0][1].eps if norms else 0.0,
            recompute=self.memory == "recompute",
        )
        if self.training and norms:
            _update_running_statistics(norms, statistics, x.numel() // x.shape[1])
        return output if into is None else into + output

    def _norm_of(self, name: str, bn: str) -> nn.BatchNorm2d:
        found: nn.BatchNorm2d = self.ops[name].get_submodule(bn)  # type: ignore[assignment]
        return found

    def _factors(self, weights: Tensor, runs: set[str]) -> Tensor:
        """In the order of FACTORS, 0 for what does not run."""
        if self.primitives == PRIMITIVES and len(runs) == len(PRIMITIVES):
            return weights[: len(FACTORS)]
        padded = F.pad(weights, (0, 1))
        order = [self.primitives.index(name) if name in runs else -1 for name in FACTORS]
        return padded[order]

    def _branches(self, runs: set[str]) -> Branches:
        ops: dict[str, Any] = {name: op for name, op in self.ops.items() if name in runs}
        conv, dil = (
            ops[name].conv.weight if name in ops else None for name in ("conv3x3", "dil3x3")
        )
        found = Branches(conv, dil)
        if "def3x3" in ops:
            op = ops["def3x3"]
            found = found._replace(
                deform=op.deform.weight,
                deform_bias=op.deform.bias,
                offset_weight=op.offset.weight,
                offset_bias=op.offset.bias,
            )
        if "sep3x3" in ops:
            op = ops["sep3x3"]
            names = ("depthwise1", "pointwise1", "depthwise2", "pointwise2")
            found = found._replace(**{name: getattr(op, name).weight for name in names})
        return found

    def _scale_and_shift(
        self, norms: Sequence[tuple[int, nn.BatchNorm2d]]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Of every map, [5, C]: BatchNorm's own, with the running statistics in evaluation."""
        if not norms or (self.training and not norms[0][1].affine):
            return None, None
        bns = [bn for _, bn in norms]
        ones = torch.ones_like(bns[0].running_mean)  # type: ignore[arg-type]
        scale, shift = torch.ones_like(ones), torch.zeros_like(ones)
        if bns[0].affine:
            scale, shift = (
                torch.stack([getattr(bn, name) for bn in bns]) for name in ("weight", "bias")
            )
        if not self.training:
            mean, var = (
                torch.stack([getattr(bn, f"running_{name}") for bn in bns])
                for name in ("mean", "var")
            )
            scale = scale * (var + bns[0].eps).rsqrt()
            shift = shift - mean * scale
        if len(norms) == len(MAPS):  # in their order
            return scale, shift
        scales, shifts = [ones] * len(MAPS), [torch.zeros_like(ones)] * len(MAPS)
        for (at, _), of_map, to in zip(norms, scale.unbind(), shift.unbind(), strict=True):
            scales[at], shifts[at] = of_map, to
        return torch.stack(scales), torch.stack(shifts)


@torch.no_grad()
def _update_running_statistics(
    norms: Sequence[tuple[int, nn.BatchNorm2d]], statistics: Tensor, count: int
) -> None:
    """As BatchNorm does: towards the mean and the unbiased variance of ``count`` values."""
    buffers: list[Tensor] = []
    targets: list[Tensor] = []
    momenta: list[float] = []
    counts: list[Any] = [bn.num_batches_tracked for _, bn in norms]
    torch._foreach_add_(counts, 1)
    rows = statistics.to(norms[0][1].running_mean.dtype)  # type: ignore[union-attr]
    unbiased = rows[:, 1] * (count / (count - 1))
    for at, bn in norms:
        assert bn.running_mean is not None
        assert bn.running_var is not None
        assert bn.num_batches_tracked is not None
        buffers += [bn.running_mean, bn.running_var]
        targets += [rows[at, 0], unbiased[at]]
        momentum = bn.momentum
        if momentum is None:  # a cumulative average
            momentum = 1 / bn.num_batches_tracked.item()
        momenta += [momentum, momentum]
    torch._foreach_lerp_(buffers, targets, momenta)
