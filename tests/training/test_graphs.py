"""Steps repeated from a recording: the logic on a CPU with a recorder that repeats in Python."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from nasfast.training.graphs import WARMUP, GraphedStep, graphed_step
from nasfast.training.loop import Group, Runtime, in_order, train_epoch
from nasfast.training.polyak import PolyakAverage

CPU = torch.device("cpu")


class Repeater:
    """Records the work and repeats it; the result has memory of its own, as a graph's has."""

    def __init__(self, error: RuntimeError | None = None) -> None:
        self.error = error
        self.inside = 0
        self.log: list[str] = []

    @contextmanager
    def stream(self) -> Iterator[None]:
        self.inside += 1
        yield
        self.inside -= 1

    def record(self, work: Callable[[], Tensor]) -> Tensor:
        assert self.inside
        self.log.append("record")
        if self.error is not None:
            raise self.error
        self.work, self.result = work, torch.full((), float("nan"))
        return self.result

    def repeat(self) -> None:
        assert self.inside
        self.log.append("repeat")
        self.result.copy_(self.work())

    def close(self) -> None:
        self.log.append("close")


class Training:
    """A regression with everything that a candidate's training has."""

    def __init__(self, device: torch.device = CPU) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 1))
        self.net.to(device)
        self.data = torch.randn(14, 5).to(device)
        self.target = self.data.sum(1, keepdim=True)
        parameters = list(self.net.parameters())
        capturable = device.type == "cuda"
        adam = torch.optim.Adam(parameters, 0.05, fused=True, capturable=capturable)
        self.group = Group(parameters, adam, 1.0)
        self.average = PolyakAverage(parameters, 0.9)
        self.runtime = Runtime(device)
        self.calls = 0

    def loss_of(self, indices: Tensor) -> Tensor:
        self.calls += 1
        return (self.net(self.data[indices]) - self.target[indices]).square().mean()

    def run(self, graph: GraphedStep | None, epochs: int = 3) -> list[float]:
        """Losses of epochs of 4, 4, 4, 2 samples; the last batch has another shape."""
        losses = []
        for _ in range(epochs):
            batches = [indices.to(self.data.device) for indices in in_order(14, 4)]
            losses.append(
                train_epoch(batches, self.loss_of, [self.group], self.runtime, self.average, graph)
            )
            self.average.copy_to_parameters()
        return losses

    def state(self) -> dict[str, Tensor]:
        return {name: value.cpu() for name, value in self.net.state_dict().items()}


def test_every_step_trains_as_the_eager_one_does() -> None:
    eager, graphed, recorder = Training(), Training(), Repeater()
    assert graphed.run(GraphedStep(recorder)) == eager.run(None)
    torch.testing.assert_close(graphed.state(), eager.state(), rtol=0, atol=0)
    # 9 full batches: 3 of the warm-up; the last of each epoch is smaller
    assert recorder.log == ["record"] + ["repeat"] * (9 - WARMUP)


def test_a_batch_of_several_tensors() -> None:
    seen: list[list[int]] = []

    def step(batch: tuple[Tensor, Tensor]) -> Tensor:
        seen.append([int(tensor.sum()) for tensor in batch])
        return batch[0].sum() * 1.0

    graph = GraphedStep(Repeater())
    losses = [float(graph(step, (torch.tensor([i, 1]), torch.tensor([[2 * i]])))) for i in range(6)]
    assert losses == [1, 2, 3, 4, 5, 6]
    assert seen == [[i + 1, 2 * i] for i in range(6)]


def test_a_step_that_cannot_be_recorded_stays_eager() -> None:
    eager, graphed = Training(), Training()
    first = RuntimeError("operation not permitted when stream is capturing")
    error = RuntimeError("operation failed due to a previous error during capture")
    error.__context__ = first
    recorder = Repeater(error)
    expected = (
        "the training step stays eager, as it cannot be recorded as a CUDA graph: operation not "
        "permitted when stream is capturing"
    )
    with pytest.warns(RuntimeWarning) as caught:
        losses = graphed.run(GraphedStep(recorder))
    assert [str(warning.message) for warning in caught] == [expected]
    assert recorder.log == ["record"]
    assert losses == eager.run(None)
    torch.testing.assert_close(graphed.state(), eager.state(), rtol=0, atol=0)


def test_close_gives_everything_back() -> None:
    training, recorder = Training(), Repeater()
    graph = GraphedStep(recorder)
    training.run(graph, epochs=2)
    graph.close()
    assert recorder.log[-1] == "close"
    assert graph._batch is graph._loss is None


def test_a_schedule_is_refused() -> None:
    training = Training()
    schedule = torch.optim.lr_scheduler.ConstantLR(training.group.optimizer)
    group = Group(training.group.parameters, training.group.optimizer, 1.0, schedule)
    with pytest.raises(ValueError) as error:
        train_epoch(
            in_order(14, 4),
            training.loss_of,
            [group],
            training.runtime,
            None,
            GraphedStep(Repeater()),
        )
    assert str(error.value) == (
        "train_epoch: expected groups without a schedule beside a graph, which repeats the "
        "learning rate that it was recorded with, got one; leave out either"
    )
    assert training.calls == 0


def test_there_are_no_graphs_on_a_cpu() -> None:
    with graphed_step(CPU) as graph:
        assert graph is None


@pytest.mark.cuda
def test_a_cuda_graph_trains_as_the_eager_step_does() -> None:
    device = torch.device("cuda")
    eager, graphed = Training(device), Training(device)
    expected = eager.run(None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with graphed_step(device) as graph:
            losses = graphed.run(graph)
            graphed.group.optimizer.zero_grad(set_to_none=True)
    assert losses == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(graphed.state(), eager.state(), rtol=1e-4, atol=1e-5)
    # 3 smaller batches, the warm-up, and the recording
    assert graphed.calls == 3 + WARMUP + 1


@pytest.mark.cuda
def test_the_next_graph_takes_the_memory_of_the_last() -> None:
    device = torch.device("cuda")
    reserved = []
    for _ in range(4):
        training = Training(device)
        with graphed_step(device) as graph:
            training.run(graph)
            training.group.optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[1:] == [reserved[1]] * 3


@pytest.mark.cuda
def test_a_cuda_step_that_waits_for_the_device_stays_eager() -> None:
    device = torch.device("cuda")
    training, eager = Training(device), Training(device)

    def loss_of(indices: Tensor) -> Tensor:
        loss = training.net(training.data[indices]).square().mean()
        assert loss.item() >= 0
        return loss

    training.loss_of, mean = loss_of, training.loss_of  # type: ignore[method-assign]
    with (
        graphed_step(device) as graph,
        pytest.warns(RuntimeWarning, match="cannot be recorded as a CUDA graph"),
    ):
        training.run(graph)
    training.loss_of = mean  # type: ignore[method-assign]
    assert training.run(None) != eager.run(None)  # it went on training, and the device works
