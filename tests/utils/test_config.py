import dataclasses
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import tomli_w

from nasfast.utils.config import from_mapping, require_positive


@dataclass(frozen=True)
class Inner:
    lr: float = 0.1
    steps: int = 3


@dataclass(frozen=True)
class Outer:
    data: Path
    weights: Path | None = None
    omit: tuple[int, ...] = ()
    crop: int | None = None
    inner: Inner = field(default_factory=Inner)
    name: str = "x"


CONFIG = Outer(Path("d/e"), Path("w"), (0, 2), 4, Inner(0.5), "y")


def test_round_trip_through_toml():
    mapping = dataclasses.asdict(CONFIG) | {"data": "d/e", "weights": "w"}
    assert from_mapping(Outer, tomllib.loads(tomli_w.dumps(mapping)), "config.toml") == CONFIG


def test_round_trip_with_none():
    config = Outer(Path("d"))
    assert from_mapping(Outer, dataclasses.asdict(config), "config") == config


def test_absent_fields_keep_their_defaults():
    config = from_mapping(Outer, {"data": "d", "inner": {"steps": 5}}, "config.toml")
    assert config == Outer(Path("d"), inner=Inner(0.1, 5))


@pytest.mark.parametrize(
    ("mapping", "where", "unknown", "wanted"),
    [
        (
            {"data": "d", "zoom": 1},
            "config.toml",
            "zoom",
            "crop, data, inner, name, omit, weights",
        ),
        ({"data": "d", "inner": {"lrr": 1}}, "config.toml, inner", "lrr", "lr, steps"),
    ],
)
def test_unknown_field(mapping, where, unknown, wanted):
    message = (
        f"{where}: unknown setting {unknown!r}; expected some of {wanted}. "
        "Was the file written by another version of nasfast?"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        from_mapping(Outer, mapping, "config.toml")


@pytest.mark.parametrize("value", [0, -0.5, float("nan")])
def test_require_positive(value):
    require_positive(Inner(lr=value), "steps")
    message = f"Inner.lr: expected a value above 0, got {value}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        require_positive(Inner(lr=value), "steps", "lr")
