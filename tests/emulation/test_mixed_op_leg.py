"""The Python leg of mixed_op with the CUDA kernels behind it, on the CPU."""

from __future__ import annotations

import pytest
import torch
from emulated_mixed_op import NAMES, Case, Expected, assert_near, inputs, reference

from nasfast.ops import _native, mixed_op


@pytest.mark.skipif(_native.C is None, reason=f"runs the reference: {_native.ERROR}")
@pytest.mark.parametrize("dtype", _native.DTYPES, ids=str)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("fixed", [False, True])
def test_leg(legs: list[str], dtype: torch.dtype, recompute: bool, fixed: bool) -> None:
    """Pointers, sizes and strides arrive where the kernels expect them."""
    case = Case("", add=False, fixed=fixed)
    i = inputs(case, dtype)
    expected: Expected = reference(case, i)
    leaves = [t for t in i.all if t is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    output, statistics = mixed_op(
        i.input,
        i.factors,
        i.branches,
        i.scale,
        i.shift,
        batch_norm=not fixed,
        eps=1e-3,
        recompute=recompute,
    )
    found = torch.autograd.grad(output, leaves, i.grad)
    again = [] if fixed or not recompute else ["mixed_op_forward"]
    assert legs == ["mixed_op_forward", *again, "mixed_op_backward"]
    pairs = [("output", output.detach(), expected.output), *zip(NAMES, found, expected.gradients)]
    if not fixed:
        pairs.append(("statistics", statistics, expected.statistics))
    tolerance = {8: 1e-10, 4: 1e-4, 2: 4e-2}[dtype.itemsize]
    for name, got, wanted in pairs:
        assert wanted is not None
        assert_near(name, got, wanted, tolerance)
