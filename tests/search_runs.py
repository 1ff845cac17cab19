"""What tests of whole searches and trainings share: one in a process of its own, what it left."""

import contextlib
import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from nasfast.commands import search
from nasfast.runs.study import Study


def outcome(run):
    """What a search decided and measured, without what the clock decided."""
    records = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
    for record in records:
        del record["time"], record["evaluation"]["seconds"]
        record.pop("checksum", None)  # of these too; runs of earlier versions have none
    return records


def shown(run):
    """Content of the files that show what the best of a search, or a training, predicts."""
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in (run / "predictions").rglob("*")
        if path.is_file()
    }


def start(command, *, group=False, module="nasfast.search"):
    """`nasfast search` in a process of its own, or in a process group of its own."""
    root = str(Path(search.__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-m", module, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": path},
        start_new_session=group,
    )


def exists(pid):
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for_records(process, runs, count):
    """The run directory, as soon as it holds `count` records."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        for path in runs.glob("*/records.jsonl"):
            if path.read_bytes().count(b"\n") >= count:
                return path.parent
        time.sleep(0.001)
    process.kill()
    raise AssertionError(f"{count} records did not appear: {process.communicate()}")


def drawn_moments():
    """Decides when a test kills; NASFAST_TEST_SEED repeats what a failed test has printed."""
    seed = int(os.environ.get("NASFAST_TEST_SEED", random.SystemRandom().getrandbits(32)))
    print(f"moments drawn with seed {seed}; NASFAST_TEST_SEED={seed} repeats them")
    return random.Random(seed)


def killed_and_resumed(command, runs, waits):
    """The run of a search that is killed after each wait, resumed, and in the end left alone."""
    for wait in waits:
        process = start(command)
        wait(process)
        process.kill()
        _, stderr = process.communicate()
        assert process.returncode in (-signal.SIGKILL, 0), stderr
        # a run of which not even the empty records.jsonl was written has not begun
        for path in runs.glob("*/records.jsonl"):
            command = ["--resume", str(path.parent)]
    process = start(command)
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    (run,) = (path.parent for path in runs.glob("*/records.jsonl"))
    return run


class Crash(BaseException):
    """Stands for the end of the process."""


def crashed(command, runs, arrange):
    """The run of a search in this process that ends where `arrange` makes it raise `Crash`."""
    with pytest.MonkeyPatch.context() as patch:
        arrange(patch)
        with pytest.raises(Crash):
            search.main(command)
    (run,) = runs.iterdir()
    return run


@contextlib.contextmanager
def full_disk(size):
    """No file may grow beyond some bytes, which fails like a full disk or a used up quota."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def before_a_checkpoint(monkeypatch):
    """`Crash` where the third one would be saved, of a batch or of an epoch."""
    save, calls = Study.save_checkpoint, itertools.count(1)

    def crash(study, state):
        if next(calls) == 3:
            raise Crash
        save(study, state)

    monkeypatch.setattr(Study, "save_checkpoint", crash)


def checkpoint(run):
    state = Study.open(run, read_only=True).load_checkpoint()
    assert state is not None
    return state


def assert_equal(one, other, path=""):
    """Bit for bit, tensors within mappings and sequences too."""
    if isinstance(one, Mapping):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_equal(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for i, pair in enumerate(zip(one, other)):
            assert_equal(*pair, f"{path}[{i}]")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    else:
        assert one == other, path


def assert_same(run, whole):
    """Both searches decided, measured, learned and show exactly the same."""
    assert outcome(run) == outcome(whole)
    assert shown(run) == shown(whole) != {}
    timed = {"seconds": None, "record": None}  # `outcome` has compared the last record
    assert_equal(checkpoint(run) | timed, checkpoint(whole) | timed)
    first, other = (json.loads((r / "best.json").read_text())["index"] for r in (run, whole))
    assert first == other


def assert_same_training(out, whole, description=True):
    """Both trainings gave the same network, with the same description, and measured and show the
    same."""
    assert shown(out) == shown(whole) != {}
    for name in ("model.safetensors", "genotype.json")[not description :]:
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    ours, theirs = (
        json.loads((path / "metrics.json").read_text()) | {"seconds": 0, "checksum": ""}
        for path in (out, whole)
    )
    assert ours == theirs
