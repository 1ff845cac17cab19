import json
from collections import Counter
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_networks import IMAGE, SPACES, samples
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from nasfast.latency import operators as module
from nasfast.latency.onnx_operators import onnx_operator
from nasfast.latency.operators import Operator, operators_of
from nasfast.latency.timing import torch_operator
from nasfast.models.layers import Conv2d
from nasfast.training import trace as tracing
from nasfast.training.cost import count_macs
from nasfast.utils.errors import UserError

each = pytest.mark.parametrize("name", SPACES)


@pytest.fixture(scope="module")
def operators():
    """Of some networks of each space, by its name and that of the device of autocast."""
    images = torch.empty(IMAGE, device="meta")
    return {
        (name, kind): [operators_of(model, images, autocast=kind) for model in models]
        for name in SPACES
        for models in [samples(name, 2)]
        for kind in ("", "cpu")
    }


class Net(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.conv, self.norm, self.function = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), function

    def forward(self, x):
        return self.function(self.conv, self.norm, x)


def late(conv, norm, x):
    y = conv(x)
    z = y * 2
    return z + F.relu_(y)


FUSED = {
    "all": (lambda conv, norm, x: F.relu(norm(conv(x))), [("conv", True, "relu")]),
    "in place": (
        lambda conv, norm, x: F.relu6(norm(conv(x)), inplace=True) * 2,
        [("conv", True, "relu6"), ("mul", False, "")],
    ),
    "no norm": (lambda conv, norm, x: F.relu(conv(x)), [("conv", False, "relu")]),
    "relu first": (
        lambda conv, norm, x: norm(F.relu(conv(x))),
        [("conv", False, "relu"), ("native_batch_norm", False, "")],
    ),
    "convolution read twice": (
        lambda conv, norm, x: norm(y := conv(x)) + y,
        [("conv", False, ""), ("native_batch_norm", False, ""), ("add", False, "")],
    ),
    "norm read twice": (
        lambda conv, norm, x: F.relu(y := norm(conv(x))) + y,
        [("conv", True, ""), ("relu", False, ""), ("add", False, "")],
    ),
    "part read": (
        lambda conv, norm, x: norm(y := conv(x)) + y[:, :1],
        [("conv", False, ""), ("native_batch_norm", False, ""), ("add", False, "")],
    ),
    "read before in place": (
        late,
        [("conv", False, ""), ("mul", False, ""), ("relu", False, ""), ("add", False, "")],
    ),
}


@pytest.mark.parametrize("name", FUSED)
def test_what_is_one_operator(name):
    function, expected = FUSED[name]
    found = operators_of(Net(function), torch.empty(1, 3, 8, 8, device="meta"))
    assert Counter(expected) == Counter((o.kind, o.normalized, o.activation) for o in found)


@each
def test_multiply_accumulates(operators, name):
    for model, found in zip(samples(name, 2), operators[name, ""], strict=True):
        assert sum(o.macs * n for o, n in found.items()) == count_macs(model, IMAGE[2:])


@each
def test_every_kind_is_known_and_gives_its_shape(operators, name):
    for operator in {o for kind in ("", "cpu") for found in operators[name, kind] for o in found}:
        with torch.device("meta"):
            single = torch_operator(operator)
            assert single is not None, operator
            made = single.eval()(*map(torch.empty, operator.reads))
        assert tuple(made.shape) == operator.makes, operator


@each
def test_operators_as_onnx(operators, name):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    for operator in set().union(*operators[name, ""]):
        data = onnx_operator(operator)
        assert data is not None, operator
        inputs = {f"x{i}": torch.rand(s).numpy() for i, s in enumerate(operator.reads)}
        (made,) = runtime.InferenceSession(data, options).run(None, inputs)
        assert made.shape == operator.makes, operator


def test_unknown_kind():
    operator = Operator("fft", ((1, 2, 3, 4),), (1, 2, 3, 4))
    assert torch_operator(operator) is None
    assert onnx_operator(operator) is None


@pytest.mark.parametrize("bias", [False, True])
def test_our_convolutions_are_timed_as_ours(bias):
    """The dilated depthwise ones take a seventh of the time of PyTorch's."""
    conv = nn.Conv2d(8, 8, 5, padding=12, dilation=6, groups=8, bias=bias)
    (operator,) = operators_of(conv, torch.empty(1, 8, 9, 9, device="meta"))
    (single,) = torch_operator(operator)
    assert isinstance(single, Conv2d) is not bias
    assert (single.bias is not None) is bias


class Recorder(TorchDispatchMode):
    """What PyTorch computes under autocast, as calls; what autocast casts is as it was before."""

    def __init__(self):
        super().__init__()
        self.calls, self.kept, self.casts = [], [], {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.kept.append((args, result))  # numbers are those of objects
        name = str(func._overloadpacket)
        if "conv" in name or name == "aten.cat":
            args = self._before(args)
        call = tracing.Call(
            name,
            tracing._form_of(args),
            tuple(map(id, tracing._tensors(args))),
            tracing._form_of(result),
            tuple(map(id, tracing._tensors(result))),
            tracing._aliasing(func) == "view",
        )
        self.calls.append(call)
        if name == "aten._to_copy":
            self.casts[id(result)] = args[0], call
        return result

    def _before(self, value):
        if isinstance(value, (list, tuple)):
            return tuple(map(self._before, value))
        source, call = self.casts.get(id(value), (value, None))
        if call in self.calls:
            self.calls.remove(call)
        return source


class Explicit(TorchFunctionMode):
    """Finds what networks cast themselves."""

    def __init__(self, recorder):
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.float:
            self.recorder.casts.pop(id(result), None)
        return result


@each
def test_precisions_are_those_of_autocast(name, monkeypatch):
    (model,) = samples(name, 1, "cpu")
    for part in model.modules():  # both are PyTorch's own
        if isinstance(part, Conv2d):
            monkeypatch.setattr(part, "_float32_on_cpu", False)
    monkeypatch.setattr("nasfast.models.layers.runs_own_ops", lambda _: False)
    recorder = Recorder()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), recorder, Explicit(recorder):
        model(torch.rand(IMAGE))
    expected = operators_of(model, torch.empty(IMAGE, device="meta"), autocast="cpu")
    with mock.patch.object(module, "trace") as traced:
        traced.return_value.calls = recorder.calls
        found = operators_of(model, None, autocast="cpu")
    assert found == expected
    assert any(operator.wide for operator in found)


sides = st.lists(st.integers(1, 2**20), min_size=1, max_size=4).map(tuple)
plain = st.builds(
    Operator,
    st.sampled_from(["add", "cat", "resize", "fft"]),
    st.lists(sides, min_size=1, max_size=3).map(tuple),
    sides,
    wide=st.lists(st.booleans(), max_size=3).map(tuple),
)
convolutions = st.builds(
    Operator,
    st.sampled_from(["conv", "deform_conv"]),
    st.lists(sides, min_size=1, max_size=3).map(tuple),
    sides,
    st.tuples(*[st.integers(1, 99)] * 4),
    st.tuples(*[st.integers(1, 99)] * 7),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["", "relu", "relu6"]),
)


@given(plain | convolutions)
def test_round_trip(operator):
    assert Operator.from_json(json.loads(json.dumps(operator.to_json()))) == operator


CONV = {
    "kind": "conv",
    "reads": [[1, 3, 8, 8]],
    "makes": [1, 4, 8, 8],
    "weight": [4, 3, 1, 1],
    "settings": [1, 1, 0, 0, 1, 1, 1],
}


@pytest.mark.parametrize(
    "change",
    [
        {"kind": 3},
        {"kind": ["conv"]},
        {"reads": 3},
        {"reads": []},
        {"reads": [3]},
        {"reads": [["3"]]},
        {"makes": []},
        {"makes": [0]},
        {"makes": [-1, 4, 8, 8]},
        {"makes": [1.5, 4, 8, 8]},
        {"makes": [True, 4, 8, 8]},
        {"makes": [10**400, 4, 8, 8]},
        {"makes": [2] * 1000},
        {"weight": [4, 3, 1]},
        {"weight": []},
        {"settings": [1, 1]},
        {"settings": [-1, 1, 0, 0, 1, 1, 1]},
        {"normalized": 1},
        {"bias": "no"},
        {"activation": "tanh"},
        {"activation": None},
        {"wide": [1]},
        {"color": "red"},
    ],
    ids=str,
)
def test_damaged(change):
    assert Operator.from_json(CONV).macs == 4 * 3 * 64
    with pytest.raises(UserError, match=r"^operator: expected one of nasfast, got \{'kind': .*: "):
        Operator.from_json(CONV | change)
