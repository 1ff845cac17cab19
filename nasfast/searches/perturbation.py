"""Operations chosen by what their absence costs (Wang et al., Rethinking Architecture Selection in
Differentiable NAS, ICLR 2021, section 4.2 and algorithm 1), instead of by the largest alpha, which
does not say how much an operation contributes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from nasfast.spaces.ir_nas import OPS, PRIMITIVES, SKIP, num_edges
from nasfast.strategies.gradient import Mix

NONE = PRIMITIVES.index("none")
CANDIDATES = tuple(map(PRIMITIVES.index, OPS))


class Perturbation:
    """Choices in a seeded order: first the operation of each edge, then the two edges of each node.

    Of an edge, the operation stays whose absence raises the loss most; of a node, the two edges
    whose absence does, and the others become ``none``. Of equal losses the first one wins. Loading
    `state_dict` into a new object of the same arguments continues the identical sequence.

    Args:
        nodes: of the cell.
        seed: decides the order.
        max_skips: of all edges; once so many are chosen, skip is no candidate any more.

    Attributes:
        made: choices so far, of `total`.
        last: the last one, in words.
    """

    def __init__(self, nodes: int, seed: int, max_skips: int | None = None) -> None:
        rng = random.Random(seed)
        edges = list(range(num_edges(nodes)))
        wide = list(range(1, nodes))  # the first node has two edges
        rng.shuffle(edges)
        rng.shuffle(wide)
        self._order = [*((edge,) for edge in edges), *map(edges_of, wide)]
        self._active = [tuple(range(len(PRIMITIVES)))] * len(edges)
        self._max_skips = max_skips
        self.made, self.last = 0, ""

    @property
    def total(self) -> int:
        """Choices to make."""
        return len(self._order)

    def mix(self, probabilities: Tensor) -> Mix:  # [edges, K]
        """Edges that are decided run one operation, by the factor 1; the others are as given."""
        return _mix(probabilities, self._active)

    def choose(self, probabilities: Tensor, loss: Callable[[Mix], float]) -> None:
        """Make the next choice.

        Args:
            probabilities: factors ``[edges, K]`` of operations that are undecided.
            loss: of the supernet under a mix.
        """
        edges = self._order[self.made]

        def without(edge: int, *active: int) -> float:
            changed = [*self._active]
            changed[edge] = active
            return loss(_mix(probabilities, changed))

        if len(edges) == 1:
            (edge,) = edges
            every = range(len(PRIMITIVES))
            full = self._max_skips is not None and self._active.count((SKIP,)) >= self._max_skips
            candidates = [k for k in CANDIDATES if not (full and k == SKIP)]
            cost = {k: without(edge, *(j for j in every if j != k)) for k in candidates}
            kept = max(cost, key=cost.__getitem__)
            self._active[edge] = (kept,)
            self.last = f"edge {edge}: {PRIMITIVES[kept]}"
        else:
            cost = {edge: without(edge, NONE) for edge in edges}
            ranked = sorted(edges, key=lambda edge: -cost[edge])
            for edge in ranked[2:]:
                self._active[edge] = (NONE,)
            self.last = "edges {} and {} stay".format(*sorted(ranked[:2]))
        self.made += 1

    def state_dict(self) -> dict[str, Any]:
        """What is decided; plain Python."""
        return {"made": self.made, "active": list(self._active)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.made = state["made"]
        self._active = [tuple(row) for row in state["active"]]


def edges_of(node: int) -> tuple[int, ...]:
    """Of node 0, 1, .., in the order of its states."""
    return tuple(range(num_edges(node), num_edges(node + 1)))


def _mix(probabilities: Tensor, active: list[tuple[int, ...]]) -> Mix:
    """Where one operation is active its factor is 1; what is not active has the factor 0."""
    mask = torch.zeros_like(probabilities)
    for edge, row in enumerate(active):
        mask[edge, list(row)] = 1.0
    alone = mask.sum(1, keepdim=True) == 1
    return Mix(torch.where(alone, mask, mask * probabilities), tuple(active))
