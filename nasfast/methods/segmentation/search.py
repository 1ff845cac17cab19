"""Search a segmentation network: ``python -m nasfast.search segmentation``.

``--data DIR`` takes a CamVid folder or a folder with images/, masks/ and classes.txt; without it,
generated street scenes. ``--resume RUN [--budget N]`` continues a run. (Fast NAS, CVPR 2019)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import tyro
from rich.console import Console

from nasfast.cache import CacheConfig
from nasfast.data import Splits, load_splits, shorter_side
from nasfast.encoders import MobileNetV2, load_encoder
from nasfast.evaluation.evaluator import Caches, SegmentationEvaluator, Stage0Config, Stage1Config
from nasfast.models.segmenter import DecoderConfig, Segmenter, load_teacher
from nasfast.searches.sampling import SamplingSearch, SamplingSettings, default_threads
from nasfast.spaces.fast_nas import FastNASGenotype, FastNASSpace
from nasfast.strategies import PPOConfig, make_strategy
from nasfast.tasks.segmentation import SegmentationTask
from nasfast.training.loop import Runtime
from nasfast.utils.cli import flag_value, say
from nasfast.utils.config import require_positive
from nasfast.utils.interrupt import Interrupt
from nasfast.workers import Crew, Engine

StageConfig = TypeVar("StageConfig", Stage0Config, Stage1Config)


@dataclasses.dataclass(frozen=True)
class SearchConfig(SamplingSettings):
    """Settings of a search; a preset gives the defaults."""

    method: Annotated[Literal["segmentation"], tyro.conf.Positional] = "segmentation"
    """What to search."""
    data: str = "synthetic"
    """"synthetic", a CamVid folder, or a folder with images/, masks/ and classes.txt."""
    preset: Literal["demo", "quick", "paper"] = "demo"
    """demo: a minute on a laptop (default for the synthetic set). quick: about 30 s a candidate
    on two cores (default for other data). paper: the published schedule, for a GPU."""
    budget: int = 8
    """Candidates to evaluate; repeated architectures do not count."""
    strategy: Literal["ppo", "random"] = "ppo"
    """ppo: the recurrent controller; random: uniform sampling, the baseline to beat."""
    encoder_weights: Path | None = None
    """MobileNet-v2 weights with torchvision's key names; default: the packaged small encoder."""
    teacher: Path | None = None
    """Network to distil from: a model.safetensors that nasfast.train wrote for the same classes."""
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
    val_crop: int | None = None
    """Score candidates on centre crops of this side; default: whole images of one size."""
    omit: tuple[int, ...] = ()
    """Classes left out of the reward: 0, the background, in the paper's search on PASCAL VOC."""
    decoder: DecoderConfig = dataclasses.field(default_factory=DecoderConfig)
    """Size of the candidates' decoders."""
    stage0: Stage0Config = dataclasses.field(default_factory=Stage0Config)
    """Training of the decoder alone."""
    stage1: Stage1Config = dataclasses.field(default_factory=Stage1Config)
    """Training end to end, after the gate."""
    ppo: PPOConfig = dataclasses.field(default_factory=PPOConfig)
    """The controller."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget < 1:
            raise ValueError(
                f"search: expected a budget of at least 1 candidate, got {self.budget}"
            )
        require_positive(self.decoder, "agg_size", "sep_repeats")
        for stage in (self.stage0, self.stage1):
            require_positive(stage, "crop", "shorter_side", "batch_size", "max_grad_norm")
        require_positive(self.stage0, "samples", "epochs")
        _ = self.cache

    @property
    def cache(self) -> CacheConfig:
        """Of the features; ValueError for a size that is none."""
        return CacheConfig(self.cache_dir, self.placement, self.memory, self.storage)


PRESETS = {
    "demo": SearchConfig(
        preset="demo",
        batch=PPOConfig.short_budget().batch_size,
        budget=8,
        decoder=DecoderConfig(agg_size=32),
        stage0=Stage0Config(samples=384, crop=96, shorter_side=96, epochs=3, batch_size=16),
        stage1=Stage1Config(crop=96, shorter_side=96, batch_size=16, polyak_decay=0.9),
        ppo=PPOConfig.short_budget(),
    ),
    "quick": SearchConfig(
        preset="quick",
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
    preset = flag_value(argv, "--preset")
    if preset not in PRESETS:  # absent, or wrong and then refused by the parser
        preset = "demo" if flag_value(argv, "--data") in (None, "synthetic") else "quick"
    config = tyro.cli(
        SearchConfig, args=argv, default=PRESETS[preset], description=__doc__, prog="nasfast.search"
    )
    paths = {
        field: getattr(config, field).expanduser().resolve()
        for field in ("encoder_weights", "teacher", "runs", "cache_dir")
        if getattr(config, field) is not None
    }
    if config.data != "synthetic":
        paths["data"] = str(Path(config.data).expanduser().resolve())
    threads = config.threads or default_threads(config.batch)
    return dataclasses.replace(config, threads=threads, **paths)


def fit_to_data(config: SearchConfig, splits: Splits, console: Console) -> SearchConfig:
    """Crops that the data can fill, where candidates are scored on whole images.

    A crop larger than the images would enlarge every image in training and none in validation.

    Raises:
        ValueError: whole images of more than one size cannot be scored in batches.
    """
    if config.val_crop is not None:
        return config
    sizes = sorted({tuple(sample.mask.shape) for sample in splits.search_val})
    if len(sizes) > 1:
        raise ValueError(
            f"search: expected images of one size to score candidates on, got {len(sizes)} sizes "
            f"from {sizes[0]} to {sizes[-1]}; give --val-crop SIDE to score centre crops"
        )
    side = min(shorter_side(splits.search_train), *sizes[0])

    def fit(stage: StageConfig) -> StageConfig:
        return dataclasses.replace(
            stage, crop=min(stage.crop, side), shorter_side=min(stage.shorter_side, side)
        )

    fitted = dataclasses.replace(config, stage0=fit(config.stage0), stage1=fit(config.stage1))
    if fitted != config:
        console.print(f"crops are at most {side} pixels, the shorter side of the images")
    return fitted


def build(
    config: SearchConfig, interrupt: Interrupt, console: Console
) -> tuple[SamplingSearch[FastNASGenotype], SearchConfig]:
    """Open data, encoder and teacher and fill the feature cache; the settings fit the data then."""
    crew = Crew.of(
        workers=config.workers,
        devices=config.places,
        threads=torch.get_num_threads(),
        engine=config.engine,
        batch=config.batch,
    )
    if config.placement == "device" and crew.devices[0] == "cpu":
        raise ValueError(
            "placement: expected auto, file or ram on a CPU, got device; leave --placement out, or "
            "give --device cuda"
        )
    runtime = Runtime(torch.device(crew.devices[0]), interrupt.check)
    splits = load_splits(config.data, seed=config.seed)
    config = fit_to_data(config, splits, console)
    task = SegmentationTask(splits, config.omit)
    encoder = load_encoder(config.encoder_weights)
    teacher = _teacher(config, splits)
    say(
        console,
        f"data     {splits.train.name}: {len(splits.search_train)} frames to train candidates, "
        f"{len(splits.search_val)} to score them, {task.num_classes} classes\n"
        f"encoder  {encoder.name} x{encoder.width:g}, "
        f"{config.encoder_weights or 'packaged weights (trained on generated scenes)'}\n"
        f"device   {crew}, {runtime.precision}\n"
        f"space    {FastNASSpace().size():.2e} decoders; strategy {config.strategy}, "
        f"{config.budget} candidates",
    )

    def prepared() -> SegmentationEvaluator:
        return _evaluator(config, task, encoder, teacher, runtime)

    engine, evaluator = _staff(config, crew, prepared)
    say(
        console,
        f"features of the frozen encoder ready in {evaluator.seconds['encode']:.1f} s: "
        f"{evaluator.features}",
    )
    space = FastNASSpace()
    strategy = make_strategy(config.strategy, space, config.seed, config.ppo)
    search = SamplingSearch(space, strategy, evaluator, config.budget, config.batch, crew, engine)
    return search, config


def evaluator_on(
    config: SearchConfig, device: str, caches: Caches | None = None
) -> SegmentationEvaluator:
    """A worker's evaluator, from settings that fit the data.

    ``caches`` are the features that the search has put on the worker's GPU; without them it
    attaches the files.
    """
    splits = load_splits(config.data, seed=config.seed)
    return _evaluator(
        config,
        SegmentationTask(splits, config.omit),
        load_encoder(config.encoder_weights),
        _teacher(config, splits),
        Runtime(torch.device(device)),
        caches,
    )


def _staff(
    config: SearchConfig, crew: Crew, prepared: Callable[[], SegmentationEvaluator]
) -> tuple[Engine[FastNASGenotype], SegmentationEvaluator]:
    """The workers, and this process's evaluator."""
    build = functools.partial(evaluator_on, config)
    if crew.shares_devices:
        evaluator = prepared()
        on_device = {
            name: functools.partial(build, caches=evaluator.caches_on(torch.device(name)))
            for name in crew.devices[: crew.workers]
        }
        return crew.engine_for(build, on_device), evaluator
    engine = crew.engine_for(build)  # they fill the feature cache together with this process
    try:
        return engine, prepared()
    except BaseException:
        engine.close()
        raise


def _teacher(config: SearchConfig, splits: Splits) -> Segmenter | None:
    return load_teacher(config.teacher, splits.train.classes) if config.teacher else None


def _evaluator(
    config: SearchConfig,
    task: SegmentationTask,
    encoder: MobileNetV2,
    teacher: Segmenter | None,
    runtime: Runtime,
    caches: Caches | None = None,
) -> SegmentationEvaluator:
    return SegmentationEvaluator(
        task,
        encoder,
        config.decoder,
        config.stage0,
        config.stage1,
        runtime,
        seed=config.seed,
        cache=config.cache,
        caches=caches,
        val_crop=config.val_crop,
        teacher=teacher,
    )


def continued(
    config: SearchConfig, checkpoint: Mapping[str, Any], budget: int | None
) -> SearchConfig:
    """The settings with another budget, or with that of the last time."""
    last = checkpoint.get("budget", config.budget)
    return dataclasses.replace(config, budget=last if budget is None else budget)
