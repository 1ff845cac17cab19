"""Seed, gate, timing and failure policy, with stages that do what they are told."""

import dataclasses
import random
import time

import numpy as np
import pytest
import torch
from torch import nn

from nasfast.evaluation.candidate import CandidateEvaluator
from nasfast.spaces.fast_nas import FastNASSpace
from nasfast.tasks.segmentation import SegmentationProcessor
from nasfast.training.loop import NonFiniteLossError, Runtime
from nasfast.utils.seeding import derive_seed

GENOTYPE = FastNASSpace().sample(random.Random(0))


@dataclasses.dataclass
class Scored:
    reward: float

    def as_dict(self):
        return {"metric": 2 * self.reward}


class Stage:
    """Rewards what it is given; a callable is called in training, in validation or to show."""

    def __init__(self, name, reward, train=None, validate=None, show=None):
        self.name, self.names, self.reward = name, (name,), reward
        self._train, self._validate, self._show = train, validate, show
        self.seeds = []

    def train(self, model, seed_of):
        self.seeds.append(seed_of(self.name))
        if self._train is not None:
            self._train()
        yield model

    def validate(self, model):
        time.sleep(0.001)
        if self._validate is not None:
            self._validate()
        return Scored(self.reward)

    def show(self, model, scores):
        if self._show is not None:
            self._show()
        return {"reward.txt": f"{self.name} {scores.reward}".encode()}


def evaluator(*stages, build=lambda genotype: nn.Linear(2, 3), seed=7):
    return CandidateEvaluator(
        build,
        lambda model: {"params": sum(p.numel() for p in model.parameters()), "macs": 6},
        stages,
        Runtime(torch.device("cpu")),
        image=(3, 4, 6),
        processor=lambda genotype: SegmentationProcessor(("a", "b"), ((0, 0, 0), (9, 9, 9))),
        seed=seed,
        inputs={"data": "hash"},
        remedy="rest",
        seconds={"encode": 1.0},
    )


def fail_with(error):
    def fail():
        raise error

    return fail


def test_all_stages():
    first, second = Stage("first", 0.5), Stage("second", 0.2)
    evaluation = evaluator(first, second)(GENOTYPE, 3, {"first": 0.4, "second": 0.9})
    assert evaluation.rewards == {"first": 0.5, "second": 0.2}
    assert evaluation.metrics == {"first": {"metric": 1.0}, "second": {"metric": 0.4}}
    assert evaluation.costs == {"params": 9, "macs": 6}
    assert list(evaluation.seconds) == [
        f"{stage}_{step}" for stage in ("first", "second") for step in ("train", "validate")
    ]
    assert evaluation.seconds["first_validate"] >= 0.001
    assert (evaluation.gate, evaluation.feedback, evaluation.failure) == (0.4, "first", None)
    assert first.seeds == [derive_seed(7, 3, "first")]
    assert second.seeds == [derive_seed(7, 3, "second")]


@pytest.mark.parametrize("gate", [0.5, 0.6])
def test_what_does_not_beat_the_gate_stops(gate):
    second = Stage("second", 0.9)
    evaluation = evaluator(Stage("first", 0.5), second)(GENOTYPE, 0, {"first": gate})
    assert evaluation.rewards == {"first": 0.5}
    assert second.seeds == []


class Epochs(Stage):
    """Scored three times in its training, each time with more."""

    def __init__(self, *names):
        super().__init__("epochs", 0.5)
        self.names, self.ended = names or ("one", "two", "three"), False

    def train(self, model, seed_of):
        try:
            for _ in self.names:
                self.reward += 0.1
                yield model
        finally:
            self.ended = True


@pytest.mark.parametrize(
    ("gates", "passed"),
    [
        ({}, ["first", "one", "two", "three"]),
        ({"one": 0.5, "two": 0.65, "three": 1.0}, ["first", "one", "two", "three"]),
        ({"one": 0.5, "two": 0.75}, ["first", "one", "two"]),
        ({"one": 0.65}, ["first", "one"]),
        ({"first": 0.9}, ["first"]),
    ],
)
def test_a_stage_with_several_gates_stops_in_its_training(gates, passed):
    epochs = Epochs()
    evaluation = evaluator(Stage("first", 0.5), epochs)(GENOTYPE, 0, gates)
    assert list(evaluation.rewards) == passed
    assert epochs.ended == (len(passed) > 1)


@pytest.mark.parametrize(
    ("gates", "passed"),
    [
        ({}, ["one.1", "one.2", "one", "last"]),
        ({"one.1": 0.6, "one.2": 0.7, "one": 0.9}, ["one.1", "one.2", "one"]),  # equal stays
        ({"one.2": 0.75}, ["one.1", "one.2"]),
        ({"one.1": 0.65}, ["one.1"]),
    ],
)
def test_a_rung_of_the_first_stage_stops_what_is_below(gates, passed):
    epochs = Epochs("one.1", "one.2", "one")
    evaluation = evaluator(epochs, Stage("last", 0.9))(GENOTYPE, 0, gates)
    assert (list(evaluation.rewards), evaluation.feedback) == (passed, "one")
    assert epochs.ended
    assert bool(evaluation.files) == ("one" in passed)  # what cannot be the best is not shown


@pytest.mark.parametrize(("gate", "text"), [(0.4, b"second 0.9"), (0.6, b"first 0.5")])
def test_the_last_stage_is_shown(gate, text):
    stages = Stage("first", 0.5), Stage("second", 0.9)
    assert evaluator(*stages)(GENOTYPE, 0, {"first": gate}).files == {"reward.txt": text}


@pytest.mark.parametrize("error", [RuntimeError("out of memory (3 GB)"), KeyError("color")])
def test_what_cannot_be_shown_costs_no_candidate_and_says_why(error):
    stage = Stage("only", 0.5, show=fail_with(error))
    evaluation = evaluator(stage)(GENOTYPE, 0, {})
    assert (evaluation.rewards, evaluation.failure) == ({"only": 0.5}, None)
    assert evaluation.files == {"failed.txt": f"{type(error).__name__}: {error}".encode()}


def test_of_a_failure_nothing_is_shown():
    stages = Stage("first", 0.5), Stage("second", 0.9, train=fail_with(MemoryError()))
    assert evaluator(*stages)(GENOTYPE, 0, {}).files == {}


def test_costs_alone():
    before = torch.get_rng_state()
    assert evaluator(Stage("only", 0.1)).costs(GENOTYPE) == {"params": 9, "macs": 6}
    assert torch.equal(torch.get_rng_state(), before)


def test_index_and_seed_decide_the_initial_weights():
    made = []

    def build(genotype):
        made.append(nn.Linear(2, 3))
        return made[-1]

    for seed, index in ((7, 1), (7, 1), (7, 2), (8, 1)):
        torch.manual_seed(index + seed)
        evaluator(Stage("only", 0.1), build=build, seed=seed)(GENOTYPE, index, {})
    first, again, other, elsewhere = (model.weight for model in made)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, elsewhere)


def test_generators_are_left_as_they_were(monkeypatch):
    fork_rng, saved = torch.random.fork_rng, []

    def spy(devices):
        saved.append(devices)
        return fork_rng(devices)

    monkeypatch.setattr(torch.random, "fork_rng", spy)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    evaluator(Stage("only", 0.1, train=lambda: torch.rand(3)))(GENOTYPE, 0, {})
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]  # noqa: NPY002
    assert saved == [[]]  # on a CPU no device's


MEMORY = [
    (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB\nmore"), "CUDA out of memory. Tried "),
    (MemoryError(), "MemoryError"),
    (RuntimeError("CUDNN_STATUS_ALLOC_FAILED: at line 3"), "CUDNN_STATUS_ALLOC_FAILED: at line 3"),
    (RuntimeError("cuBLAS error CUBLAS_STATUS_ALLOC_FAILED"), "cuBLAS error CUBLAS_STATUS_ALLOC_F"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you"), "DefaultCPUAllocator: can't"),
]


@pytest.mark.parametrize("step", ["train", "validate"])
@pytest.mark.parametrize(("error", "text"), MEMORY)
def test_out_of_memory_is_a_failure_that_keeps_the_stages_before(error, text, step):
    last = Stage("second", 0.9, **{step: fail_with(error)})
    evaluation = evaluator(Stage("first", 0.5), last)(GENOTYPE, 0, {"first": 0.1})
    assert evaluation.failure.startswith(f"second: out of memory ({text}")
    assert "\n" not in evaluation.failure
    assert evaluation.rewards == {"first": 0.5}
    assert evaluation.costs == {"params": 9, "macs": 6}
    assert list(evaluation.seconds)[-1] == f"second_{step}"
    assert evaluation.gate == 0.1


def test_out_of_memory_while_it_is_built():
    def build(genotype):
        torch.empty(1 << 60, dtype=torch.uint8)

    evaluation = evaluator(Stage("only", 0.5), build=build)(GENOTYPE, 0, {})
    assert evaluation.failure.startswith("build: out of memory (")
    assert evaluation.rewards == {}


def test_a_loss_that_is_not_finite_is_a_failure():
    stage = Stage("only", 0.5, train=fail_with(NonFiniteLossError("training loss is nan")))
    assert evaluator(stage)(GENOTYPE, 0, {}).failure == "only: training loss is nan"


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), ValueError("wrong"), RuntimeError(), KeyError("x")]
)
def test_other_errors_are_raised(error):
    with pytest.raises(type(error)) as caught:
        evaluator(Stage("only", 0.5, train=fail_with(error)))(GENOTYPE, 0, {})
    assert caught.value is error
