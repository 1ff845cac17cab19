"""Every number of every setting: a value that means nothing is refused in one line, or is none."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nasfast.commands.pretrain import PretrainConfig
from nasfast.methods.base import EvaluateConfig
from nasfast.methods.registry import METHODS
from nasfast.methods.restoration.evaluate import EvaluateConfig as RestorationEvaluateConfig
from nasfast.tasks.restoration import TASKS
from nasfast.utils.errors import UserError

ROOTS = [
    *(settings for m in METHODS.values() for settings in (m.search_settings, m.train_settings)),
    *(EvaluateConfig, RestorationEvaluateConfig, PretrainConfig, *TASKS.values()),
]
NEEDED = {"source": Path("run"), "model": Path("model")}


def parts(hint):
    """The types that a type is made of."""
    inner = [part for arg in get_args(hint) for part in parts(arg)]
    return inner if inner and get_origin(hint) is not Annotated else [*inner, hint]


def classes(root):
    """A dataclass and those of its fields."""
    hints = get_type_hints(root)
    nested = [part for field in dataclasses.fields(root) for part in parts(hints[field.name])]
    return {root}.union(*(classes(part) for part in nested if dataclasses.is_dataclass(part)))


def numbers():
    """Every numeric field, with its type."""
    for cls in sorted(set().union(*map(classes, ROOTS)), key=lambda cls: cls.__qualname__):
        hints: Mapping[str, Any] = get_type_hints(cls)
        for field in dataclasses.fields(cls):
            kinds = parts(hints[field.name])
            if field.init and (int in kinds or float in kinds):
                yield cls, field.name, hints[field.name], float if float in kinds else int


NUMBERS = list(numbers())


def made(cls, name, hint, value):
    """The settings with this value, or in its place tuples of it as long as the field has."""
    given = {need: NEEDED[need] for need in NEEDED if need in cls.__dataclass_fields__}
    if get_origin(hint) is tuple:
        value = (value,) * (1 if ... in get_args(hint) else len(get_args(hint)))
    return cls(**given | {name: value})


def refusal(*arguments):
    """What the settings say of a value; None where they take it."""
    try:
        made(*arguments)
    except UserError as error:
        return str(error)
    return None


def test_all_numbers_are_found():
    names = {f"{cls.__name__}.{name}" for cls, name, _, _ in NUMBERS}
    assert len(NUMBERS) > 80
    assert {"Stage0Config.lr", "PPOConfig.lr", "Denoising.sigma", "TrainConfig.crop"} <= names


@pytest.mark.parametrize("value", [math.nan, math.inf, -1, 10**30, -(10**30)])
def test_a_number_that_means_nothing_is_refused(value):
    for cls, name, hint, kind in NUMBERS:
        if kind is int and isinstance(value, float):
            continue
        said = refusal(cls, name, hint, value)
        allowed = {
            math.inf: name == "max_grad_norm",
            10**30: kind is float or name == "box",  # which is cut to the image
            -1: name == "angle",
        }
        assert said or allowed.get(value, False), (cls, name, value)
        assert said is None or ("expected" in said and "\n" not in said and name in said), said


@given(st.sampled_from(NUMBERS), st.one_of(st.integers(), st.floats()))
def test_any_number_is_taken_or_refused_in_one_line(field, value):
    *where, kind = field
    if kind is float or isinstance(value, int):
        said = refusal(*where, value)
        assert said is None or ("expected" in said and "\n" not in said)
