"""Processes that are killed at any moment: what is continued ends as if it had been left alone."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from commands import start
from search_runs import assert_same, assert_same_training, drawn_moments

# in all, by what is killed; without --nightly two workers once, as methods/test_run_contract.py
# kills the others
KILLS = {
    "segmentation": 120,
    "two workers": 60,
    "restoration": 120,
    "segmentation training": 50,
    "restoration training": 50,
}
DRIVER = Path(__file__).parents[1] / "cache" / "crash_driver.py"


@dataclass
class Kind:
    """A command that is killed, and what it gives uninterrupted.

    Attributes:
        argv: the command.
        place: flag of where it writes, and whether that is the directory itself.
        whole: what it wrote.
        same: asserts that another directory is the same.
    """

    argv: list[str]
    whole: Path
    training: bool = False

    def begin(self, folder):
        """Command line of a new one."""
        if self.training:
            return ["train", *self.argv, "--out", folder / "train"]
        return ["search", *self.argv, "--runs", folder]

    def go_on(self, folder):
        """Command line that continues what is in a folder, or begins it again."""
        if self.training:
            begun = (folder / "train" / "genotype.json").is_file()
            return ["train", "--resume", folder / "train"] if begun else self.begin(folder)
        runs = [path.parent for path in folder.glob("*/records.jsonl")]
        return ["search", "--resume", runs[0]] if runs else self.begin(folder)

    def check(self, folder):
        """That what is in the folder is what the command gives uninterrupted."""
        if self.training:
            assert_same_training(folder / "train", self.whole)
            return
        (run,) = (path.parent for path in folder.glob("*/records.jsonl"))
        assert_same(run, self.whole)


@pytest.fixture
def kind(request, nightly):
    if not nightly and request.param != "two workers":
        pytest.skip("two workers are enough: --nightly")

    def get(name):
        return request.getfixturevalue(name)

    match request.param:
        case "segmentation":
            return Kind(get("tiny_search"), get("tiny_run"))
        case "two workers":
            return Kind([*get("tiny_search"), "--workers", "2"], get("tiny_run"))
        case "restoration":
            return Kind(get("tiny_bilevel"), get("bilevel_run"))
        case "segmentation training":
            return Kind(get("tiny_training"), get("tiny_model"), training=True)
        case "restoration training":
            return Kind(get("tiny_restorer"), get("trained_restorer"), training=True)


@pytest.mark.parametrize(("kind", "kills"), KILLS.items(), ids=KILLS, indirect=["kind"])
def test_killed_at_any_moment(kind, kills, tmp_path, nightly):
    rng, killed, rounds = drawn_moments(), 0, 0
    length = 3.0  # seconds of a round; those of the last one once there was one
    wanted = kills if nightly else 1
    while killed < wanted:
        folder, errors = tmp_path / str(rounds), tmp_path / f"{rounds}.txt"
        folder.mkdir()
        begun, here = time.monotonic(), 0
        command = start(kind.begin(folder), errors)
        while here < 4 and killed < wanted and command.wait(rng.uniform(0, length)) is None:
            command.process.kill()
            command.process.join()
            killed, here = killed + 1, here + 1
            command = start(kind.go_on(folder), errors)
        assert command.wait() is not None, command.text
        assert (command.process.exitcode, "Traceback" in command.text) == (0, False), command.text
        kind.check(folder)
        rounds, length = rounds + 1, time.monotonic() - begun
    print(f"{killed} kills in {rounds} rounds")


def test_killed_as_it_fills_a_cache(tmp_path, nightly):
    """The driver reads meanwhile, and at the end all, and compares each sample with the truth."""
    kills, seed = 100 if nightly else 10, drawn_moments().randrange(10**6)
    done = subprocess.run(
        [sys.executable, str(DRIVER), str(tmp_path), str(seed), "3", str(kills)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    assert (done.returncode, done.stderr) == (0, ""), seed
    assert json.loads(done.stdout)["killed"] == kills
