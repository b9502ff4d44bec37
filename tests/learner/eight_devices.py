"""Run by test_devices.py in a process that has eight simulated devices: prints what it found as one line of JSON."""

import dataclasses
import json
import pathlib
import sys
import tempfile

import jax
import numpy as np
import packed_cases as cases

from lmmr1_jax.config.schema import AlgorithmConfig, CriticConfig, LearnerConfig, MeshConfig, TrainConfig
from lmmr1_jax.learner.checkpoint import Checkpoints
from lmmr1_jax.learner.objectives.value import CRITIC, initial_head, own_critic, shared_critic
from lmmr1_jax.packing.pack import PackShapes, pack, scatter
from lmmr1_jax.parallel.sharding import activation_constraint, make_mesh
from lmmr1_jax.run.learner_setup import assemble_learner
from lmmr1_jax.runtime.compilation import CompilationCounter
from weights_bridge.config_json import parse_architecture
from weights_bridge.tensor_table import layout, logical_axes

SHAPES = PackShapes(
    row_length=64, response_slots=32, rows=8, image_rows=8, image_slots=64, micro_batches=2,
    share_prompts=False, pack=False, row_devices=8,
)  # fmt: skip
MESHES = {"one": (1, 1, 1), "data and tensor": (2, 1, 2), "fsdp": (1, 8, 1), "all": (2, 2, 2)}


def learner_on(sizes, backbone="own"):
    raw = cases.hf_config()
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    net = cases.network(parse_architecture(raw), constrain=activation_constraint(mesh))
    config = TrainConfig(
        algorithm=AlgorithmConfig(name="ppo", importance="sequence"),
        critic=CriticConfig(backbone=backbone, learning_rate=0.01),
        learner=LearnerConfig(learning_rate=0.01, logprob_chunk=64),
    )
    axes = logical_axes(layout(parse_architecture(raw)))
    critic = own_critic(net, axes) if backbone == "own" else shared_critic(net)
    return assemble_learner(config, net, axes, mesh, 10, banned_ids=cases.BANNED, critic=critic)


def relative(ours, theirs):
    """The largest difference of any tensor, relative to that tensor's largest number."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return max(float(np.abs(np.subtract(a, b)).max() / max(np.abs(b).max(), 1e-6)) for a, b in pairs)


def copy(tree):
    return jax.tree.map(jax.numpy.array, tree)


def host(tree):
    return jax.tree.map(np.array, tree)


def main():
    config = parse_architecture(cases.hf_config())
    net = cases.network(config)
    params = host(cases.random_params(net))
    rollouts = cases.drawn_by_another(net, params, cases.random_rollouts(config))
    batch = pack(rollouts, SHAPES, config.vision, cases.patches_of)
    rng = np.random.default_rng(4)
    drawn = [rng.normal(size=(2, c.token_ids.size)).astype(np.float32) for r in rollouts for c in r.completions]
    values, returns = (scatter([pair[i] for pair in drawn], batch) for i in range(2))
    batch = dataclasses.replace(batch, values=values, returns=returns)
    head = initial_head(0, 32)
    critic = host(cases.random_params(net, seed=1) | head)
    found = {"devices": jax.device_count(), "micro_batches": int(batch.micro_batches)}
    first = None
    folder = pathlib.Path(tempfile.mkdtemp()) / "checkpoints"
    for name, sizes in MESHES.items():
        learner = learner_on(sizes)
        state = learner.init_state(copy(params), critic=copy(critic))
        state, metrics = learner.update(state, batch)
        kernel = state.params["language"]["layers"]["gate"]["kernel"]
        moment = cases.first_moments(state, CRITIC)["language"]["layers"]["gate"]["kernel"]
        # Adam's first moment after one update is the gradient, scaled.
        gradients = host((cases.first_moments(state), cases.first_moments(state, CRITIC)))
        mine = {"gradient": gradients, "metrics": metrics, "state": host(state)}
        if first is None:
            first = mine
            checkpoints = Checkpoints(folder, keep=1)
            checkpoints.save(1, state, {"from": name})
            checkpoints.close()
            continue
        _, restored, _ = Checkpoints(folder, keep=1).restore_newest(learner.abstract_state())
        saved = zip(jax.tree.leaves(host(restored)), jax.tree.leaves(first["state"]), strict=True)
        same_bits = all(a.tobytes() == b.tobytes() for a, b in saved)
        counter = CompilationCounter()
        other = Checkpoints(folder.with_name(f"from {name}"), keep=1)
        other.save(1, state, {})
        other.close()
        counter.close()
        again, _ = learner.update(restored, batch)
        found[name] = {
            "gradient": relative(mine["gradient"], first["gradient"]),
            "metrics": {key: [metrics[key], first["metrics"][key]] for key in metrics},
            "shard": [kernel.size, kernel.addressable_shards[0].data.size],
            "moments_shard": moment.addressable_shards[0].data.size,
            "restored_bits": same_bits,
            "compiled_to_save": counter.names,
            "went_on": int(again.step),
        }
    shared = {}
    for name in ("one", "all"):
        learner = learner_on(MESHES[name], "shared")
        state = learner.init_state(copy(params), critic=copy(head))
        state, _ = learner.update(state, batch)
        shared[name] = host((cases.first_moments(state), cases.first_moments(state, CRITIC)))
    found["shared"] = relative(shared["all"], shared["one"])
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
