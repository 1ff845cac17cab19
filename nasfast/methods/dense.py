"""Full training of a network for a dense task: an encoder and a decoder, epoch by epoch."""

from __future__ import annotations

import dataclasses
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nasfast.cache import tensors_fingerprint
from nasfast.methods.base import TrainSettings, check_same_images
from nasfast.models.io import MODEL_FILE, load_teacher, save_model
from nasfast.models.layers import resize
from nasfast.runs.study import PREDICTIONS
from nasfast.tasks.base import DenseTask, Frames, Scores, Targets, pad_images, prepare_images
from nasfast.training import processes
from nasfast.training.ahead import ahead
from nasfast.training.cost import count_macs, count_parameters
from nasfast.training.graphs import GraphedStep, graphed_step
from nasfast.training.loop import (
    Group,
    Precision,
    Runtime,
    Schedule,
    epoch_indices,
    scheduled,
    train_epoch,
)
from nasfast.training.pictures import drawn
from nasfast.training.polyak import WeightAverage
from nasfast.utils.config import BatchSize, Bound, Count, Decay, MaxNorm, Pixels, Positive, Weight
from nasfast.utils.errors import UserError
from nasfast.utils.files import atomic_directory, atomic_write, expanded
from nasfast.utils.seals import sealed_json
from nasfast.utils.seeding import derive_seed

IMAGES = "images"
"""Of a batch, beside its targets."""
VALIDATION_BATCH = 8  # images of one size, on a GPU; a CPU is as fast with one
Scale = Annotated[float, Bound(0.05, 20)]
"""Factor of an image's sides."""


@dataclasses.dataclass(frozen=True)
class DenseTrainConfig(TrainSettings):
    """Settings of the full training of any dense task."""

    encoder_weights: Path | None = None
    """Encoder weights to start from; default: the run's, or the packaged ones."""
    epochs: Count = 30
    """Passes over the training images."""
    batch_size: BatchSize = 8
    """Crops per step, of all processes together."""
    crop: Pixels | None = None
    """Height of a crop, in pixels; default: 288, or the shorter side of smaller images."""
    crop_width: Pixels | None = None
    """Width of a crop; default: its height."""
    scales: tuple[Scale, Scale] = (0.7, 1.4)
    """Range of the factors that images are resized by; raised where a crop would not fit."""
    jitter: Annotated[float, Bound(0, 1)] = 0.0
    """Brightness, contrast and saturation are multiplied by random factors, 1 +- this at most."""
    decoder_lr: Positive = 3e-3
    """Peak learning rate of the decoder (AdamW)."""
    encoder_lr: Positive = 6e-4
    """Peak learning rate of the encoder."""
    schedule: Schedule = "one-cycle"
    """Fall of the learning rates to zero: one-cycle and cosine, a cosine; poly, (1 - t) ** 0.9. Or
    steps: a tenth from 2/3 and a hundredth from 8/9 of the training."""
    warmup: Annotated[float, Bound(0, 1)] | None = None
    """Share of the steps in which they rise before; default: 0.1 for one-cycle, else 0."""
    warmup_from: Annotated[float, Bound(0, 1)] = 0.0
    """Share of the peak that they rise from."""
    freeze_epochs: Annotated[int, Bound(0, 10**9)] = 0
    """First epochs in which the decoder learns alone, on the encoder as it is given."""
    weight_decay: Weight = 1e-4
    """Decoupled weight decay."""
    max_grad_norm: MaxNorm = 3.0
    """Gradients of encoder and of decoder are scaled down to this L2 norm each."""
    aux_weight: Weight = 0.15
    """Weight of each auxiliary head's loss."""
    teacher: Path | None = None
    """model.safetensors of the same classes, of any architecture, whose output is imitated too."""
    kd_weight: Weight = 0.3
    """Weight of the squared distance to the teacher's output."""
    ema: Decay = 0.0
    """Decay of the running average of the weights, which is scored and saved; 0: no average."""
    accumulate: BatchSize = 1
    """Parts of a batch that go through the network one by one, for less memory. The gradient is the
    batch's, but BatchNorm sees a part at a time."""
    precision: Precision = "auto"
    """Of training steps; auto: bfloat16 where the device has it. Scores are always in auto."""
    val_every: Count = 5
    """Epochs between two validations; the last epoch is always validated."""
    keep: Literal["last", "best"] = "last"
    """Whose weights to save: the last epoch's, or those of the best validation. The latter's scores
    on val are chosen among many, and so too good for new images; judge it on a test part."""
    loaders: Annotated[int, Bound(0, 256)] | None = None
    """Threads that prepare batches ahead; default: up to 4 beside a GPU, else 0. Results do not
    depend on it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scales[0] > self.scales[1]:
            low, high = self.scales
            raise UserError(f"scales: expected LOW <= HIGH, got {low} {high}; exchange them")
        if self.freeze_epochs > self.epochs:
            raise UserError(
                f"freeze_epochs: expected at most the {self.epochs} epochs of the training, got "
                f"{self.freeze_epochs}; lower it"
            )


class Batch(NamedTuple):
    """Samples of a step, and the seeds of their augmentation."""

    indices: list[int]
    seeds: list[int]


class DenseTraining(ABC):
    """One full training, which continues from its checkpoint after a stop.

    It knows the task by `DenseTask` alone, and of the network that it has an ``encoder`` and a
    ``decoder`` and gives an output and, in training, auxiliary ones. The augmentation of a sample
    depends on the seed and the epoch alone, so that neither threads nor processes change results.

    Args:
        settings: fitted to the data.
        task: what is learned.
        train: part of its data to learn from.
        val: part to score on.
        transforms: of the samples of both.
        out: where the result goes.
        runtime: device.
    """

    def __init__(
        self,
        settings: DenseTrainConfig,
        task: DenseTask[Any],
        train: Frames,
        val: Frames,
        transforms: tuple[Any, Any],
        out: Path,
        runtime: Runtime,
    ) -> None:
        self._settings, self.task, self.out, self.runtime = settings, task, out, runtime
        self.train, self.val = train, val
        self._train_transform, self._val_transform = transforms
        self._check_parts()
        torch.manual_seed(derive_seed(settings.seed, "train"))
        self.model = self.network()
        runtime.place(self.model)
        processes.synchronize(self.model, runtime.device)
        self.teacher = self._load_teacher()
        self.history: list[dict[str, Any]] = []
        stop = processes.together(runtime.heartbeat, runtime.device)
        self._stepping = dataclasses.replace(runtime, heartbeat=stop, choice=settings.precision)
        # the other processes wait meanwhile, so a stop has to wait for the next step
        alone = processes.size() == 1
        self._scoring = runtime if alone else Runtime(runtime.device)
        self._generator = torch.Generator().manual_seed(derive_seed(settings.seed, "order"))
        epochs = {"decoder": settings.epochs, "encoder": settings.epochs - settings.freeze_epochs}
        self._groups = [self._group(part, count) for part, count in epochs.items()]
        self._average = WeightAverage(self.model, settings.ema) if settings.ema else None
        self._best: dict[str, Any] | None = None
        self._graph: tuple[ExitStack, GraphedStep | None, bool] | None = None

    @abstractmethod
    def network(self) -> nn.Module:
        """The network before its training, of a class in `nasfast.models.build.FAMILIES`; random
        weights are drawn from torch's default generator, which is seeded."""

    @abstractmethod
    def inputs(self, search: Mapping[str, Any]) -> Mapping[str, str]:
        """See `nasfast.methods.base.Training.inputs`."""

    @abstractmethod
    def measured(self, scores: Any) -> dict[str, Any]:
        """What metrics.json says beside the scores by `Scores.as_dict`, as plain JSON."""

    @abstractmethod
    def described(self, scores: Any) -> dict[str, Any]:
        """What the model file says beside data and size, as plain JSON."""

    @property
    def settings(self) -> DenseTrainConfig:
        return self._settings

    def _check_parts(self) -> None:
        parts = self.settings.accumulate * processes.size()
        batch = min(self.settings.batch_size, len(self.train))
        if batch < parts:
            raise UserError(
                f"batch_size: expected at least {parts} crops, one for each of "
                f"{processes.size()} processes x {self.settings.accumulate} parts (accumulate), "
                f"got {batch}; raise it, or lower those"
            )
        if batch % processes.size():
            raise UserError(
                f"batch_size: expected a multiple of the {processes.size()} processes, which get "
                f"equal parts, got {batch}; change it"
            )

    def _load_teacher(self) -> nn.Module | None:
        if self.settings.teacher is None:
            return None
        processor = self.task.processor
        teacher = load_teacher(self.settings.teacher, processor.classes, processor.task)
        self._teacher_print = tensors_fingerprint(teacher.state_dict())
        return self.runtime.place(teacher.requires_grad_(False))

    def _group(self, part: str, epochs: int) -> Group:
        settings, device = self.settings, self.runtime.device
        cuda = device.type == "cuda"
        parameters = [p for p in self.model.get_submodule(part).parameters() if p.requires_grad]
        lr: Any = settings.decoder_lr if part == "decoder" else settings.encoder_lr
        optimizer = self.optimizer(parameters, torch.tensor(lr, device=device) if cuda else lr)
        steps = epochs * max(len(self.train) // settings.batch_size, 1)
        schedule = scheduled(
            optimizer, settings.schedule, max(steps, 1), settings.warmup, settings.warmup_from
        )
        return Group(parameters, optimizer, settings.max_grad_norm, schedule)

    def optimizer(self, parameters: list[nn.Parameter], lr: Any) -> torch.optim.Optimizer:
        """That of an encoder or a decoder.

        Args:
            parameters: that it moves.
            lr: a tensor on CUDA, where steps are recorded.
        """
        cuda, decay = self.runtime.device.type == "cuda", self.settings.weight_decay
        return torch.optim.AdamW(parameters, lr, weight_decay=decay, fused=True, capturable=cuda)

    # ---- what a training continues from

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next round depends on."""
        return {
            "data": self.train.fingerprint(),
            "teacher": self._teacher_print if self.teacher else None,
            "model": self.model.state_dict(),
            "optimizers": [group.optimizer.state_dict() for group in self._groups],
            "schedules": [g.schedule.state_dict() for g in self._groups if g.schedule],
            "average": self._average.state_dict() if self._average else None,
            "best": self._best,
            "generator": self._generator.get_state(),
            "history": self.history,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`.

        Raises:
            UserError: the training images or the teacher are others.
        """
        now = self.train.fingerprint()
        check_same_images(self, state.get("data", now), now)  # older checkpoints have none
        if self.teacher is not None and state["teacher"] != self._teacher_print:
            raise UserError(
                f"resume {self.out}: expected the teacher that it began with, got other weights in "
                f"{self.settings.teacher}; restore them or start a new training"
            )
        self.model.load_state_dict(state["model"])
        for group, optimizer, schedule in zip(
            self._groups, state["optimizers"], state["schedules"], strict=True
        ):
            group.optimizer.load_state_dict(optimizer)
            for own in group.optimizer.param_groups:
                if isinstance(own["lr"], Tensor):
                    own["lr"] = own["lr"].to(self.runtime.device)
            if group.schedule:
                group.schedule.load_state_dict(schedule)
        if self._average:
            self._average.load_state_dict(state["average"])
        self._best = state.get("best")
        self._generator.set_state(state["generator"])
        self.history = state["history"]

    # ---- training

    @property
    def done(self) -> int:
        return len(self.history)

    @property
    def rounds(self) -> int:
        return self.settings.epochs

    @property
    def seen(self) -> str:
        """What the network sees of the images in training, as a line of `summary`."""
        settings = self.settings
        return f"crops    {settings.crop} x {settings.crop_width or settings.crop} pixels"

    @property
    def summary(self) -> str:
        settings = self.settings
        lines = [
            f"data     {settings.data}, {len(self.train)} {self.task.samples}",
            self.seen,
            f"size     {count_parameters(self.model) / 1e6:.2f} M parameters",
        ]
        return "\n".join(lines)

    def round(self) -> str:
        """One pass over the training images, and at times a validation."""
        start, settings = time.perf_counter(), self.settings
        frozen = self.done < settings.freeze_epochs
        self.learning(frozen)
        groups = self._groups[:1] if frozen else self._groups
        loss = train_epoch(
            self._batches(),
            self._losses,
            groups,
            self._stepping,
            graph=self._step_of(frozen),
            gathered=lambda: processes.sum_gradients(p for g in groups for p in g.parameters),
            after=self._average.update if self._average else lambda: None,
        )
        loss = processes.summed(torch.tensor(loss, device=self.runtime.device)).item()
        entry: dict[str, Any] = {"loss": loss}
        line = f"epoch {self.done + 1}/{self.rounds}  loss {loss:.4f}"
        last = self.done + 1 == self.rounds
        if processes.rank() == 0 and (last or (self.done + 1) % settings.val_every == 0):
            entry["val"], first = self._validate()
            line += f"  val {first}"
        entry["seconds"] = time.perf_counter() - start
        self.history.append(entry)
        return f"{line}  {entry['seconds']:.1f} s"

    def learning(self, frozen: bool) -> None:
        """Put the network into training mode, its encoder only where it is not frozen."""
        self.model.train()
        self.model.get_submodule("encoder").train(not frozen)
        for parameter in self._groups[1].parameters:
            parameter.requires_grad_(not frozen)

    def _step_of(self, frozen: bool) -> GraphedStep | None:
        """What repeats the steps of a phase; a phase has its own."""
        if self._graph is None or self._graph[2] != frozen:
            self._close()
            stack = ExitStack()
            alone = processes.size() == 1  # sums over processes are not recorded
            graph = stack.enter_context(graphed_step(self.runtime.device)) if alone else None
            self._graph = stack, graph, frozen
        return self._graph[1]

    def _close(self) -> None:
        if self._graph is not None:
            self.model.zero_grad(set_to_none=True)
            self._graph[0].close()
            self._graph = None

    def _batches(self) -> Iterator[Targets]:
        """Prepared images and targets of an epoch's steps, on the device."""
        settings, cuda = self.settings, self.runtime.device.type == "cuda"
        plan = []
        for indices in epoch_indices(len(self.train), settings.batch_size, self._generator):
            seeds = torch.randint(2**62, (len(indices),), generator=self._generator)
            plan.append(Batch(*(processes.share(each).tolist() for each in (indices, seeds))))
        threads = settings.loaders
        if threads is None:
            threads = min(4, os.cpu_count() or 1) if cuda else 0
        for loaded in ahead(self._load, plan, threads):
            images, targets = self._on_device(*loaded)
            yield {IMAGES: images, **self.prepared(images, targets)}

    def prepared(self, images: Tensor, targets: Targets) -> Targets:
        """The targets of a step's images as the criterion takes them, on the device."""
        return targets

    def _load(self, batch: Batch) -> tuple[Tensor, Targets]:
        """Augmented samples, images uint8 ``[N, 3, H, W]``, padded, on the CPU."""
        loaded = [
            self.task.load_batch(
                self.train, [index], self._train_transform, torch.Generator().manual_seed(seed)
            )
            for index, seed in zip(batch.indices, batch.seeds, strict=True)
        ]
        return self.joined(loaded)

    def joined(self, loaded: list[tuple[Tensor, Targets]]) -> tuple[Tensor, Targets]:
        """One batch, padded, of loaded samples."""
        images = pad_images(torch.cat([images for images, _ in loaded]))
        names = loaded[0][1]
        targets = {name: torch.cat([targets[name] for _, targets in loaded]) for name in names}
        return images, self.task.pad_targets(targets, (images.shape[-2], images.shape[-1]))

    def _losses(self, batch: Targets) -> Iterator[Tensor]:
        """Shares of the parts in the loss of the whole batch, of all processes."""
        parts = self.settings.accumulate
        if parts == 1 and processes.size() == 1:
            yield self._loss(batch, None)
            return
        targets = {name: target for name, target in batch.items() if name != IMAGES}
        whole = processes.summed(self._weight(targets))
        whole = whole + (whole == 0)
        for chunks in zip(*(values.tensor_split(parts) for values in batch.values()), strict=True):
            part = dict(zip(batch, chunks, strict=True))
            targets = {name: target for name, target in part.items() if name != IMAGES}
            yield self._loss(part, self._weight(targets) / whole)

    def _weight(self, targets: Targets) -> Tensor:
        """[k + 1]: what the task's criterion and the distillation are means over."""
        weight = self.task.weight(targets).reshape(-1)
        return torch.cat([weight, weight.new_full((1,), len(next(iter(targets.values()))))])

    def _loss(self, batch: Targets, shares: Tensor | None) -> Tensor:
        settings = self.settings
        targets = {name: target for name, target in batch.items() if name != IMAGES}
        with self._stepping.autocast():
            output, aux = self.model(batch[IMAGES])
        own = None if shares is None else shares[:-1]
        loss = self.task.loss(output, aux, targets, aux_weight=settings.aux_weight, shares=own)
        if self.teacher is not None:
            with torch.no_grad(), self._stepping.autocast():
                wanted = self.teacher(batch[IMAGES])[0].float()
            student = resize(output.float(), (wanted.shape[-2], wanted.shape[-1]))
            weight = settings.kd_weight if shares is None else settings.kd_weight * shares[-1]
            loss = loss + weight * F.mse_loss(student, wanted)
        return loss

    # ---- validation

    def _validate(self) -> tuple[dict[str, float], str]:
        """Scores by name, and the first of them as text; the best network so far is kept."""
        with self._average.applied() if self._average else nullcontext():
            self.model.eval()
            scores: Scores = self.task.score(
                self._validation(), lambda images: self.model(images)[0], self._scoring
            )
            better = self._best is None or scores.reward > self._best["reward"]
            if self.settings.keep == "best" and better:
                weights = {k: v.cpu().clone() for k, v in self.model.state_dict().items()}
                self._best = {"epoch": self.done + 1, "reward": scores.reward, "model": weights}
        found = scores.as_dict()
        name, value = next(iter(found.items()))
        return found, f"{name} {value:.4f}"

    def _validation(self) -> Iterator[tuple[Tensor, Targets]]:
        """Whole images, those of one size that follow each other together on a GPU."""
        most = VALIDATION_BATCH if self.runtime.device.type == "cuda" else 1
        group: list[tuple[Tensor, Targets]] = []
        for index in range(len(self.val)):
            images, targets = self.task.load_batch(self.val, [index], self._val_transform)
            if group and (len(group) == most or images.shape != group[0][0].shape):
                yield self._on_device(*self.joined(group))
                group = []
            group.append((images, targets))
        yield self._on_device(*self.joined(group))

    def _on_device(self, images: Tensor, targets: Targets) -> tuple[Tensor, Targets]:
        moved = {name: self.runtime.move(target) for name, target in targets.items()}
        return prepare_images(images, self.runtime), moved

    def finish(self) -> str:
        """Score on the validation split, which no search has seen; write network and metrics."""
        self._close()
        if self._best is not None:
            self.model.load_state_dict(self._best["model"])
        averaged = self._average is not None and self._best is None
        with self._average.applied() if averaged and self._average else nullcontext():
            return self._finish()

    def _finish(self) -> str:
        model, task, val, runtime = self.model, self.task, self.val, self.runtime
        scores = task.score_images(model, val, self._val_transform, runtime, batch_size=1)
        images, _ = task.load_batch(val, [0], self._val_transform)
        size = (images.shape[-2], images.shape[-1])
        kept = self._best["epoch"] if self._best else self.done
        split = f"val of {val.name}, {len(val)} {task.samples}"
        if self._best:
            split += f", which epoch {kept} of {self.done} was chosen on"
        metrics: dict[str, Any] = {
            "split": split,
            **scores.as_dict(),
            **self.measured(scores),
            "params": count_parameters(model),
            "macs": count_macs(model, size),
            "size": list(size),
            "seconds": sum(epoch["seconds"] for epoch in self.history),
            "epochs": self.done,
            "kept_epoch": kept,
            "losses": [epoch["loss"] for epoch in self.history],
            "validation": [
                {"epoch": number, **epoch["val"]}
                for number, epoch in enumerate(self.history, 1)
                if "val" in epoch
            ],
        }
        description = {**self.described(scores), "size": list(size), "data": self.settings.data}
        save_model(self.out / MODEL_FILE, model, description)
        files = drawn(lambda: task.show(model, scores, val, self._val_transform, runtime))
        atomic_directory(self.out / PREDICTIONS, files)
        atomic_write(self.out / "metrics.json", sealed_json(metrics))
        return self.text(scores, split)

    def text(self, scores: Any, split: str) -> str:
        """What a person reads of the result."""
        name, value = next(iter(scores.as_dict().items()))
        return f"{name} {value:.4f} on {split}"


def located(config: Any, encoder_weights: str | Path | None) -> Any:
    """The settings with their files' absolute paths; the weights unless they say which."""
    weights = config.encoder_weights or encoder_weights
    return dataclasses.replace(
        config,
        encoder_weights=expanded(weights).resolve() if weights else None,
        teacher=expanded(config.teacher).resolve() if config.teacher else None,
    )
