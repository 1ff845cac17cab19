"""Bilevel search on a supernet: alphas, betas and depths by one optimizer, weights by another.

IR-NAS (CVPR 2020), section 3, first order. In a step the architecture learns on images of its own
before the weights learn on theirs; the first epochs are for the weights alone. After every epoch
the architecture is derived and recorded.

Where operations are chosen by perturbation, an epoch of the weights follows each choice, and its
record.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import torch
from rich.console import Console
from torch import Tensor

from nasfast.data.restoration import ImageSet
from nasfast.evaluation.candidate import timed
from nasfast.models.restorer import Restorer, RestorerConfig
from nasfast.models.supernet import Supernet, SupernetConfig
from nasfast.runs.records import Evaluation, Record
from nasfast.runs.study import Study
from nasfast.searches.collapse import STAGE, collapse_warning
from nasfast.searches.perturbation import Perturbation
from nasfast.spaces.ir_nas import PRIMITIVES, SKIP
from nasfast.strategies.gradient import Darts, Mix, Temperature, make_relaxation
from nasfast.tasks.restoration import RestorationTask
from nasfast.tasks.restoration.fidelity import psnr, ssim
from nasfast.tasks.restoration.loss import RestorationLoss
from nasfast.tasks.restoration.patches import ImagePatches
from nasfast.tasks.restoration.pictures import before_and_after
from nasfast.tasks.restoration.scoring import Restored, costs, image_generator, reward
from nasfast.training.cost import count_parameters
from nasfast.training.graphs import CudaGraph, GraphedStep
from nasfast.training.loop import Runtime
from nasfast.training.pictures import SAMPLES, drawn, spread
from nasfast.utils.cli import say
from nasfast.utils.config import (
    BatchSize,
    Bound,
    Bounded,
    Count,
    Pixels,
    Positive,
    Weight,
)
from nasfast.utils.errors import NothingFoundError, UserError
from nasfast.utils.seeding import derive_seed

Batch = tuple[Tensor, ...]
"""Inputs and targets of a step."""
ENTROPIES = ("alpha_entropy", "beta_entropy", "depth_entropy")
"""Metrics of an epoch, as `Supernet.entropies` gives them; the last where the depth is searched."""
TUNING = 0.1
"""Learning rate between choices by perturbation, as a share of the first one."""


@dataclass(frozen=True)
class WeightsConfig(Bounded):
    """Training of the supernet's weights."""

    optimizer: Literal["sgd", "adam"] = "sgd"
    """sgd: momentum 0.9."""
    lr: Positive = 0.025
    """Learning rate of the first epoch."""
    min_lr: Positive = 0.001
    """Learning rate of the last one."""
    cycles: Annotated[float, Bound(0, 1000, open="low")] = 5.0
    """Periods of the cosine over the epochs; 0.5 falls once."""
    weight_decay: Weight = 3e-4
    """L2 penalty."""

    def lr_at(self, epoch: int, epochs: int) -> float:
        """Learning rate of epoch 1 to `epochs`: a cosine that a polynomial damps."""
        cosine = (1 + math.cos(2 * math.pi * self.cycles * epoch / epochs)) / 2
        damped: float = cosine * (1 - epoch / epochs) ** 0.9
        return self.min_lr + (self.lr - self.min_lr) * damped


@dataclass(frozen=True)
class ArchitectureConfig(Bounded):
    """Training of alphas, betas and depths (Adam)."""

    lr: Positive = 1e-3
    """Learning rate."""
    weight_decay: Weight = 1e-3
    """L2 penalty. Logits begin at 1, where the published one exceeds the gradient of the loss
    several times, so that first of all it draws every logit to 0: a short search needs none."""
    selection: Literal["alpha", "perturbation"] = "alpha"
    """What decides for operations and edges. alpha: the largest probability, as published.
    perturbation: when the search has ended, edge by edge and node by node, what the supernet misses
    most (Wang et al., ICLR 2021), with an epoch of the weights after each choice; whatever the
    strategy, undecided operations are then mixed by their probabilities."""
    max_skips: Annotated[int, Bound(0, 10**4)] | None = None
    """Skips that a cell may have (Chen et al., P-DARTS, ICCV 2019, section 3.3); default: any
    number, as published."""
    auxiliary_skip: Weight = 0.0
    """Factor of another identity on every edge, which frees the operation `skip` from helping the
    gradients; it falls to 0 in the last epoch (Chu et al., DARTS-, ICLR 2021, section 3, which
    begins with 1)."""


@dataclass(frozen=True)
class BilevelConfig(Bounded):
    """A search by gradient; the defaults are published."""

    epochs: Count = 100
    """Passes over the images, at most."""
    warmup: Annotated[int, Bound(0, 10**9)] = 20
    """Epochs before the architecture learns."""
    patience: Count = 20
    """Stop when the derived architecture has not changed for this many epochs after the warm-up."""
    batch_size: BatchSize = 12
    """Patches per step, from each of the two halves of the images."""
    crop: Pixels = 64
    """Side of a patch, in pixels of the target; so many times as long as --network.reduction, as
    far as the images go."""
    crops: Annotated[int, Bound(1, 10**4)] = 1
    """Patches of each image in an epoch."""
    ssim_weight: Weight = 0.6
    """lambda: weight of log10(1 / SSIM) beside the squared error."""
    val_crop: Pixels | None = None
    """Score the supernet on the centre of each validation image, of this side at most, times the
    reduction; default: on whole images."""
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    """Training of the weights."""
    architecture: ArchitectureConfig = field(default_factory=ArchitectureConfig)
    """Training of the architecture."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup >= self.epochs:
            raise UserError(
                f"warmup: expected fewer epochs than the {self.epochs} in all, got {self.warmup}; "
                "lower it, or raise epochs"
            )


@dataclass(frozen=True)
class SupernetSearch:
    """One search, resumable after any epoch.

    Args:
        task: degrades the images.
        halves: patches for the weights, patches for the architecture.
        val: images that the supernet is scored on.
        supernet: its size.
        network: size of the derived networks, for their parameters and multiply-adds.
        bilevel: schedule and losses.
        strategy: how alphas become factors of operations, see `make_relaxation`.
        temperature: of the strategy "gumbel".
        runtime: device and precision.
        seed: decides initial weights, patches and what the task draws.
    """

    task: RestorationTask
    halves: tuple[ImagePatches, ImagePatches]
    val: ImageSet
    supernet: SupernetConfig
    network: RestorerConfig
    bilevel: BilevelConfig
    strategy: str
    temperature: Temperature
    runtime: Runtime
    seed: int

    @property
    def inputs(self) -> Mapping[str, str]:
        weights, architecture = self.halves
        return {
            "images of the weights": weights.images.fingerprint(),
            "images of the architecture": architecture.images.fingerprint(),
            "validation images": self.val.fingerprint(),
        }

    @property
    def ranking(self) -> Literal["score", "last"]:
        """The choice of a gradient search is where it ended, not its best score on the way: that
        one measures how far the weights were trained."""
        return "last"

    @property
    def environment(self) -> Mapping[str, object]:
        return {}

    @property
    def more(self) -> str:
        return ""

    def close(self) -> None:
        """Nothing to end."""

    def run(self, study: Study, console: Console) -> None:
        """Search to the last epoch, or until the derived architecture stays the same; then choose
        by perturbation, where that is the rule.

        A checkpoint holds its epoch's record, which follows it to the disk; a crash between the
        two loses neither.

        Raises:
            UserError: records and checkpoint do not belong together, or a loss is not finite.
        """
        with contextlib.closing(SupernetTraining(self)) as training:
            self._run(training, study, console)

    def _run(self, training: SupernetTraining, study: Study, console: Console) -> None:
        epochs = self.bilevel.epochs
        architecture = sum(p.numel() for p in training.model.architecture())
        say(
            console,
            f"supernet {count_parameters(training.model) - architecture:,} weights, {architecture} "
            "architecture parameters",
        )
        self._restore(training, study)
        if training.choices is None:
            while training.epoch < epochs and self._unchanged(study) < self.bilevel.patience:
                with console.status(f"epoch {training.epoch + 1} of {epochs}"):
                    self._advance(training, study, console)
            if training.epoch < epochs:
                say(
                    console,
                    "stopped early: the architecture has been the same for "
                    f"{self._unchanged(study)} epochs",
                )
        if self.bilevel.architecture.selection == "perturbation":
            choices = training.choose()
            while choices.made < choices.total:
                with console.status(f"choice {choices.made + 1} of {choices.total}"):
                    self._advance(training, study, console)
        if warning := collapse_warning(study.records):
            say(console, f"warning: {warning}")

    def _advance(self, training: SupernetTraining, study: Study, console: Console) -> None:
        """One epoch, or one choice, with its record."""
        record = self._run_epoch(training, study)
        study.save_checkpoint(training.state_dict() | {"record": record.to_json()})
        study.append(record)
        say(console, self._line(training, study, record))

    def _restore(self, training: SupernetTraining, study: Study) -> None:
        checkpoint = study.load_checkpoint()
        if checkpoint is not None:
            with study.restoring():
                training.load_state_dict(checkpoint)
                last = Record.from_json(checkpoint["record"], f"{study.path}/checkpoint, record")
            if len(study.records) == training.epoch - 1:
                study.append(last)
        study.require_records(training.epoch)
        if len(study.records) > training.epoch:
            raise UserError(
                f"{study.path / 'checkpoint'}: expected the state of epoch {len(study.records)}, "
                f"the last in the records, got {training.epoch or 'none'}; restore state.pt from "
                "a copy, or start a new run: records do not hold the weights"
            )

    def _unchanged(self, study: Study) -> int:
        """Epochs since the derived architecture changed last; the warm-up does not count."""
        learned = study.records[self.bilevel.warmup :]
        last = learned[-1].canonical if learned else None
        changed = [i for i, record in enumerate(learned, 1) if record.canonical != last]
        return max(len(learned) - (changed[-1] if changed else 0) - 1, 0)

    def _run_epoch(self, training: SupernetTraining, study: Study) -> Record:
        """Its record, without files, which the study has then."""
        seconds: dict[str, float] = {}
        with timed(seconds, f"{STAGE}_train"):
            losses = training.train_epoch()
        with timed(seconds, f"{STAGE}_validate"):
            restored, similarity, shown = training.score()
        model = training.model
        entropies = model.entropies(training.decided(model.alphas.softmax(1)))
        genotype = model.derive(training.operations(), self.bilevel.architecture.max_skips)
        canonical = genotype.canonical().to_json()
        first = next((r for r in study.records if r.canonical == canonical), None)
        network = Restorer(genotype, self.network, model.channels, model.scale)
        metrics = {
            "psnr": restored,
            "ssim": similarity,
            **losses,
            **dict(zip(ENTROPIES, entropies, strict=False)),
        }
        record = Record(
            index=training.epoch - 1,
            genotype=genotype.to_json(),
            canonical=canonical,
            seed=self.seed,
            evaluation=Evaluation(
                rewards={STAGE: reward(restored, similarity)},
                metrics={STAGE: metrics},
                costs=costs(network, self.task, self.val),
                gate=None,
                seconds=seconds,
                feedback=STAGE,
            ),
            duplicate_of=first.index if first else None,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        study.keep_files(record, drawn(lambda: before_and_after(shown)))
        return record

    def _line(self, training: SupernetTraining, study: Study, record: Record) -> str:
        metrics, choices = record.evaluation.metrics[STAGE], training.choices
        arch = metrics.get("architecture_loss")
        done, total = record.index + 1, self.bilevel.epochs
        if choices is not None:
            done, total, state = choices.made, choices.total, choices.last
        elif record.index < self.bilevel.warmup:
            state = "warm-up"
        elif unchanged := self._unchanged(study):
            state = f"same for {unchanged}"
        else:
            state = "new architecture"
        return (
            f"[{done:>{len(str(total))}}/{total}] loss {metrics['loss']:.4f}"
            f"{'' if arch is None else f' / {arch:.4f}'}  "
            f"{metrics['psnr']:.2f} dB {metrics['ssim']:.4f}  "
            f"entropy {' '.join(f'{metrics[name]:.3f}' for name in ENTROPIES if name in metrics)}  "
            f"{sum(record.evaluation.seconds.values()):.1f} s  {state}"
        )


class SupernetTraining:
    """The supernet of a search and what trains it."""

    def __init__(self, search: SupernetSearch) -> None:
        self.runtime, self._config, self._seed = search.runtime, search.bilevel, search.seed
        self._weight_patches, self._architecture_patches = search.halves
        side = search.bilevel.val_crop
        side = side and side * search.network.reduction
        self._val = _centres(search.task, search.val, side, search.seed)
        self._names = search.val.names
        self._loss = RestorationLoss(search.bilevel.ssim_weight)
        torch.manual_seed(derive_seed(search.seed, "supernet"))
        self.model = Supernet(
            search.supernet, search.val.channels, search.task.scale, search.network.reduction
        )
        self.runtime.place(self.model)
        weights, architecture = search.bilevel.weights, search.bilevel.architecture
        device = self.runtime.device
        graphs = device.type == "cuda"
        # on the device, where a recorded step reads what it is by then
        self._rate = torch.tensor(weights.lr, device=device) if graphs else None
        rate = weights.lr if self._rate is None else self._rate
        sgd: dict[str, Any] = {"momentum": 0.9, "weight_decay": weights.weight_decay}
        adam: dict[str, Any] = {}
        if graphs:
            sgd["fused"] = True
            adam = {"fused": True, "capturable": True}
        self._weight_optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(self.model.weights(), rate, **sgd)
            if weights.optimizer == "sgd"
            else torch.optim.Adam(
                self.model.weights(), rate, weight_decay=weights.weight_decay, **adam
            )
        )
        self._architecture_optimizer = torch.optim.Adam(
            self.model.architecture(),
            architecture.lr,
            weight_decay=architecture.weight_decay,
            **adam,
        )
        self._relaxation = make_relaxation(
            search.strategy, derive_seed(search.seed, "relaxation"), search.temperature
        )
        # where nothing is drawn in a step
        self._graphs: dict[str, GraphedStep] = {
            name: GraphedStep(CudaGraph(device))
            for name in ("weights", "architecture")
            if graphs and isinstance(self._relaxation, Darts)
        }
        self._generators = {
            name: torch.Generator().manual_seed(derive_seed(search.seed, name))
            for name in ("weights", "architecture")
        }
        self._auxiliary = torch.zeros(len(PRIMITIVES), device=device)
        self.epoch = 0
        """Epochs that are finished, those after choices too."""
        self.choices: Perturbation | None = None
        """Made by perturbation, once the search has ended."""
        self._path: dict[str, list[Tensor]] = {name: [] for name in self._architecture()}

    def train_epoch(self) -> dict[str, float]:
        """One pass over the images of the weights; mean losses by name.

        In each step the architecture learns on a fresh batch of its own images, then the weights on
        theirs. Once the search has ended a choice comes first, and the weights alone learn.
        """
        config, model = self._config, self.model
        epoch = self.epoch + 1
        learns = epoch > config.warmup
        if self.choices is not None:
            self.choices.choose(self._probabilities(), self._held_out_loss())
            rate, learns = TUNING * config.weights.lr, False
        else:
            rate = config.weights.lr_at(epoch, config.epochs)
            self._auxiliary[SKIP] = config.architecture.auxiliary_skip * (1 - epoch / config.epochs)
        for group in self._weight_optimizer.param_groups:
            group["lr"] = rate if self._rate is None else self._rate.fill_(rate)
        model.train()
        losses: dict[str, list[Tensor]] = {"loss": []}
        for indices in self._weight_patches.epoch(config.batch_size, self._generators["weights"]):
            self.runtime.heartbeat()
            if learns:
                patches, generator = self._architecture_patches, self._generators["architecture"]
                drawn = next(patches.epoch(config.batch_size, generator))
                batch = patches.batch(drawn, generator)
                loss = self._step("architecture", self._architecture_step, batch)
                losses.setdefault("architecture_loss", []).append(loss)
            batch = self._weight_patches.batch(indices, self._generators["weights"])
            losses["loss"].append(self._step("weights", self._weight_step, batch))
        self.epoch = epoch
        for name, table in self._architecture().items():
            self._path[name].append(table.detach().float().cpu())
        means = {name: torch.stack(values).mean().item() for name, values in losses.items()}
        for name, mean in means.items():
            if not math.isfinite(mean):
                raise self._diverged(f"the {name.replace('_', ' ')} is {mean}")
        return means

    def _diverged(self, what: str) -> UserError:
        text = f"search: {what} in epoch {self.epoch}; lower --bilevel.weights.lr in a new run"
        if self.epoch == 1:
            return NothingFoundError(text)
        return UserError(f"{text}. The epochs before it are saved")

    def _step(self, half: str, step: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
        """The loss of one step of a half; on CUDA it is repeated as a graph."""
        batch = tuple(self.runtime.move(images) for images in batch)
        graph = self._graphs.get(half)
        return step(batch) if graph is None else graph(step, batch).clone()

    def _weight_step(self, batch: Batch) -> Tensor:
        if self.choices is None:
            mix = self._with_auxiliary(self._relaxation.weight_step(self.model.alphas))
        else:
            mix = self.choices.mix(self._probabilities())
        return self._train(batch, mix, self._weight_optimizer, self.model.weights())

    def _architecture_step(self, batch: Batch) -> Tensor:
        model = self.model
        mix = self._with_auxiliary(self._relaxation.architecture_step(model.alphas))
        loss = self._train(batch, mix, self._architecture_optimizer, model.architecture())
        self._relaxation.after_architecture_step(model.alphas)
        return loss

    def _train(
        self,
        batch: Batch,
        mix: Mix,
        optimizer: torch.optim.Optimizer,
        parameters: list[torch.nn.Parameter],
    ) -> Tensor:
        """One step of these parameters; gradients of the others are not computed."""
        inputs, targets = batch
        with self.runtime.autocast():
            restored = self.model(inputs, mix)
        loss = self._loss(restored, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward(inputs=parameters)  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach()

    def _with_auxiliary(self, mix: Mix) -> Mix:
        if not self._config.architecture.auxiliary_skip:
            return mix
        active = mix.active and tuple(tuple({*row, SKIP}) for row in mix.active)
        return Mix(mix.weights + self._auxiliary, active)

    def _probabilities(self) -> Tensor:  # [edges, K]
        return self._relaxation.probabilities(self.model.alphas.detach())

    def operations(self) -> Tensor:  # [edges, K]
        """What each is worth, 1 or 0 where one has been chosen."""
        return self.decided(self._probabilities())

    def _architecture(self) -> dict[str, Tensor]:
        """Probabilities by the name of their logits."""
        tables = {"alphas": self.operations(), "betas": self.model.move_probabilities()}
        depths = self.model.depth_probabilities()
        return tables if depths is None else tables | {"depths": depths}

    def decided(self, table: Tensor) -> Tensor:  # [edges, K]
        """The table with 1 or 0 where an operation has been chosen."""
        return table if self.choices is None else self.choices.mix(table).weights

    def choose(self) -> Perturbation:
        """The choices by perturbation; from now on an epoch makes one."""
        if self.choices is None:
            self.choices = Perturbation(
                self.model.config.nodes,
                derive_seed(self._seed, "perturbation"),
                self._config.architecture.max_skips,
            )
            self.close()
            self._graphs = {}  # a choice changes what a step computes
        return self.choices

    def _held_out_loss(self) -> Callable[[Mix], float]:
        """Mean loss of the supernet under a mix, on a pass over the patches of the architecture,
        the same for every mix. BatchNorm normalises by the batch, whose statistics a mix changes,
        and keeps its running ones."""
        assert self.choices is not None
        generator = torch.Generator().manual_seed(
            derive_seed(self._seed, "perturbation", self.choices.made)
        )
        patches = self._architecture_patches
        indices = list(patches.epoch(self._config.batch_size, generator))
        batches = [patches.batch(batch, generator) for batch in indices]

        @torch.no_grad()
        def loss(mix: Mix) -> float:
            self.runtime.heartbeat()
            self.model.train()
            kept = [buffer.clone() for buffer in self.model.buffers()]
            losses = []
            for batch in batches:
                inputs, targets = (self.runtime.move(images) for images in batch)
                with self.runtime.autocast():
                    restored = self.model(inputs, mix)
                losses.append(self._loss(restored, targets))
            torch._foreach_copy_(list(self.model.buffers()), kept)
            mean = torch.stack(losses).mean().item()
            if not math.isfinite(mean):
                raise self._diverged(f"the loss without an operation is {mean}")
            return mean

        return loss

    def close(self) -> None:
        """Give back the recorded steps and their memory."""
        self.model.zero_grad(set_to_none=True)
        for graph in self._graphs.values():
            graph.close()

    @torch.inference_mode()
    def score(self) -> tuple[float, float, list[Restored]]:
        """Mean PSNR (dB) and SSIM on the validation images, and some of those to show."""
        self.model.eval()
        mix = self._mix_to_score()
        ratios, similarities, shown = [], [], []
        keep = spread(len(self._val), SAMPLES)
        for index, (inputs, target) in enumerate(self._val):
            self.runtime.heartbeat()
            inputs, target = (self.runtime.move(image) for image in (inputs, target))
            with self.runtime.autocast():
                restored = self.model(inputs, mix)
            restored = restored.float().clamp(0, 1)
            ratios.append(psnr(restored, target))
            similarities.append(ssim(restored, target))
            if index in keep:
                maps = (images[0].float().cpu() for images in (target, inputs, restored))
                clean, degraded, output = maps
                shown.append(Restored(self._names[index], clean, degraded, output.clamp(0, 1)))
        means = torch.cat(ratios).mean().item(), torch.cat(similarities).mean().item()
        if not all(map(math.isfinite, means)):
            raise self._diverged("what the supernet gives for the validation images is not finite")
        return *means, shown

    def _mix_to_score(self) -> Mix:
        if self.choices is not None:
            return self.choices.mix(self._probabilities())
        if isinstance(self._relaxation, Darts):
            return self._with_auxiliary(Mix(self._probabilities(), None))
        return self._with_auxiliary(most_probable(self.model.alphas))

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next epoch depends on, and the architecture after each so far."""
        return {
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "weight_optimizer": self._weight_optimizer.state_dict(),
            "architecture_optimizer": self._architecture_optimizer.state_dict(),
            "relaxation": self._relaxation.state_dict(),
            "choices": None if self.choices is None else self.choices.state_dict(),
            "generators": {name: g.get_state() for name, g in self._generators.items()},
            **{name: torch.stack(path) for name, path in self._path.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.epoch = state["epoch"]
        self.model.load_state_dict(state["model"])
        _load_optimizer(self._weight_optimizer, state["weight_optimizer"])
        _load_optimizer(self._architecture_optimizer, state["architecture_optimizer"])
        self._relaxation.load_state_dict(state["relaxation"])
        if state.get("choices") is not None:  # none before there were any
            self.choose().load_state_dict(state["choices"])
        for name, generator in self._generators.items():
            generator.set_state(state["generators"][name])
        self._path = {name: list(state[name].unbind()) for name in self._path}


def _load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """The state alone: how an optimizer steps is a matter of the device."""
    own = {
        name: optimizer.param_groups[0][name]
        for name in ("fused", "capturable")
        if name in optimizer.param_groups[0]
    }
    groups = [group | own for group in state["param_groups"]]
    optimizer.load_state_dict({**state, "param_groups": groups})


def most_probable(alphas: Tensor) -> Mix:
    """One operation per edge, the one with the largest logit; alphas ``[edges, K]``."""
    chosen = alphas.detach().argmax(1, keepdim=True)
    weights = torch.zeros_like(alphas).scatter(1, chosen, 1.0)
    return Mix(weights, tuple((k,) for k in chosen.flatten().tolist()))


def _centres(
    task: RestorationTask, val: ImageSet, side: int | None, seed: int
) -> list[tuple[Tensor, Tensor]]:
    """Degraded and clean centre of each image, ``[1, c, h, w]``, drawn from (seed, name)."""
    pairs = []
    for images in val:
        if side is not None:
            images = images.map(functools.partial(_centre, side=side))
        degraded, clean = task.pair(images, image_generator(seed, images.name))
        pairs.append((degraded[None], clean[None]))
    return pairs


def _centre(image: Tensor, side: int) -> Tensor:
    """The middle ``[c, side, side]`` of an image; a shorter side is not cut."""
    top, left = (max(length - side, 0) // 2 for length in image.shape[-2:])
    return image[:, top : top + side, left : left + side]
