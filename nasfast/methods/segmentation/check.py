"""A look at data for segmentation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from nasfast.data import folder_of, load_splits
from nasfast.data.checks import Findings, check_splits
from nasfast.methods import base


@dataclass(frozen=True)
class CheckConfig(base.CheckConfig):
    """What to look at."""

    method: Annotated[Literal["segmentation", "templates"], tyro.conf.Positional] = "segmentation"
    """Whose data it is; default: by the layout of the folder."""
    mask_values: str | None = None
    """Values of the classes in the masks, where they are not 0, 1, ..: 0,255."""
    resize_longer: int | None = None
    """Longer side that larger images are reduced to."""
    omit: tuple[int, ...] = ()
    """Classes left out of the reward."""
    seed: int = 0
    """Of the search; it decides which images score candidates."""


def check(config: CheckConfig) -> Findings:
    """Files, classes, overlaps, and a dozen images under their masks."""
    splits = load_splits(
        config.data,
        seed=config.seed,
        mask_values=config.mask_values,
        resize_longer=config.resize_longer,
    )
    return check_splits(splits, folder_of(config.data), config.omit, test=True)
