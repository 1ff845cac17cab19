"""The operations of a network in evaluation mode, found without computing anything."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import weakref
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class Form(NamedTuple):
    """What the form of a result depends on in a tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Call:
    """One operation of PyTorch."""

    name: str
    """Such as "aten.convolution"."""
    args: tuple[Any, ...]
    """By position; a `Form` stands for each tensor, that before autocast."""
    read: tuple[int, ...]
    """Numbers of the tensors in the arguments, in order; those of parameters are negative."""
    result: Any
    """`Form`, or a tuple of them."""
    made: tuple[int, ...]
    """Numbers of the tensors in the result. An operation in place makes what it read."""
    view: bool
    """Whether the result shares the memory of what is read."""


@dataclass(frozen=True)
class Trace:
    """What a network does to one input."""

    calls: tuple[Call, ...]
    macs: int
    """Multiply-accumulates of convolutions and products."""
    peak: int
    """The most bytes that the input and what is computed of it take at one time."""


def trace(module: nn.Module, inputs: object, autocast: str = "") -> Trace:
    """The operations of a network on ``inputs``, a tensor or a list of tensors on the device
    "meta". The network is traced as it is in evaluation mode, and left alone.

    Args:
        autocast: type of the device, "cpu" or "cuda", whose autocast to bfloat16 is followed.
    """
    tracer = _Tracer(autocast)
    # in inference mode convolutions are not told apart from what they consist of
    with torch.inference_mode(False), torch.no_grad():
        inputs = _twins(inputs)
        tracer.keep(inputs)
        with _Convolutions() if autocast else nullcontext(), tracer:
            _evaluating(module)(inputs)
    return Trace(tuple(tracer.calls), tracer.flops // 2, tracer.peak)


def _evaluating(module: nn.Module) -> nn.Module:
    """A network of the same parameters in evaluation mode."""
    twin = copy.copy(module)
    twin.training = False
    twin._modules = {
        name: None if part is None else _evaluating(part) for name, part in module._modules.items()
    }
    return twin


def _twins(value: Any) -> Any:
    """Other tensors of the same form."""
    if isinstance(value, Tensor):
        return _of_form(_form_of(value))
    return type(value)(map(_twins, value)) if isinstance(value, (list, tuple)) else value


_NARROWED = {"aten.convolution": (0, 1, 2), "nasfast.deform_conv2d": (0, 2, 3)}
"""Arguments that autocast gives operations in bfloat16."""
_WIDENED = {"cuda": {"aten.native_group_norm", "aten.exp", "aten.sum"}}
"""Operations to which it gives float32, by the type of the device."""


class _Convolutions(TorchFunctionMode):
    """conv2d without its check of dtypes, which comes before the dispatch, and autocast earlier."""

    def __torch_function__(
        self, func: Any, types: object, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return (_conv2d if func is torch.conv2d else func)(*args, **(kwargs or {}))


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    stride, padding, dilation = (_pair(each) for each in (stride, padding, dilation))
    return torch.convolution(input, weight, bias, stride, padding, dilation, False, (0, 0), groups)


class _Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what FlopCounterMode counts, without taking apart the operations that have no formula.

    Nothing is computed: of each operation, whatever the device of its tensors, there is only the
    form of the result, which is worked out once in a process.
    """

    def __init__(self, autocast: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.autocast = autocast
        self.calls: list[Call] = []
        self.flops, self.peak = 0, 0
        self._live = 0
        self._numbers, self._parameters = itertools.count(), itertools.count(-1, -1)

    def keep(self, value: Any, view: bool = False) -> None:
        """Number tensors, and count their bytes until they are gone; those of a view are its
        base's, which it keeps."""
        if isinstance(value, (list, tuple)):
            for each in value:
                self.keep(each, view)
        elif isinstance(value, Tensor):
            value._number = next(self._numbers)  # type: ignore[attr-defined]
            if view:
                return
            size = math.prod(value.shape) * value.dtype.itemsize
            self._live += size
            self.peak = max(self.peak, self._live)
            weakref.finalize(value, self._free, size)

    def _free(self, size: int) -> None:
        self._live -= size

    def _number(self, tensor: Tensor) -> int:
        if not hasattr(tensor, "_number"):
            return next(self._parameters)
        number: int = tensor._number
        return number

    def __torch_dispatch__(
        self,
        func: Any,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = str(func._overloadpacket)
        forms = _form_of(args)
        given = _cast(name, forms, self.autocast) if self.autocast else forms
        named = tuple((name, _form_of(value)) for name, value in (kwargs or {}).items())
        form, flops = _traced(func, given, named, _types((given, named)))
        self.flops += flops
        tensors = _tensors(args)
        kind = _aliasing(func)
        if kind == "in place":
            result: Any = tensors[0]
        else:
            result = _of_form(form)
            self.keep(result, kind == "view")
        made = tuple(map(self._number, _tensors((result,))))
        if made:
            read = tuple(map(self._number, tensors))
            self.calls.append(Call(name, forms, read, form, made, kind == "view"))
        return result


@functools.cache
def _aliasing(func: Any) -> str:
    """Whether the result is the first tensor "in place", a "view" of it, or "new"."""
    if func._schema.is_mutable and func._schema.arguments[0].is_write:
        return "in place"
    return "view" if any(r.alias_info is not None for r in func._schema.returns) else "new"


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for each in value for t in _tensors(each)] if isinstance(value, (list, tuple)) else []


def _form_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Form(value.shape, value.stride(), value.dtype)
    return tuple(map(_form_of, value)) if isinstance(value, (list, tuple)) else value


def _of_form(form: Any) -> Any:
    """The inverse, on the device "meta"."""
    if isinstance(form, Form):
        return torch.empty_strided(form.shape, form.stride, dtype=form.dtype, device="meta")
    return tuple(map(_of_form, form)) if isinstance(form, tuple) else form


def _cast(name: str, args: tuple[Any, ...], device: str) -> tuple[Any, ...]:
    """The arguments that autocast gives an operation in place of these."""
    wide = name in _WIDENED.get(device, ())
    changed = range(len(args)) if wide else _NARROWED.get(name, ())
    dtype = torch.float32 if wide else torch.bfloat16
    return tuple(
        each._replace(dtype=dtype) if i in changed and isinstance(each, Form) else each
        for i, each in enumerate(args)
    )


def _types(value: Any) -> Any:
    """Types of the numbers in a value: 5 and 5.0 are equal."""
    return tuple(map(_types, value)) if type(value) is tuple else type(value)


@functools.lru_cache(2**14)
def _traced(func: Any, args: Any, kwargs: Any, types: Any) -> tuple[Any, int]:
    """Form of an operation's result, and its floating-point operations. ``types`` tells calls apart
    that are equal."""
    values, named = _of_form(args), {name: _of_form(value) for name, value in kwargs}
    result = func(*values, **named)
    formula = flop_registry.get(func._overloadpacket)
    flops = 0 if formula is None else int(formula(*values, **named, out_val=result))
    return _form_of(result), flops
