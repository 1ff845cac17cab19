"""Sampled architectures, each trained for a short while and scored: what a search has to beat."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from nasfast.data.restoration import RestorationData
from nasfast.methods.restoration.train import Fitting, Recipe
from nasfast.models.restorer import Restorer, RestorerConfig
from nasfast.runs.records import Evaluation
from nasfast.spaces.ir_nas import IRNASGenotype, IRNASSpace
from nasfast.tasks.restoration.base import ImagePatches, RestorationTask, evaluate
from nasfast.training.cost import count_macs, count_parameters
from nasfast.training.loop import NonFiniteLossError, Runtime
from nasfast.utils.seeding import derive_seed

FEEDBACK = "stage0"
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
            ValueError: none of 10,000 draws is of the class.
        """
        sizes = []
        for _ in range(MAX_DRAWS):
            genotype = super().sample(rng)
            with torch.device("meta"):
                network = Restorer(genotype, self.network, self.channels, self.scale)
            sizes.append(count_parameters(network))
            if self.low <= sizes[-1] <= self.high:
                return genotype
        raise ValueError(
            f"params: none of {MAX_DRAWS} architectures has {self.low:,} to {self.high:,} "
            f"parameters; they have {min(sizes):,} to {max(sizes):,}"
        )


def parse_range(text: str | None) -> tuple[int, int]:
    """(low, high) of "LOW:HIGH"; the widest range for None.

    Raises:
        ValueError: another form, or an empty range.
    """
    if text is None:
        return 0, 2**63
    match = re.fullmatch(r"(\d[\d_]*):(\d[\d_]*)", text)
    if match is None or int(match[1]) > int(match[2]):
        raise ValueError(f"params: expected LOW:HIGH, such as 60000:80000, got {text!r}")
    return int(match[1]), int(match[2])


class RestorationEvaluator:
    """Trains one derived network for a short while and scores it on the validation images.

    Args:
        task, data: what to restore.
        network: size of the networks.
        recipe: their training.
        runtime: device and precision.
        seed: decides initial weights and patches, together with the candidate's index.
    """

    remedy = "lower --recipe.lr"

    def __init__(
        self,
        task: RestorationTask,
        data: RestorationData,
        network: RestorerConfig,
        recipe: Recipe,
        runtime: Runtime,
        *,
        seed: int,
    ) -> None:
        self.seed = seed
        self.seconds: Mapping[str, float] = {"encode": 0.0}
        self.runtime = runtime
        self._task, self._data, self._network, self._recipe = task, data, network, recipe
        self._patches = ImagePatches(data.train, task, recipe.crop)
        self.inputs: Mapping[str, str] = {
            "training images": data.train.fingerprint(),
            "validation images": data.val.fingerprint(),
        }

    def cost(self, genotype: IRNASGenotype) -> tuple[int, int]:
        """Parameters and multiply-accumulates of a candidate, without training it."""
        with torch.device("meta"):
            return self._cost(
                Restorer(genotype, self._network, self._data.channels, self._task.scale)
            )

    def _cost(self, model: Restorer) -> tuple[int, int]:
        height, width = (side // self._task.scale for side in self._data.val.sizes[0])
        macs = count_macs(model, (height, width), channels=self._data.channels)
        return count_parameters(model), macs

    def __call__(self, genotype: IRNASGenotype, index: int, gate: float | None) -> Evaluation:
        """Evaluate a candidate; there is one stage and no gate. A loss that is not finite is told
        in ``failure``."""
        task, val, channels = self._task, self._data.val, self._data.channels
        torch.manual_seed(derive_seed(self.seed, index))
        model = Restorer(genotype, self._network, channels, task.scale)
        params, macs = self._cost(model)
        self.runtime.place(model)
        fitting = Fitting(
            model,
            self._patches,
            self._recipe,
            self.runtime,
            derive_seed(self.seed, index, "patches"),
        )
        start = time.perf_counter()
        seconds, rewards, metrics, failure = {}, {}, {}, None
        try:
            fitting.run(self._recipe.steps)
            seconds["train"] = time.perf_counter() - start
            scores = evaluate(model.eval(), task, val, seed=self.seed, runtime=self.runtime)
            rewards[FEEDBACK] = scores.ssim + scores.psnr / 100
            metrics[FEEDBACK] = {"psnr": scores.psnr, "ssim": scores.ssim}
            seconds["validate"] = time.perf_counter() - start - seconds["train"]
        except NonFiniteLossError as error:
            failure = f"{FEEDBACK}: {error}"
        return Evaluation(
            rewards, metrics, {"params": params, "macs": macs}, None, seconds, FEEDBACK, failure
        )
