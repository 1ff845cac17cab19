"""Decoders of compact networks for dense tasks (Fast NAS, CVPR 2019), and what their kin share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

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
from nasfast.methods.segmentation.report import DecoderReport, SegmentationReport
from nasfast.methods.segmentation.search import build
from nasfast.methods.segmentation.settings import (
    DESCRIPTION,
    PRESETS,
    DecoderSearchConfig,
    SearchConfig,
    continued,
    parse_with,
    search_with,
)
from nasfast.methods.segmentation.tasks import BINDINGS
from nasfast.methods.segmentation.train import (
    FIRST,
    DecoderTrainConfig,
    DecoderTraining,
    TrainConfig,
    resolve,
)
from nasfast.models.build import SEGMENTER
from nasfast.models.zoo import ZOO
from nasfast.report import MethodReport
from nasfast.searches.sampling import SamplingSearch
from nasfast.spaces.base import Genotype
from nasfast.spaces.fast_nas import FastNASSpace
from nasfast.training.loop import Runtime
from nasfast.utils.config import override
from nasfast.utils.interrupt import Interrupt


def architectures(method: str) -> dict[str, Architecture]:
    """Those of the zoo that a method trains."""
    return {
        name: Architecture(entry.genotype.to_json(), Path("runs") / name, {})
        for name, entry in ZOO.items()
        if entry.method == method
    }


class DecoderMethod(Method):
    """A search of segmentation networks, whatever its decoders."""

    search_settings: ClassVar[type[DecoderSearchConfig]]
    train_settings: ClassVar[type[DecoderTrainConfig]]
    presets: ClassVar[Mapping[str, DecoderSearchConfig]]
    description: ClassVar[str]
    """Help of the search."""
    report: ClassVar[DecoderReport]

    def report_of(self, settings: Mapping[str, Any]) -> MethodReport:
        return type(self.report)(BINDINGS[settings.get("task", "segmentation")])

    def parse_search(self, argv: Sequence[str]) -> DecoderSearchConfig:
        return parse_with(self.presets, self.description, argv)

    def search_with(self, settings: Mapping[str, Any]) -> DecoderSearchConfig:
        return search_with(self.presets, settings)

    def continued(
        self, settings: DecoderSearchConfig, checkpoint: Mapping[str, Any], budget: int | None
    ) -> DecoderSearchConfig:
        return continued(settings, checkpoint, budget)

    def build(
        self, settings: DecoderSearchConfig, interrupt: Interrupt, console: Console
    ) -> tuple[SamplingSearch, DecoderSearchConfig]:
        return build(settings, interrupt, console)

    def check(self, settings: CheckConfig) -> Findings:
        return check(settings)

    def genotype(self, obj: object) -> Genotype:
        genotype: Genotype = self.search_settings.decoders.space.from_json(obj)
        return genotype

    def parse_train(
        self, argv: Sequence[str], found: Mapping[str, Any], description: str | None
    ) -> DecoderTrainConfig:
        default = self.train_settings(tyro.MISSING)
        return flags.parse(default, argv, "nasfast train", description, FIRST)

    def train_with(
        self, source: Path, settings: Mapping[str, Any], found: Mapping[str, Any]
    ) -> DecoderTrainConfig:
        return override(self.train_settings(source), settings, "train")

    def resolve(
        self, settings: DecoderTrainConfig, architecture: Architecture
    ) -> DecoderTrainConfig:
        return resolve(settings, architecture)

    def training(
        self, settings: DecoderTrainConfig, genotype: Genotype, out: Path, runtime: Runtime
    ) -> DecoderTraining:
        return DecoderTraining(settings, genotype, out, runtime)

    def parse_evaluate(self, argv: Sequence[str], description: str | None) -> EvaluateConfig:
        return flags.parse(EvaluateConfig(tyro.MISSING), argv, "nasfast evaluate", description)

    def inputs(self, model: Model, data: str, split: Split, count: int) -> list[Tensor]:
        return inputs(model, data, split, count)

    def score(self, model: Model, data: str, split: Split, runtime: Runtime) -> dict[str, float]:
        return score(model, data, split, runtime)

    def evaluate(self, settings: EvaluateConfig) -> tuple[Mapping[str, Any], Table]:
        return evaluate(settings)


class Segmentation(DecoderMethod):
    """Decoders for segmentation, depth or keypoints on an encoder, sampled by a controller."""

    name = "segmentation"
    space = FastNASSpace().name
    search_settings = SearchConfig
    train_settings = TrainConfig
    check_settings = CheckConfig
    presets = PRESETS
    description = DESCRIPTION
    model_format = SEGMENTER
    report = SegmentationReport(BINDINGS["segmentation"])
    zoo = architectures("segmentation")
