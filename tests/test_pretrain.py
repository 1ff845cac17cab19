"""Training of the packaged encoder end to end, in miniature."""

import torch

from nasfast.commands import pretrain
from nasfast.encoders import MobileNetV2, load_encoder, read_weights

TINY = ["--device", "cpu", "--width", "0.1", "--frames", "24"]
TINY += ["--epochs", "1", "--batch-size", "8", "--crop", "48"]


def test_it_writes_weights_that_load(tmp_path):
    torch.set_num_threads(1)
    paths = [tmp_path / "new" / "encoder.safetensors", tmp_path / "again.safetensors"]
    for path in paths:
        assert pretrain.main([*TINY, "--out", str(path)]) == 0
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
