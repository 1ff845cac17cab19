"""Whether the search's reward predicts longer training, and what a random search finds."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from xml.etree.ElementTree import Element

from rich.box import SIMPLE_HEAD
from rich.table import Table

from nasfast.report.base import Section
from nasfast.report.charts import Chart, CostChart, sample
from nasfast.report.html import element, legend, legend_key, table
from nasfast.report.numbers import number
from nasfast.runs.correlation import (
    ALL,
    RANDOM,
    CorrelationStudy,
    against_random,
    evaluated,
)
from nasfast.runs.records import Record
from nasfast.runs.study import Study
from nasfast.utils.statistics import best_of_draws

__all__ = ["correlation", "correlation_table"]

HEAD = ("stage", "architectures", "n", "Kendall's tau", "Spearman's rho", "ceiling")


def correlation(study: Study) -> Iterator[Section]:
    """What `nasfast study` found of a run; nothing before that."""
    found = CorrelationStudy.read(study.path)
    if found is None:
        return
    if found.scores():
        yield Section("Does the search's reward predict?", _prediction(study, found))
    control = found.random_search(study)
    if control is not None and control.records:
        yield Section("Against a random search of the same budget", _random(study, control))


def correlation_table(found: CorrelationStudy, study: Study) -> Table:
    """The correlations, for the terminal."""
    made = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for i, name in enumerate(HEAD):
        made.add_column(name, justify="left" if i < 2 else "right", no_wrap=True)
    for row in _rows(found.summary(study)):
        made.add_row(*row)
    return made


def _rows(summary: Mapping[str, object]) -> list[tuple[str, ...]]:
    correlations = summary["correlations"]
    assert isinstance(correlations, list)
    return [
        (
            entry["stage"],
            entry["of"],
            str(entry["architectures"]),
            _estimate(entry["kendall"]),
            _estimate(entry["spearman"]),
            "-" if entry["ceiling"] is None else f"{entry['ceiling']:.2f}",
        )
        for entry in correlations
    ]


def _estimate(estimate: Mapping[str, float | None]) -> str:
    value, low, high = (estimate[name] for name in ("value", "low", "high"))
    return "-" if value is None else f"{value:.2f} [{low:.2f}, {high:.2f}]"


# ---- rewards and later scores


def _prediction(study: Study, found: CorrelationStudy) -> Iterator[Element]:
    scores, records, summary = found.scores(), study.records, found.summary(study)
    stages = dict.fromkeys(stage for i in scores for stage in records[i].evaluation.rewards)
    for stage in stages:
        yield _scatter(stage, records, found, scores)
    yield legend(
        legend_key("among the best of the search", _dot("c0")),
        legend_key("drawn at random", _dot("c1")),
        legend_key("both", _dot("c0"), _dot("c1 ring", 5)),
    )
    seeds, deviation = len(found.seeds), summary["seed_noise"]
    yield element(
        "p",
        f"Across: the reward in the search. Up: {found.label} after longer training, the mean of "
        f"{seeds} seed{'s'[: seeds - 1]}; the bar goes from the worst seed to the best. "
        + (
            f"The seeds of an architecture deviate by {number(deviation)} (standard deviation). "
            if deviation is not None
            else ""
        ),
    )
    yield table(HEAD, _rows(summary), "correlations")
    yield element(
        "p",
        f"In brackets: 95 % intervals, percentiles of a bootstrap over architectures. "
        f'"{ALL}" has more of the best than the search, so its figures are not those of the whole '
        f'search; "{RANDOM}" is a uniform sample of it, whose figures are. Ties are corrected for '
        "(tau-b, mean ranks). The ceiling is the largest correlation that the noise of the seeds "
        "leaves to any reward, the square root of the reliability of the means.",
    )
    if failed := summary["failed"]:
        yield element("p", f"{failed} of {summary['trainings']} trainings failed; left out.")
    yield _architectures(stages, records, found, scores)


def _scatter(
    stage: str,
    records: Sequence[Record],
    found: CorrelationStudy,
    scores: Mapping[int, Sequence[float]],
) -> Element:
    points = {
        i: (records[i].evaluation.rewards[stage], group)
        for i, group in scores.items()
        if stage in records[i].evaluation.rewards
    }
    rewards = [reward for reward, _ in points.values()]
    chart = CostChart.of_costs(
        f"{stage} reward", rewards, [score for _, group in points.values() for score in group]
    )
    marks = []
    for index, (reward, group) in points.items():
        x, mean = chart.x(reward), statistics.fmean(group)
        place = {"cx": f"{x:.1f}", "cy": f"{chart.y(mean):.1f}"}
        color = "c0" if index in found.top else "c1"
        low, high = chart.y(min(group)), chart.y(max(group))
        marks.append(element("path", d=f"M{x:.1f} {low:.1f}V{high:.1f}", class_=f"line {color}"))
        text = f"architecture {index}: reward {number(reward)}, {found.label} {number(mean)}"
        marks.append(element("circle", element("title", text), class_=color, r=4, **place))
        if index in found.top and index in found.sample:
            marks.append(element("circle", class_="c1 ring", r=6.5, **place))
        number_at = {"x": place["cx"], "y": place["cy"], "dx": 9, "dy": 4}
        marks.append(element("text", str(index), **number_at))
    return chart.drawn(marks, f"{found.label} after longer training against the {stage} reward")


def _architectures(
    stages: Mapping[str, None],
    records: Sequence[Record],
    found: CorrelationStudy,
    scores: Mapping[int, Sequence[float]],
) -> Element:
    rows = []
    means = {index: statistics.fmean(group) for index, group in scores.items()}
    for index in sorted(means, key=means.__getitem__, reverse=True):
        group = scores[index]
        deviation = statistics.stdev(group) if len(group) > 1 else None
        chosen = {"best": found.top, "random": found.sample}
        parts = [name for name, members in chosen.items() if index in members]
        rewards = records[index].evaluation.rewards
        rows.append(
            (
                str(index),
                *(number(rewards.get(stage)) for stage in stages),
                number(means[index]),
                number(deviation),
                str(len(group)),
                ", ".join(parts),
            )
        )
    head = ("index", *stages, f"{found.label}, longer", "deviation", "seeds", "chosen as")
    return table(head, rows, "numbers")


# ---- random search


def _random(study: Study, control: Study) -> Iterator[Element]:
    stage = control.records[0].evaluation.feedback
    both = [evaluated(each) for each in (study, control)]
    ours, theirs = (
        [told for record in records if (told := record.evaluation.told) is not None]
        for records in both
    )
    if not ours or not theirs:
        yield element("p", f"One of the two has no {stage} reward: all of its candidates failed.")
        return
    expected = best_of_draws(theirs)
    count = max(len(ours), len(theirs))
    bounds = [*ours, *theirs]
    chart = Chart.of(bounds, count, "candidates", first=1, height=240)
    lows, highs = (
        [(i, getattr(best, end)) for i, best in enumerate(expected)] for end in ("low", "high")
    )
    marks = [
        chart.band(lows, highs),
        chart.line([(i, best.mean) for i, best in enumerate(expected)], "baseline"),
        *(
            chart.steps(list(enumerate(itertools.accumulate(rewards, max))), color)
            for rewards, color in ((theirs, "c1"), (ours, "c0"))
        ),
    ]
    yield element("h3", f"Best {stage} reward so far")
    yield chart.drawn(marks, f"best {stage} reward so far of both searches")
    yield legend(
        legend_key("this search", sample("c0")[0]),
        legend_key("random search", sample("c1")[0]),
        legend_key("random search, mean over all orders of its candidates", sample("baseline")[0]),
        legend_key("95 % of the orders", element("rect", width=14, height=10, class_="band")),
    )
    yield element("h3", f"Share of candidates that reach a {stage} reward")
    reach = CostChart.of_costs(f"{stage} reward", bounds, [0, 0.9])  # to 1
    marks = []
    for rewards, color in ((theirs, "c1"), (ours, "c0")):
        ordered = sorted(rewards)
        shares = [(value, 1 - (i + 1) / len(ordered)) for i, value in enumerate(ordered)]
        marks.append(reach.steps([(min(bounds), 1.0), *shares], color))
    yield reach.drawn(marks, f"share of the candidates of both searches by {stage} reward")
    yield legend(
        legend_key(f"this search, {len(ours)} candidates", sample("c0")[0]),
        legend_key(f"random search, {len(theirs)} candidates", sample("c1")[0]),
    )
    rows = [
        (each, stage, str(of["candidates"]), number(of["best"]), number(of["mean"]))
        for stage, both in against_random(study, control).items()
        for each, of in zip(("this search", "random search"), both.values(), strict=True)
    ]
    yield table(("", "stage", "candidates", "best reward", "mean reward"), rows, "correlations")
    stopped = any(record.evaluation.stopped for records in both for record in records)
    note = " What was stopped early is in the charts with its estimate." if stopped else ""
    yield element("p", f"The random search is {control.path}.{note}")


def _dot(kind: str, radius: float = 3.5) -> Element:
    return element("circle", cx=7, cy=5, r=radius, class_=kind)
