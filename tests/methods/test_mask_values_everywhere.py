"""How data are read, ``--mask-values`` and ``--resize-longer``, goes from the search to the
training, the model file and its evaluation."""

import json
import random

import pytest
from folders import write_folder

from nasfast.commands import evaluate, train
from nasfast.methods.base import Architecture
from nasfast.methods.segmentation.search import Inputs
from nasfast.methods.segmentation.settings import parse
from nasfast.methods.segmentation.train import TrainConfig, resolve
from nasfast.models.io import load_model
from nasfast.spaces.fast_nas import FastNASSpace

SEARCH = {"data": "cells", "mask_values": "0,255", "resize_longer": 40}


@pytest.fixture
def cells(tmp_path):
    return write_folder(tmp_path / "cells", "abcdef", (0, 255), size=(32, 48))


def test_search(cells, tiny_weights):
    words = f"--data {cells} --mask-values 0,255 --encoder-weights {tiny_weights}"
    config = parse([*words.split(), "--resize-longer", "40"])
    mask = Inputs.open(config).opened.splits.search_val[0].mask
    assert (mask.shape, mask.unique().tolist()) == ((27, 40), [0, 1])
    # as config.toml holds them
    assert (config.mask_values, config.resize_longer) == ("0,255", 40)


def test_training_takes_those_of_the_search(tmp_path):
    found = Architecture({}, tmp_path, SEARCH)
    assert resolve(TrainConfig(tmp_path), found).mask_values == "0,255"
    assert resolve(TrainConfig(tmp_path), found).resize_longer == 40
    assert resolve(TrainConfig(tmp_path, mask_values="1,2"), found).mask_values == "1,2"
    assert resolve(TrainConfig(tmp_path, resize_longer=64), found).resize_longer == 64


def test_evaluation_takes_those_of_the_training(cells, tmp_path, tiny_weights):
    genotype = FastNASSpace().sample(random.Random(0)).to_json()
    (tmp_path / "genotype.json").write_text(json.dumps(genotype))
    out = tmp_path / "train"
    flags = f"""
        --data {cells} --mask-values 0,255 --resize-longer 40 --out {out}
        --encoder-weights {tiny_weights} --device cpu --epochs 1 --batch-size 2 --decoder.agg-size 8
    """
    assert train.main([str(tmp_path / "genotype.json"), *flags.split()]) == 0
    _, description = load_model(out / "model.safetensors")
    assert (description["mask_values"], description["resize_longer"]) == ("0,255", 40)
    assert evaluate.main([str(out), "--device", "cpu", "--seconds", "0.01"]) == 0
    scores = [json.loads((out / f"{name}.json").read_text()) for name in ("metrics", "evaluation")]
    assert scores[0]["class_iou"] == pytest.approx(scores[1]["class_iou"], abs=1e-3)
    assert scores[0]["class_iou"]["yes"] is not None
    assert [score["size"] for score in scores] == [[27, 40], [27, 40]]
    assert scores[1]["resize_longer"] == 40
    assert scores[0]["split"] == "val of cells reduced to 40, 1 images"
    write_folder(tmp_path / "others", "abcdef", (1, 2), size=(32, 48))
    flags = f"--device cpu --seconds 0.01 --data {tmp_path / 'others'} --mask-values 1,2"
    assert evaluate.main([str(out), *flags.split()]) == 0
    found = json.loads((out / "evaluation.json").read_text())
    assert found["class_iou"] == pytest.approx(scores[1]["class_iou"], abs=1e-3)
