"""Opens what a detection search reads, and puts its phases together."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load, save

from nasfast.data import folder_of
from nasfast.data.detection import (
    BoxTrainTransform,
    BoxValTransform,
    DetectionSplits,
    load_detection_splits,
)
from nasfast.data.detection.checks import check_detection
from nasfast.encoders import Encoder, load_encoder, tensor_mismatch
from nasfast.evaluation.candidate import CandidateEvaluator, timed
from nasfast.evaluation.frozen_encoder import Caches, FrozenEncoder
from nasfast.evaluation.stages import DecoderOnFeatures
from nasfast.methods.base import warn
from nasfast.methods.detection.settings import SearchConfig
from nasfast.methods.features import check_placement, start_workers
from nasfast.models.decoders import DenseNetwork
from nasfast.models.detector import (
    Detector,
    DetectorConfig,
    DetectorDecoder,
    FrozenPyramid,
    HeadOnPyramid,
    build_detector,
)
from nasfast.report.numbers import number
from nasfast.runs.records import Record
from nasfast.searches.sampling import Phase, SamplingSearch
from nasfast.spaces.nas_fcos import NASFCOSGenotype, NASFCOSSpace, Part
from nasfast.tasks.base import Scores
from nasfast.tasks.detection import DetectionTask
from nasfast.training.loop import Runtime, in_order
from nasfast.utils.cli import say
from nasfast.utils.errors import NothingFoundError, UserError, cause
from nasfast.utils.files import atomic_directory, read_object
from nasfast.utils.interrupt import Interrupt
from nasfast.utils.seeding import derive_seed
from nasfast.workers import Engine, Job, WorkerConfig

Evaluator = CandidateEvaluator[NASFCOSGenotype, DenseNetwork]

REMEDY = "make --stage0.batch-size or --stage0.crop smaller, or lower --stage0.lr"
WEIGHTS, CHOICE = "pyramid.safetensors", "pyramid.json"
"""Files of the second phase in the run: what the chosen pyramid was trained to, and its record."""


@dataclass(frozen=True)
class TrainedPyramid:
    """The pyramid that heads are searched on."""

    genotype: NASFCOSGenotype
    """With the stock head."""
    weights: bytes
    """A safetensors file: it is sent to workers, which may have no access to the run."""


@dataclass(frozen=True)
class Inputs:
    """What a search reads."""

    splits: DetectionSplits
    encoder: Encoder

    @classmethod
    def open(cls, config: SearchConfig) -> Self:
        """Data and encoder that the settings name."""
        splits = load_detection_splits(config.data, seed=config.seed, held_out=config.held_out)
        return cls(splits, load_encoder(config.encoder_weights))

    def features(
        self,
        config: SearchConfig,
        runtime: Runtime,
        pyramid: TrainedPyramid | None = None,
        caches: Caches | None = None,
    ) -> FrozenEncoder:
        """Features of the encoder or, in the second phase, of the encoder with the pyramid."""
        crop, side = config.stage0.crop, config.stage0.shorter_side
        task = DetectionTask(self.splits, config.loss)
        encoder = self.encoder
        if pyramid is not None:
            fpn = DetectorDecoder(
                pyramid.genotype, encoder.feature_info, task.outputs, config.second
            ).fpn
            weights = load(pyramid.weights)
            problem = tensor_mismatch(fpn.state_dict(), weights)
            if problem:
                raise UserError(
                    f"{WEIGHTS}: expected the weights of the chosen pyramid, got {problem}; remove "
                    "checkpoint/phase-1 of the run: it is trained again"
                )
            fpn.load_state_dict(weights)
            encoder = FrozenPyramid(encoder, fpn)
        return FrozenEncoder(
            task,
            encoder,
            config.stage0.samples,
            (BoxTrainTransform(crop, side), BoxValTransform(config.val_crop or crop, side)),
            runtime,
            seed=config.seed,
            cache=config.cache,
            caches=caches,
        )


def space_of(config: SearchConfig, fixed: NASFCOSGenotype | None = None) -> NASFCOSSpace:
    """Of the first phase; of the second one, with its pyramid."""
    if fixed is not None:
        return NASFCOSSpace("head", fixed, primitives=config.primitives)
    part: Part = "joint" if config.mode == "joint" else "fpn"
    return NASFCOSSpace(part, primitives=config.primitives)


def build(
    config: SearchConfig, interrupt: Interrupt, console: Console
) -> tuple[SamplingSearch, SearchConfig]:
    """Open data and encoder and fill the feature cache."""
    workers = config.worker_config(note=functools.partial(say, console))
    check_placement(config.placement, workers)
    runtime = Runtime(torch.device(workers.devices[0]), interrupt.check)
    inputs = Inputs.open(config)
    splits, space = inputs.splits, space_of(config)
    warn(check_detection(splits, folder_of(config.data)), console)
    heads = ""
    if config.mode == "progressive":
        count = space_of(config, NASFCOSGenotype()).size()
        heads = f", then {count:.2e} heads, {config.head_phase.budget} candidates"
    kind = "pyramids and heads" if config.mode == "joint" else "pyramids"
    say(
        console,
        f"data     {splits.train.name}: {len(splits.search_train)} images to train candidates, "
        f"{len(splits.search_val)} to score them, {len(splits.train.classes)} classes\n"
        f"encoder  {inputs.encoder.name}, "
        f"{config.encoder_weights or 'packaged weights (trained on generated scenes)'}\n"
        f"device   {workers}, {runtime.precision}\n"
        f"space    {space.size():.2e} {kind}; strategy {config.strategy}, {config.budget} "
        f"candidates{heads}",
    )
    engine, features = start_workers(
        workers,
        functools.partial(evaluator_on, config),
        lambda: with_objects(inputs.features(config, runtime)),
    )
    say_ready(console, features)
    first = config.phase(
        config.strategy,
        space,
        config.seed,
        make_evaluator(config, features),
        config.budget,
        engine,
        config.stage0.stop_early,
    )
    if config.mode != "progressive":
        return SamplingSearch(first, workers=workers), config
    _require_heads(config, features)
    second = SecondPhase(config, inputs, features, workers, console)
    return SamplingSearch(first, second, workers=workers), config


def _require_heads(config: SearchConfig, features: FrozenEncoder) -> None:
    """UserError where a table of another machine does not know the networks of the second phase:
    the first one would be in vain."""
    if config.latency_table is None:
        return
    try:
        config.latencies(space_of(config, NASFCOSGenotype()), make_longer(config, features))
    except UserError as error:
        if config.head_phase.width == config.detector.width:
            raise
        raise UserError(
            f"latency-table {config.latency_table}: expected times of the heads of the second "
            f"phase too, whose width is {config.head_phase.width}, got a table for "
            f"{config.detector.width}; give --head-phase.width {config.detector.width}, or "
            "--mode joint"
        ) from error


def with_objects(features: FrozenEncoder) -> FrozenEncoder:
    """The features. UserError where no crop to train on, or none to score on, has an object that a
    point learns: rewards would say nothing."""
    trained = features.train_batches(in_order(features.samples, 8))
    scored = (targets for _, targets in features.val_batches())
    for use, batches in (
        ("train", (features.split(arrays).targets for arrays in trained)),
        ("score", scored),
    ):
        if not any(bool(features.task.weight(targets)[2]) for targets in batches):
            raise UserError(
                f"search: expected objects in the crops to {use} candidates on, got none that a "
                "point learns; make --stage0.crop and --val-crop larger, or --stage0.samples, or "
                "add images"
            )
    return features


def say_ready(console: Console, features: FrozenEncoder) -> None:
    """That the features can be trained on."""
    seconds = features.seconds["encode"]
    say(console, f"features of the frozen encoder ready in {seconds:.1f} s: {features}")


# ---- evaluators; those of workers open what they need by themselves


def evaluator_on(config: SearchConfig, device: str, caches: Caches | None = None) -> Evaluator:
    """A worker's evaluator of the first phase.

    ``caches`` are the features that the search has put on the worker's GPU; without them it
    attaches the files.
    """
    runtime = Runtime(torch.device(device))
    return make_evaluator(config, Inputs.open(config).features(config, runtime, caches=caches))


def longer_on(config: SearchConfig, device: str, caches: Caches | None = None) -> Evaluator:
    """A worker's evaluator of the pyramids that are trained longer."""
    runtime = Runtime(torch.device(device))
    return make_longer(config, Inputs.open(config).features(config, runtime, caches=caches))


def head_evaluator_on(
    config: SearchConfig, pyramid: TrainedPyramid, device: str, caches: Caches | None = None
) -> Evaluator:
    """A worker's evaluator of the second phase."""
    runtime = Runtime(torch.device(device))
    features = Inputs.open(config).features(config, runtime, pyramid, caches)
    return make_head_evaluator(config, features)


def make_evaluator(config: SearchConfig, features: FrozenEncoder) -> Evaluator:
    """Trains pyramid and head on features of the encoder."""
    stage = DecoderOnFeatures(config.stage0, features)
    return _evaluator(config, features, stage, config.detector)


def make_longer(config: SearchConfig, features: FrozenEncoder) -> Evaluator:
    """The same for the detectors of the second phase, with the trained pyramid as a file."""
    epochs = config.head_phase.pyramid_epochs
    longer = dataclasses.replace(config.stage0, epochs=epochs, stop_early=0.0)
    return _evaluator(config, features, PyramidTraining(longer, features), config.second)


def make_head_evaluator(config: SearchConfig, features: FrozenEncoder) -> Evaluator:
    """Trains heads on features of the fixed pyramid."""
    pyramid, outputs, detector = features.encoder, features.task.outputs, config.second
    return CandidateEvaluator(
        lambda genotype: Detector(pyramid, HeadOnPyramid(genotype, outputs, detector)),
        features.costs,
        [DecoderOnFeatures(config.stage0, features)],
        features.runtime,
        image=(3, *features.val_size),
        processor=lambda genotype: features.task.processor,
        seed=config.seed,
        inputs=features.inputs,
        remedy=REMEDY,
        seconds=features.seconds,
    )


def _evaluator(
    config: SearchConfig,
    features: FrozenEncoder,
    stage: DecoderOnFeatures,
    detector: DetectorConfig,
) -> Evaluator:
    return CandidateEvaluator(
        lambda genotype: build_detector(
            features.encoder, genotype, features.task.outputs, detector
        ),
        features.costs,
        [stage],
        features.runtime,
        image=(3, *features.val_size),
        processor=lambda genotype: features.task.processor,
        seed=config.seed,
        inputs=features.inputs,
        remedy=REMEDY,
        seconds=features.seconds,
    )


class PyramidTraining(DecoderOnFeatures):
    """Trains a pyramid under the stock head; its file is the trained pyramid."""

    def show(self, model: DenseNetwork, scores: Scores) -> dict[str, bytes]:
        """As `Stage` says."""
        state = model.decoder.get_submodule("fpn").state_dict()
        return {WEIGHTS: save({name: tensor.contiguous() for name, tensor in state.items()})}


# ---- the second phase


class SecondPhase:
    """Makes the phase of the heads: the best pyramids are trained longer, then one is fixed.

    Args:
        config: settings of the search.
        inputs: what it reads.
        features: of the first phase; given up when the phase is made.
        workers: of both phases.
        console: for what is said.
    """

    def __init__(
        self,
        config: SearchConfig,
        inputs: Inputs,
        features: FrozenEncoder,
        workers: WorkerConfig,
        console: Console,
    ) -> None:
        self._config, self._inputs, self._workers = config, inputs, workers
        self._features: FrozenEncoder | None = features
        self._console = console

    def __call__(self, ranking: Sequence[Record], folder: Path) -> Phase[NASFCOSGenotype]:
        config, features = self._config, self._features
        assert features is not None, "a phase is made once"
        spent: dict[str, float] = {}
        if not folder.is_dir():
            with timed(spent, "pyramids"):
                files = self._train(ranking[: config.head_phase.pyramids], features)
            atomic_directory(folder, files)
        pyramid, runtime = _read(folder, ranking), features.runtime
        self._features = features = None  # on a GPU they take its memory
        engine, features = start_workers(
            self._workers,
            functools.partial(head_evaluator_on, config, pyramid),
            lambda: self._inputs.features(config, runtime, pyramid),
        )
        features.seconds |= spent
        say_ready(self._console, features)
        space = space_of(config, pyramid.genotype)
        return config.phase(
            config.strategy,
            space,
            derive_seed(config.seed, "heads"),
            make_head_evaluator(config, features),
            config.head_phase.budget,
            engine,
            config.stage0.stop_early,
        )

    def _train(self, chosen: Sequence[Record], features: FrozenEncoder) -> dict[str, bytes]:
        """The files of the pyramid with the highest reward after longer training."""
        config, console, space = self._config, self._console, space_of(self._config)
        count = len(chosen)
        say(
            console,
            f"the best {f'{count} pyramids are' if count > 1 else 'pyramid is'} trained for "
            f"{config.head_phase.pyramid_epochs} epochs, with width {config.head_phase.width}",
        )
        engine: Engine[NASFCOSGenotype]
        engine, _ = start_workers(
            self._workers, functools.partial(longer_on, config), lambda: features
        )
        try:
            jobs = [Job(r.index, space.from_json(r.genotype), {}) for r in chosen]
            evaluator = make_longer(config, features)
            with console.status("") as status:
                evaluations = list(
                    engine.evaluate(
                        evaluator, jobs, lambda count: status.update(f"{count} in training")
                    )
                )
        finally:
            engine.close()
        found = {
            record.index: evaluation
            for record, evaluation in zip(chosen, evaluations, strict=True)
            if evaluation.failure is None
        }
        if not found:
            causes = Counter(evaluation.failure for evaluation in evaluations)
            counted = ", ".join(f"{n} x {text}" for text, n in causes.most_common())
            raise NothingFoundError(
                f"search: all of the {count} best pyramids failed when they were trained longer "
                f"({counted}); {REMEDY}, in a new run"
            )
        rewards = {index: found[index].rewards[evaluator.feedback] for index in found}
        best = max(rewards, key=rewards.__getitem__)
        listed = ", ".join(f"{index}: {number(reward)}" for index, reward in rewards.items())
        say(console, f"rewards  {listed}; heads are searched on the pyramid of architecture {best}")
        choice = {"architecture": best, "rewards": {str(i): r for i, r in rewards.items()}}
        return {
            WEIGHTS: found[best].files[WEIGHTS],
            CHOICE: (json.dumps(choice, indent=2) + "\n").encode(),
        }


def _read(folder: Path, ranking: Sequence[Record]) -> TrainedPyramid:
    """The pyramid that is kept in the run.

    Raises:
        UserError: its files are damaged, or of no record.
    """
    remedy = f"remove {folder}: it is trained again"
    gone = next((name for name in (CHOICE, WEIGHTS) if not (folder / name).is_file()), None)
    if gone is not None:
        raise UserError(
            f"{folder / gone}: expected a file of the trained pyramid, got none; {remedy}"
        )
    index = read_object(folder / CHOICE).get("architecture")
    record = next((record for record in ranking if record.index == index), None)
    if record is None:
        raise UserError(
            f"{folder / CHOICE}: expected an architecture of the first phase, got {index!r}; "
            f"{remedy}"
        )
    weights = (folder / WEIGHTS).read_bytes()
    try:
        load(weights)
    except SafetensorError as error:
        raise UserError(
            f"{folder / WEIGHTS}: expected a complete safetensors file, got {cause(error)}; "
            f"{remedy}"
        ) from error
    return TrainedPyramid(NASFCOSSpace("fpn").from_json(record.genotype), weights)
