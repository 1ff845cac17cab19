"""Training loops shared by the search and by full training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from nasfast.device import autocast_dtype
from nasfast.training.graphs import Batch, GraphedStep
from nasfast.training.polyak import PolyakAverage
from nasfast.utils.errors import UserError

T = TypeVar("T")


class NonFiniteLossError(UserError):
    """The training loss, or what the trained network gives, became NaN or infinite."""


@dataclass(frozen=True)
class Runtime:
    """Where and how networks run."""

    device: torch.device
    """Device of networks, features, labels and metrics."""
    heartbeat: Callable[[], None] = lambda: None
    """Called before every step; may raise to stop (Ctrl-C)."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of activations under :meth:`autocast`."""
        return autocast_dtype(self.device) or torch.float32

    @property
    def precision(self) -> str:
        """Name of :attr:`dtype`, such as "bfloat16"."""
        return str(self.dtype).removeprefix("torch.")

    def autocast(self) -> AbstractContextManager[object]:
        """bfloat16 where the device computes it natively, else nothing."""
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16
        )

    def move(self, tensor: Tensor) -> Tensor:
        """Move a tensor to the device; a GPU copies it from pinned memory, asynchronously."""
        if self.device.type == "cuda" and tensor.device.type == "cpu":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def place(self, module: nn.Module) -> nn.Module:
        """Move a module to the device with channels-last weights."""
        return module.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


@dataclass(frozen=True)
class Group:
    """Parameters that share an optimizer, a clipping norm and a schedule."""

    parameters: Sequence[nn.Parameter]
    optimizer: torch.optim.Optimizer
    max_norm: float
    """Gradients are scaled down to this L2 norm."""
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None
    """Stepped after the optimizer."""


def one_cycle(
    optimizer: torch.optim.Optimizer, steps: int, warmup: float = 0.1
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up to the optimizer's learning rate over a share of the steps, cosine to zero."""
    rise = max(1, round(warmup * steps))

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise))) / 2

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def in_order(count: int, batch_size: int) -> Iterator[Tensor]:
    """Batches of the indices 0 .. count - 1; the last may be smaller."""
    yield from torch.split(torch.arange(count), batch_size)


def epoch_indices(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Shuffled batches of sample indices; a last partial batch is dropped unless it is the only."""
    order = torch.randperm(count, generator=generator)
    for start in range(0, max(count - batch_size, 0) + 1, batch_size):
        yield order[start : start + batch_size]


def train_epoch(
    batches: Iterable[T],
    loss_of: Callable[[T], Tensor],
    groups: Sequence[Group],
    runtime: Runtime,
    average: PolyakAverage | None = None,
    graph: GraphedStep | None = None,
) -> float:
    """One pass of optimisation steps; returns the mean loss.

    The loss is read from the device once, at the end. ``average`` follows every step. ``graph``
    repeats the steps of this and later passes, which must be the same: no schedules, and batches of
    tensors.

    Raises:
        NonFiniteLossError: the mean loss is NaN or infinite.
        ValueError: a graph beside a schedule, whose learning rates it would not follow.
    """
    if graph is not None and any(group.schedule is not None for group in groups):
        raise ValueError(
            "train_epoch: expected groups without a schedule beside a graph, which repeats the "
            "learning rate that it was recorded with, got one; leave out either"
        )

    def step(batch: T) -> Tensor:
        loss = loss_of(batch)
        for group in groups:
            group.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        for group in groups:
            nn.utils.clip_grad_norm_(group.parameters, group.max_norm)
            group.optimizer.step()
            if group.schedule is not None:
                group.schedule.step()
        if average is not None:
            average.update()
        return loss.detach()

    total, steps = torch.zeros((), device=runtime.device), 0
    for batch in batches:
        runtime.heartbeat()
        total += step(batch) if graph is None else graph(step, cast(Batch, batch))
        steps += 1
    mean = total.item() / max(steps, 1)
    if not math.isfinite(mean):
        raise NonFiniteLossError(f"training loss is {mean} after {steps} steps")
    return mean
