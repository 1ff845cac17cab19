"""Calls of an op's kernel without PyTorch's dispatcher, where the dispatcher would do nothing else.

Of a small map the dispatcher costs as much as the kernel; ``docs/adding_an_op.md`` has the figures.
Only this module reads private parts of ``torch._C``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nasfast.ops import _native

_c: Any = torch._C  # what PyTorch's own Python modules use of it
_forward_ad: Any = torch.autograd.forward_ad
PLAIN = (Tensor, torch.nn.Parameter)
CASTS: dict[str, Callable[[Sequence[Any], torch.dtype], bool]] = {}
"""Whether autocast to a dtype converts tensors of an op; it leaves those of other ops alone."""


def call(
    op: str,
    tensors: Sequence[Tensor | None],  # among the arguments
    arguments: Sequence[Any],
    kernel: Callable[..., Any],
    differentiable: Callable[..., Any],
    reference: Callable[..., Any],
    check_kinds: Callable[..., None],
) -> Any:
    """The result of an op: by its kernel, by its reference, or by the dispatcher.

    ``differentiable`` is the kernel made by :func:`make_differentiable`. ``check_kinds`` refuses
    what is no tensor; kernel and reference do that themselves.
    """
    if is_eager(op, tensors):
        return (differentiable if torch.is_grad_enabled() else kernel)(*arguments)
    check_kinds(*tensors)
    if is_differentiated_forward():
        return reference(*arguments)
    return getattr(torch.ops.nasfast, op).default(*arguments)


def choose_backward(
    op: str, tensors: Sequence[Tensor | None], kernel: Callable[..., Any]
) -> Callable[..., Any]:
    """The kernel of an op's gradients, or the registered op; the tensors include the saved ones."""
    if not torch.is_grad_enabled() and is_eager(op, tensors):
        return kernel
    registered: Callable[..., Any] = getattr(torch.ops.nasfast, f"{op}_backward").default
    return registered


def make_differentiable(
    kernel: Callable[..., Any], setup: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """What autograd does with a registered op, for its kernel alone."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = kernel(*inputs)
            setup(ctx, inputs, output)
            return output

    Function.backward = staticmethod(backward)  # type: ignore[method-assign]
    apply: Callable[..., Any] = Function.apply
    return apply


def is_eager(op: str, tensors: Sequence[Tensor | None]) -> bool:
    """Whether calling the kernel is all that PyTorch's dispatcher would do.

    It is not where a mode, a transform, a compiler or an autocast that converts the op's tensors
    must see the call, nor where a tensor is of a subclass or has no kernel on its device. The first
    tensor decides the device.
    """
    if torch.compiler.is_compiling():
        return False
    first = tensors[0]
    if type(first) not in PLAIN:
        return False
    assert first is not None
    device = first.device.type
    if (
        _c._len_torch_dispatch_stack()
        or _c._len_torch_function_stack()
        or _c._functorch.peek_interpreter_stack() is not None
        or _c._get_tracing_state() is not None
        or _forward_ad._current_level >= 0
        or device not in _native.KERNELS.get(op, ())
        or (
            op in CASTS
            and torch.is_autocast_enabled(device)
            and CASTS[op](tensors, torch.get_autocast_dtype(device))
        )
    ):
        return False
    plain = _plain_keys(device)
    for tensor in tensors:
        if tensor is not None and (
            type(tensor) not in PLAIN or _c._dispatch_keys(tensor).raw_repr() not in plain
        ):
            return False
    return True


def is_differentiated_forward() -> bool:
    """Whether derivatives are taken in a way that registered ops do not know.

    These are forward mode and the derivatives of ``torch.func``, where PyTorch would take an op's
    for zero, or refuse it.
    """
    if torch.compiler.is_compiling():
        return False
    if _forward_ad._current_level >= 0:
        return True
    stack = _c._functorch.get_interpreter_stack() or ()
    kinds = _c._functorch.TransformType
    return any(interpreter.key() in (kinds.Grad, kinds.Jvp) for interpreter in stack)


@functools.cache
def _plain_keys(device: str) -> set[int]:
    """What the dispatcher knows of a tensor that is nothing but memory of a device."""
    keys = set()
    for inference in (False, True):
        with torch.inference_mode(inference):
            tensor = torch.empty(0, device=device)
            keys.add(_c._dispatch_keys(tensor).raw_repr())
    return keys
