"""feature_gather: its samples for the suite, and what is its own."""

from __future__ import annotations

import importlib
import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from op_harness import Op, native
from op_harness import Sample as Base
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from nasfast.ops import (
    Field,
    PreparedGather,
    _native,
    feature_gather,
    feature_gather_reference,
    gather_fields,
)

module = importlib.import_module("nasfast.ops.feature_gather")
OP: Any = torch.ops.nasfast.feature_gather.default
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
PAIRS = [*((dtype, dtype) for dtype in (*FLOATS, torch.uint8)), *itertools.permutations(FLOATS, 2)]


@dataclass(frozen=True)
class Sample(Base):
    """An array of blocks, and which of them a call gathers."""

    op = "feature_gather"

    shape: tuple[int, ...]
    indices: tuple[int, ...] = (3, 0, 3, 4)
    samples: int = 5
    apart: int = 0  # bytes between the blocks

    @property
    def dtypes(self) -> tuple[Any, ...]:
        """As stored, and of the output."""
        return (*PAIRS,)

    def field(self, dtype: torch.dtype) -> Field:
        return Field(128, self.shape, dtype)

    def data(self, field: Field) -> Tensor:
        """Blocks that hold numbers where the field is, and noise elsewhere."""
        size = -(-(field.offset + field.nbytes) // 16) * 16 + 32
        memory = torch.randint(0, 256, (self.samples, size + self.apart), dtype=torch.uint8)
        data = memory[:, :size]
        write(data, field.offset, numbers(self.samples, field))
        return data

    def check(self, dtype: tuple[torch.dtype, torch.dtype]) -> None:
        stored, to = dtype
        field = self.field(stored)
        data, indices = self.data(field), torch.tensor(self.indices, dtype=torch.int64)
        wanted = expected(data, field, indices, to)
        for function, extra in (
            (feature_gather, {"threads": 1}),
            (feature_gather, {"threads": 2}),
            (feature_gather_reference, {}),
        ):
            memory = poisoned(len(indices) + 2, self.shape, to)
            before, out, after = memory[:1].clone(), memory[1:-1], memory[-1:].clone()
            got = function(data, indices, *field, out, **extra)
            assert got is out
            assert torch.equal(out, wanted)
            for edge, was in ((memory[:1], before), (memory[-1:], after)):
                assert torch.equal(edge.view(torch.uint8), was.view(torch.uint8))

    def call_changed(self, changes: dict[str, Any], reference: bool) -> None:
        function = feature_gather_reference if reference else feature_gather
        function(**arguments(**changes))


def numbers(samples: int, field: Field) -> Tensor:
    if field.dtype.is_floating_point:
        return (torch.randn(samples, *field.shape) * 10).to(field.dtype)
    return torch.randint(0, 256, (samples, *field.shape), dtype=field.dtype)


def write(data: Tensor, offset: int, values: Tensor) -> None:
    raw = values.reshape(len(values), -1).view(torch.uint8)
    data[:, offset : offset + raw.shape[1]] = raw


SAMPLES = [
    Sample("map", (3, 5, 24)),
    Sample("labels", (7, 9)),
    Sample("one-channel", (4, 3, 1)),
    Sample("odd-channels", (5, 3, 19)),
    Sample("more-than-a-unit", (2, 3, 100)),
    Sample("apart", (3, 2, 8), apart=48),
    Sample("vector", (11,)),
    Sample("batch-0", (3, 2, 8), indices=()),
    Sample("batch-33", (3, 2, 8), indices=tuple(i * 7 % 5 for i in range(33))),
    Sample("one-sample", (3, 2, 8), indices=(0,), samples=1),
    Sample("empty-map", (3, 0, 8)),
]
LARGE = Sample("large", (157, 61, 37), indices=(1, 0, 1, 1), samples=2)  # written past the caches


def expected(data: Tensor, field: Field, indices: Tensor, to: torch.dtype) -> Tensor:
    """The values of the samples, by the definition."""
    rows = []
    for index in indices.tolist():
        block = data[index].contiguous()
        values = block[field.offset : field.offset + field.nbytes].clone().view(field.dtype)
        rows.append(values.view(field.shape).to(to))
    return torch.stack(rows) if rows else torch.empty(0, *field.shape, dtype=to)


def poisoned(rows: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory that is neither 0 nor a number, amid memory that nothing may touch."""
    return torch.full((rows, *shape), torch.nan if dtype.is_floating_point else 99, dtype=dtype)


def every_half(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(1, -1)


def floats_between_halves(dtype: torch.dtype) -> Tensor:
    """Every half value, the middle to the next one, and what lies just beside the middle."""
    here = every_half(dtype).float()
    bits = here.view(torch.int32)
    step = 2**13 if dtype == torch.float16 else 2**16
    near = [bits, bits + step // 2 - 1, bits + step // 2, bits + step // 2 + 1]
    subnormal = torch.arange(0, 2**14) * 2.0**-26 * (1 + 2.0**-20)
    extreme = torch.tensor([65519.9, 65520.0, 3.4e38, 1e-45, -1e-45, 6e-8, torch.inf])
    rest = torch.cat([subnormal, -subnormal, extreme, -extreme])
    return torch.cat([torch.cat(near, 1).view(torch.float32), rest[None]], 1)


@dataclass(frozen=True)
class EveryValue(Sample):
    """All half values, and floats where rounding is decided; infinities and NaN too."""

    least: int = 0  # values

    @property
    def dtypes(self) -> tuple[Any, ...]:
        return (*itertools.permutations(FLOATS, 2),)

    def check(self, dtype: tuple[torch.dtype, torch.dtype]) -> None:
        stored, to = dtype
        source = floats_between_halves(to) if stored == torch.float32 else every_half(stored)
        source = source.repeat(1, max(1, -(-self.least // source.numel())))
        size = source.numel() // 16 * 16
        source = source[:, :size].contiguous()
        out = torch.empty(1, size, dtype=to)
        feature_gather(source.view(torch.uint8), torch.tensor([0]), 0, (size,), stored, out)
        wanted = source.to(to)
        assert torch.equal(out.isnan(), wanted.isnan())
        real = ~wanted.isnan()
        raw = {2: torch.int16, 4: torch.int32}[to.itemsize]
        assert torch.equal(out[real].view(raw), wanted[real].view(raw))


def fields_of(sample: Sample) -> tuple[list[Field], Tensor]:
    """A layout of many fields, more than fit into one call."""
    fields, end = [], 0
    for number in range(19):
        dtype = FLOATS[number % 3]
        fields.append(Field(end, (number + 1, 3), dtype))
        end += -(-fields[-1].nbytes // 16) * 16
    data = torch.zeros(sample.samples, end, dtype=torch.uint8)
    for field in fields:
        write(data, field.offset, numbers(sample.samples, field))
    return fields, data


def test_many_fields_in_one_call() -> None:
    fields, data = fields_of(SAMPLES[0])
    indices = torch.tensor([2, 4, 2])
    outs = [poisoned(3, field.shape, torch.float32) for field in fields]
    gather_fields(data, indices, fields, outs)
    for field, out in zip(fields, outs, strict=True):
        assert torch.equal(out, expected(data, field, indices, torch.float32))


@pytest.mark.parametrize("way", [1, 2, 3])
@pytest.mark.parametrize("dtype", PAIRS)
def test_every_way_of_writing(
    way: int, dtype: tuple[torch.dtype, torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which one a batch gets depends on the processor."""
    monkeypatch.setattr(module, "_WAY", way)
    for sample in (*SAMPLES, Sample("pages", (57, 61, 7), indices=(1, 0, 1), samples=2)):
        sample.check(dtype)


def test_the_first_large_batch_chooses_a_way() -> None:
    """It is written several times."""
    LARGE.check((torch.float16, torch.float32))
    LARGE.check((torch.float16, torch.float32))


def fixed(tensor: Tensor) -> Tensor:
    """The same in memory of NumPy."""
    return torch.from_numpy(tensor.view(torch.uint8).numpy().copy()).view(tensor.dtype)


@pytest.mark.parametrize("held", [True, False])
def test_prepared_gather(held: bool) -> None:
    """Also where the memory may be moved between two calls."""
    fields, data = fields_of(SAMPLES[0])
    outs = [poisoned(3, field.shape, field.dtype) for field in fields]
    if held:
        data, outs = fixed(data), [fixed(out) for out in outs]
    gather = PreparedGather(data, fields, outs, 3)
    for indices in (torch.tensor([2, 0, 2]), torch.tensor([1, 4, 3])):
        version = outs[0]._version
        gather(indices)
        for field, out in zip(fields, outs, strict=True):
            assert torch.equal(out, expected(data, field, indices, field.dtype))
        assert outs[0]._version > version
    wrong = [out[:2] for out in outs]
    with pytest.raises(ValueError, match=r"^feature_gather: expected out as"):
        PreparedGather(data, fields, wrong, 3)(torch.tensor([2, 0, 2]))
    for indices in (torch.tensor([2, 0]), torch.tensor([2.0, 0, 2])):
        with pytest.raises(ValueError, match=r"^feature_gather: "):
            gather(indices)


def test_rows_of_other_data_are_left_alone() -> None:
    """Two calls put a batch together from two parts of the samples."""
    fields, data = fields_of(SAMPLES[0])
    indices = torch.tensor([4, 0, 1, 3, 2])
    outs = [poisoned(5, field.shape, field.dtype) for field in fields]
    gather_fields(data[:2], indices, fields, outs)
    for field, out in zip(fields, outs, strict=True):
        assert out[[0, 3, 4]].isnan().all()
        assert torch.equal(out[[1, 2]], expected(data, field, indices[[1, 2]], field.dtype))
    gather_fields(data[2:], indices - 2, fields, outs)
    for field, out in zip(fields, outs, strict=True):
        assert torch.equal(out, expected(data, field, indices, field.dtype))


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference does the same."""
    monkeypatch.setitem(_native.KERNELS, "feature_gather", set())
    test_rows_of_other_data_are_left_alone()


def test_overwritten_memory_is_seen_by_autograd() -> None:
    sample, weight = SAMPLES[0], torch.ones((), requires_grad=True)
    field = sample.field(torch.float32)
    data, indices = sample.data(field), torch.tensor(sample.indices)
    out = torch.empty(4, *sample.shape)
    loss = (feature_gather(data, indices, *field, out) * weight).sum()
    feature_gather(data, indices, *field, out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_tensors() -> None:
    with torch.inference_mode():
        SAMPLES[0].check((torch.float16, torch.float32))


@pytest.mark.parametrize("sample", [SAMPLES[0], SAMPLES[7]], ids=lambda sample: sample.id)
@pytest.mark.parametrize("stored", [torch.float16, torch.uint8], ids=str)
def test_opcheck(sample: Sample, stored: torch.dtype) -> None:
    field = sample.field(stored)
    data, indices = sample.data(field), torch.tensor(sample.indices, dtype=torch.int64)
    out = torch.zeros(
        len(indices), *sample.shape, dtype=stored if stored == torch.uint8 else torch.float32
    )
    torch.library.opcheck(OP, (data, indices, *field, out, 1))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic: bool) -> None:
    torch.compiler.reset()
    sample = SAMPLES[0]
    field = sample.field(torch.float16)
    data = sample.data(field)

    def step(indices: Tensor) -> Tensor:
        out = torch.empty(indices.shape[0], *sample.shape)
        return feature_gather(data, indices, *field, out) * 2

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for chosen in ([0, 3], [1, 2, 4]):
        indices = torch.tensor(chosen)
        assert torch.equal(compiled(indices), expected(data, field, indices, torch.float32) * 2)


def arguments(**changes: Any) -> dict[str, Any]:
    """A right call, but for the changes."""
    return {
        "data": torch.zeros(3, 64, dtype=torch.uint8),
        "indices": torch.tensor([2, 0]),
        "offset": 16,
        "shape": (2, 4),
        "dtype": torch.float16,
        "out": torch.zeros(2, 2, 4),
    } | changes


ERRORS = [
    (
        {"data": torch.zeros(3, 64)},
        "data as uint8 [samples, bytes] with contiguous rows, got torch.float32 [3, 64] with "
        "strides (64, 1); view the blocks as bytes",
    ),
    (
        {"data": torch.zeros(3, 128, dtype=torch.uint8)[:, ::2]},
        "data as uint8 [samples, bytes] with contiguous rows, got torch.uint8 [3, 64] with "
        "strides (128, 2); view the blocks as bytes",
    ),
    (
        {"data": torch.zeros(3, 72, dtype=torch.uint8)},
        "data with rows a multiple of 16 bytes apart, got a stride of 72; pad the blocks",
    ),
    (
        {"indices": torch.tensor([2, 0], dtype=torch.int32)},
        "indices as contiguous int64 [N], got torch.int32 [2] with strides (1,); convert them",
    ),
    (
        {"indices": torch.tensor([[2, 0]])},
        "indices as contiguous int64 [N], got torch.int64 [1, 2] with strides (2, 1); convert them",
    ),
    (
        {"indices": torch.tensor([2, 3])},
        "indices of samples from 0 to 2, got 3; draw them from what data holds",
    ),
    (
        {"indices": torch.tensor([-1, 3])},
        "indices of samples from 0 to 2, got -1; draw them from what data holds",
    ),
    (
        {"dtype": torch.int64},
        "dtype to be one of torch.float32, torch.bfloat16, torch.float16, torch.uint8, "
        "got torch.int64; store it as one of these",
    ),
    (
        {"offset": 8},
        "offset to be a multiple of 16 from 0 to 48, to leave 16 bytes in a block of 64, got 8; "
        "read it from the layout of the blocks",
    ),
    (
        {"offset": 64},
        "offset to be a multiple of 16 from 0 to 48, to leave 16 bytes in a block of 64, got 64; "
        "read it from the layout of the blocks",
    ),
    ({"dtype": torch.uint8}, "out of torch.uint8, got torch.float32; allocate it so"),
    (
        {"out": torch.zeros(2, 2, 4, dtype=torch.float64)},
        "out of torch.float16 or a float of at most 32 bits, got torch.float64; allocate it so",
    ),
    (
        {"out": torch.zeros(3, 2, 4)},
        "out as contiguous [2, 2, 4], got [3, 2, 4] with strides (8, 4, 1); allocate it so, "
        "channels last",
    ),
    (
        {"out": torch.zeros(2, 4, 2).transpose(1, 2)},
        "out as contiguous [2, 2, 4], got [2, 2, 4] with strides (8, 1, 2); allocate it so, "
        "channels last",
    ),
    (
        {"out": torch.zeros(2, 2, 4, requires_grad=True)},
        "out without gradient, got requires_grad; pass out.detach()",
    ),
    ({"out": torch.zeros(2, 2, 4, device="meta")}, "out on cpu, as data, got meta; move it"),
]


@st.composite
def drawn(draw: st.DrawFn) -> tuple[Sample, tuple[torch.dtype, torch.dtype]]:
    shape = draw(st.lists(st.integers(1, 70), min_size=1, max_size=3))
    samples = draw(st.integers(1, 4))
    chosen = draw(st.lists(st.integers(0, samples - 1), max_size=5))
    apart = draw(st.sampled_from([0, 16, 64]))
    sample = Sample("", tuple(shape), tuple(chosen), samples, apart)
    return sample, draw(st.sampled_from(PAIRS))


FEATURE_GATHER = Op(
    [
        *(*SAMPLES, LARGE, EveryValue("every-value", ())),
        EveryValue("every-value-large", (), least=4 << 20),
    ],
    few=[],
    errors={str(number): error for number, error in enumerate(ERRORS)},
    drawn=drawn(),
    examples=60,
)


@native
def test_address() -> None:
    """The reference reads any."""
    data = torch.zeros(3, 80, dtype=torch.uint8)[:, 8:]
    with pytest.raises(ValueError) as error:
        feature_gather(**arguments(data=data))
    assert str(error.value) == (
        "feature_gather: expected data at a multiple of 16 bytes, got an address 8 beyond one; "
        "copy it"
    )


def test_no_error_without_changes() -> None:
    feature_gather(**arguments())


def test_fake_checks_too() -> None:
    with FakeTensorMode(), pytest.raises(ValueError, match="expected out as contiguous"):
        feature_gather(
            **arguments(
                out=torch.zeros(3, 2, 4),
                indices=torch.zeros(2).long(),
                data=torch.zeros(3, 64, dtype=torch.uint8),
            )
        )


@pytest.mark.cuda
@pytest.mark.parametrize("sample", [*SAMPLES, LARGE], ids=lambda sample: sample.id)
@pytest.mark.parametrize(("stored", "to"), PAIRS, ids=str)
def test_cuda(
    sample: Sample, stored: torch.dtype, to: torch.dtype, cuda_kernels: list[str]
) -> None:
    field = sample.field(stored)
    data, indices = sample.data(field), torch.tensor(sample.indices, dtype=torch.int64)
    out = poisoned(len(indices), sample.shape, to).cuda()
    there = torch.empty_strided(data.shape, data.stride(), dtype=torch.uint8, device="cuda")
    feature_gather(there.copy_(data), indices.cuda(), *field, out)
    assert torch.equal(out.cpu(), expected(data, field, indices, to))
    assert cuda_kernels == ["feature_gather_forward"]


@pytest.mark.cuda
def test_cuda_graph(cuda_kernels: list[str]) -> None:
    """A replay reads the indices that are there then."""
    field = LARGE.field(torch.float16)
    host = LARGE.data(field)
    data, indices = host.cuda(), torch.tensor([0, 1], device="cuda")
    out = torch.empty(2, *LARGE.shape, device="cuda")
    feature_gather(data, indices, *field, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        feature_gather(data, indices, *field, out)
    for chosen in ([1, 0], [1, 1]):
        indices.copy_(torch.tensor(chosen))
        graph.replay()
        wanted = expected(host, field, torch.tensor(chosen), torch.float32)
        assert torch.equal(out.cpu(), wanted)
    assert cuda_kernels == ["feature_gather_forward"] * 2


@pytest.mark.cuda
def test_cuda_leaves_rows_of_other_samples_alone(cuda_kernels: list[str]) -> None:
    field = SAMPLES[0].field(torch.float32)
    data = SAMPLES[0].data(field)
    indices = torch.tensor([-1, 2, 5])
    out = poisoned(3, SAMPLES[0].shape, torch.float32).cuda()
    feature_gather(data.cuda(), indices.cuda(), *field, out)
    assert out[[0, 2]].isnan().all()
    assert torch.equal(out[1:2].cpu(), expected(data, field, indices[1:2], torch.float32))
    assert cuda_kernels == ["feature_gather_forward"]
