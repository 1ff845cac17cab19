"""The search of template networks, and what comes after it, on tiny data."""

import json
import signal

import pytest
from search_runs import assert_same, before_a_checkpoint, crashed, start, wait_for_records

from nasfast.commands import evaluate, export, predict, search, train
from nasfast.methods import templates
from nasfast.methods.templates.settings import PRESETS
from nasfast.models.zoo import ZOO
from nasfast.runs.records import Record


@pytest.fixture(scope="module")
def tiny_templates(tiny_search):
    """With a gate after each of two epochs, and half of the space too large."""
    more = "--max-params 40k --stage1.epochs 2 --stage1.gate-epochs --budget 4"
    return ["templates", *tiny_search, *more.split()]


@pytest.fixture(scope="module")
def whole(tiny_templates, tmp_path_factory):
    runs = tmp_path_factory.mktemp("templates")
    assert search.main([*tiny_templates, "--runs", str(runs)]) == 0
    (run,) = runs.iterdir()
    return run


def records(run):
    lines = (run / "records.jsonl").read_text().splitlines()
    return [Record.from_json(json.loads(line)) for line in lines]


def test_candidates_fit_and_are_gated_after_every_epoch(whole):
    found = records(whole)
    assert all(record.evaluation.params <= 40_000 for record in found)
    names = ["stage0", "stage1.1", "stage1.2"]
    passed = {len(record.evaluation.rewards) for record in found}
    assert all(list(r.evaluation.rewards) == names[: len(r.evaluation.rewards)] for r in found)
    assert 3 in passed  # the first batch has no gates
    assert "The templates of architecture" in (whole / "report.html").read_text()


def test_a_crash_changes_nothing(whole, tiny_templates, tmp_path):
    run = crashed([*tiny_templates, "--runs", str(tmp_path)], tmp_path, before_a_checkpoint)
    assert search.main(["--resume", str(run)]) == 0
    assert_same(run, whole)


def test_a_kill_changes_nothing(whole, tiny_templates, tmp_path):
    process = start([*tiny_templates, "--runs", str(tmp_path)])
    run = wait_for_records(process, tmp_path, 2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert search.main(["--resume", str(run)]) == 0
    assert_same(run, whole)


def test_two_workers_find_the_same(whole, tiny_templates, tmp_path):
    command = [*tiny_templates, "--workers", "2", "--runs", str(tmp_path)]
    assert search.main(command) == 0
    (run,) = tmp_path.iterdir()
    assert [r.evaluation.rewards for r in records(run)] == [
        r.evaluation.rewards for r in records(whole)
    ]


def test_a_found_network_is_trained_and_used(whole, tiny_data, tmp_path, capsys, nightly):
    """`evaluate` gives the figures of the training from its files alone; exports give the same,
    which inference/test_export.py asserts without --nightly, too."""
    out = tmp_path / "out"
    flags = "--device cpu --epochs 1 --batch-size 3 --crop 32 --decoder.agg-size 8"
    assert train.main([str(whole), "--out", str(out), *flags.split()]) == 0
    trained = json.loads((out / "metrics.json").read_text())
    assert evaluate.main([str(out), "--device", "cpu", "--seconds", "0.01"]) == 0
    measured = json.loads((out / "evaluation.json").read_text())
    assert measured["miou"] == pytest.approx(trained["miou"], abs=1e-12)
    assert measured["params"] == trained["params"]
    photo = next(tiny_data.glob("images/*.png"))
    predicted = tmp_path / "predicted"
    assert predict.main([str(out), str(photo), "--device", "cpu", "--out", str(predicted)]) == 0
    assert list(predicted.glob("*-overlay.png"))
    if nightly:
        assert export.main([str(out), "--out", str(tmp_path / "net.onnx")]) == 0


def test_damage_is_one_line(whole, tmp_path, capsys):
    genotype = tmp_path / "g.json"
    genotype.write_text(json.dumps(ZOO["template_nas_arch0"].genotype.to_json() | {"layers": []}))
    assert train.main([str(genotype), "--data", "synthetic"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "layers" in error
    assert error.count("\n") == 1
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"\x80\0\0\0")
    assert evaluate.main([str(file)]) == 2
    assert "expected a complete safetensors file" in capsys.readouterr().err


def test_the_paper_preset_is_the_published_search():
    """Specification: 1,000 crops of 321 pixels, batches of 32, 5 and 5 epochs, five gates."""
    paper = PRESETS["paper"]
    assert (paper.stage0.samples, paper.stage0.epochs, paper.stage0.batch_size) == (1000, 5, 32)
    assert (paper.stage1.epochs, paper.stage1.gate_epochs, paper.stage1.crop) == (5, True, 321)
    assert (paper.resize_longer, paper.val_crop, paper.decoder.agg_size) == (1024, 512, 48)
    assert paper.stage1.encoder_optimizer == "adam"
    assert set(templates.Templates.zoo) == {"template_nas_arch0", "template_nas_arch1"}
