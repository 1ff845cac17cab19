"""Registration of the ops with ``torch.library``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nasfast.ops import _eager, _native
from nasfast.ops._checks import HALF

Function = Callable[..., Any]

_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
LIBRARY: Any = torch.library.Library("nasfast", "FRAGMENT")  # type: ignore[no-untyped-call]


def define(
    schema: str,
    fake: Function,
    flops: Function | None = None,
    backward: Function | None = None,
    setup: Function | None = None,
) -> None:
    """Makes ``torch.ops.nasfast.<op>`` of a schema, with what holds for it on every device.

    ``fake`` computes shapes and layouts, ``flops`` counts; ``setup`` saves what ``backward``, the
    autograd formula, reads.
    """
    op = schema.partition("(")[0]
    LIBRARY.define(schema, tags=_TAGS)
    torch.library.register_fake(f"nasfast::{op}", fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(
            f"nasfast::{op}", backward, setup_context=setup, lib=LIBRARY
        )
    if flops is not None:
        register_flop_formula(getattr(torch.ops.nasfast, op))(flops)


def implement(
    op: str,
    kernel: Function,
    kernel_backward: Function,
    reference: Function,
    on_cuda: str | None = None,
) -> None:
    """The kernels of ``op`` and ``<op>_backward`` on each device that the extension has them for.

    Elsewhere PyTorch differentiates the reference. ``on_cuda`` names what that is on CUDA, for an
    op that needs no kernel there.
    """
    for device in ("CPU", "CUDA"):
        if device == "CUDA" and on_cuda is not None:
            _native.BACKENDS.setdefault(op, {})["cuda"] = on_cuda
        elif _native.has_kernel(op, device.lower()):
            LIBRARY.impl(op, kernel, device)
            LIBRARY.impl(f"{op}_backward", kernel_backward, device)
            continue
        LIBRARY.impl(op, reference, device)
        LIBRARY.impl(op, reference, f"Autograd{device}")


def _always(tensors: Sequence[Any], dtype: torch.dtype) -> bool:
    return True


def autocast(
    op: str,
    make: Callable[[str], Function],
    converts: Callable[[Sequence[Any], torch.dtype], bool] = _always,
) -> None:
    """What autocast does with the op: ``make`` makes it for a type of device.

    ``converts`` says whether it converts any of the tensors: where not, it needs no dispatcher.
    """
    _eager.CASTS[op] = converts
    for device in ("CPU", "CUDA"):
        LIBRARY.impl(op, make(device.lower()), f"Autocast{device}")


def cast(tensor: Any, dtype: torch.dtype) -> Any:
    """As autocast does: float64, integers and None stay."""
    floating = tensor is not None and tensor.dtype in (torch.float32, *HALF)
    return tensor.to(dtype) if floating else tensor


class _Together(torch.autograd.Function):
    """Casts of tensors to a dtype, and of their gradients to that of the tensors."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtype = tensors[0].dtype
        return tuple(_native.convert(tensors, dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        there = [grad for grad in grads if grad is not None]
        if torch.is_grad_enabled():  # to be differentiated again
            found = iter([grad.to(ctx.dtype) for grad in there])
        else:
            found = iter(_native.convert(there, ctx.dtype))
        return None, *(None if grad is None else next(found) for grad in grads)


def cast_together(op: str, tensors: Sequence[Any], dtype: torch.dtype) -> list[Any]:
    """:func:`cast` of the arguments of an op, by a launch for all where they are on CUDA."""
    single = [
        i for i, t in enumerate(tensors) if t is not None and t.is_cuda and t.dtype == torch.float32
    ]
    chosen = [tensors[i] for i in single]
    if len(chosen) < 2 or dtype == torch.float32 or not _eager.is_eager(op, chosen):
        return [cast(tensor, dtype) for tensor in tensors]
    found = dict(zip(single, _Together.apply(dtype, *chosen), strict=True))  # type: ignore[no-untyped-call]
    return [found[i] if i in found else cast(t, dtype) for i, t in enumerate(tensors)]


def second_derivatives(
    reference: Function, saved: Sequence[Any], cotangents: Sequence[Tensor], wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of a backward pass, rarely needed, by differentiating the reference twice.

    ``saved`` are the gradient of the output and the arguments of ``reference``; ``cotangents`` and
    ``wanted`` are of the gradients of these arguments.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # views, so that differentiation stops here and not in the graph that made the tensors
        tensors = [
            t if t is None else t.view_as(t) if t.requires_grad else t.detach().requires_grad_()
            for t in saved
        ]
        grad, *arguments = tensors
        chosen = [
            (argument, cotangent)
            for argument, cotangent, want in zip(arguments, cotangents, wanted, strict=True)
            if want and argument is not None
        ]
        sources, cotangents = zip(*chosen, strict=True)
        gradients = torch.autograd.grad(reference(*arguments), sources, grad, create_graph=True)
        found = torch.autograd.grad(
            gradients,
            [tensor for tensor in tensors if tensor is not None],
            cotangents,
            create_graph=create_graph,
            allow_unused=True,
        )
    rest = iter(found)
    return tuple(None if tensor is None else next(rest) for tensor in tensors)
