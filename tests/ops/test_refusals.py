"""Arguments of wrong kinds, and of sizes that no kernel can compute with, are refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_harness import native
from torch import Tensor

from nasfast import ops
from nasfast.ops import Branches

IMAGE = torch.randn(1, 2, 5, 4)
RIGHT: dict[str, dict[str, Any]] = {
    "batch_norm_relu": {"input": IMAGE, "weight": torch.ones(2), "bias": torch.ones(2)},
    "deform_conv2d": {
        "input": IMAGE,
        "offset": torch.zeros(1, 18, 3, 2),
        "weight": torch.ones(3, 2, 3, 3),
        "bias": torch.ones(3),
        "mask": torch.ones(1, 9, 3, 2),
    },
    "depthwise_conv2d": {"input": IMAGE, "weight": torch.ones(2, 1, 3, 3)},
    "feature_gather": {
        "data": torch.zeros(3, 64, dtype=torch.uint8),
        "indices": torch.tensor([2, 0]),
        "offset": 16,
        "shape": (2, 4),
        "dtype": torch.float16,
        "out": torch.zeros(2, 2, 4),
    },
    "mixed_op": {
        "input": IMAGE,
        "factors": torch.ones(5),
        "branches": Branches(conv=torch.ones(2, 2, 3, 3)),
        "scale": torch.ones(5, 2),
        "shift": torch.ones(5, 2),
    },
    "sep_conv": {
        "input": IMAGE,
        "depthwise": torch.ones(2, 1, 3, 3),
        "pointwise": torch.ones(3, 2, 1, 1),
        "weight": torch.ones(3),
        "bias": torch.ones(3),
    },
}
OPTIONAL = (
    "bias of deform_conv2d",
    "mask of deform_conv2d",
    "scale of mixed_op",
    "shift of mixed_op",
)
TENSORS = [
    (op, name)
    for op, arguments in RIGHT.items()
    for name, value in arguments.items()
    if isinstance(value, Tensor)
]
OTHERS: list[tuple[Any, str]] = [
    (None, "NoneType"),
    ([[1.0]], "list"),
    (1.5, "float"),
    (IMAGE.numpy(), "ndarray"),
]


def both(op: str) -> list[Callable[..., Any]]:
    return [getattr(ops, op), getattr(ops, f"{op}_reference")]


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_no_tensor(op: str, name: str) -> None:
    """An argument is named, whatever came in place of the tensor."""
    optional = f"{name} of {op}" in OPTIONAL
    for function in both(op):
        for value, kind in OTHERS:
            if value is None and optional:
                continue
            with pytest.raises(TypeError) as error:
                function(**RIGHT[op] | {name: value})
            tensor = "a tensor or None" if optional else "a tensor"
            expected = f"{op}: expected {name} as {tensor}, got {kind}; pass a torch.Tensor"
            assert str(error.value) == expected


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_no_dense_tensor(op: str, name: str) -> None:
    for function in both(op):
        with pytest.raises(TypeError) as error:
            function(**RIGHT[op] | {name: RIGHT[op][name].to_sparse()})
        assert str(error.value) == (
            f"{op}: expected {name} as a dense tensor, got torch.sparse_coo; convert it"
        )


@pytest.mark.parametrize(
    ("op", "changes", "message"),
    [
        ("batch_norm_relu", {"eps": "1"}, "eps as a number, got str; pass a float"),
        ("batch_norm_relu", {"eps": None}, "eps as a number, got NoneType; pass a float"),
        ("mixed_op", {"eps": [1]}, "eps as a number, got list; pass a float"),
        ("mixed_op", {"batch_norm": "no"}, "batch_norm as a bool, got str; pass True or False"),
        (
            "mixed_op",
            {"branches": None},
            "branches as Branches, got NoneType; pass ops.Branches(..)",
        ),
        (
            "mixed_op",
            {"branches": Branches(conv=[1.0])},  # type: ignore[arg-type]
            "branches.conv as a tensor or None, got list; pass a torch.Tensor",
        ),
        ("feature_gather", {"offset": 1.5}, "offset as an integer, got float; pass an int"),
        (
            "feature_gather",
            {"shape": "ab"},
            "shape as a sequence of integers, got str; pass a tuple",
        ),
        ("feature_gather", {"shape": (2, None)}, "shape as an integer, got NoneType; pass an int"),
        ("feature_gather", {"dtype": "x"}, "dtype as a torch.dtype, got str; pass torch.float16"),
    ],
)
def test_no_number(op: str, changes: dict[str, Any], message: str) -> None:
    for function in both(op):
        with pytest.raises(TypeError) as error:
            function(**RIGHT[op] | changes)
        assert str(error.value) == f"{op}: expected {message}"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"fields": None}, TypeError, "fields as a list, got NoneType; pass a list"),
        ({"fields": []}, ValueError, "outs for 0 fields, got 1; pass one for each field"),
        (
            {"fields": [(0, (2, 4), torch.float16)]},
            TypeError,
            "fields as a list of Field, got tuple; pass ops.Field(..)",
        ),
        (
            {"fields": [ops.Field({}, (2, 4), torch.float16)]},  # type: ignore[arg-type]
            TypeError,
            "offset as an integer, got dict; pass an int",
        ),
        ({"outs": [None]}, TypeError, "out as a tensor, got NoneType; pass a torch.Tensor"),
        ({"threads": 0}, ValueError, "threads of at least 1, got 0; change it"),
        (
            {"outs": [torch._efficientzerotensor((2, 2, 4))]},
            ValueError,
            "out as plain memory, got a lazy or nested tensor; copy out",
        ),
        (
            {"indices": torch._neg_view(torch.tensor([-2, 0]))},
            ValueError,
            "indices as plain memory, got a lazy or nested tensor; copy indices",
        ),
    ],
)
def test_gather_fields(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    right = RIGHT["feature_gather"]
    field = ops.Field(right["offset"], right["shape"], right["dtype"])
    arguments = {"data": right["data"], "indices": right["indices"], "outs": [right["out"]]}
    ops.gather_fields(**arguments, fields=[field])
    with pytest.raises(error) as caught:
        ops.gather_fields(**arguments | {"fields": [field]} | changes)
    assert str(caught.value) == f"feature_gather: expected {message}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 0}, "in_channels from 1 to 2**31 - 1, got 0; change it"),
        ({"out_channels": 2**61}, f"out_channels from 1 to 2**31 - 1, got {2**61}; change it"),
        ({"kernel_size": 0}, "kernel_size from 1 to 2**31 - 1, got (0, 0); change it"),
        ({"stride": 0}, "stride of at least 1, got (0, 0); change it"),
    ],
)
def test_module(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        ops.DeformConv2d(**{"in_channels": 2, "out_channels": 3, "kernel_size": 3} | changes)
    assert str(error.value) == f"deform_conv2d: expected {message}"


# ---- registered ops, whose dispatcher takes None for a tensor


def mixed_arguments(**changes: Any) -> list[Any]:
    """Of mixed_op_backward without branches but conv."""
    named: dict[str, Any] = {"grad": IMAGE, "input": IMAGE, "factors": torch.ones(5)}
    named |= dict.fromkeys(Branches._fields) | {"conv": torch.ones(2, 2, 3, 3)}
    named |= {"scale": None, "shift": None, "statistics": torch.ones(5, 2, 2)}
    named |= {"raw": torch.zeros(5, 2, 5, 4), "offset": torch.zeros(0)}
    return [*(named | changes).values(), True, 1e-5, [True] * 14]


@native
def test_what_crashed() -> None:
    """Null and short pointers, from calls that look harmless."""
    conv, vector = Branches(conv=torch.ones(2, 2, 3, 3)), torch.ones(2)
    expected = "mixed_op: expected factors as a tensor, got NoneType; pass a torch.Tensor"
    with pytest.raises(TypeError) as error:
        ops.mixed_op(IMAGE, None, conv, batch_norm=False)  # type: ignore[arg-type]
    assert str(error.value) == expected
    with pytest.raises(TypeError) as error:
        torch.ops.nasfast.mixed_op(IMAGE, None, *conv, None, None, False, 1e-5, False)
    assert str(error.value) == expected

    backward: Any = torch.ops.nasfast.batch_norm_relu_backward
    for statistics, message in (
        (torch.empty(0), "of shape (2, 2), got (0,); it has one value per channel of input"),
        (torch.empty(2, 1), "of shape (2, 2), got (2, 1); it has one value per channel of input"),
        (
            torch.empty(2, 2, dtype=torch.float64),
            "of torch.float32 beside an input of torch.float32, got torch.float64; convert it with "
            "statistics.to(torch.float32)",
        ),
    ):
        with pytest.raises(ValueError) as refused:
            backward(IMAGE, IMAGE, vector, vector, statistics, 1e-5)
        assert str(refused.value) == f"batch_norm_relu: expected statistics {message}"

    backward = torch.ops.nasfast.mixed_op_backward
    for offset in (torch.zeros(()), torch.zeros(3)):  # nothing reads it
        found = backward(*mixed_arguments(offset=offset))
        torch.testing.assert_close(found, backward(*mixed_arguments()))
    remedy = "pass what the forward pass returned"
    for changes, message in (
        ({"statistics": torch.empty(0)}, "statistics of shape (5, 2, 2), got (0,)"),
        ({"raw": torch.zeros(5, 2, 5, 3)}, "raw of shape (5, 2, 5, 4), got (5, 2, 5, 3)"),
        (
            {"raw": torch.zeros(5, 2, 5, 4).double()},
            "raw of torch.float32, got torch.float64",
        ),
        (
            {
                "deform": torch.ones(2, 2, 3, 3),
                "deform_bias": torch.ones(2),
                "offset_weight": torch.ones(27, 2, 3, 3),
                "offset_bias": torch.ones(27),
            },
            "offset of shape (1, 27, 5, 4), got (0,)",
        ),
    ):
        with pytest.raises(ValueError) as refused:
            backward(*mixed_arguments(**changes))
        assert str(refused.value) == f"mixed_op: expected {message}; {remedy}"


@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        ("batch_norm_relu", (IMAGE, None, torch.ones(2), 1e-5), "weight"),
        (
            "batch_norm_relu_backward",
            (None, IMAGE, torch.ones(2), torch.ones(2), torch.ones(2, 2), 1e-5),
            "grad",
        ),
        ("deform_conv2d", (IMAGE, None, IMAGE, None, [1, 1], [0, 0], [1, 1], None), "offset"),
        (
            "deform_conv2d_backward",
            (None, IMAGE, IMAGE, IMAGE, None, [1, 1], [0, 0], [1, 1], [True] * 5),
            "grad",
        ),
        ("depthwise_conv2d", (IMAGE, None, [0, 0], [1, 1]), "weight"),
        ("depthwise_conv2d_backward", (None, IMAGE, IMAGE, [0, 0], [1, 1], [True] * 2), "grad"),
        (
            "feature_gather",
            (torch.zeros(3, 64, dtype=torch.uint8), None, 0, [4], torch.uint8, IMAGE, 1),
            "indices",
        ),
        ("mixed_op_backward", mixed_arguments(grad=None), "grad"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_none_for_a_tensor(op: str, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(TypeError) as error:
        getattr(torch.ops.nasfast, op)(*arguments)
    assert str(error.value) == (
        f"{op.removesuffix('_backward')}: expected {message} as a tensor, got NoneType; "
        "pass a torch.Tensor"
    )


@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        (
            "depthwise_conv2d",
            (IMAGE, torch.ones(2, 1, 3, 3), [0, 0, 0], [1, 1]),
            "padding as two integers (vertical, horizontal), got [0, 0, 0]; pass two",
        ),
        (
            "depthwise_conv2d_backward",
            (IMAGE, IMAGE, torch.ones(2, 1, 1, 1), [0, 0], [1, 1], [True]),
            "wanted of 2 flags, got 1; pass one for each gradient",
        ),
    ],
)
def test_lists_of_a_registered_op(op: str, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError) as error:
        getattr(torch.ops.nasfast, op)(*arguments)
    assert str(error.value) == f"depthwise_conv2d: expected {message}"


# ---- integers

HUGE = [2**61, 2**63 - 1]


@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
@pytest.mark.parametrize("value", [2**63, 10**30, -(2**63), -(10**30)])
def test_integers_of_more_than_64_bits(name: str, value: int) -> None:
    least = {"stride": 1, "padding": 0, "dilation": 1}[name]
    bound = f"of at least {least}" if value < 0 else "below 2**47" if name == "padding" else ""
    bound = bound or "below 2**63"
    for op in ("deform_conv2d", "depthwise_conv2d"):
        if (op, name) == ("depthwise_conv2d", "stride"):
            continue
        for function in both(op):
            with pytest.raises(ValueError) as error:
                function(**RIGHT[op] | {name: value})
            expected = f"{op}: expected {name} {bound}, got {(value, value)}; change it"
            assert str(error.value) == expected


@pytest.mark.parametrize("value", [2**47, *HUGE])
def test_padding_beyond_memory(value: int) -> None:
    """A stride or a dilation that makes the output small does not make it right."""
    for op, changes in (
        ("deform_conv2d", {"padding": value, "stride": 2**61}),
        ("depthwise_conv2d", {"padding": value, "dilation": value}),
    ):
        for function in both(op):
            with pytest.raises(ValueError) as error:
                function(**RIGHT[op] | changes)
            expected = f"padding below 2**47, got {(value, value)}; change it"
            assert str(error.value) == f"{op}: expected {expected}"


@native
@pytest.mark.parametrize("batch", [0, 1])
def test_output_beyond_memory(batch: int) -> None:
    """PyTorch cannot describe it, though of an empty batch it has no elements."""
    right = RIGHT["depthwise_conv2d"]
    with pytest.raises(ValueError) as error:
        ops.depthwise_conv2d(IMAGE[:batch], right["weight"], 2**40)
    sides = [2**41 + 3, 2**41 + 2]
    assert str(error.value) == (
        "depthwise_conv2d: expected padding that gives fewer than 2**47 outputs, got "
        f"{[batch, 2, *sides]}; change it"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dilation", [2**20, 2**40, 2**47 - 1])
def test_depthwise_only_the_middle_meets_the_image(dilation: int, dtype: torch.dtype) -> None:
    """With a padding as large the output has the size of the image."""
    image, weight = IMAGE.to(dtype).requires_grad_(), torch.randn(2, 1, 3, 3).to(dtype)
    weight.requires_grad_()
    output = ops.depthwise_conv2d(image, weight, dilation, dilation)
    middle = weight[:, :, 1, 1].view(1, 2, 1, 1)
    torch.testing.assert_close(output, image * middle)
    found = torch.autograd.grad(output.sum(), [image, weight])
    expected = torch.autograd.grad((image * middle).sum(), [image, weight])
    torch.testing.assert_close(found, expected)
    assert found[1].count_nonzero() == 2


@pytest.mark.parametrize("value", HUGE)
def test_dilation_of_one_tap(value: int) -> None:
    """It means nothing, so it may be any; and so may the stride of an output of one pixel."""
    for kernel in ((1, 1), (1, 3), (3, 1)):
        dilation = tuple(value if taps == 1 else 1 for taps in kernel)
        weight = torch.randn(2, 1, *kernel, requires_grad=True)
        image = IMAGE.clone().requires_grad_()
        results = []
        for function, setting in (
            (ops.depthwise_conv2d, dilation),
            (ops.depthwise_conv2d, (1, 1)),
            (ops.depthwise_conv2d_reference, (1, 1)),
        ):
            output = function(image, weight, 1, setting)
            results.append([output, *torch.autograd.grad(output.sum(), [image, weight])])
        torch.testing.assert_close(results[0], results[2])
        torch.testing.assert_close(results[1], results[2])
    image = IMAGE.clone().requires_grad_()
    offset = torch.full((1, 2, 1, 1), 0.25, requires_grad=True)
    weight = torch.randn(3, 2, 1, 1, requires_grad=True)
    results = []
    for function, setting in (
        (ops.deform_conv2d, value),
        (ops.deform_conv2d_reference, value),
        (ops.deform_conv2d_reference, 9),
    ):
        output = function(image, offset, weight, stride=setting, dilation=setting)
        results.append([output, *torch.autograd.grad(output.sum(), [image, offset, weight])])
    torch.testing.assert_close(results[0], results[2])
    torch.testing.assert_close(results[1], results[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_deform_positions_are_integers_first(dtype: torch.dtype) -> None:
    """The middle output lies on pixel (2, 1), 2^40 pixels behind the corner of the padding.

    Its position was 0 where stride and padding were rounded to float32 before the difference.
    """
    padding = 2**40 + 8
    image, offset = torch.randn(1, 1, 5, 4, dtype=dtype), torch.zeros(1, 2, 3, 3, dtype=dtype)
    weight = torch.ones(1, 1, 1, 1, dtype=dtype)
    for function in both("deform_conv2d"):
        output = function(image, offset, weight, None, (padding + 2, padding + 1), padding)
        assert output.shape == (1, 1, 3, 3)
        assert output[0, 0, 1, 1] == image[0, 0, 2, 1]
        assert output.count_nonzero() == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 0.0])
def test_eps(value: float) -> None:
    """That of the mixed operation may be 0; without a norm there is none."""
    for function in both("batch_norm_relu"):
        with pytest.raises(ValueError) as error:
            function(**RIGHT["batch_norm_relu"], eps=value)
        assert str(error.value) == f"batch_norm_relu: expected eps above 0, got {value}; change it"
    for function in both("mixed_op"):
        function(**RIGHT["mixed_op"], eps=value, batch_norm=False)
        if value == 0:
            continue
        with pytest.raises(ValueError) as error:
            function(**RIGHT["mixed_op"], eps=value)
        assert str(error.value) == f"mixed_op: expected eps of at least 0, got {value}; change it"


def test_statistics_of_an_empty_batch() -> None:
    for function in both("mixed_op"):
        _, statistics = function(**RIGHT["mixed_op"] | {"input": IMAGE[:0]})
        assert statistics.eq(0).all()


def test_int8_is_not_stored() -> None:
    """Neither op nor reference, in any combination with floats."""
    for stored, to in (
        (torch.int8, torch.int8),
        (torch.int8, torch.float32),
        (torch.float16, torch.int8),
    ):
        arguments = RIGHT["feature_gather"] | {
            "dtype": stored,
            "out": torch.zeros(2, 2, 4, dtype=to),
        }
        messages = []
        for function in both("feature_gather"):
            with pytest.raises(ValueError) as error:
                function(**arguments)
            messages.append(str(error.value))
        assert messages[0] == messages[1]
        assert messages[0].startswith("feature_gather: expected ")
        assert "torch.int8" in messages[0]
