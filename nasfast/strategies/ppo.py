"""Proximal policy optimisation of an LSTM that samples one decision after another.

The controller of Fast-NAS (Nekrasov et al., CVPR 2019, arXiv 1810.10804) with the clipped objective
of Schulman et al., 2017 (arXiv 1707.06347), decoupled for replayed samples as in Hilton et al.,
Batch size-invariance for policy optimization, NeurIPS 2022 (arXiv 2110.00641).
"""

import copy
import math
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Annotated, Any, Generic, Self

import torch
from torch import Tensor, nn

from nasfast.spaces.base import Decision, G, Space
from nasfast.strategies.base import check_state
from nasfast.utils.config import (
    BatchSize,
    Bound,
    Bounded,
    Channels,
    Count,
    MaxNorm,
    Positive,
    Weight,
)
from nasfast.utils.errors import UserError


@dataclass(frozen=True)
class PPOConfig(Bounded):
    """Settings of the controller and its updates; the defaults are the published ones."""

    clip_coef: Positive = 0.1
    """The probability ratio of an update is clipped to [1 - clip_coef, 1 + clip_coef]."""
    lr: Positive = 1e-4
    """Learning rate of Adam."""
    max_grad_norm: MaxNorm = 2.0
    """Gradients are scaled down to this L2 norm."""
    ent_coef: Weight = 0.0
    """Weight of the policy's entropy in the objective, in units of reward per nat."""
    update_epochs: Count = 1
    """Passes over the buffer per update."""
    batch_size: BatchSize = 1
    """Evaluated candidates between updates; failed ones do not count."""
    minibatch_size: BatchSize = 1
    """Samples per gradient step."""
    buffer_size: Count = 100
    """Latest candidates that an update learns from."""
    baseline_decay: Annotated[float, Bound(0, 1, open="low")] = 0.95
    """Decay per candidate of the average of rewards that is subtracted from each reward; 1 averages
    the whole buffer."""
    hidden_size: Channels = 100
    """Width of the LSTM and of its input."""
    warmup_steps: Annotated[int, Bound(0, 1000)] = 4
    """LSTM steps before the first decision; published: one per encoder tap."""
    embed_decisions: bool = False
    """Add an embedding of each sampled decision to the next input of the LSTM.

    Without it (published) every input is the previous output, so that decisions are independent
    of each other: the policy cannot prefer a pair of choices over its marginals."""

    @classmethod
    def short_budget(cls) -> Self:
        """Settings for some 24 to 100 candidates: learn slightly earlier than the published ones,
        with few, larger gradient steps that take a fraction of their time."""
        return cls(lr=5e-3, batch_size=4, minibatch_size=20, ent_coef=1e-3)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.buffer_size < max(2, self.batch_size):
            raise UserError(
                f"PPOConfig.buffer_size: expected at least 2 and at least batch_size="
                f"{self.batch_size}, got {self.buffer_size}; a reward is compared with others"
            )


class Controller(nn.Module):
    """A two-layer LSTM that emits one categorical distribution per decision.

    Each input is the previous output, the first one is learned. Decisions with the same head share
    one classifier; the classifiers are stacked into one matrix, [sum of sizes, hidden].
    """

    mask: Tensor
    offsets: Tensor

    def __init__(
        self, decisions: Sequence[Decision], config: PPOConfig, generator: torch.Generator
    ) -> None:
        super().__init__()
        sizes: dict[str, int] = {}
        for decision in decisions:
            if sizes.setdefault(decision.head, decision.size) != decision.size:
                raise ValueError(
                    f"{decision.name}: expected size {sizes[decision.head]}, as the other "
                    f'decisions of head "{decision.head}", got {decision.size}; '
                    "give it a head of its own"
                )
        total, width = sum(sizes.values()), config.hidden_size
        starts = dict(zip(sizes, accumulate(sizes.values(), initial=0), strict=False))
        rows = torch.arange(total)
        first = torch.tensor([starts[decision.head] for decision in decisions])
        size = torch.tensor([decision.size for decision in decisions])
        mask = (rows < first[:, None]) | (rows >= (first + size)[:, None])
        self.register_buffer("offsets", first, persistent=False)  # [D]
        self.register_buffer("mask", mask, persistent=False)  # [D, sum of sizes], True: not its
        self.warmup_steps = config.warmup_steps
        with torch.random.fork_rng(devices=[]):  # their default initialisation draws globally
            self.start = nn.Parameter(torch.empty(width))
            self.cells = nn.ModuleList(nn.LSTMCell(width, width) for _ in range(2))
            self.heads = nn.Linear(width, total)
            self.embedding = nn.Embedding(total, width) if config.embed_decisions else None
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.1, 0.1, generator=generator)

    def forward(self, choices: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of samples, each summed over decisions.

        choices: [N, D], integer -> [N], [N]. The entropy is that of the distributions the samples
        were drawn from, given their earlier decisions.
        """
        ids = (choices + self.offsets).T  # [D, N]
        rows = 1 if self.embedding is None else len(choices)  # otherwise all samples share a pass
        log_probs = self._log_probs(self._unroll(rows, lambda step, _: ids[step]))
        chosen = log_probs.expand(-1, len(choices), -1).gather(2, ids[..., None])  # [D, N, 1]
        entropy = -(log_probs.exp() * log_probs.masked_fill(self.mask[:, None], 0)).sum((0, 2))
        return chosen.sum((0, 2)), entropy.expand(len(choices))

    @torch.no_grad()
    def sample(self, generator: torch.Generator) -> tuple[int, ...]:
        """One choice per decision."""
        ids: list[Tensor] = []

        def draw(step: int, output: Tensor) -> Tensor:
            probs = self._log_probs(output[None], step)[0].exp()
            ids.append(torch.multinomial(probs, 1, generator=generator)[:, 0])
            return ids[-1]

        self._unroll(1, draw)
        return tuple((torch.cat(ids) - self.offsets).tolist())

    def _unroll(self, rows: int, chosen: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Outputs at the decisions, [D, rows, hidden]; `chosen` gives the head row taken."""
        x = self.start.expand(rows, -1)
        zeros = torch.zeros_like(x)
        states = [(zeros, zeros) for _ in self.cells]
        outputs = []
        for step in range(-self.warmup_steps, len(self.offsets)):
            for layer, cell in enumerate(self.cells):
                states[layer] = cell(x, states[layer])
                x = states[layer][0]
            if step >= 0:
                outputs.append(x)
                ids = chosen(step, x)
                if self.embedding is not None:
                    x = x + self.embedding(ids)
        return torch.stack(outputs)

    def _log_probs(self, outputs: Tensor, step: int | None = None) -> Tensor:
        """[D, rows, hidden] -> [D, rows, sum of sizes], minus infinity outside each one's head."""
        mask = self.mask if step is None else self.mask[step : step + 1]
        logits: Tensor = self.heads(outputs).masked_fill(mask[:, None], -math.inf)
        return logits.log_softmax(-1)


_Sample = tuple[tuple[int, ...], float, float | None]
_Asked = tuple[tuple[int, ...], float, bool]  # choices, log-probability, whether rejected


class PPO(Generic[G]):
    """Search with a controller updated after every `batch_size` candidates, on the CPU.

    An update replays the buffer. Its samples are up to `buffer_size` candidates old, hence two
    policies besides the current one: the ratio is clipped against the proximal policy, the one at
    the start of this update, and each sample is weighted by min(1, proximal / behaviour), where
    behaviour is the policy that drew it. The advantage of a sample is its reward minus the
    exponentially weighted mean of the other rewards in the buffer, so never of itself.
    A failed candidate (reward None) leaves the policy and the buffer as they are.

    A rejected candidate has the reward of the worst evaluated one in the buffer, as it is at each
    update: on the scale of the rewards, so that it moves the baseline no further than they do. Up
    to `buffer_size` of them are replayed beside the evaluated ones, which they do not displace.
    """

    def __init__(self, space: Space[G], config: PPOConfig, seed: int) -> None:
        self._space = space
        self._config = config
        seeds = random.Random(seed)
        self._sampling, self._permutation = torch.Generator(), torch.Generator()
        self._sampling.manual_seed(seeds.getrandbits(63))
        self._permutation.manual_seed(seeds.getrandbits(63))
        self.controller = Controller(space.decisions, config, self._sampling)
        self._optimizer = torch.optim.Adam(self.controller.parameters(), lr=config.lr, fused=True)
        self._asked: deque[_Asked] = deque()
        self._buffer: list[_Sample] = []  # and reward; None where rejected
        self._new = 0  # evaluated samples in the buffer since the last update

    def ask(self) -> G:
        """A sample of the current policy; may be called again before the reward is reported."""
        choices = self.controller.sample(self._sampling)
        with torch.no_grad():
            log_prob = self.controller(torch.tensor([choices]))[0].item()
        self._asked.append((choices, log_prob, False))
        return self._space.decode(choices)

    def tell(self, genotype: G, reward: float | None) -> None:
        """The reward of the genotype asked longest ago; None if its evaluation failed."""
        if reward is not None and not math.isfinite(reward):
            raise ValueError(
                f"tell: expected a finite reward, got {reward}; tell None for a failed evaluation"
            )
        while self._asked and self._asked[0][2]:
            self._remember((*self._asked.popleft()[:2], None))
        choices, log_prob = self._answered(genotype)
        if reward is None:
            return
        self._remember((choices, log_prob, reward))
        self._new += 1
        if self._new >= self._config.batch_size:
            self._new = 0
            if len(self._buffer) > 1:  # a single reward has nothing to be compared with
                self._update()

    def reject(self, genotype: G) -> None:
        """The genotype asked last is not evaluated. It is remembered where it would have been told,
        so that what a batch learns does not depend on when its proposals are rejected."""
        if not self._asked or self._space.decode(self._asked[-1][0]) != genotype:
            asked = self._space.decode(self._asked[-1][0]) if self._asked else "no genotype"
            raise ValueError(f"reject: expected {asked}, asked last, got {genotype}")
        self._asked[-1] = (*self._asked[-1][:2], True)

    def _remember(self, sample: _Sample) -> None:
        """Put a sample into the buffer, which keeps the latest evaluated and rejected ones."""
        self._buffer.append(sample)
        alike = [i for i, (*_, r) in enumerate(self._buffer) if (r is None) == (sample[2] is None)]
        if len(alike) > self._config.buffer_size:
            del self._buffer[alike[0]]

    def _answered(self, genotype: G) -> tuple[tuple[int, ...], float]:
        """Choices and log-probability of the genotype asked longest ago, which this has to be."""
        if not self._asked or self._space.decode(self._asked[0][0]) != genotype:
            expected = self._space.decode(self._asked[0][0]) if self._asked else "no genotype"
            raise ValueError(
                f"tell: expected the reward of {expected}, got {genotype}; "
                "report every genotype of ask() once, in order"
            )
        return self._asked.popleft()[:2]

    def _update(self) -> None:
        config = self._config
        choices = torch.tensor([choices for choices, _, _ in self._buffer])
        behaviour = torch.tensor([log_prob for _, log_prob, _ in self._buffer])
        worst = min(reward for _, _, reward in self._buffer if reward is not None)
        advantages = leave_one_out_advantages(
            [worst if reward is None else reward for _, _, reward in self._buffer],
            config.baseline_decay,
        )
        with torch.no_grad():
            proximal, _ = self.controller(choices)
        weights = (proximal - behaviour).exp().clamp(max=1)
        for _ in range(config.update_epochs):
            order = torch.randperm(len(choices), generator=self._permutation)
            for batch in torch.split(order, config.minibatch_size):
                log_probs, entropy = self.controller(choices[batch])
                gain = clipped_gain(
                    log_probs - proximal[batch], advantages[batch], config.clip_coef
                )
                loss = -(weights[batch] * gain).mean() - config.ent_coef * entropy.mean()
                self._optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.controller.parameters(), config.max_grad_norm)
                self._optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Parameters, optimiser, both generators, the buffer and the samples without a reward."""
        return copy.deepcopy(
            {
                "strategy": "ppo",
                "controller": dict(self.controller.state_dict()),
                "optimizer": self._optimizer.state_dict(),
                "sampling": self._sampling.get_state(),
                "permutation": self._permutation.get_state(),
                "asked": list(self._asked),
                "buffer": list(self._buffer),
                "new": self._new,
            }
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`; UserError if another strategy wrote it."""
        check_state(state, "ppo")
        state = copy.deepcopy(dict(state))
        self.controller.load_state_dict(state["controller"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._sampling.set_state(state["sampling"])
        self._permutation.set_state(state["permutation"])
        self._asked = deque(state["asked"])
        self._buffer = list(state["buffer"])
        self._new = state["new"]


_LARGEST = 20.0
"""Logarithm of a probability ratio beyond which it is cut off: an infinite one has no gradient."""


def clipped_gain(log_ratios: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """Equation 7 of PPO (Schulman et al., arXiv 1707.06347) for each sample: [N], [N] -> [N]."""
    ratios = log_ratios.clamp(max=_LARGEST).exp()
    return torch.minimum(ratios * advantages, ratios.clamp(1 - clip, 1 + clip) * advantages)


def leave_one_out_advantages(rewards: Sequence[float], decay: float) -> Tensor:
    """Each reward, oldest first, minus the mean of the others weighted by decay^age: [N]."""
    r = torch.tensor(rewards, dtype=torch.float64)
    w = decay ** torch.arange(len(r) - 1, -1, -1, dtype=torch.float64)
    baselines = ((w * r).sum() - w * r) / (w.sum() - w)
    return (r - baselines).float()
