"""The update on one device: the gradient of the dense oracle, the same bits twice, one program, a donated state."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import packed_cases as cases
import pytest

from lmmr1_jax.config.schema import AlgorithmConfig, LearnerConfig, MeshConfig, ModelConfig, RolloutConfig, TrainConfig
from lmmr1_jax.parallel.sharding import make_mesh
from lmmr1_jax.run.learner_setup import assemble_learner
from lmmr1_jax.runtime.compilation import CompilationCounter
from weights_bridge.config_json import parse_architecture
from weights_bridge.tensor_table import layout, logical_axes

TEMPERATURE = 0.7


@functools.cache
def learner(vision=False, freeze_vision=False, remat="none", algorithm=None, compute_dtype=jnp.float32, **options):
    """One for each set of options, so that tests share compiled programs."""
    raw, *_ = setting(vision)
    config = TrainConfig(
        model=ModelConfig(freeze_vision=freeze_vision),
        rollout=RolloutConfig(temperature=TEMPERATURE),
        algorithm=algorithm or AlgorithmConfig(importance="none"),
        learner=LearnerConfig(**({"learning_rate": 0.01, "logprob_chunk": 16} | options)),
    )
    network = cases.network(parse_architecture(raw), remat, compute_dtype=compute_dtype)
    mesh = make_mesh(MeshConfig(1, 1, 1))
    return assemble_learner(
        config, network, logical_axes(layout(network.config)), mesh, 10, banned_ids=cases.BANNED
    )


@functools.cache
def setting(vision=False):
    raw = cases.hf_config(vision=vision, tied=vision)
    config = parse_architecture(raw)
    net = cases.network(config)
    params = cases.random_params(net)
    rollouts = cases.random_rollouts(config)
    return raw, config, net, params, rollouts


@functools.cache
def expected(vision=False):
    _, _, net, params, rollouts = setting(vision)
    return cases.oracle_gradients(net, params, rollouts, TEMPERATURE)


@pytest.mark.parametrize("vision", [True, False])
def test_log_probs_equal_the_dense_ones_of_each_completion_alone(vision):
    _, config, net, params, rollouts = setting(vision)
    inputs = cases.oracle_inputs(config, rollouts)
    dense = np.asarray(jax.jit(lambda p, i: cases.oracle_log_probs(net, p, i, TEMPERATURE))(params, inputs))
    batch = cases.pack_by_hand(rollouts, config, rows=2)
    ours = learner(vision).log_probs(params, batch)
    for number, (row, taken) in enumerate(zip(dense, inputs["taken"], strict=True)):
        np.testing.assert_allclose(ours[batch.completion == number], row[taken], atol=2e-5)
    assert (ours[batch.mask == 0] == 0).all()


@pytest.mark.parametrize("rows", [2, 4])
def test_gradient_equals_the_dense_one_of_each_completion_alone(rows):
    _, config, _, params, rollouts = setting()
    gradients, metrics = learner().gradients(params, cases.pack_by_hand(rollouts, config, rows=rows))
    cases.assert_gradients_close(gradients, expected())
    advantages = np.concatenate([a for r in rollouts for a in r.advantages])
    np.testing.assert_allclose(metrics["loss/policy"], -advantages.mean(), rtol=1e-5)


@pytest.mark.parametrize("options", [{"remat": "attention"}, {"remat": "full", "logprob_chunk": 4}])
def test_remat_and_chunk_size_leave_the_gradient_alone(options):
    _, config, _, params, rollouts = setting()
    gradients, _ = learner(**options).gradients(params, cases.pack_by_hand(rollouts, config, rows=2))
    cases.assert_gradients_close(gradients, expected())


def test_micro_batches_that_hold_nothing_are_not_run():
    _, config, _, params, rollouts = setting()
    batch = cases.pack_by_hand(rollouts, config, rows=2)
    spoiled = jax.tree.map(lambda a: np.concatenate([a, np.full_like(a[:1], 77)]) if a.ndim else a, batch)
    gradients, metrics = learner().gradients(params, spoiled)
    cases.assert_gradients_close(gradients, expected())
    assert np.isfinite(list(metrics.values())).all()


def copy(tree):
    return jax.tree.map(jnp.array, tree)


def same_bits(a, b):
    return all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_two_runs_give_the_same_bits():
    _, config, _, params, rollouts = setting()
    ours = learner()
    batch = cases.pack_by_hand(rollouts, config, rows=2)
    ends = []
    for _ in range(2):
        state = ours.init_state(copy(params))
        for _ in range(3):
            state, _ = ours.update(state, batch)
        ends.append(jax.tree.map(np.array, state))
    assert same_bits(*ends)
    assert not same_bits(ends[0].params, params)


def test_an_update_lowers_its_loss_and_reports_what_it_did():
    _, config, _, params, rollouts = setting()
    ours = learner(learning_rate=1e-3, warmup_ratio=0.0)
    batch = cases.pack_by_hand(rollouts, config, rows=2)
    state = ours.init_state(copy(params))
    before = ours.log_probs(state.params, batch)
    state, metrics = ours.update(state, batch)
    after = ours.log_probs(state.params, batch)
    assert (batch.advantages * (after - before)).sum() > 0
    assert set(metrics) == {
        "loss/policy", "kl", "clip_fraction", "importance/mean", "importance/clipped", "entropy", "gap/mean",
        "gap/max", "grad_norm", "learning_rate", "skipped_updates",
    }  # fmt: skip
    assert all(isinstance(value, (int, float)) for value in metrics.values())
    gap = np.abs(before - batch.sampler_log_probs)[batch.mask > 0]
    np.testing.assert_allclose([metrics["gap/mean"], metrics["gap/max"]], [gap.mean(), gap.max()], rtol=1e-5)
    norm = np.sqrt(sum(np.square(g).sum() for g in jax.tree.leaves(expected())))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    assert 0 < metrics["entropy"] < np.log(cases.VOCABULARY)
    assert int(state.step) == 1 and metrics["learning_rate"] == pytest.approx(1e-3, rel=0.05)


def test_the_state_is_donated_and_one_program_serves_all_updates():
    _, config, _, params, rollouts = setting()
    ours = learner()
    state = ours.init_state(copy(params))
    batch = cases.pack_by_hand(rollouts, config, rows=2)
    old = jax.tree.leaves(state)
    state, _ = ours.update(state, batch)
    assert all(leaf.is_deleted() for leaf in old)
    counter = CompilationCounter()
    for seed in range(1, 3):
        other = cases.pack_by_hand(cases.random_rollouts(config, seed), config, rows=2)
        state, _ = ours.update(state, other)
    counter.close()
    assert counter.count == 0, counter.names


@pytest.mark.parametrize("rows", [2, 4])
def test_an_update_with_a_gradient_that_is_not_finite_is_skipped_and_counted(rows):
    _, config, _, params, rollouts = setting()
    ours = learner()
    batch = cases.pack_by_hand(rollouts, config, rows=rows)
    state, _ = ours.update(ours.init_state(copy(params)), batch)
    before = jax.tree.map(np.array, state)
    spoiled = batch.advantages.copy()
    spoiled[0, 0, 0] = np.nan
    state, metrics = ours.update(state, dataclasses.replace(batch, advantages=spoiled))
    assert same_bits(before.trained, state.trained)
    assert int(state.step) == 2 and int(state.skipped_updates) == 1 and metrics["skipped_updates"] == 1
    state, metrics = ours.update(state, batch)
    assert not same_bits(before.params, state.params) and metrics["skipped_updates"] == 1


def test_a_frozen_tower_keeps_its_bits_and_has_no_moments():
    _, config, _, params, rollouts = setting(True)
    ours = learner(True, freeze_vision=True, max_grad_norm=1e9, adam_b1=0.0)
    state, _ = ours.update(ours.init_state(copy(params)), cases.pack_by_hand(rollouts, config, rows=4))
    assert same_bits(state.params["vision"], params["vision"])
    # Without memory and clipping the first moment is the gradient.
    cases.assert_gradients_close(cases.first_moments(state), {"language": expected(True)["language"]})
    assert not same_bits(state.params["language"], params["language"])


def test_with_more_updates_per_rollout_the_ratio_divides_by_the_given_log_probs():
    _, config, net, params, rollouts = setting()
    ours = learner(epochs=2)
    batch = cases.pack_by_hand(rollouts, config, rows=2)
    now = ours.log_probs(params, batch)
    batch = dataclasses.replace(batch, old_log_probs=np.where(batch.mask > 0, now - 0.1, 0).astype(np.float32))
    _, metrics = ours.gradients(params, batch)
    held = batch.mask > 0
    ratio, advantages = np.exp(0.1), batch.advantages[held]
    np.testing.assert_allclose(metrics["loss/policy"], -(ratio * advantages).mean(), rtol=1e-4)
    assert metrics["clip_fraction"] == 0
    batch = dataclasses.replace(batch, old_log_probs=np.where(held, now - 0.3, 0).astype(np.float32))
    _, metrics = ours.gradients(params, batch)
    np.testing.assert_allclose(metrics["clip_fraction"], (advantages > 0).mean(), rtol=1e-5)
    clipped = np.where(advantages > 0, 1.2, np.exp(0.3)) * advantages
    np.testing.assert_allclose(metrics["loss/policy"], -clipped.mean(), rtol=1e-4)


def test_kl_in_the_loss_pulls_towards_the_reference():
    _, config, net, params, rollouts = setting()
    algorithm = AlgorithmConfig(kl_coefficient=0.5, kl_estimator="k2", kl_placement="loss", importance="none")
    ours = learner(algorithm=algorithm)
    batch = cases.pack_by_hand(rollouts, config, rows=2)
    now = ours.log_probs(params, batch)
    reference = np.where(batch.mask > 0, now + 0.2, 0).astype(np.float32)
    batch = dataclasses.replace(
        batch,
        reference_log_probs=reference,
        advantages=np.zeros_like(batch.advantages),
        kl_coefficient=np.float32(0.5),
    )
    gradients, metrics = ours.gradients(params, batch)
    np.testing.assert_allclose(metrics["kl"], 0.02, rtol=1e-3)
    # d/dp of 0.5 * mean(d^2 / 2) is 0.5 * mean(d * dlp) with d = -0.2: the policy gradient of an advantage of 0.1
    tenth = [dataclasses.replace(r, advantages=tuple(np.full_like(a, 0.1) for a in r.advantages)) for r in rollouts]
    cases.assert_gradients_close(gradients, cases.oracle_gradients(net, params, tenth, TEMPERATURE), 1e-4)


def test_what_the_sampler_drew_with_other_probabilities_is_weighed_by_their_ratio():
    _, config, net, params, rollouts = setting()
    ours = learner(algorithm=AlgorithmConfig())
    rollouts = cases.drawn_by_another(net, params, rollouts, TEMPERATURE)
    gradients, metrics = ours.gradients(params, cases.pack_by_hand(rollouts, config, rows=2))
    cases.assert_gradients_close(gradients, cases.oracle_gradients(net, params, rollouts, TEMPERATURE, "token"))
    assert 0 < metrics["importance/clipped"] < 1


@pytest.mark.parametrize("importance", ["token", "sequence", "masked_token", "masked_sequence"])
def test_a_sampler_that_agrees_leaves_the_gradient_alone(importance):
    _, config, _, params, rollouts = setting()
    batch = cases.pack_by_hand(rollouts, config, rows=2)
    ours = learner(algorithm=AlgorithmConfig(importance=importance))
    batch = dataclasses.replace(batch, sampler_log_probs=ours.log_probs(params, batch))
    gradients, metrics = ours.gradients(params, batch)
    cases.assert_gradients_close(gradients, expected())
    assert metrics["importance/mean"] == pytest.approx(1.0, abs=1e-5) and metrics["importance/clipped"] == 0


def test_the_kl_coefficient_is_data_and_another_one_compiles_nothing():
    _, config, _, params, rollouts = setting()
    ours = learner(algorithm=AlgorithmConfig(kl_coefficient=0.5, kl_estimator="k2", kl_placement="loss"))
    batch = cases.pack_by_hand(rollouts, config, rows=2)
    batch = dataclasses.replace(batch, advantages=np.zeros_like(batch.advantages), kl_coefficient=np.float32(0.5))
    gradients, _ = ours.gradients(params, batch)
    counter = CompilationCounter()
    twice, _ = ours.gradients(params, dataclasses.replace(batch, kl_coefficient=np.float32(1.0)))
    counter.close()
    assert counter.count == 0, counter.names
    cases.assert_gradients_close(jax.tree.map(lambda g: 2 * g, gradients), twice)


def test_an_entropy_bonus_raises_the_entropy():
    _, config, _, params, rollouts = setting()
    ours = learner(algorithm=AlgorithmConfig(entropy_bonus=1.0), learning_rate=1e-3, warmup_ratio=0.0)
    batch = cases.pack_by_hand(rollouts, config, rows=2)
    batch = dataclasses.replace(batch, advantages=np.zeros_like(batch.advantages))
    state, before = ours.update(ours.init_state(copy(params)), batch)
    _, after = ours.update(state, batch)
    assert after["entropy"] > before["entropy"] + 1e-3


def test_an_update_in_bfloat16_follows_the_float32_gradient():
    _, config, _, params, rollouts = setting(True)
    batch = cases.pack_by_hand(rollouts, config, rows=2)
    ours = learner(True, compute_dtype=jnp.bfloat16)
    gradients, _ = ours.gradients(params, batch)
    flat, exact = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (gradients, expected(True)))
    assert flat.dtype == np.float32
    assert 0 < np.linalg.norm(flat - exact) < 0.05 * np.linalg.norm(exact)
    state, metrics = ours.update(ours.init_state(jax.tree.map(jnp.copy, params)), batch)
    assert metrics["skipped_updates"] == 0 and np.isfinite(metrics["loss/policy"])
    for before, after in zip(jax.tree.leaves(params), jax.tree.leaves(state.params), strict=True):
        assert after.dtype == jnp.float32 and np.any(before != after)
