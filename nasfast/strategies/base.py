"""How a search proposes architectures: ask for one, tell its reward."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from nasfast.spaces.base import G
from nasfast.utils.errors import UserError

Goals = Callable[[G], tuple[float, ...]]
"""What is to be made small of an architecture beside its reward, known without training it: a pure
function, as of its size. With goals a strategy looks for a front: no other architecture is better
in one thing and no worse in the others."""


class Strategy(Protocol[G]):
    """Proposes genotypes and learns from their rewards; it never sees the evaluator.

    Loading `state_dict` into a new strategy of the same arguments, at any point between calls,
    continues the identical sequence: a strategy draws from its own generators only.
    """

    def ask(self) -> G:
        """The next genotype to evaluate."""

    def tell(self, genotype: G, reward: float | None) -> None:
        """The reward of a genotype, in the order asked; None if its evaluation failed."""

    def reject(self, genotype: G) -> None:
        """Instead of `tell`, at once: the genotype asked last is beyond the limits, or no network,
        and is not evaluated."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain Python only: loads with torch.load(weights_only=True)."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`; UserError if another strategy wrote it."""


def check_state(state: Mapping[str, Any], strategy: str) -> None:
    """UserError unless `state` names the strategy that is about to load it."""
    if state.get("strategy") != strategy:
        raise UserError(
            f'state["strategy"]: expected "{strategy}", got {state.get("strategy")!r}; '
            "resume with the strategy that wrote the checkpoint"
        )
