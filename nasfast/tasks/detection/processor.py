"""Trained detectors in use."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from nasfast.data import IMAGENET_MEAN, IMAGENET_STD
from nasfast.tasks.detection.postprocess import Boxes, PostProcessing, detections
from nasfast.tasks.processor import STRIDE, Prediction, Preprocessing, Processor
from nasfast.utils.files import atomic_file, atomic_write

DRAWN = 0.3
"""Least score of a box in a picture."""


@dataclass(frozen=True, eq=False)
class Detections(Prediction):
    """The objects in an image, by falling score."""

    image: Tensor  # uint8 [3, H, W]
    boxes: Tensor  # float32 [D, 4]
    """Left, top, right, bottom in pixels of the image."""
    scores: Tensor  # float32 [D]
    labels: Tensor  # int64 [D]
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    """Of the classes, in the data that the network learned from."""
    colors: tuple[tuple[int, int, int], ...]

    def draw(self) -> Tensor:
        """The boxes with a score of at least `DRAWN` over the image, the best on top."""
        raise NotImplementedError

    def coco_results(self, image_id: int | str | None = None) -> list[dict[str, Any]]:
        """The objects as in COCO's result files: category id, box as left, top, width and height,
        and score, with the id of the image where one is given."""
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        """Size of the image, and the objects: COCO's entries with the name of the class."""
        raise NotImplementedError

    def save(self, folder: Path, stem: str) -> list[Path]:
        """``stem.json``, the objects by `coco_results`, and ``stem-boxes.png``."""
        raise NotImplementedError


@dataclass(frozen=True)
class DetectionProcessor(Processor):
    """Of ``outputs`` = K + 5 numbers a point: logits of the classes, distances to left, top, right
    and bottom in pixels of the network's input, logit of centre-ness. An output ``[N, K + 5, P]``
    is of a whole image: it is cut in no tiles."""

    names: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...]
    category_ids: tuple[int, ...]
    settings: PostProcessing = PostProcessing()  # noqa: RUF009 - it is frozen

    full_size = False
    suffixes = (".json", "-boxes.png")
    task = "detection"
    preprocessing = Preprocessing(IMAGENET_MEAN, IMAGENET_STD)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.names

    def detect(
        self, output: Tensor, size: tuple[int, int], sizes: Tensor, images: Sequence[Tensor]
    ) -> list[Detections]:
        """The objects in images, in the images' own pixels.

        Args:
            output: ``[N, K + 5, P]``, of the network.
            size: (H, W) of its padded input.
            sizes: ``[N, 2]``, height and width in the input of each image, which may be resized.
            images: uint8 ``[3, H, W]``, in their own size.
        """
        raise NotImplementedError

    def detections(
        self, found: Boxes, sizes: Tensor, images: Sequence[Tensor]
    ) -> list[Detections]:
        """As `detect`, of what `postprocess.detections` or an exported file found."""
        raise NotImplementedError

    def result(self, reduced: Tensor, image: Tensor) -> Detections:
        """The objects by an output ``[K + 5, P]`` of an image that was padded, but not resized."""
        raise NotImplementedError
