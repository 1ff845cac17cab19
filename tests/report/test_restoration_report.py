"""The report of a search by gradient: charts, heat maps, drawings, pictures."""

import random
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image

from nasfast.methods.restoration.report import RestorationReport
from nasfast.report import terminal_table, write_report
from nasfast.runs.records import Evaluation, Record
from nasfast.runs.study import Study
from nasfast.spaces.ir_nas import IRNASSpace

SPACE = IRNASSpace(layers=3, nodes=2)
REPORT = RestorationReport()
GENOTYPES = [SPACE.sample(random.Random(i)) for i in range(3)]


def record(index, genotype, earlier):
    metrics = {
        "psnr": 20.0 + index,
        "ssim": 0.5,
        "loss": 0.1 / (1 + index),
        "alpha_entropy": 1.79 - 0.1 * index,
        "beta_entropy": 1.0,
    }
    if index:
        metrics["architecture_loss"] = 0.2 / (1 + index)
    evaluation = Evaluation(
        rewards={"supernet": 0.7 + index / 100},
        metrics={"supernet": metrics},
        costs={"params": 61_234 + index, "macs": 10**9},
        gate=None,
        seconds={"train": 3.0, "validate": 1.0},
        feedback="supernet",
    )
    forms = genotype.to_json(), genotype.canonical().to_json()
    return Record(index, *forms, 0, evaluation, earlier, "2026-01-01T00:00:00+00:00")


@pytest.fixture
def study(tmp_path):
    """Four epochs that derived the architectures 0, 1, 1, 2."""
    environment = {"command": ["python"]}
    with Study.create(tmp_path, "restoration", "demo", {}, environment, ranking="last") as study:
        for index, (which, earlier) in enumerate([(0, None), (1, None), (1, 1), (2, None)]):
            study.append(record(index, GENOTYPES[which], earlier))
        alphas = torch.full((4, 5, 6), 1 / 6)
        alphas[3, 4] = torch.tensor([0.05, 0.05, 0.05, 0.7, 0.1, 0.05])
        alphas[3, 3] = torch.eye(6)[5]
        betas = torch.full((4, 6, 3), 1 / 3)
        betas[:, 0] = torch.tensor([0.0, 0.25, 0.75])
        study.save_checkpoint({"alphas": alphas, "betas": betas})
        yield study


def test_supernet_history(study):
    page = write_report(study, REPORT).read_text()
    for text in ("Losses and validation", "Supernet history", "PSNR of the supernet, dB"):
        assert text in page
    assert "another architecture was derived (2)" in page
    assert "2 → node 1, epoch 4: def3x3 0.700" in page
    assert "layer 1, level 0, epoch 2: wider 0.750" in page
    cells = re.findall(r'<rect[^>]*class="c\d"[^>]*fill-opacity="([\d.]+)"', page)
    assert len(cells) == 4 * (5 + 6)
    assert min(cells) == "0.12"
    assert cells.count("1.00") == 2 + 4  # two edges that decided, one entirely; a move in 4 epochs
    charts = re.findall(r'<svg[^>]*class="chart".*?</svg>', page, re.DOTALL)
    losses = next(chart for chart in charts if "loss of the architecture" in chart)
    assert losses.count('class="line c0"') == losses.count('class="line c1"') == 1
    assert losses.count('class="line gate"') == 2  # where the architecture changed
    for chart in charts:
        ElementTree.fromstring(chart)


def test_history_of_depths_and_free_widths(study):
    space = IRNASSpace(layers=3, nodes=2, widths="free", searched_depth=True)
    fifth = record(4, space.decode([0] * 7), None)  # one layer
    fifth.evaluation.metrics["supernet"]["depth_entropy"] = 0.9
    study.append(fifth)
    depths = torch.tensor([[0.2, 0.5, 0.3]]).repeat(5, 1)
    betas = torch.full((5, 8, 5), 0.2)
    betas[:, 7, 0] = 0.4
    study.save_checkpoint(
        {"alphas": torch.full((5, 5, 6), 1 / 6), "betas": betas, "depths": depths}
    )
    page = write_report(study, REPORT).read_text()
    assert "exit, epoch 5: 2 layers 0.500" in page
    assert "layer 3, level 3, epoch 5: narrower by two 0.400" in page
    assert "number of layers (uniform: 1.10)" in page


def test_a_collapse_stands_first(study):
    assert 'class="warning"' not in write_report(study, REPORT).read_text()
    nodes = ((("skip", 0), ("skip", 1)), (("skip", 0), ("conv3x3", 1)))
    skips = replace(GENOTYPES[0], nodes=nodes)
    study.append(record(4, skips, None))
    page = write_report(study, REPORT).read_text()
    (section,) = re.findall(r'<section class="warning">.*?</section>', page)
    assert section.startswith('<section class="warning"><h2>Warning</h2><p>The search may have ')
    assert "collapsed: 3 of 4 operations are skips; in a new run" in section
    assert page.index(section) == page.index("<section")


def test_the_last_architecture_is_the_choice(study):
    page = write_report(study, REPORT).read_text()
    assert "The cell, after epoch 4" in page
    assert "<dt>PSNR</dt><dd>23.0000</dd>" in page
    assert "<dt>params</dt><dd>61.24 k</dd>" in page
    table = terminal_table(study, REPORT)
    assert table.title == "3 evaluated, 0 failed; the last first:"
    columns = table.columns
    assert [column.header for column in columns[:4]] == ["rank", "index", "supernet", "PSNR"]
    assert list(columns[1].cells) == ["3", "2", "0"]


def test_one_rule_for_what_counts(study):
    """The last epoch is the result, though an earlier one had more reward."""
    best = study.records[-1].evaluation
    worse = replace(best, rewards={"supernet": 0.6})
    study.append(replace(study.records[-1], index=4, evaluation=worse, duplicate_of=3))
    page = write_report(study, REPORT, baseline=study).read_text()
    assert "<dt>last reward, supernet</dt><dd>0.6000</dd>" in page
    assert "<td>last supernet reward</td><td>0.6000</td><td>0.6000</td>" in page
    assert "best" not in page.partition("<style>")[0] + page.partition("</style>")[2]
    assert "supernet, the last epoch is the result" in page
    chart = re.findall(r'<svg[^>]*class="chart".*?</svg>', page, re.DOTALL)[0]
    (line,) = re.findall(r'd="(M[^"]*)" class="line c0"', chart)
    heights = [float(point.split()[1]) for point in line[1:].split("L")]
    assert len(heights) == 5
    assert heights[4] > heights[0] > heights[3]  # down on the page, up in reward


def test_predictions_of_the_supernet(study):
    last = replace(study.records[-1], index=4)
    study.keep_files(last, {"boat.png": b"png"})
    study.append(last)
    page = write_report(study, REPORT).read_text()
    assert "<h2>Predictions of the supernet, after epoch 5</h2>" in page
    assert "<figcaption>supernet, epoch 5: boat</figcaption>" in page
    assert "The supernet's own output, operations mixed; the derived network is not" in page


def test_pictures_are_inside_the_page(study):
    assert "Predictions of" not in write_report(study, REPORT).read_text()
    for training in ("train-10", "train-9", "train-9-seed"):
        folder = study.path / training / "pictures"
        folder.mkdir(parents=True)
        Image.new("L", (8, 4), 100).save(folder / "boat.png")
    page = write_report(study, REPORT).read_text()
    assert page.count('src="data:image/png;base64,') == 3
    captions = re.findall(r"<figcaption>([^<]*: boat)</figcaption>", page)
    assert captions == ["train-9-seed: boat", "train-9: boat", "train-10: boat"]
    assert "://" not in re.sub(r"xmlns=\S+", "", page)
