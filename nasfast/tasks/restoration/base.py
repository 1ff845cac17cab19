"""What a restoration task is: how clean images become the inputs of a network."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import tyro
from torch import Tensor

from nasfast.data.restoration import (
    ANY_TASK,
    CLEAN_FOLDER,
    ImagePair,
    ImageSet,
    RestorationData,
    open_images,
)
from nasfast.utils.errors import UserError

Predict = Callable[[Tensor], Tensor]
"""Degraded images ``[N, c, h, w]`` to restored images ``[N, c, scale * h, scale * w]``."""
Name = Annotated[str, tyro.conf.Suppress]
"""A field of settings that is no flag."""


class RestorationTask(ABC):
    """How clean images become the inputs of a network. A subclass is a frozen dataclass with the
    task's settings as fields and a place in ``nasfast.tasks.restoration.Task``."""

    task: Name
    """The name of the task, on the command line and in files."""
    pairs: ClassVar[str | None] = None
    """Folder of the real degraded images that the task also learns from; None: it takes none."""
    takes_depth: ClassVar[bool] = False
    """Whether the task uses the depth of clean images."""
    colour: ClassVar[bool] = False
    """Whether grey images mean nothing to the task."""
    reduction: ClassVar[int] = 1
    """What networks for the task reduce images by, if not told otherwise: above 1 where the
    degradation changes slowly, and the whole of an image tells of it."""

    @property
    def scale(self) -> int:
        """Factor from the input's to the target's sides."""
        return 1

    @property
    @abstractmethod
    def label(self) -> str:
        """The task and its settings in a few words, for tables."""

    @abstractmethod
    def degrade(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        """A degraded copy of a clean image: float32 ``[c, H, W]`` in [0, 1] to ``[c, h, w]``."""

    def fitting(self, crop: int) -> int:
        """The largest multiple of the scale in the side of a patch, as the network's input has
        whole pixels."""
        return max(self.scale, crop - crop % self.scale)

    def baselines(self) -> dict[str, Predict]:
        """Methods without training to compare with, by the name in tables."""
        return {"identity": lambda images: images}

    def conditions(self) -> tuple[RestorationTask, ...]:
        """The tasks of one fixed difficulty that a table has a column for."""
        return (self,)

    def instead_of(self, given: RestorationTask) -> str:
        """The label; where `of` made it of another task, also that one's."""
        if self == given:
            return self.label
        return f"{self.label}, as the data has pairs, instead of {given.label}"

    def open(self, source: str | Path, channels: int) -> RestorationData:
        """The data set with what the task reads of it; for errors see `open_images`."""
        return open_images(source, channels, depth=self.takes_depth, pairs=self.pairs)

    def describe(self) -> dict[str, Any]:
        """The task as JSON; ``nasfast.tasks.restoration.task_from_json`` reads it."""
        description: dict[str, Any] = json.loads(json.dumps(asdict(self)))  # type: ignore[call-overload]
        return description

    def check(self, images: ImageSet) -> None:
        """Raise UserError where the task cannot learn from these images."""
        if self.colour and images.channels != 3:
            raise UserError(
                f"{self.task}: expected colour images, got {images.name} with 1 channel (grey); "
                "open it with 3 channels"
            )
        for kind in sorted(filter(None, images.degradations)):
            if self.pairs is None:
                raise UserError(
                    f"{self.task}: expected clean images, which it degrades itself, got the pairs "
                    f"of {images.name}; give the folder of the clean images alone"
                )
            if kind not in (self.pairs, ANY_TASK):
                raise UserError(
                    f"{self.task}: expected pairs in {CLEAN_FOLDER}/ + {self.pairs}/ or "
                    f"{ANY_TASK}/, got {kind}/ in {images.name}; choose the task of these pairs"
                )

    def of(self, images: ImageSet) -> RestorationTask:
        """The task as these images have it: of pairs, the degradation is a real one.

        Raises:
            UserError: the task cannot learn from these images.
        """
        self.check(images)
        return self

    def require_reduction(self, reduction: int) -> None:
        """Raise UserError where a network that reduces images cannot do the task."""
        if reduction > 1 and self.scale > 1:
            raise UserError(
                f"network.reduction: expected 1 with {self.task}, which enlarges images, got "
                f"{reduction}; leave it out"
            )

    def require_ranges(self, limits: Mapping[str, tuple[float, float]]) -> None:
        """Raise UserError where a field is no range (low, high) within its limits."""
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if len(value) != 2 or not low <= value[0] <= value[1] <= high:
                raise UserError(
                    f"{self.task}: expected {name} as a range (low, high) within {low}..{high}, "
                    f"got {value}"
                )

    def pair(self, images: ImagePair, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Input ``[c, h, w]`` and target ``[c, scale * h, scale * w]``, float32, of uint8 images.

        The target is cut at the bottom and right to a multiple of the scale. A degraded image,
        where there is a real one, is the input, divided by 255 and no more.
        """
        height, width = (side - side % self.scale for side in images.clean.shape[-2:])
        target = images.clean[:, :height, :width].float() / 255
        if images.degraded is None:
            return self.degrade(target, generator), target
        return images.degraded.float() / 255, target
