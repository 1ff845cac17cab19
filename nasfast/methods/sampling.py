"""The search loop of strategies that are told rewards: ask, evaluate, record, tell."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Generic, Protocol, TypeVar

from rich.console import Console

from nasfast.cli import say
from nasfast.evaluator import derive_seed
from nasfast.records import Evaluation, Record
from nasfast.spaces.base import Genotype, Space
from nasfast.strategies import Strategy
from nasfast.study import Study
from nasfast.training.loop import Runtime

G = TypeVar("G", bound=Genotype)
G_in = TypeVar("G_in", bound=Genotype, contravariant=True)

FEEDBACK = "stage0"
"""The stage whose reward the strategy learns from, for every candidate: all have passed it, so it
is one scale. A later stage only ranks."""
_MAX_FAILURES = 5
_MAX_DUPLICATES = 100


class Evaluator(Protocol[G_in]):
    """Genotype to evaluation: a pure function of genotype, index and its own configuration."""

    @property
    def seed(self) -> int: ...

    @property
    def inputs(self) -> Mapping[str, str]:
        """SHA-256 of everything that was read."""

    @property
    def runtime(self) -> Runtime: ...

    @property
    def remedy(self) -> str:
        """What to change where candidates fail."""

    @property
    def seconds(self) -> Mapping[str, float]:
        """Wall time of the preparation, by step."""

    def __call__(self, genotype: G_in, index: int, gate: float | None) -> Evaluation: ...


@dataclass(frozen=True)
class SamplingSearch(Generic[G]):
    """Candidates one after the other, asked of a strategy until the budget is spent."""

    space: Space[G]
    strategy: Strategy[G]
    evaluator: Evaluator[G]
    budget: int

    @property
    def inputs(self) -> Mapping[str, str]:
        return self.evaluator.inputs

    @property
    def runtime(self) -> Runtime:
        return self.evaluator.runtime

    @property
    def environment(self) -> Mapping[str, object]:
        return {"feedback": FEEDBACK}

    @property
    def more(self) -> str:
        return f"--budget {2 * self.budget}"

    def run(self, study: Study, console: Console) -> None:
        """Ask and evaluate from where the study stands to the end."""
        run(study, self.space, self.strategy, self.evaluator, self.budget, console)


def run(
    study: Study,
    space: Space[G],
    strategy: Strategy[G],
    evaluator: Evaluator[G],
    budget: int,
    console: Console,
) -> None:
    """Ask, evaluate, record, tell, until ``budget`` candidates are evaluated.

    After a crash the strategy continues from its checkpoint; a record that the checkpoint has not
    seen is told again, not evaluated again.

    Raises:
        RuntimeError: the last candidates all failed, or all repeated earlier ones.
    """
    checkpoint = study.load_checkpoint()
    told, encode, controller = 0, evaluator.seconds["encode"], 0.0
    if checkpoint is not None:
        told, controller = checkpoint["told"], checkpoint["seconds"]["controller"]
        encode += checkpoint["seconds"]["encode"]
        strategy.load_state_dict(checkpoint["strategy"])
    first = {_key(r.canonical): r for r in reversed(study.records) if r.duplicate_of is None}
    while told < len(study.records) or _evaluated(study) < budget:
        start = time.perf_counter()
        genotype = strategy.ask()
        controller += time.perf_counter() - start
        if told < len(study.records):
            record = study.records[told]
            if space.from_json(record.genotype) != genotype:
                raise RuntimeError(
                    f"{study.path}: record {told} is not what the strategy asked for; the records "
                    "or the checkpoint were edited, start a new run"
                )
        else:
            canonical = genotype.canonical().to_json()
            earlier = first.get(_key(canonical))
            if earlier:
                evaluation = earlier.evaluation
            else:
                with console.status(f"training candidate {_evaluated(study) + 1} of {budget}"):
                    evaluation = evaluator(genotype, told, _gate(study))
            record = Record(
                index=told,
                genotype=genotype.to_json(),
                canonical=canonical,
                seed=derive_seed(evaluator.seed, told),
                evaluation=evaluation,
                duplicate_of=earlier.index if earlier else None,
                time=datetime.now(UTC).isoformat(timespec="seconds"),
            )
            study.append(record)
            first.setdefault(_key(canonical), record)
            _print_record(study, record, budget, console)
        start = time.perf_counter()
        strategy.tell(genotype, record.evaluation.rewards.get(FEEDBACK))
        controller += time.perf_counter() - start
        told += 1
        study.save_checkpoint(
            {
                "told": told,
                "strategy": strategy.state_dict(),
                "seconds": {"encode": encode, "controller": controller},
                "budget": budget,
            }
        )
        _check_progress(study, evaluator.remedy)


def _key(canonical: dict[str, object]) -> str:
    return repr(sorted(canonical.items()))


def _fresh(study: Study) -> list[Evaluation]:
    return [r.evaluation for r in study.records if r.duplicate_of is None]


def _evaluated(study: Study) -> int:
    return len(_fresh(study))


def _gate(study: Study) -> float | None:
    """Running mean of the stage-0 rewards so far (section 3.3: a candidate must beat it)."""
    rewards = [e.rewards[FEEDBACK] for e in _fresh(study) if FEEDBACK in e.rewards]
    return statistics.fmean(rewards) if rewards else None


def _check_progress(study: Study, remedy: str) -> None:
    failures = [e.failure for e in _fresh(study)[-_MAX_FAILURES:]]
    if len(failures) == _MAX_FAILURES and all(failures):
        raise RuntimeError(
            f"the last {_MAX_FAILURES} candidates failed, the last one: {failures[-1]}; {remedy}"
        )
    if all(r.duplicate_of is not None for r in study.records[-_MAX_DUPLICATES:]):
        raise RuntimeError(
            f"the last {_MAX_DUPLICATES} architectures repeat earlier ones: the strategy has "
            "converged; take the best one found, or let it explore more (--ppo.ent-coef)"
        )


def _print_record(study: Study, record: Record, budget: int, console: Console) -> None:
    evaluation = record.evaluation
    place = f"[{_evaluated(study):>{len(str(budget))}}/{budget}]"
    if record.duplicate_of is not None:
        say(console, f"{place} repeats architecture {record.duplicate_of}")
        return
    rewards = "  ".join(f"{stage} {reward:.4f}" for stage, reward in evaluation.rewards.items())
    outcome = f"failed: {evaluation.failure}" if evaluation.failure else rewards
    mark = "  best so far" if study.best is record else ""
    say(
        console,
        f"{place} {outcome:<32} {evaluation.params / 1e6:.2f} M params  "
        f"{sum(evaluation.seconds.values()):5.1f} s{mark}",
    )
