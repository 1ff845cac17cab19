"""A look at images for restoration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from nasfast.data import folder_of
from nasfast.data.checks import Findings, check_images
from nasfast.data.restoration import open_images
from nasfast.methods import base


@dataclass(frozen=True)
class CheckConfig(base.CheckConfig):
    """What to look at."""

    method: Annotated[Literal["restoration"], tyro.conf.Positional] = "restoration"
    """Whose data it is; default: by the layout of the folder."""
    channels: Literal[1, 3] = 1
    """1: grey. 3: colour."""


def check(config: CheckConfig) -> Findings:
    """Files, sizes, overlaps, and a dozen images, pairs, or images with depth."""
    data = open_images(config.data, config.channels, depth=True)
    return check_images(data, folder_of(config.data), test=True)
