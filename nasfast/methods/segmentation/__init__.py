"""Decoders of compact segmentation networks (Fast NAS, CVPR 2019)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from nasfast.data.checks import Findings
from nasfast.inference.model import Model
from nasfast.methods import flags
from nasfast.methods.base import Architecture, Method, Split
from nasfast.methods.segmentation.check import CheckConfig, check
from nasfast.methods.segmentation.evaluate import EvaluateConfig, evaluate, inputs, score
from nasfast.methods.segmentation.report import SegmentationReport
from nasfast.methods.segmentation.search import build
from nasfast.methods.segmentation.settings import (
    PRESETS,
    SearchConfig,
    continued,
    parse,
    search_with,
)
from nasfast.methods.segmentation.train import FIRST, SegmentationTraining, TrainConfig, resolve
from nasfast.models.build import SEGMENTER
from nasfast.models.zoo import ZOO
from nasfast.searches.sampling import SamplingSearch
from nasfast.spaces.fast_nas import FastNASGenotype, FastNASSpace
from nasfast.training.loop import Runtime
from nasfast.utils.config import override
from nasfast.utils.interrupt import Interrupt

ARCHITECTURES = {
    name: Architecture(entry.genotype.to_json(), Path("runs") / name, {})
    for name, entry in ZOO.items()
    if entry.method == "segmentation"
}


class Segmentation(Method):
    """Decoders for a MobileNet-v2 encoder, sampled by a controller."""

    name = "segmentation"
    space = FastNASSpace().name
    search_settings = SearchConfig
    train_settings = TrainConfig
    check_settings = CheckConfig
    model_format = SEGMENTER
    report = SegmentationReport()
    zoo = ARCHITECTURES

    def parse_search(self, argv: Sequence[str]) -> SearchConfig:
        return parse(argv)

    def search_with(self, settings: Mapping[str, Any]) -> SearchConfig:
        return search_with(PRESETS, settings)

    def continued(
        self, settings: SearchConfig, checkpoint: Mapping[str, Any], budget: int | None
    ) -> SearchConfig:
        return continued(settings, checkpoint, budget)

    def build(
        self, settings: SearchConfig, interrupt: Interrupt, console: Console
    ) -> tuple[SamplingSearch, SearchConfig]:
        return build(settings, interrupt, console)

    def check(self, settings: CheckConfig) -> Findings:
        return check(settings)

    def genotype(self, obj: object) -> FastNASGenotype:
        return FastNASSpace().from_json(obj)

    def parse_train(
        self, argv: Sequence[str], found: Mapping[str, Any], description: str | None
    ) -> TrainConfig:
        return flags.parse(TrainConfig(tyro.MISSING), argv, "nasfast train", description, FIRST)

    def train_with(
        self, source: Path, settings: Mapping[str, Any], found: Mapping[str, Any]
    ) -> TrainConfig:
        return override(TrainConfig(source), settings, "train")

    def resolve(self, settings: TrainConfig, architecture: Architecture) -> TrainConfig:
        return resolve(settings, architecture)

    def training(
        self, settings: TrainConfig, genotype: FastNASGenotype, out: Path, runtime: Runtime
    ) -> SegmentationTraining:
        return SegmentationTraining(settings, genotype, out, runtime)

    def parse_evaluate(self, argv: Sequence[str], description: str | None) -> EvaluateConfig:
        return flags.parse(EvaluateConfig(tyro.MISSING), argv, "nasfast evaluate", description)

    def inputs(self, model: Model, data: str, split: Split, count: int) -> list[Tensor]:
        return inputs(model, data, split, count)

    def score(self, model: Model, data: str, split: Split, runtime: Runtime) -> dict[str, float]:
        return score(model, data, split, runtime)

    def evaluate(self, settings: EvaluateConfig) -> tuple[Mapping[str, Any], Table]:
        return evaluate(settings)
