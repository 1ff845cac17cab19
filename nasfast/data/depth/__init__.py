"""Depth datasets: images with a depth for each pixel, and their splits."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from nasfast.data import layout_in
from nasfast.data.depth.base import (
    Counted,
    DepthDataset,
    DepthParts,
    DepthReading,
    DepthSample,
    DepthSplits,
    divide,
)
from nasfast.data.depth.colors import colored_depth
from nasfast.data.depth.files import (
    PAIRS_LAYOUT,
    SEVEN_SCENES_LAYOUT,
    WORDS_LAYOUT,
    has_pairs,
    has_words,
    open_pairs,
    open_seven_scenes,
    open_words,
    sequences,
)
from nasfast.data.depth.synthetic import StreetDepths
from nasfast.utils.errors import UserError

__all__ = [
    "DepthDataset",
    "DepthReading",
    "DepthSample",
    "DepthSplits",
    "StreetDepths",
    "colored_depth",
    "load_depth_splits",
    "typical_depth",
]

SOME = 64
"""Samples that a typical depth is taken from."""


class Layout(NamedTuple):
    """A kind of folder; as of `nasfast.data`."""

    text: str
    fits: Callable[[Path], bool]
    open: Callable[[Path, float | None], DepthParts]
    """With the values a metre, where they are given."""


LAYOUTS = {
    "7-Scenes": Layout(SEVEN_SCENES_LAYOUT, lambda root: bool(sequences(root)), open_seven_scenes),
    "a folder pair": Layout(PAIRS_LAYOUT, has_pairs, open_pairs),
    "marked names": Layout(WORDS_LAYOUT, has_words, open_words),
}


def load_depth_splits(
    source: str | Path,
    reading: DepthReading = DepthReading(),  # noqa: B008 - it does not change
    *,
    seed: int = 0,
    resize_longer: int | None = None,
    cache_in_memory: bool = True,
) -> DepthSplits:
    """Open a dataset and divide it; `seed` decides only what of `train` validates a search.

    `source` is "synthetic" (512 + 128 frames of 96x128), or a folder of one of `LAYOUTS`, which is
    recognised by what it holds. Arguments else as of `Counted`.

    Raises:
        UserError: it cannot be opened, or no depth of a part counts.
    """
    root = Path(source)
    if source == "synthetic":
        if reading.scale is not None:
            raise UserError(
                "depth.scale: expected a folder of depth files, got synthetic; leave it out"
            )
        parts = DepthParts(StreetDepths(512, stream="train"), StreetDepths(128, stream="val"))
    else:
        parts = layout_in(root, LAYOUTS).open(root, reading.scale)

    def counted(dataset: DepthDataset) -> DepthDataset:
        return Counted(dataset, reading, resize_longer, keep=cache_in_memory)

    open_test = parts.open_test
    found = DepthParts(
        counted(parts.train),
        counted(parts.val),
        open_test and (lambda: counted(open_test())),
        parts.aside,
    )
    for part, dataset in (("train", found.train), ("val", found.val)):
        require_depths(part, dataset)
    return divide(found, seed=seed)


def require_depths(part: str, dataset: DepthDataset) -> None:
    """Raise UserError where no pixel of a part has a depth that counts."""
    if not any(dataset[index].mask.any() for index in range(len(dataset))):
        raise UserError(
            f"{dataset.name}: expected depths in {part}, got no valid pixel in any of its "
            f"{len(dataset)} files; look at the files, --depth.scale and --depth.cap"
        )


def typical_depth(dataset: DepthDataset) -> float:
    """The geometric mean of the depths of some samples from all over, in metres."""
    count = min(SOME, len(dataset))
    logs, pixels = 0.0, 0
    for k in range(count):
        depth = dataset[int((k + 0.5) * len(dataset) / count)].mask.double()
        known = depth[depth > 0]
        logs, pixels = logs + known.log().sum().item(), pixels + known.numel()
    return math.exp(logs / max(1, pixels))
