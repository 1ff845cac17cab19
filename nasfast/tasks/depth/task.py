"""Depth estimation as a dense task."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from nasfast.data import Transform, batch
from nasfast.data.depth import DepthDataset, DepthSplits, typical_depth
from nasfast.models.decoders import DenseNetwork, output_layers
from nasfast.models.layers import resize
from nasfast.tasks.base import DenseTask, Frames, Targets, enlarged
from nasfast.tasks.depth.losses import LOSSES, DepthSettings
from nasfast.tasks.depth.processor import DepthMap, DepthProcessor
from nasfast.tasks.depth.scores import DepthErrors, DepthScores, mean_depth_scores
from nasfast.training.loop import NonFiniteLossError, Runtime

T = TypeVar("T")


@dataclass(frozen=True)
class DepthTask(DenseTask[DepthScores]):
    """Metres for every pixel. Its one target is "depth", ``[N, H, W]``, float32, 0 where neither
    loss nor scores count; the output is their natural logarithm."""

    name: ClassVar[str] = "depth"

    splits: DepthSplits
    settings: DepthSettings = dataclasses.field(default_factory=DepthSettings)

    @property
    def outputs(self) -> int:
        return 1

    @property
    def search_train(self) -> DepthDataset:
        return self.splits.search_train

    @property
    def search_val(self) -> DepthDataset:
        return self.splits.search_val

    @functools.cached_property
    def typical(self) -> float:
        """Of the training depths, in metres."""
        return typical_depth(self.splits.train)

    @functools.cached_property
    def baseline(self) -> DepthScores | None:
        """On val, of the mean depth that each pixel has in train."""
        return mean_depth_scores(self.splits.train, self.splits.val, self.settings.cap)

    @torch.no_grad()
    def begin(self, network: DenseNetwork) -> None:
        """All outputs begin around the typical depth, instead of at one metre."""
        for last in output_layers(network.decoder):
            assert last.bias is not None
            last.bias.fill_(math.log(self.typical))

    def load_batch(
        self,
        frames: Frames,
        indices: Sequence[int],
        transform: Transform,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Targets]:
        """Images and "depth"."""
        images, depths = batch(cast(DepthDataset, frames), indices, transform, generator)
        return images, {"depth": depths}

    def resize_targets(self, targets: Targets, size: tuple[int, int]) -> Targets:
        """Nearest depths: a mean over an edge would be a depth that nothing has."""
        depth = F.interpolate(targets["depth"][:, None], size, mode="nearest-exact")
        return {"depth": depth[:, 0]}

    def pad_targets(self, targets: Targets, size: tuple[int, int]) -> Targets:
        """With 0, which is not known."""
        return {"depth": enlarged(targets["depth"], size)}

    def criterion(self, output: Tensor, targets: Targets) -> Tensor:
        """The loss of the settings at the targets' resolution; 0 without a known pixel."""
        depth = targets["depth"]
        logs = resize(output.float(), (depth.shape[-2], depth.shape[-1]))[:, 0]
        return LOSSES[self.settings.loss or "berhu"](logs, depth, depth > 0)

    def weight(self, targets: Targets) -> Tensor:
        """The known pixels, or the images that have some. Parts of a batch have reverse Huber
        losses with thresholds of their own."""
        known = targets["depth"] > 0
        if self.settings.loss == "scale-invariant":
            known = known.flatten(1).any(1)
        return known.sum().float()

    @torch.inference_mode()
    def score(
        self, batches: Iterable[tuple[T, Targets]], predict: Callable[[T], Tensor], runtime: Runtime
    ) -> DepthScores:
        """Scores of logarithms, bilinearly resized to the full resolution of the depths."""
        errors = DepthErrors(runtime.device, self.settings.cap)
        finite = torch.ones((), dtype=torch.bool, device=runtime.device)
        for inputs, targets in batches:
            runtime.heartbeat()
            with runtime.autocast():
                output = predict(inputs)
            truth = runtime.move(targets["depth"])
            depth = resize(output.float(), (truth.shape[-2], truth.shape[-1]))[:, 0].exp()
            finite &= depth.isfinite().all()
            errors.update(depth, truth)
        if not finite.item():
            raise NonFiniteLossError("the network's depths are not finite")
        return errors.compute()

    @property
    def processor(self) -> DepthProcessor:
        return DepthProcessor(self.splits.train.per_metre, self.typical)

    def truth(self, targets: Targets, image: Tensor) -> DepthMap:
        """The depths; black where they are not known."""
        return DepthMap(image, targets["depth"], self.splits.train.per_metre, self.typical)
