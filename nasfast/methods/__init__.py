"""Search methods. To add one: a package beside these and a line in METHODS."""

from __future__ import annotations

import contextlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nasfast.encoders import read_weights
from nasfast.methods.base import MODEL_FILE, Method
from nasfast.methods.restoration import RESTORATION
from nasfast.methods.segmentation import SEGMENTATION

METHODS: dict[str, Method[Any, Any, Any]] = {
    method.name: method for method in (SEGMENTATION, RESTORATION)
}

__all__ = [
    "METHODS",
    "Method",
    "method_of_genotype",
    "method_of_model",
    "method_of_source",
    "read_genotype",
]


def method_of_genotype(obj: object) -> Method[Any, Any, Any]:
    """By the genotype's space; the first method reads, or refuses, what names none."""
    space = obj.get("space") if isinstance(obj, dict) else None
    return next((method for method in METHODS.values() if method.space == space), SEGMENTATION)


def method_of_source(argv: Sequence[str]) -> tuple[Method[Any, Any, Any], Mapping[str, Any]]:
    """By the first word that is a run directory, a genotype file or the name of an architecture;
    with the settings of its search, as far as known."""
    for word in argv:
        path = Path(word)
        named = [method for method in METHODS.values() if word in method.zoo]
        if (path / "records.jsonl").is_file() and (path / "config.toml").is_file():
            settings = tomllib.loads((path / "config.toml").read_text())
            return METHODS.get(settings.get("method", ""), SEGMENTATION), settings
        if path.is_file():
            with contextlib.suppress(ValueError):  # of another flag, or refused later
                return method_of_genotype(read_genotype(path)), {}
        if named:
            return named[0], named[0].zoo[word].search
    return SEGMENTATION, {}


def method_of_model(argv: Sequence[str]) -> Method[Any, Any, Any]:
    """By the first word that is a model file, or a directory with one."""
    for word in argv:
        path = Path(word) / MODEL_FILE if Path(word).is_dir() else Path(word)
        if path.is_file() and path.suffix == ".safetensors":
            _, metadata = read_weights(path)
            return next((m for m in METHODS.values() if m.format in metadata), SEGMENTATION)
    return SEGMENTATION


def read_genotype(path: Path) -> object:
    """JSON form of the architecture in a file: alone, or as "genotype" of a larger object.

    Raises:
        ValueError: the file is not JSON.
    """
    try:
        content: object = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(
            f"train: expected a run directory or a JSON file with a genotype, got {path}: {error}"
        ) from error
    if isinstance(content, dict) and "genotype" in content:  # best.json, metrics.json
        return content["genotype"]
    return content
