"""Detection of objects as a dense task."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from nasfast.data.detection import PADDING, DetectionDataset, DetectionSplits, batch
from nasfast.tasks.base import ClassScore, DenseTask, Frames, Targets, prepare_images
from nasfast.tasks.detection.assign import assign
from nasfast.tasks.detection.losses import (
    LOSSES,
    DetectionLoss,
    loss_sums,
    normalized,
    normalizers,
)
from nasfast.tasks.detection.postprocess import Boxes, PostProcessing, detections
from nasfast.tasks.detection.processor import DetectionProcessor, Detections
from nasfast.tasks.detection.scores import (
    DetectionScores,
    ImageBoxes,
    check_packages,
    coco_ap,
)
from nasfast.tasks.processor import STRIDE
from nasfast.training.loop import NonFiniteLossError, Runtime
from nasfast.training.pictures import thumbnail

T = TypeVar("T")


@dataclass(frozen=True)
class DetectionTask(DenseTask[DetectionScores]):
    """Boxes of objects with their classes.

    A network gives float32 ``[N, K + 5, P]``: logits of the classes, distances to left, top, right
    and bottom in pixels, the logit of centre-ness; P points as `nasfast.models.points.points` lists
    them.

    The targets of a batch: "boxes" float32 ``[N, M, 4]``, left, top, right and bottom in pixels of
    the network's input; "labels" int64 ``[N, M]``, the class, -1 for padding and -2 - class for an
    ignored box; "areas" float32 ``[N, M]``; "index" int64 ``[N]``, of the sample in its part of the
    data; "size" int64 ``[N, 2]``, height and width before the padding; "scale" float32 ``[N, 2]``,
    pixels of the input for one of the data's image, vertically and horizontally, 1 where crops are
    taken. M is the most of the part that the batch comes from: all its batches have one shape.
    Padded targets have "inside" too, uint8 ``[N, H / 32, W / 32]``: 1 where there is image. Its
    shape says how large the padded images are.

    Dense targets, of `resize_targets`: "classes" int64 ``[N, P]`` and "distances" float32
    ``[N, P, 4]``, see `assign`.

    Raises:
        UserError: faster-coco-eval is not installed.
    """

    name: ClassVar[str] = "detection"

    splits: DetectionSplits
    loss_settings: DetectionLoss = DetectionLoss()  # noqa: RUF009 - it is frozen
    settings: PostProcessing = PostProcessing()  # noqa: RUF009
    judge: Literal["losses", "ap"] = "losses"
    """What the reward is: minus the sum of the losses, as in the search, or AP."""

    def __post_init__(self) -> None:
        check_packages()

    @property
    def outputs(self) -> int:
        """A logit for each class, four distances, centre-ness."""
        return len(self.splits.train.classes) + 5

    @property
    def search_train(self) -> DetectionDataset:
        return self.splits.search_train

    @property
    def search_val(self) -> DetectionDataset:
        return self.splits.search_val

    @property
    def assignment(self) -> str:
        settings = self.loss_settings
        return f"sizes x {settings.size_scale}, center sampling {settings.center_sampling}"

    def load_batch(
        self,
        frames: Frames,
        indices: Sequence[int],
        transform: Any,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Targets]:
        """Images, those of other sizes padded, and boxes."""
        dataset = cast(DetectionDataset, frames)
        samples = dataset.load(indices)
        found = batch(samples, transform, generator, most=_most(dataset))
        scale = torch.ones(len(samples), 2)
        if transform.crop is None:
            own = torch.tensor([sample.image.shape[1:] for sample in samples])
            scale = found.sizes / own
        return found.images, {
            "boxes": found.boxes,
            "labels": found.labels,
            "areas": found.areas,
            "index": torch.tensor(indices),
            "size": found.sizes,
            "scale": scale,
        }

    def resize_targets(self, targets: Targets, size: tuple[int, int]) -> Targets:
        """Dense targets for images whose map of stride 4 has ``size`` = (h, w): what each point of
        P3 to P7 learns, on the device of the boxes."""
        return self._dense(targets, (4 * size[0], 4 * size[1]))

    def pad_targets(self, targets: Targets, size: tuple[int, int]) -> Targets:
        """With "inside"."""
        rows, columns = (torch.arange(side // STRIDE) * STRIDE for side in size)
        height, width = targets["size"].unbind(1)
        inside = (rows < height[:, None])[:, :, None] & (columns < width[:, None])[:, None]
        return {**targets, "inside": inside.to(torch.uint8)}

    def _dense(self, targets: Targets, size: tuple[int, int]) -> Targets:
        settings = self.loss_settings
        classes, distances = assign(
            targets["boxes"],
            targets["labels"],
            size,
            size_scale=settings.size_scale,
            center_sampling=settings.center_sampling,
        )
        return {"classes": classes, "distances": distances}

    def _points(self, targets: Targets) -> tuple[Tensor, Tensor]:
        if "classes" not in targets:
            targets = self._dense(targets, _padded(targets))
        return targets["classes"].long(), targets["distances"]

    def criterion(self, output: Tensor, targets: Targets) -> Tensor:
        """The three losses, float32 ``[3]``, see `LOSSES`; targets are dense, or padded boxes."""
        points = self._points(targets)
        sums = loss_sums(output, *points, self.loss_settings)
        return normalized(sums, normalizers(*points, self.loss_settings))

    def weight(self, targets: Targets) -> Tensor:
        """What the three losses are means over, float32 ``[3]``: see `normalizers`."""
        weight = normalizers(*self._points(targets), self.loss_settings)
        return torch.cat([weight[:1].clamp(min=1), weight[1:]])

    @torch.inference_mode()
    def score(
        self, batches: Iterable[tuple[T, Targets]], predict: Callable[[T], Tensor], runtime: Runtime
    ) -> DetectionScores:
        """Losses and AP on a part of the data.

        The reward is minus the sum of the three losses. Each is normalised over all of the part,
        not batch by batch: the focal loss by its positive points (and images), that of boxes by its
        sum of centre-ness, that of centre-ness by its positive points. So it does not depend on the
        batches, and candidates on the same images and crops can be compared; candidates of phases
        with other images or another `size_scale` cannot. AP is that of the boxes in the pixels of
        the data's images, or of the crops.
        """
        sums = torch.zeros(2, len(LOSSES), dtype=torch.float64, device=runtime.device)
        finite = torch.ones((), dtype=torch.bool, device=runtime.device)
        found = []
        for inputs, targets in batches:
            runtime.heartbeat()
            with runtime.autocast():
                output = predict(inputs)
            finite &= output.isfinite().all()
            output = output.float()
            points = self._points({k: runtime.move(v) for k, v in targets.items()})
            sums[0] += loss_sums(output, *points, self.loss_settings)
            sums[1] += normalizers(*points, self.loss_settings)
            boxes = detections(
                output.nan_to_num(), _padded(targets), targets["size"], self.settings
            )
            # a copy: a feature cache writes the next batch over this one
            found.append((boxes, {name: target.clone() for name, target in targets.items()}))
        if not finite.item():
            raise NonFiniteLossError("the network's outputs are not finite")
        losses = normalized(*sums.unbind()).tolist()
        images = [image for pair in found for image in _images(*pair)]
        ap = coco_ap(images, len(self.splits.train.classes))
        reward = ap.figures.get("ap", 0.0) if self.judge == "ap" else -sum(losses)
        return DetectionScores(
            reward,
            ap.figures,
            dict(zip(LOSSES, losses, strict=True)),
            ap.class_ap,
            ap.class_ap50,
            images,
        )

    @property
    def processor(self) -> DetectionProcessor:
        train = self.splits.train
        return DetectionProcessor(train.classes, train.colors, train.category_ids, self.settings)

    def truth(self, targets: Targets, image: Tensor) -> Detections:
        """The boxes that are not ignored, without scores."""
        labels = targets["labels"]
        kept = labels >= 0
        train = self.splits.train
        return Detections(
            image,
            targets["boxes"][kept],
            torch.ones(int(kept.sum())),
            labels[kept],
            train.classes,
            train.category_ids,
            train.colors,
            scored=False,
        )

    def panels(
        self, model: nn.Module, frames: Frames, index: int, transform: Any, runtime: Runtime
    ) -> dict[str, Tensor]:
        images, targets = self.load_padded(frames, [index], transform)
        with runtime.autocast():
            output = model(prepare_images(images, runtime))[0]
        height, width = targets["size"][0].tolist()
        image = images[0, :, :height, :width]
        found = self.processor.detect(output, _padded(targets), targets["size"], [image])[0]
        truth = self.truth({name: target[0] for name, target in targets.items()}, image)
        # of a candidate, trained for seconds, no score is high: as many boxes as there are objects
        objects = min(len(truth.boxes), len(found.scores))
        if objects:
            found = replace(found, drawn=min(found.drawn, float(found.scores[objects - 1])))
        small = thumbnail(image)  # names are drawn at the size that is shown
        drawn = {"truth": truth.on(small).draw(), "prediction": found.on(small).draw()}
        return {"image": small, **drawn}

    def class_scores(self, scores: DetectionScores) -> list[ClassScore]:
        """AP of each class."""
        train = self.splits.train
        return [
            ClassScore(name, "AP", score, color)
            for name, score, color in zip(train.classes, scores.class_ap, train.colors, strict=True)
        ]


@functools.lru_cache(maxsize=16)
def _most(dataset: DetectionDataset) -> int:
    return max(dataset.counts(), default=0)


def _padded(targets: Targets) -> tuple[int, int]:
    """(H, W) of the padded images."""
    rows, columns = targets["inside"].shape[1:]
    return STRIDE * rows, STRIDE * columns


def _images(found: Boxes, targets: Targets) -> list[ImageBoxes]:
    """Objects and detections of the images of a batch, in the pixels of the data."""
    targets = {name: target.cpu() for name, target in targets.items()}
    y, x = targets["scale"].unbind(1)
    scale = torch.stack([x, y, x, y], 1)[:, None]
    areas = targets["areas"] / (x * y)[:, None]
    boxes, objects = found.boxes.cpu() / scale, targets["boxes"] / scale
    images = []
    for i, (label, score, name) in enumerate(
        zip(targets["labels"], found.scores.cpu(), found.labels.cpu(), strict=True)
    ):
        real, there = label != PADDING, score >= 0
        ignored = label[real] < PADDING
        images.append(
            ImageBoxes(
                objects[i][real],
                torch.where(ignored, -2 - label[real], label[real]),
                ignored,
                areas[i][real],
                boxes[i][there],
                score[there],
                name[there],
            )
        )
    return images
