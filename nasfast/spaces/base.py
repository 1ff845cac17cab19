"""What an architecture is: a sequence of categorical decisions that decodes to a genotype."""

import random
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Protocol, Self, TypeVar

from nasfast.utils.errors import UserError, shown


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
                f"{decision.name}: expected an integer in 0..{decision.size - 1}, got "
                f"{shown(choice)}; check that the genotype was made for this space"
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


def graph_features(
    labels: Sequence[str],
    sources: Sequence[Sequence[int]],
    reach: Mapping[str, int],
    blind: Collection[str] = (),
    pairs: bool = False,
) -> dict[str, float]:
    """A description of a graph whose last node is its output.

    It holds how many nodes each label has; the share of the output that comes through nodes of each
    label, where a node takes equal parts of its sources and a chain of equal labels counts each;
    the share that comes through no blind node; the length of the longest chain; the longest reach,
    and that of the average chain; with `pairs`, how often each label reads each other. It does not
    depend on the order of the nodes, nor on that of the sources of a node.

    Args:
        labels: of the nodes.
        sources: of each node, those that it reads, all of them before it.
        reach: pixels to each side that nodes of a label see; 0 for others.
        blind: labels whose output does not tell one pixel from another.
        pairs: whether to count what reads what.
    """
    count = len(labels)
    part, seeing, mean_reach = [0.0] * count, [0.0] * count, [0.0] * count
    chain, far = [0] * count, [0] * count
    part[-1] = 1.0
    for node in reversed(range(count)):
        for source in sources[node]:
            part[source] += part[node] / len(sources[node])
    counts, shares = Counter(labels), dict.fromkeys(labels, 0.0)
    for node, (label, read) in enumerate(zip(labels, sources, strict=True)):
        shares[label] += part[node]
        own = reach.get(label, 0)
        chain[node] = 1 + max((chain[source] for source in read), default=-1)
        far[node] = own + max((far[source] for source in read), default=0)
        mean_reach[node] = own + (fmean(mean_reach[source] for source in read) if read else 0.0)
        seeing[node] = fmean(seeing[source] for source in read) if read else 1.0
        if label in blind:
            seeing[node] = 0.0
        if pairs:
            counts.update(f"{label} of {labels[source]}" for source in read)
    parts = {f"share of {label}": share for label, share in shares.items()}
    parts |= {"share that sees": seeing[-1], "mean reach": mean_reach[-1]}
    # to binary fractions: halves of halves stay exact, whatever the order they were added in
    rounded = {name: round(part * 2**30) / 2**30 for name, part in parts.items()}
    return counts | rounded | {"longest chain": chain[-1], "longest reach": far[-1]}
