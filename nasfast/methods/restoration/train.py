"""Full training of a restoration network."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from nasfast.methods.base import Architecture, TrainSettings, check_same_images
from nasfast.methods.restoration.size import Size, parameters_by_width, sized
from nasfast.methods.restoration.task_flags import override_with_task, parse_with_task
from nasfast.models.io import MODEL_FILE, save_model
from nasfast.models.restorer import Restorer, RestorerConfig
from nasfast.runs.study import PREDICTIONS
from nasfast.spaces.ir_nas import IRNASGenotype
from nasfast.tasks.restoration import RestorationTask, task_from_json
from nasfast.tasks.restoration.denoising import Denoising
from nasfast.tasks.restoration.loss import RestorationLoss
from nasfast.tasks.restoration.patches import ImagePatches, patch_side
from nasfast.tasks.restoration.pictures import before_and_after
from nasfast.tasks.restoration.scoring import costs, evaluate, input_size
from nasfast.training import batch_norm, processes
from nasfast.training.cost import count_parameters
from nasfast.training.loop import Group, NonFiniteLossError, Runtime, one_cycle, train_epoch
from nasfast.training.pictures import SAMPLES, drawn, spread
from nasfast.utils.cli import flag_value
from nasfast.utils.config import (
    BatchSize,
    Bound,
    Bounded,
    Count,
    MaxNorm,
    Pixels,
    Positive,
    Weight,
    from_mapping,
)
from nasfast.utils.errors import UserError
from nasfast.utils.files import atomic_directory, atomic_write
from nasfast.utils.seals import sealed_json
from nasfast.utils.seeding import derive_seed


@dataclass(frozen=True)
class Recipe(Bounded):
    """How a network is trained; the defaults are those of ``quick``."""

    steps: Count = 3000
    """Optimisation steps."""
    batch_size: BatchSize = 8
    """Patches per step."""
    crop: Pixels = 48
    """Side of a patch, in pixels of the target; so many times as long as --network.reduction, as
    far as the images go."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """adamw: one cycle to zero. sgd: momentum 0.9, polynomial decay of power 0.9, biases at twice
    the learning rate and without weight decay, as published."""
    lr: Positive = 0.1
    """Learning rate: the peak of adamw, which BatchNorm lets be large; the start of sgd."""
    weight_decay: Weight = 1e-4
    """Of adamw decoupled, of sgd an L2 penalty."""
    max_grad_norm: MaxNorm = 1.0
    """Gradients are scaled down to this L2 norm."""
    ssim_weight: Weight = 0.0
    """lambda: weight of log10(1 / SSIM) beside the squared error."""
    frozen_norm: Annotated[float, Bound(0, 1, open="high")] = 0.1
    """Share of the steps, the last ones, in which BatchNorm normalises by statistics that stay:
    those of many patches, measured right before. A few patches differ much from whole images."""


@dataclass(frozen=True)
class TrainConfig(Recipe, TrainSettings):
    """Settings of a full training; a preset gives the defaults."""

    preset: Literal["demo", "quick", "paper"] = "quick"
    """demo: seconds. quick: some ten minutes on two cores. paper: the published 600,000 steps, for
    a GPU. Default: that of the search."""
    task: RestorationTask = field(default_factory=Denoising)
    """What the network restores: --task NAME; default: what it was searched for."""
    channels: Literal[1, 3] = 1
    """1: grey. 3: colour. Default: those of the search; 3 for dehazing."""
    network: RestorerConfig = field(default_factory=RestorerConfig)
    """Size of the network; default: that of the search, or the published one."""
    params: str | int | None = None
    """Number of parameters, such as 0.5M; the width is the one that comes closest. Default: that of
    the search, where it fitted the widths; none where --network.width is given."""
    round_steps: Count = 200
    """Steps between two checkpoints."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.task, RestorationTask):  # its description, from a file
            object.__setattr__(self, "task", task_from_json(self.task))
        if self.params is not None and self.size.target is None:
            raise UserError(
                f"params: expected a number of parameters, such as 0.5M, got {self.params!r}; one "
                "network has no range of sizes"
            )

    @property
    def size(self) -> Size:
        """Parameters of the network; UserError for another form."""
        return Size.of(self.params)


CALIBRATION = 32
"""Batches that statistics of BatchNorm are measured on, before they stay."""
PUBLISHED = Recipe(
    steps=600_000,
    batch_size=12,
    crop=64,
    optimizer="sgd",
    lr=0.05,
    weight_decay=4e-5,
    max_grad_norm=math.inf,
    ssim_weight=0.6,
    frozen_norm=0.0,
)
FIRST = (
    "source",
    "rank",
    "data",
    "out",
    "preset",
    "task",
    "params",
    "steps",
    "batch_size",
    "lr",
    "device",
    "seed",
)
"""What ``--help`` describes."""
PRESETS = {"demo": Recipe(steps=300, batch_size=4), "quick": Recipe(), "paper": PUBLISHED}


def parse_train(
    argv: Sequence[str], found: Mapping[str, Any], description: str | None
) -> TrainConfig:
    """Settings from a command line; the source's own are the defaults."""
    default = _default(tyro.MISSING, flag_value(argv, "--preset"), found, sized(argv))
    return parse_with_task(default, argv, "nasfast train", description, FIRST)


def train_with(source: Path, settings: Mapping[str, Any], found: Mapping[str, Any]) -> TrainConfig:
    """Settings by name; the source's own are the defaults."""
    default = _default(source, settings.get("preset"), found, sized(settings))
    return override_with_task(default, settings, "train")


def _default(
    source: Path, preset: str | None, found: Mapping[str, Any], sized: bool
) -> TrainConfig:
    """Those of the search, but for a size where another is given."""
    chosen = preset or found.get("preset")
    name: Any = chosen if chosen in PRESETS else "quick"
    params = None if sized else found.get("params")
    return TrainConfig(
        source=source,
        preset=name,
        task=task_from_json(found["task"]) if "task" in found else Denoising(),
        channels=found.get("channels", 1),
        network=from_mapping(RestorerConfig, found.get("network", {}), "network"),
        params=params if Size.of(params).target else None,
        **dataclasses.asdict(PRESETS[name]),
    )


def resolve(config: TrainConfig, architecture: Architecture) -> TrainConfig:
    """Fill in the data of the search."""
    return dataclasses.replace(
        config, data=config.data or architecture.search.get("data", "synthetic")
    )


class TrainingRun:
    """Optimisation steps on random patches, resumable after any of them.

    Args:
        model: the network, on the runtime's device.
        patches: where it learns.
        recipe: how.
        runtime: device and precision.
        seed: decides patches and what the task draws.
    """

    def __init__(
        self, model: Restorer, patches: ImagePatches, recipe: Recipe, runtime: Runtime, seed: int
    ) -> None:
        self.model, self.patches, self.recipe, self.runtime = model, patches, recipe, runtime
        self.steps = 0
        self._loss_of = RestorationLoss(recipe.ssim_weight)
        self._generator = torch.Generator().manual_seed(seed)
        self._optimizer, self._schedule = _optimizer(model, recipe)
        parameters = list(model.parameters())
        self._group = Group(parameters, self._optimizer, recipe.max_grad_norm, self._schedule)

    def run(self, steps: int) -> float:
        """Train for up to this many steps, no further than the recipe says; the mean loss.

        Raises:
            NonFiniteLossError: the loss is NaN or infinite.
        """
        end = min(self.steps + steps, self.recipe.steps)
        total, start = 0.0, self.steps
        for part in (min(end, self._frozen_from), end):
            if count := max(part - self.steps, 0):
                total += count * self._train(count)
        return total / max(end - start, 1)

    @property
    def _frozen_from(self) -> int:
        """The step before which statistics of BatchNorm are measured, to stay."""
        return self.recipe.steps - round(self.recipe.frozen_norm * self.recipe.steps)

    def _train(self, steps: int) -> float:
        """Steps that are all with moving statistics, or all with fixed ones."""
        self.model.train()
        if self.steps == self._frozen_from:
            passes = min(CALIBRATION, self.steps)
            batch_norm.measure(self.model, lambda: self._forward(self._batch()[0]), passes)
        if self.steps >= self._frozen_from:
            batch_norm.freeze(self.model)
        batches = (self._batch() for _ in range(steps))
        loss = train_epoch(batches, self._loss, [self._group], self.runtime)
        self.steps += steps
        return loss

    def _batch(self) -> tuple[Tensor, Tensor]:
        count = (self.recipe.batch_size,)
        indices = torch.randint(len(self.patches), count, generator=self._generator)
        inputs, targets = self.patches.batch(indices, self._generator)
        return inputs.to(self.runtime.device), targets.to(self.runtime.device)

    def _loss(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = pair
        return self._loss_of(self._forward(inputs), targets)

    def _forward(self, inputs: Tensor) -> Tensor:
        with self.runtime.autocast():
            restored: Tensor = self.model(inputs)
        return restored

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {
            "steps": self.steps,
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.steps = state["steps"]
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self._generator.set_state(state["generator"])


def _optimizer(model: Restorer, recipe: Recipe) -> tuple[torch.optim.Optimizer, LambdaLR]:
    lr, decay, steps = recipe.lr, recipe.weight_decay, recipe.steps
    optimizer: torch.optim.Optimizer
    if recipe.optimizer == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=decay, fused=True)
        return optimizer, one_cycle(optimizer, steps)
    names = dict(model.named_parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in names.items() if not name.endswith("bias")]},
        {
            "params": [p for name, p in names.items() if name.endswith("bias")],
            "lr": 2 * lr,
            "weight_decay": 0.0,
        },
    ]
    optimizer = torch.optim.SGD(groups, lr, momentum=0.9, weight_decay=decay, fused=True)
    return optimizer, LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps) ** 0.9)


class RestorationTraining:
    """One full training, a checkpoint every `round_steps` steps."""

    def __init__(
        self, config: TrainConfig, genotype: IRNASGenotype, out: Path, runtime: Runtime
    ) -> None:
        processes.require_one("restoration")
        config.task.require_reduction(config.network.reduction)
        config = dataclasses.replace(
            config,
            crop=config.task.fitting(config.crop),
            network=config.size.fitted(
                genotype, config.network, config.channels, config.task.scale
            ),
        )
        config.size.require(
            parameters_by_width(genotype, config.network, config.channels, config.task.scale)(
                config.network.width
            )
        )
        assert config.data is not None
        self.data = config.task.open(config.data, config.channels)
        self._given = config.task
        config = dataclasses.replace(config, task=config.task.of(self.data.train))
        self.settings, self.genotype, self.out, self.runtime = config, genotype, out, runtime
        for part in (self.data.val, self.data.train):
            part.read_all()  # a damaged file is not found out after hours
        self.side = patch_side(config.crop, config.network.reduction, self.data.train)
        patches = ImagePatches(self.data.train, config.task, self.side)
        torch.manual_seed(derive_seed(config.seed, "train"))
        self.model = Restorer(genotype, config.network, config.channels, config.task.scale)
        runtime.place(self.model)
        seed = derive_seed(config.seed, "patches")
        self.training = TrainingRun(self.model, patches, config, runtime, seed)
        self.history: list[dict[str, float]] = []

    @property
    def done(self) -> int:
        return len(self.history)

    @property
    def rounds(self) -> int:
        return math.ceil(self.settings.steps / self.settings.round_steps)

    @property
    def summary(self) -> str:
        return (
            f"task     {self.settings.task.instead_of(self._given)}\n"
            f"data     {self.settings.data}, {len(self.data.train)} images\n"
            f"patches  {self.side} pixels\n"
            f"size     {count_parameters(self.model):,} parameters, width "
            f"{self.settings.network.width}"
        )

    def round(self) -> str:
        """Train up to the next checkpoint.

        Raises:
            UserError: the loss is NaN or infinite.
        """
        start = time.perf_counter()
        try:
            loss = self.training.run(self.settings.round_steps)
        except NonFiniteLossError as error:
            raise UserError(f"{error}; lower --lr in a new training") from error
        self.history.append({"loss": loss, "seconds": time.perf_counter() - start})
        return (
            f"step {self.training.steps}/{self.settings.steps}  loss {loss:.5f}  "
            f"{self.history[-1]['seconds']:.1f} s"
        )

    def inputs(self, search: Mapping[str, Any]) -> dict[str, str]:
        config, data = self.settings, self.data
        if (config.data, config.channels) != (search.get("data"), search.get("channels")):
            return {}
        halves = zip(("weights", "architecture"), data.halves() if len(data.train) > 1 else ())
        return {
            "training images": data.train.fingerprint(),
            **{f"images of the {name}": half.fingerprint() for name, half in halves},
            "validation images": data.val.fingerprint(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next round depends on."""
        return {
            "data": self.data.train.fingerprint(),
            "fitting": self.training.state_dict(),
            "history": self.history,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`.

        Raises:
            UserError: the training images are others.
        """
        check_same_images(self, state["data"], self.data.train.fingerprint())
        self.training.load_state_dict(state["fitting"])
        self.history = list(state["history"])

    def finish(self) -> str:
        """Score on the validation images; write network and metrics."""
        config, model, val = self.settings, self.model.eval(), self.data.val
        task = config.task
        scores = evaluate(
            model,
            task,
            val,
            seed=config.seed,
            channels=config.channels,
            runtime=self.runtime,
            keep=spread(len(val), SAMPLES),
        )
        metrics: dict[str, Any] = {
            "genotype": self.genotype.to_json(),
            "task": task.describe(),
            "split": f"val of {val.name}, {len(val)} images",
            **scores.to_json(),
            **costs(model, task, val),
            "size": list(input_size(task, val)),
            "seconds": sum(entry["seconds"] for entry in self.history),
            "steps": self.training.steps,
            "losses": [entry["loss"] for entry in self.history],
        }
        description = {
            "task": task.describe(),
            "data": config.data,
            "size": list(input_size(task, val)),
            **scores.as_dict(),
            "method": "restoration",
        }
        save_model(self.out / MODEL_FILE, model, description)
        files = drawn(lambda: before_and_after(scores.kept))
        atomic_directory(self.out / PREDICTIONS, files)
        atomic_write(self.out / "metrics.json", sealed_json(metrics))
        return f"PSNR {scores.psnr:.3f} dB, SSIM {scores.ssim:.4f} on {metrics['split']}"
