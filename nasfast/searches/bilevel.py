"""Bilevel search on a supernet: alphas and betas by one optimizer, weights by another.

IR-NAS (CVPR 2020), section 3, first order. In a step the architecture learns on images of its own
before the weights learn on theirs; the first epochs are for the weights alone. After every epoch
the architecture is derived and recorded.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor

from nasfast.data.restoration import Pictures
from nasfast.models.restorer import Restorer, RestorerConfig
from nasfast.models.supernet import Supernet
from nasfast.runs.records import Evaluation, Record
from nasfast.runs.study import Study
from nasfast.strategies.gradient import Darts, Mix, Relaxation
from nasfast.tasks.restoration.base import (
    ImagePatches,
    RestorationLoss,
    RestorationTask,
    image_generator,
)
from nasfast.tasks.restoration.fidelity import psnr, ssim
from nasfast.training.cost import count_macs, count_parameters
from nasfast.training.loop import NonFiniteLossError, Runtime
from nasfast.utils.cli import say
from nasfast.utils.config import require_positive
from nasfast.utils.seeding import derive_seed

STAGE = "supernet"
"""Name of the one stage in the records."""


@dataclass(frozen=True)
class WeightsConfig:
    """Training of the supernet's weights."""

    optimizer: Literal["sgd", "adam"] = "sgd"
    """sgd: momentum 0.9."""
    lr: float = 0.025
    """Learning rate of the first epoch."""
    min_lr: float = 0.001
    """Learning rate of the last one."""
    cycles: float = 5.0
    """Periods of the cosine over the epochs; 0.5 falls once."""
    weight_decay: float = 3e-4
    """L2 penalty."""

    def __post_init__(self) -> None:
        require_positive(self, "lr", "min_lr", "cycles")

    def lr_at(self, epoch: int, epochs: int) -> float:
        """Learning rate of epoch 1, 2, .. of so many: a cosine that a polynomial damps."""
        cosine = (1 + math.cos(2 * math.pi * self.cycles * epoch / epochs)) / 2
        damped: float = cosine * (1 - epoch / epochs) ** 0.9
        return self.min_lr + (self.lr - self.min_lr) * damped


@dataclass(frozen=True)
class ArchitectureConfig:
    """Training of alphas and betas (Adam)."""

    lr: float = 1e-3
    """Learning rate."""
    weight_decay: float = 1e-3
    """L2 penalty. Logits begin at 1, where the published one exceeds the gradient of the loss
    several times, so that first of all it draws every logit to 0: a short search wants none."""

    def __post_init__(self) -> None:
        require_positive(self, "lr")


@dataclass(frozen=True)
class BilevelConfig:
    """A search by gradient; the defaults are published."""

    epochs: int = 100
    """Passes over the images, at most."""
    warmup: int = 20
    """Epochs before the architecture learns."""
    patience: int = 20
    """Stop when the derived architecture has not changed for so many epochs of its training."""
    batch_size: int = 12
    """Patches a step, of each of both halves of the images."""
    crop: int = 64
    """Side of a patch, in pixels of the target."""
    crops: int = 1
    """Patches of each image in an epoch."""
    ssim_weight: float = 0.6
    """lambda: weight of log10(1 / SSIM) beside the squared error."""
    val_crop: int | None = None
    """Score the supernet on the centre of each validation image, of this side at most; default:
    on whole images."""
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    """Training of the weights."""
    architecture: ArchitectureConfig = field(default_factory=ArchitectureConfig)
    """Training of alphas and betas."""

    def __post_init__(self) -> None:
        require_positive(self, "epochs", "patience", "batch_size", "crop", "crops")
        if not 0 <= self.warmup < self.epochs:
            raise ValueError(
                f"warmup: expected fewer epochs than the {self.epochs} in all, got {self.warmup}"
            )
        if self.val_crop is not None:
            require_positive(self, "val_crop")
        RestorationLoss(self.ssim_weight)


class SupernetSearch:
    """One search, resumable after any epoch.

    Args:
        task: degrades the images.
        halves: images for the weights, images for the architecture.
        val: images that the supernet is scored on.
        model: the supernet; the search places it on the device.
        relaxation: how alphas become factors of operations.
        network: size of the derived networks, for their parameters and multiply-adds.
        config: schedule and losses.
        runtime: device and precision.
        seed: decides patches and what the task draws.
    """

    more = ""

    def __init__(
        self,
        task: RestorationTask,
        halves: tuple[Pictures, Pictures],
        val: Pictures,
        model: Supernet,
        relaxation: Relaxation,
        network: RestorerConfig,
        config: BilevelConfig,
        runtime: Runtime,
        *,
        seed: int,
    ) -> None:
        self.runtime, self.model = runtime, model
        self.inputs: dict[str, str] = {
            "images of the weights": halves[0].fingerprint(),
            "images of the architecture": halves[1].fingerprint(),
            "validation images": val.fingerprint(),
        }
        self._task, self._relaxation = task, relaxation
        self._network, self._config = network, config
        self._weight_patches, self._architecture_patches = (
            ImagePatches(images, task, config.crop, crops=config.crops) for images in halves
        )
        self._val = _centres(task, val, config.val_crop, seed)
        self._size = (val.sizes[0][0] // task.scale, val.sizes[0][1] // task.scale)
        self._loss = RestorationLoss(config.ssim_weight)
        self._seed = seed
        runtime.place(model)
        weights, architecture = config.weights, config.architecture
        decay = weights.weight_decay
        self._weight_optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(model.weights(), weights.lr, momentum=0.9, weight_decay=decay)
            if weights.optimizer == "sgd"
            else torch.optim.Adam(model.weights(), weights.lr, weight_decay=decay)
        )
        self._architecture_optimizer = torch.optim.Adam(
            model.architecture(), architecture.lr, weight_decay=architecture.weight_decay
        )
        self._generators = {
            name: torch.Generator().manual_seed(derive_seed(seed, name))
            for name in ("weights", "architecture")
        }
        self._epoch = 0
        self._path: dict[str, list[Tensor]] = {"alphas": [], "betas": []}

    @property
    def environment(self) -> Mapping[str, object]:
        """The choice of a gradient search is where it ended, not its best score on the way: that
        one measures how far the weights were trained."""
        return {"choice": "last"}

    def close(self) -> None:
        """It has started nothing that would go on."""

    def run(self, study: Study, console: Console) -> None:
        """Search to the last epoch, or until the derived architecture stays the same.

        A checkpoint holds its epoch's record, which follows it to the disk; a crash between the
        two loses neither.

        Raises:
            RuntimeError: records and checkpoint do not belong together.
            NonFiniteLossError: a loss is NaN or infinite.
        """
        self._restore(study)
        while self._epoch < self._config.epochs and self._stable(study) < self._config.patience:
            with console.status(f"epoch {self._epoch + 1} of {self._config.epochs}"):
                record = self._run_epoch(study)
            study.save_checkpoint(self._state_dict() | {"record": record.to_json()})
            study.append(record)
            self._say(study, record, console)
        if self._epoch < self._config.epochs:
            say(
                console,
                f"stopped early: the architecture has been the same for {self._stable(study)} "
                "epochs",
            )

    def _restore(self, study: Study) -> None:
        checkpoint = study.load_checkpoint()
        if checkpoint is not None:
            self._load_state_dict(checkpoint)
            if len(study.records) == self._epoch - 1:
                study.append(Record.from_json(checkpoint["record"]))
        if len(study.records) != self._epoch:
            raise RuntimeError(
                f"{study.path}: expected records of {self._epoch} epochs, which the checkpoint has "
                f"seen, got {len(study.records)}; the records or the checkpoint were edited, start "
                "a new run"
            )

    def _stable(self, study: Study) -> int:
        """Epochs since the derived architecture changed last; the warm-up does not count."""
        learned = study.records[self._config.warmup :]
        last = learned[-1].canonical if learned else None
        changed = [i for i, record in enumerate(learned, 1) if record.canonical != last]
        return max(len(learned) - (changed[-1] if changed else 0) - 1, 0)

    def _run_epoch(self, study: Study) -> Record:
        start = time.perf_counter()
        losses = self._train_epoch()
        self._epoch += 1
        trained = time.perf_counter()
        restored, similarity = self._score()
        alpha_entropy, beta_entropy = self.model.entropies()
        self._path["alphas"].append(self.model.alphas.detach().float().softmax(1).cpu())
        self._path["betas"].append(self.model.move_probabilities().detach().float().cpu())
        genotype = self.model.derive()
        canonical = genotype.canonical().to_json()
        first = next((r for r in study.records if r.canonical == canonical), None)
        network = Restorer(genotype, self._network, self.model.channels, self.model.scale)
        metrics = {
            "psnr": restored,
            "ssim": similarity,
            **losses,
            "alpha_entropy": alpha_entropy,
            "beta_entropy": beta_entropy,
        }
        evaluation = Evaluation(
            rewards={STAGE: similarity + restored / 100},  # as published
            metrics={STAGE: metrics},
            gate=None,
            costs={
                "params": count_parameters(network),
                "macs": count_macs(network, self._size, channels=self.model.channels),
            },
            feedback=STAGE,
            seconds={"train": trained - start, "validate": time.perf_counter() - trained},
        )
        return Record(
            index=self._epoch - 1,
            genotype=genotype.to_json(),
            canonical=canonical,
            seed=self._seed,
            evaluation=evaluation,
            duplicate_of=first.index if first else None,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def _train_epoch(self) -> dict[str, float]:
        """One pass over the images of the weights; mean losses by name."""
        config, model = self._config, self.model
        epoch = self._epoch + 1
        for group in self._weight_optimizer.param_groups:
            group["lr"] = config.weights.lr_at(epoch, config.epochs)
        model.train()
        losses: dict[str, list[Tensor]] = {"loss": []}
        for indices in self._weight_patches.epoch(config.batch_size, self._generators["weights"]):
            self.runtime.heartbeat()
            if epoch > config.warmup:
                losses.setdefault("architecture_loss", []).append(self._architecture_step())
            mix = self._relaxation.weight_step(model.alphas)
            batch = self._weight_patches.batch(indices, self._generators["weights"])
            optimizer = self._weight_optimizer
            losses["loss"].append(self._step(batch, mix, optimizer, model.weights()))
        means = {name: torch.stack(values).mean().item() for name, values in losses.items()}
        for name, mean in means.items():
            if not math.isfinite(mean):
                raise NonFiniteLossError(
                    f"search: the {name.replace('_', ' ')} is {mean} in epoch {epoch}; lower "
                    "--bilevel.weights.lr in a new run. The epochs before it are saved"
                )
        return means

    def _architecture_step(self) -> Tensor:
        """A step of alphas and betas on a fresh batch of their own images; the loss."""
        patches, generator = self._architecture_patches, self._generators["architecture"]
        batch = patches.batch(next(patches.epoch(self._config.batch_size, generator)), generator)
        mix = self._relaxation.architecture_step(self.model.alphas)
        parameters = self.model.architecture()
        loss = self._step(batch, mix, self._architecture_optimizer, parameters)
        self._relaxation.after_architecture_step(self.model.alphas)
        return loss

    def _step(
        self,
        batch: tuple[Tensor, Tensor],
        mix: Mix,
        optimizer: torch.optim.Optimizer,
        parameters: list[torch.nn.Parameter],
    ) -> Tensor:
        """One step of these parameters; gradients of the others are not computed."""
        inputs, targets = (images.to(self.runtime.device) for images in batch)
        with self.runtime.autocast():
            restored = self.model(inputs, mix)
        loss = self._loss(restored, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward(inputs=parameters)  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach()

    @torch.inference_mode()
    def _score(self) -> tuple[float, float]:
        """Mean PSNR (dB) and SSIM on the validation images."""
        self.model.eval()
        alphas = self.model.alphas
        mix = None if isinstance(self._relaxation, Darts) else most_probable(alphas)
        ratios, similarities = [], []
        for inputs, target in self._val:
            self.runtime.heartbeat()
            inputs, target = (image.to(self.runtime.device) for image in (inputs, target))
            with self.runtime.autocast():
                restored = self.model(inputs, mix)
            ratios.append(psnr(restored.float(), target))
            similarities.append(ssim(restored.float(), target))
        return torch.cat(ratios).mean().item(), torch.cat(similarities).mean().item()

    def _say(self, study: Study, record: Record, console: Console) -> None:
        epochs, metrics = self._config.epochs, record.evaluation.metrics[STAGE]
        arch = metrics.get("architecture_loss")
        if record.index < self._config.warmup:
            state = "warm-up"
        elif stable := self._stable(study):
            state = f"same for {stable}"
        else:
            state = "new architecture"
        say(
            console,
            f"[{self._epoch:>{len(str(epochs))}}/{epochs}] loss {metrics['loss']:.4f}"
            f"{'' if arch is None else f' / {arch:.4f}'}  "
            f"{metrics['psnr']:.2f} dB {metrics['ssim']:.4f}  "
            f"entropy {metrics['alpha_entropy']:.3f} {metrics['beta_entropy']:.3f}  "
            f"{sum(record.evaluation.seconds.values()):.1f} s  {state}",
        )

    def _state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self._epoch,
            "model": self.model.state_dict(),
            "weight_optimizer": self._weight_optimizer.state_dict(),
            "architecture_optimizer": self._architecture_optimizer.state_dict(),
            "relaxation": self._relaxation.state_dict(),
            "generators": {name: g.get_state() for name, g in self._generators.items()},
            **{name: torch.stack(path) for name, path in self._path.items()},
        }

    def _load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._epoch = state["epoch"]
        self.model.load_state_dict(state["model"])
        self._weight_optimizer.load_state_dict(state["weight_optimizer"])
        self._architecture_optimizer.load_state_dict(state["architecture_optimizer"])
        self._relaxation.load_state_dict(state["relaxation"])
        for name, generator in self._generators.items():
            generator.set_state(state["generators"][name])
        self._path = {name: list(state[name].unbind()) for name in self._path}


def most_probable(alphas: Tensor) -> Mix:
    """One operation per edge, the one with the largest logit; alphas ``[edges, K]``."""
    chosen = alphas.detach().argmax(1, keepdim=True)
    weights = torch.zeros_like(alphas).scatter(1, chosen, 1.0)
    return Mix(weights, tuple((k,) for k in chosen.flatten().tolist()))


def _centres(
    task: RestorationTask, val: Pictures, side: int | None, seed: int
) -> list[tuple[Tensor, Tensor]]:
    """Degraded and clean centre of each image, ``[1, c, h, w]``, drawn from (seed, name)."""
    pairs = []
    for picture in val:
        planes = [picture.clean] if picture.degraded is None else [picture.clean, picture.degraded]
        if side is not None:
            planes = [_centre(plane, side) for plane in planes]
        generator = image_generator(seed, picture.name)
        degraded, clean = task.pair(planes[0], planes[1] if planes[1:] else None, generator)
        pairs.append((degraded[None], clean[None]))
    return pairs


def _centre(image: Tensor, side: int) -> Tensor:
    """The middle ``[c, side, side]`` of an image, whole along a side that is shorter."""
    top, left = (max(length - side, 0) // 2 for length in image.shape[-2:])
    return image[:, top : top + side, left : left + side]
