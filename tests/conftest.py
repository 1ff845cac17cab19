"""Fixtures for all tests.

What the commands need (tyro, safetensors, Pillow) is imported by the fixtures that use it: tests of
kernels run where it is missing, as on a machine that is lent for its GPU.
"""

from __future__ import annotations

import gc
import os
import random
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from builds import Builds

pytest_plugins = ["tiny_restoration"]

# files that take longest: processes that run the suite together begin with them and end together
LONGEST = (
    "ops/test_all_ops.py",
    "emulation/test_deform_conv2d_backward.py",
    "methods/test_run_contract.py",
    "test_bench.py",
    "ops/test_hostile_offsets.py",
    "methods/test_restoration_search.py",
    "methods/test_templates_method.py",
    "methods/test_detection_search.py",
    "methods/test_restoration_train.py",
    "workers/test_parallel_search.py",
    "workers/test_ray_engine.py",
    "inference/test_export.py",
    "hardening/test_damage.py",
    "hardening/test_kills.py",
    "evaluation/test_stages.py",
    "ops/test_nvrtc.py",
)

try:
    from hypothesis import settings
except ImportError:  # a machine that is lent for its GPU may lack it
    pass
else:
    settings.register_profile("tests", deadline=None)  # other processes may hold the cores
    settings.load_profile("tests")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--nightly",
        action="store_true",
        help="all cases of tests/hardening, for hours, and of the ops, kills and disassembly",
    )


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):  # pytest-xdist: by the number of tests of a file
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_collection_finish() -> None:
    """A garbage collection need not look at all that has been imported and collected."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def nightly(request: pytest.FixtureRequest) -> bool:
    """Whether tests draw all of their many cases, not the few that CI has time for."""
    return bool(request.config.getoption("--nightly"))


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same random state."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (the state that careless code under test would read)
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """A resumed run sets the number of threads of the process; results depend on it, also those of
    fixtures that a whole module shares and that are made before the ones of a test."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _needs_cuda(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of the real data sets: NASFAST_DATA, or shared/data beside the checkout."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    root = Path(os.environ.get("NASFAST_DATA", beside))
    if not root.is_dir():
        pytest.skip(f"no data at {root}; point NASFAST_DATA to the folder of the data sets")
    return root


@pytest.fixture(scope="session")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Builds:
    folder = tmp_path_factory.getbasetemp()
    return Builds((folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "builds")


@pytest.fixture
def poison_empty() -> Iterator[None]:
    """PyTorch fills uninitialised memory with NaN, so that an output never written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weight file of a small encoder, not trained."""
    from safetensors.torch import save_file

    from nasfast.encoders import MobileNetV2

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("encoder") / "tiny.safetensors"
    save_file(MobileNetV2(0.35).state_dict(), path, {"nasfast.encoder": '{"width": 0.35}'})
    return path


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of twelve images of 32x48 with three classes, the last one named [post]."""
    from PIL import Image

    root = tmp_path_factory.mktemp("data") / "three bands"
    rng = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    (root / "classes.txt").write_text("sky\nroad\n[post]\n")
    for i in range(12):
        mask = np.zeros((32, 48), np.uint8)
        mask[rng.integers(10, 22) :] = 1
        left = rng.integers(0, 40)
        mask[:, left : left + 8] = 2
        image = np.array([[90, 130, 220], [90, 90, 90], [220, 200, 40]])[mask]
        noisy = (image + rng.normal(0, 20, image.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(root / "images" / f"{i:02d}.png")
        Image.fromarray(mask).save(root / "masks" / f"{i:02d}.png")
    return root


@pytest.fixture(scope="session")
def tiny_search(
    tiny_data: Path, tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    """Command line of a search that takes seconds; the caller adds --runs."""
    torch.set_num_threads(1)
    flags = f"""
        --device cpu --budget 6 --decoder.agg-size 8
        --stage0.samples 8 --stage0.crop 32 --stage0.shorter-side 32
        --stage0.epochs 3 --stage0.batch-size 4 --stage0.polyak-decay 0.5
        --stage1.crop 32 --stage1.shorter-side 32 --stage1.batch-size 3
        --stage1.polyak-decay 0.5
        --ppo.lr 0.05 --ppo.batch-size 2 --ppo.minibatch-size 2
        --batch 2 --threads 1 --workers 1
        --cache-dir {tmp_path_factory.mktemp("cache")} --encoder-weights {tiny_weights}
    """
    return [*flags.split(), "--data", str(tiny_data)]


@pytest.fixture(scope="session")
def tiny_run(tiny_search: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of that search, never interrupted; not to be written to."""
    from nasfast.commands import search

    runs = tmp_path_factory.mktemp("runs")
    assert search.main([*tiny_search, "--runs", str(runs)]) == 0
    (path,) = runs.iterdir()
    return path


@pytest.fixture
def own_run(tiny_run: Path, tiny_data: Path, tiny_weights: Path, tmp_path: Path) -> Path:
    """A copy of the run with data and encoder of its own, in data/ and encoder.safetensors."""
    import tomli_w

    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    shutil.copytree(tiny_data, tmp_path / "data" / tiny_data.name)
    shutil.copy(tiny_weights, tmp_path / "encoder.safetensors")
    settings = tomllib.loads((run / "config.toml").read_text())
    del settings["checksum"]
    settings["data"] = str(tmp_path / "data" / tiny_data.name)
    settings["encoder_weights"] = str(tmp_path / "encoder.safetensors")
    (run / "config.toml").write_text(tomli_w.dumps(settings))
    return run


@pytest.fixture(scope="session")
def tiny_training(tiny_run: Path) -> list[str]:
    """Command line of a training that takes seconds; the caller adds --out."""
    flags = "--device cpu --epochs 4 --batch-size 4 --crop 32 --decoder.agg-size 8"
    return [str(tiny_run), *flags.split()]


@pytest.fixture(scope="session")
def tiny_model(tiny_training: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of that training, never interrupted; not to be written to."""
    from nasfast.commands import train

    out = tmp_path_factory.mktemp("model") / "train"
    assert train.main([*tiny_training, "--out", str(out)]) == 0
    return out
