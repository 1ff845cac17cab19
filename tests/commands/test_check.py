"""``nasfast check``: tables, warnings, errors, the sheet and the exit status."""

from typing import get_args

import pytest
from folders import (
    save_image,
    save_mask,
    voc_object,
    write_boxes,
    write_cityscapes,
    write_folder,
    write_lists,
    write_voc,
)
from PIL import Image

from nasfast.commands import check, search
from nasfast.methods.restoration import search as restoration
from nasfast.methods.segmentation import search as segmentation
from nasfast.tasks.restoration import TASKS, TaskName
from nasfast.utils.errors import UserError

STEMS = [f"{i:02d}" for i in range(24)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_folder(tmp_path / "cats", STEMS)
    write_lists(tmp_path / "cats", STEMS[:20], STEMS[20:])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path / "cats"


def test_good_data(folder, capsys):
    (folder / "test.txt").write_text("00\n")
    assert check.main(["--data", "cats"]) == 1  # the test image is one of train
    out = capsys.readouterr().out
    assert "train │     20 │ 8x12" in out
    assert "1 yes │        50.00% │       100.00%" in out
    assert "warning: 1 images are both in train and in test: 00.png; scores on test" in out
    assert out.endswith("12 images: cats-check.png\n")
    (folder / "test.txt").unlink()
    (folder / "notes.txt").touch()
    assert check.main(["segmentation", "--data", "cats", "--out", "sheet.png"]) == 0
    with Image.open("sheet.png") as sheet:
        assert sheet.width == 1320
        assert (128, 0, 0) in {color for _, color in sheet.getcolors(10**6)}  # of the legend
    assert "warning" not in capsys.readouterr().out


def test_what_is_not_read(folder, capsys):
    save_image(folder / "raw/z.png")
    save_image(folder / "images/z.png")
    save_mask(folder / "masks/z.png", (0, 1))
    (folder / "images/._00.png").touch()
    assert check.main(["--data", "cats"]) == 1
    out = capsys.readouterr().out
    for row in (
        "hidden         │ images │     1",
        "in no part     │ masks",
        "another folder │ raw",
    ):
        assert row in out


def test_errors(folder, capsys):
    for stem in ("03", "07"):
        (folder / "images" / f"{stem}.png").write_bytes(b"")
    assert check.main(["--data", "cats"]) == 2
    err = capsys.readouterr().err.splitlines()
    assert [line.split(" cannot")[0] for line in err] == [
        f"error: image {folder}/images/{stem}.png" for stem in ("03", "07")
    ]
    for path in folder.glob("masks/*"):
        save_mask(path, (0, 255))
    write_folder(folder, ["03", "07"], (0, 255))
    assert check.main(["--data", "cats"]) == 2
    assert "if 0,255 mean no, yes, give --mask-values 0,255\n" in capsys.readouterr().err
    assert check.main(["--data", "cats", "--mask-values", "0,255"]) == 0
    assert check.main(["--data", "cats", "--mask-values", "0,255", "--out", "cats/a.png"]) == 2
    assert capsys.readouterr().err == (
        f"error: out: expected a place outside the data, got {folder}/a.png; give --out, or run "
        "the command in another directory\n"
    )
    assert check.main(["--data", "cats", "--mask-values", "0,255", "--out", "."]) == 2
    assert capsys.readouterr().err == (
        f"error: out: expected a PNG to write, got the directory {folder.parent}; name a file in "
        "it\n"
    )
    assert check.main(["--data", "cats", "--mask-values", "0,255", "--out", "new/a.png"]) == 0
    assert (folder.parent / "new/a.png").is_file()


def test_images_for_restoration(folder, capsys):
    """The layout tells whose data it is."""
    assert check.main(["--data", "cats/images"]) == 1
    assert "train │     18 │     0 │ 8x12" in capsys.readouterr().out
    assert check.main(["restoration", "--data", "cats/images", "--channels", "3"]) == 1
    (folder / "images/03.png").write_bytes((folder / "images/03.png").read_bytes()[:-40])
    assert check.main(["--data", "cats/images", "--channels", "3"]) == 2
    assert capsys.readouterr().err.startswith(f"error: image {folder}/images/03.png cannot be read")
    (folder / "raw").mkdir()
    assert check.main(["--data", "cats/raw"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(
        f"error: segmentation, templates: data: {folder}/raw has no known layout: expected CamVid ("
    )
    assert f"; restoration: data: {folder}/raw holds no images: expected train/ + test/" in err


def test_what_a_task_reads_of_images(folder, capsys):
    for i in range(6):
        for kind in ("clean", "hazy", "noisy"):
            save_image(folder.parent / "scenes" / kind / f"{i}.png", i)
    (folder.parent / "scenes/noisy/3.png").unlink()
    command = ["--data", "scenes", "--task"]
    assert check.main([*command, "dehazing"]) == 1
    out = capsys.readouterr().out
    assert "test  │      1 │     1 │ 8x12" in out
    assert "another folder │ noisy" in out
    for task, text in {
        "denoising": "data: {}/clean/3.png has no degraded partner",
        "inpainting": "data: expected one folder of degraded images beside {}/clean, got hazy/ and",
    }.items():
        assert check.main([*command, task]) == 2
        assert capsys.readouterr().err.startswith(f"error: {text.format(folder.parent / 'scenes')}")
    assert check.main([*command, "repainting"]) == 2
    names = "dehazing, denoising, depth, deraining, inpainting, keypoints, segmentation, super-reso"
    assert capsys.readouterr().err.startswith(f"error: task: expected one of {names}")
    assert set(get_args(TaskName)) == set(TASKS)


@pytest.mark.parametrize("layout", ["cityscapes", "voc"])
def test_layouts_of_benchmarks(layout, folder, capsys):
    root = folder.parent / layout
    if layout == "voc":
        write_voc(root / "VOC2012", {"train": STEMS, "val": "abcde"})
    else:
        write_cityscapes(root, {"train": {"ulm": 20}, "val": {"bonn": 4}})
    assert check.main(["--data", layout, "--resize-longer", "32"]) == 1
    out = capsys.readouterr().out
    wanted = {
        "voc": ("val   │      5 │ 5 sizes, 16x24 to 20x24", "15 person │ "),
        "cityscapes": ("val   │      4 │          16x32", "13 car │ "),
    }
    for text in wanted[layout]:
        assert " ".join(text.split()) in " ".join(out.split())
    assert "never occur in the masks of train" in out
    assert "not read" not in out
    assert out.endswith(f"images: {layout}-check.png\n")


def test_drawn_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert check.main(["restoration", "--data", "synthetic"]) == 0
    assert check.main(["--data", "synthetic", "--task", "dehazing"]) == 0
    assert check.main(["--data", "synthetic", "--task", "dehazing", "--channels", "1"]) == 2
    assert "dehazing: expected colour images, got synthetic with" in capsys.readouterr().err
    assert check.main(["--data", "synthetic", "--task", "deraining"]) == 0
    assert capsys.readouterr().out.endswith("12 images: synthetic-check.png\n")


class Stop(UserError):
    """Instead of the first expensive step."""


def stop(*args, **options):
    raise Stop("stopped")


@pytest.mark.parametrize(
    ("module", "step", "words"),
    [
        (segmentation, "start_workers", "--data cats"),
        (
            restoration,
            "SupernetSearch",
            "restoration --data cats/images --strategy darts --bilevel.crop 8",
        ),
        (restoration, "sampled_search", "restoration --data cats/images --strategy random"),
    ],
)
def test_a_search_warns_before_it_begins(folder, module, step, words, monkeypatch, capsys):
    save_image(folder / "raw/z.png")
    save_image(folder / "images/more/z.png")
    monkeypatch.setattr(module, step, stop)
    assert search.main([*words.split(), "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert err == "error: stopped\n"
    assert "warning: " in out
    assert "images lie in folders that are not read: " in out


def test_no_search_on_masks_of_one_class(folder, capsys):
    for path in folder.glob("masks/*"):
        save_mask(path, (1, 255))
    assert search.main(["--data", "cats", "--device", "cpu"]) == 2
    assert capsys.readouterr().err.startswith("error: cats: expected at least 2 of the 2 classes")
    for path in folder.glob("masks/*"):
        save_mask(path, (0, 1))
    assert search.main(["--data", "cats", "--device", "cpu", "--omit", "0", "1"]) == 2
    assert capsys.readouterr().err.startswith("error: omit: expected to leave one of the classes")
    assert not (folder.parent / "runs").exists()


def test_boxes(folder, capsys):
    """The layout says that it is data for detection; every fault is listed."""
    write_boxes(folder.parent / "boxes", {"train": "abcdefghijklmnopqrst", "val": "uv"}, {})
    assert check.main(["--data", "boxes"]) == 1  # VOC's other classes
    out = capsys.readouterr().out
    assert "train │     20 │             0 │ 40x60          │    20 │" in out
    assert "7 cat          │           20 │       100.00% │          2 │" in out
    assert "12 images: boxes-check.png" in out
    outside = voc_object("cat", 70, 1, 80, 9)
    write_boxes(folder.parent / "boxes", {"val": "uv"}, {"u": outside, "v": outside})
    assert check.main(["--data", "boxes"]) == 2
    errors = capsys.readouterr().err.splitlines()
    for error, stem in zip(errors, "uv", strict=True):
        assert error.startswith(
            f"error: {folder.parent}/boxes/Annotations/{stem}.xml: box of 'cat'"
        )
