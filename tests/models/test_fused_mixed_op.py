"""The fused mixed operation beside the plain one."""

import itertools

import pytest
import torch
from kept import kept_for_backward
from mixed_ops import CLOSE, MEMORIES, assert_same, assert_same_state, make_pair, step
from torch import nn

from nasfast.models.mixed_op import MixedOp, PlainMixedOp
from nasfast.spaces.ir_nas import PRIMITIVES

ACTIVE = (None, (), (5,), (4,), (4, 5), (0,), (3,), (1, 4), (0, 2, 3), (5, 1), (0, 1, 2, 3, 4, 5))


@pytest.fixture
def x():
    return torch.randn(3, 4, 6, 5, dtype=torch.float64)


@pytest.fixture
def weights():
    return torch.rand(6, dtype=torch.float64)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("active", ACTIVE, ids=str)
@pytest.mark.parametrize("summed", [False, True])
def test_a_step_is_that_of_the_plain_one(x, weights, memory, affine, active, summed):
    """Output, gradients and running statistics, of three steps and of evaluation after them."""
    fused, plain = make_pair(memory, affine=affine)
    for _ in range(3):
        x, into = torch.randn_like(x), torch.randn_like(x) if summed else None
        assert_same(step(fused, x, weights, active, into), step(plain, x, weights, active, into))
        assert_same_state(fused, plain)
    kept = {name: value.clone() for name, value in fused.state_dict().items()}
    fused.eval()
    plain.eval()
    assert_same(step(fused, x, weights, active), step(plain, x, weights, active))
    assert_same(fused.state_dict().values(), kept.values())


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("active", [None, (0, 3), (1,)], ids=str)
def test_without_normalisation(x, weights, memory, training, active):
    fused, plain = make_pair(memory, norm="none")
    fused.train(training)
    plain.train(training)
    assert not list(fused.buffers())
    assert_same(step(fused, x, weights, active), step(plain, x, weights, active))


@pytest.mark.parametrize(
    "primitives",
    [PRIMITIVES[::-1], ("skip", "def3x3"), ("none",), ("sep3x3", "none", "conv3x3"), ("skip",), ()],
    ids="-".join,
)
@pytest.mark.parametrize("memory", MEMORIES)
def test_other_primitives(x, memory, primitives):
    fused, plain = make_pair(memory, primitives=primitives)
    weights = torch.rand(len(primitives), dtype=torch.float64)
    actives = itertools.chain(
        [None], *(itertools.combinations(range(len(primitives)), r) for r in (1, 2))
    )
    for active in actives:
        assert_same(step(fused, x, weights, active), step(plain, x, weights, active))
    assert_same_state(fused, plain)


def test_channels_and_offset_groups(weights):
    for channels, groups in ((6, 1), (6, 3), (10, 5)):
        fused, plain = make_pair(channels=channels, offset_groups=groups)
        x = torch.randn(2, channels, 7, 4, dtype=torch.float64)
        assert_same(step(fused, x, weights), step(plain, x, weights))


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("momentum", [None, 0.0, 0.3])
@pytest.mark.parametrize("steps", [(None,) * 3, ((0,), (0, 1), None, (3, 4))], ids=("all", "some"))
def test_momentum(x, weights, memory, momentum, steps):
    """None is the average over the steps in which the branch ran."""
    fused, plain = make_pair(memory)
    for module in (*fused.modules(), *plain.modules()):
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    for active in steps:
        x = torch.randn_like(x)
        assert_same(step(fused, x, weights, active), step(plain, x, weights, active))
    assert_same_state(fused, plain)


@pytest.mark.parametrize("memory", MEMORIES)
def test_statistics_see_a_batch_once_with_its_unbiased_variance(x, weights, memory):
    op = MixedOp(4, memory=memory).double()
    step(op, x, weights)
    raw = op.ops.conv3x3.conv(x.detach().relu()).detach()
    bn = op.ops.conv3x3.bn
    assert [int(m.num_batches_tracked) for m in op.modules() if hasattr(m, "momentum")] == [1] * 5
    torch.testing.assert_close(bn.running_mean, 0.1 * raw.mean((0, 2, 3)), **CLOSE)
    variance = raw.var((0, 2, 3), correction=1)
    torch.testing.assert_close(bn.running_var, 0.9 + 0.1 * variance, **CLOSE)


def test_state_dicts_are_interchangeable(x, weights):
    fused, plain = make_pair(affine=True)
    assert list(fused.state_dict()) == list(plain.state_dict())
    step(plain, x, weights)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.normal_()
    fused.load_state_dict(plain.state_dict())
    assert_same(step(fused, x, weights), step(plain, x, weights))


def running_sum(op, states, weights):
    total = None
    for state in states:
        total = op(state, weights, into=total)
    return total


@pytest.mark.parametrize("summed", [1, 3])
def test_recompute_keeps_nothing_but_the_states(summed):
    channels, states = 10, [torch.randn(2, 10, 16, 12, requires_grad=True) for _ in range(summed)]
    states = [state.detach().contiguous(memory_format=torch.channels_last) for state in states]
    weights = torch.rand(6, requires_grad=True)
    op = MixedOp(channels, memory="recompute")
    sizes, total = kept_for_backward(op, lambda: running_sum(op, states, weights))
    assert sizes[:summed] == [state.nbytes for state in states]
    small = 5 * 2 * channels * 4  # the statistics
    assert all(size <= small for size in sizes[summed:])
    total.sum().backward()


def test_save_keeps_maps_before_normalisation():
    channels = 10
    state = torch.randn(2, channels, 16, 12).contiguous(memory_format=torch.channels_last)
    weights = torch.rand(6, requires_grad=True)
    fused, plain = MixedOp(channels), PlainMixedOp(channels)
    sizes, _ = kept_for_backward(fused, lambda: fused(state, weights))
    offsets = state.nbytes // channels * 54
    assert sizes[:3] == sorted([5 * state.nbytes, offsets, state.nbytes], reverse=True)
    of_plain, _ = kept_for_backward(plain, lambda: plain(state, weights))
    assert sum(of_plain) > 1.9 * sum(sizes)


@pytest.mark.parametrize("training", [True, False])
def test_compile_fullgraph(x, weights, training):
    torch.compiler.reset()
    fused, plain = make_pair("recompute", affine=True)
    fused.train(training)
    plain.train(training)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    out, expected = compiled(x, weights), plain(x, weights)
    torch.testing.assert_close(out, expected, **CLOSE)
    out.sum().backward()
    expected.sum().backward()
    assert_same([p.grad for p in fused.parameters()], [p.grad for p in plain.parameters()])
    assert_same_state(fused, plain)


def test_unknown_memory():
    with pytest.raises(ValueError) as error:
        MixedOp(4, memory="none")
    assert str(error.value) == (
        'MixedOp: expected memory "save" or "recompute", got \'none\'; "recompute" keeps less'
    )
