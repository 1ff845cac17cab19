import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nasfast.training.loop import (
    Group,
    NonFiniteLossError,
    Runtime,
    epoch_indices,
    in_order,
    one_cycle,
    scheduled,
    train_epoch,
)
from nasfast.training.polyak import PolyakAverage

RUNTIME = Runtime(torch.device("cpu"))


def sgd(parameter, max_norm=1e9, schedule=None, lr=1.0):
    optimizer = torch.optim.SGD([parameter], lr)
    return Group([parameter], optimizer, max_norm, schedule and schedule(optimizer))


def trained(batches, *options, runtime=RUNTIME, weight=None, **settings):
    """A weight from 0 with the loss b * w, so that it falls by b in each step; and that loss."""
    weight = nn.Parameter(torch.tensor(0.0)) if weight is None else weight
    loss = train_epoch(batches, lambda b: b * weight, [sgd(weight, **settings)], runtime, *options)
    return weight.item(), loss


@given(count=st.integers(1, 20), batch_size=st.integers(1, 6), seed=st.integers(0, 9))
def test_epoch_indices(count, batch_size, seed):
    def order(generator):
        return [batch.tolist() for batch in epoch_indices(count, batch_size, generator)]

    generator = torch.Generator().manual_seed(seed)
    batches, next_ones = order(generator), order(generator)
    assert [len(b) for b in batches] == ([batch_size] * (count // batch_size) or [count])
    flat = [i for batch in batches for i in batch]
    assert len(set(flat)) == len(flat)
    assert set(flat) <= set(range(count))
    assert count < 16 or batches != next_ones
    assert order(torch.Generator().manual_seed(seed)) == batches


def test_in_order():
    assert [b.tolist() for b in in_order(5, 2)] == [[0, 1], [2, 3], [4]]


def test_mean_loss_and_steps():
    assert trained([1.0, 2.0, 3.0]) == (-6, pytest.approx((0 - 2 - 9) / 3))


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
    halved = functools.partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    assert trained([1.0] * 3, schedule=halved)[0] == -(1 + 0.5 + 0.25)


def rates(steps, **options):
    """Learning rate of every step of a one-cycle schedule with a peak of 2, and the one after."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.tensor(0.0))], 2.0)
    schedule = one_cycle(optimizer, steps, **options)
    out = []
    for _ in range(steps):
        out += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    return out, schedule.get_last_lr()[0]


def test_one_cycle():
    out, after = rates(100)
    assert out[:10] == pytest.approx([0.2 * i for i in range(1, 11)])  # not from 0: no step is lost
    assert out[9] == out[10] == 2  # end of the warm-up
    fall = [1 + math.cos(math.pi * i / 90) for i in range(91)]
    assert [*out[10:], after] == pytest.approx(fall)
    assert rates(100, warmup=0.5)[0][49:51] == [2, 2]


@pytest.mark.parametrize(
    ("kind", "half"), [("one-cycle", 0.5), ("cosine", 0.5), ("poly", 0.5**0.9)]
)
def test_schedules_fall_to_zero(kind, half):
    optimizer = torch.optim.SGD([nn.Parameter(torch.tensor(0.0))], 2.0)
    schedule = scheduled(optimizer, kind, 201, 0.0)
    factors = [schedule.lr_lambdas[0](step) for step in (0, 1, 101, 201)]
    assert factors == pytest.approx([1, 1, half, 0])
    rise = scheduled(optimizer, kind, 200, 0.5).lr_lambdas[0]
    assert [rise(step) for step in (0, 49, 99)] == pytest.approx([0.01, 0.5, 1])
    warm = scheduled(optimizer, kind, 200).lr_lambdas[0]
    assert warm(0) == (0.05 if kind == "one-cycle" else 1)


def test_the_published_schedule_of_detectors():
    """90,000 steps: a rise from 1/3 in the first 500, a tenth from 60,000 and from 80,000."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.tensor(0.0))], 2.0)
    factor = scheduled(optimizer, "steps", 90_000, 500 / 90_000, 1 / 3).lr_lambdas[0]
    found = [factor(step) for step in (249, 499, 59_999, 60_000, 80_000, 89_999)]
    assert found == pytest.approx([2 / 3, 1, 1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize("steps", range(1, 13))
def test_one_cycle_of_few_steps(steps):
    out, _ = rates(steps)
    assert out[0] == max(out) == 2
    assert out == sorted(out, reverse=True)
    assert min(out) > 0


def test_average_follows_every_step():
    weight = nn.Parameter(torch.tensor(0.0))
    average = PolyakAverage([weight], 0.5)
    trained([1.0] * 2, average, weight=weight)
    average.copy_to_parameters()
    assert weight.item() == -1.25


def test_heartbeat_comes_before_each_step_and_stops():
    weight, seen = nn.Parameter(torch.tensor(0.0)), []

    def heartbeat():
        seen.append(weight.item())
        if weight.item() == -2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained([1.0] * 9, weight=weight, runtime=Runtime(torch.device("cpu"), heartbeat))
    assert seen == [0, -1, -2]
    assert weight.item() == -2


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
