import pickle
import zipfile

import pytest
import torch

from nasfast.utils.errors import UserError
from nasfast.utils.tensors import load_saved

MARK = bytes(range(40, 80))


def flip(path):
    """One bit of a tensor, which torch itself reads without a word."""
    data = bytearray(path.read_bytes())
    data[data.index(MARK)] ^= 1
    path.write_bytes(data)


def keep(end):
    return lambda path: path.write_bytes(path.read_bytes()[:end])


def write_zip(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a", "b")


NOTHING = "nothing that torch.save wrote"


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (flip, "a damaged file: the checksum of w/data/0 does not match"),
        (keep(-10), "an incomplete file"),
        (keep(10), "an incomplete file"),
        (keep(0), NOTHING),
        (lambda path: path.write_bytes(b"hello, world"), NOTHING),
        (lambda path: path.write_bytes(pickle.dumps({"a": 1})), NOTHING),
        (write_zip, NOTHING),
        (lambda path: torch.save(torch.nn.ReLU(), path), "a pickled torch.nn.modules.activation."),
        (lambda path: torch.jit.script(torch.nn.ReLU()).save(path), "a TorchScript archive"),
    ],
)
def test_what_a_file_is_instead(damage, text, tmp_path):
    path = tmp_path / "w.pt"
    torch.save({"a": torch.tensor(list(MARK), dtype=torch.uint8), "b": [1, "x"]}, path)
    assert load_saved(path)["b"] == [1, "x"]
    damage(path)
    with pytest.raises(UserError) as error:
        load_saved(path)
    assert str(error.value).startswith(text)
    assert "weights_only" not in str(error.value)
