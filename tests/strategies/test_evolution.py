"""Regularised evolution."""

import pytest

from nasfast.spaces import FastNASSpace
from nasfast.strategies.evolution import Evolution, EvolutionConfig

SPACE = FastNASSpace()


def changes(a, b):
    return sum(x != y for x, y in zip(SPACE.encode(a), SPACE.encode(b)))


def test_children_are_mutants_of_the_living():
    strategy = Evolution(SPACE, EvolutionConfig(population=4, tournament=4), 0)
    living = []
    for i in range(20):
        genotype = strategy.ask()
        if i >= 4:  # the best of the four latest is the parent of all
            parent, _ = max(living[-4:], key=lambda pair: pair[1])
            assert changes(parent, genotype) == 1
        living.append((genotype, -float(i) if i % 5 else 0.5 - i))
        strategy.tell(*living[-1])


def test_failed_and_rejected_candidates_are_no_parents():
    strategy = Evolution(SPACE, EvolutionConfig(population=2, tournament=2), 0)
    good = []
    for i in range(12):
        genotype = strategy.ask()
        if i % 3 == 0:
            strategy.tell(genotype, float(i))
            good.append(genotype)
        elif i % 3 == 1:
            strategy.tell(genotype, None)
        else:
            strategy.reject(genotype)
    child = strategy.ask()
    assert min(changes(parent, child) for parent in good[-2:]) == 1


def test_more_mutations():
    strategy = Evolution(SPACE, EvolutionConfig(1, 1, more_mutations=0.9), 0)
    parent = strategy.ask()
    strategy.tell(parent, 1.0)
    assert changes(parent, strategy.ask()) > 1


def test_it_climbs():
    def reward(genotype):
        return sum(op in (1, 5, 6) for layer in genotype.cell.layers for op in layer[2:])

    strategy, found = Evolution(SPACE, EvolutionConfig(), 0), []
    for _ in range(80):
        genotype = strategy.ask()
        found.append(reward(genotype))
        strategy.tell(genotype, float(found[-1]))
    assert sum(found[-20:]) / 20 > sum(found[:20]) / 20 + 1


def test_rewards_in_another_order():
    strategy = Evolution(SPACE, EvolutionConfig(), 0)
    first, second = strategy.ask(), strategy.ask()
    with pytest.raises(ValueError, match=r"tell: expected the reward of F.*, got F.*in order"):
        strategy.tell(second, 0.1)
    with pytest.raises(ValueError, match=r"reject: expected Fast.*, asked last, got Fast"):
        strategy.reject(first)
    with pytest.raises(ValueError, match="tell: expected a finite reward, got nan; tell None for"):
        strategy.tell(first, float("nan"))
    strategy.tell(first, 0.1)
    strategy.reject(second)
    with pytest.raises(ValueError, match="tell: expected the reward of no genotype, got Fast"):
        strategy.tell(second, 0.1)
