"""Restoration networks by gradient: cells and widths (IR-NAS, CVPR 2020)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from nasfast.data.checks import Findings
from nasfast.inference.model import Model
from nasfast.methods.base import Architecture, Method, Split
from nasfast.methods.restoration.check import CheckConfig, check
from nasfast.methods.restoration.evaluate import (
    EvaluateConfig,
    evaluate,
    inputs,
    parse_evaluate,
    score,
)
from nasfast.methods.restoration.report import RestorationReport
from nasfast.methods.restoration.search import build
from nasfast.methods.restoration.settings import SearchConfig, continued, parse, search_with
from nasfast.methods.restoration.train import (
    RestorationTraining,
    TrainConfig,
    parse_train,
    resolve,
    train_with,
)
from nasfast.models.build import RESTORER
from nasfast.models.zoo import ZOO
from nasfast.searches.base import Search
from nasfast.spaces.ir_nas import IRNASGenotype, IRNASSpace
from nasfast.tasks.restoration import task_from_json
from nasfast.training.loop import Runtime
from nasfast.utils.interrupt import Interrupt

ARCHITECTURES = {
    name: Architecture(
        entry.genotype.to_json(),
        Path("runs") / name,
        {
            "network": dataclasses.asdict(entry.network),
            "task": task_from_json(entry.task).describe(),
            "channels": entry.channels,
        },
    )
    for name, entry in ZOO.items()
    if entry.method == "restoration"
}


class Restoration(Method):
    """Networks of cells and widths, derived from a supernet or sampled."""

    name = "restoration"
    space = IRNASSpace().name
    search_settings = SearchConfig
    train_settings = TrainConfig
    check_settings = CheckConfig
    model_format = RESTORER
    report = RestorationReport()
    zoo = ARCHITECTURES

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
    ) -> tuple[Search, SearchConfig]:
        return build(settings, interrupt, console)

    def check(self, settings: CheckConfig) -> Findings:
        return check(settings)

    def genotype(self, obj: object) -> IRNASGenotype:
        return IRNASGenotype.from_json(obj)

    def parse_train(
        self, argv: Sequence[str], found: Mapping[str, Any], description: str | None
    ) -> TrainConfig:
        return parse_train(argv, found, description)

    def train_with(
        self, source: Path, settings: Mapping[str, Any], found: Mapping[str, Any]
    ) -> TrainConfig:
        return train_with(source, settings, found)

    def resolve(self, settings: TrainConfig, architecture: Architecture) -> TrainConfig:
        return resolve(settings, architecture)

    def training(
        self, settings: TrainConfig, genotype: IRNASGenotype, out: Path, runtime: Runtime
    ) -> RestorationTraining:
        return RestorationTraining(settings, genotype, out, runtime)

    def parse_evaluate(self, argv: Sequence[str], description: str | None) -> EvaluateConfig:
        return parse_evaluate(argv, description)

    def inputs(self, model: Model, data: str, split: Split, count: int) -> list[Tensor]:
        return inputs(model, data, split, count)

    def score(self, model: Model, data: str, split: Split, runtime: Runtime) -> dict[str, float]:
        return score(model, data, split, runtime)

    def evaluate(self, settings: EvaluateConfig) -> tuple[Mapping[str, Any], Table]:
        return evaluate(settings)
