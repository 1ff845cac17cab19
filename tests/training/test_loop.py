import math

import pytest
import torch
from torch import nn

from nasfast.training.loop import (
    Group,
    NonFiniteLossError,
    Runtime,
    epoch_indices,
    in_order,
    one_cycle,
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


def rates(steps, **options):
    """Learning rate of every step of a one-cycle schedule with a peak of 2, and the one after."""
    parameter = nn.Parameter(torch.tensor(0.0))
    optimizer = torch.optim.SGD([parameter], 2.0)
    schedule = one_cycle(optimizer, steps, **options)
    out = []
    for _ in range(steps):
        out += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    return out, schedule.get_last_lr()[0]


def test_one_cycle():
    out, after = rates(100)
    assert out[0] == pytest.approx(0.2)  # no step is lost on a rate of 0
    assert out[9] == out[10] == 2  # end of the warm-up
    assert out[:10] == pytest.approx([0.2 * i for i in range(1, 11)])
    assert out[55] == pytest.approx(1)  # halfway down
    assert out[99] == pytest.approx(1 - math.cos(math.pi / 90))
    assert 0 < out[99] < 0.01
    assert after == pytest.approx(0)
    assert sum(out) == pytest.approx(0.2 * 55 + 2 * 45.5)
    assert rates(100, warmup=0.5)[0][49:51] == [2, 2]


@pytest.mark.parametrize("steps", range(1, 13))
def test_one_cycle_of_few_steps(steps):
    out, _ = rates(steps)
    assert out[0] == max(out) == 2
    assert out == sorted(out, reverse=True)
    assert min(out) > 0


def test_average_follows_every_step():
    weight = nn.Parameter(torch.tensor(0.0))
    average = PolyakAverage([weight], 0.5)
    train_epoch([1.0] * 2, lambda b: b * weight, [sgd(weight)], RUNTIME, average)
    average.copy_to_parameters()
    assert weight.item() == -1.25


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
