"""The critic in the update: values and gradients of the dense oracle, whatever the packing; the policy undisturbed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import packed_cases as cases
import pytest

from lmmr1_jax.config.schema import AlgorithmConfig, CriticConfig, LearnerConfig, MeshConfig, TrainConfig
from lmmr1_jax.learner.objectives.value import CRITIC, SCORE, initial_head, own_critic, shared_critic
from lmmr1_jax.learner.state import POLICY
from lmmr1_jax.models.attention.mask import causal_intervals
from lmmr1_jax.packing.pack import PackShapes, pack, scatter
from lmmr1_jax.parallel.sharding import make_mesh
from lmmr1_jax.run.learner_setup import assemble_learner
from weights_bridge.config_json import parse_architecture
from weights_bridge.tensor_table import layout, logical_axes

SHAPES = PackShapes(
    row_length=64, response_slots=32, rows=2, image_rows=4, image_slots=64, micro_batches=6,
    share_prompts=True, pack=True,
)  # fmt: skip
BACKBONES = pytest.mark.parametrize("backbone", ["own", "shared"])
WEIGHT = 0.25
RAW = cases.hf_config()


@functools.cache
def learner(backbone=None, *, minibatches=1, freezing=0, freeze_vision=False):
    """One for each set of options; its first moments are its gradients, for Adam forgets and nothing is clipped."""
    network = setting()[0]
    axes = logical_axes(layout(parse_architecture(RAW)))
    algorithm, critic, made = AlgorithmConfig(name="rloo", importance="none"), CriticConfig(), None
    if backbone is not None:
        algorithm = AlgorithmConfig(name="ppo", normalize_advantages="none", importance="none")
        critic = CriticConfig(
            backbone=backbone, learning_rate=0.003, max_grad_norm=1e9, loss_weight=WEIGHT,
            warmup_ratio=0.0, freezing_actor_steps=freezing, freeze_vision=freeze_vision,
        )  # fmt: skip
        made = own_critic(network, axes) if backbone == "own" else shared_critic(network)
    settings = LearnerConfig(
        learning_rate=0.01, logprob_chunk=32, adam_b1=0.0, max_grad_norm=1e9, minibatches=minibatches, warmup_ratio=0.0
    )
    config = TrainConfig(algorithm=algorithm, critic=critic, learner=settings)
    return assemble_learner(
        config, network, axes, make_mesh(MeshConfig(1, 1, 1)), 10, banned_ids=cases.BANNED, critic=made
    )


@functools.cache
def setting():
    network = cases.network(parse_architecture(RAW))
    rollouts = cases.random_rollouts(network.config)
    rng = np.random.default_rng(7)
    lengths = [c.token_ids.size for r in rollouts for c in r.completions]
    old, returns = ([rng.normal(size=n).astype(np.float32) for n in lengths] for _ in range(2))
    return network, cases.random_params(network), rollouts, old, returns


@functools.cache
def critic_params(backbone):
    head = {SCORE: {"kernel": jax.random.normal(jax.random.key(3), (32, 1))}}
    return head if backbone == "shared" else cases.random_params(setting()[0], seed=1) | head


def copy(tree):
    return jax.tree.map(jnp.array, tree)


def start(backbone, **options):
    return learner(backbone, **options).init_state(copy(setting()[1]), critic=copy(critic_params(backbone)))


def packed(**options):
    network, _, rollouts, old, returns = setting()
    batch = pack(rollouts, dataclasses.replace(SHAPES, **options), network.config.vision, cases.patches_of)
    return dataclasses.replace(batch, values=scatter(old, batch), returns=scatter(returns, batch))


def same_bits(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def dense_values(params, score, inputs):
    """Every completion alone behind its own prompt: `[completions, length]`, at each token the state before it."""
    network = setting()[0]
    model = network.bind(params)
    x = model.embed(inputs["tokens"], inputs["slots"], model.encode_images(inputs["vision"]))
    hidden = model.hidden(x, inputs["positions"], causal_intervals(inputs["lengths"], x.shape[1]))
    return jnp.roll((hidden @ score)[..., 0], 1, 1)


@functools.cache
def dense(backbone):
    """Values, the loss, and its gradient for the parameters that hidden states come from and for the head."""
    network, params, rollouts, old, returns = setting()
    inputs = cases.oracle_inputs(network.config, rollouts)
    body = params if backbone == "shared" else {k: v for k, v in critic_params("own").items() if k != SCORE}
    taken = inputs["taken"]
    old_rows, return_rows = np.zeros(taken.shape, np.float32), np.zeros(taken.shape, np.float32)
    old_rows[taken], return_rows[taken] = np.concatenate(old), np.concatenate(returns)

    def loss(body, score):
        v = dense_values(body, score, inputs)
        near = jnp.clip(v, old_rows - 0.2, old_rows + 0.2)
        worst = jnp.maximum((v - return_rows) ** 2, (near - return_rows) ** 2)
        return 0.5 * jnp.sum(jnp.where(taken, worst, 0)) / taken.sum(), v

    ask = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (total, values), gradients = ask(body, critic_params(backbone)[SCORE]["kernel"])
    return np.asarray(values)[taken], float(total), gradients


@BACKBONES
def test_values_equal_the_dense_ones_of_each_completion_alone(backbone):
    batch = packed()
    values = learner(backbone).values(start(backbone), batch)
    assert values.shape == batch.mask.shape and (values[batch.mask == 0] == 0).all()
    found = np.concatenate([values[batch.completion == n] for n in range(int(batch.completions_total))])
    np.testing.assert_allclose(found, dense(backbone)[0], atol=2e-4)


WAYS = pytest.mark.parametrize(
    "options",
    [{}, {"share_prompts": False}, {"pack": False}, {"row_length": 26, "response_slots": 16, "rows": 3}],
    ids=["shared prompts", "copied prompts", "unpacked", "cut groups"],
)


@WAYS
def test_gradients_of_an_own_critic_equal_the_dense_ones_whatever_the_packing(options):
    state, metrics = learner("own").update(start("own"), packed(**options))
    _, loss, (body, head) = dense("own")
    # Adam has no memory here: its first moment is the gradient.
    cases.assert_gradients_close(cases.first_moments(state, CRITIC), body | {SCORE: {"kernel": head}})
    np.testing.assert_allclose(metrics["loss/value"], loss, rtol=1e-4)
    assert 0 < metrics["value/clip_fraction"] < 1
    assert metrics["value/learning_rate"] == pytest.approx(0.003, rel=0.05)


@WAYS
def test_gradients_of_a_shared_critic_equal_the_dense_ones_whatever_the_packing(options):
    network, params, rollouts, *_ = setting()
    state, metrics = learner("shared").update(start("shared"), packed(**options))
    _, loss, (body, head) = dense("shared")
    policy = cases.oracle_gradients(network, params, rollouts)
    both = jax.tree.map(lambda p, v: p + WEIGHT * v, policy, body)
    cases.assert_gradients_close(cases.first_moments(state), both)
    cases.assert_gradients_close(cases.first_moments(state, CRITIC), {SCORE: {"kernel": head}})
    np.testing.assert_allclose(metrics["loss/value"], loss, rtol=1e-4)


def test_an_own_critic_leaves_the_policys_update_as_it_is_to_the_last_bit():
    batch = packed()
    with_critic, told = learner("own").update(start("own"), batch)
    alone = learner()
    state, metrics = alone.update(alone.init_state(copy(setting()[1])), dataclasses.replace(
        batch, values=None, returns=None
    ))  # fmt: skip
    assert same_bits(state.trained[POLICY], with_critic.trained[POLICY])
    assert metrics == {name: told[name] for name in metrics}


def test_a_critics_frozen_tower_keeps_its_bits_and_has_no_moments_while_the_policys_moves():
    state, _ = learner("own", freeze_vision=True).update(start("own", freeze_vision=True), packed())
    free, _ = learner("own").update(start("own"), packed())
    assert same_bits(state.trained[CRITIC].params["vision"], critic_params("own")["vision"])
    assert not same_bits(free.trained[CRITIC].params["vision"], critic_params("own")["vision"])
    rest = {name: tree for name, tree in cases.first_moments(free, CRITIC).items() if name != "vision"}
    cases.assert_gradients_close(cases.first_moments(state, CRITIC), rest)
    assert same_bits(state.params, free.params) and not same_bits(state.params["vision"], setting()[1]["vision"])


@BACKBONES
def test_a_frozen_policy_waits_for_its_critic_and_then_begins_its_own_schedule(backbone):
    ours = learner(backbone, freezing=2, minibatches=2)  # two steps of two updates
    state, batch = start(backbone, freezing=2, minibatches=2), packed()
    for _ in range(4):
        before = jax.tree.map(np.array, state)
        state, metrics = ours.update(state, batch)
        assert same_bits(before.trained[POLICY], state.trained[POLICY])
        assert metrics["learning_rate"] == 0
        assert not same_bits(before.trained[CRITIC].params, state.trained[CRITIC].params)
    state, metrics = ours.update(state, batch)
    assert not same_bits(before.params, state.params)
    # the first of the 6 updates that are left: 0.1 + 0.9 (1 + cos(pi / 6)) / 2 of the peak
    np.testing.assert_allclose(metrics["learning_rate"], 0.01 * (0.1 + 0.45 * (1 + 3**0.5 / 2)), rtol=1e-5)


@BACKBONES
@pytest.mark.parametrize("field", ["returns", "advantages"])
def test_an_update_without_finite_gradients_is_skipped_as_a_whole_and_counted_once(backbone, field):
    batch = packed()
    spoiled = getattr(batch, field).copy()
    spoiled[batch.mask > 0] = np.nan
    state, _ = learner(backbone).update(start(backbone), batch)
    before = jax.tree.map(np.array, state)
    state, metrics = learner(backbone).update(state, dataclasses.replace(batch, **{field: spoiled}))
    assert same_bits(before.trained, state.trained)
    assert metrics["skipped_updates"] == 1 and int(state.step) == 2


def test_a_critic_fitted_to_its_returns_comes_to_explain_them():
    ours, batch, state = learner("own"), packed(), start("own")
    held, errors = batch.mask > 0, []
    for _ in range(10):
        batch = dataclasses.replace(batch, values=ours.values(state, batch))  # as at a rollout
        errors.append(np.square(batch.values - batch.returns)[held].mean())
        state, _ = ours.update(state, batch)
    assert errors[-1] < 0.7 * errors[0]


def test_the_first_head_is_small_and_the_seeds():
    head = initial_head(0, 1000)[SCORE]["kernel"]
    assert head.shape == (1000, 1) and head.dtype == jnp.float32
    assert abs(float(head.std()) * 1001 - 1) < 0.1
    assert np.isfinite(initial_head(2**64, 8)[SCORE]["kernel"]).all()  # a seed may be any whole number
    assert same_bits(head, initial_head(0, 1000)) and not same_bits(head, initial_head(1, 1000))


def test_a_critic_is_given_exactly_where_the_algorithm_has_one():
    network = setting()[0]
    for name, critic in (("ppo", None), ("rloo", shared_critic(network))):
        config = TrainConfig(algorithm=AlgorithmConfig(name=name))
        axes = logical_axes(layout(network.config))
        with pytest.raises(ValueError, match=f"{name} has"):
            mesh, axes = make_mesh(MeshConfig(1, 1, 1)), logical_axes(layout(parse_architecture(RAW)))
            assemble_learner(config, network, axes, mesh, 10, critic=critic)
