"""How a minibatch is packed changes speed, never the loss or the gradient (in float32, to 1e-5 per tensor)."""

import dataclasses
import functools

import numpy as np
import packed_cases as cases
import pytest

from lmmr1_jax.config.schema import AlgorithmConfig, LearnerConfig, MeshConfig, TrainConfig
from lmmr1_jax.packing.pack import PackShapes, pack, scatter
from lmmr1_jax.parallel.sharding import make_mesh
from lmmr1_jax.run.learner_setup import assemble_learner
from weights_bridge.config_json import parse_architecture
from weights_bridge.tensor_table import layout, logical_axes

# Large enough for every way of packing: one shape, one compiled program.
SHAPES = PackShapes(
    row_length=64, response_slots=32, rows=2, image_rows=4, image_slots=64, micro_batches=6,
    share_prompts=True, pack=True,
)  # fmt: skip


def learner_of(net, config):
    axes, mesh = logical_axes(layout(parse_architecture(cases.hf_config()))), make_mesh(MeshConfig(1, 1, 1))
    return assemble_learner(config, net, axes, mesh, 10, banned_ids=cases.BANNED)


@functools.cache
def setting():
    net = cases.network(parse_architecture(cases.hf_config()))
    # Weights of whole completions: what a micro-batch must not cut.
    config = TrainConfig(
        algorithm=AlgorithmConfig(importance="sequence"), learner=LearnerConfig(logprob_chunk=32)
    )
    learner = learner_of(net, config)
    params = cases.random_params(net)
    rollouts = cases.drawn_by_another(net, params, cases.random_rollouts(net.config))
    return net, learner, params, rollouts, cases.oracle_gradients(net, params, rollouts, importance="sequence")


WAYS = pytest.mark.parametrize(
    "options, at_least",
    [
        ({}, 1),
        ({"share_prompts": False}, 2),
        ({"pack": False}, 2),
        ({"share_prompts": False, "pack": False}, 4),
        ({"row_length": 26, "response_slots": 16, "rows": 3}, 2),  # groups are cut over rows
    ],
)


@WAYS
def test_packing_leaves_loss_and_gradient_alone(options, at_least):
    net, learner, params, rollouts, expected = setting()
    batch = pack(rollouts, dataclasses.replace(SHAPES, **options), net.config.vision, cases.patches_of)
    assert int(batch.micro_batches) >= at_least
    if at_least == 4:
        # Some micro-batch is text alone: the tower is skipped for it.
        held = batch.mask.any((1, 2))
        assert not batch.vision.high[held].any((1, 2)).all()
    gradients, metrics = learner.gradients(params, batch)
    cases.assert_gradients_close(gradients, expected)
    weights = np.minimum(np.exp([gap.sum() for gap in _gaps(net, params, rollouts)]), 2.0)
    advantages = [a for r in rollouts for a in r.advantages]
    tokens = sum(a.size for a in advantages)
    weighted = sum(w * a.sum() for w, a in zip(weights, advantages, strict=True))
    np.testing.assert_allclose(metrics["loss/policy"], -weighted / tokens, rtol=1e-4)
    assert 0 < metrics["importance/clipped"] < 1


def _gaps(net, params, rollouts):
    """Policy less sampler log-probs of every completion's tokens, computed without packing."""
    inputs = cases.oracle_inputs(net.config, rollouts)
    dense = np.asarray(cases.oracle_log_probs(net, params, inputs))
    rows = zip(dense - inputs["sampler"], inputs["taken"], strict=True)
    return [gap[taken] for gap, taken in rows]


@functools.cache
def shared_ratios():
    """GSPO averaged over completions with the KL and the entropy in the loss: all that looks at whole completions."""
    net, _, params, rollouts, _ = setting()
    algorithm = AlgorithmConfig(
        name="gspo", clip_low=0.1, clip_high=0.1, importance="masked_sequence", entropy_bonus=0.1, kl_coefficient=0.1
    )
    config = TrainConfig(algorithm=algorithm, learner=LearnerConfig(logprob_chunk=32, epochs=2))
    learner = learner_of(net, config)
    dense = [gap.astype(np.float32) for gap in _gaps(net, params, rollouts)]
    sampler = [c.log_probs for r in rollouts for c in r.completions]
    rng = np.random.default_rng(2)
    policy = [g + s for g, s in zip(dense, sampler, strict=True)]
    old, reference = ([(p + rng.normal(0, 0.5, p.size)).astype(np.float32) for p in policy] for _ in range(2))

    def gradients(**options):
        batch = pack(rollouts, dataclasses.replace(SHAPES, **options), net.config.vision, cases.patches_of)
        batch = dataclasses.replace(
            batch,
            old_log_probs=scatter(old, batch),
            reference_log_probs=scatter(reference, batch),
            kl_coefficient=np.float32(0.1),
        )
        return learner.gradients(params, batch)

    return gradients, gradients()


@WAYS
def test_packing_leaves_a_loss_of_whole_completions_alone(options, at_least):
    gradients, (expected, told) = shared_ratios()
    again, metrics = gradients(**options)
    cases.assert_gradients_close(again, expected)
    assert metrics == pytest.approx(told, rel=1e-4, abs=1e-6)
    assert 0 < told["clip_fraction"] < 1 and 0 < told["importance/clipped"] < 1
