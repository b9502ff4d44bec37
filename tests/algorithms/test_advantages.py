"""Advantages against numbers worked out by hand."""

import numpy as np
import pytest

from lmmr1_jax.algorithms import rloo, rloo_lmm_r1
from lmmr1_jax.config import AlgorithmConfig
from lmmr1_jax.types import Completion, EncodedPrompt, Prompt, Reward, Rollout


def group(rewards, lengths, name="p"):
    prompt = Prompt([], None, name, "test", "file", 0)
    encoded = EncodedPrompt(prompt, np.zeros(1, np.int32), np.zeros((3, 1), np.int32), (), np.zeros(0, np.int32), 1)
    completions = tuple(
        Completion(np.arange(n, dtype=np.int32), np.zeros(n, np.float32), "stop", np.zeros(n, np.int32))
        for n in lengths
    )
    return Rollout(encoded, completions, tuple(Reward(r, {}) for r in rewards))


def test_rloo_baseline_excludes_the_sample_itself():
    # 1.5 - (0.5 + 0.5 + 0) / 3 = 1.1666..., and so on.
    expected = [7 / 6, -1 / 6, -1 / 6, -5 / 6]
    np.testing.assert_allclose(rloo.leave_one_out(np.array([1.5, 0.5, 0.5, 0])), expected, atol=1e-12)


def test_rloo_is_the_mean_baseline_times_n_over_n_minus_1():
    rewards = np.random.default_rng(0).normal(size=7)
    np.testing.assert_allclose(rloo.leave_one_out(rewards), (rewards - rewards.mean()) * 7 / 6, atol=1e-12)


def test_a_group_of_one_has_no_baseline():
    with pytest.raises(ValueError, match="at least 2"):
        rloo.leave_one_out(np.array([1.0]))


def test_every_token_of_a_completion_has_the_advantage_of_its_own_group():
    rollouts = [group([1.5, 0.5, 0.5, 0], [2, 1, 3, 1], "a"), group([1, 0], [1, 2], "b")]
    first, second = rloo.advantages(rollouts, AlgorithmConfig())
    assert [a.tolist() for a in second.advantages] == [[1.0], [-1.0, -1.0]]
    assert [a.size for a in first.advantages] == [2, 1, 3, 1]
    np.testing.assert_allclose(first.advantages[0], [7 / 6, 7 / 6], rtol=1e-6)
    assert all(a.dtype == np.float32 for a in first.advantages)


def test_published_rloo_puts_the_kl_under_the_baseline():
    config = AlgorithmConfig(kl_coefficient=0.1)
    # whole rewards: 1 - 0.1 * (0.1 - 0.2 + 0.3) = 0.98 and 0 - 0.1 * 0.5 = -0.05; difference 1.03
    (result,) = rloo.advantages([group([1, 0], [3, 1])], config, [np.array([0.1, -0.2, 0.3]), np.array([0.5])])
    np.testing.assert_allclose(result.advantages[0], [1.03] * 3, rtol=1e-6)
    np.testing.assert_allclose(result.advantages[1], [-1.03], rtol=1e-6)


def test_kl_in_the_reward_without_log_probs_is_refused():
    with pytest.raises(ValueError, match="reference log-probs"):
        rloo.advantages([group([1, 0], [3, 1])], AlgorithmConfig(kl_coefficient=0.1))


def test_kl_in_the_loss_leaves_advantages_alone():
    config = AlgorithmConfig(kl_coefficient=0.1, kl_placement="loss")
    (result,) = rloo.advantages([group([1, 0], [1, 1])], config)
    assert result.advantages[0].tolist() == [1.0]


def test_lmm_r1_returns_carry_the_kl_still_to_come():
    # R = [-.01, .02, .803333]; summed from the end.
    result = rloo_lmm_r1.returns(0.833333, np.array([0.1, -0.2, 0.3]), 0.1)
    np.testing.assert_allclose(result, [0.813333, 0.823333, 0.803333], atol=1e-9)


def test_lmm_r1_normalisation_weighs_tokens_and_uses_the_biased_variance():
    # three tokens of +1 and one of -1: mean .5, variance .75
    rows = rloo_lmm_r1.normalise([np.ones(3), -np.ones(1)], divide=True)
    np.testing.assert_allclose(rows[0], [0.57735027] * 3, atol=1e-8)
    np.testing.assert_allclose(rows[1], [-1.73205081], atol=1e-8)
    rows = rloo_lmm_r1.normalise([np.ones(3), -np.ones(1)], divide=False)
    np.testing.assert_allclose(rows[1], [-1.5])


def test_lmm_r1_clips_the_shaped_reward_not_the_reward():
    config = AlgorithmConfig(name="rloo_lmm_r1", reward_clip=1.0, normalize_std=False)
    # shaped +3 and -3, clipped to +-1, mean over the two tokens 0; the rewards themselves are within neither limit
    (result,) = rloo_lmm_r1.advantages([group([10, 7], [1, 1])], config)
    assert [a.tolist() for a in result.advantages] == [[1.0], [-1.0]]


def test_lmm_r1_gives_equal_rewards_no_advantage():
    (result,) = rloo_lmm_r1.advantages([group([1, 1, 1], [3, 1, 2])], AlgorithmConfig(name="rloo_lmm_r1"))
    assert all((a == 0).all() for a in result.advantages)


def test_an_empty_completion_is_no_fault():
    for module in (rloo, rloo_lmm_r1):
        (result,) = module.advantages([group([1, 0], [0, 2])], AlgorithmConfig())
        assert [a.size for a in result.advantages] == [0, 2]
