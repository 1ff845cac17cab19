"""Settings of a segmentation search, and its presets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import tyro

from nasfast.cache import CacheConfig
from nasfast.evaluation.stages import Stage0Config, Stage1Config
from nasfast.methods import flags
from nasfast.methods.segmentation.decoders import FAST_NAS, Decoders
from nasfast.methods.segmentation.tasks import TaskName, binding_of
from nasfast.models.decoders import DecoderConfig
from nasfast.searches.sampling import SamplingSettings, default_threads
from nasfast.strategies import Name, PPOConfig, settled
from nasfast.tasks.depth import DepthSettings
from nasfast.utils.cli import flag_value
from nasfast.utils.config import Bound, Count, Pixels, override
from nasfast.utils.files import data_path, expanded

DESCRIPTION = """Search a segmentation network: ``nasfast search segmentation``.

``--data DIR`` takes a folder of CamVid, Cityscapes or PASCAL VOC, or one with images/, masks/ and
classes.txt; without it, generated street scenes. ``--task depth`` and ``--task keypoints`` search
for other tasks, on data as docs/data.md has it.
``--resume RUN [--budget N]`` continues a run. (Fast NAS, CVPR 2019)
``nasfast search restoration --help`` shows the search of restoration networks.
"""


@dataclasses.dataclass(frozen=True)
class DecoderSearchConfig(SamplingSettings):
    """Settings of every search of segmentation networks, whatever its decoders; a preset gives the
    defaults."""

    decoders: ClassVar[Decoders]
    """What is searched."""

    data: str = "synthetic"
    """"synthetic", or a folder of the task's layouts: see docs/data.md."""
    task: TaskName = "segmentation"
    """A class for every pixel, depth in metres, or the joints of people."""
    preset: Literal["demo", "quick", "paper"] = "demo"
    """demo: a minute on a laptop (default for the synthetic set). quick: about 30 s per candidate
    on two cores (default for other data). paper: the published schedule, for a GPU."""
    budget: Count = 8
    """Candidates to evaluate; repeated architectures do not count."""
    strategy: Name = "ppo"
    """predictor: what a model of the rewards so far expects most of. evolution: mutants of the
    best. ppo: the published recurrent controller. random: uniform sampling, the baseline to beat.
    auto: what is best for the space and the budget, by docs/results.md; paper has ppo."""
    encoder_weights: Path | None = None
    """MobileNet-v2, ResNet or ResNeXt weights with torchvision's key names, for templates of
    MobileNet-v2; default: the packaged small encoder."""
    teacher: Path | None = None
    """Network to distil from: a model.safetensors that nasfast train wrote for the same classes."""
    cache_dir: Path | None = None
    """Where encoder features are kept between searches; default: $NASFAST_CACHE or
    ~/.cache/nasfast."""
    placement: Literal["auto", "file", "ram", "device"] = "auto"
    """Where features are read from. file: a memory-mapped file, used again by the next search;
    ram: shared memory, gone with the search; device: a file that is read once into the memory of
    each GPU; auto: device on CUDA, else file."""
    memory: str | None = None
    """Bound of what features take in RAM, which has to hold all, or on a device, such as 8GB; what
    does not fit on a device is read from the file."""
    storage: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    """Type of the stored features; auto: that of the activations, or float16."""
    val_crop: Pixels | None = None
    """Score candidates on centre crops of this side; default: whole images of one size."""
    mask_values: str | None = None
    """Values of the classes in the masks, where they are not 0, 1, ..: 0,255. Pixels of other
    values are ignored."""
    resize_longer: Pixels | None = None
    """Images whose longer side has more pixels are reduced to it before they are cropped, scaled
    and scored; --val-crop then cuts the reduced ones. 1024 in the paper's search on Cityscapes."""
    omit: tuple[Annotated[int, Bound(0, 255)], ...] = ()
    """Classes left out of the reward: 0, the background, in the paper's search on PASCAL VOC."""
    depth: DepthSettings = dataclasses.field(default_factory=DepthSettings)
    """Reading and loss of --task depth."""
    decoder: Any = None
    """Size of the candidates' decoders; each method has a type of its own."""
    stage0: Stage0Config = dataclasses.field(default_factory=Stage0Config)
    """Training of the decoder alone."""
    stage1: Stage1Config = dataclasses.field(default_factory=Stage1Config)
    """Training end to end, after the gate."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.cache, binding_of(self)

    @property
    def cache(self) -> CacheConfig:
        """Of the features; ValueError for a size that is none."""
        return CacheConfig(self.cache_dir, self.placement, self.memory, self.storage)


@dataclasses.dataclass(frozen=True)
class SearchConfig(DecoderSearchConfig):
    """Settings of a search of decoders with cells; a preset gives the defaults."""

    decoders: ClassVar[Decoders] = FAST_NAS

    method: Annotated[Literal["segmentation"], tyro.conf.Positional] = "segmentation"
    """What to search."""
    decoder: DecoderConfig = dataclasses.field(default_factory=DecoderConfig)
    """Size of the candidates' decoders."""


C = TypeVar("C", bound=DecoderSearchConfig)
FIRST = (
    "method",
    "data",
    "task",
    "preset",
    "budget",
    "strategy",
    "encoder_weights",
    "workers",
    "device",
    "seed",
    "name",
)
"""What ``--help`` describes."""
PRESETS = {
    "demo": SearchConfig(
        preset="demo",
        strategy="auto",
        batch=PPOConfig.short_budget().batch_size,
        budget=8,
        decoder=DecoderConfig(agg_size=32),
        stage0=Stage0Config(samples=384, crop=96, shorter_side=96, epochs=3, batch_size=16),
        stage1=Stage1Config(crop=96, shorter_side=96, batch_size=16, polyak_decay=0.9),
        ppo=PPOConfig.short_budget(),
    ),
    "quick": SearchConfig(
        preset="quick",
        strategy="auto",
        batch=PPOConfig.short_budget().batch_size,
        budget=24,
        decoder=DecoderConfig(agg_size=32),
        stage0=Stage0Config(samples=320, crop=160, shorter_side=240, epochs=4, batch_size=16),
        stage1=Stage1Config(crop=224, shorter_side=260, batch_size=16, polyak_decay=0.9),
        ppo=PPOConfig.short_budget(),
    ),
    "paper": SearchConfig(preset="paper", batch=8, budget=2000, val_crop=400),
}


def parse(argv: Sequence[str]) -> SearchConfig:
    """Settings from a command line: the preset's, overridden flag by flag."""
    return parse_with(PRESETS, DESCRIPTION, argv)


def parse_with(presets: Mapping[str, C], description: str, argv: Sequence[str]) -> C:
    """Settings from a command line: those of one of the presets, overridden flag by flag."""
    preset = flags.preset_of(presets, flag_value(argv, "--preset"), flag_value(argv, "--data"))
    return _finished(flags.parse(preset, argv, "nasfast search", description, FIRST))


def search_with(presets: Mapping[str, C], settings: Mapping[str, Any]) -> C:
    """Settings by name, over those of one of the presets."""
    preset = flags.preset_of(presets, settings.get("preset"), settings.get("data"))
    return _finished(override(preset, settings, "search"))


def _finished(config: C) -> C:
    """With absolute paths, the strategy itself instead of "auto", and the threads of a
    candidate."""
    changes: dict[str, Any] = {
        field: expanded(getattr(config, field)).resolve()
        for field in ("encoder_weights", "teacher", "runs", "cache_dir", "latency_table")
        if getattr(config, field) is not None
    }
    changes["strategy"] = settled(config.strategy, config.budget)
    threads = config.threads or default_threads(config.batch)
    return dataclasses.replace(config, data=data_path(config.data), threads=threads, **changes)


def continued(config: C, checkpoint: Mapping[str, Any], budget: int | None) -> C:
    """The settings with another budget, or with that of the last time."""
    last = checkpoint.get("budget", config.budget)
    return dataclasses.replace(config, budget=last if budget is None else budget)
