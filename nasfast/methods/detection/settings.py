"""Settings of a detection search, and its presets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tyro

from nasfast.cache import CacheConfig
from nasfast.evaluation.stages import FeatureTrainingConfig
from nasfast.methods import flags
from nasfast.methods.detection.improvements import improved_detector, improved_loss
from nasfast.models.detector import DetectorConfig
from nasfast.searches.sampling import SamplingSettings, default_threads
from nasfast.strategies import Name, PPOConfig, settled
from nasfast.tasks.detection import DetectionLoss
from nasfast.utils.cli import flag_value
from nasfast.utils.config import Bound, Bounded, Channels, Count, Pixels, override
from nasfast.utils.errors import about
from nasfast.utils.files import data_path, expanded

DESCRIPTION = """Search an anchor-free detector: ``nasfast search detection``.

``--data DIR`` takes a folder of PASCAL VOC (Annotations/, JPEGImages/, ImageSets/Main/) or COCO
JSON; without it, generated scenes. First pyramids (FPN) are searched, under the stock head of FCOS;
then heads, on the best pyramid, which is trained longer and then fixed. The reward is minus the sum
of the losses on images held out, normalised by their positive points: rewards compare within a
phase, not between phases. ``--resume RUN [--budget N]`` continues a run. (NAS-FCOS, CVPR 2020)
"""


@dataclasses.dataclass(frozen=True)
class HeadPhase(Bounded):
    """The second phase of a progressive search: heads on one fixed pyramid."""

    budget: Count = 8
    """Candidates to evaluate; repeated architectures do not count."""
    width: Channels = 128
    """Channels of the pyramid and of the heads."""
    pyramids: Annotated[int, Bound(1, 1000)] = 1
    """How many of the best pyramids of the first phase are trained longer, under the stock head;
    the one with the highest reward then is fixed."""
    pyramid_epochs: Count = 30
    """Passes over the crops in that training."""


@dataclasses.dataclass(frozen=True)
class SearchConfig(SamplingSettings):
    """Settings of a search of detectors; a preset gives the defaults."""

    method: Annotated[Literal["detection"], tyro.conf.Positional] = "detection"
    """What to search."""
    data: str = "synthetic"
    """"synthetic", or a folder of PASCAL VOC or COCO: see docs/data.md."""
    preset: Literal["demo", "quick", "paper"] = "demo"
    """demo: a minute on a laptop (default for generated scenes). quick: about 40 s per candidate on
    two cores (default for other data). paper: the published schedule, for a GPU."""
    mode: Literal["progressive", "joint", "fpn"] = "progressive"
    """progressive: pyramids under the stock head, then heads on the best of them. joint: pyramid
    and head of a candidate together, in one phase. fpn: the first phase of progressive alone."""
    budget: Count = 8
    """Candidates of the first phase; repeated architectures do not count."""
    strategy: Name = "ppo"
    """predictor: what a model of the rewards so far expects most of. evolution: mutants of the
    best. ppo: the published recurrent controller. random: uniform sampling, the baseline to beat.
    auto: what is best for the budget, by docs/results.md; paper has ppo."""
    primitives: Literal["all", "plain"] = "all"
    """plain: without the deformable convolution, for targets that cannot run it."""
    encoder_weights: Path | None = None
    """MobileNet-v2, ResNet or ResNeXt weights with torchvision's key names; default: the packaged
    small encoder."""
    cache_dir: Path | None = None
    """Where features are kept between searches; default: $NASFAST_CACHE or ~/.cache/nasfast."""
    placement: Literal["auto", "file", "ram", "device"] = "auto"
    """Where features are read from. file: a memory-mapped file, used again by the next search;
    ram: shared memory, gone with the search; device: a file that is read once into the memory of
    each GPU; auto: device on CUDA, else file."""
    memory: str | None = None
    """Bound of what features take in RAM, which has to hold all, or on a device, such as 8GB; what
    does not fit on a device is read from the file."""
    storage: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    """Type of the stored features; auto: that of the activations, or float16."""
    held_out: Annotated[float, Bound(0, 1, open="low")] = 0.1
    """Share of the training images that candidates are scored on. 0.3 in the paper."""
    val_crop: Pixels | None = None
    """Score candidates on centre crops of this side; default: that of the crops to train on."""
    detector: DetectorConfig = dataclasses.field(default_factory=lambda: DetectorConfig(width=64))
    """The candidates of the first phase."""
    head_phase: HeadPhase = dataclasses.field(default_factory=HeadPhase)
    """The second phase."""
    stage0: FeatureTrainingConfig = dataclasses.field(default_factory=FeatureTrainingConfig)
    """Training of a candidate, on cached features."""
    loss: DetectionLoss = dataclasses.field(default_factory=DetectionLoss)
    """Losses, and what a point learns."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.cache, self.second

    @property
    def second(self) -> DetectorConfig:
        """Of the detectors of the second phase."""
        with about("head_phase"):
            return dataclasses.replace(self.detector, width=self.head_phase.width, head_width=None)

    @property
    def cache(self) -> CacheConfig:
        """Of the features; ValueError for a size that is none."""
        return CacheConfig(self.cache_dir, self.placement, self.memory, self.storage)

    def with_budgets(self, budgets: Sequence[int]) -> Self:
        config = super().with_budgets(budgets)
        if len(budgets) == 1:
            return config
        heads = dataclasses.replace(self.head_phase, budget=budgets[1])
        return dataclasses.replace(config, head_phase=heads)


NARROW = improved_detector(DetectorConfig(width=32))
FIRST = (
    "method",
    "data",
    "preset",
    "mode",
    "budget",
    "primitives",
    "encoder_weights",
    "workers",
    "device",
    "seed",
)
"""What ``--help`` describes."""
PRESETS = {
    "demo": SearchConfig(
        preset="demo",
        strategy="auto",
        batch=PPOConfig.short_budget().batch_size,
        budget=4,
        detector=NARROW,
        loss=improved_loss(DetectionLoss(size_scale=0.25)),
        head_phase=HeadPhase(budget=4, width=32, pyramid_epochs=8),
        stage0=FeatureTrainingConfig(
            samples=192, crop=96, shorter_side=96, epochs=4, batch_size=16
        ),
        ppo=PPOConfig.short_budget(),
    ),
    "quick": SearchConfig(
        preset="quick",
        strategy="auto",
        batch=PPOConfig.short_budget().batch_size,
        budget=16,
        held_out=0.3,
        detector=NARROW,
        loss=improved_loss(DetectionLoss(size_scale=0.5)),
        head_phase=HeadPhase(budget=8, width=64, pyramids=2, pyramid_epochs=12),
        stage0=FeatureTrainingConfig(
            samples=320, crop=256, shorter_side=256, epochs=4, batch_size=16
        ),
        ppo=PPOConfig.short_budget(),
    ),
    "paper": SearchConfig(
        preset="paper",
        batch=8,
        budget=2800,
        held_out=0.3,
        loss=DetectionLoss(size_scale=0.48),
        head_phase=HeadPhase(budget=600, width=128, pyramids=20, pyramid_epochs=60),
        stage0=FeatureTrainingConfig(
            samples=4000,
            crop=384,
            shorter_side=384,
            epochs=15,
            batch_size=200,
            lr=8e-4,
            polyak_decay=0.9,
        ),
    ),
}
"""paper: sections 2 and 3 of NAS-FCOS; 15 epochs of 20 steps are its 300 iterations."""


def parse(argv: Sequence[str]) -> SearchConfig:
    """Settings from a command line: the preset's, overridden flag by flag."""
    preset = flags.preset_of(PRESETS, flag_value(argv, "--preset"), flag_value(argv, "--data"))
    return _finished(flags.parse(preset, argv, "nasfast search", DESCRIPTION, FIRST))


def search_with(settings: Mapping[str, Any]) -> SearchConfig:
    """Settings by name, over those of one of the presets."""
    preset = flags.preset_of(PRESETS, settings.get("preset"), settings.get("data"))
    return _finished(override(preset, settings, "search"))


def _finished(config: SearchConfig) -> SearchConfig:
    """With absolute paths, the strategy itself instead of "auto", and the threads of a
    candidate."""
    changes: dict[str, Any] = {
        field: expanded(getattr(config, field)).resolve()
        for field in ("encoder_weights", "runs", "cache_dir", "latency_table")
        if getattr(config, field) is not None
    }
    changes["strategy"] = settled(config.strategy, config.budget)
    threads = config.threads or default_threads(config.batch)
    return dataclasses.replace(config, data=data_path(config.data), threads=threads, **changes)


def continued(
    config: SearchConfig, checkpoint: Mapping[str, Any], budget: int | None
) -> SearchConfig:
    """The settings with another budget of the phase that the run is in, or with that of the last
    time."""
    phase = checkpoint.get("phase", 0)
    own = config.budget if phase == 0 else config.head_phase.budget
    now = checkpoint.get("budget", own) if budget is None else budget
    if phase == 0:
        return dataclasses.replace(config, budget=now)
    return dataclasses.replace(
        config, head_phase=dataclasses.replace(config.head_phase, budget=now)
    )
