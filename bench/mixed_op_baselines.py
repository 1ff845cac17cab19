"""The mixed operation of a gradient search: ours, as everybody has it, the floor; memory too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from deform_conv2d_baselines import sampled_by_grid_sample
from harness import Call
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nasfast.models.mixed_op import MixedOp, PlainMixedOp
from nasfast.models.supernet import MixedCell, Supernet, SupernetConfig
from nasfast.spaces.ir_nas import PRIMITIVES, num_edges

FLOOR, EAGER = "convolutions", "eager"
OWN = (FLOOR, EAGER, "save", "recompute")
# of the published search for denoising
CONFIG = (4, 5, 10)  # layers, nodes, width
BATCH, SIZE = 12, 64
CHANNELS = (10, 20, 40)
# ways to compute a cell or a supernet
WAYS: dict[str, dict[str, Any]] = {
    "eager": {"fused": False, "memory": "save"},
    "save": {"memory": "save"},
    "recompute": {"memory": "recompute"},
}
SEARCH_WAYS = WAYS | {"eager, checkpoints": {"fused": False, "memory": "recompute"}}


@dataclass(frozen=True)
class Problem:
    """All six primitives, five BatchNorms, on a state of a channels_last model."""

    channels: int
    batch: int = BATCH
    height: int = SIZE
    width: int = SIZE
    dtype: torch.dtype = torch.float32  # that autocast computes in
    device: str = "cpu"

    def __str__(self) -> str:
        return f"C={self.channels}, {self.batch}x{self.height}x{self.width}"

    def flops(self, backward: bool) -> int:
        """Of the convolutions; the backward has two of each."""
        c = self.channels
        weights = 3 * 9 * c * c + 9 * c * 54 + 2 * (9 * c + c * c)
        return (6 if backward else 2) * self.batch * self.height * self.width * weights


@dataclass
class Implementation:
    problem: Problem
    module: nn.Module

    def call(self, backward: bool) -> Call:
        """Forward and gradients in training, or forward in evaluation."""
        p = self.problem
        generator = torch.Generator().manual_seed(0)
        shape = (p.batch, p.channels, p.height, p.width)
        state = torch.randn(shape, generator=generator)
        state = state.to(p.device, memory_format=torch.channels_last)
        alphas = torch.zeros(len(PRIMITIVES), device=p.device)
        module = self.module.to(p.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        module.train(backward)
        half = torch.autocast(p.device, p.dtype, enabled=p.dtype != torch.float32)

        def forward() -> list[Tensor]:
            with half:
                output = module(state, alphas.softmax(0))
            return output if isinstance(output, list) else [output]

        if not backward:
            return torch.no_grad()(forward)
        leaves = [state.requires_grad_(), alphas.requires_grad_(), *module.parameters()]
        cotangents = [torch.randn_like(output) for output in torch.no_grad()(forward)()]

        def forward_backward() -> list[Tensor]:
            outputs = forward()
            found = torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True)
            return [*(o.detach() for o in outputs), *(g for g in found if g is not None)]

        return forward_backward


class Convolutions(PlainMixedOp):
    """The same weights as convolutions of the state alone, without offsets, BatchNorm or a sum."""

    def forward(self, x: Tensor, *_: Any) -> list[Tensor]:  # type: ignore[override]
        layers = [m for m in self.modules() if isinstance(getattr(m, "weight", None), nn.Parameter)]
        return [
            F.conv2d(x, m.weight, m.bias, 1, m.padding, m.dilation, m.groups)  # type: ignore[arg-type]
            for m in layers
        ]


class GridSample(nn.Module):
    """What stands in for a deformable convolution where none is installed."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, r: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        offset = offset.to(r.dtype)
        return sampled_by_grid_sample(r, offset, self.weight, mask) + self.bias[:, None, None]


Make = Callable[[Problem], Implementation]


def eager(problem: Problem) -> Implementation:
    return Implementation(problem, plain(problem.channels))


def plain(channels: int, kind: type[PlainMixedOp] = PlainMixedOp, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return kind(channels, **options)


def grid_sample(problem: Problem) -> Implementation:
    module: Any = plain(problem.channels)
    branch = module.ops["def3x3"]
    branch.deform = GridSample(branch.deform.weight, branch.deform.bias)
    return Implementation(problem, module)


def in_bfloat16(make: Make) -> Make:
    return lambda problem: make(replace(problem, dtype=torch.bfloat16))


def save(problem: Problem) -> Implementation:
    return Implementation(problem, plain(problem.channels, MixedOp))


IMPLEMENTATIONS: dict[str, Make] = {
    EAGER: eager,
    "save": save,
    "recompute": lambda p: Implementation(p, plain(p.channels, MixedOp, memory="recompute")),
    "save bfloat16": in_bfloat16(save),
    "eager bfloat16": in_bfloat16(eager),
    "grid_sample": grid_sample,
    "compiled eager": lambda p: Implementation(p, torch.compile(plain(p.channels))),  # type: ignore[arg-type]
    FLOOR: lambda p: Implementation(p, plain(p.channels, Convolutions)),
}


def kept(module: nn.Module, *arguments: Any) -> int:
    """Bytes of the storages that autograd keeps of a forward pass, parameters and buffers excluded.

    On meta tensors it takes neither time nor memory.
    """
    own = {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers())}
    storages: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage  # alive, so that no other one takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(*arguments)
    return sum(storage.nbytes() for storage in storages.values())


def empty(device: str, *shape: int) -> Tensor:
    return torch.empty(shape, device=device).to(memory_format=torch.channels_last)


def kept_by_cell(way: str, channels: int) -> int:
    """Bytes, of a cell at the published batch and size."""
    config = SupernetConfig(*CONFIG, **WAYS[way])
    with torch.device("meta"):
        cell = MixedCell(config, channels)
        weights = torch.empty(num_edges(config.nodes), len(PRIMITIVES)).requires_grad_().unbind()
    states = [empty("meta", BATCH, channels, SIZE, SIZE) for _ in range(2)]
    return kept(cell, *states, weights, [None] * len(weights))


def kept_by_supernet(way: str) -> int:
    """Bytes, of the published supernet, batch and size."""
    with torch.device("meta"):
        net = Supernet(SupernetConfig(*CONFIG, **WAYS[way]), 1)
    return kept(net, empty("meta", BATCH, 1, SIZE, SIZE))


class Checkpointed(nn.Module):
    """An eager mixed operation that keeps its state alone, as users make it.

    Its running statistics see every batch twice.
    """

    def __init__(self, op: nn.Module) -> None:
        super().__init__()
        self.op = op

    def forward(
        self, x: Tensor, weights: Tensor, active: Any = None, into: Tensor | None = None
    ) -> Tensor:
        output: Tensor = checkpoint(self.op, x, weights, active, use_reentrant=False)
        return output if into is None else into + output


def search_calls(
    way: str,
    config: Sequence[int],
    batch: int,
    size: int,
    device: str,
    dtype: torch.dtype,
    *,
    nchw: bool = False,
) -> dict[str, Call]:
    """The halves of a search step of grey images: a loss and its gradients.

    Args:
        way: out of SEARCH_WAYS.
        config: layers, nodes, width.
        dtype: what autocast computes in, if not float32.
        nchw: memory as it comes, instead of channels last.
    """
    net = Supernet(SupernetConfig(*config, **SEARCH_WAYS[way]), 1)
    if way == "eager, checkpoints":
        for cell in net.cells:
            cell.edges = nn.ModuleList(Checkpointed(op) for op in cell.edges)
    layout = torch.contiguous_format if nchw else torch.channels_last
    net.to(device, memory_format=layout)  # type: ignore[call-overload]
    images = torch.rand(batch, 1, size, size, device=device)
    architecture, weights = net.architecture(), net.weights()

    def step(leaves: Sequence[nn.Parameter]) -> list[Tensor]:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = F.mse_loss(net(images).float(), images)
        return list(torch.autograd.grad(loss, leaves))

    return {"weights": lambda: step(weights), "architecture": lambda: step(architecture)}


def memory_calls(config: Sequence[int], batch: int, size: int) -> tuple[Call, Call]:
    """What ``harness.extra_memory`` asks for: steps of the weights, small and whole."""
    small, full = (
        search_calls("recompute", config, n, s, "cpu", torch.float32)["weights"]
        for n, s in ((1, 8), (batch, size))
    )
    return small, full
