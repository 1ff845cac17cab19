"""Manage feature caches: ``nasfast cache ls|verify|rm``."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from nasfast.cache import places
from nasfast.cache.feature_cache import used_directory
from nasfast.cache.segment import Segment
from nasfast.utils.cli import reports_errors, visible
from nasfast.utils.errors import UserError
from nasfast.utils.files import expanded

_SECONDS = {"m": 60, "h": 3600, "d": 86400}

Names = Annotated[tuple[str, ...], tyro.conf.Positional]


@dataclass(frozen=True)
class _Directories:
    cache_dir: Path | None = None
    """Folder of the caches; by default $NASFAST_CACHE or ~/.cache/nasfast. Where others may write
    to it, your folder nasfast-<uid> in it."""

    def files(self, names: Sequence[str] = ()) -> list[Path]:
        """The caches' files, on disk and in RAM; those of some names (or paths) only.

        Raises:
            UserError: there is none of a name.
        """
        directory, ram = self.directory, places.ram_directory()
        places.sweep(ram)  # or they could be removed while they are read
        found = [path for place in (directory, ram) for path in places.caches(place)]
        chosen = []
        for name in names:
            path = expanded(name)
            if path.suffix == places.SUFFIX and path.is_file():
                matches = [path]
            else:
                matches = [p for p in found if name and p.name.startswith(name)]
            if not matches:
                raise UserError(
                    f"expected a cache in {directory} or in RAM, got {name!r}; `nasfast "
                    "cache ls` lists them"
                )
            chosen += matches
        return chosen if names else found

    @property
    def directory(self) -> Path:
        return used_directory(self.cache_dir)


@dataclass(frozen=True)
class Ls(_Directories):
    """List the caches, what they hold and whether they are in use."""

    def run(self) -> int:
        files, total = self.files(), 0
        for path in files:
            print(path)
            try:
                status = path.lstat()
                total += status.st_blocks * 512
                segment = Segment.open(path)
            except (OSError, ValueError) as error:
                print(f"  {error}")
                continue
            census, header = segment.census(), segment.header
            use = "in use" if segment.in_use() else "not in use"
            segment.close()
            age = _age(time.time() - max(status.st_atime, status.st_mtime))
            place = "ram" if places.is_ram(path) else "file"
            print(
                f"  {place}, {census.published} of {census.count} samples published, "
                f"{census.claimed} claimed, {_size(status.st_blocks * 512)}, used {age} ago, {use}"
            )
            key = ", ".join(f"{name} {_short(value)}" for name, value in header.key.items())
            print(f"  {visible(key)}")
        print(f"{len(files)} files, {_size(total)}")
        return 0


@dataclass(frozen=True)
class Verify(_Directories):
    """Read every sample of caches and compare it with its checksum."""

    names: Names = ()
    """Names, beginnings of names or paths; by default all."""
    repair: bool = False
    """Free damaged samples: the next search encodes them again."""

    def run(self) -> int:
        damaged = 0
        for path in self.files(self.names):
            try:
                segment = Segment.open(path)
            except (OSError, ValueError) as error:
                print(error)
                damaged += 1
                continue
            rows, census = segment.verify(), segment.census()
            if not rows:
                print(f"{path}: {census.published} samples OK")
                continue
            text = ", ".join(map(str, rows))
            if self.repair:
                segment.repair(rows)
                print(f"{path}: freed the damaged samples {text}")
            else:
                damaged += 1
                print(f"{path}: damaged samples {text}; --repair frees them")
        return 1 if damaged else 0


@dataclass(frozen=True)
class Rm(_Directories):
    """Remove caches that nobody uses, and what killed processes left."""

    names: Names = ()
    """Names, beginnings of names or paths."""
    all: bool = False
    """Remove every cache."""
    older_than: str | None = None
    """Remove what was not used for a time, such as 30d, 12h or 90m."""
    force: bool = False
    """Remove what is in use too; who uses it keeps it until it ends."""

    SPAN: ClassVar = re.compile(r"(\d+) *([mhd])")

    def run(self) -> int:
        if not (self.names or self.all or self.older_than):
            raise UserError("rm: expected names, --all or --older-than, got none of them")
        files, freed, kept = self._chosen(), 0, 0
        for path in files:
            try:
                done = places.remove(path, force=self.force)
            except (OSError, UserError) as error:
                kept += 1
                print(error)
                continue
            if done is None and path.exists():
                kept += 1
                print(f"{path}: in use, stays; --force removes it anyway")
            elif done is not None:
                freed += done
                print(f"{path}: removed")
        freed += sum(places.sweep(d) for d in (self.directory, places.ram_directory()))
        print(f"{_size(freed)} freed")
        return 1 if kept else 0

    def _chosen(self) -> list[Path]:
        files = self.files(self.names)
        if self.older_than is None:
            return files
        match = self.SPAN.fullmatch(self.older_than.strip())
        if match is None:
            raise UserError(
                f"rm: expected --older-than as 30d, 12h or 90m, got {self.older_than!r}"
            )
        limit = time.time() - int(match[1]) * _SECONDS[match[2]]
        used = ((path, path.lstat()) for path in files)
        return [path for path, s in used if max(s.st_atime, s.st_mtime) < limit]


def _size(count: int) -> str:
    """Bytes as people read them."""
    size, unit = float(count), "B"
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def _age(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} seconds"


def _short(value: str) -> str:
    """Hashes by their first digits."""
    return value[:8] if re.fullmatch(r"[0-9a-f]{32,}", value) else value


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    command = tyro.cli(
        Annotated[Ls, tyro.conf.subcommand("ls")]
        | Annotated[Verify, tyro.conf.subcommand("verify")]
        | Annotated[Rm, tyro.conf.subcommand("rm")],
        args=argv,
        description=__doc__,
        prog="nasfast cache",
    )
    return command.run()
