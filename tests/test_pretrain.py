"""Training of the packaged encoder end to end, in miniature."""

import pytest
import torch
from search_runs import full_disk

from nasfast.commands import pretrain
from nasfast.encoders import MobileNetV2, load_encoder, read_weights

TINY = ["--device", "cpu", "--width", "0.1", "--frames", "24"]
TINY += ["--epochs", "1", "--batch-size", "8", "--crop", "48"]


def test_it_writes_weights_that_load(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    paths = [tmp_path / "new" / "encoder.safetensors", tmp_path / "mobilenet_v2_010.safetensors"]
    for flags in (["--out", "new/encoder.safetensors"], []):
        assert pretrain.main([*TINY, *flags]) == 0
    assert sorted(tmp_path.iterdir()) == [paths[1], paths[0].parent]
    tensors, metadata = read_weights(paths[0])
    again, described = read_weights(paths[1])
    assert described == metadata
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)
    encoder = load_encoder(paths[0])
    assert encoder.width == 0.1
    assert metadata.keys() == {"nasfast.encoder", "nasfast.pretrain"}
    floats = {value.dtype for value in tensors.values() if value.is_floating_point()}
    assert floats == {torch.float16}
    torch.manual_seed(0)
    start = MobileNetV2(0.1).state_dict()
    assert any(not torch.equal(start[key].half(), tensors[key].half()) for key in start)
    assert all(tap.isfinite().all() for tap in encoder(torch.rand(1, 3, 64, 64)))


def test_nothing_is_overwritten_without_a_word(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mobilenet_v2_010.safetensors"
    path.write_text("mine")
    assert pretrain.main(TINY) == 2
    assert capsys.readouterr().err == (
        "error: out: expected a file that does not exist yet, got mobilenet_v2_010.safetensors; "
        "give another --out, or --overwrite\n"
    )
    assert path.read_text() == "mine"

    def train(config, runtime, console):
        assert path.read_text() == "mine"  # it is replaced at the end
        return MobileNetV2(config.width), 0.5

    monkeypatch.setattr(pretrain, "_train", train)
    assert pretrain.main([*TINY, "--overwrite"]) == 0
    assert load_encoder(path).width == 0.1
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_shows_before_the_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretrain, "_train", lambda *arguments: pytest.fail("trained"))
    path = tmp_path / "w.safetensors"
    with full_disk(10_000):
        assert pretrain.main([*TINY, "--out", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: [Errno 27] File too large: '{path}'; make room there: ")
    assert list(tmp_path.iterdir()) == []
