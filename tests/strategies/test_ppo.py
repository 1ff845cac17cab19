import copy
import math
import random
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nasfast.spaces import Decision, FastNASSpace
from nasfast.strategies import PPO, PPOConfig, RandomSearch
from nasfast.strategies.ppo import Controller, clipped_gain, leave_one_out_advantages
from nasfast.utils.errors import UserError

SPACE = FastNASSpace()
PUBLISHED = PPOConfig()


def controller(config=PUBLISHED, decisions=SPACE.decisions, seed=0):
    return Controller(decisions, config, torch.Generator().manual_seed(seed))


def small(seed=0, **changes):
    return PPO(SPACE, PPOConfig(**{"hidden_size": 8, "lr": 1e-2} | changes), seed)


def parameters(strategy):
    return torch.cat([p.detach().flatten() for p in strategy.controller.parameters()])


def samples(count, seed=0):
    rng = random.Random(seed)
    return torch.tensor([SPACE.encode(SPACE.sample(rng)) for _ in range(count)])


# Controller


def test_initial_policy_is_nearly_uniform():
    policy = controller()
    assert sum(p.numel() for p in policy.parameters()) == 168_871
    log_prob, entropy = policy(samples(3))
    uniform = sum(math.log(d.size) for d in SPACE.decisions)
    assert log_prob.shape == entropy.shape == (3,)
    assert 0 < uniform - entropy[0].item() < 0.1
    assert torch.allclose(log_prob, torch.full((3,), -uniform), atol=1.5)
    assert all(p.abs().max() <= 0.1 for p in policy.parameters())


@pytest.mark.parametrize("embed", [False, True])
def test_log_probabilities_are_those_of_the_samples(embed):
    decisions = [Decision("a", "a", 2), Decision("b", "bc", 3), Decision("c", "bc", 3)]
    every = torch.cartesian_prod(*(torch.arange(d.size) for d in decisions))
    policy = controller(PPOConfig(embed_decisions=embed), decisions)
    single = torch.cat([policy(row[None])[0] for row in every])
    assert torch.allclose(policy(every)[0], single, atol=1e-4)
    for p in policy.parameters():
        p.data.mul_(20)  # far from uniform
    log_prob, entropy = policy(every)
    assert torch.allclose(log_prob.exp().sum(), torch.tensor(1.0))
    mean = (log_prob.exp() * entropy).sum()
    assert torch.allclose(mean, -(log_prob.exp() * log_prob).sum(), atol=1e-5)
    grid = log_prob.view(2, 3, 3)[:, :, 0]
    interaction = grid[0, 0] - grid[0, 1] - grid[1, 0] + grid[1, 1]
    assert (interaction.abs() > 1e-3) == embed, "only embedded decisions depend on each other"
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(2, 3, 3)
    for _ in range(1000):
        counts[policy.sample(generator)] += 1
    assert (counts.flatten() / 1000 - log_prob.exp()).abs().max() < 0.06


def test_one_decision_by_definition():
    policy = controller(PPOConfig(warmup_steps=1), [Decision("a", "a", 3)])
    x, states = policy.start[None], [None, None]
    for _ in range(2):  # the input of each step is the output of the last
        for layer, cell in enumerate(policy.cells):
            states[layer] = cell(x, states[layer])
            x = states[layer][0]
    log_probs, _ = policy(torch.arange(3)[:, None])
    torch.testing.assert_close(log_probs, policy.heads(x)[0].log_softmax(0))


def test_shared_head_of_two_sizes():
    message = 'b: expected size 2, as the other decisions of head "h", got 3; give it a head of its'
    with pytest.raises(ValueError, match=message):
        controller(decisions=[Decision("a", "h", 2), Decision("b", "h", 3)])


# Updates


def test_advantages_leave_the_own_reward_out():
    got = leave_one_out_advantages([1.0, 2.0, 4.0], 0.5)  # weights 1/4, 1/2, 1
    want = [1 - (2 / 2 + 4) / 1.5, 2 - (1 / 4 + 4) / 1.25, 4 - (1 / 4 + 2 / 2) / 0.75]
    assert torch.allclose(got, torch.tensor(want))
    assert torch.allclose(leave_one_out_advantages([1.0, 3.0], 1.0), torch.tensor([-2.0, 2.0]))


def test_first_step_is_the_policy_gradient_of_the_weighted_samples():
    config = PPOConfig(batch_size=3, minibatch_size=3, max_grad_norm=1e9, ent_coef=0.01)
    strategy = PPO(SPACE, config, 0)
    twin = copy.deepcopy(strategy.controller)
    rewards, asked = (0.1, 0.5, 0.3), [strategy.ask() for _ in range(3)]
    choices, log_prob, _ = zip(*strategy._asked)
    strategy._asked[1] = (choices[1], log_prob[1] + math.log(4), False)  # drawn 4 times as often
    strategy._asked[2] = (choices[2], log_prob[2] - math.log(4), False)  # truncated at 1
    for genotype, reward in zip(asked, rewards, strict=True):
        strategy.tell(genotype, reward)
    log_probs, entropy = twin(torch.tensor(choices))
    advantages = leave_one_out_advantages(rewards, config.baseline_decay)
    gain = torch.tensor([1.0, 0.25, 1.0]) * advantages * log_probs
    (-gain.mean() - 0.01 * entropy[0]).backward()
    for p, expected in zip(strategy.controller.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p.grad, expected.grad, atol=1e-6)


def test_the_gain_is_clipped_where_that_is_less():
    ratios = torch.tensor([0.5, 1.05, 2.0, 0.5, 1.05, 2.0])
    advantages = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    found = clipped_gain(ratios.log(), advantages, 0.1)
    torch.testing.assert_close(found, torch.tensor([0.5, 1.05, 1.1, -0.9, -1.05, -2.0]))


def test_a_ratio_that_overflows_has_a_finite_gradient():
    """As where the policy has turned to a sample within one update, at a large learning rate."""
    log_ratios = torch.tensor([200.0, 200.0, -200.0, -200.0], requires_grad=True)
    gain = clipped_gain(log_ratios, torch.tensor([1.0, -1.0, 1.0, -1.0]), 0.1)
    gain.sum().backward()
    assert gain.isfinite().all()
    assert log_ratios.grad.isfinite().all()


@pytest.mark.parametrize(("minibatch_size", "steps"), [(1, 5), (2, 3), (5, 1), (100, 1)])
def test_every_sample_once_per_epoch_and_nothing_else(monkeypatch, minibatch_size, steps):
    strategy = small(batch_size=5, minibatch_size=minibatch_size, update_epochs=2)
    asked = [strategy.ask() for _ in range(5)]
    seen, forward = [], strategy.controller.forward

    def record(choices):
        seen.append(choices.tolist())
        return forward(choices)

    monkeypatch.setattr(strategy.controller, "forward", record)
    for i, genotype in enumerate(asked):
        strategy.tell(genotype, i / 10)
    whole, *batches = seen  # the proximal log-probabilities, then the steps
    assert len(whole) == 5
    assert len(batches) == 2 * steps
    for epoch in (batches[:steps], batches[steps:]):
        assert sorted(row for batch in epoch for row in batch) == sorted(whole)


def test_buffer_keeps_the_latest():
    strategy = small(buffer_size=3)
    for i in range(5):
        strategy.tell(strategy.ask(), float(i))
    assert [reward for *_, reward in strategy.state_dict()["buffer"]] == [2.0, 3.0, 4.0]


def test_equal_rewards_and_a_single_one_change_nothing():
    strategy = small()
    before = parameters(strategy)
    for _ in range(3):
        strategy.tell(strategy.ask(), 0.5)
    assert torch.equal(parameters(strategy), before)


def test_failed_candidates_leave_the_policy_untouched():
    strategy = small(batch_size=2)
    for reward in (0.1, 0.9):
        strategy.tell(strategy.ask(), reward)
    before, buffer = parameters(strategy), strategy.state_dict()["buffer"]
    for _ in range(5):
        strategy.tell(strategy.ask(), None)
    assert strategy.state_dict()["buffer"] == buffer
    strategy.tell(strategy.ask(), 0.3)
    assert torch.equal(parameters(strategy), before), "failures do not fill the batch"
    strategy.tell(strategy.ask(), 0.4)
    assert not torch.equal(parameters(strategy), before)


# Rejections


def test_a_rejected_sample_has_the_reward_of_the_worst_one(monkeypatch):
    seen = []

    def advantages(rewards, decay):
        seen.append(list(rewards))
        return leave_one_out_advantages(rewards, decay)

    monkeypatch.setattr("nasfast.strategies.ppo.leave_one_out_advantages", advantages)
    strategy = small(batch_size=2, buffer_size=3)
    for reward in (None, 0.4, None, 0.2, None, None, 0.6, 0.8):
        genotype = strategy.ask()
        strategy.reject(genotype) if reward is None else strategy.tell(genotype, reward)
    # those before the first reward too; the latest three of either kind stay
    assert seen == [[0.2, 0.4, 0.2, 0.2], [0.2, 0.2, 0.2, 0.2, 0.6, 0.8]]
    assert [r for *_, r in strategy.state_dict()["buffer"]] == [None, 0.2, None, None, 0.6, 0.8]
    with pytest.raises(ValueError, match="reject: expected no genotype, asked last, got Fast"):
        strategy.reject(genotype)


def test_rejections_alone_change_nothing():
    strategy = small()
    before = parameters(strategy)
    for _ in range(3):
        strategy.reject(strategy.ask())
    assert torch.equal(parameters(strategy), before)


def test_the_controller_learns_to_keep_to_a_limit():
    """Of a tenth of the space, and although the reward grows with what is limited."""
    strategy = small(batch_size=4, minibatch_size=50, hidden_size=32)
    shares, rng = [], random.Random(0)
    for _ in range(3):
        rejected = 0
        for _ in range(100):
            genotype = strategy.ask()
            ops = sum(op for layer in genotype.cell.layers for op in layer[2:])
            if ops > 20:
                strategy.reject(genotype)
                rejected += 1
            else:
                strategy.tell(genotype, 0.4 + 0.002 * ops + rng.gauss(0, 0.01))
        shares.append(rejected / 100)
    assert shares[0] > 0.6 > 0.4 > shares[2]


# State


def reward_of(genotype):
    return random.Random(str(genotype)).random()


def play(strategy, tells, outstanding=()):
    """Asks two ahead of what it tells; the third reward of every four is missing."""
    asked, history = list(outstanding), []
    for i in range(tells):
        while len(asked) < 2:
            asked.append(strategy.ask())
            history.append(asked[-1])
        strategy.tell(asked[0], None if i % 4 == 2 else reward_of(asked[0]))
        asked.pop(0)
    return history, asked


@settings(max_examples=8)
@given(cut=st.integers(0, 11), batch_size=st.integers(1, 4), embed=st.booleans())
def test_state_round_trip_is_bit_exact(reloaded, cut, batch_size, embed):
    changes = {"batch_size": batch_size, "buffer_size": 5, "embed_decisions": embed}
    strategy, resumed = small(0, **changes), small(1, **changes)
    _, outstanding = play(strategy, 4 * (cut // 4))
    for genotype in outstanding[: cut % 3]:  # in the middle of a batch, with or without pending
        strategy.tell(genotype, 0.5)
    outstanding = outstanding[cut % 3 :]
    state = strategy.state_dict()
    expected = play(strategy, 12, outstanding)  # which leaves the state as it is
    resumed.load_state_dict(reloaded(state))
    assert play(resumed, 12, outstanding) == expected
    assert torch.equal(parameters(resumed), parameters(strategy))


# Learning


TARGET = SPACE.encode(SPACE.sample(random.Random(1)))
PAIRS = PPOConfig(lr=1e-2, batch_size=10, minibatch_size=50, embed_decisions=True)


def hits(choices):
    """Share of the choices of a hidden target."""
    return sum(a == b for a, b in zip(choices, TARGET, strict=True)) / len(TARGET)


def equal_ends(choices):
    """Share of connections with equal ends, whichever they are: marginals say nothing."""
    return sum(choices[i] == choices[i + 1] for i in (0, 2, 4)) / 3


@pytest.mark.parametrize(
    ("reward", "config", "evaluations", "uniform", "learned"),
    [(hits, PPOConfig.short_budget(), 150, 0.25, 0.4), (equal_ends, PAIRS, 300, 0.3, 0.5)],
)
def test_learns(reward, config, evaluations, uniform, learned):
    def mean_of_last_third(strategy):
        rewards = []
        for _ in range(evaluations):
            genotype = strategy.ask()
            rewards.append(reward(SPACE.encode(genotype)))
            strategy.tell(genotype, rewards[-1])
        return sum(rewards[-(evaluations // 3) :]) / (evaluations // 3)

    assert mean_of_last_third(RandomSearch(SPACE, 0)) < uniform
    assert mean_of_last_third(PPO(SPACE, config, 0)) > learned


# Errors


def test_tell_wants_what_was_asked():
    strategy = small()
    first, second = strategy.ask(), strategy.ask()
    message = (
        f"tell: expected the reward of {first}, got {second}; "
        "report every genotype of ask() once, in order"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        strategy.tell(second, 0.5)
    for reward in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"a finite reward, got {reward}; tell None for a f"):
            strategy.tell(first, reward)
    strategy.tell(first, 0.5)
    strategy.tell(second, 0.5)
    with pytest.raises(ValueError, match="tell: expected the reward of no genotype, got FastNASG"):
        strategy.tell(second, 0.5)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("lr", 0, "a value above 0"),
        ("hidden_size", 0, "a value from 1 to 16,384"),
        ("ent_coef", -0.1, "a value of at least 0"),
        ("warmup_steps", -1, "a value from 0 to 1,000"),
        ("baseline_decay", 1.1, "a value above 0 and at most 1"),
        ("buffer_size", 1, "at least 2 and at least batch_size=1"),
    ],
)
def test_settings_out_of_range(field, value, expected):
    with pytest.raises(UserError, match=f"^PPOConfig.{field}: expected {expected}, got {value}"):
        PPOConfig(**{field: value})
    with pytest.raises(UserError, match="at least batch_size=200, got 100; a reward is compared"):
        PPOConfig(batch_size=200)
