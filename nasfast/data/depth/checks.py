"""What depth data holds, and what about it would mislead a search."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from nasfast.data.checks import (
    Findings,
    Row,
    beside,
    dozen,
    few,
    file_names,
    overlaps,
    range_of_sizes,
)
from nasfast.data.depth import DepthDataset, DepthSplits, colored_depth, typical_depth
from nasfast.utils.errors import UserError


def check_depths(splits: DepthSplits, root: Path | None = None, *, test: bool = False) -> Findings:
    """Findings about data for depth.

    Args:
        splits: the data.
        root: its folder; None for data that is drawn.
        test: read the test part and every file, and draw some, for facts and tiles.
    """
    parts = {"train": splits.train, "val": splits.val}
    if test and splits.test is not None:
        parts["test"] = splits.test
    warnings, errors = few(len(splits.search_val)), list[str]()
    facts: dict[str, Sequence[Row]] = {}
    files = {part: [image for image, _ in each.pairs] for part, each in parts.items()}
    warnings += overlaps(files)
    if test:
        rows = []
        for part, dataset in parts.items():
            try:
                row, empty = _part(part, dataset)
            except UserError as error:
                errors.append(str(error))
                continue
            rows.append(row)
            if empty:
                names = file_names([dataset.pairs[index][1] for index in empty])
                warnings.append(
                    f"{len(empty)} depth files of {part} have no valid pixel: {names}; take them "
                    "and their images out"
                )
        facts["parts"] = rows
    both = [path for dataset in parts.values() for pair in dataset.pairs for path in pair]
    unread, more = beside(root, both, splits.aside, test)
    facts, warnings = {**facts, **unread}, [*warnings, *more]
    findings = Findings(facts, tuple(warnings), tuple(errors))
    if not test or errors:
        return findings
    return dataclasses.replace(findings, tiles=_tiles(parts, typical_depth(splits.train)))


def _part(part: str, dataset: DepthDataset) -> tuple[Row, list[int]]:
    """A row, and the samples without a valid pixel."""
    known, pixels, near, far, empty = 0, 0, float("inf"), 0.0, []
    for index in range(len(dataset)):
        depth = dataset[index].mask
        valid = depth[depth > 0]
        known, pixels = known + valid.numel(), pixels + depth.numel()
        if not valid.numel():
            empty.append(index)
            continue
        near, far = min(near, valid.min().item()), max(far, valid.max().item())
    row: Row = {
        "part": part,
        "images": len(dataset),
        "height x width": range_of_sizes(dataset.sizes()),
        "valid": known / max(pixels, 1),
        "nearest": f"{near:.2f} m",
        "typical": f"{typical_depth(dataset):.2f} m",
        "farthest": f"{far:.2f} m",
    }
    return row, empty if dataset.pairs else []


def _tiles(parts: Mapping[str, DepthDataset], typical: float) -> dict[str, Tensor]:
    """A dozen images, each beside the colours of its depths."""
    tiles = {}
    for part, dataset, index in dozen(parts):
        sample = dataset[index]
        name = dataset.pairs[index][0].name if dataset.pairs else str(index)
        tiles[f"{part}: {name}"] = torch.cat(
            [sample.image, colored_depth(sample.mask, typical)], -1
        )
    return tiles
