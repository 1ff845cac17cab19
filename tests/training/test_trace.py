import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nasfast.training.trace import trace

IMAGES = 1 * 3 * 8 * 8 * 4
MAP = 1 * 4 * 8 * 8 * 4
"""Bytes of the input, and of what the convolution makes."""


class Net(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.conv, self.norm, self.function = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), function

    def forward(self, x):
        return self.function(self.conv, x)


def kept(conv, x):
    y = conv(x)
    z = F.relu(F.relu(y))
    return y + z


def freed(conv, x):
    y = conv(x)
    y = F.relu(y)
    y = F.relu(y)
    return F.relu(y)


def viewed(conv, x):
    y = conv(x)[:, :2]  # keeps all that the convolution made
    return F.relu(y) + 1


PEAKS = {
    "one": (lambda conv, x: conv(x), IMAGES + MAP),
    "in place": (lambda conv, x: F.relu_(F.relu_(conv(x))), IMAGES + MAP),
    "kept": (kept, IMAGES + 3 * MAP),
    "freed": (freed, IMAGES + 2 * MAP),
    "view": (viewed, IMAGES + 2 * MAP),
    "parts": (lambda conv, x: conv(x).split(2, 1)[1] * 2, IMAGES + MAP + MAP // 2),
}


@pytest.mark.parametrize("name", PEAKS)
def test_most_bytes_at_one_time(name):
    function, peak = PEAKS[name]
    images = torch.empty(1, 3, 8, 8, device="meta")
    assert [trace(Net(function), images).peak for _ in range(2)] == [peak, peak]


def test_in_inference_mode():
    net = Net(viewed).eval()
    images = torch.empty(1, 3, 8, 8, device="meta")
    expected = trace(net, images)
    with torch.inference_mode():
        assert trace(net, images) == expected
    assert expected.macs == 8 * 8 * 3 * 4


def test_numbers_of_maps():
    def function(conv, x):
        a, b = conv(x).split(2, 1)
        return F.relu_(a) + b

    conv, split, relu, add = trace(Net(function), torch.empty(1, 3, 8, 8, device="meta")).calls
    assert [call.view for call in (conv, split, relu, add)] == [False, True, False, False]
    x, *parameters = conv.read
    assert x >= 0
    assert all(number < 0 for number in parameters)
    assert split.read == conv.made
    assert relu.read == relu.made == split.made[:1]
    assert add.read == split.made


def test_network_and_inputs_are_left_alone():
    net = Net(lambda conv, x: conv(x[0]) + x[1].relu_()).train()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    images = [torch.empty(1, 3, 8, 8, device="meta"), torch.empty(1, 4, 8, 8, device="meta")]
    before = [dict(image.__dict__) for image in images], dict(net.__dict__)
    found = trace(net, images)
    assert found.macs == 8 * 8 * 3 * 4
    assert ([dict(image.__dict__) for image in images], dict(net.__dict__)) == before
    assert net.training
    assert net.norm.training
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    calls = weakref.ref(found.calls[0])
    del found
    assert calls() is None, "kept by the caller's tensors"


def test_autocast_changes_dtypes_alone():
    def function(conv, x):
        return conv(x).exp().float() + x[:, :1]

    images = torch.empty(1, 3, 8, 8, device="meta")
    plain, cpu, cuda = (trace(Net(function), images, kind) for kind in ("", "cpu", "cuda"))
    assert plain.macs == cpu.macs == cuda.macs
    names = ["aten.convolution", "aten.exp", "aten.slice", "aten.add"]
    assert [call.name for call in plain.calls] == names
    assert [call.name for call in cuda.calls] == names  # which computes exp in float32
    assert [call.name for call in cpu.calls if call.name not in names] == ["aten._to_copy"]
    assert [call.result.dtype for call in cpu.calls[:3]] == [torch.bfloat16] * 2 + [torch.float32]


def test_numbers_of_other_types_are_other_calls():
    image = torch.empty(1, 3, 8, 8, device="meta")
    kinds = [
        call.result.dtype
        for end in (5, 5.0)
        for call in trace(Net(lambda conv, x, end=end: torch.arange(end)), image).calls
        if call.name == "aten.arange"
    ]
    assert kinds == [torch.int64, torch.float32]
