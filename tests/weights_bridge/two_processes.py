"""One of two processes that stream parameters which neither holds whole: `two_processes.py RANK PORT FOLDER`.

Run by test_stream.py. Process 0 iterates and compares, process 1 follows.
"""

import os
import sys
import traceback
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from random_checkpoint import bfloat16, config_of, joined, random_tensors, same_bits, table, write_checkpoint

from weights_bridge.load import load
from weights_bridge.stream import TensorStream
from weights_bridge.tensor_table import leaves, lookup

RULES = {"embed": "fsdp", "heads": "tensor", "mlp": "tensor", "vocab": "tensor", "vision_heads": "tensor",
         "vision_mlp": "tensor", "patch": "fsdp"}


def main(rank: int, port: str, folder: Path) -> None:
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=rank)
    assert (jax.device_count(), jax.local_device_count()) == (4, 2)
    for rules in (RULES, RULES | {"layers": "fsdp", "embed": None}):
        mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)

        def sharding(path, sizes, axes, mesh=mesh, rules=rules):
            names = [rules.get(axis) for axis in axes]
            fits = [name if name and size % mesh.shape[name] == 0 else None
                    for name, size in zip(names, sizes, strict=True)]
            return NamedSharding(mesh, PartitionSpec(*fits))

        for kind, tied in (("qwen2", True), ("qwen2_5_vl", False)):
            config = config_of(kind, tied, num_hidden_layers=4)
            tensors = random_tensors(config)
            tensors["model.norm.weight"][:] = -0.0
            tensors["model.layers.1.input_layernorm.weight"][:] = -0.0
            source = write_checkpoint(folder / f"{rank}-{kind}-{tied}", config, tensors)
            params, entries = load(source, sharding), table(config)
            spread = [leaf for leaf in leaves(entries).values() if not lookup(params, leaf.path).is_fully_addressable]
            assert len(spread) > 5
            for for_engines, dtype in ((True, bfloat16), (True, np.float32), (False, bfloat16), (False, None)):
                stream = TensorStream(params, entries, dtype=dtype, bucket_bytes=2_000, for_engines=for_engines)
                if rank == 1:
                    stream.follow()
                    continue
                expected = dict(tensors)
                if for_engines:
                    expected.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
                wanted = {name: tensor.astype(dtype or np.float32) for name, tensor in expected.items()}
                assert same_bits(joined(stream), wanted), (kind, tied, dtype)
    print("ok")
    jax.distributed.shutdown()


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # an orderly end would wait for the other process
