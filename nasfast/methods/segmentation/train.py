"""Full training of a segmentation network."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from torch import Tensor

from nasfast.cache import tensors_fingerprint
from nasfast.data import TrainTransform, ValTransform, load_splits, shorter_side, split_for_search
from nasfast.encoders import load_encoder
from nasfast.methods.base import Architecture
from nasfast.methods.dense import DenseTrainConfig, DenseTraining, located
from nasfast.methods.segmentation.crops import enlarging
from nasfast.methods.segmentation.decoders import FAST_NAS, Decoders
from nasfast.models.decoders import FULL_DECODER, DecoderConfig, EncoderDecoder
from nasfast.spaces.base import Genotype
from nasfast.tasks.segmentation import SegmentationTask
from nasfast.training.loop import Runtime
from nasfast.training.metrics import SegmentationScores
from nasfast.utils.config import Bound, Pixels


@dataclasses.dataclass(frozen=True)
class DecoderTrainConfig(DenseTrainConfig):
    """Settings of every full training of a segmentation network, whatever its decoder."""

    decoders: ClassVar[Decoders]
    """What the network is one of."""

    mask_values: str | None = None
    """Values of the classes in the masks: 0,255; default: the search's."""
    resize_longer: Pixels | None = None
    """Images whose longer side has more pixels are reduced to it, to train and to score on;
    default: the search's."""
    class_balance: Annotated[float, Bound(0, 2)] = 0.3
    """The loss weighs class k by its frequency to the power of minus this; 0 weighs all alike."""
    decoder: Any = None
    """Size of the decoder; each method has a type of its own."""


@dataclasses.dataclass(frozen=True)
class TrainConfig(DecoderTrainConfig):
    """Settings of a full training of a network with cells."""

    decoders: ClassVar[Decoders] = FAST_NAS

    decoder: DecoderConfig = FULL_DECODER
    """Size of the decoder; the default is that of the published final networks."""


C = TypeVar("C", bound=DecoderTrainConfig)


FIRST = (
    "source",
    "rank",
    "data",
    "out",
    "encoder_weights",
    "epochs",
    "batch_size",
    "crop",
    "device",
    "seed",
)
"""What ``--help`` describes."""


def resolve(config: C, architecture: Architecture) -> C:
    """Fill in data, values of masks and encoder of the search."""
    search = architecture.search
    resolved: C = located(config, search.get("encoder_weights"))
    return dataclasses.replace(
        resolved,
        data=config.data or search.get("data", "synthetic"),
        mask_values=config.mask_values or search.get("mask_values"),
        resize_longer=config.resize_longer or search.get("resize_longer"),
    )


class SegmentationTraining(DenseTraining):
    """The full training of a segmentation network."""

    settings: DecoderTrainConfig

    def __init__(
        self, config: DecoderTrainConfig, genotype: Genotype, out: Path, runtime: Runtime
    ) -> None:
        assert config.data is not None
        self.genotype = genotype
        splits = load_splits(
            config.data,
            seed=config.seed,
            mask_values=config.mask_values,
            resize_longer=config.resize_longer,
        )
        self.splits, train = splits, splits.train
        # larger would enlarge every image, where validation takes them as they are
        found = [
            config.crop and enlarging("--crop", config.crop, train),
            config.crop_width and enlarging("--crop-width", config.crop_width, train, "width"),
        ]
        self._enlarging = [text for text in found if text]
        crop = config.crop or min(288, shorter_side(train))
        task = SegmentationTask(splits)
        weight = class_weight(task, config.class_balance).to(runtime.device)
        sides = (crop, config.crop_width or crop)
        super().__init__(
            dataclasses.replace(config, crop=crop),
            dataclasses.replace(task, class_weight=weight),
            train,
            splits.val,
            (TrainTransform(sides, crop, config.scales, jitter=config.jitter), ValTransform(None)),
            out,
            runtime,
        )

    def network(self) -> EncoderDecoder:
        settings = self.settings
        encoder = load_encoder(settings.encoder_weights, settings.decoders.rows)
        self._encoder = tensors_fingerprint(encoder.state_dict())
        build, outputs = settings.decoders.build, self.task.outputs
        model = build(encoder, self.genotype, outputs, settings.decoder)
        model.decoder.with_aux = settings.aux_weight > 0
        return model

    def inputs(self, search: Mapping[str, Any]) -> dict[str, str]:
        config, splits, found = self.settings, self.splits, {}
        if all(
            getattr(config, name) == search.get(name)
            for name in ("data", "mask_values", "resize_longer")
        ):
            parts = split_for_search(splits.train, splits.val, seed=search["seed"])
            found["training data"] = parts.search_train.fingerprint()
            found["validation data"] = parts.search_val.fingerprint()
        if str(config.encoder_weights) == str(search.get("encoder_weights")):
            found["encoder"] = self._encoder
        return found

    @property
    def summary(self) -> str:
        return "\n".join([super().summary, *(f"warning: {text}" for text in self._enlarging)])

    def measured(self, scores: SegmentationScores) -> dict[str, Any]:
        names = self.splits.val.classes
        return {
            "genotype": self.genotype.to_json(),
            "class_iou": dict(zip(names, scores.class_iou, strict=True)),
        }

    def described(self, scores: SegmentationScores) -> dict[str, Any]:
        val = self.splits.val
        return {
            "classes": list(val.classes),
            "colors": list(val.colors),
            "mask_values": self.settings.mask_values,
            "resize_longer": self.settings.resize_longer,
            "miou": scores.miou,
            "method": self.settings.decoders.method,
        }

    def text(self, scores: SegmentationScores, split: str) -> str:
        entries = zip(self.splits.val.classes, scores.class_iou, strict=True)
        lines = [
            f"  {name:<16} {'absent' if iou is None else f'{iou:.3f}'}" for name, iou in entries
        ]
        return "\n".join([*lines, f"mIoU {scores.miou:.4f} on {split}"])


def class_weight(task: SegmentationTask, balance: float) -> Tensor:
    """Weight of each class [K] from the training masks, 1 on average over pixels: its frequency to
    the power of minus ``balance``."""
    counts = task.splits.train.label_counts().sum(0)
    frequency = counts[: task.outputs].double()
    frequency /= frequency.sum()
    weight = frequency.clamp(min=1e-4) ** -balance
    return (weight / (weight * frequency).sum()).float()
