import pytest
import torch
from torch import nn

from nasfast.training.loop import (
    Group,
    NonFiniteLossError,
    Runtime,
    epoch_indices,
    in_order,
    train_epoch,
)
from nasfast.training.polyak import PolyakAverage

RUNTIME = Runtime(torch.device("cpu"))


def sgd(parameter, max_norm=1e9, schedule=None, lr=1.0):
    optimizer = torch.optim.SGD([parameter], lr)
    return Group([parameter], optimizer, max_norm, schedule and schedule(optimizer))


@pytest.mark.parametrize(
    ("count", "batch_size", "sizes"),
    [(10, 4, [4, 4]), (8, 4, [4, 4]), (3, 4, [3]), (4, 4, [4]), (5, 1, [1] * 5), (7, 4, [4])],
)
def test_epoch_indices(count, batch_size, sizes):
    batches = list(epoch_indices(count, batch_size, torch.Generator().manual_seed(1)))
    assert [len(b) for b in batches] == sizes
    flat = torch.cat(batches).tolist()
    assert len(set(flat)) == len(flat)
    assert set(flat) <= set(range(count))


def test_epoch_indices_follow_the_generator():
    def order(generator):
        return torch.cat(list(epoch_indices(16, 4, generator))).tolist()

    generator = torch.Generator().manual_seed(1)
    first, second = order(generator), order(generator)
    assert first != second
    assert sorted(first) == list(range(16))
    assert order(torch.Generator().manual_seed(1)) == first


def test_in_order():
    assert [b.tolist() for b in in_order(5, 2)] == [[0, 1], [2, 3], [4]]


def test_mean_loss_and_steps():
    weight = nn.Parameter(torch.tensor(0.0))
    # loss b * w: gradient b, so w falls by b each step
    loss = train_epoch([1.0, 2.0, 3.0], lambda b: b * weight, [sgd(weight)], RUNTIME)
    assert weight.item() == -6
    assert loss == pytest.approx((0 - 2 - 9) / 3)


def test_each_group_is_clipped_by_itself():
    small, large = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    gradient = torch.tensor([3.0, 4.0])
    train_epoch(
        [0],
        lambda _: (gradient * (0.01 * small + large)).sum(),
        [sgd(small, 1.0), sgd(large, 1.0)],
        RUNTIME,
    )
    torch.testing.assert_close(small.detach(), -0.01 * gradient)
    torch.testing.assert_close(large.detach(), -gradient / 5)


def test_schedule_is_stepped_after_the_optimizer():
    weight = nn.Parameter(torch.tensor(0.0))
    group = sgd(weight, schedule=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5))
    train_epoch([1.0] * 3, lambda b: b * weight, [group], RUNTIME)
    assert weight.item() == -(1 + 0.5 + 0.25)


def test_average_follows_every_step():
    weight = nn.Parameter(torch.tensor(0.0))
    average = PolyakAverage([weight], 0.5)
    train_epoch([1.0] * 2, lambda b: b * weight, [sgd(weight)], RUNTIME, average)
    assert average.state_dict()[0].item() == -1.25


def test_heartbeat_comes_before_each_step():
    weight, seen = nn.Parameter(torch.tensor(0.0)), []
    runtime = Runtime(torch.device("cpu"), lambda: seen.append(weight.item()))
    train_epoch([1.0] * 3, lambda b: b * weight, [sgd(weight)], runtime)
    assert seen == [0, -1, -2]


def test_heartbeat_stops():
    weight = nn.Parameter(torch.tensor(0.0))

    def stop():
        if weight.item() == -1:
            raise KeyboardInterrupt

    runtime = Runtime(torch.device("cpu"), stop)
    with pytest.raises(KeyboardInterrupt):
        train_epoch([1.0] * 3, lambda b: b * weight, [sgd(weight)], runtime)
    assert weight.item() == -1


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_non_finite_loss(value):
    weight = nn.Parameter(torch.tensor(0.0))
    with pytest.raises(NonFiniteLossError, match=rf"^training loss is {value} after 3 steps$"):
        train_epoch(
            [1.0, float(value), 1.0], lambda b: weight.detach() * weight + b, [sgd(weight)], RUNTIME
        )


def test_parameters_without_gradient_are_left():
    used, unused = nn.Parameter(torch.tensor(0.0)), nn.Parameter(torch.tensor(5.0))
    train_epoch([1.0], lambda b: b * used, [sgd(used), sgd(unused, 3.0)], RUNTIME)
    assert unused.item() == 5


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_autocast_follows_the_device(monkeypatch, dtype):
    monkeypatch.setattr("nasfast.training.loop.autocast_dtype", lambda device: dtype)
    with RUNTIME.autocast():
        y = nn.Linear(2, 2)(torch.rand(1, 2))
    assert y.dtype == RUNTIME.dtype == (dtype or torch.float32)


def test_place_gives_channels_last_weights():
    conv = RUNTIME.place(nn.Conv2d(4, 8, 3))
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
