"""BatchNorms of a mixed operation that are frozen, different or odd: as in the plain one."""

from collections.abc import Callable

import pytest
import torch
from mixed_ops import CLOSE, MEMORIES, assert_same, assert_same_state, make_pair, step
from torch import Tensor, nn

from nasfast.models import mixed_op as module
from nasfast.models.mixed_op import MixedOp, PlainMixedOp
from nasfast.training import batch_norm

Change = Callable[[PlainMixedOp], None]


def norms(op: PlainMixedOp) -> dict[str, nn.BatchNorm2d]:
    """By branch; sep3x3 has two."""
    found = {
        f"{name} {slot}": bn
        for name, branch in op.ops.items()
        for slot, bn in branch.named_children()
        if isinstance(bn, nn.BatchNorm2d)
    }
    assert len(found) == 5
    return found


def frozen(*names: str) -> Change:
    def change(op: PlainMixedOp) -> None:
        for name, bn in norms(op).items():
            if not names or name in names:
                bn.eval()

    return change


def evaluated_but(*names: str) -> Change:
    def change(op: PlainMixedOp) -> None:
        op.eval()
        for name in names:
            norms(op)[name].train()

    return change


def having(*names: str, **attributes: object) -> Change:
    """Attributes of some norms; all if there are no names."""

    def change(op: PlainMixedOp) -> None:
        for name, bn in norms(op).items():
            if not names or name in names:
                for key, value in attributes.items():
                    setattr(bn, key, value)

    return change


def remade(*names: str, training: bool = True, **arguments: bool) -> Change:
    """Norms that were made with other arguments."""

    def change(op: PlainMixedOp) -> None:
        for name in names or norms(op):
            branch, slot = name.split()
            bn = nn.BatchNorm2d(4, **arguments).double().train(training)
            for i, parameter in enumerate(bn.parameters()):
                nn.init.constant_(parameter, 0.5 + i)
            setattr(op.ops[branch], slot, bn)
        op.train(training)

    return change


def each(attribute: str, *values: object) -> Change:
    def change(op: PlainMixedOp) -> None:
        for bn, value in zip(norms(op).values(), values, strict=True):
            setattr(bn, attribute, value)

    return change


FUSED = {
    "all frozen": frozen(),
    "frozen for the end of a training": batch_norm.freeze,
    "frozen, different eps": lambda op: (frozen()(op), each("eps", 0.1, 0.0, 0.3, 0.4, 0.5)(op)),
    "evaluated, one eps": lambda op: (op.eval(), having("dil3x3 bn", eps=0.7)(op)),
    "eps": having(eps=0.3),
    "momentum": each("momentum", 0.1, 0.2, None, 1.0, 0.0),
    "cumulative average": having(momentum=None),
    "no statistics": remade(track_running_stats=False, affine=False),
    "no statistics, scaled": remade(track_running_stats=False),
    "no statistics, evaluated": remade(track_running_stats=False, training=False),
    "statistics no longer tracked": having(track_running_stats=False),
    "one no longer tracked": having("conv3x3 bn", track_running_stats=False),
    "no counter": having(num_batches_tracked=None),
    "no counter, cumulative": having(num_batches_tracked=None, momentum=None),
    "no shift": remade(bias=False),
    "no shift, evaluated": remade(bias=False, training=False),
    "not affine": remade(affine=False),
}
"""What one pass does."""
PLAIN = {
    "one frozen": frozen("def3x3 bn"),
    "the first frozen": frozen("conv3x3 bn"),
    "inner frozen": frozen("sep3x3 bn1"),
    "some frozen": frozen("dil3x3 bn", "sep3x3 bn2"),
    "all but one frozen": evaluated_but("sep3x3 bn2"),
    "one has no statistics, evaluated": lambda op: (
        remade("conv3x3 bn", track_running_stats=False)(op),
        op.eval(),
    ),
    "one eps": having("conv3x3 bn", eps=0.5),
    "different eps": each("eps", 0.1, 0.2, 0.3, 0.4, 0.5),
    "one without a shift": remade("conv3x3 bn", bias=False),
    "one without a scale": remade("dil3x3 bn", affine=False),
}
"""What takes the plain formulation."""


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Grows by each call of the fused op."""
    calls: list[object] = []
    op = module.mixed_op
    monkeypatch.setattr(module, "mixed_op", lambda *a, **b: (calls.append(None), op(*a, **b))[1])
    return calls


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("name", [*FUSED, *PLAIN])
def test_norms_of_all_kinds(name: str, affine: bool, memory: str, passes: list[object]) -> None:
    """Output, gradients, statistics and counters of some steps of all branches and of some."""
    change = {**FUSED, **PLAIN}[name]
    fused, plain = make_pair(memory, affine=affine)
    for _ in range(2):  # statistics unlike the first
        x = torch.randn(3, 4, 6, 5, dtype=torch.float64)
        assert_same(step(fused, x, torch.ones(6).double()), step(plain, x, torch.ones(6).double()))
    change(fused)
    change(plain)
    passes.clear()
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    for active in (None, None, (0, 1, 2, 3, 4, 5)):
        x, weights = torch.randn(3, 4, 6, 5).double(), torch.rand(6).double()
        assert_same(step(fused, x, weights, active), step(plain, x, weights, active))
        assert_same_state(fused, plain)
    alike = name == "one without a scale" and not affine  # as all others then
    assert len(passes) == (3 if name in FUSED or alike else 0)
    if name in ("all frozen", "frozen for the end of a training"):
        assert_same(fused.state_dict().values(), before.values())
    for active in ((0,), (1, 4), (2, 3)):
        x, weights = torch.randn(3, 4, 6, 5).double(), torch.rand(6).double()
        assert_same(step(fused, x, weights, active), step(plain, x, weights, active))
        assert_same_state(fused, plain)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("affine", [False, True])
def test_an_empty_batch_counts_and_moves_nothing(
    training: bool, momentum: float | None, affine: bool
) -> None:
    fused, plain = make_pair(affine=affine)
    for op in (fused, plain):
        having(momentum=momentum)(op)
        op.train(training)
    weights = torch.rand(6, dtype=torch.float64)
    for count in (3, 0, 0, 2):
        x = torch.randn(count, 4, 6, 5, dtype=torch.float64)
        before = {key: value.clone() for key, value in fused.state_dict().items()}
        ours, reference = step(fused, x, weights), step(plain, x, weights)
        assert_same(ours, reference)
        assert_same_state(fused, plain)
        if count == 0:
            assert ours[0].shape == (0, 4, 6, 5)
            for key, value in fused.state_dict().items():
                counter = training and key.endswith("num_batches_tracked")
                torch.testing.assert_close(value, before[key] + counter, rtol=0, atol=0)


def test_a_norm_that_reads_several_processes_is_called(passes: list[object]) -> None:
    """As that of ``SyncBatchNorm.convert_sync_batchnorm``: any class but PyTorch's own."""

    class Doubled(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    fused, plain = make_pair()
    for op in (fused, plain):
        norms(op)["dil3x3 bn"].__class__ = Doubled
    x, weights = torch.randn(3, 4, 6, 5).double(), torch.rand(6).double()
    assert_same(step(fused, x, weights), step(plain, x, weights))
    assert not passes
    assert_same(step(fused, x, weights, (0, 1)), step(plain, x, weights, (0, 1)))
    assert len(passes) == 1


@pytest.mark.parametrize("active", [None, (0,), (1, 5), (3,)], ids=str)
@pytest.mark.parametrize("evaluated", [False, True], ids=["training", "untracked"])
def test_one_value_per_channel(active: tuple[int, ...] | None, evaluated: bool) -> None:
    """PyTorch refuses it too; nothing has changed then."""
    fused, plain = make_pair()
    if evaluated:
        for op in (fused, plain):
            remade(track_running_stats=False, training=False)(op)
    x, weights = torch.randn(1, 4, 1, 1).double(), torch.rand(6).double()
    before = {key: value.clone() for key, value in fused.state_dict().items()}
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        plain(x, weights, active)
    with pytest.raises(ValueError) as error:
        fused(x, weights, active)
    assert str(error.value) == (
        "MixedOp: expected more than one value per channel to normalise by, got input of shape "
        "(1, 4, 1, 1); use larger images or batches, or freeze BatchNorm with eval()"
    )
    assert_same(fused.state_dict().values(), before.values())


@pytest.mark.parametrize("active", [(), (4,), (5,), (4, 5)], ids=str)
def test_one_value_per_channel_where_nothing_is_normalised(active: tuple[int, ...]) -> None:
    fused, plain = make_pair()
    x, weights = torch.randn(1, 4, 1, 1).double(), torch.rand(6).double()
    assert_same(step(fused, x, weights, active), step(plain, x, weights, active))


def test_one_value_per_channel_by_running_statistics() -> None:
    fused, plain = make_pair()
    x, weights = torch.randn(1, 4, 1, 1).double(), torch.rand(6).double()
    for op in (fused, plain):
        frozen()(op)
    assert_same(step(fused, x, weights), step(plain, x, weights))


@pytest.mark.parametrize("eps", [-1.0, float("nan"), float("inf"), 0.0])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("where", [(), ("dil3x3 bn",), ("sep3x3 bn1",)], ids=str)
def test_eps_is_above_0(eps: float, training: bool, where: tuple[str, ...]) -> None:
    """0 will do for running statistics, as for PyTorch."""
    fused, plain = make_pair()
    for op in (fused, plain):
        having(*where, eps=eps)(op)
        op.train(training)
    x, weights = torch.randn(3, 4, 6, 5).double(), torch.rand(6).double()
    if eps == 0 and not training:
        torch.testing.assert_close(fused(x, weights), plain(x, weights), **CLOSE)
        return
    with pytest.raises(ValueError) as error:
        fused(x, weights)
    assert str(error.value) == (
        f"MixedOp: expected eps of BatchNorm above 0 and finite, got {eps}; change it"
    )
    fused(x, weights, (4,))  # nothing reads it


def test_factors_of_another_precision() -> None:
    """Alphas stay in float32 beside a network in float64."""
    fused, plain = make_pair()
    x = torch.randn(3, 4, 6, 5).double()
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        weights = torch.rand(6).to(dtype)
        torch.testing.assert_close(fused(x, weights), plain(x, weights), **CLOSE)


def test_positions_may_be_an_iterator() -> None:
    fused, plain = make_pair()
    frozen("conv3x3 bn")(fused)
    frozen("conv3x3 bn")(plain)
    x, weights = torch.randn(3, 4, 6, 5).double(), torch.rand(6).double()
    got = fused(x, weights, (k for k in (0, 2)))
    torch.testing.assert_close(got, plain(x, weights, (0, 2)), **CLOSE)


@pytest.mark.parametrize("fused", [True, False])
def test_measured_statistics_are_those_that_stay(fused: bool) -> None:
    """The end of a training: the plain mean over some batches, then frozen."""
    op = make_pair()[0 if fused else 1]
    batches = torch.randn(3, 2, 4, 6, 5).double()
    weights = torch.rand(6).double()
    left = iter(batches)
    batch_norm.measure(op, lambda: op(next(left), weights), 3)
    raw = torch.stack([op.ops["conv3x3"].conv(x.relu()).mean((0, 2, 3)) for x in batches])
    mean = norms(op)["conv3x3 bn"].running_mean
    torch.testing.assert_close(mean, raw.mean(0), **CLOSE)
    batch_norm.freeze(op)
    before = {key: value.clone() for key, value in op.state_dict().items()}
    trained, evaluated = op(batches[0], weights), op.eval()(batches[0], weights)
    assert op.ops["conv3x3"].conv.weight.requires_grad
    torch.testing.assert_close(trained, evaluated, rtol=0, atol=0)
    assert_same(op.state_dict().values(), before.values())
    assert isinstance(op, MixedOp) == fused
