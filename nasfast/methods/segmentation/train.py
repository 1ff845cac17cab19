"""Full training of a segmentation network."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import torch
from torch import Tensor

from nasfast.cache import tensors_fingerprint
from nasfast.data import TrainTransform, ValTransform, load_splits, shorter_side, split_for_search
from nasfast.encoders import load_encoder
from nasfast.methods.base import Architecture, TrainSettings, check_same_images
from nasfast.methods.segmentation.crops import enlarging
from nasfast.methods.segmentation.decoders import FAST_NAS, Decoders
from nasfast.models.decoders import FULL_DECODER, DecoderConfig
from nasfast.models.io import MODEL_FILE, save_model
from nasfast.runs.study import PREDICTIONS
from nasfast.spaces.base import Genotype
from nasfast.tasks.base import Targets
from nasfast.tasks.segmentation import SegmentationTask
from nasfast.training.cost import count_macs, count_parameters
from nasfast.training.loop import Group, Runtime, epoch_indices, one_cycle, train_epoch
from nasfast.training.pictures import drawn
from nasfast.utils.config import BatchSize, Bound, Count, MaxNorm, Pixels, Positive, Weight
from nasfast.utils.files import atomic_directory, atomic_write, expanded
from nasfast.utils.seeding import derive_seed


@dataclasses.dataclass(frozen=True)
class DecoderTrainConfig(TrainSettings):
    """Settings of every full training of a segmentation network, whatever its decoder."""

    decoders: ClassVar[Decoders]
    """What the network is one of."""

    encoder_weights: Path | None = None
    """Encoder weights to start from; default: the run's, or the packaged ones."""
    mask_values: str | None = None
    """Values of the classes in the masks: 0,255; default: the search's."""
    resize_longer: Pixels | None = None
    """Images whose longer side has more pixels are reduced to it, to train and to score on;
    default: the search's."""
    epochs: Count = 30
    """Passes over the training images."""
    batch_size: BatchSize = 8
    """Crops per step."""
    crop: Pixels | None = None
    """Side of a crop, in pixels; default: 288, or the shorter side of smaller images."""
    decoder_lr: Positive = 3e-3
    """Peak learning rate of the decoder (AdamW, one cycle to zero)."""
    encoder_lr: Positive = 6e-4
    """Peak learning rate of the encoder."""
    weight_decay: Weight = 1e-4
    """Decoupled weight decay."""
    max_grad_norm: MaxNorm = 3.0
    """Gradients of encoder and of decoder are scaled down to this L2 norm each."""
    aux_weight: Weight = 0.15
    """Weight of each auxiliary head's loss."""
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
    data = config.data or architecture.search.get("data", "synthetic")
    encoder = config.encoder_weights or architecture.search.get("encoder_weights")
    return dataclasses.replace(
        config,
        data=data,
        mask_values=config.mask_values or architecture.search.get("mask_values"),
        resize_longer=config.resize_longer or architecture.search.get("resize_longer"),
        encoder_weights=expanded(encoder).resolve() if encoder else None,
    )


class SegmentationTraining:
    """One full training, which continues from its checkpoint after a stop."""

    def __init__(
        self, config: DecoderTrainConfig, genotype: Genotype, out: Path, runtime: Runtime
    ) -> None:
        assert config.data is not None
        self.config, self.genotype, self.out, self.runtime = config, genotype, out, runtime
        splits = load_splits(
            config.data,
            seed=config.seed,
            mask_values=config.mask_values,
            resize_longer=config.resize_longer,
        )
        self.task = SegmentationTask(splits)
        train = self.task.splits.train
        # larger would enlarge every image, where validation takes them as they are
        self._enlarging = enlarging("--crop", config.crop, train) if config.crop else None
        self.settings = dataclasses.replace(
            config, crop=config.crop or min(288, shorter_side(train))
        )
        torch.manual_seed(derive_seed(config.seed, "train"))
        encoder = load_encoder(config.encoder_weights)
        self._encoder = tensors_fingerprint(encoder.state_dict())
        self.model = config.decoders.build(encoder, genotype, self.task.outputs, config.decoder)
        self.model.decoder.with_aux = config.aux_weight > 0
        runtime.place(self.model)
        self.history: list[dict[str, float]] = []
        self._generator = torch.Generator().manual_seed(derive_seed(config.seed, "order"))
        self._groups = [self._group("decoder"), self._group("encoder")]
        self.task = dataclasses.replace(self.task, class_weight=self._balance())

    def _group(self, part: str) -> Group:
        config = self.config
        parameters = list(self.model.get_submodule(part).parameters())
        lr = config.decoder_lr if part == "decoder" else config.encoder_lr
        optimizer = torch.optim.AdamW(parameters, lr, weight_decay=config.weight_decay, fused=True)
        steps = config.epochs * max(len(self.task.splits.train) // config.batch_size, 1)
        return Group(parameters, optimizer, config.max_grad_norm, one_cycle(optimizer, steps))

    def _balance(self) -> Tensor:
        """Class weights from the training masks, 1 on average over pixels."""
        counts = self.task.splits.train.label_counts().sum(0)
        frequency = counts[: self.task.outputs].double()
        frequency /= frequency.sum()
        weight = frequency.clamp(min=1e-4) ** -self.config.class_balance
        return (weight / (weight * frequency).sum()).float().to(self.runtime.device)

    def inputs(self, search: Mapping[str, Any]) -> dict[str, str]:
        config, splits, found = self.config, self.task.splits, {}
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

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next round depends on."""
        return {
            "data": self.task.splits.train.fingerprint(),
            "model": self.model.state_dict(),
            "optimizers": [group.optimizer.state_dict() for group in self._groups],
            "schedules": [g.schedule.state_dict() for g in self._groups if g.schedule],
            "generator": self._generator.get_state(),
            "history": self.history,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`.

        Raises:
            UserError: the training images are others.
        """
        now = self.task.splits.train.fingerprint()
        check_same_images(self, state.get("data", now), now)  # older checkpoints have none
        self.model.load_state_dict(state["model"])
        for group, optimizer, schedule in zip(
            self._groups, state["optimizers"], state["schedules"], strict=True
        ):
            group.optimizer.load_state_dict(optimizer)
            if group.schedule:
                group.schedule.load_state_dict(schedule)
        self._generator.set_state(state["generator"])
        self.history = state["history"]

    def _loss(self, pair: tuple[Tensor, Targets]) -> Tensor:
        images, targets = pair
        with self.runtime.autocast():
            output, aux = self.model(images)
        return self.task.loss(output, aux, targets, aux_weight=self.config.aux_weight)

    @property
    def done(self) -> int:
        return len(self.history)

    @property
    def rounds(self) -> int:
        return self.config.epochs

    @property
    def summary(self) -> str:
        crops = f"{self.settings.crop} pixels" + (f"; {self._enlarging}" if self._enlarging else "")
        return (
            f"data     {self.config.data}, {len(self.task.splits.train)} images\n"
            f"crops    {crops}\n"
            f"size     {count_parameters(self.model) / 1e6:.2f} M parameters"
        )

    def round(self) -> str:
        """One pass over the training images."""
        config, data, start = self.config, self.task.splits.train, time.perf_counter()
        crop = self.settings.crop
        assert crop is not None
        transform = TrainTransform(crop, crop)
        self.model.train()
        indices = epoch_indices(len(data), config.batch_size, self._generator)
        pairs = self.task.batches(data, indices, transform, self.runtime, self._generator)
        loss = train_epoch(pairs, self._loss, self._groups, self.runtime)
        self.history.append({"loss": loss, "seconds": time.perf_counter() - start})
        return (
            f"epoch {self.done}/{self.rounds}  loss {loss:.4f}  {self.history[-1]['seconds']:.1f} s"
        )

    def finish(self) -> str:
        """Score on the validation split, which no search has seen; write network and metrics."""
        splits, model = self.task.splits, self.model
        scores = self.task.score_images(
            model, splits.val, ValTransform(None), self.runtime, batch_size=1
        )
        height, width = splits.val[0].mask.shape
        metrics: dict[str, Any] = {
            "genotype": self.genotype.to_json(),
            "split": f"val of {splits.val.name}, {len(splits.val)} images",
            **scores.as_dict(),
            "class_iou": dict(zip(splits.val.classes, scores.class_iou, strict=True)),
            "params": count_parameters(model),
            "macs": count_macs(model, (height, width)),
            "size": [height, width],
            "seconds": sum(epoch["seconds"] for epoch in self.history),
            "epochs": len(self.history),
        }
        description = {
            "classes": list(splits.val.classes),
            "colors": list(splits.val.colors),
            "size": [height, width],
            "data": self.config.data,
            "mask_values": self.config.mask_values,
            "resize_longer": self.config.resize_longer,
            "miou": scores.miou,
            "method": self.config.decoders.method,
        }
        save_model(self.out / MODEL_FILE, model, description)
        show, runtime = self.task.show, self.runtime
        files = drawn(lambda: show(model, scores, splits.val, ValTransform(None), runtime))
        atomic_directory(self.out / PREDICTIONS, files)
        atomic_write(self.out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
        lines = [
            f"  {name:<16} {'absent' if iou is None else f'{iou:.3f}'}"
            for name, iou in metrics["class_iou"].items()
        ]
        return "\n".join([*lines, f"mIoU {scores.miou:.4f} on {metrics['split']}"])
