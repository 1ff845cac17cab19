"""Joints of people as a dense task: top-down, a heatmap a joint of the crop of a person."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nasfast.data.keypoints import KeypointDataset, KeypointSplits, batch, mapped
from nasfast.models.decoders import DenseNetwork, output_layers
from nasfast.models.layers import resize
from nasfast.tasks.base import ClassScore, DenseTask, Frames, Targets, enlarged
from nasfast.tasks.detection.scores import check_packages
from nasfast.tasks.keypoints.heatmaps import FINEST, decode, energy, heatmaps
from nasfast.tasks.keypoints.processor import KeypointProcessor, Poses
from nasfast.tasks.keypoints.scores import KeypointScores, People, keypoint_scores
from nasfast.tasks.processor import STRIDE
from nasfast.training.loop import NonFiniteLossError, Runtime

T = TypeVar("T")


@dataclass(frozen=True)
class KeypointTask(DenseTask[KeypointScores]):
    """The joints of people whose boxes are given.

    A network gives maps ``[N, J, h, w]`` of the crops of people. The targets of a batch: "joints"
    float32 ``[N, J, 2]``, x and y in pixels of the crop; "visible" uint8 ``[N, J]``, 0 for a joint
    that is not labelled; "to_image" float32 ``[N, 2, 3]``, the map from the crop to the image;
    "truth" float32 ``[N, J, 2]``, the joints in the image; "area" and "head" float32 ``[N]``, the
    scales of OKS and PCKh; "image" int64 ``[N]``, its index in the data; "inside" uint8 ``[N, H /
    4, W / 4]``, 1 where there is crop, 0 where it is padded. Its shape is that of the maps that are
    learned.

    Raises:
        UserError: faster-coco-eval is not installed.
    """

    name: ClassVar[str] = "keypoints"
    samples: ClassVar[str] = "people"

    splits: KeypointSplits

    def __post_init__(self) -> None:
        check_packages()

    @property
    def outputs(self) -> int:
        """One heatmap a joint."""
        return len(self.splits.train.skeleton)

    @property
    def search_train(self) -> KeypointDataset:
        return self.splits.search_train

    @property
    def search_val(self) -> KeypointDataset:
        return self.splits.search_val

    @torch.no_grad()
    def begin(self, network: DenseNetwork) -> None:
        """All maps begin near 0, which most of their cells stay: a deviation of 0.001, as in Simple
        Baselines."""
        for last in output_layers(network.decoder):
            assert last.bias is not None
            last.bias.zero_()
            nn.init.normal_(last.weight, std=0.001)

    def load_batch(
        self,
        frames: Frames,
        indices: Sequence[int],
        transform: Any,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Targets]:
        """Crops of people, by a `PersonTransform`."""
        dataset = cast(KeypointDataset, frames)
        crops = batch(dataset, indices, transform, generator)
        people = [dataset.people()[index] for index in indices]
        rows, columns = (-(-side // FINEST) for side in crops.images.shape[-2:])
        return crops.images, {
            "joints": crops.joints,
            "visible": crops.visible,
            "to_image": crops.to_image,
            "truth": torch.stack([person.joints for person in people]),
            "area": torch.tensor([person.area for person in people]),
            "head": torch.tensor([person.head for person in people]),
            "image": torch.tensor([person.image for person in people]),
            "inside": torch.ones(len(people), rows, columns, dtype=torch.uint8),
        }

    def resize_targets(self, targets: Targets, size: tuple[int, int]) -> Targets:
        """What `criterion` needs: maps are learned at a stride of 4, whatever the network's."""
        return {name: targets[name] for name in ("joints", "visible", "inside")}

    def pad_targets(self, targets: Targets, size: tuple[int, int]) -> Targets:
        """With cells that are not "inside"."""
        return {**targets, "inside": _padded(targets["inside"], size)}

    def criterion(self, output: Tensor, targets: Targets) -> Tensor:
        """Mean squared error between the maps and Gaussians, over the labelled joints that lie in
        the crop, in units of the Gaussian's own squares: 1 for a map of zeros. 0 for a batch
        without a labelled joint."""
        inside = targets["inside"]
        rows, columns = inside.shape[-2:]
        maps = resize(output.float(), (rows, columns))
        wanted = heatmaps(targets["joints"], FINEST, (rows, columns))
        squares = ((maps - wanted).square() * inside[:, None]).sum((-2, -1)) / energy(rows)
        counted = self._counted(targets)
        return (squares * counted).sum() / counted.sum().clamp(min=1)

    def weight(self, targets: Targets) -> Tensor:
        """The joints that `criterion` is a mean over."""
        return self._counted(targets).sum().float()

    def _counted(self, targets: Targets) -> Tensor:
        """bool ``[N, J]``: labelled, and inside of the crop."""
        rows, columns = targets["inside"].shape[-2:]
        cells = targets["joints"] / FINEST
        x, y = cells.unbind(-1)
        inside = (x >= 0) & (x <= columns) & (y >= 0) & (y <= rows)
        return inside & (targets["visible"] > 0)

    @torch.inference_mode()
    def score(
        self, batches: Iterable[tuple[T, Targets]], predict: Callable[[T], Tensor], runtime: Runtime
    ) -> KeypointScores:
        """OKS, AP and PCKh in the pixels of the images: see `keypoint_scores`."""
        found = []
        finite = torch.ones((), dtype=torch.bool, device=runtime.device)
        for inputs, targets in batches:
            runtime.heartbeat()
            with runtime.autocast():
                maps = predict(inputs)
            finite &= maps.isfinite().all()
            sides = [FINEST * side for side in targets["inside"].shape[-2:]]
            height, width = (side + -side % STRIDE for side in sides)  # as networks pad
            inside = _padded(runtime.move(targets["inside"]), (height, width))[:, None].float()
            there = F.interpolate(inside, maps.shape[-2:], mode="nearest-exact") > 0
            points, confidence = decode(maps.float().masked_fill(~there, 0.0), (height, width))
            # copies: a feature cache writes the next batch over this one
            own = {name: target.cpu().clone() for name, target in targets.items()}
            points = mapped(points.cpu(), own["to_image"])
            found.append((own, points, confidence.cpu()))
        if not finite.item():
            raise NonFiniteLossError("the network's maps are not finite")
        truth, visible, area, head, image = (
            torch.cat([own[name] for own, _, _ in found])
            for name in ("truth", "visible", "area", "head", "image")
        )
        estimates = (torch.cat(values) for values in list(zip(*found, strict=True))[1:])
        people = People(truth, visible, area, head, image, *estimates)
        return keypoint_scores(people, self.splits.train.skeleton)

    @property
    def processor(self) -> KeypointProcessor:
        return KeypointProcessor(self.splits.train.skeleton)

    def truth(self, targets: Targets, image: Tensor) -> Poses:
        """The labelled joints."""
        height, width = image.shape[1:]
        return Poses(
            image,
            targets["joints"][None],
            (targets["visible"] > 0).float()[None],
            torch.tensor([[0.0, 0.0, width, height]]),
            self.splits.train.skeleton,
        )

    def class_scores(self, scores: KeypointScores) -> list[ClassScore]:
        """Of each joint."""
        skeleton = self.splits.train.skeleton
        return [
            ClassScore(name, scores.by, score, color)
            for name, score, color in zip(
                skeleton.joints, scores.joints, skeleton.colors, strict=True
            )
        ]


def _padded(inside: Tensor, size: tuple[int, int]) -> Tensor:
    """ "inside" for images of (H, W)."""
    return enlarged(inside, (size[0] // FINEST, size[1] // FINEST))
