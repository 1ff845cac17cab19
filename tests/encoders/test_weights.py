import json
import pickle
import re

import pytest
import torch
from safetensors.torch import save_file

from nasfast.data import SyntheticStreets, normalize
from nasfast.encoders import (
    PACKAGED_WEIGHTS,
    MobileNetV2,
    load_encoder,
    read_metadata,
    read_weights,
)
from nasfast.utils.errors import UserError


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
    assert read_metadata(tmp_path / "w.safetensors") == metadata


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


NO_WIDTH = "to be a JSON object with the width of the encoder, got "
NOT_FLAT = "expected a flat dict of tensors in PATH, got"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.pth", None, "weights: no file PATH; give a .safetensors, .pth or .pt file"),
        (
            "w.onnx",
            b"",
            "weights: expected a .safetensors, .pth or .pt file, got w.onnx; convert it first",
        ),
        (
            "w.pth",
            {"state_dict": {"a": torch.zeros(1)}},
            rf"weights: {NOT_FLAT} dict; save model.state_dict\(\) alone",
        ),
        ("w.pth", [torch.zeros(1)], rf"weights: {NOT_FLAT} list; save model.state_dict\(\) alone"),
        (
            "w.safetensors",
            b"none at all",
            r"weights: expected a complete .*, got PATH \(.*\); .*",
        ),
        ("w.safetensors", "{", f"weights PATH: expected .* {NO_WIDTH}'{{'; give another file"),
        ("w.safetensors", "[1]", f"weights PATH: expected .* {NO_WIDTH}.*; give another file"),
        ("w.safetensors", '{"width": null}', f"weights PATH: expected .* {NO_WIDTH}.*; give .*"),
        ("w.safetensors", "{}", r"mobilenet_v2 weights PATH: \d+ key\(s\) missing: features.0.0.*"),
    ],
)
def test_files_of_another_kind(tmp_path, name, content, message):
    """Absent, or bytes, a pickled object, or a tensor with that description."""
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        save_file({"a": torch.zeros(1)}, path, {"nasfast.encoder": content})
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError) as error:
        load_encoder(path)
    assert re.fullmatch(message.replace("PATH", re.escape(str(path))), str(error.value))


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
