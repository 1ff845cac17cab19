"""Training loops shared by the search and by full training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from nasfast.device import autocast_dtype
from nasfast.training.graphs import Batch, GraphedStep
from nasfast.training.polyak import PolyakAverage
from nasfast.utils.errors import UserError

T = TypeVar("T")

Precision = Literal["auto", "float32", "bfloat16"]
"""Of activations; auto: bfloat16 where the device computes it natively."""
Schedule = Literal["one-cycle", "cosine", "poly", "steps"]
"""How learning rates go down: see `scheduled`."""


class NonFiniteLossError(UserError):
    """The training loss, or what the trained network gives, became NaN or infinite."""


@dataclass(frozen=True)
class Runtime:
    """Where and how networks run."""

    device: torch.device
    """Device of networks, features, labels and metrics."""
    heartbeat: Callable[[], None] = lambda: None
    """Called before every step; may raise to stop (Ctrl-C)."""
    choice: Precision = "auto"

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of activations under :meth:`autocast`."""
        if self.choice == "auto":
            return autocast_dtype(self.device) or torch.float32
        return torch.bfloat16 if self.choice == "bfloat16" else torch.float32

    @property
    def precision(self) -> str:
        """Name of :attr:`dtype`, such as "bfloat16"."""
        return str(self.dtype).removeprefix("torch.")

    def autocast(self) -> AbstractContextManager[object]:
        """bfloat16 where it is chosen, else nothing."""
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


def scheduled(
    optimizer: torch.optim.Optimizer,
    kind: Schedule,
    steps: int,
    warmup: float | None = None,
    warmup_from: float = 0.0,
) -> torch.optim.lr_scheduler.LambdaLR:
    """Learning rates of so many steps: a linear rise to the optimizer's own, a fall to zero.

    Args:
        optimizer: a learning rate that is a tensor is changed in place, as recorded steps need it.
        kind: the fall is that of a cosine, or of "poly" (1 - t) ** 0.9 over the share t of it;
            "steps" divides by 10 at 2/3 and at 8/9 of all steps, and goes to no zero.
        steps: in all.
        warmup: share of the steps in which it rises; None: 0.1 for "one-cycle", else none.
        warmup_from: share of the optimizer's own that it rises from.
    """
    if warmup is None:
        warmup = 0.1 if kind == "one-cycle" else 0.0
    rise = max(1, round(warmup * steps))
    fall = max(1, steps - rise)

    def factor(step: int) -> float:
        if step < rise:
            return warmup_from + (1 - warmup_from) * (step + 1) / rise
        if kind == "steps":
            return 0.1 ** ((step >= steps * 2 / 3) + (step >= steps * 8 / 9))
        if kind == "poly":
            return float(max(0.0, 1 - (step - rise) / fall) ** 0.9)
        return (1 + math.cos(math.pi * (step - rise) / fall)) / 2

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def one_cycle(
    optimizer: torch.optim.Optimizer, steps: int, warmup: float = 0.1
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up to the optimizer's learning rate over a share of the steps, cosine to zero."""
    return scheduled(optimizer, "one-cycle", steps, warmup)


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
    loss_of: Callable[[T], Tensor | Iterator[Tensor]],
    groups: Sequence[Group],
    runtime: Runtime,
    average: PolyakAverage | None = None,
    graph: GraphedStep | None = None,
    *,
    gathered: Callable[[], None] = lambda: None,
    after: Callable[[], None] = lambda: None,
) -> float:
    """One pass of optimisation steps; returns the mean loss.

    The loss is read from the device once, at the end.

    Args:
        batches: one a step.
        loss_of: the loss of a batch, or those of its parts, whose gradients are summed: each is
            computed when the gradients of the one before are there.
        groups: what is trained.
        runtime: device and precision.
        average: follows every step.
        graph: repeats the steps of this and later passes, which must be the same, on batches of
            tensors.
        gathered: called when a step's gradients are there, before they are clipped.
        after: called after every step, outside of what a graph repeats.

    Raises:
        NonFiniteLossError: the mean loss is NaN or infinite.
        ValueError: a graph beside a schedule of a learning rate that is no tensor: the graph would
            not follow it.
    """
    if graph is not None:
        for group in groups:
            rates = [own["lr"] for own in group.optimizer.param_groups]
            if group.schedule is not None and not all(isinstance(lr, Tensor) for lr in rates):
                raise ValueError(
                    "train_epoch: expected learning rates with a schedule to be tensors beside a "
                    f"graph, which repeats the numbers that it was recorded with, got {rates}; "
                    "leave out either, or make them tensors"
                )

    def step(batch: T) -> Tensor:
        losses = loss_of(batch)
        for group in groups:
            group.optimizer.zero_grad(set_to_none=True)
        total: Tensor | None = None
        for loss in [losses] if isinstance(losses, Tensor) else losses:
            loss.backward()  # type: ignore[no-untyped-call]
            total = loss.detach() if total is None else total + loss.detach()
        gathered()
        for group in groups:
            nn.utils.clip_grad_norm_(group.parameters, group.max_norm)
            group.optimizer.step()
        if average is not None:
            average.update()
        assert total is not None
        return total

    total, steps = torch.zeros((), device=runtime.device), 0
    for batch in batches:
        runtime.heartbeat()
        total += step(batch) if graph is None else graph(step, cast(Batch, batch))
        for group in groups:
            if group.schedule is not None:
                group.schedule.step()
        after()
        steps += 1
    mean = total.item() / max(steps, 1)
    if not math.isfinite(mean):
        raise NonFiniteLossError(f"training loss is {mean} after {steps} steps")
    return mean
