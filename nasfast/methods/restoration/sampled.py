"""Sampled networks, each trained for a short while and scored: what a search has to beat."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Generator
from dataclasses import dataclass, field

import torch

from nasfast.data.restoration import RestorationData
from nasfast.evaluation.candidate import CandidateEvaluator, SeedOf
from nasfast.methods.restoration.settings import SearchConfig
from nasfast.methods.restoration.size import TOLERANCE, Size, parameters_by_width
from nasfast.methods.restoration.train import TrainingRun
from nasfast.models.restorer import Restorer, RestorerConfig
from nasfast.searches.sampling import SamplingSearch
from nasfast.spaces.ir_nas import IRNASGenotype, IRNASSpace
from nasfast.tasks.restoration.patches import ImagePatches, patch_side
from nasfast.tasks.restoration.pictures import before_and_after
from nasfast.tasks.restoration.processor import RestorationProcessor
from nasfast.tasks.restoration.scoring import Scores, costs, evaluate, input_size
from nasfast.training.loop import Runtime
from nasfast.training.pictures import SAMPLES, spread
from nasfast.utils.errors import UserError
from nasfast.workers import WorkerConfig

MAX_DRAWS = 10_000
MAX_MUTANTS = 100


@dataclass(frozen=True)
class SizeClass(IRNASSpace):
    """Architectures whose network is of a size class."""

    sizes: Size = field(default_factory=Size)
    network: RestorerConfig = field(default_factory=RestorerConfig)
    channels: int = 1
    scale: int = 1

    def valid(self, genotype: IRNASGenotype) -> bool:
        """Whether its network is of the class."""
        return self.sizes == Size() or self.parameters(genotype) in self.sizes

    def sample(self, rng: random.Random) -> IRNASGenotype:
        """Uniform over the architectures of the class.

        Raises:
            UserError: none of 10,000 draws is of the class.
        """
        tried = []
        for _ in range(MAX_DRAWS):
            tried.append(super().sample(rng))
            if self.valid(tried[-1]):
                return tried[-1]
        found = [self.parameters(genotype) for genotype in tried]
        wanted = f"has {self.sizes.low:,} to {self.sizes.high:,} parameters"
        if self.sizes.target is not None:
            wanted = (
                f"comes within {TOLERANCE:.0%} of {self.sizes.target:,} parameters at any width"
            )
        raise UserError(
            f"params: expected an architecture that {wanted}, got none in {MAX_DRAWS} draws; they "
            f"have {min(found):,} to {max(found):,}: change --params"
        )

    def mutate(self, genotype: IRNASGenotype, rng: random.Random) -> IRNASGenotype:
        """One decision changes, such that the network stays in the class; where 100 changes leave
        it, the last of them."""
        for _ in range(MAX_MUTANTS):
            mutant = super().mutate(genotype, rng)
            if self.valid(mutant):
                break
        return mutant

    def config(self, genotype: IRNASGenotype) -> RestorerConfig:
        """Its network's, of the width that fits."""
        return self.sizes.fitted(genotype, self.network, self.channels, self.scale)

    def parameters(self, genotype: IRNASGenotype) -> int:
        """Those of its network."""
        count = parameters_by_width(genotype, self.network, self.channels, self.scale)
        return count(self.config(genotype).width)


def space_of(config: SearchConfig) -> SizeClass:
    """The architectures that the settings let a search sample."""
    return SizeClass(
        **dataclasses.asdict(config.supernet.space),
        sizes=config.size,
        network=config.network,
        channels=config.channels,
        scale=config.task.scale,
    )


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
        network = space_of(config).config(genotype)
        return Restorer(genotype, network, config.channels, config.task.scale)

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
    """Search of the size class, by the strategy of the settings."""
    space = space_of(config)
    space.sample(random.Random(config.seed))  # refuses an empty class before a run is made
    phase = config.phase(
        config.strategy,
        space,
        config.seed,
        make_evaluator(config, data, runtime),
        config.budget,
        workers.engine_for(functools.partial(evaluator_on, config)),
    )
    return SamplingSearch(phase, workers=workers)


def evaluator_on(config: SearchConfig, device: str) -> CandidateEvaluator[IRNASGenotype, Restorer]:
    """A worker's evaluator."""
    data = config.task.open(config.data, config.channels)
    return make_evaluator(config, data, Runtime(torch.device(device)))


def make_evaluator(
    config: SearchConfig, data: RestorationData, runtime: Runtime
) -> CandidateEvaluator[IRNASGenotype, Restorer]:
    """An evaluator of one stage."""
    crop = patch_side(config.recipe.crop, config.network.reduction, data.train)
    patches = ImagePatches(data.train, config.task, crop)
    stage = ShortTraining(config, data, patches, runtime)
    return CandidateEvaluator(
        stage.build,
        stage.costs,
        [stage],
        runtime,
        image=(config.channels, *input_size(config.task, data.val)),
        processor=lambda genotype: RestorationProcessor.of(
            config.task, config.channels, genotype, config.network.reduction
        ),
        seed=config.seed,
        inputs={
            "training images": data.train.fingerprint(),
            "validation images": data.val.fingerprint(),
        },
        remedy="lower --recipe.lr, or --recipe.batch-size where memory is short",
        seconds={"encode": 0.0},
    )
