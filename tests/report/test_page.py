"""The report of a search by any method: complete, escaped and self-contained."""

import json
import re
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from types import MappingProxyType
from xml.etree import ElementTree

import pytest
from search_runs import start

from nasfast.commands.report import main
from nasfast.report import Section, terminal_table, write_report
from nasfast.report.fronts import pareto_front
from nasfast.report.html import element
from nasfast.report.numbers import number
from nasfast.runs.records import Evaluation, Record
from nasfast.runs.study import Study
from nasfast.utils.errors import UserError

HOSTILE = "</script><script>alert('x')</script> & \"quoted\" [bold]"


class Made:
    """The report of a made-up method."""

    metric = ("depth_error", "depth error")
    terms = MappingProxyType({"reward": "More is better.", "cold": "Of no stage.", "warm": HOSTILE})

    def architecture(self, record):
        return [Section(f"Drawing of architecture {record.index}", [element("p", HOSTILE)])]

    def sections(self, study):
        return [Section("Of its own", [element("p", f"{len(study.records)} records")])]


MADE = Made()


def success(warm, full=None, gate=None, **costs):
    """Of stages whose order is not that of the alphabet."""
    rewards = {"warm": warm} | ({} if full is None else {"full": full})
    return Evaluation(
        rewards=rewards,
        metrics={stage: {"depth_error": reward / 2} for stage, reward in rewards.items()},
        costs={"params": 2_629_909, "macs": 4_208_200_000} | costs,
        gate=gate,
        seconds={f"{stage}_{step}": 30.0 for stage in rewards for step in ("train", "validate")},
        feedback="warm",
    )


def failure(cause):
    return Evaluation({}, {}, {}, None, {"warm_train": 6.0}, "warm", cause)


@pytest.fixture
def study(tmp_path):
    env = {"torch": "2.13.0", "gpu": {"name": HOSTILE}, "command": ["nasfast", "a b"]}
    with Study.create(tmp_path, "made", "demo", {"note": HOSTILE, "seed": 3}, env) as study:
        yield study


def append(study, *evaluations, duplicate_of=None, phase=0):
    """Records of these evaluations."""
    for evaluation in evaluations:
        index = len(study.records)
        genotype = {"space": "made_up", "layers": [index, 7]}
        time = f"2026-01-01T00:{index % 60:02d}:00+00:00"
        study.append(
            Record(index, genotype, genotype, index, evaluation, duplicate_of, time, phase)
        )


def fill(study):
    append(study, success(0.31, 0.4321), success(0.25, gate=0.31), failure(HOSTILE))
    append(study, success(0.35, 0.52, 0.3))
    append(study, success(0.31, 0.4321), duplicate_of=0)
    study.save_checkpoint({"seconds": {"encode": 60.0, "controller": 4.0}})


def described(page):
    return re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)</dd>", page)


def tiles(page):
    return described(page.partition("<section>")[0])


def columns(table):
    """Cells of a terminal's table by header."""
    return {str(column.header): list(column.cells) for column in table.columns}


class Page(HTMLParser):
    """Checks that tags nest, and collects the texts, the tags and the attributes."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.values, self.text = [], [], [], ""
        self.source = path.read_text()
        self.feed(self.source)
        self.close()
        assert self.open == []
        for svg in re.findall(r"<svg.*?</svg>", self.source, re.DOTALL):
            ElementTree.fromstring(svg)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.values += [value for _, value in attrs if value is not None]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data + "\n"


def test_report_has_the_numbers(study):
    fill(study)
    path = write_report(study, MADE)
    assert path == study.path / "report.html"
    page = Page(path)
    for text in (
        study.path.name,
        "2026-01-01 00:00 to 2026-01-01 00:04 UTC",
        "encode 1 min 00 s (16.2%)",
        "warm train 1 min 36 s",
        "controller 4.0 s",
        "seed = 3",
        "nasfast 'a b'",
        f"nasfast search --resume {study.path}",
        "Drawing of architecture 3",
        "5 records",
        "[[3,7]]",
    ):
        assert text in page.text, text
    assert dict(tiles(page.source)) == {
        "best reward, full": "0.5200",
        "depth error": "0.2600",
        "params": "2.63 M",
        "MACs": "4.21 G",
        "candidates": "5",
        "evaluated": "4",
        "duplicates": "1",
        "failed": "1",
        "time, all workers": "6 min 10 s",
    }
    cells = r"<tr><td>(\d+)</td><td>(\d+)</td><td>([^<]*)</td><td>([^<]*)</td>.*?</tr>"
    assert re.findall(cells, page.source) == [
        ("1", "3", "0.3500", "0.5200"),
        ("2", "0", "0.3100", "0.4321"),
        ("3", "1", "0.2500", "-"),
    ]
    meanings = described(page.source.partition("<section>")[2])
    assert meanings == [("reward", "More is better."), ("warm", escape(HOSTILE, quote=False))]
    head = ["rank", "index", "warm", "full", "depth error", "params", "MACs", "time", "genotype"]
    ranking = page.source.partition("Architectures, best first")[2]
    assert re.findall("<th>([^<]*)</th>", ranking)[:9] == head


def test_rejected_proposals(study):
    append(study, success(0.3))
    assert "beyond the limits" not in write_report(study, MADE).read_text()
    assert "beyond the limits" not in str(terminal_table(study, MADE).title)
    genotype = {"space": "made_up", "layers": [1, 7]}
    rejected = ({"params": 412_345}, {"params": 512_345, "macs": 2e9}, {}, {"params": 400_000})
    study.append(
        Record(1, genotype, genotype, 1, success(0.4), None, "2026-01-01", rejected=rejected)
    )
    page = write_report(study, MADE)
    assert dict(tiles(page.read_text()))["beyond the limits"] == "3"
    assert dict(tiles(page.read_text()))["proposals that were no network"] == "1"
    section = page.read_text().partition("Rejected, beyond the limits")[2]
    assert re.findall("<td>([^<]*)</td>", section)[:10] == [
        *("params", "3", "400.00 k", "412.35 k", "512.35 k"),
        *("MACs", "1", "2.00 G", "2.00 G", "2.00 G"),
    ]
    Page(page)
    assert terminal_table(study, MADE).title == (
        "2 evaluated, 0 failed, 3 beyond the limits; the best:"
    )


def stopped(*rungs):
    """After the last of these scores at rungs."""
    rewards = {f"warm.{2**i}": score for i, score in enumerate(rungs)}
    told = {"gate": 0.2, "estimate": 0.28}
    return Evaluation(rewards, {}, {"params": 5}, 0.3, {}, "warm", stopped=told)


def test_stopped_early(study):
    finished = success(0.3)
    rewards = {"warm.1": 0.15, "warm.2": 0.2, **finished.rewards}
    append(study, replace(finished, rewards=rewards), stopped(0.1), stopped(0.16, 0.19))
    append(study, stopped(0.1), duplicate_of=1)
    page = write_report(study, MADE)
    assert dict(tiles(page.read_text()))["stopped early"] == "2"
    section = page.read_text().partition("<h2>Stopped early</h2>")[2].partition("</section>")[0]
    assert "Stopped: 1 after epoch 1, 1 after epoch 2. Their score was below" in section
    assert re.findall("<title>(.*?)</title>", section) == [
        "architecture 0: warm.1 0.1500",
        "architecture 0: warm.2 0.2000",
        "architecture 1: warm.1 0.1000, below 0.2000: stopped",
        "architecture 2: warm.1 0.1600",
        "architecture 2: warm.2 0.1900, below 0.2000: stopped",
    ]
    assert "warm.1, line: best so far" not in Page(page).text
    found = columns(terminal_table(study, MADE))
    assert (found["index"], found["warm"]) == (["0", "2", "1"], ["0.3000", "-", "-"])
    assert found["stopped"] == ["-", "after epoch 2", "after epoch 1"]
    title = terminal_table(study, MADE).title
    assert title == "3 evaluated, 0 failed, 2 stopped early; the best:"


def test_chart_marks(study):
    fill(study)
    page = write_report(study, MADE).read_text()
    chart = ElementTree.fromstring(re.findall(r'<svg[^>]*class="chart".*?</svg>', page, re.S)[0])
    kinds = [mark.get("class") for mark in chart.iter("circle")]
    assert (kinds.count("c0"), kinds.count("c0 hollow")) == (3, 1)
    assert (kinds.count("c1"), kinds.count("c1 hollow")) == (2, 1)
    paths = [mark.get("class") for mark in chart.iter("path")]
    assert paths.count("failed") == paths.count("line gate") == 1
    titles = [title.text for title in chart.iter("title")]
    assert "architecture 4: full reward 0.4321, duplicate of 0" in titles
    assert f"architecture 2 failed: {HOSTILE}" in titles


def test_report_is_escaped_and_self_contained(study):
    fill(study)
    page = Page(write_report(study, MADE))
    assert page.text.count(HOSTILE.split(" ")[0]) == 6
    assert not {"script", "link", "img"} & set(page.tags)
    assert not [value for value in page.values if "://" in value and "w3.org" not in value]
    assert "url(" not in page.source
    assert "@import" not in page.source


def test_front_of_each_cost(study):
    for reward, params, macs in [(0.3, 1e6, 9e9), (0.4, 2e6, 5e9), (0.35, 3e6, 1e9)]:
        append(study, success(0.2, reward, params=params, macs=macs))
    append(study, success(0.9, params=1.0), success(0.4, 0.5), duplicate_of=0)
    append(study, success(0.2, 0.1, params=3e6, macs=2e9))
    page = write_report(study, MADE).read_text()
    section = page.partition("<h2>Reward against cost</h2>")[2].partition("</section>")[0]
    rows = re.findall("<tr>(.*?)</tr>", section)
    cells = [re.findall("<t[hd]>(.*?)</t[hd]>", row)[:5] for row in rows]
    assert cells == [
        ["index", "full", "params", "MACs", "on the front of"],
        ["1", "0.4000", "2.00 M", "5.00 G", "params, MACs"],
        ["2", "0.3500", "3.00 M", "1.00 G", "MACs"],
        ["0", "0.3000", "1.00 M", "9.00 G", "params"],
    ]
    charts = [ElementTree.fromstring(svg) for svg in re.findall("<svg.*?</svg>", section, re.S)[:2]]
    for chart, cost, last in zip(charts, ("params", "MACs"), ("3.00 M", "2.00 G"), strict=True):
        assert chart.get("aria-label") == f"full reward against {cost}"
        kinds = [mark.get("class") for mark in chart.iter("circle")]
        assert (kinds.count("c0"), kinds.count("c0 hollow")) == (2, 2)
        titles = [title.text for title in chart.iter("title")]
        assert titles[-1] == f"architecture 5: full reward 0.1000, {last}"


def test_equal_points_are_once_on_a_front():
    assert pareto_front([(2, 0.5), (1, 0.2), (2, 0.5), (3, 0.5), (1, 0.3), (4, 0.6)]) == [4, 0, 5]
    assert pareto_front([]) == []
    points = [(1.0, 0.1), (0.96, 0.05), (0.94, 0.02), (2.0, 0.1)]
    assert pareto_front(points) == [2, 1, 0]
    assert pareto_front(points, 0.05) == [2, 0], "a latency within 5 % is none that is lower"


def keep(study, record, files):
    study.keep_files(record, files)
    study.append(record)


def test_pictures_of_the_best_and_of_trainings(study):
    entry = {"name": HOSTILE, "metric": "IoU", "score": 0.25, "color": [255, 0, 16]}
    for index, reward in enumerate((0.3, 0.5, 0.4)):
        evaluation, genotype = success(reward), {"space": "made_up", "layers": [index]}
        record = Record(index, genotype, genotype, 0, evaluation, None, "2026-01-01T00:00:00+00:00")
        files = {f"of-{index}.png": b"png", "classes.json": json.dumps([entry]).encode()}
        keep(study, record, files)
    metrics = {"genotype": genotype, "depth_error": 0.125, "split": "val of x", "class_iou": {}}
    metrics["class_iou"] = {HOSTILE: 0.75, "far": None}
    for name in ("train-10", "train-9"):
        (study.path / name / "pictures").mkdir(parents=True)
        (study.path / name / "predictions").mkdir()
        (study.path / name / "metrics.json").write_text(json.dumps(metrics))
    (study.path / "train-9" / "predictions" / "of-9.png").write_bytes(b"png")
    (study.path / "train-9" / "pictures" / "test of-9.png").write_bytes(b"png")
    (study.path / "train-10" / "predictions" / "failed.txt").write_text(f"OSError: {HOSTILE}")
    page = Page(write_report(study, MADE))
    assert re.findall("<figcaption>(.*?)</figcaption>", page.source) == [
        "train-9: of-9",
        "train-9: test of-9",
        "architecture 1, warm: of-1",
    ]
    titles = re.findall("<h2>(.*?)</h2>", page.source)
    assert titles[1:5] == [
        "Predictions of the trained network, train-9",
        "Predictions of the trained network, train-10",
        "Predictions of the best, architecture 1",
        "Scores of the classes",
    ]
    assert "Architecture 2, trained in full; depth error 0.1250 on val of x." in page.text
    assert f"They could not be drawn: OSError: {HOSTILE}" in page.text
    rows = re.findall("<tr>(.*?)</tr>", page.source.partition(titles[4])[2])[:3]
    numbers = [re.findall(">([^<>]*)</t[hd]>", row)[-3:] for row in rows]
    assert numbers == [
        ["train-9", "train-10", "architecture 1, warm"],
        ["0.7500", "0.7500", "0.2500"],
        ["-", "-", "-"],
    ]
    assert "fill: #ff0010" in page.values
    assert not [value for value in page.values if "://" in value and "w3.org" not in value]


def test_damaged_class_scores(study):
    evaluation = success(0.3)
    record = Record(0, {}, {}, 0, evaluation, None, "2026-01-01T00:00:00+00:00")
    keep(study, record, {"classes.json": b'[{"name": "sky"}]'})
    with pytest.raises(UserError) as error:
        write_report(study, MADE)
    assert str(error.value) == (
        f"{study.path}/predictions/architecture-0/classes.json: expected a list of objects "
        "with color, metric, name, score, got \"[{'name': 'sky'}]\"; remove it, or restore it from "
        "a copy"
    )


def test_report_of_nothing_and_of_failures_only(study):
    page = Page(write_report(study, MADE))
    assert "nothing evaluated yet" in page.text
    assert "svg" not in page.tags
    append(study, failure("out of memory"), failure("loss is nan"))
    page = Page(write_report(study, MADE))
    assert page.text.count("loss is nan") == 2
    assert "best reward" not in page.text
    assert "Where the time went" in page.text


def test_every_cost_is_shown_in_its_unit(study):
    append(study, success(0.2, latency=0.0123, tensors=512), success(0.1, memory_peak=3.5e9))
    shown = tiles(write_report(study, MADE).read_text())
    assert shown[3:6] == [("MACs", "4.21 G"), ("latency", "12.30 ms"), ("tensors", "512")]
    found = columns(terminal_table(study, MADE))
    assert list(found)[6:] == ["latency", "tensors", "memory peak", "time"]
    costs = found["latency"], found["tensors"], found["memory peak"]
    assert costs == (["12.30 ms", "-"], ["512", "-"], ["-", "3.50 GB"])


def test_phases_are_told_apart(study):
    append(study, success(0.9))
    append(study, success(0.2, 0.3), phase=1)
    page = Page(write_report(study, MADE))
    for text in ("phase 1, warm", "phase 2, warm", "phase 2, full"):
        assert f"{text}, line: best so far" in page.text
    found = columns(terminal_table(study, MADE))
    assert list(found)[:5] == ["rank", "index", "phase", "warm", "full"]
    assert (found["index"], found["phase"]) == (["1", "0"], ["2", "1"])


def test_report_of_many_architectures(study):
    append(study, *(success(index / 200) for index in range(130)))
    assert "30 more stand in records.jsonl." in Page(write_report(study, MADE)).text


def test_report_with_a_baseline(study, tmp_path):
    fill(study)
    with Study.create(tmp_path, "made", "random", {}, {}) as baseline:
        assert "Comparison" in Page(write_report(study, MADE, baseline=baseline)).text
        append(baseline, success(0.2, 0.25), success(0.1, 0.15))
        page = Page(write_report(study, MADE, baseline=baseline))
    assert f"{baseline.path.name}, warm" in page.text
    assert "<td>mean full reward</td><td>0.4760</td><td>0.2000</td>" in page.source
    assert page.values.count("baseline") == 3


def test_main_of_an_unknown_method(study, capsys):
    with Study.create(study.path, "alchemy", "x", {}, {}) as other:
        assert main([str(other.path)]) == 2
    assert capsys.readouterr().err == (
        "error: method: expected one of segmentation, templates, detection, restoration, got "
        "'alchemy'; a later version of nasfast may know it\n"
    )


def test_main_of_something_else(tmp_path):
    process = start([str(tmp_path)], module="nasfast.report")
    assert process.communicate() == (
        "",
        f"error: {tmp_path} is not a run directory: it has no config.toml, env.json, "
        "records.jsonl; give a directory that a search wrote, such as runs/<date>-<method>-<name>"
        "\n",
    )
    assert process.returncode == 2
    assert list(tmp_path.iterdir()) == []


def test_terminal_table(study):
    fill(study)
    table = terminal_table(study, MADE, top=2)
    assert table.title == "4 evaluated, 1 failed; the best:"
    assert str(table.caption).startswith("architecture 3: [[3,7]]")
    assert columns(table)["full"] == ["0.5200", "0.4321"]
    assert terminal_table(study, MADE).row_count == 3


def test_curves_of_trainings(study):
    points = [{"epoch": 5, "depth_error": 0.3}, {"epoch": 10, "depth_error": 0.25}]
    for name, validation in (("train-1", points), ("train-2", points[1:]), ("train-10", points)):
        metrics = {"validation": validation, "epochs": 10, "kept_epoch": 10}
        (study.path / name).mkdir()
        (study.path / name / "metrics.json").write_text(json.dumps(metrics))
    page = write_report(study, MADE).read_text()
    assert "<h2>depth error while training</h2>" in page
    assert 'aria-label="train-1, train-10"' in page
    note = "train-10: the network is that of epoch 10 of 10, depth error 0.2500."
    assert note in page
    assert "train-2: the network" not in page


# ---- several objectives


@pytest.fixture
def for_a_front(tmp_path):
    """Four points, the first of a nasfast that knew no memory; the third is beaten."""
    config = {"objective": ["score", "latency"]}
    with Study.create(tmp_path, "made", "front", config, {}) as study:
        append(study, success(0.3, 0.5, latency=0.02, predicted_latency=0.03))
        for reward, latency in ((0.6, 0.04), (0.4, 0.03), (0.4, 0.01)):
            costs = {"latency": latency, "predicted_latency": 0.5, "memory": 5e6}
            append(study, success(0.3, reward, **costs))
        append(study, failure("stage0: out of memory"))
        yield study


def test_a_front_has_stars_and_its_costs_come_first(for_a_front):
    for_a_front.write_published({"small_net": {"params": 1e6, "latency": 0.025}, "large_net": {}})
    page = Page(write_report(for_a_front, MADE))
    section = page.source.partition("<h2>Reward against cost</h2>")[2].partition("</section>")[0]
    charts = re.findall(r"<svg.*?</svg>", section, re.DOTALL)[:4]  # and those of the legend
    labels = [re.search(r'aria-label="([^"]*)"', chart) for chart in charts]
    against = [label[1].rpartition("against ")[2] for label in labels if label]
    assert against == ["latency", "params", "MACs", "memory"]
    assert ["small_net" in chart for chart in charts] == [True, True, False, False]
    assert "large_net" not in section
    assert "costs of published architectures, which were not trained" in section
    assert "predicted" not in section
    ranking = page.source.partition("Architectures, best first")[2]
    assert re.findall(r"<tr><td>\d</td><td>([^<]*)</td>", ranking)[:4] == [
        *("1 *", "0 *", "2", "3 *")
    ]
    assert "predicted latency" in ranking
    assert dict(tiles(page.source))["latency"] == "40.00 ms"


@pytest.mark.parametrize("costs", [("latency",), ("latency", "memory")])
def test_the_terminal_hides_memory_unless_it_is_an_objective(costs, tmp_path):
    config = {"objective": ["score", *costs]}
    with Study.create(tmp_path, "made", "front", config, {}) as study:
        measured = {"latency": 0.02, "predicted_latency": 0.03, "memory": 5e6}
        append(study, success(0.3, 0.5, **measured), success(0.3, 0.4, **measured))
        table = terminal_table(study, MADE)
        assert str(table.title).endswith("failed; the best, * on the front of 1:")
        head = [str(column.header) for column in table.columns]
        shown = {"params", "MACs", *costs}
        assert {"params", "MACs", "latency", "predicted latency", "memory"} & set(head) == shown
        assert columns(table)["index"] == ["0 *", "1"]


def test_rejections_have_their_units(study):
    genotype = {"space": "made_up", "layers": [0, 7]}
    rejected = ({"latency": 0.0234}, {"memory": 3e6})
    study.append(Record(0, genotype, genotype, 0, success(0.4), None, "2026", rejected=rejected))
    section = write_report(study, MADE).read_text().partition("Rejected, beyond the limits")[2]
    cells = re.findall("<td>([^<]*)</td>", section)
    assert cells[:3] == ["latency", "1", "23.40 ms"]
    assert cells[5:8] == ["memory", "1", "3.00 MB"]


def test_weighted_costs_have_a_column_of_values(tmp_path):
    config = {"objective": ["score", "params:0.1"]}
    with Study.create(tmp_path, "segmentation", "weighted", config, {}) as study:
        fill(study)
        table = terminal_table(study, MADE, top=2)
        head = [str(column.header) for column in table.columns]
        best = study.ranking()[0]
        cells = list(table.columns[head.index("value")].cells)
    assert cells[0] == number(study.score(best)[-1])
