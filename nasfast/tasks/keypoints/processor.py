"""Trained networks for keypoints in use."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from nasfast.data import IMAGENET_MEAN, IMAGENET_STD
from nasfast.data.keypoints import Skeleton
from nasfast.data.keypoints.drawing import drawn
from nasfast.tasks.keypoints.heatmaps import decode
from nasfast.tasks.processor import Prediction, Preprocessing, Processor
from nasfast.utils.files import atomic_file, atomic_write

DRAWN = 0.2
"""Least confidence of a joint in a picture."""


@dataclass(frozen=True, eq=False)
class Poses(Prediction):
    """The joints of people in an image."""

    image: Tensor  # uint8 [3, H, W]
    joints: Tensor  # float32 [P, J, 2]
    """x and y in pixels of the image, whose edges are 0 and W, 0 and H."""
    confidence: Tensor  # float32 [P, J]
    """Height of the heatmap there: 1 at a joint without doubt."""
    boxes: Tensor  # float32 [P, 4]
    """Left, top, right, bottom of the people, as they were given."""
    skeleton: Skeleton
    drawn: float = DRAWN
    """Least confidence of a joint that is drawn."""

    def draw(self) -> Tensor:
        """Joints and bones, those of the left orange, of the right blue. Small images are
        enlarged."""
        return drawn(self.image, self.joints, self.confidence >= self.drawn, self.skeleton)

    def coco_results(self, image_id: int | str | None = None) -> list[dict[str, Any]]:
        """The people as in COCO's result files, with the id of the image where one is given: the
        keypoints x, y and confidence of each joint, by COCO's count of pixels, in which the centre
        of the first is 0; the score, their mean; and the box, left, top, width and height."""
        named = {} if image_id is None else {"image_id": image_id}
        triples = torch.cat([self.joints - 0.5, self.confidence[..., None]], -1).flatten(1)
        return [
            {
                **named,
                "category_id": 1,
                "keypoints": [round(value, 3) for value in person],
                "score": round(score, 6),
                "bbox": [round(v, 3) for v in (left, top, right - left, bottom - top)],
            }
            for person, score, (left, top, right, bottom) in zip(
                triples.tolist(), self.confidence.mean(1).tolist(), self.boxes.tolist(), strict=True
            )
        ]

    def to_json(self) -> dict[str, Any]:
        """Size of the image, names of the joints, and the people as `coco_results` has them."""
        return {
            "size": list(self.image.shape[1:]),
            "joints": list(self.skeleton.joints),
            "people": self.coco_results(),
        }

    def save(self, folder: Path, stem: str) -> list[Path]:
        """``stem.json``, as of `to_json`, and ``stem-poses.png``."""
        results, picture = (folder / f"{stem}{end}" for end in KeypointProcessor.suffixes)
        atomic_write(results, json.dumps(self.to_json(), indent=1) + "\n")
        shown = Image.fromarray(self.draw().permute(1, 2, 0).contiguous().numpy())
        with atomic_file(picture) as file:
            shown.save(file, "png")
        return [results, picture]


@dataclass(frozen=True)
class KeypointProcessor(Processor):
    """Of ``outputs`` = one heatmap a joint, of the crop of a person."""

    skeleton: Skeleton

    full_size = False
    suffixes = (".json", "-poses.png")
    task = "keypoints"
    preprocessing = Preprocessing(IMAGENET_MEAN, IMAGENET_STD)

    @property
    def classes(self) -> tuple[str, ...]:
        """The joints."""
        return self.skeleton.joints

    def result(self, reduced: Tensor, image: Tensor) -> Poses:
        """The joints of one person, who fills the image, by its maps ``[J, h, w]``."""
        height, width = image.shape[1:]
        joints, confidence = decode(reduced[None], (height, width))
        box = torch.tensor([[0.0, 0.0, width, height]])
        return Poses(image, joints, confidence, box, self.skeleton)

    def poses(
        self, joints: Tensor, confidence: Tensor, boxes: Sequence[Sequence[float]], image: Tensor
    ) -> Poses:
        """The people of an image, by their joints ``[P, J, 2]`` in its pixels."""
        return Poses(
            image.cpu(),
            joints.cpu(),
            confidence.cpu(),
            torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            self.skeleton,
        )
