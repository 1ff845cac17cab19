"""A look at data for decoders."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from nasfast.data import folder_of
from nasfast.data.checks import Findings
from nasfast.data.depth import DepthReading
from nasfast.methods import base
from nasfast.methods.segmentation.tasks import Reading, TaskName, binding_of


@dataclass(frozen=True)
class CheckConfig(base.CheckConfig):
    """What to look at."""

    method: Annotated[Literal["segmentation", "templates"], tyro.conf.Positional] = "segmentation"
    """Whose data it is; default: by the layout of the folder."""
    task: TaskName = "segmentation"
    """What the data is for."""
    mask_values: str | None = None
    """Values of the classes in the masks, where they are not 0, 1, ..: 0,255."""
    resize_longer: int | None = None
    """Longer side that larger images are reduced to."""
    omit: tuple[int, ...] = ()
    """Classes left out of the reward."""
    depth: DepthReading = dataclasses.field(default_factory=DepthReading)
    """Reading of data for depth."""
    seed: int = 0
    """Of the search; it decides which images score candidates."""


def check(config: CheckConfig) -> Findings:
    """Files, classes or depths, overlaps, and a dozen images under their masks or beside their
    depths."""
    binding, reading = binding_of(config), Reading.of(config)
    return binding.check(binding.open(reading), reading, folder_of(config.data), test=True)
