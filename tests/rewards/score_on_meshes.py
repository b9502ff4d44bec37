"""Run by test_reward_models.py in a process that has eight simulated devices: prints scores by mesh as JSON."""

import json
import pathlib
import sys
import tempfile

import jax
import numpy as np
import tiny_reward_model

from lmmr1_jax.config.schema import LearnerConfig, MeshConfig
from lmmr1_jax.data.compatibility import check_fit
from lmmr1_jax.data.processor import Processor
from lmmr1_jax.parallel.sharding import make_mesh
from lmmr1_jax.rewards.sources.reward_model import RewardModel
from lmmr1_jax.rollout.loaded_model import TINY_MODEL
from lmmr1_jax.tasks.shapes import shape_prompts
from lmmr1_jax.types.records import Completion, Rollout

MESHES = {"one": (1, 1, 1), "data and tensor": (2, 1, 2), "fsdp": (1, 8, 1), "all": (2, 2, 2)}


def main():
    processor = Processor(TINY_MODEL)
    folder = tiny_reward_model.write(pathlib.Path(tempfile.mkdtemp()) / "model")
    rng, rollouts = np.random.default_rng(0), []
    for prompt in shape_prompts("train", 7):
        ids = [rng.integers(0, 256, rng.integers(0, 20)).astype(np.int32) for _ in range(3)]
        completions = [Completion(i, np.zeros(len(i), np.float32), "stop", np.zeros_like(i)) for i in ids]
        rollouts.append(Rollout(processor.encode(prompt), tuple(completions)))
    found = {"devices": jax.device_count()}
    for name, sizes in MESHES.items():
        mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
        model = RewardModel(
            folder,
            mesh,
            compute_dtype=np.float32,
            image_format=check_fit(folder, processor),
            learner=LearnerConfig(),
            max_new_tokens=20,
        )
        kernel = model.params["language"]["layers"]["gate"]["kernel"]
        found[name] = {
            "scores": np.concatenate(model.score(rollouts)).tolist(),
            "shard": [kernel.size, kernel.addressable_shards[0].data.size],
        }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
