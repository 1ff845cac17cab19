"""Opens what a segmentation search reads, and puts its parts together."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Self, TypeVar

import torch
from rich.console import Console

from nasfast.data import folder_of, shorter_side
from nasfast.data.base import Division
from nasfast.encoders import Encoder, load_encoder
from nasfast.evaluation.candidate import CandidateEvaluator
from nasfast.evaluation.frozen_encoder import Caches, FrozenEncoder
from nasfast.evaluation.stages import DecoderOnFeatures, EndToEnd, Stage0Config, Stage1Config
from nasfast.methods.base import warn
from nasfast.methods.features import check_placement, start_workers
from nasfast.methods.segmentation.crops import enlarging
from nasfast.methods.segmentation.settings import DecoderSearchConfig
from nasfast.methods.segmentation.tasks import Opened, Reading, binding_of
from nasfast.models.decoders import DenseNetwork, EncoderDecoder
from nasfast.models.io import load_teacher
from nasfast.searches.sampling import SamplingSearch
from nasfast.training.loop import Runtime
from nasfast.utils.cli import say
from nasfast.utils.errors import UserError
from nasfast.utils.interrupt import Interrupt

StageConfig = TypeVar("StageConfig", Stage0Config, Stage1Config)
Evaluator = CandidateEvaluator[Any, DenseNetwork]
Config = TypeVar("Config", bound=DecoderSearchConfig)

REMEDY = (
    "make --stage0.batch-size, --stage1.batch-size or the crops smaller, or lower the "
    "learning rates"
)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a search reads."""

    opened: Opened[Any]
    encoder: Encoder
    teacher: EncoderDecoder | None

    @classmethod
    def open(cls, config: DecoderSearchConfig) -> Self:
        """Data, encoder and teacher that the settings name."""
        opened = binding_of(config).open(Reading.of(config))
        processor = opened.task.processor
        teacher = None
        if config.teacher:
            teacher = load_teacher(config.teacher, processor.classes, processor.task)
        encoder = load_encoder(config.encoder_weights, config.decoders.rows)
        return cls(opened, encoder, teacher)

    def features(
        self, config: DecoderSearchConfig, runtime: Runtime, caches: Caches | None = None
    ) -> FrozenEncoder:
        """Features of the encoder, in the cache or computed now."""
        binding = binding_of(config)
        return FrozenEncoder(
            self.opened.task,
            self.encoder,
            config.stage0.samples,
            (
                binding.train_transform(config.stage0.crop, config.stage0.shorter_side),
                binding.val_transform(config.val_crop),
            ),
            runtime,
            seed=config.seed,
            cache=config.cache,
            caches=caches,
            teacher=self.teacher,
        )


def build(config: Config, interrupt: Interrupt, console: Console) -> tuple[SamplingSearch, Config]:
    """Open data, encoder and teacher and fill the feature cache; the settings fit the data then."""
    workers = config.worker_config(note=functools.partial(say, console))
    check_placement(config.placement, workers)
    runtime = Runtime(torch.device(workers.devices[0]), interrupt.check)
    inputs = Inputs.open(config)
    opened, folder, binding = inputs.opened, folder_of(config.data), binding_of(config)
    found = binding.check(opened, Reading.of(config), folder, test=False)
    warn(found, console)
    config = binding.fitted(config) or fit_to_data(config, opened.splits, console)
    splits, encoder, space = opened.splits, inputs.encoder, config.decoders.space
    say(
        console,
        f"data     {splits.train.name}: {len(splits.search_train)} {opened.task.samples} to train "
        f"candidates, {len(splits.search_val)} to score them, {opened.about}\n"
        f"encoder  {encoder.label}, "
        f"{config.encoder_weights or 'packaged weights (trained on generated scenes)'}\n"
        f"device   {workers}, {runtime.precision}\n"
        f"space    {space.size():.2e} decoders; strategy {config.strategy}, "
        f"{config.budget} candidates",
    )
    engine, features = start_workers(
        workers, functools.partial(evaluator_on, config), lambda: inputs.features(config, runtime)
    )
    say(
        console,
        f"features of the frozen encoder ready in {features.seconds['encode']:.1f} s: {features}",
    )
    phase = config.phase(
        config.strategy,
        space,
        config.seed,
        make_evaluator(config, features),
        config.budget,
        engine,
        config.stage0.stop_early,
    )
    return SamplingSearch(phase, workers=workers), config


def evaluator_on(
    config: DecoderSearchConfig, device: str, caches: Caches | None = None
) -> Evaluator:
    """A worker's evaluator, from settings that fit the data.

    ``caches`` are the features that the search has put on the worker's GPU; without them it
    attaches the files.
    """
    features = Inputs.open(config).features(config, Runtime(torch.device(device)), caches)
    return make_evaluator(config, features)


def make_evaluator(config: DecoderSearchConfig, features: FrozenEncoder) -> Evaluator:
    """Trains decoders on the features, and with the encoder where they pass the gate."""
    task, weights = features.task, config.stage0
    alone = DecoderOnFeatures(
        weights, features, aux_weight=weights.aux_weight, kd_weight=weights.kd_weight
    )
    stages: list[DecoderOnFeatures | EndToEnd] = [alone]
    if config.stage1.epochs > 0:
        crop = binding_of(config).train_transform(config.stage1.crop, config.stage1.shorter_side)
        transforms = crop, features.val_transform
        stages.append(EndToEnd(config.stage1, task, transforms, features.runtime))

    def build(genotype: Any) -> EncoderDecoder:
        network = config.decoders.build(features.encoder, genotype, task.outputs, config.decoder)
        task.begin(network)
        return network

    return CandidateEvaluator(
        build,
        features.costs,
        stages,
        features.runtime,
        image=(3, *features.val_size),
        processor=lambda genotype: task.processor,
        seed=config.seed,
        inputs=features.inputs,
        remedy=REMEDY,
        seconds=features.seconds,
    )


def fit_to_data(config: Config, splits: Division[Any], console: Console) -> Config:
    """Crops that the data can fill, where candidates are scored on whole images.

    A crop larger than the images would enlarge every image in training and none in validation.
    Where candidates are scored on crops, it is said which images are enlarged for them.

    Raises:
        UserError: whole images of more than one size cannot be scored in batches; crops that are
            far larger than the images.
    """
    if config.val_crop is not None:
        train = splits.search_train
        for flag, crop, images in (
            ("--val-crop", config.val_crop, splits.search_val),
            ("--stage0.crop", config.stage0.crop, train),
            ("--stage0.shorter-side", config.stage0.shorter_side, train),
            ("--stage1.crop", config.stage1.crop, train),
            ("--stage1.shorter-side", config.stage1.shorter_side, train),
        ):
            note = enlarging(flag, crop, images)
            if note is not None:
                say(console, f"crops    {note}")
        return config
    sizes = sorted(set(splits.search_val.sizes()))
    if len(sizes) > 1:
        raise UserError(
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
