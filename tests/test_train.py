"""Full training of a segmentation network end to end: what it measures, its sources."""

import json
import shutil
import tomllib
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import nasfast
from nasfast.commands import search, train
from nasfast.data import SyntheticStreets, split_for_search
from nasfast.encoders import MobileNetV2
from nasfast.methods.segmentation import Segmentation
from nasfast.methods.segmentation.tasks import segmentation as segmentation_task
from nasfast.methods.segmentation.train import DecoderTraining, TrainConfig
from nasfast.models.decoders import DecoderConfig
from nasfast.runs.study import Study
from nasfast.spaces.fast_nas import FastNASSpace
from nasfast.training.loop import Runtime
from nasfast.utils.errors import UserError
from nasfast.utils.interrupt import StopRequested
from nasfast.utils.seals import read_sealed

PUBLISHED = [[8, [0, 0, 5, 2], [0, 2, 8, 8], [0, 5, 1, 4]], [[3, 3], [3, 2], [3, 0]]]


def test_what_a_training_measures(tiny_model):
    metrics = json.loads((tiny_model / "metrics.json").read_text())
    assert metrics["split"] == "val of three bands, 2 images"
    assert list(metrics["class_iou"]) == ["sky", "road", "[post]"]
    known = [iou for iou in metrics["class_iou"].values() if iou is not None]
    assert metrics["miou"] == pytest.approx(sum(known) / len(known))
    assert 0 < metrics["miou"] <= 1
    assert (metrics["size"], metrics["epochs"]) == ([32, 48], 4)
    for name in ("mean_accuracy", "fw_iou", "params", "macs", "seconds"):
        assert metrics[name] > 0
    with safe_open(tiny_model / "model.safetensors", "pt") as file:
        description = json.loads(file.metadata()["nasfast.segmenter"])
        parameters = [k for k in file.keys() if not k.endswith(("running_mean", "running_var"))]  # noqa: SIM118
        count = sum(
            file.get_tensor(k).numel()
            for k in parameters
            if "num_batches" not in k and "aux_heads" not in k
        )
    assert count == metrics["params"]
    assert description["classes"] == ["sky", "road", "[post]"]
    assert description["decoder"] == {"agg_size": 8, "sep_repeats": 2, "aux_cell": False}


@pytest.mark.parametrize("form", ["list", "dict", "best.json"])
def test_genotype_files(form, tiny_run, tiny_training, tmp_path):
    path = tmp_path / "genotype.json"
    best = json.loads((tiny_run / "best.json").read_text())
    content = {"list": PUBLISHED, "dict": best["genotype"], "best.json": best}[form]
    path.write_text(json.dumps(content))
    config, genotype = train.resolve(Segmentation(), TrainConfig(path))
    if form == "list":
        assert genotype.to_json()["cell"] == PUBLISHED[0]
    else:
        assert genotype.to_json() == best["genotype"]
    assert (config.data, config.encoder_weights) == ("synthetic", None)
    assert config.out == tmp_path.resolve() / "train-1"


def few(monkeypatch, size):
    """Generated scenes, but few of them."""
    data = [SyntheticStreets(n, size=size, stream=s) for n, s in ((8, "train"), (2, "val"))]
    monkeypatch.setattr(
        segmentation_task, "load_splits", lambda *a, **k: split_for_search(*data, seed=0)
    )


@pytest.mark.parametrize(
    ("size", "given", "crop"), [((96, 128), None, 96), ((96, 128), 64, 64), ((300, 320), None, 288)]
)
def test_crops_fit_the_data(size, given, crop, tiny_weights, tmp_path, monkeypatch):
    few(monkeypatch, size)
    config = TrainConfig(
        tmp_path,
        data="synthetic",
        encoder_weights=tiny_weights,
        decoder=DecoderConfig(8),
        crop=given,
    )
    runtime = Runtime(torch.device("cpu"))
    genotype = FastNASSpace().from_json(PUBLISHED)
    assert DecoderTraining(config, genotype, tmp_path / "out", runtime).settings.crop == crop


def test_a_genotype_file_trains_for_ten_steps(tiny_weights, tmp_path, monkeypatch):
    few(monkeypatch, (96, 128))
    path, out = tmp_path / "genotype.json", tmp_path / "train-1"
    path.write_text(json.dumps(PUBLISHED))
    flags = "--device cpu --epochs 5 --batch-size 4 --decoder.agg-size 8 --encoder-weights"
    assert train.main([str(path), *flags.split(), str(tiny_weights)]) == 0
    assert tomllib.loads((out / "config.toml").read_text())["crop"] == 96
    genotype = json.loads((out / "metrics.json").read_text())["genotype"]
    assert genotype["connections"] == PUBLISHED[1]
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert [schedule["last_epoch"] for schedule in state["schedules"]] == [10, 10]
    assert all(optimizer["param_groups"][0]["lr"] < 1e-9 for optimizer in state["optimizers"])


def test_data_that_changed_since_the_search_is_mentioned(own_run, tiny_training, capsys):
    flags = [*tiny_training[1:], "--epochs", "1"]
    assert train.main([str(own_run), *flags]) == 0
    assert "warning" not in capsys.readouterr().out
    for path in own_run.parent.glob("data/*/images/*.png"):
        Image.new("RGB", (48, 32), (7, 8, 9)).save(path)
    torch.manual_seed(1)
    save_file(
        MobileNetV2(0.35).state_dict(),
        own_run.parent / "encoder.safetensors",
        {"nasfast.encoder": '{"width": 0.35}'},
    )
    assert train.main([str(own_run), *flags]) == 0
    assert (
        f"warning: {own_run}: the training data, validation data, encoder changed since the search "
        "read them; the network is trained on what is there now\n" in capsys.readouterr().out
    )


def test_source_run_decides_and_flags_override(tiny_run, tiny_data):
    ranking = Study.open(tiny_run, read_only=True).ranking()
    config, genotype = train.resolve(Segmentation(), TrainConfig(tiny_run, rank=2))
    assert genotype.to_json() == ranking[1].genotype
    assert (config.data, config.out) == (str(tiny_data), tiny_run / "train-1")
    assert config.encoder_weights is not None
    assert config.encoder_weights.name == "tiny.safetensors"
    assert (
        train.resolve(Segmentation(), TrainConfig(tiny_run, data="synthetic"))[0].data
        == "synthetic"
    )


class Trained:
    """A training without a step."""

    done, rounds, summary = 0, 0, "nothing to do"

    def __init__(self, settings, out):
        self.settings, self.out = settings, out

    def inputs(self, config):
        return {}

    def finish(self):
        (self.out / "predictions").mkdir()
        (self.out / "predictions" / "street.png").write_bytes(b"png")
        return "finished"


def test_a_training_in_a_run_is_shown_by_its_report(tmp_path, monkeypatch, capsys):
    old = Path(__file__).parent / "fixtures" / "version1" / "segmentation"
    run = shutil.copytree(old, tmp_path / "a run")
    monkeypatch.setattr(Segmentation, "training", lambda self, s, genotype, out, r: Trained(s, out))
    assert train.main([str(run), "--device", "cpu"]) == 0
    assert f"open '{run}/report.html'\n" in capsys.readouterr().out
    assert "<figcaption>train-1: street</figcaption>" in (run / "report.html").read_text()
    (run / "report.html").unlink()
    assert train.main([str(run), "--device", "cpu", "--out", str(tmp_path / "elsewhere")]) == 0
    assert not (run / "report.html").exists()


@pytest.fixture
def front_run(tmp_path, monkeypatch):
    """A run that looked for score and MACs, whose trainings have no steps."""
    old = Path(__file__).parent / "fixtures" / "version1" / "segmentation"
    run = shutil.copytree(old, tmp_path / "run")
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(f'objective = ["score", "macs"]\n{config}')
    monkeypatch.setattr(Segmentation, "training", lambda self, s, genotype, out, r: Trained(s, out))
    return run


def trained(run):
    """Genotypes of the trainings in a run, in their order."""
    folders = sorted(run.glob("train-*"))
    return [read_sealed(folder / "genotype.json") for folder in folders]


@pytest.mark.parametrize(("count", "chosen"), [(1, [0]), (2, [0, 1]), (9, [0, 1])])
def test_architectures_of_a_front_are_trained(count, chosen, front_run, capsys):
    """The third passed one stage alone; more than there are is all."""
    assert train.main([str(front_run), "--front", str(count), "--device", "cpu"]) == 0
    records = Study.open(front_run, read_only=True).records
    assert trained(front_run) == [records[i].genotype for i in chosen]
    said = f"architectures {', '.join(map(str, chosen))}: {len(chosen)} of 2 on the front\n"
    assert said in capsys.readouterr().out
    assert "front" not in tomllib.loads((front_run / "train-1" / "config.toml").read_text())


def test_a_front_that_is_stopped_says_what_is_left(front_run, monkeypatch, capsys):
    def stop(*_):
        raise StopRequested

    monkeypatch.setattr(train, "fit", stop)
    assert train.main([str(front_run), "--front", "2", "--device", "cpu"]) == 130
    assert "not begun: --rank 2 of the front\n" in capsys.readouterr().out
    assert len(trained(front_run)) == 1


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ("RUN --front 2 --rank 2", "expected --front or --rank, got both: the front has"),
        ("RUN --front 2 --out x", "expected --front or --out, got both: the front has"),
        ("FILE --front 2", "expected a run of a search for --front, got FILE; give its directory"),
        ("fast_nas_arch0 --front 2", "expected a run of a search for --front, got fast_nas_arch0;"),
        ("PLAIN --front 2", "expected a run with several objectives for --front, got PLAIN, which"),
        ("EMPTY --front 2", "expected a run that found an architecture, got EMPTY, where 0 candid"),
    ],
)
def test_a_front_that_cannot_be_trained(flags, text, front_run, tmp_path, capsys):
    old = Path(__file__).parent / "fixtures" / "version1" / "segmentation"
    places = {"RUN": front_run, "FILE": tmp_path / "genotype.json", "EMPTY": tmp_path / "empty"}
    places["PLAIN"] = shutil.copytree(old, tmp_path / "plain")
    places["FILE"].write_text(json.dumps(PUBLISHED))
    (shutil.copytree(front_run, places["EMPTY"]) / "records.jsonl").write_text("")
    words = [str(places.get(word, word)) for word in flags.split()]
    assert train.main([*words, "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    for name, place in places.items():
        said = said.replace(str(place), name)
    assert text in said.replace("\n", " ")
    assert list(front_run.glob("train-*")) == []


def test_one_architecture_at_a_time_in_python(front_run):
    with pytest.raises(
        UserError, match=r"^train: expected one architecture, got front=3; give a r"
    ):
        nasfast.train(front_run, front=3)


def test_a_search_for_a_front_and_its_trainings(tiny_search, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Segmentation, "training", lambda self, s, genotype, out, r: Trained(s, out))
    flags = "--budget 3 --batch 1 --stage0.epochs 1 --strategy evolution --objective score params"
    limit = ["--constraint", "macs<1G", "--runs", str(tmp_path)]
    assert search.main([*tiny_search, *flags.split(), *limit]) == 0
    (run,) = tmp_path.iterdir()
    assert "* on the front of" in capsys.readouterr().out
    front = json.loads((run / "front.json").read_text())
    assert front["objectives"] == ["score", "params"]
    assert set(json.loads((run / "published.json").read_text())) > {"fast_nas_arch0"}
    assert search.main(["--resume", str(run)]) == 0
    assert json.loads((run / "front.json").read_text()) == front
    assert train.main([str(run), "--front", "5", "--device", "cpu"]) == 0
    assert trained(run) == [record["genotype"] for record in front["front"]]
