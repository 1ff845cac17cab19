import dataclasses
import math
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from kept import kept_for_backward

from nasfast.models.supernet import MixedCell, Supernet, SupernetConfig
from nasfast.spaces.ir_nas import PRIMITIVES, IRNASSpace, moves, targets

TINY = SupernetConfig(layers=3, nodes=2, width=4, memory="save", fused=False)
DENOISING = SupernetConfig(memory="save", fused=False)  # as published
DERAINING = SupernetConfig(layers=3, nodes=4, memory="save", fused=False)


FREE = SupernetConfig(2, 2, 4, searched_depth=True, widths="free", memory="save", fused=False)
"""Its layers have 3 and 4 levels."""


def make(config=TINY, channels=1, scale=1, reduction=1, like=None):
    """A supernet in float64: alphas and betas all different, or the state of another."""
    net = Supernet(config, channels, scale, reduction).double()
    if like is not None:
        net.load_state_dict(like.state_dict())
        return net
    with torch.no_grad():
        net.alphas.normal_()
        net.betas.normal_()
        if net.depths is not None:
            net.depths.normal_()
    return net


def with_options(**options):
    return SupernetConfig(**{**vars(TINY), **options})


def step(net, images, **arguments):
    """Output, and gradients of one backward pass."""
    net.zero_grad()
    out = net(images, **arguments)
    generator = torch.Generator().manual_seed(0)
    (out * torch.randn(out.shape, generator=generator, dtype=out.dtype)).sum().backward()
    return out, {name: p.grad for name, p in net.named_parameters()}


@pytest.fixture
def images():
    return torch.rand(2, 1, 9, 7, dtype=torch.float64)


@pytest.mark.parametrize(
    ("config", "channels", "weights", "architecture"),
    [(DENOISING, 1, 6_725_017, 20 * 6 + 9 * 3), (DERAINING, 3, 3_340_239, 14 * 6 + 6 * 3)],
)
def test_parameters_as_published(config, channels, weights, architecture):
    with torch.device("meta"):
        net = Supernet(config, channels)
    assert sum(p.numel() for p in net.weights()) == weights
    assert sum(p.numel() for p in net.architecture()) == architecture
    assert len([*net.weights(), *net.architecture()]) == len([*net.parameters()])


@pytest.mark.parametrize(("layers", "cells"), [(1, 2), (2, 5), (3, 8), (4, 11)])
def test_one_cell_call_per_layer_and_level(layers, cells, images):
    net = make(with_options(layers=layers))
    calls = []
    for module in net.modules():
        if isinstance(module, MixedCell):
            module.register_forward_hook(lambda cell, *_: calls.append(cell))
    assert net(images).shape == images.shape
    assert len(calls) == len(set(calls)) == cells


def forward_by_hand(net, images, layers, nodes=2):
    """The forward pass in training mode as the paper's equations, level by level; where the depth
    is searched, the images of all exits by their probabilities."""
    state, widths = net.state_dict(), net.config.widths

    def conv_bn(name, x, padding=0, groups=1, dilation=1, conv="0", bn="1"):
        weight = state[f"{name}.{conv}.weight"]
        x = F.conv2d(x, weight, padding=padding, groups=groups, dilation=dilation)
        affine = (state.get(f"{name}.{bn}.weight"), state.get(f"{name}.{bn}.bias"))
        return F.batch_norm(x, None, None, *affine, training=True)

    def decoded(h, heads="heads", tail="tail"):
        maps = []
        for level, x in h.items():
            head = f"{heads}.{level}"
            atrous = F.relu(conv_bn(f"{head}.atrous", x, 16, x.shape[1], 16))
            atrous = F.relu(conv_bn(f"{head}.atrous.3", atrous))
            pointwise = F.relu(conv_bn(f"{head}.pointwise", x))
            maps.append(F.relu(conv_bn(f"{head}.fuse", torch.cat([atrous, pointwise], 1))))
        x = F.relu(conv_bn(f"{tail}.refine", torch.cat(maps, 1), 1))
        last = (state[f"{tail}.conv.{name}"] for name in ("weight", "bias"))
        x = F.conv2d(x, *last, padding=1)
        return x if net.reduction > 1 else x.sigmoid()

    alphas, betas = net.alphas.softmax(1), net.betas.exp()
    rows = {source: betas[i] for i, source in enumerate(moves(layers, widths))}
    middle = len(betas[0]) // 2  # of the moves: none
    first = F.relu(conv_bn("stem.conv1", images, 1 if net.reduction == 1 else 0))
    h = {0: conv_bn("stem.conv2", first, 1)}
    before_last = {0: conv_bn("stem.reduce", first, 1)}
    cell, outputs = 0, []
    for layer in range(1, layers + 1):
        routed = {}
        for source, x in h.items():
            reached = [*targets(source, widths)]
            total = sum(rows[layer, source][t - source + middle] for t in reached)
            for t in reached:
                beta = rows[layer, source][t - source + middle] / total
                term = beta * conv_bn(f"routers.{layer - 1}.convs.{source}to{t}", x)
                routed[t] = routed.get(t, 0) + term
        for new in [level for level in routed if level not in before_last]:
            before_last[new] = conv_bn(f"wideners.{new - 1}", before_last[new - 1])
        h = {}
        for level in sorted(routed):
            states, edge = [before_last[level], routed[level]], 0
            for _ in range(nodes):
                total = 0
                for x in states:
                    op = net.cells[cell].edges[edge]
                    for k, name in enumerate(PRIMITIVES[:4]):
                        total = total + alphas[edge, k] * op.ops[name](F.relu(x))
                    total = total + alphas[edge, 4] * x
                    edge += 1
                states.append(total)
            h[level] = torch.cat(states[2:], 1)
            cell += 1
        before_last = routed
        outputs.append(h)
    if net.depths is None:
        return decoded(outputs[-1])
    names = [*((f"exits.{i}.0", f"exits.{i}.1") for i in range(layers - 1)), ("heads", "tail")]
    images = [decoded(h, *pair) for h, pair in zip(outputs, names, strict=True)]
    return sum(p * image for p, image in zip(net.depths.softmax(0), images, strict=True))


@pytest.mark.parametrize("config", [TINY, FREE])
def test_forward_is_the_published_one(config, images):
    net = make(config)
    out = forward_by_hand(net, images, layers=config.layers)
    torch.testing.assert_close(net(images), out, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (TINY, {"memory": "recompute"}),
        (TINY, {"fused": True}),
        (TINY, {"fused": True, "memory": "recompute"}),
        (FREE, {"fused": True, "memory": "recompute"}),
    ],
)
def test_ways_to_compute_agree(images, config, options):
    plain = make(config)
    other = make(dataclasses.replace(config, **options), like=plain)
    assert plain.state_dict().keys() == other.state_dict().keys()
    (out, gradients), (other_out, other_gradients) = step(plain, images), step(other, images)
    torch.testing.assert_close(other_out, out, rtol=1e-9, atol=1e-9)
    for name, gradient in gradients.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(
            other_gradients[name], gradient, rtol=1e-9, atol=1e-9 * scale + 1e-12
        )
    for (name, value), other_value in zip(plain.state_dict().items(), other.state_dict().values()):
        torch.testing.assert_close(other_value, value, rtol=1e-9, atol=1e-9, msg=name)


def test_recomputing_leaves_statistics_of_one_step(images):
    net = make(with_options(memory="recompute"))
    step(net, images)
    norms = [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert {int(norm.num_batches_tracked) for norm in norms} == {1}
    assert {norm.momentum for norm in norms} == {0.1}


def test_evaluation_reads_running_statistics(images):
    net = make(with_options(memory="recompute"))
    net(images)
    net.eval()
    with torch.no_grad():
        both, first = net(images), net(images[:1])
    torch.testing.assert_close(both[:1], first)


def test_forbidden_moves_have_no_probability_and_no_gradient(images):
    net = make()
    out, gradients = step(net, images)
    forbidden = net.forbidden
    assert forbidden.sum() == 4
    assert (gradients["betas"][forbidden] == 0).all()
    assert (gradients["betas"][~forbidden] != 0).all()
    with torch.no_grad():
        net.betas[forbidden] = 50.0
    assert torch.equal(net(images), out)
    assert "forbidden" not in net.state_dict()


def test_mix_decides_what_runs(images):
    net = make()
    edges = len(net.alphas)
    active = tuple(((edge % 5),) for edge in range(edges))
    weights = F.one_hot(torch.arange(edges) % 5, 6).double().requires_grad_()
    out, gradients = step(net, images, mix=SimpleNamespace(weights=weights, active=active))
    everything = net(images, SimpleNamespace(weights=weights, active=None))
    torch.testing.assert_close(everything, out)
    assert gradients["alphas"] is None
    ran = {
        name.split(".")[5]
        for name, g in gradients.items()
        if "edges.2.ops" in name and g is not None
    }
    assert ran == {"dil3x3"}


@pytest.mark.parametrize("options", [{"fused": True}, {"fused": True, "memory": "recompute"}])
def test_gates_that_are_closed_still_learn(images, options):
    """Two operations run, one of them with weight 0, as with binary gates."""
    pairs = ((0, 4), (1, 3), (4, 5), (2, 4), (0, 5))
    plain = make()
    results = []
    for net in (plain, make(with_options(**options), like=plain)):
        weights = torch.zeros(5, 6, dtype=torch.float64)
        for edge, (first, second) in enumerate(pairs):
            weights[edge, first if edge < 2 else second] = 1.0
        weights.requires_grad_()
        out, _ = step(net, images, mix=SimpleNamespace(weights=weights, active=pairs))
        results.append((out, weights.grad))
    assert {(e, k) for e, k in results[0][1].nonzero().tolist()} == {
        (edge, k) for edge, pair in enumerate(pairs) for k in pair if k != 5
    }
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_super_resolution(images):
    net = make(channels=3, scale=3)
    out = net(torch.rand(1, 3, 5, 6, dtype=torch.float64))
    assert out.shape == (1, 3, 15, 18)
    assert 0 < out.min() < out.max() < 1


def test_a_reduction_changes_images_slowly():
    net = make(channels=3, reduction=2)
    images = torch.rand(2, 3, 7, 8, dtype=torch.float64)
    blocks = F.pixel_unshuffle(F.pad(images, (0, 0, 0, 1), mode="replicate"), 2)
    maps = F.interpolate(forward_by_hand(net, blocks, net.config.layers), None, 2, "bilinear")
    gain, offset = maps[:, :3, :7], maps[:, 3:, :7]
    torch.testing.assert_close(net(images), images - (gain * images + offset))


def test_derivation():
    net = make()
    with torch.no_grad():
        net.alphas.fill_(1.0)
        net.betas.fill_(1.0)
    genotype = net.derive()
    assert genotype.nodes == ((("conv3x3", 0), ("conv3x3", 1)),) * 2
    assert genotype.levels == (0, 0, 0)
    alpha, beta = net.entropies()
    assert alpha == pytest.approx(math.log(6))
    assert beta == pytest.approx((4 * math.log(2) + 2 * math.log(3)) / 6)
    with torch.no_grad():
        net.alphas[1, PRIMITIVES.index("none")] = 9.0
        net.alphas[3, PRIMITIVES.index("def3x3")] = 2.0
        net.alphas[4, PRIMITIVES.index("skip")] = 3.0
        net.betas[0, 2] = 2.0  # up after the first layer
        net.betas[2, 0] = 4.0  # and down again
        net.betas[3, 0] = 50.0  # there is nothing below
    genotype = net.derive()
    assert genotype.nodes[1] == (("def3x3", 1), ("skip", 2))
    assert genotype.levels == (1, 0, 0)
    IRNASSpace(3, 2).encode(genotype)


def test_derivation_of_depth_and_free_widths():
    net = make(FREE)
    assert sum(p.numel() for p in net.architecture()) == 5 * 6 + (1 + 3) * 5 + 2
    assert len([*net.weights(), *net.architecture()]) == len([*net.parameters()])
    with torch.no_grad():
        for logits in net.architecture():
            logits.fill_(1.0)
    genotype = net.derive()
    assert (genotype.levels, genotype.widths) == ((0,), "free")
    moves_entropy = (3 * math.log(3) + math.log(4)) / 4  # of the stem and of three levels
    assert net.entropies()[1:] == pytest.approx((moves_entropy, math.log(2)))
    with torch.no_grad():
        net.betas[0, 3] = 3.0  # to 1.5 W, and from there narrower, and wider
        net.betas[2, 1] = 2.0
        net.betas[2, 0] = net.betas[2, 4] = 50.0  # beyond twice or half as wide
    assert net.derive().levels == (1,)
    with torch.no_grad():
        net.depths[1] = 2.0
    assert net.derive().levels == (1, 0)
    FREE.space.encode(net.derive())


def test_memory_of_the_plain_formulation():
    """Against the account by hand: 17 + 72 / C maps an edge, with the stem, routers and decoder."""
    with torch.device("meta"):
        net = Supernet(DENOISING, 1)
        images = torch.empty(12, 1, 64, 64).to(memory_format=torch.channels_last)
    kept = sum(kept_for_backward(net, lambda: net(images))[0]) / 2**20
    one = 12 * 64 * 64 * 4 / 2**20  # MiB of one map
    assert 20 * (17 * 240 + 72 * 11) * one < kept < 20 * (17 * 240 + 72 * 11) * one + 1200


def test_memory_of_recomputing():
    """The states of the cells stay, and little else: the published step, on one image."""
    net = Supernet(SupernetConfig(), 1)
    images = torch.rand(1, 1, 64, 64).to(memory_format=torch.channels_last)
    kept = sum(kept_for_backward(net, lambda: net(images))[0]) / 2**20
    one = 64 * 64 * 4 / 2**20
    states = (2 + 5) * 240 * one
    assert states * 0.8 < kept < states * 1.2
    assert kept < 18_669 / 12 / 50, "of what the plain formulation keeps of an image"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 0}, "SupernetConfig.layers: expected a value from 1 to 64, got 0"),
        ({"nodes": 0}, "SupernetConfig.nodes: expected a value from 1 to 8, got 0"),
        ({"width": 0}, "SupernetConfig.width: expected a value from 1 to 16,384, got 0"),
        ({"width": 5}, "SupernetConfig.width: expected an even number, got 5; half the channels"),
        (
            {"layers": 1, "searched_depth": True},
            "SupernetConfig.searched_depth: expected at least 2 layers, got 1; raise layers",
        ),
        ({"widths": "x"}, 'SupernetConfig.widths: expected "published" or "free", got \'x\''),
        ({"memory": "none"}, 'SupernetConfig.memory: expected "save" or "recompute", got \'none\''),
    ],
)
def test_config_errors(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SupernetConfig(**options)


def test_images_of_other_channels(images):
    message = "Supernet: expected images [N, 3, H, W], got shape [2, 1, 9, 7]; read the data with"
    with pytest.raises(ValueError, match=re.escape(message)):
        make(channels=3)(images)
    with pytest.raises(
        ValueError, match=re.escape("expected images [N, 1, H, W], got shape [1, 9")
    ):
        make()(images[0])
