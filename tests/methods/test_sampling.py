"""The loop of strategies that are told rewards: duplicates, failures, crashes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from nasfast.methods import sampling
from nasfast.records import Evaluation, Record
from nasfast.spaces.fast_nas import Cell, FastNASGenotype, FastNASSpace
from nasfast.study import Study

SPACE = FastNASSpace()


def success(stage0: float, stage1: float | None = None) -> Evaluation:
    rewards = {"stage0": stage0} | ({} if stage1 is None else {"stage1": stage1})
    return Evaluation(rewards, {stage: {} for stage in rewards}, None, 1, 1, {})


HALF = Evaluation({"stage0": 0.8}, {"stage0": {}}, None, 1, 1, {}, "stage1: out of memory (fake)")
FAILURE = Evaluation({}, {}, None, 0, 0, {}, "stage0: out of memory (fake)")


def records_of(run: Path) -> list[Any]:
    return [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]


class Script:
    """Strategy that asks for given genotypes, and evaluator that returns given evaluations."""

    seed = 5
    remedy = "lower the learning rates"

    @property
    def seconds(self) -> dict[str, float]:
        return {"encode": 1.5}

    def __init__(
        self, genotypes: Iterator[FastNASGenotype], evaluate: Callable[[int], Evaluation]
    ) -> None:
        self.genotypes, self.evaluate = genotypes, evaluate
        self.told: list[float | None] = []
        self.evaluated: list[int] = []
        self.gates: list[float | None] = []

    def ask(self) -> FastNASGenotype:
        return next(self.genotypes)

    def tell(self, genotype: FastNASGenotype, reward: float | None) -> None:
        self.told.append(reward)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: object) -> None: ...

    def __call__(self, genotype: FastNASGenotype, index: int, gate: float | None) -> Evaluation:
        self.evaluated.append(index)
        self.gates.append(gate)
        return self.evaluate(index)


def play(
    root: Path,
    genotypes: Iterator[FastNASGenotype],
    evaluate: Callable[[int], Evaluation],
    budget: int,
) -> tuple[Script, Sequence[Record]]:
    script = Script(genotypes, evaluate)
    with Study.create(root, "segmentation", "script", {}, {}) as study:
        console = Console(quiet=True)
        sampling.run(study, SPACE, script, script, budget, console)
        return script, study.records


def distinct() -> Iterator[FastNASGenotype]:
    rng = random.Random(0)
    while True:
        yield SPACE.sample(rng)


def renamed(genotype: FastNASGenotype) -> FastNASGenotype:
    """The same network with the two branches of the first layer swapped."""
    (p1, p2, o1, o2), *others = genotype.cell.layers
    swap = {2: 3, 3: 2}
    rest = ((swap.get(a, a), swap.get(b, b), c, d) for a, b, c, d in others)
    cell = Cell(genotype.cell.op0, ((p2, p1, o2, o1), *rest))
    return dataclasses.replace(genotype, cell=cell)


def test_duplicates_are_not_trained_again(tmp_path: Path) -> None:
    first, second, third = (genotype for genotype, _ in zip(distinct(), range(3)))
    assert renamed(first) != first
    asked = [first, second, first, renamed(first), third]
    script, records = play(tmp_path, iter(asked), lambda i: success(0.1 * (i + 1), 0.9), budget=3)
    assert script.evaluated == [0, 1, 4]
    assert [r.duplicate_of for r in records] == [None, None, 0, 0, None]
    assert [r.genotype for r in records] == [g.to_json() for g in asked]
    assert records[2].evaluation == records[3].evaluation == records[0].evaluation
    # stage 0 is what the strategy learns from, also where stage 1 was reached
    assert script.told == [0.1, 0.2, 0.1, 0.1, 0.5]
    assert script.gates == [None, 0.1, statistics.fmean([0.1, 0.2])]


def test_a_failure_is_recorded_counts_and_is_told_as_none(tmp_path: Path) -> None:
    a, b, c = (g for g, _ in zip(distinct(), range(3)))
    script, records = play(
        tmp_path, iter([a, b, b, c]), lambda i: FAILURE if i == 1 else success(0.4), budget=3
    )
    assert script.evaluated == [0, 1, 3]
    assert script.told == [0.4, None, None, 0.4]
    assert [r.evaluation.failure for r in records] == [None, *[FAILURE.failure] * 2, None]
    assert script.gates == [None, 0.4, 0.4]


def test_a_failure_in_stage1_is_told_by_its_stage0(tmp_path: Path) -> None:
    evaluations = [success(0.4), HALF, success(0.3, 0.2)]
    script, records = play(tmp_path, distinct(), evaluations.__getitem__, budget=3)
    assert script.told == [0.4, 0.8, 0.3]
    assert script.gates == [None, 0.4, statistics.fmean([0.4, 0.8])]
    (run,) = tmp_path.iterdir()
    ranking = Study.open(run, read_only=True).ranking()
    assert [record.index for record in ranking] == [2, 0]
    assert [record.score is None for record in records] == [False, True, False]


def test_seconds_add_up_over_resumes(tmp_path: Path) -> None:
    play(tmp_path, distinct(), lambda i: success(0.4), budget=1)
    (run,) = tmp_path.iterdir()
    for budget in (2, 3):
        genotypes = itertools.islice(distinct(), budget - 1, None)
        script = Script(genotypes, lambda i: success(0.4))
        with Study.open(run) as study:
            sampling.run(study, SPACE, script, script, budget, Console(quiet=True))
            checkpoint = study.load_checkpoint()
            assert checkpoint is not None
            assert checkpoint["seconds"]["encode"] == 1.5 * budget
            assert checkpoint["budget"] == budget


def test_five_failures_in_a_row_stop(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as caught:
        play(tmp_path, distinct(), lambda i: FAILURE if i else success(0.4), budget=99)
    assert str(caught.value) == (
        "the last 5 candidates failed, the last one: stage0: out of memory (fake); lower "
        "the learning rates"
    )
    (run,) = tmp_path.iterdir()
    assert len(records_of(run)) == 6


def test_a_hundred_duplicates_in_a_row_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    same = next(distinct())
    with pytest.raises(RuntimeError) as caught:
        play(tmp_path, iter([same] * 200), lambda i: success(0.4), budget=2)
    assert str(caught.value) == (
        "the last 100 architectures repeat earlier ones: the strategy has converged; take the best "
        "one found, or let it explore more (--ppo.ent-coef)"
    )
    (run,) = tmp_path.iterdir()
    assert len(records_of(run)) == 101


def test_edited_records_are_noticed(tmp_path: Path) -> None:
    play(tmp_path, distinct(), lambda i: success(0.4), budget=2)
    (run,) = tmp_path.iterdir()
    (run / "checkpoint" / "state.pt").unlink()
    script = Script(iter([next(distinct())] * 2), lambda i: success(0.4))
    with (
        Study.open(run) as study,
        pytest.raises(RuntimeError, match="record 1 is not what the strategy asked for"),
    ):
        sampling.run(study, SPACE, script, script, 2, Console(quiet=True))
