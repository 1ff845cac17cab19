import json
import pickle
import re

import pytest
import torch
from safetensors.torch import save_file

from nasfast.data import SyntheticStreets, normalize
from nasfast.encoders import PACKAGED_WEIGHTS, MobileNetV2, load_encoder, read_weights


def assert_same(encoder, state):
    assert all(torch.equal(v, state[k]) for k, v in encoder.state_dict().items())


def test_pth_is_width_one(tmp_path):
    source = MobileNetV2()
    torch.save(source.state_dict(), tmp_path / "w.pth")
    encoder = load_encoder(tmp_path / "w.pth")
    assert encoder.width == 1.0
    assert not encoder.training
    assert_same(encoder, source.state_dict())


def test_safetensors_width_from_metadata(tmp_path):
    source = MobileNetV2(0.5)
    metadata = {"nasfast.encoder": json.dumps({"name": "mobilenet_v2", "width": 0.5})}
    save_file(source.state_dict(), tmp_path / "w.safetensors", metadata)
    encoder = load_encoder(tmp_path / "w.safetensors")
    assert encoder.width == 0.5
    assert_same(encoder, source.state_dict())
    assert read_weights(tmp_path / "w.safetensors")[1] == metadata


def test_absent_file(tmp_path):
    path = tmp_path / "w.pth"
    message = f"weights: no file {path}; give a .safetensors, .pth or .pt file"
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(message)}$"):
        read_weights(path)


def test_wrong_suffix(tmp_path):
    path = tmp_path / "w.onnx"
    path.touch()
    message = "weights: expected a .safetensors, .pth or .pt file, got w.onnx; convert it first"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        read_weights(path)


class Evil:
    ran = False

    def __reduce__(self):
        return setattr, (Evil, "ran", True)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_is_refused(tmp_path, legacy):
    path = tmp_path / "w.pth"
    if legacy:
        path.write_bytes(pickle.dumps({"a": Evil()}))
    else:
        torch.save({"a": Evil()}, path)
    with pytest.raises(ValueError) as caught:
        read_weights(path)
    assert str(caught.value).startswith(f"weights: {path} could not be read as a plain state dict")
    assert str(caught.value).endswith("save it again with torch.save(model.state_dict(), path)")
    assert not Evil.ran


@pytest.mark.parametrize(
    ("content", "kind"),
    [({"state_dict": {"a": torch.zeros(1)}}, "dict"), ([torch.zeros(1)], "list")],
)
def test_not_a_flat_dict(tmp_path, content, kind):
    path = tmp_path / "w.pth"
    torch.save(content, path)
    message = (
        f"weights: expected a flat dict of tensors in {path}, got {kind}; save model.state_dict() "
        "alone"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        read_weights(path)


def test_broken_safetensors(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"no safetensors at all")
    with pytest.raises(ValueError, match=f"^weights: {re.escape(str(path))} is not a safetensors"):
        read_weights(path)


def test_imagenet_file(data_root):
    path = data_root / "weights" / "mobilenet_v2_imagenet.safetensors"
    encoder = load_encoder(path)
    state, _ = read_weights(path)
    assert encoder.width == 1.0
    own = encoder.state_dict()
    assert_same(encoder, {k: state[k].to(v.dtype) if k in state else v for k, v in own.items()})
    assert {k for k in own if k not in state} <= {k for k in own if "num_batches" in k}


def test_packaged_encoder():
    assert PACKAGED_WEIGHTS.stat().st_size <= 1.5 * 2**20
    encoder = load_encoder()
    assert encoder.width == 0.35
    assert not encoder.training
    image = SyntheticStreets(1, stream="val")[0].image
    with torch.no_grad():
        taps = encoder(normalize(image[None]))
    for tap in taps:
        assert tap.isfinite().all()
        assert tap.std() > 0.1
