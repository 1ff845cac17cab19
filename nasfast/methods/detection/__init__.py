"""Anchor-free detectors: pyramids and heads (NAS-FCOS, CVPR 2020)."""

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
from nasfast.methods.detection.check import CheckConfig, check
from nasfast.methods.detection.evaluate import EvaluateConfig, evaluate, inputs, score
from nasfast.methods.detection.report import DetectionReport
from nasfast.methods.detection.search import build
from nasfast.methods.detection.settings import SearchConfig, continued, parse, search_with
from nasfast.methods.detection.train import (
    FIRST,
    DetectionTraining,
    TrainConfig,
    defaults,
    published,
    resolve,
)
from nasfast.models.build import DETECTOR
from nasfast.searches.sampling import SamplingSearch
from nasfast.spaces.nas_fcos import NASFCOSGenotype, NASFCOSSpace
from nasfast.training.loop import Runtime
from nasfast.utils.config import override
from nasfast.utils.interrupt import Interrupt


class Detection(Method):
    """Anchor-free detectors: pyramids, then heads, sampled by a controller."""

    name = "detection"
    space = NASFCOSSpace().name
    search_settings = SearchConfig
    train_settings = TrainConfig
    check_settings = CheckConfig
    model_format = DETECTOR
    report = DetectionReport()
    zoo = published()

    def parse_search(self, argv: Sequence[str]) -> SearchConfig:
        return parse(argv)

    def search_with(self, settings: Mapping[str, Any]) -> SearchConfig:
        return search_with(settings)

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

    def genotype(self, obj: object) -> NASFCOSGenotype:
        return NASFCOSSpace().from_json(obj)

    def parse_train(
        self, argv: Sequence[str], found: Mapping[str, Any], description: str | None
    ) -> TrainConfig:
        return flags.parse(defaults(tyro.MISSING, found), argv, "nasfast train", description, FIRST)

    def train_with(
        self, source: Path, settings: Mapping[str, Any], found: Mapping[str, Any]
    ) -> TrainConfig:
        return override(defaults(source, found), settings, "train")

    def resolve(self, settings: TrainConfig, architecture: Architecture) -> TrainConfig:
        return resolve(settings, architecture)

    def training(
        self, settings: TrainConfig, genotype: NASFCOSGenotype, out: Path, runtime: Runtime
    ) -> DetectionTraining:
        return DetectionTraining(settings, genotype, out, runtime)

    def parse_evaluate(self, argv: Sequence[str], description: str | None) -> EvaluateConfig:
        return flags.parse(EvaluateConfig(tyro.MISSING), argv, "nasfast evaluate", description)

    def inputs(self, model: Model, data: str, split: Split, count: int) -> list[Tensor]:
        return inputs(model, data, split, count)

    def score(self, model: Model, data: str, split: Split, runtime: Runtime) -> dict[str, float]:
        return score(model, data, split, runtime)

    def evaluate(self, settings: EvaluateConfig) -> tuple[Mapping[str, Any], Table]:
        return evaluate(settings)
