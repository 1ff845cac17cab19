"""Latency in a search: predicted of every proposal, measured of what is to be trained."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic

import torch

from nasfast.inference.model import Model
from nasfast.latency.operators import Operator
from nasfast.latency.profile import Profile, measured_profile, operators_on
from nasfast.latency.timing import Run, Target, deployed, rounds, threads
from nasfast.spaces.base import G, Genotype, Space
from nasfast.utils.errors import UserError, cause, out_of_memory
from nasfast.utils.files import naming, parse_json
from nasfast.utils.seals import sealed, unsealed

PROFILE, MEASURED = "latency.json", "latencies.jsonl"
"""Files of a run: the table of predictions, and a line for each network that was measured."""
SECONDS, ROUNDS, REFERENCES = 0.5, 9, 3
"""Time of a measurement for each of its networks, its least number of rounds, and how many of the
networks are references: memory that others use does not slow all networks alike."""

FIRST = 4
"""Networks whose operators the profile of another machine has to have."""


class UndeployableError(Exception):
    """A network that does not run on the target, and why: "out of memory (..)"."""


class Latencies(Generic[G]):
    """Latencies of the networks of a search on a target.

    A network takes turns with references, the first three of the profile, whose latencies are
    fixed: its times are divided by the pace of the references in the same round, so that a machine
    that has become slower since says the same. Profile and measurements are kept in the run: a
    search that goes on later reads them, and measures nothing again.

    Args:
        target: where networks are to be fast; this machine, unless there is a profile of another.
        space: that is searched.
        build: an architecture as it would be used, untrained.
        profile: of another machine: latencies are predicted only.
        heartbeat: called now and then; may raise to stop.
    """

    def __init__(
        self,
        target: Target,
        space: Space[G],
        build: Callable[[G], Model],
        profile: Profile | None = None,
        heartbeat: Callable[[], None] = lambda: None,
    ) -> None:
        self.target, self._profile = target, profile
        self._space, self._build = space, build
        self._heartbeat = heartbeat
        self.measures = profile is None
        """Whether networks are measured, and not only predicted."""
        self._file: Path | None = None
        self._known: dict[str, float | str] = {}
        self._references: list[Run] = []

    def prepare(self, folder: Path, say: Callable[[str], None]) -> None:
        """Read the profile of a run's folder, or make it there.

        Raises:
            UserError: a file there is damaged.
        """
        folder.mkdir(exist_ok=True)
        kept, self._file = folder / PROFILE, folder / MEASURED
        if kept.exists():
            self._profile = Profile.read(kept)
            if self.measures and self._profile.target != self.target:
                say(
                    f"note: the run's latencies are of {self._profile.target}; from here on they "
                    f"are predicted for it, as this is {self.target}"
                )
                self.measures = False
            self.target = self._profile.target
        else:
            if self._profile is None:
                say(f"latency  {self.target}: networks and operators are timed ..")
                self._profile = measured_profile(
                    self.target, self.space, self.draw, self._heartbeat
                )
            self._profile.write(kept)
        say(f"latency  {self._profile.target}: {self._profile}")
        if self._file.exists():
            self._known = _read(self._file)

    @property
    def space(self) -> str:
        """Name of the space."""
        return self._space.name

    @property
    def profile(self) -> Profile:
        """After `prepare`."""
        assert self._profile is not None, "prepare comes first"
        return self._profile

    def draw(self, rng: random.Random) -> Model:
        """A network of the space."""
        return self._build(self._space.sample(rng))

    def require_known(self) -> None:
        """UserError where the table of another machine is of other networks."""
        assert self._profile is not None, "there is a table"
        rng, found = random.Random(0), Counter[Operator]()
        with torch.device("meta"):
            for _ in range(FIRST):
                found.update(operators_on(self.target, self.draw(rng)))
        self._profile.require_known(self.space, found, "latency-table")

    def predict(self, genotype: G) -> float:
        """Seconds of a forward pass, which the table leads one to expect."""
        with torch.device("meta"):
            operators = operators_on(self.target, self._build(genotype))
        return self.profile.table.predict(operators) / 1e3

    def of(self, genotype: G) -> float:
        """Seconds of a forward pass, measured if this is the target, else predicted; of what was
        asked for before, those of then.

        Raises:
            UndeployableError: the network does not run there; it did not the first time.
        """
        key = _key(genotype)
        if key not in self._known:
            if self.measures:
                self._known[key] = self._measured(key, genotype)
            else:
                self._known[key] = latency = self.predict(genotype)
                self._keep({"key": key, "latency": latency, "predicted": True})
        found = self._known[key]
        if isinstance(found, str):
            raise UndeployableError(found)
        return found

    def _measured(self, key: str, genotype: G) -> float | str:
        with threads(self.target.threads):
            references = self.references()
            try:
                own = deployed(self._build(genotype), self.target)
                turns = rounds([*references, own], SECONDS, ROUNDS)
            except Exception as error:  # whatever a backend raises
                failure = _failure(error)
                if failure is None:
                    raise
                self._keep({"key": key, "failure": failure})
                return failure
        latency = self.comparable(turns)[0] / 1e3
        self._keep({"key": key, "latency": latency, "rounds": len(turns)})
        return latency

    def references(self) -> list[Run]:
        """The first networks of the profile, as they run here."""
        if not self._references:
            rng = random.Random(0)
            count = min(REFERENCES, len(self.profile.networks))
            self._references = [deployed(self.draw(rng), self.target) for _ in range(count)]
        return self._references

    def comparable(self, turns: Sequence[tuple[float, ...]]) -> list[float]:
        """Medians, in milliseconds, of networks whose times follow those of the references in each
        round, where a machine as fast as when the profile was made would have them."""
        known = [time for _, time in self.profile.networks[:REFERENCES]]
        count, found = len(known), []
        for turn in turns:
            pace = statistics.geometric_mean(
                now / then for now, then in zip(turn[:count], known, strict=True)
            )
            found.append([time / pace for time in turn[count:]])
        return [statistics.median(each) for each in zip(*found, strict=True)]

    def _keep(self, line: dict[str, object]) -> None:
        assert self._file is not None, "prepare comes first"
        with naming(self._file), open(self._file, "a") as file:
            file.write(json.dumps(sealed(line)) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _failure(error: Exception) -> str | None:
    """Why a network does not run on a target; None for a defect, or what the user stopped."""
    if out_of_memory(error):
        return f"out of memory ({cause(error)})"
    if isinstance(error, torch.onnx.OnnxExporterError):
        return f"no export ({cause(error)})"
    return str(error) if isinstance(error, UserError) else None


def _key(genotype: Genotype) -> str:
    return json.dumps(genotype.canonical().to_json(), sort_keys=True)


def _read(path: Path) -> dict[str, float | str]:
    """Latencies of a run, or why there is none; a last line that a crash left torn is cut off."""
    found = dict[str, float | str]()
    whole, end, torn = path.read_bytes().rpartition(b"\n")
    for number, line in enumerate((whole + end).splitlines(), 1):
        try:
            entry = parse_json(line)
            if not isinstance(entry, dict):
                raise TypeError(entry)
            found[str(entry["key"])] = _latency(unsealed(entry, "latency"))
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}") from error
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise UserError(
                f"{path}, line {number}: expected the latency of a network, got {line[:60]!r}; "
                "restore the file from a copy"
            ) from error
    if torn:
        with contextlib.suppress(OSError):
            os.truncate(path, len(whole + end))
    return found


def _latency(entry: Mapping[str, Any]) -> float | str:
    if "failure" in entry:
        return str(entry["failure"])
    latency = float(entry["latency"])
    if not 0 < latency < math.inf:
        raise ValueError(latency)
    return latency
