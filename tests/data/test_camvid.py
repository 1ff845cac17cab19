"""The CamVid layout, on written folders and on the real set."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from nasfast.data import TrainTransform, batch, load_splits, open_camvid
from nasfast.utils.errors import UserError

MASK = np.repeat([3, 9, 11], 16).reshape(6, 8)


@pytest.fixture
def camvid(tmp_path):
    for split, ids in (("train", "abcd"), ("val", "ef"), ("test", "g")):
        for suffix, pixels in (("", np.full((6, 8, 3), 9)), ("annot", MASK)):
            (tmp_path / (split + suffix)).mkdir()
            for i in ids:
                image = Image.fromarray(pixels.astype(np.uint8))
                image.save(tmp_path / f"{split}{suffix}/{i}.png")
        lines = [f"/SegNet/CamVid/{split}/{i}.png /SegNet/CamVid/{split}annot/{i}.png" for i in ids]
        (tmp_path / f"{split}.txt").write_text("\n".join(lines))
    return tmp_path


def test_original_lists_and_standard_classes(camvid):
    splits = load_splits(camvid)
    sizes = [len(d) for d in (splits.search_train, splits.search_val, splits.train, splits.val)]
    assert sizes == [3, 1, 4, 2]
    assert (len(splits.train.classes), splits.train.ignore_index) == (11, 11)
    assert splits.train.classes[9] == "Pedestrian"
    assert splits.train.colors[8] == (64, 0, 128)
    assert splits.val[1].mask.tolist() == MASK.tolist()
    assert len(splits.test) == 1
    (camvid / "test.txt").unlink()
    assert load_splits(camvid).test is None


def test_classes_of_the_folder(camvid):
    classes = [{"name": f"class {i}", "color": [i, 2, 3]} for i in range(12)]
    path = camvid / "classes.json"
    path.write_text(json.dumps({"classes": classes, "ignore_index": 255}))
    train, *_ = open_camvid(camvid)
    assert (train.classes[11], train.colors[11]) == ("class 11", (11, 2, 3))
    assert train.ignore_index == 255


@pytest.mark.parametrize(
    ("form", "got"),
    [
        ([{"name": "sky"}], "KeyError: 'color'"),
        ([{"name": "sky", "color": [1, 2]}], "TypeError: "),
        ([{"name": "sky", "color": "abc"}], "ValueError: "),
        ([{"name": "sky", "color": [1, 2, 256]}], "ValueError: the color"),
        ([{"name": "sky", "color": [1, 2, 3]}] * 2, "ValueError: 2 classes of 1 names"),
        ([], "ValueError: 0 classes of 0 names"),
        ({"name": "sky"}, "TypeError: "),
    ],
)
def test_classes_that_are_none(camvid, form, got):
    (camvid / "classes.json").write_text(json.dumps({"classes": form, "ignore_index": 255}))
    message = rf"classes.json: expected an object .*; got {got}"
    with pytest.raises(UserError, match=message):
        open_camvid(camvid)


@pytest.mark.parametrize("index", [-1, 256])
def test_an_ignore_index_that_no_mask_can_hold(camvid, index):
    classes = [{"name": name, "color": [1, 2, 3]} for name in "ab"]
    (camvid / "classes.json").write_text(json.dumps({"classes": classes, "ignore_index": index}))
    with pytest.raises(UserError, match=f"got ValueError: the ignore_index {index}, which is not"):
        open_camvid(camvid)


def test_missing_parts(camvid):
    (camvid / "val.txt").unlink()
    with pytest.raises(UserError, match=r"val.txt is missing: a CamVid folder is train.txt"):
        load_splits(camvid)


def test_real_camvid(data_root):
    splits = load_splits(data_root / "camvid", cache_in_memory=False)
    sizes = [len(d) for d in (splits.search_train, splits.search_val, splits.train, splits.val)]
    assert sizes == [330, 37, 367, 101]
    # caches of features and resumed runs depend on it
    assert splits.search_train.fingerprint()[:16] == "e2f9f4fdb3a8178b"
    described = json.loads((data_root / "camvid/classes.json").read_text())
    assert list(splits.val.classes) == [c["name"] for c in described["classes"]]
    assert [list(c) for c in splits.val.colors] == [c["color"] for c in described["classes"]]
    masks = torch.stack([splits.val[i].mask for i in range(101)])
    assert masks.shape == (101, 360, 480)
    assert masks.unique().tolist() == [*range(11), splits.val.ignore_index]

    generator = torch.Generator().manual_seed(0)
    crops = TrainTransform((360, 480), 360)
    images, masks = batch(splits.search_train, [0, 5, 9], crops, generator)
    assert (images.shape, masks.shape) == ((3, 3, 360, 480), (3, 360, 480))
    sky, road = (images.movedim(1, -1)[masks == i].float().mean() for i in (0, 3))
    assert sky > road + 30
