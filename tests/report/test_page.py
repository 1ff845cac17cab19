"""The report of a search: complete, escaped, self-contained, and drawn right."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

import nasfast
from nasfast.report.__main__ import main
from nasfast.report.page import draw_cell, draw_decoder, terminal_table, write_report
from nasfast.runs.records import Evaluation, Record
from nasfast.runs.study import Study
from nasfast.spaces.fast_nas import PRIMITIVES, FastNASGenotype, FastNASSpace

PUBLISHED = {  # Fast NAS, CVPR 2019: arch0, arch1, arch2
    "arch0": [[8, [0, 0, 5, 2], [0, 2, 8, 8], [0, 5, 1, 4]], [[3, 3], [3, 2], [3, 0]]],
    "arch1": [[2, [1, 0, 3, 6], [0, 1, 2, 8], [2, 0, 6, 1]], [[2, 3], [3, 1], [4, 4]]],
    "arch2": [[5, [0, 0, 4, 1], [3, 2, 0, 1], [5, 6, 5, 0]], [[1, 3], [4, 3], [2, 2]]],
}
SPACE = FastNASSpace()
HOSTILE = "</script><script>alert('x')</script> & \"quoted\" [bold]"


def make_record(index: int, evaluation: Evaluation, duplicate_of: int | None = None) -> Record:
    genotype = SPACE.sample(random.Random(index)).to_json()
    time = f"2026-01-01T00:{index % 60:02d}:00+00:00"
    return Record(index, genotype, genotype, index, evaluation, duplicate_of, time)


def success(stage0: float, stage1: float | None = None, gate: float | None = None) -> Evaluation:
    rewards = {"stage0": stage0} | ({} if stage1 is None else {"stage1": stage1})
    return Evaluation(
        rewards=rewards,
        metrics={stage: {"miou": reward / 2} for stage, reward in rewards.items()},
        gate=gate,
        params=2_629_909,
        macs=4_208_200_000,
        seconds={f"{stage}_{step}": 30.0 for stage in rewards for step in ("train", "validate")},
    )


def failure(cause: str) -> Evaluation:
    return Evaluation({}, {}, None, 0, 0, {"stage0_train": 6.0}, cause)


@pytest.fixture
def study(tmp_path: Path) -> Iterator[Study]:
    env = {"torch": "2.13.0", "gpu": {"name": HOSTILE}, "command": ["nasfast", "a b"]}
    with Study.create(tmp_path, "segmentation", "demo", {"note": HOSTILE, "seed": 3}, env) as study:
        yield study


def fill(study: Study) -> None:
    for index, evaluation in enumerate(
        [
            success(0.31, 0.4321),
            success(0.25, gate=0.31),
            failure(HOSTILE),
            success(0.35, 0.52, 0.3),
        ]
    ):
        study.append(make_record(index, evaluation))
    study.append(make_record(4, success(0.31, 0.4321), duplicate_of=0))
    study.save_checkpoint({"seconds": {"encode": 60.0, "controller": 4.0}})


class Page(HTMLParser):
    """Checks that tags nest, and collects the texts, the tags and the attributes."""

    VOID = frozenset({"meta"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.values: list[str] = []
        self.text = ""
        self.source = path.read_text()
        self.feed(self.source)
        self.close()
        assert self.open == []
        for svg in re.findall(r"<svg.*?</svg>", self.source, re.DOTALL):
            ElementTree.fromstring(svg)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.values += [value for _, value in attrs if value is not None]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


def test_report_has_the_numbers(study: Study) -> None:
    fill(study)
    path = write_report(study)
    assert path == study.path / "report.html"
    page = Page(path)
    for text in (
        study.path.name,
        "2026-01-01 00:00 to 2026-01-01 00:04 UTC",
        "0.5200",
        "0.2600",
        "2.63 M",
        "4.21 G",
        "encode 1 min 00 s (16.2%)",
        "stage0 train 1 min 36 s",
        "controller 4.0 s",
        "seed = 3",
        "nasfast 'a b'",
        f"python -m nasfast.search --resume {study.path}",
        "The best cell, of architecture 3",
    ):
        assert text in page.text, text
    tiles = re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)</dd>", page.source)
    assert dict(tiles[4:]) == {
        "candidates": "5",
        "evaluated": "4",
        "duplicates": "1",
        "failed": "1",
        "time": "6 min 10 s",
    }


def test_report_ranks_in_the_published_form(study: Study) -> None:
    fill(study)
    rows = re.findall(
        r"<tr><td>(\d+)</td><td>(\d+)</td><td>([^<]*)</td><td>([^<]*)</td>.*?</tr>",
        write_report(study).read_text(),
    )
    assert rows == [
        ("1", "3", "0.3500", "0.5200"),
        ("2", "0", "0.3100", "0.4321"),
        ("3", "1", "0.2500", "-"),
    ]
    genotype = SPACE.sample(random.Random(3)).to_json()
    published = str([genotype["cell"], genotype["connections"]]).replace(" ", "")
    assert published in write_report(study).read_text()


def test_chart_marks(study: Study) -> None:
    fill(study)
    page = write_report(study).read_text()
    chart = ElementTree.fromstring(re.findall(r'<svg[^>]*class="chart".*?</svg>', page, re.S)[0])
    kinds = [mark.get("class") for mark in chart.iter("circle")]
    assert (kinds.count("c0"), kinds.count("c0 hollow")) == (3, 1)
    assert (kinds.count("c1"), kinds.count("c1 hollow")) == (2, 1)
    paths = [mark.get("class") for mark in chart.iter("path")]
    assert paths.count("failed") == paths.count("line gate") == 1
    titles = [title.text for title in chart.iter("title")]
    assert "architecture 4: stage1 reward 0.4321, duplicate of 0" in titles
    assert f"architecture 2 failed: {HOSTILE}" in titles


def test_report_is_escaped_and_self_contained(study: Study) -> None:
    fill(study)
    page = Page(write_report(study))
    assert page.text.count(HOSTILE.split(" ")[0]) == 4
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert "img" not in page.tags
    assert not [value for value in page.values if "://" in value and "w3.org" not in value]
    assert "url(" not in page.source
    assert "@import" not in page.source


def test_report_of_an_empty_study(study: Study) -> None:
    page = Page(write_report(study))
    assert "nothing evaluated yet" in page.text
    assert "svg" not in page.tags


def test_report_of_failures_only(study: Study) -> None:
    study.append(make_record(0, failure("out of memory")))
    study.append(make_record(1, failure("loss is nan")))
    page = Page(write_report(study))
    assert page.text.count("loss is nan") == 2
    assert "best reward" not in page.text
    assert "Where the time went" in page.text


def test_report_without_a_drawing_for_the_space(study: Study) -> None:
    genotype: dict[str, object] = {"space": "other", "layers": [1, 2]}
    study.append(Record(0, genotype, genotype, 0, success(0.5), None, "2026-01-01T00:00:00+00:00"))
    page = Page(write_report(study))
    assert "The best cell" not in page.text
    assert "[[1,2]]" in page.text


def test_report_of_many_architectures(study: Study) -> None:
    for index in range(130):
        study.append(make_record(index, success(index / 200)))
    assert "30 more stand in records.jsonl." in Page(write_report(study)).text


def test_report_with_a_rival(study: Study, tmp_path: Path) -> None:
    fill(study)
    with Study.create(tmp_path, "segmentation", "random", {}, {}) as rival:
        assert "Comparison" in Page(write_report(study, rival=rival)).text
        rival.append(make_record(0, success(0.2, 0.25)))
        rival.append(make_record(1, success(0.1, 0.15)))
        page = Page(write_report(study, rival=rival))
    assert f"{rival.path.name}, stage0" in page.text
    assert "<td>mean stage1 reward</td><td>0.4760</td><td>0.2000</td>" in page.source
    assert page.values.count("rival") == 3


def test_main_rewrites_the_report(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    fill(study)
    assert main([str(study.path), "--rival", str(study.path)]) == 0
    assert capsys.readouterr().out.strip() == str(study.path / "report.html")
    assert "Comparison" in Page(study.path / "report.html").text


def test_main_of_something_else(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nasfast.report", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(nasfast.__file__).parents[1])},
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: {tmp_path} is not a run directory: it has no config.toml, env.json, "
        "records.jsonl; give a directory that a search wrote, such as runs/<date>-<method>-<name>\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_terminal_table(study: Study) -> None:
    fill(study)
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(terminal_table(study, top=2))
    text = console.export_text()
    assert "4 evaluated, 1 failed" in text
    assert "0.5200" in text
    assert "0.4321" in text
    assert "0.2500" not in text
    assert terminal_table(study).row_count == 3


def classes(svg: ElementTree.Element, kind: str) -> list[ElementTree.Element]:
    return [group for group in svg if kind in group.get("class", "").split()]


def labels(svg: ElementTree.Element) -> list[str]:
    return ["".join(node.itertext()) for node in classes(svg, "node")]


def genotypes() -> dict[str, FastNASGenotype]:
    random_ones = {f"random{i}": SPACE.sample(random.Random(i)) for i in range(20)}
    return {name: SPACE.from_json(form) for name, form in PUBLISHED.items()} | random_ones


@pytest.mark.parametrize("genotype", genotypes().values(), ids=genotypes())
def test_drawings_have_every_node_and_edge(genotype: FastNASGenotype) -> None:
    cell, decoder = (
        ElementTree.fromstring(text.replace('xmlns="http://www.w3.org/2000/svg" ', ""))
        for text in (draw_cell(genotype), draw_decoder(genotype))
    )
    ops = [PRIMITIVES[o] for layer in genotype.cell.layers for o in layer[2:]]
    assert sorted(labels(cell)) == sorted(
        ["input", PRIMITIVES[genotype.cell.op0], *ops, "+", "+", "+", "output"]
    )
    assert len(classes(cell, "edge")) == 13 + len(genotype.cell.loose_ends)
    assert len(classes(cell, "loose")) == len(genotype.cell.loose_ends)
    assert labels(decoder) == [
        *(f"tap l{i}" for i in (1, 2, 3, 4)),
        *(f"block {b}" for b in (0, 1, 2)),
        "classifier",
    ]
    assert len(classes(decoder, "edge")) == 6 + len(genotype.collected_blocks)
    assert len(classes(decoder, "loose")) == len(genotype.collected_blocks)


@pytest.mark.parametrize("genotype", genotypes().values(), ids=genotypes())
@pytest.mark.parametrize("draw", [draw_cell, draw_decoder])
def test_drawn_nodes_lie_apart_and_inside(draw, genotype: FastNASGenotype) -> None:  # type: ignore[no-untyped-def]
    svg = ElementTree.fromstring(draw(genotype))
    _, _, width, height = map(float, svg.attrib["viewBox"].split())
    boxes = []
    for rect in svg.iter("{http://www.w3.org/2000/svg}rect"):
        x, y, w, h = (float(rect.attrib[key]) for key in ("x", "y", "width", "height"))
        assert x >= 0
        assert y >= 0
        assert x + w <= width
        assert y + h <= height
        boxes.append((x, y, x + w, y + h))
    for a, b in combinations(boxes, 2):
        assert a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]
