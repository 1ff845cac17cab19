"""What the processes of one training, which ``torchrun`` started, share.

Their losses are shares of the loss of the whole batch, so gradients are summed. BatchNorm takes
statistics from the whole batch: on GPUs as torch's SyncBatchNorm, on CPUs, for which torch has
none, as `SummedBatchNorm`. So they train as one process does, up to rounding.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from nasfast.utils.errors import UserError
from nasfast.utils.interrupt import StopRequested

T = TypeVar("T")


@contextmanager
def joined() -> Iterator[None]:
    """Inside, the processes of ``torchrun`` are one; without it nothing happens.

    Raises:
        UserError: its variables are there in part: such processes would all write the same files.
    """
    count = os.environ.get("WORLD_SIZE", "1")
    if count == "1":
        yield
        return
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR") if name not in os.environ]
    if missing:
        raise UserError(
            f"train: expected torchrun to set {', '.join(missing)} beside WORLD_SIZE={count}, got "
            "none: each process would write the same folder; start them by torchrun, or unset "
            "WORLD_SIZE"
        )
    distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()


def rank() -> int:
    """Of this process; that of rank 0 writes."""
    return distributed.get_rank() if size() > 1 else 0


def size() -> int:
    """Processes of the training; 1 without ``torchrun``."""
    there = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if there else 1


def barrier() -> None:
    """Wait for all processes."""
    summed(torch.zeros(()))


def agreed(decide: Callable[[], T]) -> T:
    """What the process of rank 0 decides, in every process; an error there is one in each."""
    found: list[Any] = [None, None]
    if rank() == 0:
        try:
            found[0] = decide()
        except (UserError, OSError) as error:
            found[1] = error
    if size() > 1:
        distributed.broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    return cast("T", found[0])


def device(name: str) -> str:
    """The device of this process: of several, each has a GPU of its own.

    Raises:
        UserError: one GPU is named for all of them.
    """
    if size() == 1 or name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return name
    if name not in ("auto", "cuda"):
        raise UserError(
            f"device: expected auto, cuda or cpu for {size()} processes, each of which takes a GPU "
            f"of its own, got {name}; leave it out"
        )
    return f"cuda:{os.environ['LOCAL_RANK']}"


def require_one(what: str) -> None:
    """Raise UserError where there are several processes."""
    if size() > 1:
        raise UserError(
            f"train: expected one process for {what}, whose trainings are not divided, got "
            f"{size()}; start it without torchrun"
        )


def together(heartbeat: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """A heartbeat by which all processes stop at the same step, as soon as one is to."""
    if size() == 1:
        return heartbeat

    def check() -> None:
        stop = torch.zeros((), device=device)
        try:
            heartbeat()
        except StopRequested:
            stop += 1
        if summed(stop).item():
            raise StopRequested

    return check


def share(items: Tensor) -> Tensor:
    """This process's part of a batch, along the first axis."""
    return items if size() == 1 else items.tensor_split(size())[rank()]


def summed(values: Tensor) -> Tensor:
    """The sum over the processes, the same tensor in each."""
    if size() > 1:
        distributed.all_reduce(values)
    return values


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace gradients by their sum over the processes, in one message. Parameters without a
    gradient have none in any process."""
    if size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = summed(torch.cat([gradient.flatten() for gradient in gradients]))
    parts = torch.split(flat, [gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


class SummedBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the batches of all processes, on any device; sums are in float64. One value a
    channel in all of them is normalised with the running statistics."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        wide = x.double()
        own = wide.new_tensor([x.numel() / x.shape[1]])
        sums = torch.cat([wide.sum((0, 2, 3)), wide.square().sum((0, 2, 3)), own])
        sums = _Sum.apply(sums)  # type: ignore[no-untyped-call]
        count = sums[-1]
        if count < 2 and self.running_mean is not None:
            stats = self.running_mean, self.running_var
            return F.batch_norm(x, *stats, self.weight, self.bias, eps=self.eps)
        mean, square = (sums[:-1] / count).chunk(2)
        variance = (square - mean.square()).clamp(min=0)
        if self.track_running_stats:
            self._update(mean.detach(), variance.detach() * count / (count - 1))
        scale = (variance + self.eps).rsqrt()
        y = (wide - mean[:, None, None]) * scale[:, None, None]
        if self.weight is not None:
            y = y * self.weight[:, None, None]
        if self.bias is not None:
            y = y + self.bias[:, None, None]
        result: Tensor = y.to(x.dtype)
        return result

    def _update(self, mean: Tensor, variance: Tensor) -> None:
        """Running statistics and their counter, as of PyTorch's module."""
        momentum = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if momentum is None:  # a cumulative average
                momentum = 1 / self.num_batches_tracked.item()
        if self.running_mean is not None and self.running_var is not None:
            self.running_mean.lerp_(mean.to(self.running_mean), momentum or 0.0)
            self.running_var.lerp_(variance.to(self.running_var), momentum or 0.0)


class _Sum(torch.autograd.Function):
    """`summed`, through which gradients flow: each process has its share of the loss."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return summed(values.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return summed(grad.clone())


def synchronize(model: nn.Module, device: torch.device) -> None:
    """Let the BatchNorm layers of a network on the device see the batches of all processes."""
    if size() == 1:
        return
    for parent in list(model.modules()):
        for name, module in parent.named_children():
            if type(module) is not nn.BatchNorm2d:  # as the frozen one of ResNets
                continue
            if device.type == "cuda":
                convert = nn.SyncBatchNorm.convert_sync_batchnorm
                setattr(parent, name, convert(module))  # type: ignore[no-untyped-call]
            else:
                module.__class__ = SummedBatchNorm
