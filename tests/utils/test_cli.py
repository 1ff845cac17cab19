"""How an entry point ends."""

import json

import pytest
import torch

from nasfast.utils.cli import flag_value, printable, reports_errors
from nasfast.utils.errors import DEFECT, UserError, about, text_for_user


def ends_with(error):
    @reports_errors
    def main():
        raise error

    return main()


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (UserError("lr: expected a number, got 'x'"), "lr: expected a number, got 'x'"),
        (FileNotFoundError(2, "No such file", "a/b"), "[Errno 2] No such file: 'a/b'"),
        (
            OSError(28, "No space left on device", "run/checkpoint/state.pt"),
            "[Errno 28] No space left on device: 'run/checkpoint/state.pt'; make room there: what "
            "was saved before is whole, and --resume continues a search or a training from it, "
            "the same command a study",
        ),
        (MemoryError(), "out of memory (MemoryError); use fewer --workers, a smaller batch"),
        (torch.OutOfMemoryError("CUDA out of memory.\nmore"), "out of memory (CUDA out of "),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory (DefaultCPU"),
    ],
)
def test_what_a_person_can_mend_is_one_line(error, text, capsys):
    assert ends_with(error) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {text}")


@pytest.mark.parametrize(
    "error",
    [
        KeyError("absent"),
        ValueError("shape"),
        RuntimeError("sizes differ"),
        RuntimeError("in a worker:\nout of memory"),
        FloatingPointError("x"),
        json.JSONDecodeError("x", "{", 0),
    ],
)
def test_a_defect_is_raised_with_what_to_report(error):
    with pytest.raises(type(error)) as raised:
        ends_with(error)
    assert raised.value is error
    assert error.__notes__ == [DEFECT]  # the last lines of a traceback
    assert text_for_user(error) is None


def test_ctrl_c(capsys):
    assert ends_with(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "stopped\n"


def test_subject_of_an_error():
    with pytest.raises(UserError, match=r"^a\.json: genotype: expected a list$"), about("a.json"):
        raise UserError("genotype: expected a list")
    with pytest.raises(ValueError, match=r"^defect$"), about("a.json"):
        raise ValueError("defect")


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        (["a", "--data", "b"], "b"),
        (["--data=b=c"], "b=c"),
        (["--data"], None),
        (["--database", "b"], None),
    ],
)
def test_flag_value(argv, value):
    assert flag_value(argv, "--data") == value


def test_names_in_another_encoding_can_be_printed():
    assert printable("straße caf\udce9.png") == "straße caf\\udce9.png"
