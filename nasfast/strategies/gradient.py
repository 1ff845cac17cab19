"""How a gradient search mixes the operations of an edge while their logits, alphas, are learned.

To add a relaxation: a class beside these and a line in GRADIENT_STRATEGIES.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from nasfast.strategies.base import check_state
from nasfast.utils.config import Bounded, Count, Positive
from nasfast.utils.errors import UserError

Active = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Mix:
    """The factors of one forward pass."""

    weights: Tensor  # [edges, K]
    """Factor of each operation; carries the gradient to the alphas in an architecture step."""
    active: Active | None
    """Operations to run on each edge; None runs all."""


@dataclass(frozen=True)
class Temperature(Bounded):
    """A linear schedule over architecture steps."""

    start: Positive = 10.0
    end: Positive = 0.1
    steps: Count = 1000
    """Architecture steps until the end is reached; it stays there."""

    def at(self, step: int) -> float:
        """The temperature of architecture step 0, 1, .."""
        return self.start + (self.end - self.start) * min(step / self.steps, 1)


class Relaxation(Protocol):
    """Continuous choice of operations; alphas are logits ``[edges, K]``.

    Loading `state_dict` into a new relaxation of the same arguments, at any point between steps,
    continues the identical sequence: it draws from its own generator only.
    """

    name: str

    def probabilities(self, alphas: Tensor) -> Tensor:
        """What the operations of an edge are worth, ``[edges, K]``, each from 0 to 1."""

    def weight_step(self, alphas: Tensor) -> Mix:
        """The mix of a step that trains the weights; alphas get no gradient."""

    def architecture_step(self, alphas: Tensor) -> Mix:
        """The mix of a step that trains the alphas."""

    def after_architecture_step(self, alphas: Tensor) -> None:
        """Called when the optimizer has stepped; may correct the alphas in place."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain Python only: loads with torch.load(weights_only=True)."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`; UserError if another relaxation wrote it."""


class _Exclusive:
    """Operations of an edge that grow at the expense of each other."""

    def probabilities(self, alphas: Tensor) -> Tensor:
        """Softmax."""
        return alphas.softmax(1)


class Darts(_Exclusive):
    """All operations run, weighted by their softmax (Liu et al., ICLR 2019; IR-NAS)."""

    name = "darts"

    def weight_step(self, alphas: Tensor) -> Mix:
        """All operations, by their probabilities."""
        return Mix(self.probabilities(alphas.detach()), None)

    def architecture_step(self, alphas: Tensor) -> Mix:
        """The same, differentiable."""
        return Mix(self.probabilities(alphas), None)

    def after_architecture_step(self, alphas: Tensor) -> None:
        """Nothing to correct."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing but the name."""
        return {"strategy": self.name}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`; UserError if another relaxation wrote it."""
        check_state(state, self.name)


class Sigmoid(Darts):
    """All operations run, each weighted by the sigmoid of its own logit, so that none grows at the
    expense of another (Chu et al., FairDARTS, ECCV 2020, section 4.1; without the zero-one loss of
    section 4.2, as the network keeps two edges of a node with one operation each)."""

    name = "sigmoid"

    def probabilities(self, alphas: Tensor) -> Tensor:
        """Sigmoid."""
        return alphas.sigmoid()


class Proxyless(_Exclusive):
    """Binary gates: one operation of an edge runs while weights are trained, two while alphas are
    (Cai et al., ProxylessNAS, ICLR 2019, section 3.2).

    Of the two, drawn by their probabilities without replacement, one gate is open, by the softmax
    over both. The gradient of a gate stands in for that of its probability (equation 4 restricted
    to the two), and the step leaves the probabilities of the other operations as they were.
    """

    name = "proxyless"

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._before: tuple[Tensor, Tensor] | None = None  # alphas [edges, K], pairs [edges, 2]

    def weight_step(self, alphas: Tensor) -> Mix:
        """One operation per edge, drawn by the softmax."""
        drawn = self._draw(alphas, 1)
        return Mix(_one_hot(drawn, alphas), _active(drawn))

    def architecture_step(self, alphas: Tensor) -> Mix:
        """Two operations per edge, one of them with an open gate."""
        pairs = self._draw(alphas, 2)
        self._before = alphas.detach().clone(), pairs.to(alphas.device)
        both = alphas.gather(1, self._before[1]).softmax(1)  # [edges, 2]
        opened = torch.multinomial(both.detach().cpu(), 1, generator=self._generator)
        gates = _one_hot(pairs.gather(1, opened), alphas)
        soft = torch.zeros_like(alphas).scatter(1, self._before[1], both)
        return Mix(_straight_through(gates, soft), _active(pairs))

    @torch.no_grad()
    def after_architecture_step(self, alphas: Tensor) -> None:
        """Undo what the optimizer did to operations that did not run, and shift the two that did so
        that together they are as probable as before."""
        if self._before is None:
            raise RuntimeError(
                "after_architecture_step: expected a call of architecture_step before"
            )
        old, pairs = self._before
        self._before = None
        new = alphas.gather(1, pairs)
        shift = old.gather(1, pairs).logsumexp(1, True) - new.logsumexp(1, True)
        alphas.copy_(old.scatter(1, pairs, new + shift))

    def state_dict(self) -> dict[str, Any]:
        """The state of the generator."""
        return {"strategy": self.name, "generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`; UserError if another relaxation wrote it."""
        check_state(state, self.name)
        self._generator.set_state(state["generator"])

    def _draw(self, alphas: Tensor, count: int) -> Tensor:  # [edges, count], on the CPU
        probabilities = alphas.detach().softmax(1).cpu()
        return torch.multinomial(probabilities, count, generator=self._generator)


class Gumbel(_Exclusive):
    """One operation of an edge runs, the one with the largest logit plus Gumbel noise; its gradient
    goes to the alphas through the softmax of the same sums (Dong and Yang, GDAS, CVPR 2019)."""

    name = "gumbel"

    def __init__(self, seed: int, temperature: Temperature) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._temperature = temperature
        self._step = 0

    @property
    def temperature(self) -> float:
        """Of the softmax in the next architecture step."""
        return self._temperature.at(self._step)

    def weight_step(self, alphas: Tensor) -> Mix:
        """One operation per edge, drawn by the softmax of the alphas."""
        drawn = self._perturbed(alphas.detach()).argmax(1, True).cpu()
        return Mix(_one_hot(drawn, alphas), _active(drawn))

    def architecture_step(self, alphas: Tensor) -> Mix:
        """The same, differentiable."""
        perturbed = self._perturbed(alphas)
        drawn = perturbed.detach().argmax(1, True).cpu()
        soft = (perturbed / self.temperature).softmax(1)
        return Mix(_straight_through(_one_hot(drawn, alphas), soft), _active(drawn))

    def after_architecture_step(self, alphas: Tensor) -> None:
        """The temperature moves on."""
        self._step += 1

    def state_dict(self) -> dict[str, Any]:
        """The state of the generator and the number of architecture steps."""
        state = self._generator.get_state()
        return {"strategy": self.name, "generator": state, "step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`; UserError if another relaxation wrote it."""
        check_state(state, self.name)
        self._generator.set_state(state["generator"])
        self._step = state["step"]

    def _perturbed(self, alphas: Tensor) -> Tensor:  # [edges, K]
        noise = torch.empty(alphas.shape, dtype=torch.float64)
        noise.exponential_(generator=self._generator).log_().neg_()
        return alphas.log_softmax(1) + noise.to(alphas)


def _one_hot(drawn: Tensor, alphas: Tensor) -> Tensor:  # [edges, 1] to [edges, K]
    return torch.zeros_like(alphas).scatter(1, drawn.to(alphas.device), 1.0)


def _straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of ``hard``, the gradient of ``soft``."""
    return hard + (soft - soft.detach())


def _active(drawn: Tensor) -> Active:
    return tuple(tuple(sorted(row)) for row in drawn.tolist())


GRADIENT_STRATEGIES: dict[str, Callable[[int, Temperature], Relaxation]] = {
    "darts": lambda seed, temperature: Darts(),
    "sigmoid": lambda seed, temperature: Sigmoid(),
    "proxyless": lambda seed, temperature: Proxyless(seed),
    "gumbel": Gumbel,
}


def make_relaxation(name: str, seed: int, temperature: Temperature) -> Relaxation:
    """The relaxation of that name; UserError lists the choices."""
    if name not in GRADIENT_STRATEGIES:
        choices = ", ".join(GRADIENT_STRATEGIES)
        raise UserError(f"strategy: expected one of {choices}, got {name!r}")
    return GRADIENT_STRATEGIES[name](seed, temperature)
