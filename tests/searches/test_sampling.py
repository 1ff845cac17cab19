"""The loop of strategies that are told rewards: duplicates, failures, crashes."""

import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import random
import re
import signal
import statistics
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from nasfast.runs.records import Evaluation
from nasfast.runs.study import Study
from nasfast.searches.halving import estimate
from nasfast.searches.limits import Limit, Limits
from nasfast.searches.sampling import Phase, SamplingSearch, SamplingSettings
from nasfast.spaces.fast_nas import Cell, FastNASSpace
from nasfast.training.loop import Runtime
from nasfast.utils.errors import NothingFoundError, UserError
from nasfast.workers import WorkerConfig

SPACE = FastNASSpace()
COSTS = {"params": 1, "macs": 1}
NONE = Limits()
QUIET = Console(quiet=True)


def success(stage0, stage1=None):
    rewards = {"stage0": stage0} | ({} if stage1 is None else {"stage1": stage1})
    return Evaluation(rewards, {stage: {} for stage in rewards}, COSTS, None, {}, "stage0")


HALF = dataclasses.replace(success(0.8), failure="stage1: out of memory (fake)")
FAILURE = Evaluation({}, {}, COSTS, None, {}, "stage0", "stage0: out of memory (fake)")


def size(genotype):
    """Costs that a genotype has here: its operations."""
    ops = [op for layer in genotype.cell.layers for op in layer[2:]]
    return {"params": 1000 * sum(ops), "macs": max(ops)}


def untimed(records):
    return [dataclasses.replace(record, time="") for record in records]


def records_of(run):
    return [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]


class Script:
    """Strategy that asks for given genotypes, and evaluator that returns given evaluations."""

    seed = 5
    feedback = "stage0"
    runtime = Runtime(torch.device("cpu"))
    remedy = "lower the learning rates"

    @property
    def seconds(self):
        return {"encode": 1.5}

    def __init__(self, genotypes, evaluate):
        self.inputs = {}
        self.genotypes, self.evaluate = genotypes, evaluate
        self.asked = 0
        self.told = []
        self.rejected = []
        self.evaluated = []
        self.gates = []

    def ask(self):
        self.asked += 1
        return next(self.genotypes)

    def tell(self, genotype, reward):
        self.told.append(reward)

    def reject(self, genotype):
        self.told.append("rejected")
        self.rejected.append(genotype)

    def state_dict(self):
        return {"asked": self.asked}

    def load_state_dict(self, state):
        """The given genotypes are those of the whole search."""
        self.asked = state["asked"]
        self.genotypes = itertools.islice(self.genotypes, self.asked, None)

    def costs(self, genotype):
        return size(genotype)

    def __call__(self, genotype, index, gates):
        evaluation = self.evaluate(index)
        self.evaluated.append(index)
        self.gates.append(gates.get(self.feedback))
        return evaluation


class Halving(Script):
    """The given scores at a rung, which may stop a candidate, and twice as much at the end."""

    def __call__(self, genotype, index, gates):
        self.gates.append(gates)
        score = self.evaluate(index)
        rewards = {"stage0.1": score}
        if score >= gates.get("stage0.1", 0.0):
            rewards |= {"stage0": 2 * score}
        return Evaluation(rewards, {}, COSTS, gates.get("stage0"), {}, "stage0")


def play(
    root,
    genotypes,
    evaluate,
    budget,
    batch=1,
    scripts=None,
    limits=NONE,
    console=QUIET,
    make=Script,
    **more,
):
    """A new search, or the one in `root` continued; its script joins `scripts`."""
    script = make(genotypes, evaluate)
    if scripts is not None:
        scripts.append(script)
    runs = list(root.glob("*"))
    opened = Study.open(*runs) if runs else Study.create(root, "segmentation", "script", {}, {})
    with opened as study:
        with contextlib.suppress(NothingFoundError):
            phase = Phase(SPACE, script, script, budget, batch, limits=limits, **more)
            SamplingSearch(phase).run(study, console)
        return script, study.records


def distinct():
    rng = random.Random(0)
    while True:
        yield SPACE.sample(rng)


def renamed(genotype):
    """The same network with the two branches of the first layer swapped."""
    (p1, p2, o1, o2), *others = genotype.cell.layers
    swap = {2: 3, 3: 2}
    rest = ((swap.get(a, a), swap.get(b, b), c, d) for a, b, c, d in others)
    cell = Cell(genotype.cell.op0, ((p2, p1, o2, o1), *rest))
    return dataclasses.replace(genotype, cell=cell)


def test_duplicates_are_not_trained_again(tmp_path):
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


def test_a_failure_is_recorded_counts_and_is_told_as_none(tmp_path):
    a, b, c = (g for g, _ in zip(distinct(), range(3)))
    script, records = play(
        tmp_path, iter([a, b, b, c]), lambda i: FAILURE if i == 1 else success(0.4), budget=3
    )
    assert script.evaluated == [0, 1, 3]
    assert script.told == [0.4, None, None, 0.4]
    assert [r.evaluation.failure for r in records] == [None, *[FAILURE.failure] * 2, None]
    assert script.gates == [None, 0.4, 0.4]


def test_a_failure_in_stage1_is_told_by_its_stage0(tmp_path):
    evaluations = [success(0.4), HALF, success(0.3, 0.2)]
    script, records = play(tmp_path, distinct(), evaluations.__getitem__, budget=3)
    assert script.told == [0.4, 0.8, 0.3]
    assert script.gates == [None, 0.4, statistics.fmean([0.4, 0.8])]
    (run,) = tmp_path.iterdir()
    ranking = Study.open(run, read_only=True).ranking()
    assert [record.index for record in ranking] == [2, 0]
    assert [record.score is None for record in records] == [False, True, False]


def test_seconds_add_up_over_resumes(tmp_path):
    for budget in (1, 2, 3):
        play(tmp_path, distinct(), lambda i: success(0.4), budget)
        (run,) = tmp_path.iterdir()
        checkpoint = Study.open(run, read_only=True).load_checkpoint()
        assert checkpoint is not None
        assert checkpoint["seconds"]["encode"] == 1.5 * budget
        assert checkpoint["budget"] == budget


@pytest.mark.parametrize(
    ("genotypes", "evaluate", "count", "text"),
    [
        (
            distinct(),
            lambda i: FAILURE if i else success(0.4),
            6,
            "the last 5 candidates failed, the last one: stage0: out of memory (fake); lower the "
            "learning rates",
        ),
        (
            itertools.repeat(next(distinct())),
            lambda i: success(0.4),
            101,
            "the last 100 architectures repeat earlier ones: the strategy has converged; take the "
            "best one found, or let it explore more (--ppo.ent-coef)",
        ),
    ],
)
def test_no_progress_stops(genotypes, evaluate, count, text, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    with pytest.raises(UserError) as caught:
        play(tmp_path, genotypes, evaluate, budget=99)
    assert str(caught.value) == text
    (run,) = tmp_path.iterdir()
    assert len(records_of(run)) == count


@pytest.mark.parametrize(
    ("budget", "counted"),
    [
        (3, "all of the 3 candidates failed (2 x stage0: out of memory (fake), 1 x stage1: out of"),
        (9, "all of the 5 candidates failed (4 x stage0: out of memory (fake), 1 x stage1: out of"),
    ],
)
def test_nothing_but_failures(budget, counted, tmp_path):
    """All of them, or the first five."""
    with Study.create(tmp_path, "segmentation", "failures", {}, {}) as study:
        script = Script(distinct(), lambda i: HALF if i == 1 else FAILURE)
        with pytest.raises(NothingFoundError) as caught:
            SamplingSearch(Phase(SPACE, script, script, budget)).run(study, Console(quiet=True))
        assert str(caught.value) == (
            f"search: {counted} memory (fake)); lower the learning rates, in a new run"
        )
        script = Script(distinct(), lambda i: FAILURE)
        with pytest.raises(NothingFoundError, match="all of the "):  # again when it is resumed
            SamplingSearch(Phase(SPACE, script, script, budget)).run(study, Console(quiet=True))


def test_a_smaller_budget_is_mentioned(tmp_path, capsys):
    play(tmp_path, distinct(), lambda i: success(0.4), budget=3)
    script = Script(distinct(), lambda i: success(0.4))
    (run,) = tmp_path.iterdir()
    search = SamplingSearch(Phase(SPACE, script, script, 2))
    with Study.open(run) as study:
        search.run(study, Console())
        assert len(study.records) == 3
        assert (study.load_checkpoint() or {})["budget"] == 3
    assert capsys.readouterr().out == (
        "budget   3 instead of 2: so many candidates have been evaluated, and none is added\n"
    )
    assert search.more == "--budget 6"


def test_edited_records_are_noticed(tmp_path):
    play(tmp_path, distinct(), lambda i: success(0.4), budget=2)
    (run,) = tmp_path.iterdir()
    (run / "checkpoint" / "state.pt").unlink()
    with pytest.raises(UserError, match="expected record 1 to be what the strategy asks for, got"):
        play(tmp_path, iter([next(distinct())] * 2), lambda i: success(0.4), budget=2)


def test_records_cut_behind_the_checkpoint(tmp_path):
    _, whole = play(tmp_path, distinct(), lambda i: success(0.1 * i), budget=5, batch=2)
    (run,) = tmp_path.iterdir()
    file, checkpoint = run / "records.jsonl", run / "checkpoint" / "state.pt"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:3]))
    message = (
        f"{file}: expected the 4 records that the checkpoint has seen, got 3; restore it from a "
        f"copy, or remove {checkpoint}: the search then continues from the records"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        play(tmp_path, distinct(), lambda i: success(0.1 * i), budget=5, batch=2)
    checkpoint.unlink()
    script, records = play(tmp_path, distinct(), lambda i: success(0.1 * i), budget=5, batch=2)
    assert script.evaluated == [3, 4]
    assert untimed(records) == untimed(whole)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda state: state.pop("told"), "KeyError: 'told'"),
        (lambda state: state.update(told="x"), "TypeError: '<' not supported between "),
        (lambda state: state.update(phase=3), "IndexError: phase 3"),
        (lambda state: state.update(strategy={}), "KeyError: 'asked'"),
        (lambda state: state.update(seconds=1), "TypeError: "),
    ],
)
def test_a_checkpoint_of_something_else(change, what, tmp_path):
    play(tmp_path, distinct(), lambda i: success(0.4), budget=1)
    (run,) = tmp_path.iterdir()
    path = run / "checkpoint" / "state.pt"
    state = torch.load(path)
    change(state)
    torch.save(state, path)
    message = f"{path}: expected the checkpoint that nasfast wrote there, got another one ({what}"
    remedy = f"; restore it from a copy, or remove {path}: the search then continues from the recor"
    with pytest.raises(UserError, match=f"^{re.escape(message)}.*{re.escape(remedy)}ds$"):
        play(tmp_path, distinct(), lambda i: success(0.4), budget=1)


# ---- batches


def test_a_batch_is_asked_gated_and_told_at_once(tmp_path):
    first, second, third, fourth = (genotype for genotype, _ in zip(distinct(), range(4)))
    asked = [first, second, renamed(second), third, first, fourth]
    script, records = play(
        tmp_path, iter(asked), lambda i: success(0.1 * (i + 1)), budget=4, batch=3
    )
    assert script.evaluated == [0, 1, 3, 5]
    assert [r.duplicate_of for r in records] == [None, None, 1, None, 0, None]
    assert records[2].evaluation == records[1].evaluation
    # the mean of those before the batch
    assert script.gates == [None, None, *[statistics.fmean([0.1, 0.2])] * 2]
    assert script.told == [pytest.approx(x) for x in (0.1, 0.2, 0.2, 0.4, 0.1, 0.6)]


@given(
    batch=st.integers(1, 4),
    budgets=st.lists(st.integers(1, 9), min_size=1, max_size=3, unique=True),
    failing=st.sets(st.integers(0, 20), max_size=3),
    crashes=st.sets(st.integers(0, 20), max_size=3),
    names=st.lists(st.integers(0, 9), min_size=60, max_size=60),
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
def test_a_budget_may_end_in_a_batch_and_grow_and_a_search_may_crash(
    batch, budgets, failing, crashes, names
):
    """In steps or at once: the same candidates, gates and rewards; nothing is evaluated twice."""
    pool = list(itertools.islice(distinct(), 10))
    left = set(crashes)

    def evaluate(index):
        return FAILURE if index in failing else success(0.1 + 0.01 * (7 * index % 11))

    def crash(index):
        if index in left:
            left.remove(index)
            raise KeyboardInterrupt
        return evaluate(index)

    def asked():
        yield from (pool[name] for name in names)
        yield from pool + pool[:4]  # all of them, in the end, and what fills the last batch

    with (
        tempfile.TemporaryDirectory() as whole,
        tempfile.TemporaryDirectory() as steps,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(os, "fsync", lambda descriptor: None)
        last, expected = play(Path(whole), asked(), evaluate, max(budgets), batch)
        scripts = []
        for i, budget in enumerate(budgets):
            while True:
                with contextlib.suppress(KeyboardInterrupt):
                    records = play(Path(steps), asked(), crash, budget, batch, scripts)[1]
                    break
            fresh = [record for record in records if record.duplicate_of is None]
            assert len(fresh) == max(budgets[: i + 1])  # less than was spent stops at once
            assert records[-1].duplicate_of is None
        assert untimed(records) == untimed(expected)
        for name in ("told", "evaluated", "gates"):
            assert [x for script in scripts for x in getattr(script, name)] == getattr(last, name)


# ---- early stopping


def test_what_is_stopped_early_is_told_by_an_estimate(tmp_path, capsys):
    """Which also stands in the mean that gates the next stage, and is the same after a crash."""
    scores = [0.1, 0.4, 0.3, 0.2, 0.22, 0.05, 0.26, 0.3, 0.1]
    usual = {"budget": len(scores), "batch": 3, "make": Halving, "stop_early": 0.5}
    script, records = play(tmp_path / "whole", distinct(), scores.__getitem__, **usual)
    # 3 finished are too few to stop any; of the 6 after two batches the median is 0.21
    assert [r.evaluation.stopped for r in records[:6]] == [None] * 6
    assert script.gates[6]["stage0.1"] == pytest.approx(0.21)
    assert [r.evaluation.stopped is None for r in records[6:]] == [True, True, False]
    assert records[8].evaluation.stopped == pytest.approx({"gate": 0.21, "estimate": 0.2})
    assert script.told == pytest.approx([*(2 * score for score in scores)])
    (run,) = (tmp_path / "whole").iterdir()
    assert [r.index for r in Study.open(run, read_only=True).ranking()][-1] == 8

    def crash(index):
        if index == 8:
            raise KeyboardInterrupt
        return scores[index]

    with pytest.raises(KeyboardInterrupt):
        play(tmp_path / "again", distinct(), crash, **usual)
    more = usual | {"budget": len(scores) + 3, "console": Console()}
    scores += [0.5, 0.01, 0.15]
    script, again = play(tmp_path / "again", distinct(), scores.__getitem__, **more)
    assert untimed(again[:9]) == untimed(records)
    assert script.gates[-1]["stage0"] == statistics.fmean(r.evaluation.told for r in records)
    # the worst of the finished is the least to be told
    assert [r.evaluation.told for r in again[9:]] == pytest.approx([1.0, 0.1, 0.3])
    assert "[11/12] stopped after epoch 1: 0.0100 < 0.2200" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([(0.1, 0.2), (0.3, 0.4)], 0.3),  # the mean is the most
        ([(0.4, 0.3), (0.6, 0.5), (0.2, 0.1)], 0.2),
        ([(0.4, 0.4), (0.6, 0.5)], 0.4),  # the worst is the least
        ([(0.4, 0.5), (0.6, 0.4)], 0.45),  # a line that falls counts for nothing
        ([(0.4, 0.4), (0.4, 0.5)], 0.45),
    ],
)
def test_estimates(pairs, expected):
    assert estimate(0.3, pairs) == pytest.approx(expected)


def test_who_evaluates_is_in_the_environment():
    script = Script(distinct(), lambda i: success(0.4))
    workers = WorkerConfig(2, ("cpu",), 3)
    search = SamplingSearch(Phase(SPACE, script, script, budget=1), workers=workers)
    assert search.environment == {
        "workers": {"workers": 2, "devices": ("cpu",), "threads": 3, "engine": "process"},
    }


# ---- phases


class Sampled(Script):
    """A strategy that samples, and an evaluator whose rewards depend on what came before."""

    def __init__(self, seed, bonus, stop_at=None):
        self.rng = random.Random(seed)
        super().__init__(iter(SPACE.sample(self.rng) for _ in itertools.count()), self.reward)
        self.bonus, self.stop_at = bonus, stop_at

    def reward(self, index):
        if index == self.stop_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return success(0.1 * (7 * index % 5) + self.bonus)


def search_in_phases(root, stop_at=None):
    """Two phases: the second's space is sampled by, and its rewards rest on, the first's best."""

    def second(ranking, folder):
        best = ranking[0]
        assert {record.phase for record in ranking} == {0}
        assert best.score == max(record.score for record in ranking)
        assert len({record.duplicate_of or record.index for record in ranking}) == len(ranking)
        assert folder.name == "phase-1"
        script = Sampled(best.index, 1 + best.evaluation.rewards["stage0"], stop_at)
        return Phase(SPACE, script, script, budget=5, batch=2)

    script = Sampled(0, 0.0, stop_at)
    runs = list(root.glob("*"))
    opened = Study.open(*runs) if runs else Study.create(root, "segmentation", "phases", {}, {})
    with opened as study:
        phase = Phase(SPACE, script, script, budget=6, batch=4)
        SamplingSearch(phase, second).run(study, Console(quiet=True))
        return study.records


@pytest.mark.parametrize("kills", [(0,), (3,), (5,), (6,), (7,), (10,), (2, 5, 6, 9)])
def test_two_phases_killed_and_resumed(tmp_path, kills):
    """At any candidate of both: bit for bit what an uninterrupted search gives."""
    wanted = search_in_phases(tmp_path / "whole")
    assert [record.phase for record in wanted] == [0] * 6 + [1] * 5
    context = multiprocessing.get_context("fork")
    for index in kills:
        process = context.Process(target=search_in_phases, args=(tmp_path / "killed", index))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    records = search_in_phases(tmp_path / "killed")
    assert untimed(records) == untimed(wanted)


@pytest.mark.parametrize("kept", [0, 3, 4, 6, 7, 9, 11])
def test_two_phases_continue_from_records_alone(kept, tmp_path):
    """Where the checkpoint is gone, and perhaps the last records."""
    wanted = search_in_phases(tmp_path)
    (run,) = tmp_path.iterdir()
    (run / "checkpoint" / "state.pt").unlink()
    file = run / "records.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:kept]))
    assert untimed(search_in_phases(tmp_path)) == untimed(wanted)


def test_a_phase_of_failures_has_no_successor(tmp_path):
    script = Script(distinct(), lambda i: FAILURE)
    search = SamplingSearch(Phase(SPACE, script, script, 2), lambda *_: pytest.fail("made"))
    with (
        Study.create(tmp_path, "segmentation", "failures", {}, {}) as study,
        pytest.raises(NothingFoundError, match="all of the 2 candidates failed"),
    ):
        search.run(study, Console(quiet=True))


# ---- limits


LIMITS = SamplingSettings(max_params="20k", max_macs=8).limits


def within(genotype):
    return size(genotype)["params"] <= 20_000 and size(genotype)["macs"] <= 8


def test_what_is_beyond_the_limits_is_neither_evaluated_nor_of_the_budget(tmp_path, capsys):
    asked = list(itertools.islice(distinct(), 400))
    kept = [genotype for genotype in asked if within(genotype)]
    script, records = play(
        tmp_path, iter(asked), lambda i: success(0.1 * i), 5, 2, limits=LIMITS, console=Console()
    )
    assert [record.genotype for record in records] == [g.to_json() for g in kept[:5]]
    assert script.evaluated == [0, 1, 2, 3, 4]  # as if the others did not exist
    sixth = asked.index(kept[5])
    assert [x for x in script.told if x != "rejected"] == [0.1 * i for i in range(4)]
    assert script.asked == sixth + 1
    assert script.rejected == [g for g in asked[:sixth] if not within(g)]  # as soon as asked
    beyond = [LIMITS.exceeded(size(g)) for g in asked[: asked.index(kept[4])] if not within(g)]
    assert [costs for record in records for costs in record.rejected] == beyond
    counts = [len([costs for costs in beyond if name in costs]) for name in ("params", "macs")]
    said = re.findall(
        r"rejected (\d+): (\d+) above --max-params 20k, (\d+) above", capsys.readouterr().out
    )
    assert len(said) == 3  # a line for each batch
    assert min(counts) > 0
    assert [sum(int(line[i]) for line in said) for i in (1, 2)] == counts


class Picky(FastNASSpace):
    """Of whose genotypes those alone are networks that keep to LIMITS."""

    def valid(self, genotype):
        return within(genotype)


def test_what_is_no_network_is_rejected_as_what_is_beyond_the_limits(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("test_sampling.SPACE", Picky())
    asked = list(itertools.islice(distinct(), 400))
    plain = play(tmp_path / "a", iter(asked), lambda i: success(0.1 * i), 5, 2, limits=LIMITS)
    spoken = Console()
    script, records = play(
        tmp_path / "b", iter(asked), lambda i: success(0.1 * i), 5, 2, console=spoken
    )
    assert script.told == plain[0].told
    assert [r.genotype for r in records] == [r.genotype for r in plain[1]]
    assert [len(r.rejected) for r in records] == [len(r.rejected) for r in plain[1]]
    assert not any(costs for record in records for costs in record.rejected)
    assert "rejected" not in capsys.readouterr().out
    never = (genotype for genotype in distinct() if not within(genotype))
    message = (
        "search: expected networks, got 1,000 proposals in a row that are none; start a new run "
        "with --strategy random"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        play(tmp_path / "c", never, lambda i: success(0.4), 1)


@pytest.mark.parametrize("checkpoint", [True, False])
@pytest.mark.parametrize("kept", range(6))
def test_a_search_with_limits_continues_where_it_was_killed(
    kept, checkpoint, tmp_path, monkeypatch
):
    """After any record, with the checkpoint or from the records alone."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    whole, wanted = play(
        tmp_path / "a", distinct(), lambda i: success(0.1 * i), 5, 2, limits=LIMITS
    )

    def killed(index):
        if index == kept:
            raise KeyboardInterrupt
        return success(0.1 * index)

    scripts: list[Script] = []
    with contextlib.suppress(KeyboardInterrupt):
        play(tmp_path / "b", distinct(), killed, 5, 2, scripts, LIMITS)
    (run,) = (tmp_path / "b").iterdir()
    if not checkpoint:
        (run / "checkpoint" / "state.pt").unlink()
        scripts.clear()
    _, records = play(tmp_path / "b", distinct(), lambda i: success(0.1 * i), 5, 2, scripts, LIMITS)
    assert untimed(records) == untimed(wanted)
    assert any(record.rejected for record in records)
    rewards = [told for script in scripts for told in script.told if told != "rejected"]
    assert rewards == [told for told in whole.told if told != "rejected"]


def test_limits_that_nothing_meets(tmp_path):
    limits = SamplingSettings(max_params="1k", max_macs=9).limits
    genotypes = [g for g in itertools.islice(distinct(), 1200) if size(g)["params"] > 1000]
    least = min(size(g)["params"] for g in genotypes[:1000])
    smallest = min(size(g)["macs"] for g in genotypes[:1000])
    message = (
        "search: expected architectures within --max-params 1k and --max-macs 9, got 1,000 in a "
        f"row beyond; the smallest had {least:,} params and {smallest} macs: raise --max-params in "
        "a new run"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        play(tmp_path, iter(genotypes), lambda i: success(0.4), budget=1, limits=limits)


def test_one_limit_is_summarised_in_short():
    limits = Limits((Limit.of("params", "0.3M"),))
    rejected = [limits.exceeded({"params": 300_000 + i, "macs": 5}) for i in (1, 2)]
    assert rejected == [{"params": 300_001}, {"params": 300_002}]
    assert limits.exceeded({"params": 300_000, "macs": 5}) == {}
    assert limits.summary(rejected) == "rejected 2 above --max-params 0.3M"


@pytest.mark.parametrize("name", ["max_params", "max_macs"])
def test_a_limit_that_is_no_count(name):
    message = (
        f"{name}: expected a count such as 300000, 300k, 0.3M or 1.5G, got '0.3X'; correct the"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        SamplingSettings(**{name: "0.3X"})
