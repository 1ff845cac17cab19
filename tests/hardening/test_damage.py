"""Random damage to the files of runs, trainings, models, encoders and caches: what was written is
read, or one line says which file is damaged. Nothing else is served, nothing hangs."""

import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from commands import call, start
from damage import damage
from search_runs import drawn_moments, outcome, shown

from nasfast.cache import CacheConfig, FeatureCache
from nasfast.commands import pretrain
from nasfast.encoders import load_encoder
from nasfast.inference.model import load
from nasfast.latency.profile import Profile
from nasfast.utils.errors import UserError
from nasfast.utils.seals import read_sealed

CACHE, COUNT = {"encoder": "of a test"}, 12


@dataclass
class Subject:
    """Files that are damaged, one at a time, and what reads them.

    Attributes:
        whole: the directory that is copied.
        files: in it that are damaged.
        read: starts the reader of a copy; given a place for stderr.
        same: asserts that a reader that had no objection was served what was written.
    """

    whole: Path
    files: list[str]
    read: object
    same: object


def read_model(path, whole):
    """A trained network."""
    model, expected = load(path, "cpu"), load(whole, "cpu")
    assert_equal_state(model.network, expected.network)
    assert model.description == expected.description
    return 0


def read_encoder(path, whole):
    """An encoder that `nasfast pretrain` wrote."""
    assert_equal_state(load_encoder(path), load_encoder(whole))
    return 0


def encode(indices):
    """What a cache holds."""
    values = torch.arange(8 * 6 * 6) * (indices[:, None] + 1)
    maps = (values % 1009).bfloat16().view(-1, 8, 6, 6)
    return {"tap0": maps, "labels": (values[:, :256] % 251).byte().view(-1, 16, 16)}


def read_cache(path, whole):
    """Every sample of a cache, as a search reads it: those that are missing are encoded again."""
    found, expected = (
        FeatureCache.load_or_build(CACHE, COUNT, encode, CacheConfig(p, "file"))
        for p in (path, whole)
    )
    indices = torch.arange(expected.count)
    one, other = found.batch(indices), expected.batch(indices)
    assert found.count == expected.count
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    return 0


def read_table(path, whole):
    """A latency table."""
    assert Profile.read(path) == Profile.read(whole)
    return 0


def assert_equal_state(one, other):
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="session")
def run_subject(tiny_run):
    def same(run):
        assert outcome(run) == outcome(tiny_run)
        assert shown(run) == shown(tiny_run)
        assert (
            read_sealed(run / "best.json")["index"] == read_sealed(tiny_run / "best.json")["index"]
        )

    files = "config.toml env.json study.json records.jsonl best.json checkpoint/state.pt lock"
    return Subject(
        tiny_run,
        files.split(),
        lambda run, errors: start(["search", "--resume", run], errors),
        same,
    )


@pytest.fixture(scope="session")
def training_subject(tiny_model, tmp_path_factory):
    """Before its network was written."""
    whole = shutil.copytree(tiny_model, tmp_path_factory.mktemp("damage") / "train")
    for name in ("model.safetensors", "metrics.json"):
        (whole / name).unlink()
    shutil.rmtree(whole / "predictions")

    def same(out):
        network, expected = (path / "model.safetensors" for path in (out, tiny_model))
        assert network.read_bytes() == expected.read_bytes()
        found, expected = (read_sealed(path / "metrics.json") for path in (out, tiny_model))
        assert found | {"seconds": 0} == expected | {"seconds": 0}

    files = ["config.toml", "genotype.json", "checkpoint.pt", "env.json"]
    return Subject(
        whole, files, lambda out, errors: start(["train", "--resume", out], errors), same
    )


def subject_of(whole, name, read):
    """One file, which a function reads beside the whole one."""

    def start_reading(place, errors):
        return call(read, errors, place / name, whole / name)

    return Subject(whole, [name], start_reading, lambda place: None)


@pytest.fixture(scope="session")
def model_subject(tiny_model):
    return subject_of(tiny_model, "model.safetensors", read_model)


@pytest.fixture(scope="session")
def encoder_subject(tmp_path_factory):
    whole, name = tmp_path_factory.mktemp("damage"), "encoder.safetensors"
    flags = "--frames 16 --epochs 1 --batch-size 2 --crop 32 --width 0.1 --device cpu"
    assert pretrain.main([*flags.split(), "--out", str(whole / name)]) == 0
    return subject_of(whole, name, read_encoder)


@pytest.fixture(scope="session")
def cache_subject(tmp_path_factory):
    whole = tmp_path_factory.mktemp("damage")
    FeatureCache.load_or_build(CACHE, COUNT, encode, CacheConfig(whole, "file")).close()
    (file,) = whole.rglob("*.features")

    def read(place, errors):
        return call(read_cache, errors, place, whole)

    return Subject(whole, [str(file.relative_to(whole))], read, lambda place: None)


SUBJECTS = {  # share of the cases of each
    "run": 0.3,
    "training": 0.2,
    "model": 0.2,
    "encoder": 0.1,
    "cache": 0.2,
}


@pytest.mark.parametrize("name", SUBJECTS)
def test_damage_is_found_or_does_no_harm(name, request, tmp_path, nightly):
    subject = request.getfixturevalue(f"{name}_subject")
    seed = drawn_moments().getrandbits(32)
    served = 0
    for number in range(round(SUBJECTS[name] * (1000 if nightly else 10))):
        rng = random.Random(seed + number)
        place = shutil.copytree(subject.whole, tmp_path / "place")
        file = rng.choice(subject.files)
        kind = damage(place / file, rng)
        errors = tmp_path / "errors"
        status, text = subject.read(place, errors).end()
        about = f"{kind} of {file}, NASFAST_TEST_SEED and case {number}: {status}, {text}"
        assert "Traceback" not in text, about
        assert status in (0, 2), about
        if status == 0:
            served += 1
            try:
                subject.same(place)
            except (AssertionError, UserError) as error:
                raise AssertionError(f"{about} {error}") from error
        else:
            (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
            assert len(line) < 1500, about
        shutil.rmtree(place)
        errors.unlink()
    print(f"{name}: {served} of {number + 1} did no harm")
