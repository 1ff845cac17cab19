"""The plain mixed operation: what the fused one is compared with."""

import pytest
import torch
import torch.nn.functional as F

from nasfast.models.mixed_op import PlainMixedOp, build_branch
from nasfast.ops import deform_conv2d_reference
from nasfast.spaces.ir_nas import PRIMITIVES


@pytest.fixture
def x():
    return torch.randn(3, 4, 6, 5, dtype=torch.float64)


def make(**options):
    return PlainMixedOp(4, **options).double()


def weights(*values):
    return torch.tensor(values, dtype=torch.float64)


def normalised(x):
    """BatchNorm of the batch's own statistics."""
    variance, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt()


def by_hand(name, op, x):
    """Output of one primitive, from its weights and functions of PyTorch."""
    r, w = F.relu(x), {k.removeprefix(f"ops.{name}."): v for k, v in op.state_dict().items()}
    if name == "conv3x3":
        return normalised(F.conv2d(r, w["conv.weight"], padding=1))
    if name == "dil3x3":
        return normalised(F.conv2d(r, w["conv.weight"], padding=2, dilation=2))
    if name == "sep3x3":
        for i in "12":
            depthwise = F.conv2d(F.relu(r), w[f"depthwise{i}.weight"], padding=1, groups=4)
            r = normalised(F.conv2d(depthwise, w[f"pointwise{i}.weight"]))
        return r
    if name == "def3x3":
        out = F.conv2d(r, w["offset.weight"], w["offset.bias"], padding=1)
        offset, mask = out[:, :36], out[:, 36:].sigmoid()
        out = deform_conv2d_reference(
            r, offset, w["deform.weight"], w["deform.bias"], padding=1, mask=mask
        )
        return normalised(out)
    return x if name == "skip" else torch.zeros_like(x)


@pytest.mark.parametrize("k", range(6))
def test_one_primitive(x, k):
    op = make()
    one = torch.zeros(6, dtype=torch.float64)
    one[k] = 1.0
    torch.testing.assert_close(op(x, one), by_hand(PRIMITIVES[k], op, x))
    torch.testing.assert_close(op(x, one, active=(k,)), by_hand(PRIMITIVES[k], op, x))


def test_weighted_sum_and_running_sum(x):
    op, into = make(), torch.randn_like(x)
    w = weights(0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    expected = into + sum(f * by_hand(name, op, x) for f, name in zip(w, PRIMITIVES, strict=True))
    torch.testing.assert_close(op(x, w, into=into.clone()), expected)


def test_only_active_primitives_run(x):
    op, w = make(), weights(0.1, 0.2, 0.3, 0.4, 0.5, 0.6).requires_grad_()
    op(x, w, active=(0, 4)).sum().backward()
    seen = {name: int(b) for name, b in op.named_buffers() if name.endswith("batches_tracked")}
    assert {name.split(".")[1] for name, count in seen.items() if count} == {"conv3x3"}
    assert [k for k in range(6) if w.grad[k] != 0] == [0, 4]
    assert torch.equal(op(x, w, active=()), torch.zeros_like(x))


def test_subset_of_primitives_and_no_norm(x):
    op = make(primitives=("skip", "conv3x3"), norm="none")
    assert list(op.state_dict()) == ["ops.conv3x3.conv.weight"]
    expected = 2 * x + 3 * F.conv2d(F.relu(x), op.ops["conv3x3"].conv.weight, padding=1)
    torch.testing.assert_close(op(x, weights(2.0, 3.0)), expected)


def test_parameters():
    c = 10
    counts = {
        name: sum(p.numel() for p in op.parameters()) for name, op in PlainMixedOp(c).ops.items()
    }
    deform = 9 * c * c + c + 54 * (9 * c + 1)
    assert counts == {
        "conv3x3": 9 * c * c,
        "sep3x3": 2 * (9 * c + c * c),
        "dil3x3": 9 * c * c,
        "def3x3": deform,
    }
    affine = PlainMixedOp(c, affine=True)
    assert sum(p.numel() for p in affine.parameters()) == sum(counts.values()) + 5 * 2 * c


def test_offsets_are_not_initialised_to_zero():
    branch = build_branch("def3x3", 4)
    assert (branch.offset.weight != 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"primitives": ("conv5x5",)}, "primitives out of conv3x3, sep3x3, .*, got 'conv5x5'"),
        ({"norm": "layer"}, 'expected norm "batch" or "none", got \'layer\''),
        ({"offset_groups": 3}, "def3x3: expected channels in 3 groups that share offsets, got 4;"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)
