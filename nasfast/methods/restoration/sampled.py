"""Sampled networks, each trained for a short while and scored: what a search has to beat."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Generator
from dataclasses import dataclass, field

import torch

from nasfast.data.restoration import RestorationData, open_images
from nasfast.evaluation.candidate import CandidateEvaluator, SeedOf
from nasfast.methods.restoration.settings import SearchConfig
from nasfast.methods.restoration.train import TrainingRun
from nasfast.models.mixed_op import build_branch
from nasfast.models.restorer import Restorer, RestorerConfig
from nasfast.searches.sampling import Phase, SamplingSearch
from nasfast.spaces.ir_nas import IRNASGenotype, IRNASSpace
from nasfast.strategies import RandomSearch
from nasfast.tasks.restoration.patches import ImagePatches
from nasfast.tasks.restoration.pictures import before_and_after
from nasfast.tasks.restoration.scoring import Scores, costs, evaluate
from nasfast.training.cost import count_parameters
from nasfast.training.loop import Runtime
from nasfast.training.pictures import SAMPLES, spread
from nasfast.utils.errors import UserError
from nasfast.workers import WorkerConfig

MAX_DRAWS = 10_000


@dataclass(frozen=True)
class SizeClass(IRNASSpace):
    """Architectures whose network has a number of parameters in a range; only sampling knows it."""

    low: int = 0
    high: int = 2**63
    network: RestorerConfig = field(default_factory=RestorerConfig)
    channels: int = 1
    scale: int = 1

    def sample(self, rng: random.Random) -> IRNASGenotype:
        """Uniform over the architectures of the class.

        Raises:
            UserError: none of 10,000 draws is of the class.
        """
        sizes = []
        for _ in range(MAX_DRAWS):
            genotype = super().sample(rng)
            sizes.append(self.parameters(genotype))
            if self.low <= sizes[-1] <= self.high:
                return genotype
        raise UserError(
            f"params: none of {MAX_DRAWS} architectures has {self.low:,} to {self.high:,} "
            f"parameters; they have {min(sizes):,} to {max(sizes):,}"
        )

    def parameters(self, genotype: IRNASGenotype) -> int:
        """Those of its network: of its convolutions, and of one of the same widths without any."""
        edges = (("skip", 0), ("skip", 1))
        bare = dataclasses.replace(genotype, nodes=(edges,) * len(genotype.nodes))
        ops = [op for node in genotype.nodes for op, _ in node if op != "skip"]
        widths = [self.network.width << level for level in genotype.levels]
        return _network_parameters(bare, self.network, self.channels, self.scale) + sum(
            _branch_parameters(op, width) for op in ops for width in widths
        )


@functools.cache
def _network_parameters(
    genotype: IRNASGenotype, config: RestorerConfig, channels: int, scale: int
) -> int:
    with torch.device("meta"):
        return count_parameters(Restorer(genotype, config, channels, scale))


@functools.cache
def _branch_parameters(op: str, channels: int) -> int:
    with torch.device("meta"):
        return count_parameters(build_branch(op, channels))


@dataclass(frozen=True)
class ShortTraining:
    """What a sampled network goes through: its one stage."""

    config: SearchConfig
    data: RestorationData
    patches: ImagePatches
    runtime: Runtime
    names: tuple[str, ...] = ("stage0",)

    def build(self, genotype: IRNASGenotype) -> Restorer:
        """The network."""
        config = self.config
        return Restorer(genotype, config.network, config.channels, config.task.scale)

    def costs(self, model: Restorer) -> dict[str, float]:
        """Parameters and multiply-adds at the size of the validation images."""
        return costs(model, self.config.task, self.data.val)

    def train(self, model: Restorer, seed_of: SeedOf) -> Generator[Restorer]:
        """All steps of the recipe."""
        recipe = self.config.recipe
        self.runtime.place(model)
        TrainingRun(model, self.patches, recipe, self.runtime, seed_of("patches")).run(recipe.steps)
        yield model

    def validate(self, model: Restorer) -> Scores:
        """PSNR and SSIM on the validation images."""
        task, seed, val = self.config.task, self.config.seed, self.data.val
        keep = spread(len(val), SAMPLES)
        return evaluate(model.eval(), task, val, seed=seed, runtime=self.runtime, keep=keep)

    def show(self, model: Restorer, scores: Scores) -> dict[str, bytes]:
        """Some of the validation images before and after."""
        return before_and_after(scores.kept)


def sampled_search(
    config: SearchConfig, data: RestorationData, workers: WorkerConfig, runtime: Runtime
) -> SamplingSearch:
    """Random search of the size class."""
    space = SizeClass(
        config.supernet.layers,
        config.supernet.nodes,
        *config.size_range,
        config.network,
        config.channels,
        config.task.scale,
    )
    space.sample(random.Random(config.seed))  # refuses an empty class before a run is made
    phase = Phase(
        space,
        RandomSearch(space, config.seed),
        make_evaluator(config, data, runtime),
        config.budget,
        config.batch,
        workers.engine_for(functools.partial(evaluator_on, config)),
        config.limits,
    )
    return SamplingSearch(phase, workers=workers)


def evaluator_on(config: SearchConfig, device: str) -> CandidateEvaluator[IRNASGenotype, Restorer]:
    """A worker's evaluator."""
    data = open_images(config.data, config.channels)
    return make_evaluator(config, data, Runtime(torch.device(device)))


def make_evaluator(
    config: SearchConfig, data: RestorationData, runtime: Runtime
) -> CandidateEvaluator[IRNASGenotype, Restorer]:
    """An evaluator of one stage."""
    patches = ImagePatches(data.train, config.task, config.recipe.crop)
    stage = ShortTraining(config, data, patches, runtime)
    return CandidateEvaluator(
        stage.build,
        stage.costs,
        [stage],
        runtime,
        seed=config.seed,
        inputs={
            "training images": data.train.fingerprint(),
            "validation images": data.val.fingerprint(),
        },
        remedy="lower --recipe.lr, or --recipe.batch-size where memory is short",
        seconds={"encode": 0.0},
    )
