"""Advantages against numbers worked out by hand, and every estimator against slow and obvious loops."""

import numpy as np
import pytest
from algorithms.rewarded import group, settings

from lmmr1_jax.algorithms import ppo, rloo, shaping
from lmmr1_jax.algorithms.registry import ALGORITHMS

GOLDEN = [1.5, 0.5, 0.5, 0]
RLOO = rloo.ALGORITHM
WITHOUT_CRITIC = [name for name, algorithm in ALGORITHMS.items() if not algorithm.critic]


def first_tokens(name, rollouts, log_ratios=None, **fields):
    """The first token's advantage of every completion, groups one after the other."""
    made = ALGORITHMS[name].advantages(rollouts, settings(name, **fields), log_ratios)
    return [a[0] for rollout in made for a in rollout.advantages]


@pytest.mark.parametrize(
    "name, expected",
    [
        # mean .625; deviations .875, -.125, -.125, -.625; leave-one-out is 4/3 of them
        ("rloo", [7 / 6, -1 / 6, -1 / 6, -5 / 6]),
        ("dr_grpo", [0.875, -0.125, -0.125, -0.625]),
        # unbiased variance 1.1875 / 3
        ("grpo", [1.390760, -0.198680, -0.198680, -0.993399]),
        # over the four tokens of the batch, the biased variance: 1.1875 / 4
        ("reinforce_pp", [1.605910, -0.229416, -0.229416, -1.147079]),
        ("reinforce_pp_baseline", [1.605910, -0.229416, -0.229416, -1.147079]),
        ("rloo_lmm_r1", [1.605910, -0.229416, -0.229416, -1.147079]),
    ],
)
def test_advantages_of_one_group_equal_those_worked_out_by_hand(name, expected):
    np.testing.assert_allclose(first_tokens(name, [group(GOLDEN, [1] * 4)]), expected, atol=1e-6)


def test_rloo_baseline_excludes_the_sample_itself():
    # 1.5 - (0.5 + 0.5 + 0) / 3 = 1.1666..., and so on.
    np.testing.assert_allclose(rloo.leave_one_out(np.array(GOLDEN)), [7 / 6, -1 / 6, -1 / 6, -5 / 6], atol=1e-12)


def test_rloo_is_the_mean_baseline_times_n_over_n_minus_1():
    rewards = np.random.default_rng(0).normal(size=7)
    np.testing.assert_allclose(rloo.leave_one_out(rewards), (rewards - rewards.mean()) * 7 / 6, atol=1e-12)


@pytest.mark.parametrize("name", sorted(set(WITHOUT_CRITIC) - {"reinforce_pp"}))
def test_a_group_without_variance_or_others_teaches_exactly_nothing(name):
    config = settings(name, normalize_std=False) if name.endswith(("baseline", "r1")) else settings(name)
    rollouts = [group([0.1] * 3, [3, 1, 2]), group([0.7], [2]), group([0.1, 0.1], [1, 1])]
    made = ALGORITHMS[name].advantages(rollouts, config, None)
    assert all((a == 0).all() for rollout in made for a in rollout.advantages)


def test_every_token_of_a_completion_has_the_advantage_of_its_own_group():
    rollouts = [group(GOLDEN, [2, 1, 3, 1], "a"), group([1, 0], [1, 2], "b")]
    first, second = RLOO.advantages(rollouts, settings())
    assert [a.tolist() for a in second.advantages] == [[1.0], [-1.0, -1.0]]
    assert [a.size for a in first.advantages] == [2, 1, 3, 1]
    np.testing.assert_allclose(first.advantages[0], [7 / 6, 7 / 6], rtol=1e-6)
    assert all(a.dtype == np.float32 for a in first.advantages)


def test_published_rloo_puts_the_kl_under_the_baseline():
    config = settings(kl_coefficient=0.1)
    # whole rewards: 1 - 0.1 * (0.1 - 0.2 + 0.3) = 0.98 and 0 - 0.1 * 0.5 = -0.05; difference 1.03
    (result,) = RLOO.advantages([group([1, 0], [3, 1])], config, [np.array([0.1, -0.2, 0.3]), np.array([0.5])])
    np.testing.assert_allclose(result.advantages[0], [1.03] * 3, rtol=1e-6)
    np.testing.assert_allclose(result.advantages[1], [-1.03], rtol=1e-6)


def test_kl_in_the_reward_without_log_probs_is_refused():
    with pytest.raises(ValueError, match="reference log-probs"):
        RLOO.advantages([group([1, 0], [3, 1])], settings(kl_coefficient=0.1))


def test_kl_in_the_loss_leaves_advantages_alone():
    (result,) = RLOO.advantages([group([1, 0], [1, 1])], settings(kl_coefficient=0.1, kl_placement="loss"))
    assert result.advantages[0].tolist() == [1.0]


def test_returns_carry_the_kl_still_to_come():
    # R = [-.01, .02, .803333]; summed from the end, and with a discount of 1/2.
    kl = np.array([0.1, -0.2, 0.3])
    np.testing.assert_allclose(shaping.returns(0.833333, kl, 0.1), [0.813333, 0.823333, 0.803333], atol=1e-9)
    discounted = [-0.01 + 0.02 / 2 + 0.803333 / 4, 0.02 + 0.803333 / 2, 0.803333]
    np.testing.assert_allclose(shaping.returns(0.833333, kl, 0.1, 0.5), discounted, atol=1e-9)


def test_normalising_over_the_batch_weighs_tokens_and_uses_the_biased_variance():
    # three tokens of +1 and one of -1: mean .5, variance .75
    rows = shaping.normalise_tokens([np.ones(3), -np.ones(1)], divide=True)
    np.testing.assert_allclose(rows[0], [0.57735027] * 3, atol=1e-8)
    np.testing.assert_allclose(rows[1], [-1.73205081], atol=1e-8)
    rows = shaping.normalise_tokens([np.ones(3), -np.ones(1)], divide=False)
    np.testing.assert_allclose(rows[1], [-1.5])


def test_what_is_clipped_is_the_reward_less_its_baseline():
    # +3 and -3, clipped to +-1, mean over the two tokens 0; the rewards themselves are far outside
    rollouts = [group([10, 7], [1, 1])]
    assert first_tokens("rloo_lmm_r1", rollouts, reward_clip=1.0, normalize_std=False) == [1.0, -1.0]
    assert first_tokens("dr_grpo", rollouts, reward_clip=1.0) == [1.0, -1.0]


@pytest.mark.parametrize(
    "scope, expected",
    [
        # Dr. GRPO's advantages of what the scope makes of the rewards: [1, 3] and [10, 30]
        ("none", [-1, 1, -10, 10]),
        ("group", [-(0.5**0.5), 0.5**0.5] * 2),
        # the four rewards' mean is 11, their squared deviations 100 + 64 + 1 + 361 = 526
        ("batch", np.array([-1, 1, -10, 10]) / (526 / 3) ** 0.5),
    ],
)
def test_rewards_are_normalised_over_their_scope_before_the_baseline(scope, expected):
    rollouts = [group([1, 3], [1, 1]), group([10, 30], [1, 1])]
    np.testing.assert_allclose(first_tokens("dr_grpo", rollouts, normalize_rewards=scope), expected, atol=1e-6)


@pytest.mark.parametrize("name", WITHOUT_CRITIC)
def test_an_empty_completion_or_group_is_no_fault(name):
    made = ALGORITHMS[name].advantages([group([1, 0], [0, 2]), group([], [])], settings(name), None)
    assert [[a.size for a in rollout.advantages] for rollout in made] == [[0, 2], []]
    assert all(np.isfinite(a).all() for rollout in made for a in rollout.advantages)


@pytest.mark.parametrize(
    "discount, gae_lambda, expected, returns",
    [
        (1.0, 1.0, [0.5, 0.6, 0.7], [1, 1, 1]),
        (1.0, 0.95, [0.43675, 0.565, 0.7], [0.93675, 0.965, 1]),
        (0.99, 0.95, [0.418307, 0.55535, 0.7], [0.918307, 0.95535, 1]),
    ],
)
def test_generalised_advantages_equal_those_worked_out_by_hand(discount, gae_lambda, expected, returns):
    given = np.array([0, 0, 1.0]), np.array([0.5, 0.4, 0.3])
    advantages, targets = ppo.generalised_advantages(*given, discount=discount, gae_lambda=gae_lambda)
    np.testing.assert_allclose(advantages, expected, atol=1e-6)
    np.testing.assert_allclose(targets, returns, atol=1e-6)


def test_ppo_equals_a_loop_over_every_pair_of_tokens():
    """A_t = sum over s >= t of (discount lambda)^(s - t) delta_s, written out; then normalised, returns are not."""
    rng = np.random.default_rng(1)
    rollouts, log_ratios = random_groups(rng)
    values = [rng.normal(size=d.size) for d in log_ratios]
    config = settings("ppo", kl_coefficient=0.1, discount=0.9, gae_lambda=0.8)
    made, returns = ppo.advantages_and_returns(rollouts, config, log_ratios, values)
    rewards = [reward.total for rollout in rollouts for reward in rollout.rewards]
    expected = []
    for reward, d, v in zip(rewards, log_ratios, values, strict=True):
        paid = -0.1 * d + reward * (np.arange(d.size) == d.size - 1)
        delta = [paid[t] + 0.9 * (v[t + 1] if t + 1 < v.size else 0) - v[t] for t in range(v.size)]
        expected.append(
            np.array([sum((0.9 * 0.8) ** (s - t) * delta[s] for s in range(t, v.size)) for t in range(v.size)])
        )
    for got, row, v in zip(returns, expected, values, strict=True):
        np.testing.assert_allclose(got, row + v, atol=1e-6)
    tokens = np.concatenate(expected)
    expected = (tokens - tokens.mean()) / tokens.std()
    np.testing.assert_allclose(np.concatenate([a for r in made for a in r.advantages]), expected, atol=1e-5)


def test_ppo_gives_a_completion_the_same_whatever_the_order_of_groups_and_completions():
    rng = np.random.default_rng(5)
    rollouts, log_ratios = random_groups(rng)
    values = [rng.normal(size=d.size) for d in log_ratios]
    config = settings("ppo", kl_coefficient=0.2, gae_lambda=0.9)
    straight = ppo.advantages_and_returns(rollouts, config, log_ratios, values)
    back = ppo.advantages_and_returns(reversed_groups(rollouts), config, log_ratios[::-1], values[::-1])
    rows = [[a for rollout in made for a in rollout.advantages] for made, _ in (straight, back)]
    for ours, theirs in zip(rows[0] + straight[1], rows[1][::-1] + back[1][::-1], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_ppo_takes_empty_completions_and_groups():
    values = [np.zeros(0), np.array([0.5, 0.25])]
    made, returns = ppo.advantages_and_returns([group([1, 0.5], [0, 2]), group([], [])], settings("ppo"), None, values)
    assert [[a.size for a in rollout.advantages] for rollout in made] == [[0, 2], []]
    assert [r.tolist() for r in returns] == [[], [0.5, 0.5]]


def test_explained_variance_is_1_for_perfect_values_0_for_their_mean_and_none_without_variance():
    returns = [np.array([1.0, 0.0]), np.array([2.0])]
    assert ppo.critic_metrics(returns, returns) == {
        "value/mean": 1.0, "value/return": 1.0, "value/explained_variance": 1.0,
    }  # fmt: skip
    flat = [np.full(2, 7.0), np.full(1, 7.0)]
    assert ppo.critic_metrics(flat, returns)["value/explained_variance"] == 0
    # errors 0.5, -0.5, 0 have variance 1/6, the returns 2/3
    near = [np.array([0.5, 0.5]), np.array([2.0])]
    assert ppo.critic_metrics(near, returns)["value/explained_variance"] == pytest.approx(0.75)
    assert np.isnan(ppo.critic_metrics(returns, flat)["value/explained_variance"])


def random_groups(rng):
    """Groups of 5, 1, 2 and 4 with ragged completions; one of them without variance."""
    rollouts, log_ratios = [], []
    for number, count in enumerate([5, 1, 2, 4]):
        lengths = rng.integers(1, 7, size=count)
        rewards = [0.5] * count if number == 2 else rng.choice([0, 0.5, 1, 1.5], size=count) + 0.01 * rng.normal()
        rollouts.append(group(rewards, lengths, f"p{number}"))
        log_ratios += [rng.normal(size=n) * 0.3 for n in lengths]
    return rollouts, log_ratios


def reversed_groups(rollouts):
    """The groups from last to first, and the completions of each."""
    return [
        group([w.total for w in r.rewards][::-1], [c.token_ids.size for c in r.completions][::-1])
        for r in rollouts[::-1]
    ]


def slow_advantages(name, rollouts, log_ratios, *, beta, placement, estimator, scope, divide, clip, discount):
    """Token by token, as the formulas stand in docs/algorithms.md."""
    kl_of = {"k1": lambda d: d, "k2": lambda d: d * d / 2, "k3": lambda d: np.exp(-d) - 1 + d}[estimator]
    beta = beta if placement == "reward" else 0.0
    rows, number = [], 0
    for rollout in rollouts:
        n = len(rollout.completions)
        kls = [[kl_of(d) for d in log_ratios[number + i]] for i in range(n)]
        number += n
        rewards = [reward.total for reward in rollout.rewards]
        if name == "rloo":
            rewards = [r - beta * sum(kl) for r, kl in zip(rewards, kls, strict=True)]
            kls = [[0.0] * len(kl) for kl in kls]
        for i in range(n):
            others = [rewards[j] for j in range(n) if j != i]
            if name == "reinforce_pp":
                base = 0.0
            elif name.startswith("rloo"):
                base = sum(others) / len(others) if others else rewards[i]
            else:
                base = sum(rewards) / n
            shaped = rewards[i] - base
            if scope == "group" and divide:
                shaped /= np.std(rewards, ddof=1) if len(set(rewards)) > 1 else 1.0
            if clip is not None:
                shaped = max(-clip, min(clip, shaped))
            row = []
            for t in range(len(kls[i])):
                row.append(sum(-beta * discount ** (s - t) * kls[i][s] for s in range(t, len(kls[i]))))
                row[-1] += discount ** (len(kls[i]) - 1 - t) * shaped
            rows.append(row)
    if scope == "batch":
        tokens = [a for row in rows for a in row]
        mean = sum(tokens) / len(tokens)
        std = (sum((a - mean) ** 2 for a in tokens) / len(tokens)) ** 0.5 if divide else 1.0
        rows = [[(a - mean) / std for a in row] for row in rows]
    return [a for row in rows for a in row]


@pytest.mark.parametrize("name", WITHOUT_CRITIC)
@pytest.mark.parametrize("placement", ["reward", "loss"])
@pytest.mark.parametrize("scope", [None, "none", "group", "batch"])
def test_every_estimator_equals_the_loop_over_tokens(name, placement, scope):
    rng = np.random.default_rng(3)
    rollouts, log_ratios = random_groups(rng)
    options = dict(kl_coefficient=0.2, kl_placement=placement, normalize_advantages=scope)
    if name in ("rloo_lmm_r1", "reinforce_pp"):
        options["discount"] = 0.9
    if name != "rloo":
        options["reward_clip"] = 0.6
    config = settings(name, **options)
    expected = slow_advantages(
        name, rollouts, log_ratios, beta=0.2, placement=placement, estimator=config.kl_estimator,
        scope=config.normalize_advantages, divide=True, clip=config.reward_clip, discount=config.discount,
    )  # fmt: skip
    made = ALGORITHMS[name].advantages(rollouts, config, log_ratios)
    np.testing.assert_allclose(np.concatenate([a for r in made for a in r.advantages]), expected, atol=2e-6)


@pytest.mark.parametrize("name", WITHOUT_CRITIC)
def test_the_order_of_groups_and_of_completions_moves_no_advantage(name):
    rollouts, log_ratios = random_groups(np.random.default_rng(5))
    config = settings(name, kl_coefficient=0.2, kl_placement="reward")
    straight = ALGORITHMS[name].advantages(rollouts, config, log_ratios)
    back = ALGORITHMS[name].advantages(reversed_groups(rollouts), config, log_ratios[::-1])
    for ours, theirs in zip(straight, back[::-1], strict=True):
        for a, b in zip(ours.advantages, theirs.advantages[::-1], strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)
