"""What a search found, as one self-contained HTML page."""

from __future__ import annotations

import itertools
import json
import shlex
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from xml.etree.ElementTree import Element, tostring

from nasfast.report.base import MethodReport
from nasfast.report.charts import COLORS, Chart, line_chart, sample
from nasfast.report.correlation import correlation
from nasfast.report.fronts import fronts
from nasfast.report.html import element, legend, legend_key, table, terms
from nasfast.report.numbers import cost_label, cost_text, duration, number
from nasfast.report.predictions import predictions
from nasfast.report.ranking import Stage, genotype_text, metric_text, ranking_table, stages
from nasfast.report.trainings import trainings
from nasfast.runs.records import Record
from nasfast.runs.study import Study
from nasfast.utils.files import atomic_write
from nasfast.utils.locks import writing

__all__ = ["write_report"]

MAX_ROWS = 100  # of the table of architectures; records.jsonl has them all

_PATIENCE = 60.0
"""Seconds to wait for another process that writes the page, which takes one or two."""


def write_report(study: Study, hook: MethodReport, *, baseline: Study | None = None) -> Path:
    """Write report.html into the run directory and return its path.

    Args:
        hook: the method's part.
        baseline: a search of the same budget to compare with, usually a random one.
    """
    path = study.path / "report.html"
    with writing(path, _PATIENCE):  # the last to write has read what the others wrote
        atomic_write(path, _page(study, hook, baseline))
    return path


def _page(study: Study, hook: MethodReport, baseline: Study | None) -> str:
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", f"{study.path.name} - nasfast"),
        element("style", (files("nasfast.report") / "style.css").read_text("utf-8")),
    )
    page = element("html", head, element("body", *_parts(study, hook, baseline)), lang="en")
    return "<!doctype html>\n" + tostring(page, encoding="unicode", method="html")


@dataclass(frozen=True)
class _Summary:
    candidates: int
    evaluated: int
    failed: int
    stopped: int
    beyond: int
    """Proposals that were rejected for their costs."""
    invalid: int
    """Proposals that were no network."""
    seconds: dict[str, float]
    """By step: of the search itself, "seconds" of the checkpoint such as {"controller": 4.2}, then
    of the records."""

    @classmethod
    def of(cls, study: Study) -> _Summary:
        fresh = [record for record in study.records if record.duplicate_of is None]
        spent: Counter[str] = Counter((study.load_checkpoint() or {}).get("seconds", {}))
        for record in fresh:
            spent.update(record.evaluation.seconds)
        rejected = [costs for record in study.records for costs in record.rejected]
        return cls(
            candidates=len(study.records),
            evaluated=len(fresh),
            failed=sum(record.evaluation.failure is not None for record in fresh),
            stopped=sum(record.evaluation.stopped is not None for record in fresh),
            beyond=sum(map(bool, rejected)),
            invalid=len(rejected) - sum(map(bool, rejected)),
            seconds=dict(spent),
        )

    def facts(self) -> dict[str, str]:
        return {
            "candidates": str(self.candidates),
            "evaluated": str(self.evaluated),
            "duplicates": str(self.candidates - self.evaluated),
            "failed": str(self.failed),
            **({"stopped early": str(self.stopped)} if self.stopped else {}),
            **({"beyond the limits": str(self.beyond)} if self.beyond else {}),
            **({"proposals that were no network": str(self.invalid)} if self.invalid else {}),
            "time, all workers": duration(sum(self.seconds.values())),
        }


def _parts(study: Study, hook: MethodReport, baseline: Study | None) -> list[Element]:
    summary, best, records = _Summary.of(study), study.best, study.records
    span = "nothing evaluated yet"
    if records:
        first, last = (record.time[:16].replace("T", " ") for record in (records[0], records[-1]))
        span = f"{first} to {last} UTC"
    parts = [element("header", element("h1", study.path.name), element("p", span))]
    if best is not None:
        parts.append(_tiles(_facts(study, best, hook), "tiles hero"))
    parts.append(_tiles(summary.facts(), "tiles"))
    found = [*hook.sections(study)]
    parts += [
        _section(each.title, each.content, class_="warning") for each in found if each.warning
    ]
    if records:
        content = [*_progress(study, baseline), _terms(records, hook)]
        parts.append(_section("Reward over the search", content))
    if summary.stopped:
        parts.append(_section("Stopped early", _stopping(records)))
    if baseline is not None:
        parts.append(_section("Comparison", [_comparison(study, baseline)]))
    drawn = hook.architecture(best) if best else ()
    trained = itertools.chain(predictions(study, hook), trainings(study, hook))
    plain = (section for section in found if not section.warning)
    more = itertools.chain(correlation(study), trained, drawn, plain)
    parts += [_section(section.title, section.content) for section in more]
    if content := fronts(study):
        parts.append(_section("Reward against cost", content))
    if best is not None:
        first = "best" if study.ranks_by == "score" else "last"
        parts.append(_section(f"Architectures, {first} first", _ranking(study, hook)))
    if summary.beyond:
        parts.append(_section("Rejected, beyond the limits", _rejections(records)))
    if summary.failed:
        parts.append(_section("Failures", [_failures(records)]))
    if sum(summary.seconds.values()) > 0:
        parts.append(_section("Where the time went", _time(summary.seconds)))
    config = (study.path / "config.toml").read_text()
    return [
        *parts,
        _section("Continue, or run again", _commands(study)),
        _section("Configuration", [element("pre", config or "empty")]),
        _section("Environment", [table((), _flat(study.env), "facts")]),
    ]


def _section(title: str, content: Iterable[Element], **attributes: str) -> Element:
    return element("section", element("h2", title), *content, **attributes)


def _tiles(facts: Mapping[str, str], kind: str) -> Element:
    tiles = (
        element("div", element("dt", name), element("dd", value)) for name, value in facts.items()
    )
    return element("dl", *tiles, class_=kind)


def _terms(records: Sequence[Record], hook: MethodReport) -> Element:
    """Of the method's terms those that the page uses."""
    used = {"reward"}
    for record in records:
        evaluation = record.evaluation
        used |= evaluation.rewards.keys()
        used.update(*evaluation.metrics.values())
        if evaluation.gate is not None:
            used.add("gate")
    return terms({word: meaning for word, meaning in hook.terms.items() if word.lower() in used})


def _facts(study: Study, best: Record, hook: MethodReport) -> dict[str, str]:
    evaluation, stage = best.evaluation, best.evaluation.last_stage
    kind = "best" if study.ranks_by == "score" else "last"
    reward = {f"{kind} reward, {stage}": number(evaluation.rewards[stage])} if stage else {}
    costs = {cost_label(name): cost_text(name, value) for name, value in evaluation.costs.items()}
    return reward | {hook.metric[1]: metric_text(best, hook)} | costs


def _comparison(study: Study, baseline: Study) -> Element:
    both = (study, baseline)
    columns = [_Summary.of(each).facts() for each in both]
    for stage in stages([*study.records, *baseline.records]):
        last = any(each.ranks_by == "last" and stage.passed(each.records) for each in both)
        for column, each in zip(columns, both, strict=True):
            rewards = [reward for _, reward in _counted(stage, each)]
            if last:
                column[f"last {stage.label} reward"] = number(rewards[-1] if rewards else None)
            else:
                column[f"best {stage.label} reward"] = number(max(rewards, default=None))
            mean = statistics.fmean(rewards) if rewards else None
            column[f"mean {stage.label} reward"] = number(mean)
    mine, theirs = columns  # which have counts only where they are not 0
    rows = [(name, mine.get(name, "0"), theirs.get(name, "0")) for name in mine | theirs]
    return table(("", study.path.name, baseline.path.name), rows, "facts")


def _stopping(records: Sequence[Record]) -> list[Element]:
    """Chart of the scores at the rungs, its legend, and what was done with those that were low."""
    fresh = [record for record in records if record.duplicate_of is None]
    rungs = dict.fromkeys(rung for record in fresh for rung in record.evaluation.rungs)
    colors = {rung: f"c{i % COLORS}" for i, rung in enumerate(rungs)}
    scores = [
        record.evaluation.rewards[rung] for record in fresh for rung in record.evaluation.rungs
    ]
    chart = Chart.of(scores, len(records), "candidate", height=220)
    marks = []
    for record in fresh:
        evaluation = record.evaluation
        for rung in evaluation.rungs:
            score = evaluation.rewards[rung]
            text, color = f"architecture {record.index}: {rung} {number(score)}", colors[rung]
            if evaluation.stopped is not None and rung == evaluation.last_stage:
                color += " hollow"
                text += f", below {number(evaluation.stopped['gate'])}: stopped"
            place = {"cx": f"{chart.x(record.index):.1f}", "cy": f"{chart.y(score):.1f}", "r": 3.5}
            marks.append(element("circle", element("title", text), class_=color, **place))
    epochs = Counter(e for r in fresh if (e := r.evaluation.stopped_after) is not None)
    counts = ", ".join(f"{count} after epoch {epoch}" for epoch, count in sorted(epochs.items()))
    keys = [legend_key(rung, sample(color)[1]) for rung, color in colors.items()]
    hollow = element("circle", cx=7, cy=5, r=3, class_="c0 hollow")
    return [
        chart.drawn(marks, "scores at the rungs over candidates"),
        legend(*keys, legend_key("hollow: stopped there", hollow)),
        element(
            "p",
            f"Stopped: {counts}. Their score was below the quantile --stage0.stop-early of those "
            "that earlier candidates had after the same epoch. Strategy and gate were given an "
            "estimate of the reward, made from the finished candidates; it ranks nothing.",
        ),
    ]


def _ranking(study: Study, hook: MethodReport) -> list[Element]:
    more = len(study.ranking()) - MAX_ROWS
    content = [table(*ranking_table(study, hook, MAX_ROWS), "numbers")]
    if more > 0:
        content.append(element("p", f"{more} more stand in records.jsonl."))
    return content


def _rejections(records: Sequence[Record]) -> list[Element]:
    """How many proposals before each record, and what their costs were that exceeded a limit."""
    beyond: dict[str, list[float]] = {}
    for costs in itertools.chain.from_iterable(record.rejected for record in records):
        for name, value in costs.items():
            beyond.setdefault(name, []).append(value)
    rows = []
    for name, values in beyond.items():
        spread = (min(values), statistics.median(values), max(values))
        rows.append((cost_label(name), str(len(values)), *(cost_text(name, v) for v in spread)))
    counts = [(record.index, sum(map(bool, record.rejected))) for record in records]
    return [
        element("p", "Proposals that were not trained and are not of the budget."),
        table(("above the limit of", "proposals", "least", "median", "most"), rows, "numbers"),
        *line_chart({"proposals rejected before it": counts}, len(records), "candidate"),
    ]


def _failures(records: Sequence[Record]) -> Element:
    rows = [
        (str(record.index), record.evaluation.failure, genotype_text(record))
        for record in records
        if record.evaluation.failure is not None and record.duplicate_of is None
    ]
    return table(("index", "cause", "genotype"), rows, "failures")


def _time(seconds: Mapping[str, float]) -> list[Element]:
    """One bar of the total time, split by step, and its legend."""
    total = sum(seconds.values())
    bars, keys, start = [], [], 0.0
    for i, (step, spent) in enumerate(seconds.items()):
        name, color = step.replace("_", " "), f"c{i % COLORS}"
        share = 1000 * spent / total
        title = element("title", f"{name}: {duration(spent)}")
        place = {"x": f"{start:.2f}", "y": 0, "width": f"{share:.2f}", "height": 28}
        bars.append(element("rect", title, class_=color, **place))
        text = f"{name} {duration(spent)} ({spent / total:.1%})"
        keys.append(legend_key(text, element("rect", width=14, height=10, class_=color)))
        start += share
    bar = element(
        "svg",
        *bars,
        viewBox="0 0 1000 28",
        preserveAspectRatio="none",
        class_="bar",
        role="img",
        aria_label="time by step",
    )
    return [bar, legend(*keys)]


def _commands(study: Study) -> list[Element]:
    commands = {"Continue": f"nasfast search --resume {shlex.quote(str(study.path))}"}
    again = study.env.get("command")
    if again:
        commands["Run again"] = again if isinstance(again, str) else shlex.join(again)
    return [
        element("p", f"{name}: ", element("code", command)) for name, command in commands.items()
    ]


def _progress(study: Study, baseline: Study | None) -> list[Element]:
    """Chart of reward over candidates or epochs, and its legend."""
    records, others = study.records, baseline.records if baseline else ()
    everything = [*records, *others]
    values = [
        value
        for record in everything
        for value in (*record.evaluation.stages.values(), record.evaluation.gate)
        if value is not None
    ]
    count = max((record.index for record in everything), default=0) + 1
    epochs = study.ranks_by == "last"
    chart = Chart.of(values, count, "epoch" if epochs else "candidate", first=int(epochs))
    marks: list[Element] = []
    keys: list[Element] = []
    if baseline is not None:
        feedback = {(record.phase, record.evaluation.feedback) for record in others}
        for stage in stages(others):
            if (stage.phase, stage.name) in feedback:
                marks += _series(chart, baseline, stage, "baseline")
                text = f"{baseline.path.name}, {stage.label}"
                keys.append(legend_key(text, *sample("baseline")))
    gates = [
        (record.index, record.evaluation.gate)
        for record in records
        if record.evaluation.gate is not None and record.duplicate_of is None
    ]
    if gates:
        marks.append(chart.steps(gates, "gate"))
        keys.append(legend_key("gate of the first stage", sample("gate")[0]))
    for i, stage in enumerate(stages(records)):
        color = f"c{i % COLORS}"
        marks += _series(chart, study, stage, color)
        line = "the last epoch is the result" if epochs else "line: best so far"
        keys.append(legend_key(f"{stage.label}, {line}", *sample(color)))
    if any(record.evaluation.failure is not None for record in records):
        marks += _crosses(chart, records)
        cross = element("path", d="M3 1l8 8m0 -8l-8 8", class_="failed")
        keys.append(legend_key("failed", cross))
    return [chart.drawn(marks, "reward over candidates"), legend(*keys)]


def _series(chart: Chart, study: Study, stage: Stage, kind: str) -> list[Element]:
    """A dot per reward of one stage, hollow for duplicates, and a line: the best so far, or each
    reward where the last one counts."""
    records, counted = study.records, _counted(stage, study)
    indices = [record.index for record, _ in counted]
    rewards = [reward for _, reward in counted]
    marks = []
    if counted and study.ranks_by == "last":
        marks = [chart.line(list(zip(indices, rewards, strict=True)), kind)]
    elif counted:
        best = list(itertools.accumulate(rewards, max))
        end = max(record.index for record in records if record.phase == stage.phase)
        marks = [chart.steps([*zip(indices, best, strict=True), (end, best[-1])], kind)]
    for record, reward in stage.passed(records):
        text = f"architecture {record.index}: {stage.label} reward {number(reward)}"
        if record.duplicate_of is not None:
            text += f", duplicate of {record.duplicate_of}"
        hollow = "" if record.duplicate_of is None else " hollow"
        place = {"cx": f"{chart.x(record.index):.1f}", "cy": f"{chart.y(reward):.1f}", "r": 3.5}
        marks.append(element("circle", element("title", text), class_=kind + hollow, **place))
    return marks


def _crosses(chart: Chart, records: Sequence[Record]) -> list[Element]:
    """A cross at the bottom for each failure."""
    marks = []
    for record in records:
        if record.evaluation.failure is not None:
            text = f"architecture {record.index} failed: {record.evaluation.failure}"
            corner = f"{chart.x(record.index) - 4:.1f} {chart.height - chart.bottom - 11}"
            path = f"M{corner}l8 8m0 -8l-8 8"
            marks.append(element("path", element("title", text), d=path, class_="failed"))
    return marks


def _counted(stage: Stage, study: Study) -> list[tuple[Record, float]]:
    """Records and rewards of a stage. Duplicates repeat an evaluation, but for those of a search by
    gradient, which derived an architecture again from other weights."""
    found = stage.passed(study.records)
    return [pair for pair in found if study.ranks_by == "last" or pair[0].duplicate_of is None]


def _flat(mapping: Mapping[str, object], prefix: str = "") -> list[tuple[str, str]]:
    """Nested mappings as rows of dotted name and value."""
    rows = []
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((prefix + key, value if isinstance(value, str) else json.dumps(value)))
    return rows
