"""What a keypoint data set holds, and what about it would mislead a search."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from nasfast.data.checks import (
    TEST_FOLDERS,
    Findings,
    Row,
    beside,
    broken_files,
    dozen,
    few,
    left_out,
    overlaps,
    range_of_sizes,
)
from nasfast.data.folder import some
from nasfast.data.keypoints.base import LEFT, MIDDLE, RIGHT, KeypointDataset, KeypointSplits
from nasfast.data.keypoints.drawing import drawn
from nasfast.data.keypoints.files import PeopleFiles
from nasfast.data.keypoints.transforms import PersonValTransform

SHOWN = (192, 192)
"""Pixels of a tile."""
SMALL = 32
"""Pixels: of a person whose box has shorter longer sides, a crop shows next to nothing."""
MUCH = 0.25
"""Share of small people that is worth a warning."""
COUNTED = 20
"""People in an image that AP counts, at most."""


def check_keypoints(
    splits: KeypointSplits, root: Path | None = None, *, test: bool = False
) -> Findings:
    """Findings about data for keypoints, from what its opening has read.

    Args:
        splits: the data.
        root: its folder; None for data that is drawn.
        test: read the test part and all images too, count everything and draw some, for facts and
            tiles.
    """
    parts = {"train": splits.train, "val": splits.val}
    if test and splits.test is not None:
        parts["test"] = splits.test
    warnings, errors = few(len(splits.search_val)), list[str]()
    for part, dataset in parts.items():
        warnings += _people(part, dataset)
    on_disk = {part: each for part, each in parts.items() if isinstance(each, PeopleFiles)}
    files = {part: [each.image for each in data.annotated] for part, data in on_disk.items()}
    warnings += overlaps(files)
    facts: dict[str, Sequence[Row]] = {}
    if test:
        facts["parts"] = [_part(part, data) for part, data in parts.items()]
        facts["joints"] = _histogram(parts)
        errors += broken_files(on_disk.values())
    read = [path for each in files.values() for path in each]
    aside = (*splits.aside, *(() if test else TEST_FOLDERS))
    unread, more = beside(splits.home or root, read, aside, test)
    facts, warnings = {**facts, **unread}, [*warnings, *more]
    findings = Findings(facts, tuple(warnings), tuple(errors))
    if not test or errors:
        return findings
    legend = {"left": LEFT, "right": RIGHT, "middle": MIDDLE}
    return dataclasses.replace(findings, tiles=_drawn(parts), legend=legend)


def _people(part: str, dataset: KeypointDataset) -> list[str]:
    """Warnings about joints and people that were left out, and about small people."""
    found = []
    if isinstance(dataset, PeopleFiles):
        found += left_out(
            part,
            (dataset.flat, "people of {} have a box without area in the image and are left out"),
            (dataset.outside, "joints of {} lie outside of the image and count as not labelled"),
            (dataset.resized, "annotations of {} are of another size than the image, which counts"),
        )
        if dataset.jointless:
            found.append(
                f"{dataset.jointless} people of {part} have no labelled joint and are left out"
            )
    seen = torch.stack([person.visible for person in dataset.people()]) > 0
    absent = [name for name, n in zip(dataset.skeleton.joints, seen.sum(0).tolist()) if not n]
    if absent:
        found.append(f"no one in {part} has the joints {some(absent)}: nothing is learned of them")
    small = _longer(dataset) < SMALL
    if small.float().mean() > MUCH:
        found.append(
            f"{small.float().mean():.0%} of the people of {part} are smaller than {SMALL} pixels; "
            "give larger images"
        )
    counts = torch.bincount(torch.tensor([person.image for person in dataset.people()]))
    if int(counts.max()) > COUNTED:
        found.append(
            f"{int((counts > COUNTED).sum())} images of {part} have more than {COUNTED} people, up "
            f"to {int(counts.max())}; AP counts {COUNTED} in an image"
        )
    return found


def _longer(dataset: KeypointDataset) -> Tensor:
    """The longer side of the box of each person, in pixels."""
    boxes = torch.tensor([person.box for person in dataset.people()])
    return (boxes[:, 2:] - boxes[:, :2]).amax(1)


def _part(part: str, dataset: KeypointDataset) -> Row:
    people = dataset.people()
    seen = torch.stack([person.visible for person in people])
    images = {person.image: dataset.image(person.image).shape[1:] for person in people}
    return {
        "part": part,
        "people": len(people),
        "images": len(images),
        "height x width": range_of_sizes([(h, w) for h, w in images.values()]),
        "median side": f"{_longer(dataset).median():.0f} px",
        "joints, labelled": (seen > 0).float().mean().item(),
        "hidden": (seen == 1).float().mean().item(),
        "head's size": dataset.head_from or "not said",
    }


def _histogram(parts: Mapping[str, KeypointDataset]) -> list[Row]:
    """In how many people each joint is labelled."""
    counts = {
        part: (torch.stack([person.visible for person in each.people()]) > 0).sum(0).tolist()
        for part, each in parts.items()
    }
    return [
        {"joint": f"{k} {name}", **{f"people, {part}": each[k] for part, each in counts.items()}}
        for k, name in enumerate(parts["train"].skeleton.joints)
    ]


def _drawn(parts: Mapping[str, KeypointDataset]) -> dict[str, Tensor]:
    """A dozen people with their joints."""
    tiles = {}
    for part, dataset, index in dozen(parts):
        crop = PersonValTransform(SHOWN)(dataset[index])
        tiles[f"{part}: person {index}"] = drawn(
            crop.image, crop.joints[None], (crop.visible > 0)[None], dataset.skeleton
        )
    return tiles
