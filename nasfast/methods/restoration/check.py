"""A look at images for restoration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from nasfast.data import folder_of
from nasfast.data.checks import Findings, check_images
from nasfast.data.restoration import RestorationData, open_images
from nasfast.methods import base
from nasfast.tasks.restoration import TaskName, task_from_json


@dataclass(frozen=True)
class CheckConfig(base.CheckConfig):
    """What to look at."""

    method: Annotated[Literal["restoration"], tyro.conf.Positional] = "restoration"
    """Whose data it is; default: by the layout of the folder."""
    task: TaskName | None = None
    """What the images are for; default: any task, and no colour is asked for."""
    channels: Literal[1, 3] | None = None
    """1: grey. 3: colour. Default: 3 for dehazing, else 1."""


def check(config: CheckConfig) -> Findings:
    """Files, sizes, overlaps, and a dozen images, pairs, or images with depth."""
    return check_images(_open(config), folder_of(config.data), test=True)


def _open(config: CheckConfig) -> RestorationData:
    """The data set, as the task would read it where one is given."""
    if config.task is None:
        return open_images(config.data, config.channels or 1, depth=True)
    task = task_from_json(config.task)
    data = task.open(config.data, config.channels or (3 if task.colour else 1))
    for part in (data.train, data.val, data.test):
        task.check(part)
    return data
