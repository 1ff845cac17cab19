"""Depth datasets on disk: images, and a 16-bit PNG or a .npy of depths for each."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from nasfast.data.base import digest
from nasfast.data.depth.base import DepthDataset, DepthParts, DepthSample
from nasfast.data.depth_maps import files_of_depth, read_depth
from nasfast.data.folder import divided, read_ids, read_lines
from nasfast.data.images import (
    FaultyFiles,
    by_stem,
    for_each,
    identity,
    list_folder,
    measure,
    read_image,
    require_eight_bits,
)
from nasfast.utils.errors import UserError

MILLIMETRES = 1000.0
DEPTHS = ("depths", "depth")
"""Names of folders."""
DEPTH_WORD = re.compile(r"(?<![A-Za-z])depth(?![A-Za-z])", re.IGNORECASE)
IMAGE_WORDS = ("image", "color", "colour", "rgb", "img")
"""What a name has in place of "depth"."""
PAIRS_LAYOUT = "images/ + depths/, files of the same names"
WORDS_LAYOUT = "one folder of image_* + depth_*, or *.color.* + *.depth.*"
SEVEN_SCENES_LAYOUT = "frame-*.color.* + frame-*.depth.png, here or in seq-*/"


class DepthFiles(DepthDataset):
    """Frames and depths in files, `pairs` of (image path, depth path).

    Opening it reads every depth. UserError names the first file that is missing, unreadable or
    inconsistent, and counts the others.

    Args:
        name: of the data.
        pairs: the files.
        scale: values a metre; None: the files are .npy of floats, in metres.
    """

    def __init__(
        self, name: str, pairs: Sequence[tuple[Path, Path]], scale: float | None = None
    ) -> None:
        self.name, self._pairs, self._scale = name, tuple(pairs), scale
        arrays = any(depth.suffix == ".npy" for _, depth in pairs)
        self.per_metre = MILLIMETRES if scale is None or arrays else scale
        self._sizes = for_each(_image_size, [image for image, _ in pairs])
        shapes = for_each(lambda pair: tuple(self._depth(pair[1]).shape), self._pairs)
        faults = [
            f"image and depth differ in size: {image} is {size[0]}x{size[1]}, {depth} is "
            f"{shape[0]}x{shape[1]} (height x width); resize the depth without interpolation"
            for (image, depth), size, shape in zip(pairs, self._sizes, shapes, strict=True)
            if size != shape
        ]
        if faults:
            raise FaultyFiles(faults)

    def _depth(self, path: Path) -> Tensor:
        return read_depth(path, self._scale)

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> DepthSample:
        image, depth = self._pairs[index]
        return DepthSample(read_image(image), self._depth(depth))

    def sizes(self) -> list[tuple[int, int]]:
        return self._sizes

    @property
    def pairs(self) -> tuple[tuple[Path, Path], ...]:
        return self._pairs

    def fingerprint(self) -> str:
        def one(path: Path) -> str:
            if path.suffix != ".npy":
                return identity(path)
            return digest("npy", path.read_bytes())

        paths = [path for pair in self._pairs for path in pair]
        files = tuple(zip([path.name for path in paths], for_each(one, paths)))
        return digest("depth files", self._scale, files)


def _image_size(path: Path) -> tuple[int, int]:
    header = measure(path)
    require_eight_bits(path, header.mode)
    return header.size


def has_pairs(root: Path) -> bool:
    """Whether a folder has images/ and depths/."""
    return (root / "images").is_dir() and _depths(root) is not None


def _depths(root: Path) -> Path | None:
    return next((root / name for name in DEPTHS if (root / name).is_dir()), None)


def open_pairs(root: Path, scale: float | None) -> DepthParts:
    """The parts of a folder images/ and depths/, whose files share their names.

    `train.txt` and `val.txt` (a name a line) divide them; without them the 20 % with the smallest
    hash of the name validate. Those of `test.txt`, where there is one, are the test part alone.
    """
    folder = _depths(root)
    assert folder is not None
    images, depths = by_stem(list_folder(root / "images").images), by_stem(files_of_depth(folder))
    return _listed(root, images, depths, scale, f"{folder.name}/")


def word_pairs(root: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """Images and depths in a folder by what their names have in common: "image_3" and "depth_3"."""
    files = files_of_depth(root)
    stems, images, depths = by_stem(f for f in files if f.suffix != ".npy"), {}, {}
    for depth in files:
        if DEPTH_WORD.search(depth.stem):
            names = [DEPTH_WORD.sub(word, depth.stem) for word in (*IMAGE_WORDS, "")]
            image = next((stems[name] for name in names if name in stems), None)
            common = DEPTH_WORD.sub("", depth.stem)
            depths[common] = depth
            if image is not None:
                images[common] = image
    return images, depths


def has_words(root: Path) -> bool:
    """Whether a folder has images and depths that differ in a word of their names."""
    return os.access(root, os.R_OK) and bool(word_pairs(root)[0])


def open_words(root: Path, scale: float | None) -> DepthParts:
    """The parts of a folder of images and depths whose names differ in a word; lists as for
    `open_pairs`, of the names of the images."""
    images, depths = word_pairs(root)
    by_image = {path.stem: path for path in images.values()}
    named = {
        images[name].stem if name in images else depths[name].stem: depths[name] for name in depths
    }
    return _listed(root, by_image, named, scale, "")


def _listed(
    root: Path, images: dict[str, Path], depths: dict[str, Path], scale: float | None, where: str
) -> DepthParts:
    lists = {part: root / f"{part}.txt" for part in ("train", "val", "test")}
    there = {part: read_ids(path) for part, path in lists.items() if path.is_file()}
    if len(there.keys() & {"train", "val"}) == 1:
        raise UserError(
            f"{root}: expected both train.txt and val.txt or neither, got one; add the other"
        )
    rest = images.keys() - set(there.get("test", ()))
    if "train" not in there:
        there["train"], there["val"] = divided(rest, root)

    def part(name: str) -> DepthDataset:
        ids = there[name]
        for kind, files in (("image", images), ("depth", depths)):
            missing = [each for each in ids if each not in files]
            if missing:
                place = "images/" if kind == "image" and where else where
                raise UserError(
                    f"no {kind} for {missing[0]!r}: expected a file of that name in "
                    f"{root}/{place} ({len(missing)} of {len(ids)} missing); add it"
                )
        return DepthFiles(root.resolve().name, [(images[i], depths[i]) for i in ids], scale)

    test: Callable[[], DepthDataset] | None = (lambda: part("test")) if "test" in there else None
    return DepthParts(part("train"), part("val"), test)


def frames_of(folder: Path) -> list[tuple[Path, Path]]:
    """(colour, depth) of the frames of 7-Scenes in a folder, in order.

    Raises:
        UserError: a frame has a depth and no colour, or the other way round.
    """
    files = list_folder(folder).images
    kinds = [
        {p.stem.split(".")[0]: p for p in files if re.fullmatch(rf"frame-\d+\.{kind}", p.stem)}
        for kind in ("color", "depth")
    ]
    single = sorted(kinds[0].keys() ^ kinds[1].keys())
    if single:
        raise UserError(
            f"{folder}: expected {single[0]}.color and {single[0]}.depth, got one of the two "
            f"({len(single)} frames so); add the other"
        )
    return [(kinds[0][name], kinds[1][name]) for name in sorted(kinds[0])]


def sequences(root: Path) -> list[Path]:
    """The folder itself, or those in it, that hold frames of 7-Scenes."""
    inside = (path for path in sorted(root.glob("seq-*")) if path.is_dir())
    return [path for path in (root, *inside) if next(path.glob("frame-*.depth.png"), None)]


def open_seven_scenes(root: Path, scale: float | None) -> DepthParts:
    """The parts of a scene of 7-Scenes, in millimetres.

    `TrainSplit.txt` and `TestSplit.txt` (a line "sequence3" for seq-03) name the sequences of
    train and of test. Neighbouring frames are alike, so the last 20 % of the frames of train, in
    order, validate, and no random ones.
    """
    folders, scale = sequences(root), MILLIMETRES if scale is None else scale
    lists = {part: _split(root, f"{part}Split.txt") for part in ("Train", "Test")}
    frames = {folder.name: frames_of(folder) for folder in folders}
    test = lists["Test"] or []
    names = lists["Train"] or [name for name in frames if name not in test]
    missing = [name for name in (*names, *test) if name not in frames]
    if missing:
        raise UserError(
            f"{root}: expected frames in {missing[0]}/, which a list of the scene names, got none; "
            "unpack it"
        )
    both = [pair for name in names for pair in frames[name]]
    if len(both) < 2:
        raise UserError(f"{root}: expected at least 2 images, got {len(both)}; add some")
    held_out = max(1, round(0.2 * len(both)))

    def part(pairs: list[tuple[Path, Path]]) -> DepthDataset:
        return DepthFiles(root.resolve().name, pairs, scale)

    tested = [pair for name in test for pair in frames[name]]
    return DepthParts(
        part(both[:-held_out]),
        part(both[-held_out:]),
        (lambda: part(tested)) if tested else None,
        () if not tested else tuple(f"{name}/*" for name in test),
    )


def _split(root: Path, name: str) -> list[str] | None:
    """Folders of the sequences in a list; None where there is no list."""
    if not (root / name).is_file():
        return None
    numbers = [re.fullmatch(r"sequence(\d+)", line) for line in read_lines(root / name)]
    if None in numbers:
        raise UserError(f"{root / name}: expected lines such as sequence1; correct it")
    return [f"seq-{int(number[1]):02}" for number in numbers if number]
