"""PASCAL VOC (Everingham et al., 2010): 20 classes and background, photos of many sizes."""

from __future__ import annotations

from pathlib import Path

from nasfast.data.base import Parts, SegmentationDataset
from nasfast.data.folder import FileDataset, files_by_stem, listed_pairs, pair_files, read_ids
from nasfast.utils.errors import UserError

VOC_LAYOUT = "JPEGImages/ + SegmentationClass/ + ImageSets/Segmentation/, here or in VOC20??/"
CLASSES = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
AUGMENTED = ("train_aug.txt", "trainaug.txt")
"""Lists that name the photos with labels of SBD (Hariharan et al., ICCV 2011) too: 10,582."""
MASK_FOLDERS = ("SegmentationClass", "SegmentationClassAug", "ImageSets/Segmentation")
"""One of which a folder has that is not of boxes alone."""
ASIDE = ("SegmentationObject/*", "SegmentationClass/*", "SegmentationClassAug/*")


def voc_folders(root: Path) -> list[Path]:
    """The folders of VOC in a folder: itself, or those of years in it or in its VOCdevkit."""
    found = [root, *sorted(root.glob("VOC20??")), *sorted(root.glob("VOCdevkit/VOC20??"))]
    return [folder for folder in found if (folder / "JPEGImages").is_dir()]


def open_voc(root: Path, *, cache_in_memory: bool = True, mask_values: str | None = None) -> Parts:
    """The parts of a VOC folder, or of the folder that it is in.

    Lists of ImageSets/Segmentation divide the photos. `val` is val.txt with the masks of
    SegmentationClass. `train` is the augmented list, one of `AUGMENTED`, with the masks of
    SegmentationClassAug, where they are there; else train.txt, or trainval.txt without those of
    val. There is a test part where test.txt has masks. Masks hold the index of the class, and
    ignore = 255 along the borders, unless `mask_values` (`FileDataset`) says otherwise.
    """
    folders = voc_folders(root)
    if len(folders) > 1:
        raise UserError(
            f"data: expected one folder of VOC in {root}, got "
            f"{', '.join(str(folder.relative_to(root)) for folder in folders)}; give one of them"
        )
    home = folders[0] if folders[0] != root else None
    root = folders[0]
    images, masks, lists = (
        root / name for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation")
    )
    aug = root / "SegmentationClassAug"
    if not masks.is_dir() and aug.is_dir():
        masks = aug
    for path in (masks, lists, lists / "val.txt"):
        if not path.exists():
            raise UserError(f"{path} is missing: VOC is {VOC_LAYOUT}; unpack its archive again")

    def dataset(pairs: list[tuple[Path, Path]]) -> SegmentationDataset:
        return FileDataset(
            "voc",
            CLASSES,
            pairs,
            mask_values=mask_values,
            cache_in_memory=cache_in_memory,
        )

    test = lists / "test.txt"
    tested = test.is_file() and read_ids(test)[0] in files_by_stem(masks)
    return Parts(
        dataset(_train_pairs(images, masks, aug, lists)),
        dataset(listed_pairs(lists / "val.txt", images, masks)),
        (lambda: dataset(listed_pairs(test, images, masks))) if tested else None,
        ASIDE,
        home,
    )


def _train_pairs(images: Path, masks: Path, aug: Path, lists: Path) -> list[tuple[Path, Path]]:
    augmented = [lists / name for name in AUGMENTED if (lists / name).is_file()]
    if bool(augmented) != aug.is_dir():
        there, missing = (augmented[0], aug) if augmented else (aug, lists / AUGMENTED[0])
        raise UserError(
            f"{there} is there and {missing} is missing: the augmented set has both; add it, or "
            "move the other away"
        )
    if augmented:
        return listed_pairs(augmented[0], images, aug)
    if (lists / "train.txt").is_file():
        return listed_pairs(lists / "train.txt", images, masks)
    both = lists / "trainval.txt"
    if not both.is_file():
        raise UserError(
            f"{lists}: expected train.txt, trainval.txt or {' or '.join(AUGMENTED)}, got none; "
            "unpack the archive of VOC again"
        )
    val = set(read_ids(lists / "val.txt"))
    return pair_files([i for i in read_ids(both) if i not in val], images, masks)
