"""What PyTorch's tools do with a mixed operation: pruning, copies, files, sharding, compilers,
autocast."""

import copy
import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from mixed_ops import CLOSE, assert_same, assert_same_state, make_pair, step
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from nasfast.models.mixed_op import MixedOp, PlainMixedOp
from nasfast.models.supernet import Supernet, SupernetConfig

CONVOLUTIONS = (
    *("conv3x3.conv", "dil3x3.conv", "def3x3.offset", "def3x3.deform"),
    *("sep3x3.depthwise1", "sep3x3.pointwise1", "sep3x3.depthwise2", "sep3x3.pointwise2"),
)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 4, 6, 5, dtype=torch.float64)


@pytest.fixture
def weights() -> Tensor:
    return torch.rand(6, dtype=torch.float64)


def convolutions(op: PlainMixedOp) -> list[nn.Module]:
    return [op.ops.get_submodule(name) for name in CONVOLUTIONS]


def assert_same_steps(fused: PlainMixedOp, plain: PlainMixedOp, x: Tensor, weights: Tensor) -> None:
    """Three steps of an optimizer: what hooks compute from parameters is that of the step."""
    pair = fused, plain
    optimizers = [torch.optim.SGD(op.parameters(), 0.1) for op in pair]
    for _ in range(3):
        losses = []
        for op, optimizer in zip(pair, optimizers, strict=True):
            optimizer.zero_grad()
            loss = op(x.detach(), weights.detach()).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss)
        torch.testing.assert_close(*losses, **CLOSE)
    assert_same(fused.parameters(), plain.parameters())
    assert_same_state(fused, plain)
    torch.testing.assert_close(fused.eval()(x, weights), plain.eval()(x, weights), **CLOSE)


def test_parameters_are_contiguous() -> None:
    for op in (MixedOp(6), Supernet(SupernetConfig(1, 2, 4), 3)):
        assert all(parameter.is_contiguous() for parameter in op.parameters())


def test_a_state_in_channels_last_loads(x: Tensor, weights: Tensor) -> None:
    """As checkpoints of earlier versions have it, those of optimizers too."""
    fused, plain = make_pair(affine=True)
    old = copy.deepcopy(fused).to(memory_format=torch.channels_last)
    assert not old.ops["conv3x3"].conv.weight.is_contiguous()
    for assign in (False, True):
        fused.load_state_dict(old.state_dict(), assign=assign)
        assert fused.ops["conv3x3"].conv.weight.is_contiguous() != assign
        plain.load_state_dict(fused.state_dict())
        assert_same(step(fused, x, weights), step(plain, x, weights))


def test_a_training_of_weights_in_channels_last_goes_on(x: Tensor, weights: Tensor) -> None:
    fused, _ = make_pair(affine=True)
    old = copy.deepcopy(fused).to(memory_format=torch.channels_last)
    pair = [(op, torch.optim.SGD(op.parameters(), 0.1, 0.9)) for op in (old, fused)]

    def train(op: PlainMixedOp, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        op(x, weights).square().mean().backward()
        optimizer.step()

    train(*pair[0])
    for ours, theirs in zip(pair[1], pair[0], strict=True):
        ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for each in pair:
        train(*each)
    assert_same_state(fused, old)
    moments = [list(optimizer.state.values()) for _, optimizer in pair]
    for ours, theirs in zip(*moments, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_pruning_of_one(name: str, x: Tensor, weights: Tensor) -> None:
    pair = make_pair()
    for op in pair:
        prune.l1_unstructured(op.ops.get_submodule(name), "weight", 0.5)
    assert_same_steps(*pair, x, weights)
    for op in pair:
        module = op.train().ops.get_submodule(name)
        prune.remove(module, "weight")
        assert (module.weight == 0).sum() == module.weight.numel() // 2
    assert_same(step(pair[0], x, weights), step(pair[1], x, weights))


def test_pruning_of_all_together(x: Tensor, weights: Tensor) -> None:
    pair = make_pair(affine=True)
    for op in pair:
        modules = [(module, "weight") for module in convolutions(op)]
        prune.global_unstructured(modules, prune.L1Unstructured, amount=0.3)
        prune.ln_structured(op.ops["conv3x3"].conv, "weight", 1, n=2, dim=0)
        prune.random_unstructured(op.ops["def3x3"].deform, "bias", 1)
        prune.l1_unstructured(op.ops["sep3x3"].bn1, "weight", 1)
    pair[1].load_state_dict(pair[0].state_dict())  # what chance pruned
    assert_same_steps(*pair, x, weights)


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("form", ["hook", "parametrization"])
def test_weight_normalisation(name: str, form: str, x: Tensor, weights: Tensor) -> None:
    pair = make_pair()
    for op in pair:
        module = op.ops.get_submodule(name)
        if form == "hook":
            nn.utils.weight_norm(module)
        else:
            parametrizations.weight_norm(module)
    assert_same_steps(*pair, x, weights)


def test_hooks_see_the_maps_of_branches(x: Tensor, weights: Tensor) -> None:
    """Of every kind, on every module; after they are gone the one pass runs again."""
    fused, plain = make_pair(affine=True)
    seen: dict[PlainMixedOp, list[tuple[str, Tensor]]] = {fused: [], plain: []}
    handles = []
    for op in (fused, plain):
        for name, module in op.ops.named_modules():

            def look(_: object, __: object, out: Any, name: str = name, op: Any = op) -> None:
                seen[op].append((name, out[0].detach()))

            if not list(module.children()):
                handles.append(module.register_forward_hook(look))
                handles.append(module.register_full_backward_hook(look))
    assert_same(step(fused, x, weights), step(plain, x, weights))
    assert [name for name, _ in seen[fused]] == [name for name, _ in seen[plain]]
    assert len(seen[fused]) == 2 * 13
    assert_same([out for _, out in seen[fused]], [out for _, out in seen[plain]])
    for handle in handles:
        handle.remove()
    assert_same(step(fused, x, weights), step(plain, x, weights))
    assert len(seen[fused]) == 2 * 13


def test_copies_and_files(tmp_path: Path, x: Tensor, weights: Tensor) -> None:
    fused, plain = make_pair(affine=True)
    step(fused, x, weights)
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    buffer.seek(0)
    state = tmp_path / "state.pt"
    torch.save(fused.state_dict(), state)
    from_state = MixedOp(4, affine=True).double()
    from_state.load_state_dict(torch.load(state, weights_only=True))
    others = copy.deepcopy(fused), torch.load(buffer, weights_only=False), from_state
    for other in others:
        assert all(parameter.is_contiguous() for parameter in other.parameters())
        assert_same_state(other, fused)
    plain.load_state_dict(fused.state_dict())
    expected = step(plain, x, weights)
    for other in others:
        assert_same(step(other, x, weights), expected)
        assert_same_state(other, plain)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.usefixtures("group")
def test_fully_shard(whole: bool, x: Tensor, weights: Tensor) -> None:
    """On the operation, which runs fused, or on each of its branches, which then run apart."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    fused, plain = make_pair(affine=True)
    mesh = init_device_mesh("cpu", (1,))
    for module in [] if whole else fused.ops.values():
        fully_shard(module, mesh=mesh)
    fully_shard(fused, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in fused.parameters())
    optimizers = [torch.optim.SGD(op.parameters(), 0.1) for op in (fused, plain)]
    for _ in range(2):
        outputs = []
        for op, optimizer in zip((fused, plain), optimizers, strict=True):
            optimizer.zero_grad()
            outputs.append(op(x, weights))
            outputs[-1].square().mean().backward()
            optimizer.step()
        torch.testing.assert_close(*outputs, **CLOSE)
    sharded = [parameter.full_tensor() for parameter in fused.parameters()]
    assert_same(sharded, plain.parameters())


PARTS = [None, (4,), (5,), (4, 5), (0,), (1,), (2,), (3,), (0, 5), (1, 4), (0, 1, 2, 3)]


def dtype_pair(channels: int, **options: object) -> tuple[PlainMixedOp, PlainMixedOp]:
    pair = make_pair(channels=channels, **options)
    return pair[0].float(), pair[1].float()


@pytest.mark.parametrize("channels", [4, 16])
@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_under_autocast(channels: int, norm: str, dtype: torch.dtype) -> None:
    """Of output and gradients, for states and running sums of any dtype; values are close."""
    fused, plain = dtype_pair(channels, norm=norm)
    weights = torch.rand(6)
    states = torch.float32, dtype
    for training in (True, False):
        for op in (fused, plain):
            op.train(training)
        for active, state, summed in itertools.product(PARTS, states, (None, *states)):
            x = torch.randn(2, channels, 6, 5).to(state)
            into = None if summed is None else torch.randn_like(x).to(summed)
            results = []
            for op in (fused, plain):
                leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
                with torch.autocast("cpu", dtype):
                    y = op(*leaves, active, into)
                found = [y]
                if active != (5,):
                    leaves += op.parameters()
                    loss = y.float().square().sum()
                    found += torch.autograd.grad(loss, leaves, materialize_grads=True)
                results.append(found)
            ours, reference = results
            context = active, state, summed, training
            assert [t.dtype for t in ours] == [t.dtype for t in reference], context
            close = (ours[0].float() - reference[0].float()).norm()
            assert close <= 0.03 * reference[0].float().norm(), context


def test_what_autocast_leaves_alone_is_exact() -> None:
    """The state itself, of "skip", and the running sum are not rounded."""
    fused, plain = dtype_pair(4)
    x, into, weights = torch.randn(2, 4, 6, 5), torch.randn(2, 4, 6, 5), torch.rand(6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fused(x, weights, (4, 5), into), plain(x, weights, (4, 5), into))


@pytest.mark.parametrize("way", ["compiled", "exported"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_under_autocast_in_graphs(way: str, training: bool, dtype: torch.dtype) -> None:
    torch.compiler.reset()
    fused, plain = dtype_pair(4, affine=True)
    for op in (fused, plain):
        op.train(training)
    x, weights = torch.randn(2, 4, 6, 5).to(dtype), torch.rand(6)

    class Whole(nn.Module):
        def __init__(self, op: PlainMixedOp) -> None:
            super().__init__()
            self.op = op

        def forward(self, x: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
            with torch.autocast("cpu", torch.bfloat16):
                return tuple(self.op(x, weights, active) for active in (None, (4,), (0, 1, 2, 3)))

    whole = Whole(fused).train(training)
    expected = Whole(plain).train(training)(x, weights)
    if way == "compiled":
        run = torch.compile(whole, fullgraph=True, backend="aot_eager")
    else:
        run = torch.export.export(whole, (x, weights)).module()
    for got, want in zip(run(x, weights), expected, strict=True):
        assert got.dtype == want.dtype
        assert (got.float() - want.float()).norm() <= 0.03 * want.float().norm()


@pytest.mark.parametrize("frozen", ["all", "one"])
def test_frozen_norms_in_graphs(frozen: str, x: Tensor, weights: Tensor) -> None:
    torch.compiler.reset()
    pair = make_pair(affine=True)
    for op in pair:
        for branch in op.ops.values() if frozen == "all" else [op.ops["conv3x3"]]:
            for module in branch.children():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
    compiled = torch.compile(pair[0], fullgraph=True, backend="aot_eager")
    out, expected = compiled(x, weights), pair[1](x, weights)
    torch.testing.assert_close(out, expected, **CLOSE)
    assert_same_state(*pair)


def test_an_exported_batch_is_of_any_size(x: Tensor, weights: Tensor) -> None:
    fused, plain = make_pair(affine=True)
    sizes = {"x": {0: torch.export.Dim("n")}, "weights": None}
    program = torch.export.export(fused.eval(), (x, weights), dynamic_shapes=sizes)
    for count in (2, 5):
        other = torch.randn(count, 4, 6, 5).double()
        torch.testing.assert_close(
            program.module()(other, weights), plain.eval()(other, weights), **CLOSE
        )
