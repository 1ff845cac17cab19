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


@pytest.mark.parametrize(("name", "width"), [("w.pth", 1.0), ("w.safetensors", 0.5)])
def test_width_is_that_of_the_metadata_or_one(tmp_path, name, width):
    source, path = MobileNetV2(width).state_dict(), tmp_path / name
    metadata = {}
    if width == 1:
        torch.save(source, path)
    else:
        metadata = {"nasfast.encoder": json.dumps({"name": "mobilenet_v2", "width": width})}
        save_file(source, path, metadata)
        assert read_metadata(path) == metadata
    encoder = load_encoder(path)
    assert (encoder.width, encoder.training) == (width, False)
    assert_same(encoder, source)
    assert read_weights(path)[1] == metadata


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
    assert str(caught.value) == (
        f"weights: expected a state dict in {path}, got a pickled {EVIL}; save it again with "
        "torch.save(model.state_dict(), path)"
    )
    assert not Evil.ran


EVIL = "setattr"
NO_WIDTH = "weights PATH: expected the metadata .* to be a JSON object with the width .*, got "
NOT_FLAT = "weights: expected a flat dict of tensors in PATH, got "
ALONE = r"; save model.state_dict\(\) alone"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.pth", None, "weights: no file PATH; give a .safetensors, .pth or .pt file"),
        ("w.onnx", b"", "weights: expected a .safetensors.* file, got w.onnx; convert it first"),
        ("w.pth", {"state_dict": {"a": torch.zeros(1)}}, f"{NOT_FLAT}dict{ALONE}"),
        ("w.pth", [torch.zeros(1)], f"{NOT_FLAT}list{ALONE}"),
        ("w.safetensors", b"x", r"weights: expected a complete .*, got PATH \(.*\); restore it .*"),
        ("w.safetensors", "{", f"{NO_WIDTH}'{{'; give another file"),
        ("w.safetensors", "[1]", f"{NO_WIDTH}.*; give another file"),
        ("w.safetensors", '{"width": null}', f"{NO_WIDTH}.*; give another file"),
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
