"""How an entry point ends."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch

from nasfast.device import resolve_device
from nasfast.utils.cli import flag_value, reports_errors


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


def inside(body: str) -> Callable[[], int]:
    """An entry point whose body is a function of nasfast."""
    code = f"def f():\n{textwrap.indent(body, '    ')}\n    return 0\n"
    names: dict[str, Any] = {"__package__": "nasfast.x", "torch": torch, "json": json}
    exec(code, names)
    return reports_errors(names["f"])


@pytest.mark.parametrize(
    "body",
    [
        "int('x')",
        "max([])",
        "a, b = [1, 2, 3]",
        "torch.cat([torch.zeros(2, 2), torch.zeros(3, 3)])",
        "json.loads('{')",
        "[*zip([1], [], strict=True)]",
        "try:\n    int('x')\nfinally:\n    pass",
        "try:\n    int('x')\nexcept TypeError:\n    raise ValueError('for the user')",
        "try:\n    raise ValueError('for the user')\nexcept ValueError:\n    int('x')",
        "with torch.no_grad():\n    int('x')",
        "raise TypeError('a defect')",
        "assert not 1",
    ],
)
def test_a_defect_of_nasfast_keeps_its_traceback(
    body: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Exception):  # noqa: B017
        inside(body)()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "body",
    [
        "raise ValueError('for the user')",
        "raise RuntimeError('for the user')",
        "raise FloatingPointError('for the user')",
        "raise ValueError(\n    'for '\n    + str(\n        'the user'\n    )\n)",
        "try:\n    int('x')\nexcept ValueError as error:\n"
        "    raise ValueError('for the user') from error",
        "try:\n    int('x')\nexcept ValueError:\n    raise ValueError('for the user')",
        "try:\n    raise ValueError('for the user')\nexcept ValueError:\n    raise",
        "try:\n    raise ValueError('for the user')\nfinally:\n    pass",
        "with torch.no_grad():\n    raise ValueError('for the user')",
        "for i in range(300):\n    if i == 299:\n        raise ValueError('for the user')",
    ],
)
def test_what_nasfast_raises_is_one_line(body: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert inside(body)() == 2
    assert capsys.readouterr().err == "error: for the user\n"


def test_what_others_raise_keeps_its_traceback() -> None:
    with pytest.raises(ValueError, match="Invalid literal for Fraction"):
        reports_errors(lambda: Fraction("x"))()  # type: ignore[arg-type]


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
