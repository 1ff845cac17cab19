import math

import pytest
import torch

from nasfast.models.supernet import Supernet, SupernetConfig
from nasfast.strategies import GRADIENT_STRATEGIES, Temperature, make_relaxation

SAMPLING = ("proxyless", "gumbel")
TEMPERATURE = Temperature(start=2.0, end=0.5, steps=10)
LOGITS = (0.5, -0.4, 0.0, 1.2)
OUTPUTS = torch.tensor([0.3, -1.0, 2.0, 0.7], dtype=torch.float64)  # of four operations
TARGET = 0.4


def make(name, seed=0):
    return make_relaxation(name, seed, TEMPERATURE)


def logits(*values):
    return torch.tensor([values], dtype=torch.float64, requires_grad=True)


def gradient(mix, alphas):
    """Of the squared error of one edge whose operations give OUTPUTS."""
    loss = (mix.weights[0] @ OUTPUTS[: alphas.shape[1]] - TARGET) ** 2
    return torch.autograd.grad(loss, alphas)[0][0]


def test_darts_is_the_softmax():
    alphas = logits(*LOGITS)
    relaxation = make("darts")
    mix, frozen = relaxation.architecture_step(alphas), relaxation.weight_step(alphas)
    assert mix.active is frozen.active is None
    assert torch.equal(mix.weights, alphas.softmax(1))
    assert torch.equal(frozen.weights, mix.weights)
    assert mix.weights.requires_grad
    assert not frozen.weights.requires_grad


def test_sigmoid_has_no_competition():
    alphas = logits(*LOGITS)
    mix = make("sigmoid").architecture_step(alphas)
    assert torch.equal(mix.weights, alphas.sigmoid())
    assert mix.active is None
    (alone,) = torch.autograd.grad(mix.weights[0, 2], alphas)
    assert alone.nonzero().tolist() == [[0, 2]]
    assert not make("sigmoid").weight_step(alphas).weights.requires_grad


def assert_one_hot(mix):
    (active,) = mix.active[0]
    assert mix.weights.tolist() == [[float(k == active) for k in range(4)]]
    return active


@pytest.mark.parametrize("name", SAMPLING)
def test_weight_steps_draw_one_operation_by_its_probability(name):
    relaxation, alphas = make(name), logits(*LOGITS)
    count = torch.zeros(4, dtype=torch.float64)
    for _ in range(4000):
        mix = relaxation.weight_step(alphas)
        assert not mix.weights.requires_grad
        count[assert_one_hot(mix)] += 1
    torch.testing.assert_close(count / 4000, alphas.detach()[0].softmax(0), rtol=0, atol=0.03)


def test_proxyless_runs_two_operations_and_opens_one_gate():
    relaxation, alphas = make("proxyless"), logits(*LOGITS)
    p = alphas.detach()[0].softmax(0)
    drawn = torch.zeros(4, 4, dtype=torch.float64)  # by the one whose gate opened, and the other
    for _ in range(4000):
        mix = relaxation.architecture_step(alphas)
        i, j = mix.active[0]
        assert i < j
        assert sorted(mix.weights[0].tolist()) == [0, 0, 0, 1]
        opened = int(mix.weights[0].argmax())
        drawn[opened, i + j - opened] += 1
        # equation 4 between the two
        y = mix.weights[0].detach() @ OUTPUTS
        q = p[[i, j]] / p[[i, j]].sum()
        gates = 2 * (y - TARGET) * OUTPUTS[[i, j]]
        expected = torch.zeros(4, dtype=torch.float64)
        expected[[i, j]] = q * (gates - q @ gates)
        torch.testing.assert_close(gradient(mix, alphas), expected)
    first = p[:, None] * p / (1 - p[:, None])  # of a pair in the order drawn
    share = p[:, None] / (p[:, None] + p)
    expected = ((first + first.T) * share).fill_diagonal_(0)
    torch.testing.assert_close(drawn / 4000, expected, rtol=0, atol=0.03)


def test_expected_gradient_of_gumbel_by_quadrature():
    """Of two operations, where the difference of the noises is logistic."""
    alphas, relaxation, drawn = logits(0.5, -0.4), make("gumbel"), []
    noise = torch.linspace(-40, 40, 80_001, dtype=torch.float64)
    density = noise.sigmoid() * (-noise).sigmoid()
    soft = ((0.9 + noise) / TEMPERATURE.start).sigmoid()
    slope = soft * (1 - soft) / TEMPERATURE.start
    first, second = (2 * (OUTPUTS[k] - TARGET) * OUTPUTS[k] for k in (0, 1))
    chosen = torch.where(noise > -0.9, first, -second)
    expected = torch.trapezoid(density * chosen * slope, noise)
    for _ in range(6000):
        mix = relaxation.architecture_step(alphas)
        ran = mix.weights.detach()
        mix.weights.register_hook(lambda g, ran=ran: g * ran)  # what does not run sends none
        drawn.append(gradient(mix, alphas))
    mean = torch.stack(drawn).mean(0)
    error = torch.stack(drawn).std(0) / math.sqrt(len(drawn))
    assert abs(mean[0] - expected) < 4 * error[0]
    assert mean[1] == pytest.approx(-mean[0].item())
    assert error[0] < 0.1 * abs(expected)


def test_gumbel_runs_one_operation_at_a_temperature_that_moves_with_architecture_steps():
    relaxation, alphas = make("gumbel"), logits(*LOGITS)
    seen = []
    for _ in range(12):
        relaxation.weight_step(alphas)
        mix = relaxation.architecture_step(alphas)
        assert_one_hot(mix)
        assert mix.weights.requires_grad
        seen.append(relaxation.temperature)
        relaxation.after_architecture_step(alphas)
    assert seen == pytest.approx([2.0 - 0.15 * step for step in range(10)] + [0.5, 0.5])


def test_proxyless_leaves_what_did_not_run():
    relaxation = make("proxyless")
    alphas = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    before = alphas.detach().clone()
    mix = relaxation.architecture_step(alphas)
    with torch.no_grad():
        alphas += torch.randn_like(alphas)  # an optimizer with momentum moves all
    after_step = alphas.detach().clone()
    relaxation.after_architecture_step(alphas)
    for edge, (i, j) in enumerate(mix.active):
        others = [k for k in range(6) if k not in (i, j)]
        assert torch.equal(alphas[edge, others], before[edge, others])
        p, q = alphas[edge].softmax(0), before[edge].softmax(0)
        torch.testing.assert_close(p[others], q[others])
        ratio = after_step[edge, i] - after_step[edge, j]
        torch.testing.assert_close(alphas[edge, i] - alphas[edge, j], ratio)
    with pytest.raises(RuntimeError, match="expected a call of architecture_step before"):
        relaxation.after_architecture_step(alphas)


def search(relaxation, alphas, steps):
    """Steps on the loss that prefers operation 2 of every edge; yields what was drawn."""
    optimizer = torch.optim.Adam([alphas], lr=0.05)
    cost = torch.tensor([1.0, 0.5, 0.0, 0.8])
    for _ in range(steps):
        yield relaxation.weight_step(alphas).weights
        mix = relaxation.architecture_step(alphas)
        optimizer.zero_grad()
        (mix.weights * cost).sum().backward()
        optimizer.step()
        relaxation.after_architecture_step(alphas)
        yield mix.weights.detach()


@pytest.mark.parametrize("name", GRADIENT_STRATEGIES)
@pytest.mark.parametrize("cut", [0, 1, 300])
def test_state_round_trip(name, cut, reloaded):
    relaxation, resumed = make(name, seed=1), make(name, seed=2)
    alphas = torch.ones(5, 4, requires_grad=True)
    for _ in search(relaxation, alphas, cut):
        pass
    assert cut < 300 or alphas.argmax(1).tolist() == [2] * 5
    resumed.load_state_dict(reloaded(relaxation.state_dict()))
    other = alphas.detach().clone().requires_grad_()
    for one, two in zip(search(relaxation, alphas, 9), search(resumed, other, 9), strict=True):
        assert torch.equal(one, two)
    assert torch.equal(alphas, other)


@pytest.mark.parametrize("name", SAMPLING)
def test_seed_decides(name):
    alphas = torch.zeros(20, 6)
    first, same, other = (make(name, seed).weight_step(alphas).weights for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", GRADIENT_STRATEGIES)
def test_on_a_supernet(name):
    net = Supernet(SupernetConfig(layers=2, nodes=1, width=2, memory="save"), 1)
    images, relaxation = torch.rand(2, 1, 6, 6), make(name)
    net(images, relaxation.weight_step(net.alphas)).sum().backward()
    assert net.alphas.grad is None
    mix = relaxation.architecture_step(net.alphas)
    net(images, mix).sum().backward()
    reached = {(edge, k) for edge, k in (net.alphas.grad != 0).nonzero().tolist()}
    if name == "proxyless":
        assert reached <= {(edge, k) for edge, pair in enumerate(mix.active) for k in pair}
    assert len(reached) > 0
    assert net.betas.grad.abs().sum() > 0


def test_errors():
    message = "strategy: expected one of darts, sigmoid, proxyless, gumbel, got 'ppo'"
    with pytest.raises(ValueError, match=f"^{message}$"):
        make("ppo")
    for name in GRADIENT_STRATEGIES:
        message = f"expected \"{name}\", got 'random'; resume with the strategy that wrote"
        with pytest.raises(ValueError, match=message):
            make(name).load_state_dict({"strategy": "random"})
    for field in ("start", "end"):
        with pytest.raises(ValueError, match=f"Temperature.{field}: expected a value above 0, got"):
            Temperature(**{field: 0})
