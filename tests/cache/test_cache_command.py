"""``nasfast cache``."""

from __future__ import annotations

import getpass
import os
import subprocess
import sys
import time

import pytest
from samples import COUNT, KEY, arrays, build, encoder

from nasfast.cache import CacheConfig, FeatureCache
from nasfast.commands.cache import main


@pytest.fixture
def directory(tmp_path, monkeypatch):
    monkeypatch.setenv("NASFAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def run(capsys):
    def command(*argv):
        status = main([str(word) for word in argv])
        out, err = capsys.readouterr()
        return status, out + err

    return command


@pytest.fixture
def path(directory):
    cache = build(directory)
    cache.close()
    return cache.paths[0]


def damage(path):
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")


def test_ls(directory, path, run):
    build(directory, key={"encoder": "0123456789abcdef" * 4, "size": "8"}).close()
    status, out = run("ls")
    assert status == 0
    entries = sorted(directory.iterdir())
    size = path.stat().st_blocks * 512 / 1000
    lines = out.splitlines()
    assert [lines[0], lines[3]] == [str(entry) for entry in entries]
    line = f"  file, 5 of 5 samples published, 0 claimed, {size:.1f} KB, used ... ago, not in use"
    start, end = line.split("...")
    assert all(entry.startswith(start) and entry.endswith(end) for entry in (lines[1], lines[4]))
    assert {lines[2], lines[5]} == {
        "  encoder abc, dtype float16",
        "  encoder 01234567, size 8",
    }
    assert lines[6:] == [f"2 files, {2 * size:.1f} KB"]


def test_ls_of_what_is_being_filled(directory, run):
    content, seen = arrays(), []

    def encode(indices):
        if indices[0] == 2:
            seen.append(run("ls")[1])
        return {name: array[indices] for name, array in content.items()}

    FeatureCache.load_or_build(KEY, COUNT, encode, CacheConfig(directory), chunk=2)
    assert "  file, 2 of 5 samples published, 2 claimed" in seen[0]
    assert ", in use\n" in seen[0]


def test_ls_of_ram_shows_what_is_used(directory, ram, run):
    cache = build(directory, placement="ram")
    os.utime(cache.paths[0], (time.time() - 3 * 86400,) * 2)
    (ram / "killed.features").write_bytes(b"")
    out = run("ls")[1]
    assert f"{cache.paths[0]}\n  ram, 5 of 5 samples published" in out
    assert "used 3 days ago" in out
    assert "killed" not in out


def test_one_that_cannot_be_opened_leaves_the_others(directory, path, run):
    """Another user's, or a link, which is not followed."""
    gone = directory / "0.features"
    gone.symlink_to(directory / "nowhere")
    error = (
        f"feature cache {gone}: expected a plain file, got a symbolic link of {getpass.getuser()}; "
        "remove it"
    )
    status, out = run("ls")
    assert status == 0
    assert out.startswith(f"{gone}\n  {error}\n{path}\n  file, 5 of 5 samples published")
    assert run("verify") == (1, f"{error}\n{path}: 5 samples OK\n")


def test_a_damaged_header(path, run):
    os.truncate(path, 9)
    error = f"feature cache {path}: expected a file that starts with"
    out = run("ls")[1]
    assert f"{path}\n  {error}" in out
    assert out.endswith("1 files, 4.1 KB\n")
    status, out = run("verify")
    assert status == 1
    assert out.startswith(error)


def test_ls_of_nothing(run, directory):
    assert run("ls") == (0, "0 files, 0 B\n")


def test_verify(directory, path, run):
    assert run("verify") == (0, f"{path}: 5 samples OK\n")
    damage(path)
    other = build(directory, key={"other": "key"})
    status, out = run("verify")
    assert status == 1
    assert set(out.splitlines()) == {
        f"{path}: damaged samples 4; --repair frees them",
        f"{other.paths[0]}: 5 samples OK",
    }
    assert run("verify", other.paths[0])[0] == 0


def test_repair(directory, path, run):
    damage(path)
    assert run("verify", "--repair", path) == (0, f"{path}: freed the damaged samples 4\n")
    assert run("verify") == (0, f"{path}: 4 samples OK\n")
    calls = []
    load = FeatureCache.load_or_build
    cache = load(KEY, COUNT, encoder(arrays(), calls), CacheConfig(directory))
    assert calls == [[4] * 5]  # in a batch of the usual size
    assert cache.verify() == []


def test_repair_of_what_is_in_use(directory, path, run):
    damage(path)
    cache = build(directory)
    status, out = run("verify", "--repair")
    assert status == 2
    assert out == (
        f"error: feature cache {path}: in use, its damaged samples stay; end the processes that "
        "use it first\n"
    )
    assert cache.count == 5


@pytest.mark.parametrize("by", ["name", "stem", "start", "path", "all"])
def test_rm(directory, path, run, by):
    other = directory / "notes.txt"
    other.write_text("")
    size = path.stat().st_blocks * 512
    names = {"name": path.name, "stem": path.stem, "start": path.name[:5], "path": path}
    status, out = run("rm", names.get(by, "--all"))
    assert (status, out) == (0, f"{path}: removed\n{size / 1000:.1f} KB freed\n")
    assert list(directory.iterdir()) == [other]


def test_rm_of_what_is_in_use(directory, path, run):
    cache = build(directory)
    text = f"{path}: in use, stays; --force removes it anyway\n0 B freed\n"
    assert run("rm", "--all") == (1, text)
    assert path.exists()
    assert run("rm", "--all", "--force")[0] == 0
    assert not path.exists()
    assert cache.verify() == []  # who uses it keeps it


def test_rm_by_age(directory, path, run):
    new = build(directory, key={"other": "key"})
    new.close()
    os.utime(path, (time.time() - 13 * 3600,) * 2)
    for span, removed in (("1d", False), ("14h", False), ("750m", True)):
        assert run("rm", "--older-than", span)[0] == 0
        assert path.exists() is not removed
    assert new.paths[0].exists()


def test_rm_removes_what_killed_processes_left(directory, path, run):
    (directory / ".x.features.tmp").write_bytes(b"x" * 5000)
    assert run("rm", "--older-than", "1d") == (0, "8.2 KB freed\n")
    assert list(directory.iterdir()) == [path]


def test_another_directory(directory, tmp_path, run):
    cache = build(tmp_path / "elsewhere")
    assert run("ls")[1].startswith("0 files")
    out = run("ls", "--cache-dir", tmp_path / "elsewhere")[1]
    assert out.startswith(str(cache.paths[0]))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["rm"], "rm: expected names, --all or --older-than, got none of them"),
        (
            ["rm", "--older-than", "3 weeks"],
            "rm: expected --older-than as 30d, 12h or 90m, got '3 weeks'",
        ),
        *(
            (
                [command, name],
                f"expected a cache in {{directory}} or in RAM, got {name!r}; `nasfast "
                "cache ls` lists them",
            )
            for command, name in (("rm", "zz"), ("verify", ""), ("rm", "/etc/passwd"))
        ),
    ],
)
def test_bad_arguments(directory, path, run, argv, message):
    assert run(*argv) == (2, f"error: {message.format(directory=directory)}\n")
    assert path.exists()


def test_command(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "nasfast.cache", "ls", "--cache-dir", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n")
