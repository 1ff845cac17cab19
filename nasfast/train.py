"""Train an architecture in full: ``python -m nasfast.train RUN``.

RUN is the run directory of a search (its best architecture is trained on the search's data and
encoder), or a JSON file with a genotype. ``--resume DIR`` continues a training.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shlex
import sys
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tomli_w
import torch
import tyro
from rich.console import Console
from torch import Tensor

from nasfast.cli import flag_value, reports_errors, say
from nasfast.config import from_mapping, require_positive
from nasfast.data import TrainTransform, ValTransform, load_splits, shorter_side
from nasfast.device import machine_info, resolve_device
from nasfast.encoders import load_encoder
from nasfast.evaluator import build_segmenter, derive_seed
from nasfast.files import atomic_file, atomic_write
from nasfast.interrupt import Interrupt, StopRequested
from nasfast.models.segmenter import DecoderConfig, save_segmenter
from nasfast.spaces.fast_nas import FastNASGenotype, FastNASSpace
from nasfast.study import Study
from nasfast.tasks.segmentation import SegmentationTask, image_batches
from nasfast.training.cost import count_macs, count_parameters
from nasfast.training.loop import Group, Runtime, epoch_indices, one_cycle, train_epoch

FULL_DECODER = DecoderConfig(agg_size=64, sep_repeats=2, aux_cell=False)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of a full training."""

    source: Annotated[Path, tyro.conf.Positional]
    """Run directory of a search, or a JSON file with a genotype."""
    rank: int = 1
    """Which architecture of the run's ranking; 1 is the best."""
    data: str | None = None
    """Data as for nasfast.search; default: the run's, or synthetic for a genotype file."""
    encoder_weights: Path | None = None
    """Encoder weights to start from; default: the run's, or the packaged ones."""
    out: Path | None = None
    """Directory of the result; default: train-N in the run, or beside the genotype file."""
    epochs: int = 30
    """Passes over the training images."""
    batch_size: int = 8
    """Crops a step."""
    crop: int | None = None
    """Side of a crop, in pixels; default: 288, or the shorter side of smaller images."""
    decoder_lr: float = 3e-3
    """Peak learning rate of the decoder (AdamW, one cycle to zero)."""
    encoder_lr: float = 6e-4
    """Peak learning rate of the encoder."""
    weight_decay: float = 1e-4
    """Decoupled weight decay."""
    max_grad_norm: float = 3.0
    """Gradients of encoder and of decoder are scaled down to this L2 norm each."""
    aux_weight: float = 0.15
    """Weight of each auxiliary head's loss."""
    class_balance: float = 0.3
    """The loss weighs class k by its frequency to the power of minus this; 0 weighs all alike."""
    decoder: DecoderConfig = FULL_DECODER
    """Size of the decoder; the default is that of the published final networks."""
    seed: int = 0
    """Decides initial weights, crops and order."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        require_positive(self, "epochs", "batch_size", "max_grad_norm")
        if self.crop is not None:
            require_positive(self, "crop")


@dataclasses.dataclass(frozen=True)
class _Resume:
    """Continue a training."""

    resume: Path
    """Directory that a training wrote."""


def resolve(config: TrainConfig) -> tuple[TrainConfig, FastNASGenotype]:
    """Fill in what the source decides: genotype, data, encoder and the output's directory."""
    space = FastNASSpace()
    if config.source.is_dir():
        study = Study.open(config.source, read_only=True)
        ranking = study.ranking()
        if not 1 <= config.rank <= len(ranking):
            raise ValueError(
                f"train: wanted a rank from 1 to {len(ranking)} (the architectures that "
                f"{study.path} evaluated), got {config.rank}"
            )
        genotype = space.from_json(ranking[config.rank - 1].genotype)
        data, encoder, home = study.config["data"], study.config.get("encoder_weights"), study.path
    elif config.source.is_file():
        try:
            content = json.loads(config.source.read_text())
        except ValueError as error:
            raise ValueError(
                "train: wanted a run directory or a JSON file with a genotype, got "
                f"{config.source}: {error}"
            ) from error
        if isinstance(content, dict) and "genotype" in content:  # best.json, metrics.json
            content = content["genotype"]
        genotype = space.from_json(content)
        data, encoder, home = "synthetic", None, config.source.parent
    else:
        raise FileNotFoundError(
            f"train: no run directory and no genotype file at {config.source}; "
            "python -m nasfast.search makes a run"
        )
    data = config.data or data
    encoder = config.encoder_weights or (Path(encoder) if encoder else None)
    numbered = (home / f"train-{n}" for n in itertools.count(1))
    out = config.out or next(path for path in numbered if not path.exists())
    return (
        dataclasses.replace(
            config,
            source=config.source.resolve(),
            data=data if data == "synthetic" else str(Path(data).expanduser().resolve()),
            encoder_weights=encoder.resolve() if encoder else None,
            out=out.resolve(),
        ),
        genotype,
    )


class Trainer:
    """One full training, which continues from its checkpoint after a stop."""

    def __init__(
        self, config: TrainConfig, genotype: FastNASGenotype, out: Path, runtime: Runtime
    ) -> None:
        assert config.data is not None
        self.config, self.genotype, self.out, self.runtime = config, genotype, out, runtime
        self.task = SegmentationTask(load_splits(config.data, seed=config.seed))
        train = self.task.splits.train
        # larger would enlarge every image, where validation takes them as they are
        self.crop = config.crop or min(288, shorter_side(train))
        torch.manual_seed(derive_seed(config.seed, "train"))
        self.model = build_segmenter(
            load_encoder(config.encoder_weights), genotype, self.task.num_classes, config.decoder
        )
        self.model.decoder.with_aux = config.aux_weight > 0
        runtime.place(self.model)
        self.history: list[dict[str, float]] = []
        self._generator = torch.Generator().manual_seed(derive_seed(config.seed, "order"))
        self._groups = [self._group("decoder"), self._group("encoder")]
        self._class_weight = self._balance()
        self._resume()

    def _group(self, part: str) -> Group:
        config = self.config
        parameters = list(self.model.get_submodule(part).parameters())
        lr = config.decoder_lr if part == "decoder" else config.encoder_lr
        optimizer = torch.optim.AdamW(parameters, lr, weight_decay=config.weight_decay, fused=True)
        steps = config.epochs * max(len(self.task.splits.train) // config.batch_size, 1)
        return Group(parameters, optimizer, config.max_grad_norm, one_cycle(optimizer, steps))

    def _balance(self) -> Tensor:
        """Class weights from the training masks, 1 on average over pixels."""
        counts = torch.zeros(256, dtype=torch.int64)
        for sample in self.task.splits.train:
            counts += torch.bincount(sample.mask.flatten(), minlength=256)
        frequency = counts[: self.task.num_classes].double()
        frequency /= frequency.sum()
        weight = frequency.clamp(min=1e-4) ** -self.config.class_balance
        return (weight / (weight * frequency).sum()).float().to(self.runtime.device)

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizers": [group.optimizer.state_dict() for group in self._groups],
            "schedules": [g.schedule.state_dict() for g in self._groups if g.schedule],
            "generator": self._generator.get_state(),
            "history": self.history,
        }

    def _resume(self) -> None:
        path = self.out / "checkpoint.pt"
        if not path.exists():
            return
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.model.load_state_dict(state["model"])
        for group, optimizer, schedule in zip(
            self._groups, state["optimizers"], state["schedules"], strict=True
        ):
            group.optimizer.load_state_dict(optimizer)
            if group.schedule:
                group.schedule.load_state_dict(schedule)
        self._generator.set_state(state["generator"])
        self.history = state["history"]

    def _loss(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = pair
        with self.runtime.autocast():
            logits, aux = self.model(images)
        return self.task.loss(
            logits,
            aux,
            labels,
            aux_weight=self.config.aux_weight,
            class_weight=self._class_weight,
        )

    def fit(self, console: Console) -> None:
        """Train to the last epoch; a checkpoint follows every epoch."""
        config, data = self.config, self.task.splits.train
        transform = TrainTransform(self.crop, self.crop)
        while len(self.history) < config.epochs:
            start = time.perf_counter()
            self.model.train()
            indices = epoch_indices(len(data), config.batch_size, self._generator)
            pairs = image_batches(data, indices, transform, self.runtime, self._generator)
            loss = train_epoch(pairs, self._loss, self._groups, self.runtime)
            self.history.append({"loss": loss, "seconds": time.perf_counter() - start})
            with atomic_file(self.out / "checkpoint.pt") as file:
                torch.save(self._state(), file)
            say(
                console,
                f"epoch {len(self.history)}/{config.epochs}  loss {loss:.4f}  "
                f"{self.history[-1]['seconds']:.1f} s",
            )

    def finish(self) -> dict[str, Any]:
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
        save_segmenter(
            self.out / "model.safetensors",
            model,
            {
                "genotype": self.genotype.to_json(),
                "decoder": dataclasses.asdict(self.config.decoder),
                "classes": list(splits.val.classes),
                "data": self.config.data,
                "miou": scores.miou,
            },
        )
        atomic_write(self.out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
        return metrics


def _write_config(out: Path, config: TrainConfig, genotype: FastNASGenotype) -> None:
    out.mkdir(parents=True)
    plain = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    atomic_write(
        out / "config.toml", tomli_w.dumps({k: v for k, v in plain.items() if v is not None})
    )
    atomic_write(out / "genotype.json", json.dumps(genotype.to_json()) + "\n")
    atomic_write(out / "env.json", json.dumps(machine_info(), indent=2) + "\n")


def _open(argv: Sequence[str]) -> tuple[TrainConfig, FastNASGenotype, Path]:
    if flag_value(argv, "--resume") is not None:
        out = tyro.cli(_Resume, args=argv, prog="nasfast.train").resume.resolve()
        if not (out / "config.toml").is_file() or not (out / "genotype.json").is_file():
            raise FileNotFoundError(
                f"train: {out} is not the directory of a training: it has no config.toml and "
                "genotype.json; give the directory that nasfast.train printed"
            )
        settings = tomllib.loads((out / "config.toml").read_text())
        config = from_mapping(TrainConfig, settings, str(out / "config.toml"))
        genotype = FastNASSpace().from_json(json.loads((out / "genotype.json").read_text()))
        return config, genotype, out
    config = tyro.cli(TrainConfig, args=argv, description=__doc__, prog="nasfast.train")
    config, genotype = resolve(config)
    assert config.out is not None
    if config.out.exists():
        raise FileExistsError(
            f"train: {config.out} exists and is never overwritten; give another --out, or "
            f"continue it with --resume {config.out}"
        )
    return config, genotype, config.out


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status (130 after Ctrl-C)."""
    console = Console()
    config, genotype, out = _open(sys.argv[1:] if argv is None else list(argv))
    with Interrupt() as interrupt:
        runtime = Runtime(resolve_device(config.device), interrupt.check)
        trainer = Trainer(config, genotype, out, runtime)
        if not out.exists():  # only now: data or weights may have been refused
            _write_config(out, dataclasses.replace(config, crop=trainer.crop), genotype)
        say(
            console,
            f"training {genotype.to_json()}\n"
            f"data     {config.data}, {len(trainer.task.splits.train)} images\n"
            f"size     {count_parameters(trainer.model) / 1e6:.2f} M parameters\n"
            f"out      {out}",
        )
        try:
            trainer.fit(console)
            metrics = trainer.finish()
        except StopRequested:
            say(
                console,
                "\nstopped; finished epochs are saved. Continue with\n"
                f"  python -m nasfast.train --resume {shlex.quote(str(out))}",
            )
            return 130
    for name, iou in metrics["class_iou"].items():
        value = "absent" if iou is None else f"{iou:.3f}"
        say(console, f"  {name:<16} {value}")
    say(
        console,
        f"mIoU {metrics['miou']:.4f} on {metrics['split']}; {out}\n"
        f"  python -m nasfast.evaluate {shlex.quote(str(out / 'model.safetensors'))}",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
