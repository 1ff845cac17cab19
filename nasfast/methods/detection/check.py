"""A look at data for detection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from nasfast.data import folder_of
from nasfast.data.checks import Findings
from nasfast.data.detection import load_detection_splits
from nasfast.data.detection.checks import check_detection
from nasfast.methods import base
from nasfast.utils.config import Bound


@dataclass(frozen=True)
class CheckConfig(base.CheckConfig):
    """What to look at."""

    method: Annotated[Literal["detection"], tyro.conf.Positional] = "detection"
    """Whose data it is; default: by the layout of the folder."""
    held_out: Annotated[float, Bound(0, 1, open="low")] = 0.1
    """Share of the training images that score candidates."""
    seed: int = 0
    """Of the search; it decides which images score candidates."""


def check(config: CheckConfig) -> Findings:
    """Files, classes, overlaps, and a dozen images with their boxes."""
    splits = load_detection_splits(config.data, seed=config.seed, held_out=config.held_out)
    return check_detection(splits, folder_of(config.data), test=True)
