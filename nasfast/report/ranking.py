"""What records have in common, and the table of the best of them."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from nasfast.report.base import MethodReport
from nasfast.report.numbers import cost_label, cost_text, duration, number
from nasfast.runs.records import Record
from nasfast.runs.study import Study

__all__ = ["Stage", "genotype_text", "metric_text", "ranking_table", "stages", "terminal_table"]


@dataclass(frozen=True)
class Stage:
    """One stage of one phase of a search."""

    phase: int
    name: str
    label: str

    def passed(self, records: Sequence[Record]) -> list[tuple[Record, float]]:
        """Records that passed it, with their rewards."""
        return [
            (record, record.evaluation.rewards[self.name])
            for record in records
            if record.phase == self.phase and self.name in record.evaluation.rewards
        ]


def stages(records: Sequence[Record]) -> list[Stage]:
    """Those of all records, in their order, without rungs; labels name the phase where there are
    several."""
    found = dict.fromkeys(
        (record.phase, name)
        for record in sorted(records, key=lambda record: record.phase)
        for name in record.evaluation.stages
    )
    several = len({phase for phase, _ in found}) > 1
    return [
        Stage(phase, name, f"phase {phase + 1}, {name}" if several else name)
        for phase, name in found
    ]


def metric_text(record: Record, hook: MethodReport) -> str:
    """The method's metric, of the last stage passed."""
    metrics = record.evaluation.metrics.get(record.evaluation.last_stage or "", {})
    return number(metrics.get(hook.metric[0]))


def genotype_text(record: Record) -> str:
    """The published list form: the values of the genotype without the name of its space."""
    values = [value for key, value in record.genotype.items() if key != "space"]
    return json.dumps(values, separators=(",", ":"))


def ranking_table(
    study: Study, hook: MethodReport, top: int, hidden: Collection[str] = ()
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the `top` best architectures, best first, without the costs that are
    hidden; the genotype comes last. Where there is a front, a star marks who is on it; where costs
    have weights, the value is the reward less these."""
    ranking = study.ranking()
    front = {record.index for record in study.front()} if study.objectives.several else set()
    columns = stages(study.records)
    names = dict.fromkeys(stage.name for stage in columns)
    several = len({stage.phase for stage in columns}) > 1
    costs = dict.fromkeys(cost for record in ranking for cost in record.evaluation.costs)
    costs = {cost: None for cost in costs if cost not in hidden}
    rows, shown = [], ranking[:top]
    stopped = any(record.evaluation.stopped for record in shown)
    weighted = study.objectives.weights is not None
    for rank, record in enumerate(shown, start=1):
        evaluation = record.evaluation
        rows.append(
            [
                str(rank),
                f"{record.index} *" if record.index in front else str(record.index),
                *([str(record.phase + 1)] if several else []),
                *([_stopped_text(record)] if stopped else []),
                *(number(evaluation.rewards.get(name)) for name in names),
                metric_text(record, hook),
                *([number((study.score(record) or (0.0,))[-1])] if weighted else []),
                *(cost_text(cost, evaluation.costs.get(cost)) for cost in costs),
                duration(sum(evaluation.seconds.values())),
                genotype_text(record),
            ]
        )
    more = [*(["phase"] if several else []), *(["stopped"] if stopped else [])]
    head = ["rank", "index", *more, *names, hook.metric[1]]
    head += ["value"] if weighted else []
    return [*head, *map(cost_label, costs), "time", "genotype"], rows


def _stopped_text(record: Record) -> str:
    epoch = record.evaluation.stopped_after
    return "-" if epoch is None else f"after epoch {epoch}"


def terminal_table(study: Study, hook: MethodReport, top: int = 5) -> Table:
    """The `top` best architectures, for the end of a search on the command line: 80 columns, and
    the winner's genotype below."""
    fresh = [record for record in study.records if record.duplicate_of is None]
    failed = sum(record.evaluation.failure is not None for record in fresh)
    early = sum(record.evaluation.stopped is not None for record in fresh)
    stopped = f", {early} stopped early" if early else ""
    rejected = sum(bool(costs) for record in study.records for costs in record.rejected)
    beyond = f", {rejected} beyond the limits" if rejected else ""
    hidden = {"memory", "predicted_latency"} - set(study.objectives.costs)
    head, rows = ranking_table(study, hook, top, hidden)
    best = study.best
    order = "the best" if study.ranks_by == "score" else "the last first"
    if study.objectives.several:
        order = f"{order}, * on the front of {len(study.front())}"
    caption = f"architecture {best.index}: {genotype_text(best)}" if best is not None else ""
    table = Table(
        title=f"{len(fresh)} evaluated, {failed} failed{stopped}{beyond}; {order}:",
        caption=escape(caption),
        caption_justify="left",
        box=SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    for name in head[:-1]:
        table.add_column(escape(name), justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*map(escape, row[:-1]))
    return table
