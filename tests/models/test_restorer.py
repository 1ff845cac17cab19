import dataclasses
import itertools
import re

import pytest
import torch
import torch.nn.functional as F

from nasfast.models.restorer import Restorer, RestorerConfig
from nasfast.models.zoo import ZOO
from nasfast.spaces.ir_nas import IRNASGenotype, IRNASSpace
from nasfast.training.cost import count_macs, count_parameters

SMALL = RestorerConfig(width=4, stem=6, head=5, low_level=3)
CELL = ((("conv3x3", 0), ("skip", 1)), (("sep3x3", 1), ("def3x3", 2)), (("dil3x3", 0), ("skip", 3)))

# The two readings of what is known of the published cells (see nasfast/models/zoo.py).
DENOISE_B = ZOO["irnas-denoise"].genotype.nodes
DENOISE_A = (
    (("def3x3", 0), ("def3x3", 1)),
    *DENOISE_B[1:3],
    (("def3x3", 1), ("def3x3", 3)),
    DENOISE_B[4],
)
DERAIN_B = ZOO["irnas-derain"].genotype.nodes


def make(levels=(0, 1, 1), config=SMALL, channels=1, scale=1, nodes=CELL):
    return Restorer(IRNASGenotype(nodes, levels), config, channels, scale)


def published(nodes, levels, width=20, channels=1):
    config = RestorerConfig(width=width, dead_reduce=True)
    with torch.device("meta"):
        return make(levels, config, channels, nodes=nodes)


@pytest.mark.parametrize(
    ("nodes", "levels", "parameters", "without_reduce"),
    [
        (DENOISE_B, (0, 0, 0, 1), 661_693, 604_093),
        (DENOISE_B, (0, 0, 0, 0), 498_013, 440_413),
        (DENOISE_B, (0, 0, 1, 0), 609_193, 551_593),
        (DENOISE_B, (1, 0, 0, 0), 609_753, 552_153),
        (DENOISE_B, (0, 1, 0, 0), 610_473, 552_873),
        (DENOISE_B, (0, 0, 1, 1), 774_873, 717_273),
        (DENOISE_B, (1, 0, 0, 1), 773_433, 715_833),
        (DENOISE_B, (0, 1, 0, 1), 776_153, 718_553),
        (DENOISE_A, (0, 0, 0, 0), 576_365, 518_765),
        (DENOISE_A, (0, 0, 1, 0), 707_025, 649_425),
        (DENOISE_A, (0, 0, 0, 1), 759_525, 701_925),
    ],
)
def test_parameters_of_denoisers(nodes, levels, parameters, without_reduce):
    net = published(nodes, levels)
    assert count_parameters(net) == parameters
    assert count_parameters(net, exclude="reduce") == without_reduce
    with torch.device("meta"):
        assert count_parameters(make(levels, RestorerConfig(), nodes=nodes)) == without_reduce


def slowly_by_hand(net, images):
    """What a network that reads blocks makes of one image, in loops over pixels."""
    side, (channels, height, width) = net.config.reduction, images.shape[1:]
    rows, columns = -(-height // side), -(-width // side)
    blocks = images.new_zeros(1, channels * side**2, rows, columns)
    for c, y, x in itertools.product(range(channels), range(side * rows), range(side * columns)):
        value = images[0, c, min(y, height - 1), min(x, width - 1)]
        blocks[0, (c * side + y % side) * side + x % side, y // side, x // side] = value
    maps = net._last(blocks)[0]

    def enlarged(k, y, x):
        low, shares = [], []
        for place, count in ((y, rows), (x, columns)):
            place = min(max((place + 0.5) / side - 0.5, 0), count - 1)
            low.append(int(place))
            shares.append(place - int(place))
        total = 0
        for down, across in itertools.product((0, 1), (0, 1)):
            weight = abs(1 - down - shares[0]) * abs(1 - across - shares[1])
            row, column = min(low[0] + down, rows - 1), min(low[1] + across, columns - 1)
            total += weight * maps[k, row, column]
        return total

    out = images.clone()
    for c, y, x in itertools.product(range(channels), range(height), range(width)):
        gain, offset = enlarged(c, y, x), enlarged(channels + c, y, x)
        out[0, c, y, x] = gain * images[0, c, y, x] + offset
    return images - out if net.config.residual else out


@pytest.mark.parametrize(("residual", "size"), [(True, (7, 9)), (False, (8, 4)), (True, (1, 2))])
@torch.no_grad()
def test_a_reduction_changes_images_slowly(residual, size):
    config = dataclasses.replace(SMALL, reduction=4, residual=residual)
    net = make(config=config, channels=3).double().eval()
    images = torch.rand(1, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(net(images), slowly_by_hand(net, images), rtol=0, atol=1e-12)


def test_parameters_of_a_reduction():
    """The first convolution reads 16 values for 9, the last gives two for one."""
    plain = count_parameters(make(config=SMALL, channels=3))
    reduced = count_parameters(make(config=dataclasses.replace(SMALL, reduction=4), channels=3))
    assert reduced - plain == SMALL.stem * 3 * (16 - 9) + 3 * (SMALL.head + 1)


def test_a_reduction_does_not_enlarge():
    with pytest.raises(ValueError, match="expected a reduction of 1 where images are enlarged, go"):
        make(config=dataclasses.replace(SMALL, reduction=2), scale=2)


@pytest.mark.parametrize(("levels", "parameters"), [((1, 1, 1), 591_523), ((1, 2, 2), 1_086_283)])
def test_parameters_of_derainers(levels, parameters):
    assert count_parameters(published(DERAIN_B, levels, 15, 3)) == parameters


@pytest.mark.parametrize(
    ("levels", "parameters"),
    [
        # 1.5 W = 6: stem 54 + 12, 324 + 12; joints 2 (36 + 12); convolution 324 + 12; head 30 + 10;
        # in place of level 0 216; low level 12 + 6; decoder 72 + 16 + 40 + 10, 45 + 10 + 25 + 10, 6
        ((1,), 1342),
        # W = 4 behind it: joints 2 (24 + 8), convolution 144 + 8; head 20 + 10; no 216
        ((1, 0), 1342 + 64 + 152 + 30 - 40 - 216),
        # another of 1.5 W: joints (6 + 4) 6 + 4 * 6, convolution 336, head 30 + 10
        ((1, 0, 1), 1332 + 84 + 336 + 40 - 30),
    ],
)
def test_parameters_of_any_depth_and_free_widths(levels, parameters):
    """By hand: a convolution has k² in out weights, BatchNorm 2 C."""
    config = dataclasses.replace(SMALL, atrous=False)
    genotype = IRNASGenotype(((("skip", 0), ("conv3x3", 1)),), levels, "free")
    network = Restorer(genotype, config, 1)
    assert count_parameters(network) == parameters
    assert network(torch.rand(1, 1, 8, 9)).shape == (1, 1, 8, 9)


def test_one_path_of_29_has_the_published_size():
    space = IRNASSpace(4, 1)
    paths = [space.decode([0, 0, 0, path]).levels for path in range(29)]
    sizes = {
        (cell, levels): count_parameters(published(cell, levels)) / 2**20
        for cell in (DENOISE_A, DENOISE_B)
        for levels in paths
    }
    assert [key for key, size in sizes.items() if 0.625 <= size < 0.635] == [
        (DENOISE_B, (0, 0, 0, 1))
    ]


def test_multiply_accumulates():
    net = published(DENOISE_B, (0, 0, 0, 1))
    assert count_macs(net, (64, 64), channels=1) == 2_446_917_632
    assert count_macs(net, (481, 321), channels=1) == 92_237_922_192


def forward_by_hand(net, images, levels):
    """The forward pass in evaluation mode as the paper's equations."""
    net = net.eval()
    stem1 = net.stem1(images)
    stem2 = net.stem2(stem1)
    maps = [stem1, stem2]
    for i in range(len(levels)):
        cell = net.cells[i]
        s = [cell.before_last(F.relu(maps[i])), cell.last(F.relu(maps[i + 1]))]
        s.append(cell.ops["node0_edge0"](F.relu(s[0])) + s[1])
        s.append(cell.ops["node1_edge0"](F.relu(s[1])) + cell.ops["node1_edge1"](F.relu(s[2])))
        s.append(cell.ops["node2_edge0"](F.relu(s[0])) + s[3])
        maps.append(torch.cat(s[2:], 1))
    low = [x for x, level in zip(maps[2:], levels, strict=True) if level == 0]
    low = low[-1] if low else net.reduce(stem2)
    aspp = torch.cat([branch(F.relu(maps[-1])) for branch in net.aspp.branches], 1)
    x = torch.cat([net.aspp.fuse(aspp), net.low_level(low)], 1)
    return net.last(net.refine(x))


@pytest.mark.parametrize("levels", [(0, 1, 1), (0, 0, 0), (1, 0, 1), (1, 2, 1)])
def test_forward_is_the_published_one(levels):
    net, images = make(levels), torch.rand(2, 1, 8, 7)
    net(images)  # running statistics other than 0 and 1
    torch.testing.assert_close(net.eval()(images), forward_by_hand(net, images, levels))
    assert (net.reduce is None) == (0 in levels)


def test_every_parameter_learns():
    for levels in ((0, 1, 1), (1, 2, 1)):
        net = make(levels)
        net(torch.rand(2, 1, 8, 7)).square().sum().backward()
        assert all(p.grad is not None for p in net.parameters())


def test_the_dead_convolution_changes_no_result():
    images = torch.rand(1, 1, 8, 7)
    config = dataclasses.replace(SMALL, dead_reduce=True)
    net, dead = make().eval(), make(config=config).eval()
    missing, unexpected = dead.load_state_dict(net.state_dict(), strict=False)
    assert not unexpected
    assert {name.split(".")[0] for name in missing} == {"reduce"}
    assert torch.equal(net(images), dead(images))


def test_a_pointwise_head():
    """One convolution with BatchNorm from the last cell, 3 nodes of 2 * 4 channels, to the head."""
    net = make(config=dataclasses.replace(SMALL, atrous=False))
    x = torch.rand(2, 24, 8, 9)
    torch.testing.assert_close(net.aspp(x), F.relu(net.aspp[1](net.aspp[0](x))))
    assert count_parameters(net.aspp) == 24 * 5 + 2 * 5
    assert net(torch.rand(1, 1, 8, 9)).shape == (1, 1, 8, 9)


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_residual_and_scale(scale):
    images = torch.rand(2, 3, 6, 5)
    net = make(channels=3, scale=scale).eval()
    residual = make(channels=3, scale=scale, config=dataclasses.replace(SMALL, residual=True))
    residual.load_state_dict(net.state_dict())
    out = net(images)
    assert out.shape == (2, 3, 6 * scale, 5 * scale)
    enlarged = F.interpolate(images, scale_factor=scale, mode="bicubic") if scale > 1 else images
    torch.testing.assert_close(residual.eval()(images), enlarged - out)


@pytest.mark.parametrize("field", ["width", "stem", "head", "low_level"])
def test_empty_layers(field):
    message = f"RestorerConfig.{field}: expected a value from 1 to 16,384, got 0"
    with pytest.raises(ValueError, match=message):
        RestorerConfig(**{field: 0})


def test_odd_width_of_a_deformable_convolution():
    config = dataclasses.replace(SMALL, width=5)
    make((1, 1), config)  # twice the width
    with pytest.raises(
        ValueError, match=("def3x3: expected channels in 2 groups that share offsets")
    ):
        make((0, 1), config)


def test_images_of_other_channels():
    message = "Restorer: expected images [N, 1, H, W], got shape [2, 3, 8, 8]; read the data with"
    with pytest.raises(ValueError, match=re.escape(message)):
        make()(torch.rand(2, 3, 8, 8))
