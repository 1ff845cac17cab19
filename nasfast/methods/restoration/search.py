"""Search a restoration network: ``python -m nasfast.search restoration``.

``--data DIR`` takes train/ and test/ such as BSDS500's, a folder of images, or pairs of degraded
and clean images; without it, generated images. ``--task NAME`` is denoising, deraining,
super-resolution or inpainting, ``--task.SETTING VALUE`` its settings. ``--resume RUN`` continues a
run. (IR-NAS, CVPR 2020)
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console

from nasfast.data.restoration import RestorationData, open_images
from nasfast.methods.restoration.candidates import (
    RestorationEvaluator,
    SizeClass,
    parse_range,
)
from nasfast.methods.restoration.settings import parse as parse_with_task
from nasfast.methods.restoration.train import Recipe
from nasfast.models.restorer import RestorerConfig
from nasfast.models.supernet import Supernet, SupernetConfig
from nasfast.searches.bilevel import (
    ArchitectureConfig,
    BilevelConfig,
    SupernetSearch,
    WeightsConfig,
)
from nasfast.searches.sampling import Phase, SamplingSearch, SamplingSettings, default_threads
from nasfast.spaces.ir_nas import IRNASSpace
from nasfast.strategies import RandomSearch
from nasfast.strategies.gradient import Temperature, make_relaxation
from nasfast.tasks.restoration import task_from_json
from nasfast.tasks.restoration.denoising import Denoising
from nasfast.training.cost import count_parameters
from nasfast.training.loop import Runtime
from nasfast.utils.cli import flag_value, say
from nasfast.utils.config import require_positive
from nasfast.utils.interrupt import Interrupt
from nasfast.utils.seeding import derive_seed
from nasfast.workers import WorkerConfig


@dataclasses.dataclass(frozen=True)
class SearchConfig(SamplingSettings):
    """Settings of a search; a preset gives the defaults."""

    method: Annotated[Literal["restoration"], tyro.conf.Positional] = "restoration"
    """What to search."""
    data: str = "synthetic"
    """"synthetic", a folder with train/ and test/ such as BSDS500's, a folder of images, or pairs
    of degraded and clean images."""
    preset: Literal["demo", "quick", "paper"] = "demo"
    """demo: a minute on a laptop (default for the synthetic set). quick: some ten minutes on two
    cores (default for other data). paper: the published search, for a GPU."""
    task: Mapping[str, Any] = field(default_factory=Denoising().describe)
    """What networks restore: --task NAME, and its settings as --task.SETTING."""
    channels: Literal[1, 3] = 1
    """1: grey. 3: colour."""
    strategy: Literal["darts", "proxyless", "gumbel", "random"] = "darts"
    """darts: all operations of the supernet mixed, as published. proxyless, gumbel: single paths
    through it. random: no supernet; sampled architectures, each trained for a short while."""
    bilevel: BilevelConfig = field(default_factory=BilevelConfig)
    """The search on the supernet."""
    supernet: SupernetConfig = field(default_factory=SupernetConfig)
    """Size of the supernet; --strategy random takes layers and nodes from it."""
    network: RestorerConfig = field(default_factory=RestorerConfig)
    """Size of the networks that are derived."""
    temperature: Temperature = field(default_factory=Temperature)
    """Of --strategy gumbel."""
    budget: int = 8
    """Architectures to evaluate with --strategy random."""
    params: str | None = None
    """LOW:HIGH, the parameters of the networks that --strategy random samples."""
    recipe: Recipe = field(default_factory=Recipe)
    """Training of each of them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "budget")
        parse_range(self.params)
        if self.params is not None and self.strategy != "random":
            raise ValueError(
                f"params: expected --strategy random, which samples, got {self.strategy}; a search "
                "by gradient is not held to a size"
            )
        if (self.workers, self.devices, self.engine) != (None, None, "process") and (
            self.strategy != "random"
        ):
            raise ValueError(
                "workers, devices, engine: expected --strategy random, which samples, got "
                f"{self.strategy}; a search by gradient trains one supernet"
            )


PRESETS = {
    "demo": SearchConfig(
        preset="demo",
        batch=4,
        bilevel=BilevelConfig(
            epochs=12,
            warmup=3,
            patience=4,
            batch_size=8,
            crop=32,
            val_crop=96,
            weights=WeightsConfig("adam", 3e-3, 1e-4, cycles=0.5),
            architecture=ArchitectureConfig(0.03, weight_decay=0.0),
        ),
        supernet=SupernetConfig(layers=2, nodes=2, width=4, memory="save"),
        network=RestorerConfig(8, 16, 16, 8, residual=True, atrous=False),
        budget=4,
        recipe=Recipe(steps=100, batch_size=4),
        temperature=Temperature(steps=50),
    ),
    "quick": SearchConfig(
        preset="quick",
        batch=4,
        bilevel=BilevelConfig(
            epochs=24,
            warmup=8,
            patience=8,
            batch_size=8,
            crop=32,
            val_crop=160,
            weights=WeightsConfig("adam", 0.01, 1e-4, cycles=0.5, weight_decay=0.0),
            architecture=ArchitectureConfig(0.02, weight_decay=0.0),
        ),
        supernet=SupernetConfig(layers=3, nodes=3, width=8, memory="save"),
        network=RestorerConfig(16, 16, 32, 16, residual=True, atrous=False),
        recipe=Recipe(steps=300),
        temperature=Temperature(steps=250),
    ),
    "paper": SearchConfig(preset="paper", batch=4, recipe=Recipe(steps=20_000)),
}


def parse(argv: Sequence[str]) -> SearchConfig:
    """Settings from a command line: the preset's, overridden flag by flag."""
    preset = flag_value(argv, "--preset")
    if preset not in PRESETS:  # absent, or wrong and then refused by the parser
        preset = "demo" if flag_value(argv, "--data") in (None, "synthetic") else "quick"
    config = parse_with_task(
        SearchConfig, argv, prog="nasfast.search", description=__doc__, default=PRESETS[preset]
    )
    data, threads = config.data, config.threads
    if config.strategy == "random":
        threads = threads or default_threads(config.batch)
    return dataclasses.replace(
        config,
        threads=threads,
        data=data if data == "synthetic" else str(Path(data).expanduser().resolve()),
        runs=config.runs.expanduser().resolve(),
    )


def continued(
    config: SearchConfig, checkpoint: Mapping[str, Any], budget: int | None
) -> SearchConfig:
    """The settings with another budget, or with that of the last time.

    Raises:
        ValueError: a budget for a search by gradient.
    """
    if budget is None:
        return dataclasses.replace(config, budget=checkpoint.get("budget", config.budget))
    if config.strategy != "random":
        raise ValueError(
            "resume: expected no --budget, as the learning rate of a search by gradient follows "
            f"its number of epochs, got {budget}; start a new run with another --bilevel.epochs"
        )
    return dataclasses.replace(config, budget=budget)


def build(
    config: SearchConfig, interrupt: Interrupt, console: Console
) -> tuple[SupernetSearch | SamplingSearch, SearchConfig]:
    """Open the images and make the supernet."""
    workers = WorkerConfig.of(
        workers=config.workers if config.strategy == "random" else 1,
        devices=config.devices or config.device,
        threads=torch.get_num_threads(),
        engine=config.engine,
        batch=config.batch,
    )
    runtime = Runtime(torch.device(workers.devices[0]), interrupt.check)
    task = task_from_json(config.task)
    data = open_images(config.data, config.channels)
    space = IRNASSpace(config.supernet.layers, config.supernet.nodes)
    halves = data.halves()
    say(
        console,
        f"task     {task.label}\n"
        f"data     {data.train.name}: {len(halves[0])} images for the weights, {len(halves[1])} "
        f"for the architecture, {len(data.val)} to score\n"
        f"device   {workers}, {runtime.precision}\n"
        f"space    {space.size():.2e} networks; strategy {config.strategy}",
    )
    if config.strategy == "random":
        low, high = parse_range(config.params)
        sizes = SizeClass(
            space.layers, space.nodes, low, high, config.network, config.channels, task.scale
        )
        sizes.sample(random.Random(config.seed))  # refuses an empty class before a run is made
        phase = Phase(
            sizes,
            RandomSearch(sizes, config.seed),
            _evaluator(config, data, runtime),
            config.budget,
            config.batch,
            workers.engine_for(functools.partial(evaluator_on, config)),
        )
        search = SamplingSearch(phase, workers=workers)
        return search, config
    torch.manual_seed(derive_seed(config.seed, "supernet"))
    model = Supernet(config.supernet, config.channels, task.scale)
    architecture = sum(p.numel() for p in model.architecture())
    say(
        console,
        f"supernet {count_parameters(model) - architecture:,} weights, {architecture} architecture "
        "parameters",
    )
    return SupernetSearch(
        task,
        halves,
        data.val,
        model,
        make_relaxation(
            config.strategy, derive_seed(config.seed, "relaxation"), config.temperature
        ),
        config.network,
        config.bilevel,
        runtime,
        seed=config.seed,
    ), config


def evaluator_on(config: SearchConfig, device: str) -> RestorationEvaluator:
    """A worker's evaluator."""
    return _evaluator(
        config, open_images(config.data, config.channels), Runtime(torch.device(device))
    )


def _evaluator(
    config: SearchConfig, data: RestorationData, runtime: Runtime
) -> RestorationEvaluator:
    task = task_from_json(config.task)
    return RestorationEvaluator(
        task, data, config.network, config.recipe, runtime, seed=config.seed
    )
