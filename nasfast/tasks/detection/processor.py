"""Trained detectors in use."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from nasfast.data import IMAGENET_MEAN, IMAGENET_STD
from nasfast.tasks.detection.postprocess import Boxes, PostProcessing, detections
from nasfast.tasks.processor import STRIDE, Prediction, Preprocessing, Processor
from nasfast.utils.files import atomic_file, atomic_write

DRAWN = 0.3
"""Least score of a box in a picture."""
LEAST_SIDE = 200  # pixels of a picture, the longer side


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
    scored: bool = True
    """Whether scores are drawn; those of a truth say nothing."""
    drawn: float = DRAWN
    """Least score of a box that is drawn."""

    def above(self, threshold: float) -> Detections:
        """The objects with a score of at least ``threshold``, all of them drawn."""
        kept = self.scores >= threshold
        boxes, scores, labels = (e[kept] for e in (self.boxes, self.scores, self.labels))
        return replace(self, boxes=boxes, scores=scores, labels=labels, drawn=threshold)

    def on(self, image: Tensor) -> Detections:
        """The same objects on the image in another size."""
        (old, new) = (
            torch.tensor([each.shape[2], each.shape[1]], dtype=torch.float32)
            for each in (self.image, image)
        )
        return replace(self, image=image, boxes=self.boxes * (new / old).repeat(2))

    def draw(self) -> Tensor:
        """The boxes with a score of at least `drawn` over the image, the best on top, with the name
        of the class and the score. Small images are enlarged, for the text."""
        factor = math.ceil(LEAST_SIDE / max(self.image.shape[1:]))
        pixels = self.image.permute(1, 2, 0).contiguous().numpy()
        canvas = Image.fromarray(pixels)
        if factor > 1:
            size = (factor * canvas.width, factor * canvas.height)
            canvas = canvas.resize(size, Image.Resampling.NEAREST)
        draw = ImageDraw.Draw(canvas)
        side = max(canvas.size)
        line, font = max(2, round(side / 300)), min(28, max(10, round(side / 45)))
        for i in reversed(range(len(self.boxes))):
            score = float(self.scores[i])
            if score < self.drawn:
                continue
            label = int(self.labels[i])
            color = self.colors[label]
            left, top, right, bottom = (factor * self.boxes[i]).tolist()
            right, bottom = max(left, right), max(top, bottom)
            draw.rectangle((left, top, right, bottom), outline=color, width=line)
            text = f"{self.classes[label]} {score:.2f}" if self.scored else self.classes[label]
            _, _, width, height = draw.textbbox((0, 0), text, font_size=font)
            # above the box, or inside where there is no room
            x = max(0, min(left, canvas.width - width - 3))
            y = top - height - 2 if top >= height + 2 else top
            draw.rectangle((x, y, x + width + 3, y + height + 2), fill=color)
            bright = 299 * color[0] + 587 * color[1] + 114 * color[2] > 128_000
            draw.text((x + 2, y), text, fill="black" if bright else "white", font_size=font)
        return torch.from_numpy(np.array(canvas)).permute(2, 0, 1)

    def coco_results(self, image_id: int | str | None = None) -> list[dict[str, Any]]:
        """The objects as in COCO's result files: category id, box as left, top, width and height,
        and score, with the id of the image where one is given."""
        named = {} if image_id is None else {"image_id": image_id}
        return [
            {
                **named,
                "category_id": self.category_ids[label],
                "bbox": [round(v, 3) for v in (left, top, right - left, bottom - top)],
                "score": round(score, 6),
            }
            for (left, top, right, bottom), label, score in zip(
                self.boxes.tolist(), self.labels.tolist(), self.scores.tolist(), strict=True
            )
        ]

    def to_json(self) -> dict[str, Any]:
        """Size of the image, and its objects: COCO's entries with the name of the class."""
        objects = [
            {"class": self.classes[label], **entry}
            for label, entry in zip(self.labels.tolist(), self.coco_results(), strict=True)
        ]
        return {"size": list(self.image.shape[1:]), "objects": objects}

    def save(self, folder: Path, stem: str) -> list[Path]:
        """``stem.json``, the objects as `coco_results` gives them, and ``stem-boxes.png``."""
        results, picture = (folder / f"{stem}{end}" for end in DetectionProcessor.suffixes)
        atomic_write(results, json.dumps(self.coco_results(), indent=1) + "\n")
        drawn = Image.fromarray(self.draw().permute(1, 2, 0).contiguous().numpy())
        with atomic_file(picture) as file:
            drawn.save(file, "png")
        return [results, picture]


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
    whole = True
    suffixes = (".json", "-boxes.png")
    task = "detection"
    preprocessing = Preprocessing(IMAGENET_MEAN, IMAGENET_STD)

    def __post_init__(self) -> None:
        for name in ("colors", "category_ids"):
            count = len(getattr(self, name))
            if count != len(self.names):
                raise ValueError(
                    f"{name}: expected one for each of {len(self.names)} classes, got {count}"
                )

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
        return self.detections(detections(output, size, sizes, self.settings), sizes, images)

    def detections(self, found: Boxes, sizes: Tensor, images: Sequence[Tensor]) -> list[Detections]:
        """As `detect`, of what `postprocess.detections` or an exported file found."""
        results = []
        boxes, scores, labels = (each.cpu() for each in found)
        for i, (image, (height, width)) in enumerate(zip(images, sizes.tolist(), strict=True)):
            there = scores[i] >= 0
            across, down = image.shape[2] / width, image.shape[1] / height
            own = boxes[i][there] * torch.tensor([across, down, across, down])
            results.append(
                Detections(
                    image.cpu(),
                    own,
                    scores[i][there],
                    labels[i][there],
                    self.names,
                    self.category_ids,
                    self.colors,
                )
            )
        return results

    def result(self, reduced: Tensor, image: Tensor) -> Detections:
        """The objects by an output ``[K + 5, P]`` of an image that was padded, but not resized."""
        height, width = image.shape[1:]
        padded = (height + -height % STRIDE, width + -width % STRIDE)
        return self.detect(reduced[None], padded, torch.tensor([[height, width]]), [image])[0]
