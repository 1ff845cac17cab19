"""What several processes do to a network."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from nasfast.encoders.resnet import FrozenBatchNorm2d
from nasfast.models.layers import GlobalAveragePool
from nasfast.training import batch_norm, processes


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_frozen_norms_stay_as_they_are(device, monkeypatch):
    monkeypatch.setattr(processes, "size", lambda: 2)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(FrozenBatchNorm2d(3)))
    processes.synchronize(model, torch.device(device))
    wanted = nn.SyncBatchNorm if device == "cuda" else processes.SummedBatchNorm
    assert type(model[0]) is wanted
    assert type(model[1][0]) is FrozenBatchNorm2d


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"momentum": 0.3},
        {"momentum": None},
        {"eps": 0.3},
        {"affine": False},
        {"bias": False},
        {"track_running_stats": False},
    ],
    ids=str,
)
def test_norms_of_several_processes_are_those_of_one(settings, training):
    """Of the whole batch, here in one process: values, gradients, statistics and counters."""
    own, summed = (nn.BatchNorm2d(3, **settings).double().train(training) for _ in range(2))
    summed.__class__ = processes.SummedBatchNorm
    for step in range(4):
        x = torch.randn(4, 3, 5, 6, dtype=torch.float64)
        results = []
        for norm in (own, summed):
            leaf = x.clone().requires_grad_()
            y = norm(leaf)
            leaves = [leaf, *norm.parameters()]
            results.append([y, *torch.autograd.grad(y.sin().sum(), leaves), *norm.buffers()])
        for got, wanted in zip(*reversed(results), strict=True):
            torch.testing.assert_close(got, wanted)
        if step == 1:
            own.track_running_stats = summed.track_running_stats = False
        if step == 2:
            own.num_batches_tracked = summed.num_batches_tracked = None
            own.track_running_stats = summed.track_running_stats = own.running_mean is not None


def test_statistics_of_several_processes_are_measured_as_those_of_one():
    own, summed = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    summed.__class__ = processes.SummedBatchNorm
    batches = torch.randn(4, 5, 3, 6, 6)
    for norm in (own, summed):
        left = iter(batches)
        batch_norm.measure(norm, lambda: norm(next(left)), 4)  # noqa: B023
    torch.testing.assert_close(summed.running_mean, own.running_mean)
    torch.testing.assert_close(summed.running_var, own.running_var)


def test_one_value_in_all_processes():
    """It has no variance: statistics stay, and normalise."""
    norm = nn.BatchNorm2d(3)
    norm(torch.randn(4, 3, 5, 6))
    norm.__class__ = processes.SummedBatchNorm
    before = {key: value.clone() for key, value in norm.state_dict().items()}
    x = torch.randn(1, 3, 1, 1)
    y = norm(x)
    torch.testing.assert_close(norm.state_dict(), before)
    torch.testing.assert_close(y, norm.eval()(x))


def train_of_two(rank, store, results):
    """A batch of 3: one value a channel in the second process, which the first one waits for."""
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Sequential(GlobalAveragePool(4))
    x = torch.randn(3, 4, 5, 6)
    processes.synchronize(model, torch.device("cpu"))
    y = model(processes.share(x))
    results.put((rank, y.detach().numpy(), model[0].bn.running_mean.numpy()))
    dist.destroy_process_group()


def test_a_share_of_one_value_a_channel_does_not_hang(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [
        context.Process(target=train_of_two, args=(rank, tmp_path / "store", results))
        for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    try:
        found = sorted((results.get(timeout=90) for _ in workers), key=lambda result: result[0])
    finally:
        for worker in workers:
            worker.join(10)
            worker.kill()
    torch.manual_seed(0)
    model = nn.Sequential(GlobalAveragePool(4))
    expected = model(torch.randn(3, 4, 5, 6))
    got = torch.cat([torch.from_numpy(y) for _, y, _ in found])
    torch.testing.assert_close(got, expected)
    for _, _, mean in found:
        torch.testing.assert_close(torch.from_numpy(mean), model[0].bn.running_mean)
