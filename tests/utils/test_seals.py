"""Checksums within files: of what is in them, whatever its form."""

import json
import re
import tomllib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save_file

from nasfast.encoders import read_weights
from nasfast.utils.errors import UserError
from nasfast.utils.seals import packed, sealed, sealed_json, sealed_toml, unsealed

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
FORMS = st.dictionaries(st.text().filter(lambda name: name != "checksum"), VALUES, max_size=5)


@given(FORMS)
def test_what_was_written_is_read(form):
    for text in (sealed_json(form), json.dumps(sealed(form), sort_keys=True, indent=7)):
        assert unsealed(json.loads(text), "file") == json.loads(json.dumps(form))
    assert unsealed(form, "file") == form  # of an earlier version


@given(FORMS, FORMS)
def test_other_content_is_refused(form, other):
    if json.dumps(form, sort_keys=True) == json.dumps(other, sort_keys=True):
        return
    damaged = {**other, "checksum": sealed(form)["checksum"]}
    text = (
        rf"file: expected what nasfast wrote, with the checksum {damaged['checksum']}, got other "
        rf"content, of {sealed(other)['checksum']}: it is damaged or was edited; restore it from a "
        "copy, or remove its checksum where it was edited"
    )
    with pytest.raises(UserError, match=f"^{re.escape(text)}$"):
        unsealed(damaged, "file")


@pytest.mark.parametrize("checksum", [None, 3, [], "", "deadbeef", "x" * 10**6])
def test_no_checksum_of_it(checksum):
    with pytest.raises(UserError, match="with the checksum") as caught:
        unsealed({"a": 1, "checksum": checksum}, "file")
    assert len(str(caught.value)) < 300


def test_settings():
    form = {
        "lr": 1e-05,
        "crop": 3,
        "stage0": {"names": ["a", "b"], "on": True},
        "inf": float("inf"),
    }
    text = sealed_toml(form)
    assert re.match(r'checksum = "[0-9a-f]{8}"\n', text)
    assert unsealed(tomllib.loads(text), "file") == form
    assert unsealed(tomllib.loads("# mine\n" + text.replace(" = ", "=")), "file") == form
    with pytest.raises(UserError, match="it is damaged or was edited"):
        unsealed(tomllib.loads(text.replace("1e-05", "1e-04")), "file")


TENSORS = {"b": torch.arange(6.0).view(2, 3), "a": torch.zeros(0, 2), "c": torch.tensor(3).half()}


def test_tensors(tmp_path):
    data, path = packed(TENSORS, {"x": "1", "y": "2"}), tmp_path / "w.safetensors"
    assert load(data).keys() == TENSORS.keys()
    path.write_bytes(data)
    tensors, metadata = read_weights(path)
    assert metadata == {"x": "1", "y": "2"}
    assert all(torch.equal(tensors[name], value) for name, value in TENSORS.items())
    assert packed(TENSORS, {"y": "2", "x": "1"}) == data
    save_file(TENSORS, path)  # by another program
    assert read_weights(path)[0].keys() == TENSORS.keys()


def test_any_bit_of_a_file_of_tensors(tmp_path):
    whole, path = packed(TENSORS, {"x": "1"}), tmp_path / "w.safetensors"
    served, said = 0, []
    for place in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            tensors, metadata = read_weights(path)
        except UserError as error:
            said.append(str(error))
        else:  # a bit of the name of the checksum: the content is whole
            served += 1
            assert all(torch.equal(tensors[name], value) for name, value in TENSORS.items())
            assert metadata["x"] == "1"
    assert not [text for text in said if "\n" in text]
    assert served < 8 * len("nasfast.checksum")
