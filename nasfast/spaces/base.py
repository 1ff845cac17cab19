"""What an architecture is: a sequence of categorical decisions that decodes to a genotype."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

from nasfast.utils.errors import UserError


@dataclass(frozen=True)
class Decision:
    """One categorical choice of a space."""

    name: str
    """Unique in its space, e.g. "cell.layer2.input1"."""
    head: str
    """Decisions with the same head share one classifier of the policy; else equal to `name`."""
    size: int
    """Number of choices, 0 .. size - 1."""


class Genotype(Protocol):
    """A discrete description of one architecture: frozen and hashable."""

    def __hash__(self) -> int: ...

    def canonical(self) -> Self:
        """One representative of all genotypes that are this network up to renaming."""

    def to_json(self) -> dict[str, object]:
        """Plain JSON; `Space.from_json` reads it back."""


G = TypeVar("G", bound=Genotype)


class Space(Protocol[G]):
    """The set of genotypes a search chooses from; spaces are subclasses."""

    @property
    def name(self) -> str: ...

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """In sampling order."""

    def size(self) -> int:
        """Exact number of ordered genotypes (not deduplicated by canonical form)."""

    def decode(self, choices: Sequence[int]) -> G:
        """The genotype of one choice per decision; UserError names a decision out of range."""

    def encode(self, genotype: G) -> tuple[int, ...]:
        """The choices that decode to `genotype`; UserError if it is not of this space."""

    def valid(self, genotype: G) -> bool:
        """Whether it is a network. `decode` may give what is none: the decisions do not show it. A
        search rejects it as it does what is beyond the limits."""
        return True

    def sample(self, rng: random.Random) -> G:
        """Uniform over ordered genotypes that are valid."""

    def mutate(self, genotype: G, rng: random.Random) -> G:
        """Exactly one decision changes, to one of its other choices, uniformly among the changes
        that are valid."""

    def features(self, genotype: G) -> Mapping[str, float]:
        """A description for models of the reward: numbers by name, 0 where a name is missing.

        The same for all genotypes of one canonical form; names that two genotypes share mean the
        same in both."""

    def from_json(self, obj: object) -> G:
        """Read `Genotype.to_json`, or the list form of the publication."""


def check_choices(decisions: Sequence[Decision], choices: Sequence[int]) -> None:
    """UserError unless `choices` holds one integer in range for each decision."""
    if len(choices) != len(decisions):
        raise UserError(
            f"choices: expected {len(decisions)} integers, one per decision, got {len(choices)}; "
            "Space.decisions lists them in order"
        )
    for decision, choice in zip(decisions, choices, strict=True):
        if type(choice) is not int or not 0 <= choice < decision.size:
            raise UserError(
                f"{decision.name}: expected an integer in 0..{decision.size - 1}, got {choice!r}; "
                "check that the genotype was made for this space"
            )


def sample_choices(decisions: Sequence[Decision], rng: random.Random) -> tuple[int, ...]:
    """Independent and uniform."""
    return tuple(rng.randrange(decision.size) for decision in decisions)


def mutate_choices(
    decisions: Sequence[Decision], choices: Sequence[int], rng: random.Random
) -> tuple[int, ...]:
    """Change one decision, uniform among those with an alternative, to another choice, uniform."""
    at = rng.choice([i for i, decision in enumerate(decisions) if decision.size > 1])
    other = rng.randrange(decisions[at].size - 1)
    other += other >= choices[at]
    return (*choices[:at], other, *choices[at + 1 :])


def subtrees(labels: Sequence[str], sources: Sequence[Sequence[int]], depth: int) -> Counter[str]:
    """How often each labelled subtree of up to `depth` steps occurs in a graph.

    These are the features of the Weisfeiler-Lehman graph kernel (Shervashidze et al., JMLR 2011),
    which Ru et al. (NAS-BOWL, ICLR 2021, arXiv 2006.07556) fit architectures with. They do not
    depend on the order of the nodes, nor on that of the sources of a node.

    Args:
        labels: of the nodes.
        sources: of each node, those that it reads.
        depth: 0 counts the labels alone.
    """
    trees, counts = list(labels), Counter(labels)
    for _ in range(depth):
        trees = [
            f"{label}({', '.join(sorted(trees[i] for i in read))})"
            for label, read in zip(labels, sources, strict=True)
        ]
        counts.update(tree for tree, read in zip(trees, sources) if read)
    return counts
