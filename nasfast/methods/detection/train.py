"""Full training of a detector."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nasfast.cache import tensors_fingerprint
from nasfast.data.detection import (
    FILL,
    BoxTrainTransform,
    BoxValTransform,
    load_detection_splits,
)
from nasfast.encoders import load_encoder
from nasfast.methods.base import Architecture
from nasfast.methods.dense import DenseTrainConfig, DenseTraining, Scale, located
from nasfast.methods.detection.improvements import improved_detector, improved_loss
from nasfast.models.detector import Detector, DetectorConfig, build_detector
from nasfast.models.zoo import ZOO
from nasfast.spaces.nas_fcos import NASFCOSGenotype
from nasfast.tasks.base import Targets
from nasfast.tasks.detection import DetectionLoss, DetectionScores, DetectionTask
from nasfast.training import batch_norm
from nasfast.training.loop import Runtime
from nasfast.utils.config import Pixels, from_mapping
from nasfast.utils.errors import UserError

CROP = 256
"""Side of a crop by default, in pixels."""
MOMENTUM = 0.9  # of SGD


@dataclasses.dataclass(frozen=True)
class TrainConfig(DenseTrainConfig):
    """Settings of a full training of a detector."""

    shorter_side: Pixels | None = None
    """Images are brought to this shorter side, in pixels, to be scored, and before --scales to
    train; default: they stay as they are."""
    longer_side: Pixels | None = None
    """The longer side stays within this: 1333 beside a shorter side of 800 is usual."""
    view: Literal["crop", "whole"] = "crop"
    """Train on random crops, or on whole images, padded to the largest of a batch."""
    crop: Pixels | None = None
    """Height of a crop, in pixels; default: 256."""
    scales: tuple[Scale, Scale] = (0.75, 1.25)
    """Range of the factors that images are resized by, one drawn for each image."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """sgd: with momentum 0.9; biases and the scales of norms learn at twice the rate, without
    weight decay."""
    freeze_first: bool = True
    """The encoder's layers nearest to the image keep their weights: of MobileNet-v2 the first two,
    of ResNets the stem and the first stage. Statistics of their BatchNorm, where it is not frozen,
    follow the images all the same."""
    freeze_norm: bool = False
    """The encoder's BatchNorm keeps its statistics, as ResNets' always does; for small batches."""
    improvements: bool = False
    """Those of FCOS: GIoU loss, centre sampling, normalised by positive points alone, distances in
    strides, centre-ness by the tower of the boxes. Sets these of --loss and --detector."""
    loss: DetectionLoss = dataclasses.field(default_factory=DetectionLoss)
    """Losses, and what a point learns."""
    detector: DetectorConfig = dataclasses.field(default_factory=DetectorConfig)
    """Size of pyramid and head, and form of the output."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher is not None:
            raise UserError(
                f"teacher: expected none for detection, whose outputs are not imitated, got "
                f"{self.teacher}; leave it out"
            )

    @property
    def improved(self) -> TrainConfig:
        """With what `improvements` sets."""
        if not self.improvements:
            return self
        return dataclasses.replace(
            self,
            loss=improved_loss(self.loss),
            detector=improved_detector(self.detector),
        )


FIRST = (
    "source",
    "rank",
    "data",
    "out",
    "encoder_weights",
    "epochs",
    "batch_size",
    "shorter_side",
    "view",
    "crop",
    "improvements",
    "device",
    "seed",
)
"""What ``--help`` describes."""


def published() -> dict[str, Architecture]:
    """The detectors of the zoo; in place of settings of a search they have their own sizes."""
    return {
        name: Architecture(
            entry.genotype.to_json(),
            Path("runs") / name,
            {"network": dataclasses.asdict(entry.network), "encoder": entry.encoder},
        )
        for name, entry in ZOO.items()
        if entry.method == "detection"
    }


def defaults(source: Any, found: Mapping[str, Any]) -> TrainConfig:
    """Settings of a training by default: size and losses of the search, with the width of its last
    phase, or the size of an architecture of the zoo."""
    detector = dict(found.get("network", found.get("detector", {})))
    if found.get("mode") == "progressive":
        detector["width"] = found["head_phase"]["width"]
    return TrainConfig(
        source,
        detector=from_mapping(DetectorConfig, detector, "detector"),
        loss=from_mapping(DetectionLoss, found.get("loss", {}), "loss"),
    )


def resolve(config: TrainConfig, architecture: Architecture) -> TrainConfig:
    """Fill in data and encoder of the search.

    Raises:
        UserError: the weights are of another encoder than a published detector has.
    """
    search = architecture.search
    resolved: TrainConfig = located(config, search.get("encoder_weights"))
    if "encoder" in search:
        given = load_encoder(resolved.encoder_weights)
        keys = {"name", "size"} & search["encoder"].keys()
        if any(given.describe().get(key) != search["encoder"][key] for key in keys):
            wanted = search["encoder"].get("size", search["encoder"]["name"])
            raise UserError(
                f"encoder_weights: expected those of {wanted}, which {config.source} has, got "
                f"{resolved.encoder_weights or 'none: the packaged ones are'} of {given.label}; "
                "give --encoder-weights FILE"
            )
    return dataclasses.replace(resolved, data=config.data or search.get("data", "synthetic"))


class DetectionTraining(DenseTraining):
    """The full training of a detector."""

    settings: TrainConfig
    task: DetectionTask

    def __init__(
        self, config: TrainConfig, genotype: NASFCOSGenotype, out: Path, runtime: Runtime
    ) -> None:
        self.genotype, config = genotype, config.improved
        assert config.data is not None
        self.splits = load_detection_splits(config.data, seed=config.seed)
        if config.view == "crop":
            config = dataclasses.replace(config, crop=config.crop or CROP)
        elif config.crop or config.crop_width:
            raise UserError(
                "crop: expected none beside --view whole, got "
                f"{config.crop or config.crop_width}; leave out either"
            )
        train = BoxTrainTransform(
            None if config.crop is None else (config.crop, config.crop_width or config.crop),
            config.shorter_side,
            config.longer_side,
            config.scales,
            jitter=config.jitter,
        )
        val = BoxValTransform(None, config.shorter_side, config.longer_side)
        super().__init__(
            config,
            DetectionTask(self.splits, config.loss, judge="ap"),
            self.splits.train,
            self.splits.val,
            (train, val),
            out,
            runtime,
        )

    def network(self) -> Detector:
        settings = self.settings
        encoder = load_encoder(settings.encoder_weights)
        self._encoder = tensors_fingerprint(encoder.state_dict())
        if settings.freeze_first:
            for layer in encoder.first():
                layer.requires_grad_(False)
        return build_detector(encoder, self.genotype, self.task.outputs, settings.detector)

    def optimizer(self, parameters: list[nn.Parameter], lr: Any) -> torch.optim.Optimizer:
        if self.settings.optimizer == "adamw":
            return super().optimizer(parameters, lr)
        decay = self.settings.weight_decay
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": decay},
            {"params": [p for p in parameters if p.dim() <= 1], "lr": 2 * lr},
        ]
        # others copy a learning rate from the GPU to the host, which no recorded step can do
        fused = True if self.runtime.device.type == "cuda" else None
        return torch.optim.SGD(groups, lr, momentum=MOMENTUM, fused=fused)

    def learning(self, frozen: bool) -> None:
        super().learning(frozen)
        if self.settings.freeze_norm:
            batch_norm.freeze(self.model.get_submodule("encoder"))

    def prepared(self, images: Tensor, targets: Targets) -> Targets:
        """What each point is to learn."""
        height, width = images.shape[-2:]
        return self.task.resize_targets(targets, (height // 4, width // 4))

    def joined(self, loaded: list[tuple[Tensor, Targets]]) -> tuple[Tensor, Targets]:
        """Padded at the right and at the bottom to the largest image."""
        height, width = (max(images.shape[axis] for images, _ in loaded) for axis in (-2, -1))
        colour = torch.tensor(FILL, dtype=torch.uint8).view(1, 3, 1, 1)
        canvas = colour.repeat(len(loaded), 1, height, width)
        for place, (images, _) in zip(canvas, loaded, strict=True):
            place[:, : images.shape[-2], : images.shape[-1]] = images[0]
        same = [(canvas[i : i + 1], targets) for i, (_, targets) in enumerate(loaded)]
        return super().joined(same)

    def inputs(self, search: Mapping[str, Any]) -> dict[str, str]:
        config, found = self.settings, {}
        if config.data is not None and config.data == search.get("data"):
            parts = load_detection_splits(
                config.data, seed=search["seed"], held_out=search["held_out"]
            )
            found["training data"] = parts.search_train.fingerprint()
            found["validation data"] = parts.search_val.fingerprint()
        if str(config.encoder_weights) == str(search.get("encoder_weights")):
            found["encoder"] = self._encoder
        return found

    @property
    def seen(self) -> str:
        config = self.settings
        view = super().seen if config.view == "crop" else "images   whole"
        side = f"of shorter side {config.shorter_side}" if config.shorter_side else "of any size"
        low, high = config.scales
        most = f", longer side up to {config.longer_side}" if config.longer_side else ""
        return f"{view}, {side} x {low:g} to {high:g}{most}"

    def measured(self, scores: DetectionScores) -> dict[str, Any]:
        names = self.splits.val.classes
        return {
            "genotype": self.genotype.to_json(),
            "class_ap50": dict(zip(names, scores.class_ap50, strict=True)),
            "class_ap": dict(zip(names, scores.class_ap, strict=True)),
        }

    def described(self, scores: DetectionScores) -> dict[str, Any]:
        val = self.splits.val
        return {
            "classes": list(val.classes),
            "category_ids": list(val.category_ids),
            "colors": list(val.colors),
            "shorter_side": self.settings.shorter_side,
            "longer_side": self.settings.longer_side,
            "ap": scores.ap,
            "method": "detection",
        }

    def text(self, scores: DetectionScores, split: str) -> str:
        lines = [
            f"  {name:<16} {'absent' if ap50 is None else f'{ap50:.3f}'}"
            for name, ap50 in zip(self.splits.val.classes, scores.class_ap50, strict=True)
        ]
        return "\n".join([*lines, f"AP50 {scores.ap50:.4f}, AP {scores.ap:.4f} on {split}"])
