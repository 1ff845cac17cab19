"""What a search found: one self-contained HTML page, and a table for the terminal."""

from __future__ import annotations

import itertools
import json
import shlex
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree.ElementTree import Element, tostring

from rich.markup import escape
from rich.table import Table

from nasfast.report.charts import Chart, legend_key, sample
from nasfast.report.graphs import cell_graph, decoder_graph, element
from nasfast.report.supernet_history import architecture, formation, pictures
from nasfast.runs.records import Record
from nasfast.runs.study import Study
from nasfast.spaces.fast_nas import FastNASGenotype, FastNASSpace
from nasfast.utils.files import atomic_write

__all__ = ["draw_cell", "draw_decoder", "terminal_table", "write_report"]

MAX_ROWS = 100  # of the table of architectures; records.jsonl has them all
COLORS = 8  # of series and time steps in the style sheet: .c0 to .c7


def write_report(study: Study, *, rival: Study | None = None) -> Path:
    """Write report.html into the run directory and return its path.

    Args:
        rival: a search of the same budget to compare with, usually a random one.
    """
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", f"{study.path.name} - nasfast"),
        element("style", STYLE),
    )
    page = element("html", head, element("body", *_sections(study, rival)), lang="en")
    path = study.path / "report.html"
    atomic_write(path, "<!doctype html>\n" + tostring(page, encoding="unicode", method="html"))
    return path


def terminal_table(study: Study, top: int = 5) -> Table:
    """The `top` best architectures, for the end of a search on the command line: 80 columns, and
    the winner's genotype below."""
    stages, summary, ranking = _stages(study.records), _Summary.of(study), study.ranking()
    title = f"{summary.evaluated} evaluated, {summary.failed} failed; the best:"
    best = f"architecture {ranking[0].index}: {_genotype(ranking[0])}" if ranking else None
    table = Table(title=title, caption=best and escape(best), caption_justify="left")
    for name in _columns(stages, ranking)[:-1]:
        table.add_column(name, justify="right", no_wrap=True)
    for rank, record in enumerate(ranking[:top], start=1):
        table.add_row(*map(escape, _row(rank, record, stages)[:-1]))
    return table


def draw_cell(genotype: FastNASGenotype) -> str:
    """SVG of the cell of a genotype."""
    return tostring(cell_graph(genotype), encoding="unicode")


def draw_decoder(genotype: FastNASGenotype) -> str:
    """SVG of how the decoder of a genotype connects encoder taps and blocks."""
    return tostring(decoder_graph(genotype), encoding="unicode")


@dataclass(frozen=True)
class _Summary:
    candidates: int
    evaluated: int
    duplicates: int
    failed: int
    seconds: dict[str, float]
    """By step: those of the records, and around them "seconds" of the checkpoint, such as
    {"encode": 61.0, "controller": 4.2}."""

    @classmethod
    def of(cls, study: Study) -> _Summary:
        fresh = [record for record in study.records if record.duplicate_of is None]
        spent: Counter[str] = Counter()
        for record in fresh:
            spent.update(record.evaluation.seconds)
        own: dict[str, float] = dict((study.load_checkpoint() or {}).get("seconds", {}))
        first = {"encode": own.pop("encode")} if "encode" in own else {}
        return cls(
            candidates=len(study.records),
            evaluated=len(fresh),
            duplicates=len(study.records) - len(fresh),
            failed=sum(record.evaluation.failure is not None for record in fresh),
            seconds=first | dict(sorted(spent.items())) | own,
        )

    def facts(self) -> dict[str, str]:
        return {
            "candidates": str(self.candidates),
            "evaluated": str(self.evaluated),
            "duplicates": str(self.duplicates),
            "failed": str(self.failed),
            "time": _duration(sum(self.seconds.values())),
        }


def _sections(study: Study, rival: Study | None) -> list[Element]:
    summary, best, records = _Summary.of(study), study.best, study.records
    span = "nothing evaluated yet"
    if records:
        first, last = (record.time[:16].replace("T", " ") for record in (records[0], records[-1]))
        span = f"{first} to {last} UTC"
    sections = [element("header", element("h1", study.path.name), element("p", span))]
    if best is not None:
        sections.append(_tiles(_facts(best), "tiles hero"))
    sections.append(_tiles(summary.facts(), "tiles"))
    if records:
        sections.append(_section("Reward over the search", *_progress(records, rival)))
    if rival is not None:
        sections.append(_section("Comparison", _comparison(study, rival)))
    sections += [_section(title, *content) for title, content in formation(study)]
    if best is not None:
        sections += _architecture(best)
    if shown := pictures(study):
        sections.append(_section("Before and after", *shown))
    if best is not None:
        sections.append(_section("Architectures, best first", *_ranking(study)))
    if summary.failed:
        sections.append(_section("Failures", _failures(records)))
    if sum(summary.seconds.values()) > 0:
        sections.append(_section("Where the time went", *_time(summary.seconds)))
    config = (study.path / "config.toml").read_text()
    return [
        *sections,
        _section("Continue, or run again", *_commands(study)),
        _section("Configuration", element("pre", config or "empty")),
        _section("Environment", _table((), _flat(study.env), "facts")),
    ]


def _section(title: str, *content: Element) -> Element:
    return element("section", element("h2", title), *content)


def _tiles(facts: Mapping[str, str], kind: str) -> Element:
    tiles = (
        element("div", element("dt", name), element("dd", value)) for name, value in facts.items()
    )
    return element("dl", *tiles, class_=kind)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str) -> Element:
    content = [element("tbody", *(_cells("td", row) for row in rows))]
    if head:
        content.insert(0, element("thead", _cells("th", head)))
    return element("div", element("table", *content, class_=kind), class_="wide")


def _cells(tag: str, texts: Sequence[str]) -> Element:
    return element("tr", *(element(tag, text) for text in texts))


def _facts(best: Record) -> dict[str, str]:
    evaluation = best.evaluation
    stage, metric = max(evaluation.rewards), _metric([best])
    return {
        f"best reward, {stage}": _number(evaluation.rewards[stage]),
        METRICS[metric]: _value(best, metric),
        "parameters": _count(evaluation.params),
        "multiply-adds": _count(evaluation.macs),
    }


def _comparison(study: Study, rival: Study) -> Element:
    columns = [_Summary.of(each).facts() for each in (study, rival)]
    for stage in _stages([*study.records, *rival.records]):
        for column, each in zip(columns, (study, rival), strict=True):
            rewards = [r.evaluation.rewards[stage] for r in _fresh(each.records, stage)]
            column[f"best {stage} reward"] = _number(max(rewards, default=None))
            column[f"mean {stage} reward"] = _number(statistics.fmean(rewards) if rewards else None)
    mine, theirs = columns
    rows = [(name, mine[name], theirs[name]) for name in mine]
    return _table(("", study.path.name, rival.path.name), rows, "facts")


def _architecture(best: Record) -> list[Element]:
    """Drawings of the best genotype; none for a space that has no drawing."""
    space = best.genotype.get("space")
    drawings = architecture(best) if space == "ir_nas" else _decoder(best)
    return [
        _section(
            title,
            element(
                "figure", element("div", drawing, class_="wide"), element("figcaption", caption)
            ),
        )
        for title, drawing, caption in drawings
    ]


def _decoder(best: Record) -> list[tuple[str, Element, str]]:
    """Title, drawing and caption of the cell and the decoder of a segmentation network."""
    if best.genotype.get("space") != "fast_nas":
        return []
    cell, connections = best.genotype["cell"], best.genotype["connections"]
    if not isinstance(cell, list) or not isinstance(connections, list):
        return []
    space = FastNASSpace(num_layers=len(cell) - 1, num_blocks=len(connections))
    genotype = space.from_json(best.genotype)
    return [
        (
            f"The best cell, of architecture {best.index}",
            cell_graph(genotype),
            "Each operation reads one earlier feature map; two at a time are summed. The coloured "
            "edges are the loose ends: maps that nothing reads, added up to the output.",
        ),
        (
            f"The best decoder, of architecture {best.index}",
            decoder_graph(genotype),
            "A block applies the cell to both of its inputs and sums the results. The coloured "
            "edges are the blocks that no other block reads, concatenated for the classifier.",
        ),
    ]


def _ranking(study: Study) -> list[Element]:
    stages, ranking = _stages(study.records), study.ranking()
    rows = [_row(rank, record, stages) for rank, record in enumerate(ranking[:MAX_ROWS], start=1)]
    content = [_table(_columns(stages, ranking), rows, "numbers")]
    if len(ranking) > MAX_ROWS:
        content.append(element("p", f"{len(ranking) - MAX_ROWS} more stand in records.jsonl."))
    return content


def _columns(stages: Sequence[str], records: Sequence[Record]) -> tuple[str, ...]:
    metric = METRICS[_metric(records)]
    return ("rank", "index", *stages, metric, "params", "MACs", "time", "genotype")


def _row(rank: int, record: Record, stages: Sequence[str]) -> list[str]:
    evaluation = record.evaluation
    return [
        str(rank),
        str(record.index),
        *(_number(evaluation.rewards.get(stage)) for stage in stages),
        _value(record, _metric([record])),
        _count(evaluation.params),
        _count(evaluation.macs),
        _duration(sum(evaluation.seconds.values())),
        _genotype(record),
    ]


def _failures(records: Sequence[Record]) -> Element:
    rows = [
        (str(record.index), record.evaluation.failure, _genotype(record))
        for record in records
        if record.evaluation.failure is not None and record.duplicate_of is None
    ]
    return _table(("index", "cause", "genotype"), rows, "failures")


def _time(seconds: Mapping[str, float]) -> list[Element]:
    """One bar of the whole time, split by step, and its legend."""
    total = sum(seconds.values())
    bars, legend, start = [], [], 0.0
    for i, (step, spent) in enumerate(seconds.items()):
        name, color = step.replace("_", " "), f"c{i % COLORS}"
        share = 1000 * spent / total
        title = element("title", f"{name}: {_duration(spent)}")
        place = {"x": f"{start:.2f}", "y": 0, "width": f"{share:.2f}", "height": 28}
        bars.append(element("rect", title, class_=color, **place))
        text = f"{name} {_duration(spent)} ({spent / total:.1%})"
        legend.append(legend_key(text, element("rect", width=14, height=10, class_=color)))
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
    return [bar, element("ul", *legend, class_="legend")]


def _commands(study: Study) -> list[Element]:
    commands = {"Continue": f"python -m nasfast.search --resume {shlex.quote(str(study.path))}"}
    again = study.env.get("command")
    if again:
        commands["Run again"] = again if isinstance(again, str) else shlex.join(again)
    return [
        element("p", f"{name}: ", element("code", command)) for name, command in commands.items()
    ]


def _progress(records: Sequence[Record], rival: Study | None) -> list[Element]:
    """Chart of reward over candidates, and its legend."""
    others = rival.records if rival else ()
    everything = [*records, *others]
    values = [
        value
        for record in everything
        for value in (*record.evaluation.rewards.values(), record.evaluation.gate)
        if value is not None
    ]
    count = max((record.index for record in everything), default=0) + 1
    chart = Chart.of(values, count, "candidate")
    marks: list[Element] = []
    legend: list[Element] = []
    if rival is not None:
        for stage in _stages(others)[:1]:
            marks += _series(chart, others, stage, "rival")
            legend.append(legend_key(f"{rival.path.name}, {stage}", *sample("rival")))
    gates = [
        (record.index, record.evaluation.gate)
        for record in records
        if record.evaluation.gate is not None and record.duplicate_of is None
    ]
    if gates:
        marks.append(chart.steps(gates, "gate"))
        legend.append(legend_key("gate of the first stage", sample("gate")[0]))
    for i, stage in enumerate(_stages(records)):
        marks += _series(chart, records, stage, f"c{i % COLORS}")
        legend.append(legend_key(f"{stage}, line: best so far", *sample(f"c{i % COLORS}")))
    if any(record.evaluation.failure is not None for record in records):
        marks += _crosses(chart, records)
        legend.append(
            legend_key("failed", element("path", d="M3 1l8 8m0 -8l-8 8", class_="failed"))
        )
    return [
        chart.drawn(marks, "reward over candidates"),
        element("ul", *legend, class_="legend"),
    ]


def _series(chart: Chart, records: Sequence[Record], stage: str, kind: str) -> list[Element]:
    """A dot per reward of one stage, hollow for duplicates, and the best so far as a line."""
    fresh = _fresh(records, stage)
    rewards = [record.evaluation.rewards[stage] for record in fresh]
    best = list(itertools.accumulate(rewards, max))
    line = list(zip((record.index for record in fresh), best, strict=True))
    marks = [chart.steps([*line, (records[-1].index, best[-1])], kind)] if line else []
    for record in records:
        reward = record.evaluation.rewards.get(stage)
        if reward is None:
            continue
        text = f"architecture {record.index}: {stage} reward {_number(reward)}"
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


def _stages(records: Sequence[Record]) -> list[str]:
    return sorted({stage for record in records for stage in record.evaluation.rewards})


def _fresh(records: Sequence[Record], stage: str) -> list[Record]:
    """The records with a reward of this stage, without duplicates."""
    return [r for r in records if stage in r.evaluation.rewards and r.duplicate_of is None]


def _genotype(record: Record) -> str:
    """The published list form: the values of the genotype without the name of its space."""
    values = [value for key, value in record.genotype.items() if key != "space"]
    return json.dumps(values, separators=(",", ":"))


METRICS = {"miou": "mIoU", "psnr": "PSNR"}
"""What the tables show of a record beside its rewards, by its name in the records."""


def _metric(records: Sequence[Record]) -> str:
    """Name of the metric that these records have."""
    found = {
        name for record in records for named in record.evaluation.metrics.values() for name in named
    }
    return next((name for name in METRICS if name in found), "miou")


def _value(record: Record, metric: str) -> str:
    """Of the last stage passed."""
    rewards, metrics = record.evaluation.rewards, record.evaluation.metrics
    return _number(metrics.get(max(rewards), {}).get(metric) if rewards else None)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _count(value: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return str(value)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _flat(mapping: Mapping[str, object], prefix: str = "") -> list[tuple[str, str]]:
    """Nested mappings as rows of dotted name and value."""
    rows = []
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((prefix + key, value if isinstance(value, str) else json.dumps(value)))
    return rows


STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1d2329; --faint: #66707b;
  --line: #e2e6eb; --panel: #f6f7f9; --accent: #2f6ba8; --failed: #b3362b; --rival: #98a0a9;
  --c0: #2f6ba8; --c1: #d27a1f; --c2: #3f8f6b; --c3: #8a5fa8; --c4: #b8a02e; --c5: #b05a6e;
  --c6: #4f9aa8; --c7: #7d8792; }
@media (prefers-color-scheme: dark) { :root { --back: #15181c; --text: #e3e7eb;
  --faint: #929ca7; --line: #2d343b; --panel: #1d2126; --accent: #7db2e8; --failed: #f0806f;
  --rival: #77818b; --c0: #7db2e8; --c1: #f0a55a; --c2: #71c29c; --c3: #c29be0; --c4: #dcc65a;
  --c5: #e091a3; --c6: #7cc7d4; --c7: #a0aab5; } }
@media print { :root { color-scheme: light; --back: #fff; --text: #000; --faint: #555;
  --line: #ccc; --panel: #fff; --accent: #2f6ba8; --failed: #b3362b; --rival: #888;
  --c0: #2f6ba8; --c1: #d27a1f; --c2: #3f8f6b; --c3: #8a5fa8; --c4: #b8a02e; --c5: #b05a6e;
  --c6: #4f9aa8; --c7: #7d8792; }
  section { break-inside: avoid; } .wide { overflow: visible; } }
* { box-sizing: border-box; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
body { max-width: 1080px; margin: 0 auto; padding: 40px 24px 64px; background: var(--back);
  color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 24px; font-weight: 600; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 16px; font-weight: 600; margin: 0 0 12px; }
header p, figcaption, section p { color: var(--faint); margin: 4px 0 0; }
section { margin-top: 44px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: 1px;
  margin: 12px 0 0; background: var(--line); border: 1px solid var(--line); border-radius: 8px;
  overflow: hidden; }
.tiles div { background: var(--panel); padding: 12px 16px; }
.tiles dt { color: var(--faint); font-size: 13px; }
.tiles dd { margin: 0; font-size: 18px; font-variant-numeric: tabular-nums; white-space: nowrap; }
.hero { margin-top: 24px; }
.hero dd { font-size: 28px; font-weight: 600; }
.wide { overflow-x: auto; }
figure { margin: 0; }
figcaption { margin-top: 12px; font-size: 14px; max-width: 72ch; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 16px 5px 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; }
th { color: var(--faint); font-weight: 500; white-space: nowrap; }
td:last-child, th:last-child { padding-right: 0; }
.numbers { width: 100%; }
.numbers td, .numbers th { text-align: right; white-space: nowrap; }
.numbers td:last-child, .numbers th:last-child { text-align: left; }
.numbers td:last-child, .failures td:last-child, code, pre { font: 12.5px/1.6 ui-monospace,
  "SF Mono", Menlo, Consolas, monospace; }
.facts td:first-child { color: var(--faint); white-space: nowrap; }
.facts td { overflow-wrap: anywhere; }
.failures td:nth-child(2) { color: var(--failed); }
pre, code { background: var(--panel); border: 1px solid var(--line); border-radius: 6px; }
pre { padding: 12px 16px; margin: 0; overflow-x: auto; }
code { padding: 2px 6px; color: var(--text); overflow-wrap: anywhere; }
svg text { fill: var(--text); }
.chart { display: block; width: 100%; min-width: 640px; font-size: 12px; }
.chart text { fill: var(--faint); }
.grid { stroke: var(--line); } .axis { stroke: var(--faint); }
.bar { display: block; width: 100%; height: 28px; border-radius: 6px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 24px; list-style: none; margin: 12px 0 0;
  padding: 0; color: var(--faint); font-size: 14px; }
.legend svg { margin-right: 8px; overflow: visible; }
.c0 { --ink: var(--c0); } .c1 { --ink: var(--c1); } .c2 { --ink: var(--c2); }
.c3 { --ink: var(--c3); } .c4 { --ink: var(--c4); } .c5 { --ink: var(--c5); }
.c6 { --ink: var(--c6); } .c7 { --ink: var(--c7); }
.rival { --ink: var(--rival); } .gate { --ink: var(--faint); }
rect, circle { fill: var(--ink); }
circle.hollow { fill: var(--back); stroke: var(--ink); stroke-width: 1.5; }
circle.rival { opacity: .55; }
path.line { fill: none; stroke: var(--ink, var(--faint)); stroke-width: 1.5; }
path.gate { stroke-dasharray: 2 3; } path.rival { stroke-dasharray: 6 4; }
.failed { fill: none; stroke: var(--failed); stroke-width: 1.75; }
.graph { display: block; max-width: 100%; min-width: 560px; height: auto; }
.node rect { fill: var(--panel); stroke: var(--faint); }
.node.end rect { fill: var(--back); stroke: var(--text); }
.node.unused { opacity: .4; } .node.unused rect { stroke-dasharray: 3 3; }
img { display: block; height: 240px; }
h3 { font-size: 14px; font-weight: 500; margin: 20px 0 8px; }
.edge { --ink: var(--faint); } .edge.loose { --ink: var(--accent); }
.edge.faint { opacity: .35; }
.edge .head { fill: var(--ink); } .edge .line { stroke-width: 1.25; }
.edge.loose .line { stroke-width: 2; }
"""
