import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nasfast.encoders import MobileNetV2
from nasfast.training.cost import count_macs, count_parameters, measure_latency
from nasfast.training.loop import Runtime


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=2, padding=1),
            nn.BatchNorm2d(6),
            nn.Conv2d(6, 6, 5, padding=2, groups=6, bias=False),
        )
        self.aux_heads = nn.ModuleList([nn.Conv2d(6, 2, 1)])
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        y = self.body(x)
        return self.aux_heads[0](y) if self.training else y


def test_parameters_without_auxiliary_heads():
    net = Net()
    assert count_parameters(net) == (3 * 6 * 9 + 6) + 12 + 6 * 25
    assert count_parameters(net, exclude="body") == 14


def test_macs_are_those_of_evaluation_mode_and_leave_the_network_alone():
    net = Net().train()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    assert count_macs(net, (10, 7)) == 5 * 4 * (3 * 6 * 9 + 6 * 25)
    assert net.training
    assert net.calls == 0
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def test_macs_are_those_of_pytorch_s_counter():
    net = MobileNetV2(0.35).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(torch.zeros(1, 3, 64, 96))
    assert 2 * count_macs(net, (64, 96)) == counter.get_total_flops()


CPU = Runtime(torch.device("cpu"))


def test_images_of_other_channels():
    net = nn.Conv2d(1, 4, 3, padding=1, bias=False)
    assert count_macs(net, (5, 6), channels=1) == 5 * 6 * 4 * 9
    (latency,) = measure_latency([net], (5, 6), CPU, channels=1, seconds=0.01)
    assert latency.median > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_latency_fields(monkeypatch, dtype):
    monkeypatch.setattr("nasfast.training.loop.autocast_dtype", lambda _: getattr(torch, dtype))
    net = Net().eval()
    latency, other = measure_latency([net, nn.Identity()], (16, 12), CPU, batch=2, seconds=0.05)
    assert 0 < latency.median <= latency.p95
    assert other.median < latency.median
    assert 5 <= latency.runs == other.runs <= net.calls - 5
    assert (latency.batch, latency.size, latency.dtype) == (2, (16, 12), dtype)
    assert (latency.device, latency.threads) == ("cpu", torch.get_num_threads())
    assert latency.backend == f"torch {torch.__version__}"
