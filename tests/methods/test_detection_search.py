"""The search of detectors in two phases, killed and resumed in both, and what comes after it."""

import json
import random
import signal
import tomllib

import pytest
import torch
from folders import voc_object, write_boxes
from safetensors.torch import save_file
from search_runs import Crash, assert_same, crashed, start, wait_for_records

from nasfast.commands import profile, search, train
from nasfast.latency import Profile
from nasfast.latency.profile import operators_on
from nasfast.methods.detection import search as detection
from nasfast.methods.detection.settings import PRESETS, parse
from nasfast.runs.records import Record
from nasfast.runs.study import Study
from nasfast.spaces.nas_fcos import FPN_OPS, HEAD_OPS, STOCK, NASFCOSSpace
from nasfast.tasks.detection.losses import LOSSES
from nasfast.utils.errors import UserError

FLAGS = """
    --device cpu --budget 4 --head-phase.budget 2 --held-out 0.3
    --detector.width 32 --head-phase.width 32 --head-phase.pyramids 2 --head-phase.pyramid-epochs 2
    --stage0.samples 8 --stage0.crop 64 --stage0.shorter-side 64
    --stage0.epochs 1 --stage0.batch-size 4 --stage0.polyak-decay 0.5
    --ppo.lr 0.05 --ppo.batch-size 2 --ppo.minibatch-size 2
    --batch 2 --threads 1 --workers 1
"""


@pytest.fixture(scope="module")
def tiny_boxes(tmp_path_factory):
    """Images of cells and plates, one without either."""
    cell, plate = voc_object("cell", 11, 6, 30, 25), voc_object("plate", 20, 10, 55, 39)
    names = "abcdefgh"
    objects = {name: cell if i % 2 else plate for i, name in enumerate(names)} | {"b": ""}
    parts = {"train": "abcdef", "val": "g", "test": "h"}
    return write_boxes(tmp_path_factory.mktemp("boxes"), parts, objects)


@pytest.fixture(scope="module")
def words(tiny_boxes, tiny_weights, tmp_path_factory):
    """Command line of a search that takes seconds; the caller adds --runs."""
    torch.set_num_threads(1)
    cache = tmp_path_factory.mktemp("cache")
    places = f"--data {tiny_boxes} --encoder-weights {tiny_weights} --cache-dir {cache}"
    return ["detection", *FLAGS.split(), *places.split()]


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    """Run of that search, never interrupted."""
    runs = tmp_path_factory.mktemp("detection")
    assert search.main([*words, "--runs", str(runs)]) == 0
    (run,) = runs.iterdir()
    return run


def records(run):
    lines = (run / "records.jsonl").read_text().splitlines()
    return [Record.from_json(json.loads(line)) for line in lines]


def test_pyramids_come_first_and_then_heads_on_one_of_them(whole):
    found = [(r.phase, NASFCOSSpace().from_json(r.genotype), r) for r in records(whole)]
    assert [phase for phase, _, _ in found] == [0, 0, 0, 0, 1, 1]
    pyramids = [genotype.fpn for phase, genotype, _ in found if phase == 0]
    assert all(genotype.head is None for phase, genotype, _ in found if phase == 0)
    choice = json.loads((whole / "checkpoint" / "phase-1" / "pyramid.json").read_text())
    assert {genotype.fpn for phase, genotype, _ in found if phase == 1} == {
        pyramids[choice["architecture"]]
    }
    for _, genotype, record in found:
        assert genotype.valid
        assert record.evaluation.rewards["stage0"] < 0
        assert {"ap", "ap50"} <= record.evaluation.metrics["stage0"].keys()
        assert {"params", "macs"} <= record.evaluation.costs.keys()
    best = json.loads((whole / "best.json").read_text())
    assert NASFCOSSpace().from_json(best["genotype"]).head is not None
    page = (whole / "report.html").read_text()
    assert "The pyramid of architecture" in page
    assert "The head of architecture" in page
    assert "Reward against AP50" in page


def test_a_reward_is_minus_the_losses(whole):
    for record in records(whole):
        metrics = record.evaluation.metrics["stage0"]
        losses = [metrics[f"loss_{name}"] for name in LOSSES]
        assert len(losses) == 3
        assert record.evaluation.rewards["stage0"] == pytest.approx(-sum(losses))


@pytest.mark.parametrize("count", [1, 5])
def test_a_kill_in_either_phase_changes_nothing(count, whole, words, tmp_path):
    process = start([*words, "--runs", str(tmp_path)])
    run = wait_for_records(process, tmp_path, count)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert search.main(["--resume", str(run)]) == 0
    assert_same(run, whole)


def test_a_crash_between_the_phases_changes_nothing(whole, words, tmp_path):
    """While the best pyramids are trained longer; nothing of it is kept, and it is done again."""

    def arrange(patch):
        def crash(*_):
            raise Crash

        patch.setattr(detection.PyramidTraining, "show", crash)

    run = crashed([*words, "--runs", str(tmp_path)], tmp_path, arrange)
    assert not (run / "checkpoint" / "phase-1").exists()
    assert search.main(["--resume", str(run)]) == 0
    assert_same(run, whole)


def test_two_workers_find_the_same(whole, words, tmp_path):
    assert search.main([*words, "--workers", "2", "--runs", str(tmp_path)]) == 0
    (run,) = tmp_path.iterdir()
    rewards = [[r.evaluation.rewards for r in records(each)] for each in (run, whole)]
    assert rewards[0] == rewards[1]


def test_a_damaged_pyramid_is_named(whole, words, tmp_path, capsys):
    def arrange(patch):
        append = Study.append

        def crash(study, record):
            if record.phase == 1:
                raise Crash
            append(study, record)

        patch.setattr(Study, "append", crash)

    run = crashed([*words, "--runs", str(tmp_path)], tmp_path, arrange)
    weights = run / "checkpoint" / "phase-1" / "pyramid.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    capsys.readouterr()
    assert search.main(["--resume", str(run)]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert f"{weights}: expected a complete safetensors file, got " in error
    assert f"remove {weights.parent}: it is trained again" in error
    save_file({"p6": torch.zeros(1)}, weights)
    assert search.main(["--resume", str(run)]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "pyramid.safetensors: expected the weights of the chosen pyramid, got " in error
    for path in weights.parent.iterdir():
        path.unlink()
    weights.parent.rmdir()
    assert search.main(["--resume", str(run)]) == 0
    assert_same(run, whole)


def test_joint_search_without_the_deformable_convolution(words, tmp_path):
    flags = "--mode joint --primitives plain --budget 2 --detector.cat full"
    assert search.main([*words, *flags.split(), "--runs", str(tmp_path)]) == 0
    (run,) = tmp_path.iterdir()
    for record in records(run):
        genotype = NASFCOSSpace().from_json(record.genotype)
        assert genotype.fpn is not None
        assert genotype.head is not None
        names = {FPN_OPS[op] for block in genotype.fpn for op in block[2:4]}
        assert "def_conv_3x3" not in names | {HEAD_OPS[op] for op in genotype.head.ops}


def test_a_found_detector_is_trained(whole, tiny_weights, tmp_path):
    out = tmp_path / "out"
    flags = "--device cpu --epochs 1 --batch-size 2 --crop 64 --shorter-side 64"
    command = [str(whole), "--out", str(out), "--encoder-weights", str(tiny_weights)]
    assert train.main([*command, *flags.split()]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    best = json.loads((whole / "best.json").read_text())
    assert metrics["genotype"] == best["genotype"]
    settings = tomllib.loads((out / "config.toml").read_text())
    assert settings["detector"]["width"] == 32  # the search's
    assert (
        tomllib.loads((out / "config.toml").read_text())["data"]
        == (tomllib.loads((whole / "config.toml").read_text())["data"])
    )


def test_presets():
    paper = PRESETS["paper"]
    assert paper.detector.width == 64
    assert (paper.head_phase.width, paper.stage0.crop, paper.stage0.lr) == (128, 384, 8e-4)
    assert paper.stage0.epochs * (paper.stage0.samples // paper.stage0.batch_size) == 300
    assert paper.loss.size_scale == pytest.approx(384 / 800)
    assert PRESETS["quick"].budget + PRESETS["quick"].head_phase.budget == 24
    assert parse(["detection"]).preset == "demo"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--detector.width 40", "width: expected a multiple of 32"),
        ("--head-phase.width 40", "head_phase: width: expected a multiple of 32"),
        ("--held-out 1.5", "held_out: expected a value above 0"),
        ("--mode heads", ""),
    ],
)
def test_settings_that_do_not_fit(flags, message, words, tmp_path, capsys):
    with pytest.raises((UserError, SystemExit)) as error:
        parse([*words, *flags.split(), "--runs", str(tmp_path)])
    assert message in str(error.value) + capsys.readouterr().err


def test_crops_without_objects_are_refused(tmp_path, tiny_weights, capsys):
    """Rewards would say nothing. All objects lie left of the centre crops."""
    objects = dict.fromkeys("abcdefgh", voc_object("cell", 1, 6, 7, 25))
    parts = {"train": "abcdef", "val": "g", "test": "h"}
    data = write_boxes(tmp_path / "boxes", parts, objects)
    places = f"--data {data} --encoder-weights {tiny_weights} --cache-dir {tmp_path / 'cache'}"
    command = ["detection", *FLAGS.split(), *places.split(), "--runs", str(tmp_path / "runs")]
    assert search.main(command) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "error: search: expected objects in the crops to " in error
    assert "got none that a point learns; make --stage0.crop" in error


def test_a_table_without_the_heads_is_refused_at_once(words, tmp_path, monkeypatch, capsys):
    def measured(target, space, draw, heartbeat):
        with torch.device("meta"):
            operators = operators_on(target, draw(random.Random(0)))
        return Profile(target, space, ((operators, 5.0),), dict.fromkeys(operators, 0.1))

    monkeypatch.setattr(profile, "measured_profile", measured)
    table = str(tmp_path / "table.json")
    assert profile.main([*words, "--out", table]) == 0
    more = ["--objective", "score", "latency", "--latency-table", table, "--head-phase.width", "96"]
    assert search.main([*words, *more, "--strategy", "random", "--runs", str(tmp_path)]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert error == (
        f"error: latency-table {table}: expected times of the heads of the second phase too, whose "
        "width is 96, got a table for 32; give --head-phase.width 32, or --mode joint"
    )


def test_the_stock_detector_is_no_candidate():
    with pytest.raises(UserError, match="expected a searched pyramid, got the stock one"):
        NASFCOSSpace("fpn").encode(STOCK)
