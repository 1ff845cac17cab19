"""Search methods by name, genotype, run, model file. To add one: a package, a place in _ALL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from nasfast.inference.exported import EXPORT_SUFFIXES, read_description
from nasfast.inference.model import find_model
from nasfast.methods.base import Method
from nasfast.methods.detection import Detection
from nasfast.methods.restoration import Restoration
from nasfast.methods.segmentation import Segmentation
from nasfast.methods.templates import Templates
from nasfast.models.io import MODEL_FILE, model_method
from nasfast.models.zoo import read_architecture
from nasfast.spaces.template_nas import is_templates
from nasfast.utils.config import from_mapping
from nasfast.utils.errors import UserError, about
from nasfast.utils.seals import read_sealed_toml

_ALL: tuple[Method, ...] = (Segmentation(), Templates(), Detection(), Restoration())
METHODS = {method.name: method for method in _ALL}
DEFAULT = "segmentation"
"""The method of a search that names none."""


def method_named(name: object) -> Method:
    """The method of that name.

    Raises:
        UserError: there is none; the message lists them.
    """
    if not isinstance(name, str) or name not in METHODS:
        raise UserError(
            f"method: expected one of {', '.join(METHODS)}, got {name!r}; a later version of "
            "nasfast may know it"
        )
    return METHODS[name]


def method_of_genotype(obj: object) -> Method:
    """By the genotype's space; the published list forms, without a name, by their shape.

    Raises:
        UserError: no method has that space; the message lists them.
    """
    if isinstance(obj, list):
        return METHODS["templates" if is_templates(obj) else "segmentation"]
    space = obj.get("space") if isinstance(obj, dict) else obj
    for method in METHODS.values():
        if method.space == space:
            return method
    spaces = ", ".join(method.space for method in METHODS.values())
    raise UserError(
        f'genotype: expected an object whose "space" is one of {spaces}, got {space!r}; give a '
        "genotype.json or best.json that nasfast wrote"
    )


def method_of_source(argv: Sequence[str]) -> tuple[Method, Mapping[str, Any]]:
    """By the first word that is a run directory, a genotype file or the name of an architecture;
    with the settings of its search, as far as known.

    Raises:
        UserError: it is of no known method, or a setting of its search that a training takes over
            is damaged.
    """
    for word in argv:
        path = Path(word)
        named = [method for method in METHODS.values() if word in method.zoo]
        if (path / "records.jsonl").is_file() and (path / "config.toml").is_file():
            settings = read_sealed_toml(path / "config.toml")
            method = method_named(settings.get("method", DEFAULT))
            # some go with a strategy only
            taken = {"strategy", *(f.name for f in fields(method.train_settings))} & settings.keys()
            taken &= {f.name for f in fields(method.search_settings)}
            shared = {name: settings[name] for name in taken}
            from_mapping(method.search_settings, shared, str(path / "config.toml"))
            return method, settings
        if path.is_file():
            try:
                genotype = read_genotype(path)
            except UserError:  # the value of another flag, or refused later
                continue
            return method_of_genotype(genotype), {}
        if named:
            return named[0], named[0].zoo[word].search
    return METHODS[DEFAULT], {}


def method_of_model(argv: Sequence[str]) -> Method:
    """By the first word that is a model file, an export, a training or a run.

    Raises:
        UserError: the file is of no known method, or nothing was trained in the run yet.
    """
    for word in argv:
        path = Path(word)
        if (path / "config.toml").is_file():  # of a run or a training; data has none
            path = find_model(path)
        path = path / MODEL_FILE if path.is_dir() else path
        if path.is_file() and path.suffix in EXPORT_SUFFIXES:
            description = read_description(path)
            name, genotype = description.get("method"), description.get("genotype")
            with about(path):
                return method_of_genotype(genotype) if name is None else method_named(name)
        if path.is_file() and path.suffix == ".safetensors":
            family, name = model_method(path)
            if name is None:
                return next(m for m in METHODS.values() if m.model_format == family)
            with about(path):
                return method_named(name)
    return METHODS[DEFAULT]


def read_genotype(path: Path) -> object:
    """JSON form of the architecture in a file: alone, as "genotype" of a larger object, or of a
    trained network.

    Raises:
        UserError: the file cannot be read or is not JSON.
    """
    try:
        content = read_architecture(path)
    except UserError as error:
        raise UserError(
            f"train: expected a run directory or a JSON file with a genotype, got {error}"
        ) from error
    if isinstance(content, dict) and "genotype" in content:  # best.json, metrics.json
        return content["genotype"]
    return content
