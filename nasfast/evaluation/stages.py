"""The stages of a candidate: a decoder on cached features, then the network end to end.

Section 3.3 of Fast NAS (Nekrasov et al., CVPR 2019), for any dense task.
"""

from __future__ import annotations

import copy
from collections.abc import Generator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from nasfast.evaluation.candidate import SeedOf
from nasfast.evaluation.frozen_encoder import FrozenEncoder, FrozenEncoderConfig
from nasfast.models.decoders import DenseNetwork
from nasfast.tasks.base import DenseTask, Scores, Targets
from nasfast.training.graphs import graphed_step
from nasfast.training.loop import Group, Runtime, epoch_indices, train_epoch
from nasfast.training.polyak import PolyakAverage
from nasfast.utils.config import (
    BatchSize,
    Bound,
    Bounded,
    Count,
    Decay,
    MaxNorm,
    Pixels,
    Positive,
    Weight,
)
from nasfast.utils.errors import UserError


@dataclass(frozen=True)
class FeatureTrainingConfig(FrozenEncoderConfig):
    """A training on cached features of a frozen encoder."""

    epochs: Count = 5
    """Passes over the cache."""
    batch_size: BatchSize = 64
    """Crops per step."""
    lr: Positive = 3e-3
    """Adam's learning rate."""
    weight_decay: Weight = 1e-5
    """Adam's L2 penalty."""
    max_grad_norm: MaxNorm = 3.0
    """Gradients are scaled down to this L2 norm."""
    polyak_decay: Decay = 0.9
    """Decay per step of the weight average, which replaces the weights after every epoch."""
    stop_early: Annotated[float, Bound(0, 1, open="high")] = 0.0
    """Share of the candidates to stop at each rung, such as 0.5: those that score below this
    quantile of the scores that earlier candidates had there. 0 stops none. A stopped one counts in
    the budget; the strategy is told an estimate of its reward."""
    first_rung: Count = 1
    """Epochs before the first rung; each further one comes after twice as many."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stop_early > 0 and not self.rungs:
            raise UserError(
                f"{type(self).__name__}.first_rung: expected fewer than the {self.epochs} epochs "
                f"of the stage, got {self.first_rung}; lower it, or leave stop_early out"
            )

    @property
    def rungs(self) -> list[int]:
        """Epochs after which candidates are scored, and may be stopped."""
        rungs = [self.first_rung << k for k in range(self.epochs.bit_length())]
        return [epoch for epoch in rungs if epoch < self.epochs and self.stop_early > 0]


@dataclass(frozen=True)
class Stage0Config(FeatureTrainingConfig):
    """Decoder alone, on cached features of the frozen encoder."""

    aux_weight: Weight = 0.15
    """Weight of each auxiliary head's loss."""
    kd_weight: Weight = 0.3
    """Weight of the distillation loss where a teacher is given."""


@dataclass(frozen=True)
class Stage1Config(Bounded):
    """Encoder and decoder end to end, for candidates that pass the gate."""

    epochs: Annotated[int, Bound(0, 10**9)] = 1
    """Passes over the training images; 0 leaves the stage out."""
    crop: Pixels = 350
    """Side of a crop, in pixels."""
    shorter_side: Pixels = 400
    """Images are enlarged so that their shorter side has at least this many pixels."""
    batch_size: BatchSize = 32
    """Crops per step."""
    encoder_lr: Positive = 1e-3
    """Learning rate of the encoder."""
    decoder_lr: Positive = 3e-3
    """Learning rate of the decoder's Adam."""
    weight_decay: Weight = 1e-5
    """L2 penalty of both."""
    max_grad_norm: MaxNorm = 3.0
    """Gradients of encoder and of decoder are scaled down to this L2 norm each."""
    polyak_decay: Decay = 0.99
    """Decay per step of the weight average, which replaces the weights wherever they are scored."""
    aux_weight: Weight = 0.15
    """Weight of each auxiliary head's loss."""
    encoder_optimizer: Literal["sgd", "adam"] = "sgd"
    """Of the encoder: SGD with momentum 0.9, or Adam as for the decoder."""
    gate_epochs: bool = False
    """Whether candidates are scored after every epoch, as stages of their own, and stopped after
    the first whose reward does not beat the mean of those before; else once, at the end."""


class DecoderOnFeatures:
    """Trains the decoder alone, on the features of a frozen encoder."""

    def __init__(
        self,
        config: FeatureTrainingConfig,
        features: FrozenEncoder,
        *,
        aux_weight: float = 0.0,
        kd_weight: float = 0.0,
    ) -> None:
        self._config, self._features = config, features
        self._aux_weight, self._kd_weight = aux_weight, kd_weight
        self.names = [*(f"stage0.{epoch}" for epoch in config.rungs), "stage0"]

    def train(self, model: DenseNetwork, seed_of: SeedOf) -> Generator[DenseNetwork]:
        """As `Stage` says; the encoder stays as it is."""
        config, features, decoder = self._config, self._features, model.decoder
        runtime, task = features.runtime, features.task
        decoder.with_aux = self._aux_weight > 0
        runtime.place(decoder)
        parameters = list(decoder.parameters())
        optimizer = _adam(parameters, config.lr, config.weight_decay, runtime)
        average = PolyakAverage(parameters, config.polyak_decay)
        group = Group(parameters, optimizer, config.max_grad_norm)
        generator = torch.Generator().manual_seed(seed_of("stage0"))

        def loss_of(arrays: dict[str, Tensor]) -> Tensor:
            batch = features.split(arrays)
            with runtime.autocast():
                output, aux = decoder(batch.taps)
            return task.loss(
                output,
                aux,
                batch.targets,
                aux_weight=self._aux_weight,
                teacher=batch.teacher,
                kd_weight=self._kd_weight,
            )

        with graphed_step(runtime.device) as graph:
            try:
                for epoch in range(1, config.epochs + 1):
                    decoder.train()
                    order = epoch_indices(config.samples, config.batch_size, generator)
                    batches = features.train_batches(order)
                    train_epoch(batches, loss_of, [group], runtime, average, graph)
                    average.copy_to_parameters()
                    if epoch in config.rungs:
                        yield model
            finally:
                optimizer.zero_grad(set_to_none=True)  # gradients lie in the graph's memory
        yield model

    def validate(self, model: DenseNetwork) -> Scores:
        """As `Stage` says."""
        decoder, features = model.decoder.eval(), self._features
        scores: Scores = features.task.score(
            features.val_batches(), lambda taps: decoder(taps)[0], features.runtime
        )
        return scores

    def show(self, model: DenseNetwork, scores: Scores) -> dict[str, bytes]:
        """As `Stage` says."""
        features, task = self._features, self._features.task
        return task.show(
            model.eval(), scores, task.search_val, features.val_transform, features.runtime
        )


class EndToEnd:
    """Trains encoder and decoder together, on samples by the first of two transforms, and scores
    them on samples by the second."""

    def __init__(
        self,
        config: Stage1Config,
        task: DenseTask[Any],
        transforms: tuple[Any, Any],
        runtime: Runtime,
    ) -> None:
        self._config, self._task, self._runtime = config, task, runtime
        self._train_transform, self._val_transform = transforms
        count = config.epochs if config.gate_epochs else 1
        self.names = [f"stage1.{k}" for k in range(1, count + 1)] if count > 1 else ["stage1"]

    def train(self, model: DenseNetwork, seed_of: SeedOf) -> Generator[DenseNetwork]:
        """As `Stage` says, on a copy: the encoder is every candidate's."""
        config, task, runtime = self._config, self._task, self._runtime
        model = copy.deepcopy(model)
        model.decoder.with_aux = config.aux_weight > 0
        model.encoder.requires_grad_(True)
        generator = torch.Generator().manual_seed(seed_of("stage1"))
        decoder, encoder = (list(part.parameters()) for part in (model.decoder, model.encoder))
        adam = _adam(decoder, config.decoder_lr, config.weight_decay, runtime)
        other = (
            _adam(encoder, config.encoder_lr, config.weight_decay, runtime)
            if config.encoder_optimizer == "adam"
            else torch.optim.SGD(
                encoder, config.encoder_lr, 0.9, weight_decay=config.weight_decay, fused=True
            )
        )
        groups = [
            Group(decoder, adam, config.max_grad_norm),
            Group(encoder, other, config.max_grad_norm),
        ]
        average = PolyakAverage(model.parameters(), config.polyak_decay)

        def loss_of(arrays: dict[str, Tensor]) -> Tensor:
            targets: Targets = dict(arrays)
            images = targets.pop("images")
            with runtime.autocast():
                output, aux = model(images)
            targets = task.resize_targets(targets, (output.shape[-2], output.shape[-1]))
            return task.loss(output, aux, targets, aux_weight=config.aux_weight)

        frames = task.search_train
        with graphed_step(runtime.device) as graph:
            try:
                for left in reversed(range(config.epochs)):
                    model.train()
                    indices = epoch_indices(len(frames), config.batch_size, generator)
                    pairs = task.batches(frames, indices, self._train_transform, runtime, generator)
                    batches = ({"images": images} | targets for images, targets in pairs)
                    train_epoch(batches, loss_of, groups, runtime, average, graph)
                    if config.gate_epochs and left > 0:
                        average.copy_to_parameters()
                        yield model
                average.copy_to_parameters()
            finally:
                model.zero_grad(set_to_none=True)  # gradients lie in the graph's memory
        yield model

    def validate(self, model: DenseNetwork) -> Scores:
        """As `Stage` says."""
        task = self._task
        scores: Scores = task.score_images(
            model, task.search_val, self._val_transform, self._runtime
        )
        return scores

    def show(self, model: DenseNetwork, scores: Scores) -> dict[str, bytes]:
        """As `Stage` says."""
        task = self._task
        return task.show(model, scores, task.search_val, self._val_transform, self._runtime)


def _adam(
    parameters: list[nn.Parameter], lr: float, weight_decay: float, runtime: Runtime
) -> torch.optim.Adam:
    graphs = runtime.device.type == "cuda"
    return torch.optim.Adam(
        parameters, lr, weight_decay=weight_decay, fused=True, capturable=graphs
    )
