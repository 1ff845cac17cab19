"""Fixtures for the feature cache."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nasfast.cache import places


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    """Directories that tests make are those of one user, whatever the umask of who runs them."""
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture(autouse=True)
def ram(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for /dev/shm/nasfast-<uid>, in which other processes of the machine may be busy."""
    directory = tmp_path_factory.mktemp("shm") / "nasfast"
    monkeypatch.setattr(places, "ram_directory", lambda: directory)
    return directory


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts small file systems of their own, given the options of a tmpfs."""
    mounted: list[Path] = []

    def make(options: str) -> Path:
        directory = tmp_path / f"mount{len(mounted)}"
        directory.mkdir()
        command = [
            "mount",
            "-t",
            "tmpfs",
            "-o",
            f"mode=755,{options}",
            "nasfast-test",
            str(directory),
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("no mount command")
        if done.returncode:
            pytest.skip(f"may not mount a tmpfs: {done.stderr.strip()}")
        mounted.append(directory)
        return directory

    yield make
    for directory in mounted:
        subprocess.run(["umount", "-l", str(directory)], check=True)
