"""Train an encoder like the packaged one: ``nasfast pretrain``.

A narrow MobileNet-v2 learns to segment procedurally generated street scenes, from a stream that no
search reads, under a decoder that is discarded. The defaults made the encoder that a search without
``--encoder-weights`` starts from; the result is for ``--encoder-weights``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console
from torch import Tensor

from nasfast.data import SyntheticStreets, TrainTransform, ValTransform
from nasfast.data.base import split_for_search
from nasfast.device import deterministic, resolve_device
from nasfast.encoders import MobileNetV2
from nasfast.models.build import build_segmenter
from nasfast.models.decoders import DecoderConfig
from nasfast.spaces.fast_nas import FastNASSpace
from nasfast.tasks.base import Targets
from nasfast.tasks.segmentation import SegmentationTask
from nasfast.training.loop import Group, Runtime, epoch_indices, one_cycle, train_epoch
from nasfast.utils.cli import reports_errors
from nasfast.utils.config import Bound, Bounded, Count, Positive, Seed
from nasfast.utils.errors import UserError
from nasfast.utils.files import atomic_file, expanded
from nasfast.utils.locks import writing
from nasfast.utils.seals import packed

_GENOTYPE = [[2, [1, 0, 3, 6], [0, 1, 2, 8], [2, 0, 6, 1]], [[2, 3], [3, 1], [4, 4]]]


@dataclass(frozen=True)
class PretrainConfig(Bounded):
    """Settings of the packaged encoder's training; the defaults made the packaged file."""

    out: Path | None = None
    """Where the weights go (float16, with the width in the metadata); default:
    mobilenet_v2_WIDTH.safetensors in the working directory."""
    overwrite: bool = False
    """Replace the file if it exists."""
    width: Annotated[float, Bound(0.1, 10)] = 0.35
    """Channel multiplier of MobileNet-v2."""
    frames: Annotated[int, Bound(16, 10**6)] = 4000
    """Generated frames."""
    epochs: Count = 12
    """Passes over the frames."""
    batch_size: Annotated[int, Bound(2, 1024)] = 16
    """Frames per step."""
    crop: Annotated[int, Bound(32, 1024)] = 96
    """Side of a crop, in pixels."""
    lr: Positive = 3e-3
    """Peak learning rate of Adam, on a cosine to zero."""
    seed: Seed = 0
    """Decides weights, frames and order."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    deterministic: bool = False
    """On CUDA: the same bits in every run, by slower ways; a CPU gives them anyway."""

    @property
    def path(self) -> Path:
        """The file to write.

        Raises:
            UserError: it exists and may not be replaced, or is no file.
        """
        name = f"mobilenet_v2_{round(100 * self.width):03}.safetensors"
        path = expanded(self.out or name)
        if path.suffix != ".safetensors" or path.is_dir():
            raise UserError(f"out: expected a name that ends in .safetensors, got {path}")
        if path.exists() and not self.overwrite:
            raise UserError(
                f"out: expected a file that does not exist yet, got {path}; give another --out, or "
                "--overwrite"
            )
        return path


def pretrain(config: PretrainConfig) -> None:
    """Train, score on unseen frames and write the weights."""
    path, runtime = config.path, Runtime(resolve_device(config.device))
    path.parent.mkdir(parents=True, exist_ok=True)
    with deterministic(config.deterministic), writing(path), atomic_file(config.path) as file:
        # takes the room: a full disk shows before the training, not after it
        file.write(_packed(MobileNetV2(config.width), {}))
        file.flush()
        encoder, miou = _train(config, runtime, Console())
        file.seek(0)
        file.write(_packed(encoder, {"miou": round(miou, 4), "frames": config.frames}))
        file.truncate()
    print(f"mIoU {miou:.3f} on unseen frames; {path} ({path.stat().st_size / 2**20:.2f} MiB)")


def _packed(encoder: MobileNetV2, results: Mapping[str, float]) -> bytes:
    """A file of the weights in float16."""
    weights = {
        k: v.cpu().contiguous().half() if v.is_floating_point() else v.cpu()
        for k, v in encoder.state_dict().items()
    }
    described = {"name": encoder.name, "width": encoder.width}
    metadata = {"nasfast.encoder": json.dumps(described), "nasfast.pretrain": json.dumps(results)}
    return packed(weights, metadata)


def _train(config: PretrainConfig, runtime: Runtime, console: Console) -> tuple[MobileNetV2, float]:
    """The trained encoder, and the mean IoU on unseen frames."""
    torch.manual_seed(config.seed)
    frames = SyntheticStreets(config.frames, config.seed, stream="pretrain", cache_in_memory=True)
    splits = split_for_search(frames, frames.subset([0]), seed=config.seed, fraction=0.05)
    task = SegmentationTask(splits)
    encoder = MobileNetV2(config.width)
    genotype = FastNASSpace().from_json(_GENOTYPE)
    decoder = DecoderConfig(agg_size=32, aux_cell=False)
    model = build_segmenter(encoder, genotype, task.outputs, decoder)
    runtime.place(model)
    generator = torch.Generator().manual_seed(config.seed)
    transform = TrainTransform(config.crop, config.crop)
    parameters = list(model.parameters())
    optimizer = torch.optim.Adam(parameters, config.lr, weight_decay=1e-5, fused=True)
    count = len(splits.search_train)
    steps = config.epochs * (count // config.batch_size)
    group = Group(parameters, optimizer, 3.0, one_cycle(optimizer, steps))

    def loss_of(pair: tuple[Tensor, Targets]) -> Tensor:
        images, targets = pair
        with runtime.autocast():
            logits, aux = model(images)
        targets = task.resize_targets(targets, (logits.shape[-2], logits.shape[-1]))
        return task.loss(logits, aux, targets, aux_weight=0.15)

    start = time.perf_counter()
    for epoch in range(config.epochs):
        model.train()
        indices = epoch_indices(count, config.batch_size, generator)
        pairs = task.batches(splits.search_train, indices, transform, runtime, generator)
        loss = train_epoch(pairs, loss_of, [group], runtime)
        console.print(
            f"epoch {epoch + 1}/{config.epochs}  loss {loss:.3f}  "
            f"{time.perf_counter() - start:.0f} s"
        )
    val = splits.search_val
    scores = task.score_images(model, val, ValTransform(None), runtime, batch_size=32)
    return encoder, scores.miou


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    pretrain(tyro.cli(PretrainConfig, args=argv, description=__doc__, prog="nasfast pretrain"))
    return 0
