"""What the processes of one training share: gradients, sums, and who writes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn

T = TypeVar("T")


def rank() -> int:
    """Of this process; that of rank 0 writes."""
    return distributed.get_rank() if size() > 1 else 0


def size() -> int:
    """Processes of the training; 1 without ``torchrun``."""
    there = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if there else 1


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
