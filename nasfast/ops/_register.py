"""Registration of the ops with ``torch.library``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from nasfast.ops import _native

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
    op that wants no kernel there.
    """
    for device in ("CPU", "CUDA"):
        if device == "CUDA" and on_cuda is not None:
            _native.LEGS.setdefault(op, {})["cuda"] = on_cuda
        elif _native.has_kernel(op, device.lower()):
            LIBRARY.impl(op, kernel, device)
            LIBRARY.impl(f"{op}_backward", kernel_backward, device)
            continue
        LIBRARY.impl(op, reference, device)
        LIBRARY.impl(op, reference, f"Autograd{device}")


def autocast(op: str, leg: Callable[[str], Function]) -> None:
    """What autocast does with the op: ``leg`` makes it for a type of device."""
    for device in ("CPU", "CUDA"):
        LIBRARY.impl(op, leg(device.lower()), f"Autocast{device}")
