"""The searches as everybody writes them: eager float32, NCHW, one file per sample.

A candidate of Fast NAS (stage 0): ``torch.nn`` modules alone, features from ``torch.save`` files
behind a ``DataLoader``, Adam and the weight average as they come, the loss read at every step, and
full-size logits that NumPy turns into a confusion matrix on the host. It is kinder to the baseline
than the published code, which encodes the validation images anew for every candidate: here their
features lie in files, too. Names and order of the parameters are those of
:class:`nasfast.models.decoders.Decoder`, so that both start from and train the same weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from nasfast.evaluation.stages import Stage0Config
from nasfast.models.decoders import DecoderConfig
from nasfast.spaces.fast_nas import PRIMITIVES, Cell, FastNASGenotype
from nasfast.training.loop import epoch_indices

if TYPE_CHECKING:
    from nasfast.evaluation.stages import Stage0Config

Sample = dict[str, Tensor]
IGNORE = 255
VAL_BATCH = 8


def conv(in_channels: int, out_channels: int, kernel: int, dilation: int, groups: int) -> nn.Conv2d:
    padding = dilation * (kernel // 2)
    return nn.Conv2d(
        in_channels, out_channels, kernel, 1, padding, dilation, groups=groups, bias=False
    )


def conv_bn_relu(
    in_channels: int, out_channels: int, kernel: int = 1, dilation: int = 1
) -> nn.Sequential:
    return nn.Sequential(
        conv(in_channels, out_channels, kernel, dilation, 1),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


def separable(channels: int, kernel: int, dilation: int, repeats: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(repeats):
        layers.append(conv(channels, channels, kernel, dilation, channels))
        layers.append(conv_bn_relu(channels, channels))
    return nn.Sequential(*layers)


def largest(maps: Sequence[Tensor]) -> tuple[int, int]:
    """(H, W) of the map with the largest area."""
    return max(((x.shape[2], x.shape[3]) for x in maps), key=lambda size: size[0] * size[1])


def upsample(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


class GlobalPool(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv(channels, channels, 1, 1, 1)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W]
        y = F.relu(self.bn(self.conv(F.adaptive_avg_pool2d(x, 1))))
        return upsample(y, (x.shape[2], x.shape[3]))


class Zero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0 * x


def operation(index: int, channels: int, repeats: int) -> nn.Module:
    name = PRIMITIVES[index]
    if name == "gap":
        return GlobalPool(channels)
    if name == "skip":
        return nn.Identity()
    if name == "none":
        return Zero()
    form, _, dilation = name.partition("_d")  # such as sep5x5_d6
    kernel = int(form[-1])
    if form.startswith("sep"):
        return separable(channels, kernel, int(dilation or 1), repeats)
    return conv_bn_relu(channels, channels, kernel, int(dilation or 1))


class PlainCell(nn.Module):
    def __init__(self, cell: Cell, channels: int, repeats: int) -> None:
        super().__init__()
        self.cell = cell
        ops = [cell.op0] + [op for layer in cell.layers for op in layer[2:]]
        self.ops = nn.ModuleList(operation(op, channels, repeats) for op in ops)

    def forward(self, x: Tensor) -> Tensor:
        features = [x, self.ops[0](x)]
        for k, (p1, p2, _, _) in enumerate(self.cell.layers):
            a = self.ops[2 * k + 1](features[p1])
            b = self.ops[2 * k + 2](features[p2])
            features += [a, b, a + b]
        first, *others = self.cell.loose_ends
        output: Tensor = features[first]
        for i in others:
            output = output + features[i]
        return output


class PlainBlock(nn.Module):
    def __init__(self, cell: Cell, channels: int, repeats: int) -> None:
        super().__init__()
        self.left, self.right = (
            nn.Sequential(PlainCell(cell, channels, repeats), conv_bn_relu(channels, channels))
            for _ in range(2)
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        maps = [self.left(x), self.right(y)]
        size = largest(maps)
        return upsample(maps[0], size) + upsample(maps[1], size)


class PlainDecoder(nn.Module):
    """Taps ``[N, C_i, H_i, W_i]`` to logits ``[N, num_classes, H, W]`` and those of the auxiliary
    heads, an empty list in evaluation mode."""

    def __init__(
        self,
        genotype: FastNASGenotype,
        channels: Sequence[int],  # of each tap
        num_classes: int,
        config: DecoderConfig,
    ) -> None:
        super().__init__()
        c, cell, repeats = config.agg_size, genotype.cell, config.sep_repeats
        self.genotype = genotype
        self.adapt = nn.ModuleList(conv_bn_relu(tap, c) for tap in channels)
        self.blocks = nn.ModuleList(PlainBlock(cell, c, repeats) for _ in genotype.connections)
        self.pre_clf = conv_bn_relu(c * len(genotype.collected_blocks), c)
        self.conv_clf = nn.Conv2d(c, num_classes, 3, padding=1)
        self.aux_heads = nn.ModuleList(
            nn.Sequential(
                *([PlainCell(cell, c, repeats)] if config.aux_cell else []),
                nn.Conv2d(c, num_classes, 3, padding=1),
            )
            for _ in genotype.connections
        )

    def forward(self, taps: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        pool = [adapt(tap) for adapt, tap in zip(self.adapt, taps)]
        for block, (i, j) in zip(self.blocks, self.genotype.connections):
            pool.append(block(pool[i], pool[j]))
        outputs = pool[len(taps) :]
        collected = [outputs[i] for i in self.genotype.collected_blocks]
        size = largest(collected)
        fused = torch.cat([upsample(x, size) for x in collected], 1)
        logits = self.conv_clf(self.pre_clf(F.relu(fused)))
        if not self.training:
            return logits, []
        return logits, [head(x) for head, x in zip(self.aux_heads, outputs)]


class Files(Dataset[Sample]):
    """Samples in a file each: float32 maps ``[C, H, W]``, int64 labels ``[H, W]``."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.glob("*.pt"))

    @classmethod
    def write(cls, folder: Path, samples: Iterable[Mapping[str, Tensor]]) -> Files:
        """Files of samples in any float type and memory format, on any device."""
        folder.mkdir(parents=True, exist_ok=True)
        for i, sample in enumerate(samples):
            plain = {
                name: x.cpu().to(torch.float32 if x.is_floating_point() else torch.int64)
                for name, x in sample.items()
            }
            tensors = {
                name: x.clone(memory_format=torch.contiguous_format) for name, x in plain.items()
            }
            torch.save(tensors, folder / f"{i:06d}.pt")
        return cls(folder)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        sample: Sample = torch.load(self.paths[index])
        return sample


class Order:
    """Shuffled batches of indices, anew in every epoch, in the order that nasfast draws."""

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self.count, self.batch_size = count, batch_size
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[list[int]]:
        batches = epoch_indices(self.count, self.batch_size, self.generator)
        return (batch.tolist() for batch in batches)

    def __len__(self) -> int:
        return max(self.count // self.batch_size, 1)


def candidate(
    genotype: FastNASGenotype,
    num_classes: int,
    decoder_config: DecoderConfig,
    config: Stage0Config,
    train: Files,
    val: Files,
    device: torch.device,
    *,
    seed: int,
    order_seed: int,
    workers: int = 2,
) -> tuple[float, dict[str, float]]:
    """Builds, trains and scores a decoder on files of features.

    Args:
        seed: of the initial weights.
        order_seed: of the order of the samples.
        workers: processes of each DataLoader.

    Returns:
        The reward, and the seconds of training and of scoring.
    """
    torch.manual_seed(seed)
    channels = [len(tap) for tap in taps_of(train[0])]
    decoder = PlainDecoder(genotype, channels, num_classes, decoder_config).to(device)
    built = time.perf_counter()
    options = {"num_workers": workers, "pin_memory": device.type == "cuda"}
    loader = DataLoader(
        train,
        batch_sampler=Order(len(train), config.batch_size, order_seed),
        persistent_workers=workers > 0,
        **options,  # type: ignore[arg-type]
    )
    train_decoder(decoder, loader, config, device)
    trained = time.perf_counter()
    decoder.eval()
    pairs = (
        ([tap.to(device, non_blocking=True) for tap in taps_of(batch)], batch["labels"])
        for batch in DataLoader(val, VAL_BATCH, **options)  # type: ignore[arg-type]
    )
    reward = confusion_reward(pairs, decoder, num_classes)
    validated = time.perf_counter()
    return reward, {"stage0_train": trained - built, "stage0_validate": validated - trained}


def taps_of(sample: Mapping[str, Tensor]) -> list[Tensor]:
    return [sample[name] for name in sorted(sample) if name.startswith("tap")]


def train_decoder(
    decoder: PlainDecoder, loader: Iterable[Sample], config: Stage0Config, device: torch.device
) -> None:
    parameters = list(decoder.parameters())
    optimizer = torch.optim.Adam(parameters, lr=config.lr, weight_decay=config.weight_decay)
    averages = [p.detach().clone() for p in parameters]
    decoder.train()
    for _ in range(config.epochs):
        running_loss = 0.0
        for batch in loader:
            sample = {name: x.to(device, non_blocking=True) for name, x in batch.items()}
            loss = loss_of(*decoder(taps_of(sample)), sample, config)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.step()
            with torch.no_grad():
                for average, p in zip(averages, parameters):
                    average.mul_(config.polyak_decay).add_(p, alpha=1 - config.polyak_decay)
            running_loss += loss.item()
        with torch.no_grad():
            for average, p in zip(averages, parameters):
                p.copy_(average)


def loss_of(
    logits: Tensor,  # [N, K, h, w]
    aux: Sequence[Tensor],  # each [N, K, h, w]
    sample: Sample,
    config: Stage0Config,
) -> Tensor:
    labels = sample["labels"]  # [N, H, W]
    size = (labels.shape[1], labels.shape[2])

    def cross_entropy(scores: Tensor) -> Tensor:
        return F.cross_entropy(upsample(scores, size), labels, ignore_index=IGNORE)

    loss = cross_entropy(logits)
    for scores in aux:
        loss = loss + config.aux_weight * cross_entropy(scores)
    if "teacher" in sample:
        teacher = sample["teacher"]  # [N, K, h', w']
        student = upsample(logits, (teacher.shape[2], teacher.shape[3]))
        loss = loss + config.kd_weight * F.mse_loss(student, teacher)
    return loss


@torch.no_grad()
def confusion_reward(
    pairs: Iterable[tuple[list[Tensor], Tensor]],  # taps, labels [N, H, W]
    network: Callable[[list[Tensor]], tuple[Tensor, list[Tensor]]],
    num_classes: int,
) -> float:
    """Cube root of mean IoU, mean accuracy and frequency-weighted IoU, in NumPy."""
    confusion = np.zeros((num_classes, num_classes), np.int64)
    for taps, on_device in pairs:
        logits, _ = network(taps)
        labels = on_device.cpu().numpy().astype(np.int64)
        scores = upsample(logits, (labels.shape[1], labels.shape[2])).cpu().numpy()
        predicted = scores.argmax(1)
        seen = labels != IGNORE
        cells = num_classes * labels[seen] + predicted[seen]
        confusion += np.bincount(cells, minlength=num_classes**2).reshape(confusion.shape)
    hit, label = np.diag(confusion).astype(float), confusion.sum(1)
    present = label > 0
    iou = (hit / np.maximum(label + confusion.sum(0) - hit, 1))[present]
    accuracy = (hit / np.maximum(label, 1))[present]
    frequency = (label / label.sum())[present]
    return float(np.cbrt(iou.mean() * accuracy.mean() * (frequency * iou).sum()))
