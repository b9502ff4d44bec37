"""The sampler on several devices draws what it draws on one."""

import subprocess
import sys

PROGRAM = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
import jax
import numpy as np
from lmmr1_jax.config.schema import MeshConfig
from lmmr1_jax.parallel.sharding import activation_constraint, make_mesh
from weights_bridge.architecture import Architecture, TextConfig
from lmmr1_jax.models.network import build
from lmmr1_jax.rollout.local.sampler import JaxSampler, sampling_key
from lmmr1_jax.rollout.sampler import SamplingSettings, sample
from lmmr1_jax.types.records import EncodedPrompt, Prompt

text = TextConfig(48, 32, 48, 2, 4, 2, 8, 1e-6, 1e4, None, True)

def prompt(length):
    ids = np.arange(8, 8 + length, dtype=np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (3, 1))
    return EncodedPrompt(Prompt([], None, str(length), "s", "f", 0), ids, positions, (), np.zeros(0, np.int32), length)

prompts = [prompt(length) for length in (5, 9, 30, 17, 2)]
drawn = []
for mesh in (None, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), make_mesh(MeshConfig(fsdp=8))):
    constrain = {} if mesh is None else {"constrain": activation_constraint(mesh)}
    network = build(Architecture("qwen2", text), **constrain)
    params = jax.tree.map(lambda leaf: 8 * leaf if leaf.ndim > 1 else leaf, network.init(jax.random.key(0)))
    sampler = JaxSampler(network, banned_ids=(40,), end_ids=(3,), patches_of=None, mesh=mesh)
    if mesh is not None:
        rows = jax.NamedSharding(mesh, jax.P())
        params = jax.device_put(params, rows)
        params["language"]["embed"]["embedding"] = jax.device_put(
            params["language"]["embed"]["embedding"], jax.NamedSharding(mesh, jax.P("fsdp"))
        )
    sampler.load(params)
    groups = sample(sampler, prompts, 3, SamplingSettings(max_new_tokens=10, key=sampling_key(0, 0)))
    drawn.append([[completion.token_ids.tolist() for completion in group] for group in groups])
assert drawn[0] == drawn[1] == drawn[2]
print("equal", len(jax.devices()))
"""


def test_eight_devices_draw_what_one_draws():
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split() == ["equal", "8"]
