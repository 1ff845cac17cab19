"""Dataclasses from mappings: round trips, and each value that does not fit its field."""

import dataclasses
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from nasfast.utils.config import Bound, Bounded, Count, MaxNorm, count_of, from_mapping
from nasfast.utils.errors import UserError


@dataclass(frozen=True)
class Inner(Bounded):
    lr: float = 0.1
    steps: Count = 3


@dataclass(frozen=True)
class Blur:
    kind: str = field(default="blur", init=False)
    width: int = 3


@dataclass(frozen=True)
class Noise:
    kind: str = field(default="noise", init=False)
    sigma: float = 25.0


@dataclass(frozen=True)
class Outer:
    data: Path
    weights: Path | None = None
    omit: tuple[int, ...] = ()
    range: tuple[float, float] = (0.0, 1.0)
    crop: int | None = None
    sigma: float | tuple[float, ...] = 25.0
    inner: Inner = field(default_factory=Inner)
    more: Inner | None = None
    by: Blur | Noise | None = None
    name: str = "x"
    mirror: bool = True
    channels: Literal[1, 3] = 1
    task: Mapping[str, Any] = field(default_factory=dict)


FULL = Outer(Path("d"), Path("w"), (0, 2), (0.5, 2.0), 4, (1.0, 2.5), Inner(0.5), Inner(), Blur(5))
FULL = dataclasses.replace(FULL, name="y", mirror=False, channels=3, task={"a": [1]})


@pytest.mark.parametrize("config", [FULL, Outer(Path("d"), by=Noise(3.0)), Outer(Path("d"))])
def test_round_trip_through_toml(config):
    mapping = dataclasses.asdict(config)
    assert from_mapping(Outer, mapping, "config.toml") == config
    paths = {name: str(value) for name, value in mapping.items() if isinstance(value, Path)}
    present = {name: value for name, value in mapping.items() if value is not None} | paths
    assert from_mapping(Outer, tomllib.loads(tomli_w.dumps(present)), "config.toml") == config


def test_absent_fields_keep_their_defaults_and_integers_are_numbers():
    config = from_mapping(Outer, {"data": "d", "inner": {"lr": 5}, "sigma": 15}, "config.toml")
    assert config == Outer(Path("d"), sigma=15.0, inner=Inner(5.0))
    assert (type(config.inner.lr), type(config.sigma)) == (float, float)


FIELDS = ", ".join(sorted(f.name for f in dataclasses.fields(Outer)))
VERSION = "Was the file written by another version of nasfast?"
KINDS = ", by, kind: expected one of 'blur', 'noise', got"


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"zoom": 1}, f": unknown setting 'zoom'; expected some of {FIELDS}. {VERSION}"),
        (
            {"inner": {"lrr": 1}},
            f", inner: unknown setting 'lrr'; expected some of lr, steps. {VERSION}",
        ),
        (
            {"inner": {"steps": 0}},
            ", inner: Inner.steps: expected a value from 1 to 1,000,000,000, got 0",
        ),
        ({"by": {"kind": "rain"}}, f"{KINDS} 'rain'; correct the value"),
        ({"by": {"width": 3}}, f"{KINDS} None; correct the value"),
        (
            {"by": {"kind": "blur", "sigma": 3}},
            f", by: unknown setting 'sigma'; expected some of kind, width. {VERSION}",
        ),
    ],
)
def test_refused_settings(mapping, message):
    with pytest.raises(UserError, match=f"^config.toml{re.escape(message)}$"):
        from_mapping(Outer, {"data": "d"} | mapping, "config.toml")


def test_missing_setting():
    with pytest.raises(UserError, match="expected the setting 'data', got none; add it"):
        from_mapping(Outer, {"name": "y"}, "config.toml")


@pytest.mark.parametrize(
    ("mapping", "where", "expected"),
    [
        ({"data": 3}, "data", "a path"),
        ({"weights": ["w"]}, "weights", "a path"),
        ({"omit": 1}, "omit", "a list"),
        ({"omit": [1, "2"]}, "omit[1]", "an integer"),
        ({"range": [0.1]}, "range", "a list of 2"),
        ({"crop": "4"}, "crop", "an integer"),
        ({"crop": 4.0}, "crop", "an integer"),
        ({"crop": True}, "crop", "an integer"),
        ({"sigma": "noisy"}, "sigma", "a list"),
        ({"inner": 3}, "inner", "a table"),
        ({"more": "x"}, "more", "a table"),
        ({"by": 3}, "by", "a table"),
        ({"by": {"kind": "noise", "sigma": "x"}}, "by, sigma", "a number"),
        ({"inner": {"lr": "0.1"}}, "inner, lr", "a number"),
        ({"inner": {"lr": None}}, "inner, lr", "a number"),
        ({"name": 1}, "name", "a string"),
        ({"mirror": 1}, "mirror", "true or false"),
        ({"channels": True}, "channels", "one of 1, 3"),
        ({"task": "denoising"}, "task", "a table"),
    ],
)
def test_a_value_of_another_type(mapping, where, expected):
    value = mapping
    for name in re.findall(r"\w+", where):
        value = value[int(name) if name.isdigit() else name]
    message = f"config.toml, {where}: expected {expected}, got {value!r}; correct the value"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        from_mapping(Outer, {"data": "d"} | mapping, "config.toml")


@dataclass(frozen=True)
class Limited(Bounded):
    positive: Annotated[float, Bound(0, open="low")] = 1.0
    share: Annotated[float, Bound(0, 1, open="high")] = 0.0
    decay: Annotated[float, Bound(0, 1, open="low")] = 1.0
    norm: MaxNorm = math.inf
    side: Annotated[int, Bound(2, 99)] | None = None
    classes: tuple[Annotated[int, Bound(0, 255)], ...] = ()
    free: float = 0.0


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"positive": 0}, "a value above 0, got 0"),
        ({"positive": math.inf}, "a value above 0, got inf"),
        ({"share": 1.0}, "a value from 0 to below 1, got 1.0"),
        ({"share": math.nan}, "a value from 0 to below 1, got nan"),
        ({"decay": 0.0}, "a value above 0 and at most 1, got 0.0"),
        ({"norm": math.nan}, "a value above 0, got nan"),
        ({"side": 1}, "a value from 2 to 99, got 1"),
        ({"side": 100}, "a value from 2 to 99, got 100"),
        ({"classes": (3, 256)}, "a value from 0 to 255, got 256"),
    ],
)
def test_numbers_out_of_their_bounds(given, expected):
    (name,) = given
    with pytest.raises(UserError, match=f"^Limited.{name}: expected {expected}$"):
        Limited(**given)


def test_numbers_within_their_bounds():
    Limited(positive=1e30, share=0.0, decay=1.0, side=2, classes=(0, 255), free=math.nan)


@given(st.integers(1, 10**6), st.integers(0, 6), st.sampled_from(["", "k", "M", "G", "T"]))
def test_counts_are_exact(digits, places, unit):
    """Digits with a point before the last of them, and a unit."""
    scale = 1000 ** ["", "k", "M", "G", "T"].index(unit)
    text = f"{digits // 10**places}.{digits % 10**places:0{places}}" if places else f"{digits}"
    count = digits * scale // 10**places
    if count:
        assert count_of(f"{text}{unit}", "size") == count_of(f" {text} {unit} ", "size") == count
        assert count_of(count, "size") == count_of(f"{count:_}", "size") == count


@pytest.mark.parametrize("value", ["", "M", "-1", "0", 0, "0.3", "0.3B", "1e6", "1,000", 10**30])
def test_no_count(value):
    message = (
        "size: expected a count such as 300000, 300k, 0.3M or 1.5G, got "
        f"{value!r}; correct the value"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        count_of(value, "size")
