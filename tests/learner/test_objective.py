"""An objective, an optimizer and a mask of one's own train with the learner as it is."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import packed_cases as cases
import pytest

from lmmr1_jax.config.schema import MeshConfig
from lmmr1_jax.learner.checkpoint import Checkpoints
from lmmr1_jax.learner.learner import Learner
from lmmr1_jax.learner.state import POLICY
from lmmr1_jax.learner.trainable import Trainable, split, trainable_mask
from lmmr1_jax.models.packed_forward import SamplingDistribution, response_log_probs
from lmmr1_jax.parallel.sharding import make_mesh
from weights_bridge.config_json import parse_architecture

MESH = make_mesh(MeshConfig(1, 1, 1))


class CrossEntropy:
    """Supervised fine-tuning: minus the mean log-probability of the completions' tokens."""

    trains = (POLICY,)

    def __init__(self, network):
        self.network = network

    def loss(self, params, micro):
        banned = np.isin(np.arange(cases.VOCABULARY), cases.BANNED)
        distribution = SamplingDistribution(banned, 1.0, 16)
        log_probs, _ = response_log_probs(self.network, params[POLICY], micro, distribution, MESH)
        held = jnp.where(micro.mask > 0, -log_probs, 0.0)
        loss = jnp.sum(held) / micro.tokens_total
        return loss, {"loss/cross_entropy": loss, "surprise/max": jnp.max(held)}


@functools.cache
def setting():
    network = cases.network(parse_architecture(cases.hf_config()))
    params, rollouts = cases.random_params(network), cases.random_rollouts(network.config)
    return network, params, rollouts, cases.pack_by_hand(rollouts, network.config, rows=2)


def learner_with(optimizer, **options):
    network = setting()[0]
    mask = trainable_mask(network.abstract_params, **options) if options else None
    return Learner({POLICY: Trainable(network.abstract_params, optimizer, mask)}, [CrossEntropy(network)], MESH)


def started(learner):
    return learner.init_state(jax.tree.map(jnp.array, setting()[1]))


def same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def test_an_objective_of_ones_own_has_the_gradient_and_the_metrics_of_the_whole_minibatch():
    network, params, rollouts, batch = setting()
    assert int(batch.micro_batches) > 1
    inputs = cases.oracle_inputs(network.config, rollouts)

    def dense(params):
        surprise = -cases.oracle_log_probs(network, params, inputs)[inputs["taken"]]
        return surprise.mean(), surprise.max()

    (loss, largest), expected = jax.jit(jax.value_and_grad(dense, has_aux=True))(params)
    gradients, metrics = learner_with(optax.sgd(0.1)).gradients(params, batch)
    cases.assert_gradients_close(gradients, expected)
    assert metrics == pytest.approx({"loss/cross_entropy": float(loss), "surprise/max": float(largest)}, rel=1e-4)


def test_its_updates_lower_its_loss_and_follow_the_optimizer_given():
    batch, learner = setting()[3], learner_with(optax.sgd(0.05))
    gradients, _ = learner.gradients(setting()[1], batch)
    state, first = learner.update(started(learner), batch)
    jax.tree.map(
        lambda new, old, g: np.testing.assert_allclose(new, old - 0.05 * g, rtol=1e-5, atol=1e-6),
        state.params, setting()[1], gradients,
    )  # fmt: skip
    for _ in range(3):
        state, last = learner.update(state, batch)
    assert last["loss/cross_entropy"] < first["loss/cross_entropy"]
    assert set(last) == {"loss/cross_entropy", "surprise/max", "grad_norm", "skipped_updates"}


@pytest.mark.parametrize(
    "options",
    [{"frozen": ["vision/*", "*/bias"]}, {"trained": ["language/layers/*/kernel"], "frozen": ["*/down/*"]}],
    ids=["all but", "only"],
)
def test_a_mask_freezes_exactly_what_it_names(options):
    learner = learner_with(optax.adam(1e-2), **options)
    state, metrics = learner.update(started(learner), setting()[3])
    mask = trainable_mask(setting()[1], **options)
    assert len(set(jax.tree.leaves(mask))) == 2
    moved = jax.tree.map(lambda new, old: not same_bits(new, old), state.params, setting()[1])
    assert moved == mask
    trained, _ = split(setting()[1], mask)
    assert jax.tree.structure(cases.first_moments(state)) == jax.tree.structure(trained)
    gradients, _ = learner_with(optax.adam(1e-2)).gradients(setting()[1], setting()[3])
    of_trained = jax.tree.leaves(split(gradients, mask)[0])
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(sum(np.square(g).sum() for g in of_trained)), rtol=1e-5)


OPTIMIZERS = {
    "sgd": optax.sgd(0.05),
    "momentum": optax.sgd(optax.linear_schedule(0.1, 0.0, 4), momentum=0.9),
    "clipped adamw": optax.chain(optax.clip(0.1), optax.adamw(optax.cosine_decay_schedule(1e-2, 4))),
    "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=8),
    "two groups": optax.multi_transform(
        {"fast": optax.adam(1e-2), "slow": optax.sgd(1e-3)},
        lambda params: {name: "fast" if name == "language" else "slow" for name in params},
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_resumes_with_the_same_bits_whatever_the_optimizer(name, tmp_path):
    learner, batch = learner_with(OPTIMIZERS[name]), setting()[3]
    state, _ = learner.update(started(learner), batch)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    checkpoints.save(1, state, {})
    state, _ = learner.update(state, batch)
    checkpoints.wait()
    _, again, _ = checkpoints.restore_newest(learner.abstract_state())
    checkpoints.close()
    again, _ = learner.update(again, batch)
    assert same_bits(again, state) and not same_bits(again.params, setting()[1])


def test_an_update_that_is_not_finite_leaves_any_optimizers_state_as_it_is():
    learner, batch = learner_with(OPTIMIZERS["momentum"]), setting()[3]
    state, _ = learner.update(started(learner), batch)
    before = jax.tree.map(np.array, state)
    state, metrics = learner.update(state, dataclasses.replace(batch, tokens_total=np.float32(np.nan)))
    assert same_bits(before.trained, state.trained) and metrics["skipped_updates"] == 1


def test_every_trainable_is_trained_by_exactly_one_objective():
    network = setting()[0]
    only = Trainable(network.abstract_params, optax.sgd(0.1))
    for trainables, count in (({POLICY: only}, 0), ({POLICY: only}, 2), ({POLICY: only, "critic": only}, 1)):
        with pytest.raises(ValueError, match="each once"):
            Learner(trainables, [CrossEntropy(network)] * count, MESH)
