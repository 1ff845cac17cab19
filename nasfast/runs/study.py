"""The run directory: configuration, records, checkpoint and lock of one search.

    runs/<YYYYmmdd-HHMMSS>-<method>-<name>/
        study.json  config.toml  env.json  records.jsonl  best.json  front.json  checkpoint/state.pt
        predictions/architecture-<index>/  report.html  lock

A record is on the disk when `append` returns; a crash loses at most the one being written.
"""

from __future__ import annotations

import dataclasses
import datetime
import errno
import itertools
import json
import os
import re
import shutil
import warnings
import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, get_args

from nasfast import __version__
from nasfast.runs.checkpoint import load_checkpoint, restoring, save_checkpoint
from nasfast.runs.objectives import Objectives, front
from nasfast.runs.records import VERSION as RECORD_VERSION
from nasfast.runs.records import Record
from nasfast.utils.errors import UserError, about, cause
from nasfast.utils.files import (
    atomic_directory,
    atomic_write,
    expanded,
    naming,
    parse_json,
    remove_unfinished,
    require_place,
    sync_directory,
)
from nasfast.utils.locks import LOCK, acquire, release
from nasfast.utils.seals import read_sealed, read_sealed_toml, sealed, sealed_json, sealed_toml

__all__ = ["Ranking", "Study"]

VERSION = 2
"""Of study.json; runs made before it have none."""

PREDICTIONS = "predictions"
"""Directory of the files of the best record, and in a training's of those of its network."""

PUBLISHED = "published.json"
"""File of the costs of published architectures."""

Ranking = Literal["score", "last"]
"""What the best architecture is: the one with the highest score, or where the search ended."""


class Study:
    """One run directory, held by one writing process at a time.

    Use `Study.create` for a new run and `Study.open` for an existing one; both lock the directory
    until `close` or the end of the `with` block.
    """

    path: Path
    method: str
    config: dict[str, Any]
    env: dict[str, Any]

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path = path
        self._lock: int | None = None
        self._records: list[Record] = []
        needed = ("config.toml", "env.json", "records.jsonl")
        missing = [name for name in needed if not (path / name).is_file()]
        if missing:
            raise UserError(
                f"{path} is not a run directory: it has no {', '.join(missing)}; "
                "give a directory that a search wrote, such as runs/<date>-<method>-<name>"
            )
        if not read_only:
            self._lock = acquire(path / LOCK, path)
            _writers.add(self)
        try:
            self.config = read_sealed_toml(path / "config.toml")
            self.env = read_sealed(path / "env.json")
            self.method, self._ranking = self._read_description()
            with about(path / "config.toml"):
                self.objectives = _objectives(self.config.get("objective", ["score"]))
            self._read_records()
            if not read_only:
                for folder in (path / PREDICTIONS, path / "checkpoint"):
                    remove_unfinished(folder)
                self.write_best()
                self._write_front()
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(
        cls,
        root: Path,
        method: str,
        name: str,
        config: Mapping[str, Any],
        env: Mapping[str, Any],
        *,
        ranking: Ranking = "score",
    ) -> Self:
        """Make a new run directory below `root`; an existing one is never touched.

        Args:
            method: command of the search, such as "segmentation".
            name: the user's name of the run.
            config: fully resolved settings; None values are left out, nested mappings and
                dataclasses become tables.
            env: versions, machine and command line, stored as JSON.
            ranking: what the best architecture is.
        """
        stem = _stem(method, name)
        toml = sealed_toml({k: _toml(v, k) for k, v in config.items() if v is not None})
        environment = sealed_json(env)
        description = {"version": VERSION, "method": method, "ranking": ranking}
        root.mkdir(parents=True, exist_ok=True)
        for attempt in itertools.count(1):
            path = root / (stem if attempt == 1 else f"{stem}-{attempt}")
            try:
                path.mkdir()
                break
            except FileExistsError:
                continue
        (path / "checkpoint").mkdir()
        atomic_write(path / "config.toml", toml)
        atomic_write(path / "env.json", environment)
        atomic_write(path / "study.json", sealed_json(description))
        atomic_write(path / "records.jsonl", "")  # last: without it nothing takes this for a run
        sync_directory(root)
        return cls(path)

    @staticmethod
    def require_place(root: Path, method: str, name: str) -> None:
        """Raise UserError where `create` could not make a run directory; leaves nothing behind."""
        require_place(root / _stem(method, name), "give another --runs or --name")

    @classmethod
    def open(cls, path: Path, *, read_only: bool = False) -> Self:
        """Open an existing run: to continue it, or with `read_only` just to look.

        A last line that a crash left torn is cut off the records with a warning. `read_only` needs
        no lock, changes no records, and so works on a run in progress.
        """
        return cls(expanded(path), read_only=read_only)

    @property
    def records(self) -> tuple[Record, ...]:
        """Every record so far, in the order of their index."""
        return tuple(self._records)

    @property
    def ranks_by(self) -> Ranking:
        """What the best architecture is."""
        return self._ranking

    @property
    def best(self) -> Record | None:
        """The first of the ranking; None before a success."""
        ranking = self.ranking()
        return ranking[0] if ranking else None

    def ranking(self) -> list[Record]:
        """Successful architectures, each once, best first.

        By score, of equals the earliest first, or by the last time that each came up, as the run
        was created. What another phase found again is another architecture: it is part of a larger
        one.
        """
        scored = [
            (score, record) for record in self._records if (score := self.score(record)) is not None
        ]
        if self._ranking == "last":
            scored.reverse()
        else:
            scored.sort(key=lambda pair: pair[0], reverse=True)
        once: dict[tuple[int, int], Record] = {}  # by phase and first record of the architecture
        for _, record in scored:
            first = record.index if record.duplicate_of is None else record.duplicate_of
            once.setdefault((record.phase, first), record)
        return list(once.values())

    def score(self, record: Record) -> tuple[int, int, float] | None:
        """What orders architectures: phase, stages passed, and the reward of the last one, less the
        costs where they have weights; None if failed."""
        score = record.score
        if score is None or self.objectives.weights is None:
            return score
        return *score[:2], self.objectives.value(score[2], record.evaluation.costs)

    def front(self) -> list[Record]:
        """The architectures of the last phase that went through all stages and that no other beats
        in reward and in the costs that are objectives, the highest reward first. Where costs are
        none, or have weights: the best one alone."""
        ranking = self.ranking()
        if not ranking or not self.objectives.several:
            return ranking[:1]
        phase, passed, _ = ranking[0].score or (0, 0, 0.0)
        last = [r for r in ranking if r.score is not None and r.score[:2] == (phase, passed)]
        return front(last, self.objectives.costs)

    def point(self, record: Record) -> tuple[float, ...]:
        """Its place among the objectives, all to be made small: the reward of its last stage, less,
        and the binary logarithms of the costs."""
        evaluation = record.evaluation
        reward = evaluation.rewards[evaluation.last_stage or ""]
        return (-reward, *self.objectives.goals(evaluation.costs))

    def append(self, record: Record) -> None:
        """Add one record, durably; updates best.json when it is the new best."""
        self._require_lock()
        if record.index != len(self._records):
            raise ValueError(
                f"record index: expected {len(self._records)} (the records so far), got "
                f"{record.index}; append every record once, in order"
            )
        line = (json.dumps(sealed(record.to_json()), separators=(",", ":")) + "\n").encode()
        path = self.path / "records.jsonl"
        with naming(path), open(path, "ab", buffering=0) as file:
            size = file.tell()
            try:
                if file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except BaseException:
                file.truncate(size)
                raise
        self._records.append(record)
        if self.best is record:
            self.write_best()
        self._write_front()

    def keep_files(self, record: Record, files: Mapping[str, bytes]) -> None:
        """Keep files, such as pictures, of a record that is about to be appended, where it will be
        the best. `append` removes those of the best before it: after a crash between the two, that
        one still has its own, and those of a record that was never appended are removed."""
        self._require_lock()
        best = self.best
        score, highest = self.score(record), best and self.score(best)
        if not files or score is None:
            return
        if self._ranking == "score" and highest and score <= highest:
            return
        atomic_directory(self._files_of(record), files)

    @property
    def best_files(self) -> Path:
        """Directory of the best record's files; older runs, and those before a success, have
        none."""
        best = self.best
        return self._files_of(best) if best is not None else self.path / PREDICTIONS

    def _files_of(self, record: Record) -> Path:
        return self.path / PREDICTIONS / f"architecture-{record.index}"

    def move_data(self, data: str) -> None:
        """Note in config.toml where the data is now."""
        self._require_lock()
        self.config = self.config | {"data": data}
        atomic_write(self.path / "config.toml", sealed_toml(self.config))

    def write_best(self) -> None:
        """Write the best record to best.json, atomically, unless it is there already, and remove
        the files of others."""
        self._require_lock()
        if self.best is None:
            return
        for old in self.path.glob(f"{PREDICTIONS}/*"):
            if old != self._files_of(self.best):
                shutil.rmtree(old)
        path = self.path / "best.json"
        data = sealed_json(self.best.to_json()).encode()
        if not path.exists() or path.read_bytes() != data:
            atomic_write(path, data)

    def _write_front(self) -> None:
        """Write the records of the front to front.json, atomically, where there are several
        objectives."""
        if not self.objectives.several or self.best is None:
            return
        records = [record.to_json() for record in self.front()]
        form = {"objectives": ["score", *self.objectives.costs], "front": records}
        data = sealed_json(form).encode()
        path = self.path / "front.json"
        if not path.exists() or path.read_bytes() != data:
            atomic_write(path, data)

    def write_published(self, costs: Mapping[str, Mapping[str, float]]) -> None:
        """Keep costs of published architectures, by name, for the report."""
        self._require_lock()
        atomic_write(self.path / PUBLISHED, sealed_json(costs))

    @property
    def published(self) -> dict[str, dict[str, float]]:
        """What `write_published` kept."""
        path = self.path / PUBLISHED
        return read_sealed(path) if path.is_file() else {}

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Replace checkpoint/state.pt atomically. `state`: tensors and plain Python values only."""
        self._require_lock()
        save_checkpoint(self._checkpoint, state)

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The state last saved, on the CPU; None when the run has none yet.

        Raises:
            UserError: the file is damaged; the message says how to go on.
        """
        return load_checkpoint(self._checkpoint, self._remedy)

    def restoring(self) -> AbstractContextManager[None]:
        """Around what puts the loaded state to use: a UserError says what is wrong with it."""
        return restoring(self._checkpoint, self._remedy)

    def require_records(self, count: int) -> None:
        """Raise UserError unless the records that the checkpoint has seen are there."""
        if len(self._records) < count:
            raise UserError(
                f"{self.path / 'records.jsonl'}: expected the {count} records that the checkpoint "
                f"has seen, got {len(self._records)}; restore it from a copy{self._otherwise}"
            )

    @property
    def _checkpoint(self) -> Path:
        return self.path / "checkpoint" / "state.pt"

    @property
    def _remedy(self) -> str:
        """What to do about a damaged checkpoint."""
        return f"restore it from a copy{self._otherwise}"

    @property
    def _otherwise(self) -> str:
        if self._ranking == "last":  # by gradient: the weights are nowhere else
            return ", or start a new run"
        return f", or remove {self._checkpoint}: the search then continues from the records"

    def close(self) -> None:
        """Release the lock; calling it again does nothing."""
        if self._lock is not None:
            release(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _require_lock(self) -> None:
        if self._lock is None:
            raise RuntimeError(
                f"{self.path} is closed or open for reading only; use Study.open(path) to write"
            )

    def _read_description(self) -> tuple[str, Ranking]:
        """Method and ranking of study.json, or what stood for them before there was one."""
        path = self.path / "study.json"
        if not path.exists():
            method = self.config.get("method")
            if not isinstance(method, str):
                raise UserError(
                    f"{self.path / 'config.toml'}: expected the name of the run's method as "
                    f'"method", got {method!r}; restore the file from a copy'
                )
            return method, "last" if self.env.get("choice") == "last" else "score"
        found = read_sealed(path)
        version, method = found.get("version"), found.get("method")
        ranking = next((kind for kind in get_args(Ranking) if kind == found.get("ranking")), None)
        if type(version) is int and version > VERSION:
            newer = (
                f"{path}: expected version {VERSION}, got {version} of {self._writer}, newer than "
                f"this nasfast, {__version__}"
            )
            if self._lock is not None:
                raise UserError(f"{newer}; continue the run with that one")
            warnings.warn(f"{newer}; what it cannot read is left out", stacklevel=4)
            return str(method), ranking or "score"
        if version != VERSION or not isinstance(method, str) or ranking is None:
            raise UserError(
                f'{path}: expected "version" {VERSION}, "method" and "ranking" ("score" or '
                f'"last"), got {json.dumps(found)[:80]}; restore it from a copy'
            )
        return method, ranking

    @property
    def _writer(self) -> str:
        return f"nasfast {self.env.get('nasfast', '(version unknown)')}"

    def _read_records(self) -> None:
        path = self.path / "records.jsonl"
        data = path.read_bytes()
        lines = data.splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            try:
                parsed = parse_json(line)
                torn = not line.endswith(b"\n")
            except (ValueError, RecursionError) as error:
                if number < len(lines):
                    raise UserError(
                        f"{path}, line {number}: expected one JSON record, got {line[:60]!r} "
                        f"({cause(error)}); restore the file from a copy"
                    ) from error
                torn = True
            if torn:
                self._cut(path, len(data) - len(line), number)
                break
            try:
                record = Record.from_json(parsed)
                if record.index != number - 1:
                    raise UserError(f"index: expected {number - 1}, got {record.index}")
                costs = record.evaluation.costs
                lacking = [cost for cost in self.objectives.costs if cost not in costs]
                if lacking and record.score is not None:
                    raise UserError(
                        f"evaluation.costs: expected {lacking[0]}, which is an objective, got "
                        f"{', '.join(costs)}"
                    )
            except UserError as error:
                raise UserError(
                    f"{path}, line {number}: not a record of this version of nasfast: {error}"
                    f" (the run was begun by {self._writer})"
                ) from error
            self._records.append(record)
        newest = max((record.version for record in self._records), default=0)
        if newest > RECORD_VERSION:
            warnings.warn(
                f"{path}: has records of version {newest}, this nasfast knows {RECORD_VERSION}: "
                "fields that it does not know are kept but not used",
                stacklevel=3,
            )

    def _cut(self, path: Path, size: int, number: int) -> None:
        """Drop a torn last line: a crash while it was appended, so nothing was built on it."""
        if self._lock is None:
            return
        with open(path, "r+b") as file:
            file.truncate(size)
            os.fsync(file.fileno())
        warnings.warn(
            f"{path}: line {number} was torn by a crash while it was written and has been cut off",
            stacklevel=4,
        )


def _objectives(words: object) -> Objectives:
    """Of config.toml."""
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise UserError(
            f'objective: expected a list of words such as ["score", "latency"], got {words!r}; '
            "restore the file from a copy"
        )
    return Objectives.of(words)


def _stem(method: str, name: str) -> str:
    """Name of a run directory that is made now."""
    for argument, value in (("method", method), ("name", name)):
        if not re.fullmatch(r"\w[\w.+-]*", value):
            raise UserError(
                f"{argument}: expected letters, digits and ._+- (it becomes part of a "
                f"directory name), got {value!r}"
            )
    return f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{method}-{name}"


_writers: weakref.WeakSet[Study] = weakref.WeakSet()


def _close_in_child() -> None:
    for study in _writers:
        study.close()


# A forked data worker that outlives its killed parent must not keep the run locked.
os.register_at_fork(after_in_child=_close_in_child)


def _toml(value: Any, key: str) -> Any:
    """The TOML form of one setting; `key` is its dotted name for the error."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {k: _toml(v, f"{key}.{k}") for k, v in value.items() if v is not None}
    if isinstance(value, tuple | list):
        return [_toml(v, f"{key}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, bool | int | float | str):
        return value
    raise TypeError(
        f"config {key}: expected a bool, int, float, str, Path, sequence, mapping or dataclass, "
        f"got {type(value).__name__}"
    )
