"""Trained networks as files: weights, and a description from which the network is built again."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import nn

from nasfast.encoders import read_metadata, read_weights, tensor_mismatch
from nasfast.models.build import FAMILIES, Family, family_of
from nasfast.models.decoders import EncoderDecoder
from nasfast.utils.config import from_mapping
from nasfast.utils.errors import UserError, cause, out_of_memory
from nasfast.utils.files import atomic_write, parse_json
from nasfast.utils.seals import packed

MODEL_FILE = "model.safetensors"
"""Name of a trained network in the directory of its training."""
VERSION = 2
"""Of descriptions. Those of version 1 do not say so; their segmenters have no "outputs"."""

M = TypeVar("M", bound=nn.Module)


def save_model(path: Path, model: nn.Module, description: Mapping[str, Any]) -> None:
    """Write weights and what is needed to build the network again, atomically.

    Args:
        path: a ``.safetensors`` file.
        model: a network of a class in FAMILIES.
        description: what else is worth keeping, as plain JSON.
    """
    key, family = family_of(model)
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    text = json.dumps({"version": VERSION, **description, **family.describe(model)})
    atomic_write(path, packed(tensors, {key: text}))


def model_method(path: Path) -> tuple[str, str | None]:
    """Key in FAMILIES of a file's network, and the method that trained it, which version 1 does
    not say.

    Raises:
        UserError: the file is not one of :func:`save_model`.
    """
    metadata = read_metadata(path)
    key = _format(path, metadata, nn.Module)
    try:
        description = parse_json(metadata[key])
    except (ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(description, dict):
        raise _damaged(path, "its description is no JSON object")
    return key, description.get("method")


@overload
def load_model(path: Path) -> tuple[nn.Module, dict[str, Any]]: ...
@overload
def load_model(path: Path, network: type[M]) -> tuple[M, dict[str, Any]]: ...
def load_model(path: Path, network: type[nn.Module] = nn.Module) -> tuple[Any, dict[str, Any]]:
    """Read a network and its description from a file of :func:`save_model`.

    Args:
        path: the file.
        network: the class that it must be of.

    Returns:
        The network in evaluation mode, and all that was saved with it.

    Raises:
        UserError: the file is not one of those, is damaged, or holds another class of network.
    """
    tensors, metadata = read_weights(path)
    key = _format(path, metadata, network)
    try:
        description = parse_json(metadata[key])
        if not isinstance(description, dict):
            raise TypeError("its description is no JSON object")
        build = _builder(path, FAMILIES[key], description)
        with torch.device("meta"):  # nothing is allocated before the shapes have been compared
            problem = tensor_mismatch(build().state_dict(), tensors)
    except KeyError as error:
        raise _damaged(path, f"it lacks {error}") from error
    except (ArithmeticError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        if out_of_memory(error):
            raise
        raise _damaged(path, cause(error)) from error
    if problem:
        raise _damaged(path, f"of its weights {problem}")
    model = build()
    model.load_state_dict(tensors)
    return model.eval(), description


def load_teacher(path: Path, classes: Sequence[str], task: str = "segmentation") -> EncoderDecoder:
    """A trained network to distil from.

    Raises:
        UserError: it was trained for another task or other classes; both are shown.
    """
    model, description = load_model(path, EncoderDecoder)
    trained, trained_for = description.get("classes", ()), description.get("task", "segmentation")
    if (tuple(trained), trained_for) != (tuple(classes), task):
        expected, got = ", ".join(classes) or task, ", ".join(trained) or "no classes"
        if trained_for != task:
            expected, got = task, trained_for
        raise UserError(
            f"teacher {path}: expected a network for {expected}, got one for {got}; train one on "
            "this data first"
        )
    return model


def _format(path: Path, metadata: Mapping[str, str], network: type[nn.Module]) -> str:
    keys = [key for key, family in FAMILIES.items() if issubclass(family.network, network)]
    for key in keys:
        if key in metadata:
            return key
    raise UserError(
        f"{path}: expected a model.safetensors that nasfast train wrote, with "
        f"{' or '.join(map(repr, keys))} in its metadata, got "
        f"{', '.join(map(repr, metadata)) or 'none'}; give another file"
    )


def _builder(path: Path, family: Family, description: Mapping[str, Any]) -> Callable[[], nn.Module]:
    version = description.get("version", 1)
    ignored, configs = [], {}
    for key, config in family.configs.items():
        values, known = description[key], {field.name for field in fields(config)}
        if version > VERSION:
            ignored += [f"{key}.{name}" for name in values if name not in known]
            values = {name: value for name, value in values.items() if name in known}
        configs[key] = from_mapping(config, values, key)
    if version > VERSION:
        warnings.warn(
            f"{path}: a newer nasfast wrote it (version {version} of the description; this "
            f"one reads {VERSION}); ignored: {', '.join(ignored) or 'nothing of the network'}",
            stacklevel=3,
        )
    return functools.partial(family.build, {**description, **configs})


def _damaged(path: Path, problem: str) -> UserError:
    return UserError(
        f"{path}: expected a network as nasfast train wrote it, got a damaged file: "
        f"{' '.join(problem.split())}; restore it from a copy"
    )
