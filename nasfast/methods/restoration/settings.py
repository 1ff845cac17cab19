"""Search a restoration network: ``nasfast search restoration``.

``--data DIR`` takes train/ and test/ such as BSDS500's, a folder of images, or pairs of degraded
and clean images; without it, generated images. ``--task NAME`` is denoising, deraining, dehazing,
super-resolution or inpainting, ``--task.SETTING VALUE`` its settings. ``--resume RUN`` continues a
run. (IR-NAS, CVPR 2020)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Annotated, Any, Literal

import tyro

from nasfast.methods import flags
from nasfast.methods.restoration.size import Size, sized
from nasfast.methods.restoration.task_flags import override_with_task, parse_with_task
from nasfast.methods.restoration.train import Recipe
from nasfast.models.restorer import RestorerConfig
from nasfast.models.supernet import SupernetConfig
from nasfast.searches.bilevel import ArchitectureConfig, BilevelConfig, WeightsConfig
from nasfast.searches.sampling import SamplingSettings, default_threads
from nasfast.strategies import GRADIENT_STRATEGIES, STRATEGIES, Name, PPOConfig, settled
from nasfast.strategies.gradient import Temperature
from nasfast.tasks.restoration import RestorationTask, task_from_json
from nasfast.tasks.restoration.denoising import Denoising
from nasfast.utils.cli import flag_value
from nasfast.utils.config import Count
from nasfast.utils.errors import UserError
from nasfast.utils.files import data_path, expanded

SAMPLED = f"a --strategy that samples, {', '.join(STRATEGIES)}"
SIZES = {"demo": "20K", "quick": "90K"}
"""Parameters of sampled networks, by preset, where the user says nothing about it."""


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
    task: RestorationTask = field(default_factory=Denoising)
    """What networks restore: --task NAME, and its settings as --task.SETTING."""
    channels: Literal[1, 3] = 1
    """1: grey. 3: colour, the default of dehazing."""
    strategy: Literal[Name, "darts", "sigmoid", "proxyless", "gumbel"] = "darts"
    """Sampled networks, each trained for a short while: predictor, what a model of the rewards so
    far expects most of; evolution, mutants of the best; ppo, a recurrent controller; random, the
    baseline to beat. By gradient: darts, all operations of a supernet mixed, as published; sigmoid,
    the same, each by its own sigmoid; proxyless, gumbel, single paths through it. auto: what is
    best for the budget, by docs/results.md; paper has darts."""
    bilevel: BilevelConfig = field(default_factory=BilevelConfig)
    """The search on the supernet."""
    supernet: SupernetConfig = field(default_factory=SupernetConfig)
    """Size of the supernet; sampled networks take layers, nodes and widths from it."""
    network: RestorerConfig = field(default_factory=RestorerConfig)
    """Size of the networks that are found; --params decides the width of sampled ones."""
    temperature: Temperature = field(default_factory=Temperature)
    """Of --strategy gumbel."""
    budget: Count = 8
    """Networks to sample."""
    params: str | int | None = None
    """Parameters of a sampled network, so that networks of one size are compared: 90K gives each
    the width that comes closest, and leaves out those that come not within 25 %. LOW:HIGH leaves
    out those beyond at the given --network.width. Default: 20K in demo, 90K in quick; any where
    --network.width is given."""
    recipe: Recipe = field(default_factory=Recipe)
    """Training of each of them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.task, RestorationTask):  # its description, from a file
            object.__setattr__(self, "task", task_from_json(self.task))
        _ = self.size
        if self.strategy in GRADIENT_STRATEGIES:
            self._refuse_sampling()

    @property
    def samples(self) -> bool:
        """Whether networks are sampled and trained one by one; the others share a supernet."""
        return self.strategy in STRATEGIES

    @property
    def size(self) -> Size:
        """Parameters of a sampled network; UserError for another form."""
        return Size.of(self.params)

    def _refuse_sampling(self) -> None:
        """Raise UserError where a search by gradient is given a setting of sampled networks."""
        if self.params is not None:
            raise UserError(
                f"params: expected {SAMPLED}, got {self.strategy}; a search by gradient is not "
                "held to a size"
            )
        if self.objectives.costs:
            raise UserError(
                f"objective: expected {SAMPLED}, got {self.strategy}; a search by gradient looks "
                "for the score alone"
            )
        if self.limits:
            raise UserError(
                f"max_params, max_macs, constraint: expected {SAMPLED}, got {self.strategy}; "
                "limits are for sampled architectures, a search by gradient is held to none"
            )
        if (self.workers, self.devices, self.engine) != (None, None, "process"):
            raise UserError(
                f"workers, devices, engine: expected {SAMPLED}, got {self.strategy}; a search by "
                "gradient trains one supernet"
            )


FIRST = (
    "method",
    "data",
    "preset",
    "task",
    "channels",
    "strategy",
    "budget",
    "params",
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
        ppo=PPOConfig.short_budget(),
        bilevel=BilevelConfig(
            epochs=12,
            warmup=3,
            patience=4,
            batch_size=8,
            crop=32,
            val_crop=96,
            weights=WeightsConfig("adam", 3e-3, 1e-4, cycles=0.5),
            architecture=ArchitectureConfig(0.03, 0.0, "perturbation", max_skips=1),
        ),
        supernet=SupernetConfig(layers=2, nodes=2, width=4, memory="save"),
        network=RestorerConfig(8, 16, 16, 8, residual=True, atrous=False),
        budget=12,
        recipe=Recipe(steps=300, batch_size=4, crop=16),
        temperature=Temperature(steps=50),
    ),
    "quick": SearchConfig(
        preset="quick",
        strategy="auto",
        batch=PPOConfig.short_budget().batch_size,
        ppo=PPOConfig.short_budget(),
        bilevel=BilevelConfig(
            epochs=24,
            warmup=8,
            patience=8,
            batch_size=8,
            crop=32,
            val_crop=160,
            weights=WeightsConfig("adam", 0.01, 1e-4, cycles=0.5, weight_decay=0.0),
            architecture=ArchitectureConfig(0.02, 0.0, "perturbation", max_skips=2),
        ),
        supernet=SupernetConfig(layers=3, nodes=3, width=8, memory="save"),
        network=RestorerConfig(16, 16, 32, 16, residual=True, atrous=False),
        budget=24,
        recipe=Recipe(steps=1000, batch_size=4, crop=24),
        temperature=Temperature(steps=250),
    ),
    "paper": SearchConfig(preset="paper", batch=4, recipe=Recipe(steps=20_000)),
}


def parse(argv: Sequence[str]) -> SearchConfig:
    """Settings from a command line: the preset's, overridden flag by flag."""
    preset = flags.preset_of(PRESETS, flag_value(argv, "--preset"), flag_value(argv, "--data"))
    config = parse_with_task(preset, argv, "nasfast search", __doc__, FIRST)
    return _finished(config, sized(argv))


def search_with(settings: Mapping[str, Any]) -> SearchConfig:
    """Settings by name, over those of the preset."""
    preset = flags.preset_of(PRESETS, settings.get("preset"), settings.get("data"))
    return _finished(override_with_task(preset, settings, "search"), sized(settings))


def _finished(config: SearchConfig, sized: bool) -> SearchConfig:
    """With absolute paths, the strategy itself instead of "auto", and threads and size of a
    sampled network.

    Args:
        config: as given.
        sized: whether it was given what decides the size.
    """
    strategy: Any = settled(config.strategy, config.budget)
    config = dataclasses.replace(config, strategy=strategy)
    threads, params = config.threads, config.params
    if config.samples:
        threads = threads or default_threads(config.batch)
        params = params if sized else SIZES.get(config.preset)
    return dataclasses.replace(
        config,
        threads=threads,
        params=params,
        data=data_path(config.data),
        runs=expanded(config.runs).resolve(),
        latency_table=config.latency_table and expanded(config.latency_table).resolve(),
    )


def continued(
    config: SearchConfig, checkpoint: Mapping[str, Any], budget: int | None
) -> SearchConfig:
    """The settings with another budget, or with that of the last time.

    Raises:
        UserError: a budget for a search by gradient.
    """
    if budget is None:
        return dataclasses.replace(config, budget=checkpoint.get("budget", config.budget))
    if not config.samples:
        raise UserError(
            "resume: expected no --budget, as the learning rate of a search by gradient follows "
            f"its number of epochs, got {budget}; start a new run with another --bilevel.epochs"
        )
    return dataclasses.replace(config, budget=budget)
