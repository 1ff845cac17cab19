"""What a target needs for networks of a space: times of their operators, and of some networks."""

from __future__ import annotations

import itertools
import json
import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch

from nasfast.inference.export import exported_bytes
from nasfast.inference.model import Model
from nasfast.latency.onnx_operators import onnx_operator
from nasfast.latency.operators import Operator, operators_of
from nasfast.latency.table import LatencyTable, Operators
from nasfast.latency.timing import Target, deployed, median_time, rounds, single, threads
from nasfast.utils.errors import UserError, about
from nasfast.utils.files import atomic_directory, atomic_write
from nasfast.utils.seals import read_sealed, sealed_json

VERSION = 2
"""Of the file."""
NETWORKS, TRACED = 16, 150
"""Networks that are timed as a whole, and further ones whose operators are timed."""
OPERATOR_SECONDS, NETWORK_SECONDS = 0.03, 0.5
LONGEST = 1e9
"""Milliseconds that a pass may take."""
FOLDS, DOUBTFUL = 4, 0.2
KNOWN = 0.5
"""Least share of the predicted time that has to come from operators that were timed."""


@dataclass(frozen=True)
class Profile:
    """Measurements on a target, from which latencies are predicted."""

    target: Target
    space: str
    """Name of the space that the networks are of."""
    networks: tuple[tuple[Operators, float], ...]
    """Operators of whole networks, and their latencies, in milliseconds. The first ones are
    references of later measurements."""
    times: Mapping[Operator, float]
    """Milliseconds of operators alone."""

    @cached_property
    def table(self) -> LatencyTable:
        """Predicts latencies, fitted to all networks."""
        return LatencyTable(self.times).fitted(self.networks)

    @cached_property
    def error(self) -> float:
        """Median relative error on networks that the factors were not fitted to."""
        if len(self.networks) < FOLDS:
            return float("nan")
        plain, errors = LatencyTable(self.times), list[float]()
        for fold in range(FOLDS):
            kept = [n for i, n in enumerate(self.networks) if i % FOLDS != fold]
            table = plain.fitted(kept)
            errors += [
                abs(table.predict(operators) / time - 1)
                for operators, time in self.networks[fold::FOLDS]
            ]
        return statistics.median(errors)

    def require_known(self, space: str, operators: Operators, where: str) -> None:
        """Raise UserError where too much of a network of the space was not timed."""
        if self.space != space:
            raise UserError(
                f"{where}: expected times of networks of {space}, got those of {self.space}; make "
                "another with nasfast profile METHOD"
            )
        known = {o: n for o, n in operators.items() if o in self.times}
        part, total = (sum(self.table.sums(each).values()) for each in (known, operators))
        share = part / total if total > 0 else 0.0
        if share < KNOWN:
            raise UserError(
                f"{where}: expected times of the operators of the networks that are searched, got "
                f"{share:.0%} of their work, as of another space, width or image size; make it "
                "with nasfast profile and the settings of this search"
            )

    def write(self, path: Path) -> None:
        """As JSON, in one step."""
        extra = {o for operators, _ in self.networks for o in operators} - self.times.keys()
        known = [*self.times, *sorted(extra, key=str)]
        operators = {operator: {"ms": self.times.get(operator)} for operator in known}
        networks = [(operators, {"ms": time}) for operators, time in self.networks]
        form = _form(self.target, self.space, operators, networks)
        atomic_write(path, sealed_json(form))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Inverse of `write`; UserError for another file, or one of a newer version."""
        form = read_sealed(path)
        remedy = "make it with nasfast profile"
        if form.get("version") != VERSION:
            raise UserError(
                f'{path}: expected a latency table with "version" {VERSION}, got '
                f"{form.get('version')!r}; {remedy}"
            )
        try:
            with about(path):
                target, space = Target.from_json(form["target"]), form["space"]
                if not isinstance(space, str):
                    raise TypeError(f"space {space!r}")
                entries = [
                    (Operator.from_json({k: v for k, v in e.items() if k != "ms"}), e.get("ms"))
                    for e in form["operators"]
                ]
            times = {o: _positive(ms) for o, ms in entries if ms is not None}
            places = {i: operator for i, (operator, _) in enumerate(entries)}
            networks = tuple(
                ({places[i]: _count(n) for i, n in net["operators"]}, _positive(net["ms"]))
                for net in form["networks"]
            )
            if not times or not networks:
                raise ValueError(f"{len(times)} times, {len(networks)} networks")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{path}: expected a latency table as nasfast profile writes it, got a damaged one "
                f"({type(error).__name__}: {error}); {remedy}"
            ) from error
        return cls(target, space, networks, times)

    def __str__(self) -> str:
        """Its size and its error, with what to do about one that is large."""
        text = f"{len(self.times)} operators and {len(self.networks)} networks"
        if not math.isnan(self.error):
            text += f"; median error {self.error:.1%} on networks left out"
        if self.error > DOUBTFUL:
            text += "\nwarning: so large an error comes of other work on the machine: measure again"
        return text


def _form(
    target: Target,
    space: str,
    operators: Mapping[Operator, Mapping[str, Any]],
    networks: Sequence[tuple[Operators, Mapping[str, Any]]],
) -> dict[str, Any]:
    """Plain JSON of a target, and of operators and networks with what is to be said of each."""
    places = {operator: i for i, operator in enumerate(operators)}
    return {
        "version": VERSION,
        "target": target.to_json(),
        "space": space,
        "operators": [operator.to_json() | {**more} for operator, more in operators.items()],
        "networks": [
            {"operators": [[places[o], n] for o, n in counts.items()], **more}
            for counts, more in networks
        ],
    }


def _count(value: Any) -> int:
    if type(value) is not int or not 1 <= value <= 10**6:
        raise ValueError(f"expected a count from 1, got {value!r}")
    return value


def _positive(value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value <= LONGEST:
        raise ValueError(f"expected milliseconds above 0, got {value!r}")
    return float(value)


def operators_on(target: Target, model: Model) -> dict[Operator, int]:
    """The operators of a network as it is deployed there."""
    images = torch.empty(target.shape, device="meta")
    autocast = torch.device(target.device).type if target.precision != "float32" else ""
    return dict(operators_of(model, images, autocast=autocast))


def measured_profile(
    target: Target,
    space: str,
    draw: Callable[[random.Random], Model],
    heartbeat: Callable[[], None] = lambda: None,
) -> Profile:
    """Time networks of a space, and the operators of more of them, on this machine.

    Args:
        target: this machine, as it runs networks.
        space: its name.
        draw: a network of the space, on the CPU.
        heartbeat: called now and then; may raise to stop.
    """
    models, whole, found = sampled(target, draw)
    with threads(target.threads):
        runs = []
        for model in models:
            heartbeat()
            runs.append(deployed(model, target))
        times = zip(*rounds(runs, NETWORK_SECONDS), strict=True)
        latencies = [statistics.median(each) for each in times]
        alone = dict[Operator, float]()
        for operator in found:
            heartbeat()
            run = single(operator, target)
            if run is not None:
                alone[operator] = median_time(run, OPERATOR_SECONDS)
    return Profile(target, space, tuple(zip(whole, latencies, strict=True)), alone)


def sampled(
    target: Target, draw: Callable[[random.Random], Model]
) -> tuple[list[Model], list[dict[Operator, int]], list[Operator]]:
    """The networks that are timed as a whole, the operators of each, and all that these and more
    networks have; the same every time."""
    rng = random.Random(0)
    models = [draw(rng) for _ in range(NETWORKS)]
    whole = [operators_on(target, model) for model in models]
    found = dict.fromkeys(itertools.chain(*whole))
    with torch.device("meta"):
        for _ in range(TRACED):
            found |= dict.fromkeys(operators_on(target, draw(rng)))
    return models, whole, list(found)


def write_bundle(
    folder: Path,
    target: Target,
    space: str,
    draw: Callable[[random.Random], Model],
    heartbeat: Callable[[], None] = lambda: None,
) -> None:
    """Write what a machine needs that has onnxruntime and no nasfast: networks and operators as
    ONNX files, and the script `on_target`, which times them and writes a table.

    Args:
        folder: it is made.
        target: of onnxruntime; the other machine writes its own name, threads and version.
        space: its name.
        draw: a network of the space, on the CPU.
        heartbeat: called now and then; may raise to stop.
    """
    models, whole, found = sampled(target, draw)
    script = Path(__file__).with_name("on_target.py")
    files: dict[str, bytes] = {script.name: script.read_bytes()}
    operators, networks = dict[Operator, dict[str, Any]](), list[dict[str, Any]]()
    for i, operator in enumerate(found):
        data, name = onnx_operator(operator), f"operator-{i:04}.onnx"
        operators[operator] = {} if data is None else {"file": name}
        if data is not None:
            files[name] = data
    for i, model in enumerate(models):
        heartbeat()
        networks.append({"file": f"network-{i:02}.onnx"})
        files[networks[-1]["file"]] = exported_bytes(model, size=target.size)
    form = _form(target, space, operators, list(zip(whole, networks, strict=True)))
    form["seconds"] = {"operator": OPERATOR_SECONDS, "network": NETWORK_SECONDS}
    files["profile.json"] = (json.dumps(form) + "\n").encode()
    atomic_directory(folder, files)
