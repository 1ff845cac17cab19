"""Widths fitted to a number of parameters, and the class of networks that come close."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nasfast.methods.restoration.sampled import SizeClass
from nasfast.methods.restoration.settings import parse
from nasfast.methods.restoration.size import Size, fitted_width, parameters_by_width, width_step
from nasfast.methods.restoration.train import RestorationTraining, parse_train
from nasfast.models.restorer import Restorer, RestorerConfig
from nasfast.spaces.ir_nas import IRNASSpace
from nasfast.training.cost import count_parameters
from nasfast.training.loop import Runtime
from nasfast.utils.errors import UserError

SMALL = RestorerConfig(99, 8, 8, 8, dead_reduce=True)


def built(genotype, width, channels, scale):
    """Parameters of the network itself."""
    config = RestorerConfig(width, 8, 8, 8, dead_reduce=True)
    with torch.device("meta"):
        return count_parameters(Restorer(genotype, config, channels, scale))


@settings(max_examples=25)
@given(
    st.integers(0, 2**32),
    st.integers(500, 10**6),
    st.sampled_from([(1, 1), (3, 2)]),
    st.sampled_from([IRNASSpace(3, 2), IRNASSpace(3, 2, widths="free", searched_depth=True)]),
)
def test_the_width_comes_closest(seed, target, images, space):
    genotype = space.sample(random.Random(seed))
    width, step = fitted_width(genotype, target, SMALL, *images), width_step(genotype)
    assert width % step == 0
    count = parameters_by_width(genotype, SMALL, *images)
    assert built(genotype, width, *images) == count(width)
    sizes = [count(w) for w in (width - step, width, width + step) if w]
    assert sizes == sorted(set(sizes))  # grows with the width
    assert min(abs(size - target) for size in sizes) == abs(count(width) - target)
    assert fitted_width(genotype, 2 * target, SMALL, *images) >= width


@pytest.mark.parametrize("text", ["90K", "0.09M", "90_000", 90000])
def test_numbers_of_parameters(text):
    assert Size.of(text) == Size(67_500, 112_500, 90_000)


def test_ranges_of_parameters():
    assert Size.of("60_000:80000") == Size(60_000, 80_000)
    assert Size.of(None) == Size()


@pytest.mark.parametrize("text", ["0", "a:b", "5:4", ":", "1:2:3", "-1:3", "9Q", -5])
def test_sizes_that_are_none(text):
    with pytest.raises(UserError) as caught:
        Size.of(text)
    assert str(caught.value) == (
        "params: expected a number of parameters, such as 90K, or LOW:HIGH, such as 60000:80000, "
        f"got {text!r}; correct the value"
    )


@pytest.mark.parametrize("size", ["3000", "2600:3200"])
def test_samples_and_mutants_are_of_the_class(size):
    space, rng = SizeClass(2, 2, Size.of(size), RestorerConfig(4, 4, 4, 4)), random.Random(0)
    genotypes = [space.sample(rng) for _ in range(20)]
    genotypes += [space.mutate(genotype, rng) for genotype in genotypes]
    assert all(space.valid(genotype) for genotype in genotypes)
    for genotype in genotypes:
        with torch.device("meta"):
            network = Restorer(genotype, space.config(genotype), 1)
        assert count_parameters(network) == space.parameters(genotype) in space.sizes
    everything = IRNASSpace(2, 2)
    assert not all(space.valid(everything.sample(rng)) for _ in range(200))


@pytest.mark.parametrize("read", [parse, lambda argv: parse_train(["RUN", *argv[1:]], {}, None)])
def test_a_width_and_a_size_to_fit_it_to(read):
    with pytest.raises(UserError) as caught:
        read(["restoration", "--params", "9K", "--network.width", "4"])
    assert str(caught.value) == (
        "params: expected --params or --network.width, got both, 9K and 4; leave one out"
    )


def test_a_size_that_no_width_has(tmp_path):
    genotype = IRNASSpace(1, 1).sample(random.Random(0))
    config = parse_train(["RUN", "--params", "10", "--data", "synthetic"], {}, None)
    with pytest.raises(UserError) as caught:
        RestorationTraining(config, genotype, tmp_path, Runtime(torch.device("cpu")))
    least = parameters_by_width(genotype, config.network, 1)(width_step(genotype))
    assert str(caught.value) == (
        "params: expected a number that the architecture comes within 25% of, got 10; its width "
        f"makes it {least:,}, give that"
    )
