"""Mixed operations of a gradient search: weighted sums of the operations an edge may become
(Liu et al., DARTS, ICLR 2019; Zhang et al., IR-NAS, CVPR 2020, section 3.1)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nasfast.models.layers import Conv2d, has_hooks
from nasfast.ops import Branches, DeformConv2d, mixed_op
from nasfast.ops.convolution import convolution_dtype
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

    def parameters_of_pass(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """In the order of :class:`nasfast.ops.Branches`."""
        convs = self.depthwise1, self.pointwise1, self.depthwise2, self.pointwise2
        first, second, third, fourth = (conv.weight for conv in convs)
        return first, second, third, fourth

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

    def parameters_of_pass(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """In the order of :class:`nasfast.ops.Branches`."""
        deform, offset = self.deform, self.offset
        return deform.weight, deform.bias, offset.weight, offset.bias

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

    A call takes the plain formulation, with its time and memory, where the pass cannot do the same:

    - some BatchNorms that run are frozen and others are not, or those that normalise by the batch
      differ in ``eps``, or only some have a scale or a shift;
    - a module inside has hooks (pruning sets them) or was replaced by one of another class;
    - the batch is empty.

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
        """As of :class:`PlainMixedOp`.

        Raises:
            ValueError: maps of one value a channel, which a BatchNorm in training cannot normalise,
                or an ``eps`` that is not above 0.
        """
        chosen = range(len(self.primitives)) if active is None else tuple(active)
        runs = {self.primitives[k] for k in chosen}
        if "skip" in runs and convolution_dtype(x) != x.dtype:  # autocast casts the others alone
            skip = self.primitives.index("skip")
            rest = self.forward(x, weights, [k for k in chosen if k != skip], into)
            return rest + weights[skip] * x
        if runs <= {"none"}:
            total = torch.zeros_like(x) if into is None else into
            return _wide(total, x) if runs else total
        if not self._is_as_made(runs):
            return super().forward(x, weights, chosen, into)
        norms = _Norms(
            [
                (at, cast(nn.BatchNorm2d, self.ops[name]._modules[slot]))
                for at, name, slot in self._norms
                if name in runs
            ]
        )
        norms.check(x)
        if x.shape[0] == 0 or not norms.alike:
            return super().forward(x, weights, chosen, into)
        output, statistics = mixed_op(
            x,
            self._factors(weights.to(torch.promote_types(x.dtype, torch.float32)), runs),
            self._branches(runs),
            *norms.scale_and_shift(),
            batch_norm=norms.batch,
            eps=norms.eps[0] if norms.batch else 0.0,
            recompute=self.memory == "recompute",
        )
        if norms.batch:
            norms.update(statistics, x.numel() // x.shape[1])
        output = output if into is None else into + output
        return _wide(output, x) if "none" in runs else output

    def _is_as_made(self, runs: set[str]) -> bool:
        """Whether the modules of the branches do what the pass does, and no more."""
        for name, op in self.ops._modules.items():
            if name in runs:
                for module in cast(list[nn.Module], [op, *op._modules.values()]):
                    if type(module) not in _FUSED or has_hooks(module):
                        return False
        return True

    def _factors(self, weights: Tensor, runs: set[str]) -> Tensor:
        """In the order of FACTORS, 0 for what does not run."""
        if self.primitives == PRIMITIVES and len(runs) == len(PRIMITIVES):
            return weights[: len(FACTORS)]
        padded = F.pad(weights, (0, 1))
        order = [self.primitives.index(name) if name in runs else -1 for name in FACTORS]
        return padded[order]

    def _branches(self, runs: set[str]) -> Branches:
        ops: dict[str, Any] = {name: op for name, op in self.ops._modules.items() if name in runs}
        conv, dil, deform, separable = map(ops.get, ("conv3x3", "dil3x3", "def3x3", "sep3x3"))
        none = None, None, None, None
        return Branches(
            None if conv is None else conv.conv.weight,
            None if dil is None else dil.conv.weight,
            *(none if deform is None else deform.parameters_of_pass()),
            *(none if separable is None else separable.parameters_of_pass()),
        )


_FUSED = {
    *(ConvBranch, SepBranch, DeformBranch),
    *(Conv2d, nn.Conv2d, DeformConv2d, nn.BatchNorm2d, nn.Identity),
}
"""Modules of branches; a subclass, as sharding and parametrisations make, does something else."""


def _wide(total: Tensor, x: Tensor) -> Tensor:
    """A sum to which "none" adds zeros of the dtype of ``x``."""
    return total.to(torch.promote_types(total.dtype, x.dtype))


class _Norms:
    """The BatchNorms that run, with their positions in MAPS.

    Attributes:
        batch: whether they normalise by the batch, not by running statistics.
        alike: whether one pass can do them all.
    """

    def __init__(self, norms: list[tuple[int, nn.BatchNorm2d]]) -> None:
        self.modules = norms
        self.means: list[Tensor | None] = []
        self.scales: list[Tensor | None] = []
        self.shifts: list[Tensor | None] = []
        self.eps: list[float] = []
        self.by_batch: list[bool] = []
        forms = set()
        for _, bn in self.modules:
            # read once: attributes of modules are slow
            mean, scale, shift, eps = bn.running_mean, bn.weight, bn.bias, bn.eps
            batch = bn.training or mean is None
            self.means.append(mean)
            self.scales.append(scale)
            self.shifts.append(shift)
            self.eps.append(eps)
            self.by_batch.append(batch)
            dtypes = [None if t is None else t.dtype for t in (mean, scale, shift)]
            forms.add((batch, eps if batch else None, *dtypes))
        self.batch = True in self.by_batch
        self.alike = len(forms) < 2

    def check(self, x: Tensor) -> None:
        """ValueError where a map cannot be normalised."""
        for eps, batch in zip(self.eps, self.by_batch, strict=True):
            if not (0 < eps < math.inf or (eps == 0 and not batch)):
                raise ValueError(
                    f"MixedOp: expected eps of BatchNorm above 0 and finite, got {eps}; change it"
                )
        if self.batch and x.shape[0] * math.prod(x.shape[2:]) == 1:
            raise ValueError(
                "MixedOp: expected more than one value per channel to normalise by, got input of "
                f"shape {tuple(x.shape)}; use larger images or batches, or freeze BatchNorm with "
                "eval()"
            )

    def scale_and_shift(self) -> tuple[Tensor | None, Tensor | None]:
        """Of every map, [5, C]: BatchNorm's own, with the running statistics unless it uses the
        batch's."""
        scale, shift = _rows(self.scales), _rows(self.shifts)
        if not self.batch and self.modules:
            mean, var = _rows(self.means), _rows([bn.running_var for _, bn in self.modules])
            assert mean is not None
            assert var is not None
            same = len(set(self.eps)) == 1
            eps = self.eps[0] if same else var.new_tensor(self.eps)[:, None]
            deviation = (var + eps).rsqrt()
            scale = deviation if scale is None else scale * deviation
            shift = -mean * scale if shift is None else shift - mean * scale
        return self._of_maps(scale, 1.0), self._of_maps(shift, 0.0)

    def _of_maps(self, rows: Tensor | None, other: float) -> Tensor | None:
        if rows is None or len(rows) == len(MAPS):  # in their order
            return rows
        found = [torch.full_like(rows[0], other)] * len(MAPS)
        for (at, _), row in zip(self.modules, rows.unbind(), strict=True):
            found[at] = row
        return torch.stack(found)

    def update(self, statistics: Tensor, count: int) -> None:
        """As BatchNorm does: towards the mean and the unbiased variance of ``count`` values."""
        buffers: list[Tensor] = []
        targets: list[Tensor] = []
        momenta: list[float] = []
        counters: list[Any] = []
        means: Sequence[Tensor] = ()
        variances: Sequence[Tensor] = ()
        for (at, bn), mean in zip(self.modules, self.means, strict=True):
            if not (bn.training and bn.track_running_stats):
                continue
            batches = bn.num_batches_tracked
            if batches is not None:
                counters.append(batches)
            if mean is None:
                continue
            if not means:
                rows = statistics.to(mean.dtype)
                means = rows[:, 0].unbind()
                variances = (rows[:, 1] * (count / (count - 1))).unbind()
            momentum = bn.momentum
            if momentum is None:  # a cumulative average
                momentum = 0.0 if batches is None else 1 / (batches.item() + 1)
            assert bn.running_var is not None
            buffers += [mean, bn.running_var]
            targets += [means[at], variances[at]]
            momenta += [momentum, momentum]
        with torch.no_grad():
            if counters:
                torch._foreach_add_(counters, 1)
            if buffers:
                torch._foreach_lerp_(buffers, targets, momenta)


def _rows(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """Vectors of the maps, or None, as a matrix; in float32 if they are in half precision."""
    found = [tensor for tensor in tensors if tensor is not None]
    if not found:
        return None
    return torch.stack(found).to(torch.promote_types(found[0].dtype, torch.float32))
