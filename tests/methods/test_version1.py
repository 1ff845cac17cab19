"""Runs and models of before: they open, report, continue, train and are measured."""

import json
import shutil
from pathlib import Path

import pytest

from nasfast.commands import evaluate, search, train
from nasfast.utils.seals import read_sealed

FIXTURES = Path(__file__).parents[1] / "fixtures" / "version1"


def run_of(name, folder):
    return Path(shutil.copytree(FIXTURES / name, folder / name))


def records_of(run):
    return [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("name", "budget"), [("segmentation", 4), ("restoration_random", 3)])
def test_a_sampled_search_continues(name, budget, tmp_path, monkeypatch):
    monkeypatch.setenv("NASFAST_CACHE", str(tmp_path / "cache"))
    run = run_of(name, tmp_path)
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace("/home/user", str(tmp_path)))
    before = records_of(run)
    assert search.main(["--resume", str(run), "--budget", str(budget)]) == 0
    after = records_of(run)
    assert after[: len(before)] == before
    assert [record["index"] for record in after] == list(range(len(after)))
    assert sum(record["duplicate_of"] is None for record in after) == budget
    assert after[-1]["version"] == 5
    assert after[-1]["evaluation"]["costs"]["params"] > 0


@pytest.mark.parametrize("epochs", [3, 4])  # where it ended, and one more
def test_a_search_by_gradient_continues(epochs, tmp_path):
    run = run_of("restoration", tmp_path)
    path = run / "config.toml"
    path.write_text(path.read_text().replace("epochs = 3", f"epochs = {epochs}"))
    assert search.main(["--resume", str(run)]) == 0
    assert len(records_of(run)) == epochs
    assert records_of(run)[:3] == records_of(FIXTURES / "restoration")


def test_the_last_architecture_of_a_search_by_gradient_is_trained(tmp_path):
    run = run_of("restoration", tmp_path)
    flags = "--device cpu --steps 1 --batch-size 1 --crop 16"
    assert train.main([str(run), *flags.split(), "--out", str(tmp_path / "out")]) == 0
    genotype = read_sealed(tmp_path / "out" / "genotype.json")
    assert genotype == records_of(run)[-1]["genotype"]


@pytest.mark.parametrize("name", ["segmentation", "restoration"])
def test_models_are_measured(name, tmp_path):
    out = Path(shutil.copytree(FIXTURES / f"{name}_training", tmp_path / "train-1"))
    split = ["--split", "val", "--pictures", "0"] if name == "restoration" else []
    assert evaluate.main([str(out), "--device", "cpu", "--seconds", "0.1", *split]) == 0
    found = json.loads((out / "evaluation.json").read_text())
    metrics = json.loads((out / "metrics.json").read_text())
    for cost in ("params", "macs"):
        assert found[cost] == metrics[cost]
