"""A small restoration search and training, shared by the tests of its entry points.

A plugin of `conftest.py`: what the commands need is imported where it is used, as there.
"""

import numpy as np
import pytest
import torch


def draw(folder, count, size=(40, 48)):
    """Grey images of one edge and one gradient each, `size` = height and width."""
    from PIL import Image

    folder.mkdir(parents=True)
    rng = np.random.default_rng(len(folder.name))
    for i in range(count):
        ramp = np.linspace(60, 180, size[1])[None] + np.zeros(size)
        ramp[rng.integers(8, size[0] - 8) :] *= rng.uniform(0.3, 0.9)
        Image.fromarray(ramp.astype(np.uint8)).save(folder / f"{i:02d}.png")


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory):
    """Folder of eight training images (one of them validates) and three test images."""
    root = tmp_path_factory.mktemp("data") / "edges"
    draw(root / "train", 8)
    draw(root / "test", 3)
    return root


@pytest.fixture(scope="session")
def tiny_bilevel(tiny_images):
    """Command line of a search by gradient that takes seconds; the caller adds --runs."""
    flags = """
        restoration --preset demo --strategy darts --device cpu --bilevel.epochs 5
        --bilevel.warmup 1 --bilevel.patience 5 --bilevel.batch-size 2 --bilevel.crop 16
        --bilevel.val-crop 24 --bilevel.architecture.lr 0.2 --bilevel.architecture.selection alpha
        --supernet.layers 2 --supernet.nodes 2 --supernet.width 2
        --network.width 4 --network.stem 4 --network.head 4 --network.low-level 4
    """
    return [*flags.split(), "--data", str(tiny_images)]


@pytest.fixture(scope="session")
def bilevel_run(tiny_bilevel, tmp_path_factory):
    """Run directory of that search, never interrupted; not to be written to."""
    from nasfast.commands import search

    torch.set_num_threads(1)
    runs = tmp_path_factory.mktemp("restoration")
    assert search.main([*tiny_bilevel, "--runs", str(runs)]) == 0
    (path,) = runs.iterdir()
    return path


@pytest.fixture(scope="session")
def tiny_restorer(bilevel_run):
    """Command line of a training that takes seconds; the caller adds --out."""
    flags = "--steps 6 --round-steps 2 --crop 16 --batch-size 2"
    return [str(bilevel_run), "--device", "cpu", *flags.split()]


@pytest.fixture(scope="session")
def trained_restorer(tiny_restorer, tmp_path_factory):
    """Directory of that training, never interrupted; not to be written to."""
    from nasfast.commands import train

    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("trained_restorer") / "train"
    assert train.main([*tiny_restorer, "--out", str(out)]) == 0
    return out
