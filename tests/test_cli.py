"""How an entry point ends."""

from __future__ import annotations

import json

import pytest
import torch

from nasfast.cli import flag_value, reports_errors
from nasfast.device import resolve_device


@reports_errors
def fails_for_the_user() -> int:
    resolve_device("gpu")
    return 0


@reports_errors
def misses_a_file() -> int:
    with open("no/such/file"):
        return 0


def test_an_error_for_the_user_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert fails_for_the_user() == 2
    assert misses_a_file() == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("error: resolve_device: device must be 'auto', 'cpu', 'cuda'")
    assert second == "error: [Errno 2] No such file or directory: 'no/such/file'"


@pytest.mark.parametrize(
    "defect",
    [
        lambda: {}["absent"],
        lambda: json.loads("{"),
        lambda: torch.nn.Linear(2, 2)(torch.zeros(3)),
        lambda: int("x"),
    ],
)
def test_a_defect_keeps_its_traceback(defect: object) -> None:
    with pytest.raises((KeyError, ValueError, RuntimeError)):
        reports_errors(defect)()  # type: ignore[arg-type]


def test_ctrl_c(capsys: pytest.CaptureFixture[str]) -> None:
    @reports_errors
    def stopped() -> int:
        raise KeyboardInterrupt

    assert stopped() == 130
    assert capsys.readouterr().err == "stopped\n"


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        (["a", "--data", "b"], "b"),
        (["--data=b=c"], "b=c"),
        (["--data"], None),
        (["--database", "b"], None),
    ],
)
def test_flag_value(argv: list[str], value: str | None) -> None:
    assert flag_value(argv, "--data") == value
