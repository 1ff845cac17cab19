import argparse
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
        f"weights: expected a state dict in {path}, got {EVIL[legacy]}; save it again with "
        "torch.save(model.state_dict(), path)"
    )
    assert not Evil.ran


EVIL = {False: "a pickled setattr", True: "nothing that torch.save wrote"}
NO_WIDTH = "weights PATH: expected the metadata .* to be a JSON object with the width .*, got "
NOT_FLAT = "weights: expected a dict of tensors in PATH, alone or as one of state_dict, .*, got a "
ALONE = r"; save model.state_dict\(\) alone"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.pth", None, "weights: no file PATH; give a .safetensors, .pth or .pt file"),
        ("w.onnx", b"", "weights: expected a .safetensors.* file, got w.onnx; convert it first"),
        (
            "some.pth",
            "a directory",
            "weights: expected a .safetensors, .* file, got the directory PATH; give a file in it",
        ),
        ("w.pth", {"epoch": 3, "loss": 0.5}, f"{NOT_FLAT}dict of epoch, loss{ALONE}"),
        ("w.pth", [torch.zeros(1)], f"{NOT_FLAT}list{ALONE}"),
        ("w.pth", torch.nn.ReLU(), r"weights: .* got a pickled torch.nn.modules.*ReLU; save it .*"),
        (
            "w.pth",
            MobileNetV2(0.5).state_dict(),
            r"mobilenet_v2 weights PATH: \d+ key\(s\) of another shape: features.*, features.* and "
            r"\d+ more. Expected torchvision's mobilenet_v2 state dict at width 1; convert the .*",
        ),
        (
            "w.safetensors",
            json.dumps({"width": 1e6}),
            "weights PATH: mobilenet_v2: expected a width above 0 and at most 10, got 1000000.*",
        ),
        ("w.safetensors", "[" * 100_000, f"{NO_WIDTH}.*; give another file"),
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
    if content == "a directory":
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        save_file({"a": torch.zeros(1)}, path, {"nasfast.encoder": content})
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError) as error:
        load_encoder(path)
    assert re.fullmatch(message.replace("PATH", re.escape(str(path))), str(error.value))


def prefixed(prefix, state):
    return {prefix + key: value for key, value in state.items()}


WRAPPED = {
    "state_dict": lambda state: {"state_dict": prefixed("module.", state), "epoch": 3},
    "lightning": lambda state: {"state_dict": prefixed("model.", state), "loops": {"a": [1]}},
    "torchvision": lambda state: {
        "model": state,
        "model_ema": {"n_averaged": torch.tensor(1)},
        "args": argparse.Namespace(lr=0.1),
    },
    "an average": lambda state: {
        "model_ema": {"n_averaged": torch.tensor(1)} | prefixed("module.", state)
    },
    "compiled": lambda state: {"model_state": prefixed("_orig_mod.module.", state)},
    "half": lambda state: {
        key: value.half() if value.is_floating_point() else value for key, value in state.items()
    },
}


@pytest.mark.parametrize("name", WRAPPED)
def test_checkpoints_of_training_scripts(name, tmp_path):
    state = {key: value.half().to(value) for key, value in MobileNetV2().state_dict().items()}
    torch.save(WRAPPED[name](state), tmp_path / "w.pth")
    encoder = load_encoder(tmp_path / "w.pth")
    assert_same(encoder, state)
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}


def test_damaged_weights(tmp_path):
    """Of values, where keys and shapes are right."""
    state = MobileNetV2(0.1).state_dict()
    name, weight = next(iter(state.items()))
    for damaged, text in [
        (torch.full_like(weight, torch.nan), f"1 key(s) not finite: {name}. "),
        (weight.to(torch.int8), f"1 key(s) of another type: {name}: expected torch.float32, got "),
    ]:
        path = tmp_path / "w.safetensors"
        save_file(state | {name: damaged}, path, {"nasfast.encoder": '{"width": 0.1}'})
        with pytest.raises(UserError, match=re.escape(f"mobilenet_v2 weights {path}: {text}")):
            load_encoder(path)


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
