"""Times full syncs of a model's weights into real vLLM engines on this machine.

    python scripts/bench_sync.py --parameters 1e9 --json OUT

A random Qwen2.5-VL (or Qwen2) of about that many parameters, float32 as a learner holds them, goes in bfloat16 to one
engine and then to two, through the same fleet and transport as in a run. The first sync of each, which compiles where
there is something to compile and touches the object store's memory for the first time, is told apart; figures are
medians of the others.

  whole     from the call of `load` to its return: from there on engines would sample with the new weights.
  learner   the part of it in which the learner's process works: it makes tensors (transposed and cast) and puts them
            into the object store. The rest is waiting for engines. In seconds of the clock, so that it counts what
            engines on the same cores take away; the CPU seconds of the process stand beside it.
  memcpy    of 256 MiB into shared memory that was never touched, before and after each sync. To copy its bytes once
            at this rate is the limit of a sync.
  memory    the highest RssAnon + RssShmem of the learner's process during a sync (it fills the object store's pages,
            which are counted there) less its RssAnon before the first. Two buckets are what it may be; a bucket is
            the setting or the largest tensor, whichever is larger.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import mmap
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lmmr1_jax.config.schema import DataConfig, ModelConfig, RolloutConfig, TrainConfig, VllmConfig
from lmmr1_jax.rollout.engines.ray_cluster import connected
from lmmr1_jax.rollout.engines.sampler import VllmSampler
from lmmr1_jax.rollout.engines.vllm.open import ENGINE_FILES, open_engines
from lmmr1_jax.rollout.loaded_model import TINY_MODEL
from lmmr1_jax.run.policy import PolicyModel, assemble_policy
from lmmr1_jax.runtime.cli import run_cli
from lmmr1_jax.runtime.device_memory import release_memory
from lmmr1_jax.runtime.versions import versions

LAYERS, VISION_LAYERS, HEAD_DIM = 20, 8, 64
VOCABULARY, SMALLEST_VOCABULARY = 151_936, 1024
MEMCPY_BYTES = 256 << 20
SAMPLE_SECONDS = 0.005
LEAST_SHARE_OF_MEMCPY, MOST_LEARNER, MOST_WHOLE, MOST_BUCKETS = 0.25, 1.3, 2.0, 2.0


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    with tempfile.TemporaryDirectory(prefix="bench-sync-") as folder:
        write_model(Path(folder), arguments.kind, int(arguments.parameters))
        config = TrainConfig(
            model=ModelConfig(path=folder),
            data=DataConfig(max_prompt_tokens=2048),
            rollout=RolloutConfig(sampler="vllm", max_new_tokens=16),
            vllm=VllmConfig(
                cpus=arguments.cpus,
                dtype="bfloat16",
                max_num_seqs=8,
                kv_cache_gib=0.125,
                max_images=1,
                bucket_mib=arguments.bucket_mib,
            ),
        )
        # Ray first: it starts processes, which a process that runs JAX should not.
        with connected(config.ray, cpus=max(arguments.engines) * config.vllm.cpus):
            policy = assemble_policy(config)
            params = jax.block_until_ready(policy.network.init(jax.random.key(0)))
            measured = {count: measure(config, policy, params, count, arguments.syncs) for count in arguments.engines}
    result = {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "bucket_mib": arguments.bucket_mib,
        "engines": measured,
        "bars": bars(measured),
        "command": "python scripts/bench_sync.py " + " ".join(sys.argv[1:] if argv is None else argv),
        "load_average": os.getloadavg(),
        "versions": versions(),
        "devices": [str(device) for device in jax.devices()],
    }
    if arguments.json:
        Path(arguments.json).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, bar in result["bars"].items():
        print(f"{name}: {bar['measured']:.2f}, wanted {bar['wanted']}: {'holds' if bar['holds'] else 'does NOT hold'}")
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, required=True, help="of the model, about: 1e9")
    parser.add_argument("--kind", choices=("qwen2_5_vl", "qwen2"), default="qwen2_5_vl")
    parser.add_argument("--engines", type=int, nargs="+", default=[1, 2], help="how many, one fleet after another")
    parser.add_argument("--cpus", type=int, default=1, help="threads of an engine on a CPU")
    parser.add_argument("--syncs", type=int, default=5, help="measured syncs, beside the first")
    parser.add_argument("--bucket-mib", type=int, default=VllmConfig.bucket_mib)
    parser.add_argument("--json", default="", help="where the figures go")
    return parser.parse_args(argv)


def write_model(folder: Path, kind: str, parameters: int) -> None:
    """A Hugging Face folder without weights, of the tiny model's files with other sizes and an untied head."""
    for pattern in ENGINE_FILES:
        for path in TINY_MODEL.glob(pattern):
            (folder / path.name).write_bytes(path.read_bytes())
    vocabulary = min(VOCABULARY, max(SMALLEST_VOCABULARY, VOCABULARY * parameters // 10**9 // 256 * 256))
    # Layers of 11.25 width^2 parameters, and two tables: of the widths whose heads come in fours, the one that fits.
    sizes = {w: 2 * vocabulary * w + LAYERS * 11.25 * w * w for w in range(4 * HEAD_DIM, 16_384, 4 * HEAD_DIM)}
    width = min(sizes, key=lambda w: abs(sizes[w] - parameters))
    heads = width // HEAD_DIM
    config = json.loads((TINY_MODEL / "config.json").read_text(encoding="utf-8"))
    config |= {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": 3 * width - width // 8,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 4,
        "tie_word_embeddings": False,
    }
    if kind == "qwen2":
        config = {key: value for key, value in config.items() if not key.startswith(("vision", "image", "video"))}
        del config["rope_scaling"]
        config |= {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    else:
        config["rope_scaling"] = {"type": "mrope", "mrope_section": [8, 12, 12]}
        config["vision_config"] |= {
            "depth": VISION_LAYERS,
            "fullatt_block_indexes": [VISION_LAYERS - 1],
            "hidden_size": width // 2,
            "intermediate_size": width,
            "num_heads": heads // 2,
            "out_hidden_size": width,
        }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def measure(
    config: TrainConfig, policy: PolicyModel, params: dict[str, Any], engines: int, syncs: int
) -> dict[str, Any]:
    """What syncs into this many engines cost."""
    config = dataclasses.replace(config, vllm=dataclasses.replace(config.vllm, engines=engines))
    with open_engines(config, policy.processor, policy.network, policy.source) as sampler:
        fleet = sampler.fleet
        while len(fleet.built) < engines:
            time.sleep(0.2)
        release_memory()
        base = memory()["RssAnon"]
        source = np.ones(MEMCPY_BYTES, np.uint8)
        rates, rows = [memcpy_rate(source)], []
        for number in range(syncs + 1):
            rows.append(one_sync(sampler, params, number, base + source.nbytes))
            rates.append(memcpy_rate(source))
            print(f"{engines} engines, {'first' if number == 0 else 'sync'} " + _line(rows[-1]), flush=True)
    specs = sampler.stream(params).specs
    sent = sum(spec.nbytes for spec in specs)
    bucket = max(config.vllm.bucket_mib << 20, *(spec.nbytes for spec in specs))
    middle = {name: statistics.median(row[name] for row in rows[1:]) for name in rows[0]}
    result = {
        "sent_bytes": sent,
        "gigabytes_per_second": sent / 1e9 / middle["whole"],
        "memcpy_gigabytes_per_second": statistics.median(rates),
        "share_of_memcpy": sent / 1e9 / middle["whole"] / statistics.median(rates),
        "seconds": middle,
        "first": rows[0],
        "syncs": rows[1:],
        "memcpy_rates": rates,
        "memory_buckets": max(row["memory_bytes"] for row in rows) / bucket,
        "bucket_bytes": bucket,
    }
    print(
        f"{engines} engines: {sent / 1e9:.2f} GB at {result['gigabytes_per_second']:.3f} GB/s, "
        f"memcpy {statistics.median(rates):.3f} GB/s",
        flush=True,
    )
    return result


def one_sync(sampler: VllmSampler, params: dict[str, Any], version: int, base: int) -> dict[str, float]:
    """Seconds of a sync by part, and bytes of memory beyond `base`."""
    pids = [info.pid for info in sampler.fleet.built]
    sampler.release_params()
    with PeakMemory() as peak:
        engines_before, own_before, start = sum(map(cpu_seconds, pids)), time.process_time(), time.perf_counter()
        sampler.load(params, version)
        whole = time.perf_counter() - start
        own, theirs = time.process_time() - own_before, sum(map(cpu_seconds, pids)) - engines_before
    times = sampler.fleet.transport.times
    return {
        "whole": whole,
        "learner": times.make + times.put,
        "make": times.make,
        "put": times.put,
        "wait": whole - times.make - times.put,
        "learner_cpu": own,
        "engines_cpu": theirs,
        "memory_bytes": peak.bytes - base,
        "memory_own_bytes": peak.own - base,
        "memory_store_bytes": peak.shared,
    }


def bars(measured: dict[int, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What a sync must hold to, and whether it does."""
    found = {}
    if 1 in measured:
        share, least = measured[1]["share_of_memcpy"], LEAST_SHARE_OF_MEMCPY
        found["one engine, share of memcpy"] = (share, f"at least {least}", share >= least)
    if 1 in measured and 2 in measured:
        for name, most in (("learner", MOST_LEARNER), ("whole", MOST_WHOLE)):
            times = measured[2]["seconds"][name] / measured[1]["seconds"][name]
            found[f"two engines, {name} against one"] = (times, f"at most {most}", times <= most)
    buckets = max(fleet["memory_buckets"] for fleet in measured.values())
    found["memory, buckets"] = (buckets, f"under {MOST_BUCKETS}", buckets < MOST_BUCKETS)
    return {name: dict(zip(("measured", "wanted", "holds"), bar, strict=True)) for name, bar in found.items()}


class PeakMemory:
    """Watches this process's memory while it is open; `bytes` is the highest RssAnon + RssShmem."""

    def __enter__(self) -> PeakMemory:
        self.bytes = self.own = self.shared = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            now = memory()
            self.bytes = max(self.bytes, sum(now.values()))
            self.own, self.shared = max(self.own, now["RssAnon"]), max(self.shared, now["RssShmem"])


def memory() -> dict[str, int]:
    """Bytes of this process's memory that is its own, and that it shares."""
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("RssAnon", "RssShmem"):
            found[name] = int(value.split()[0]) * 1024
    return found


def cpu_seconds(pid: int) -> float:
    """CPU time of a process on this machine."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memcpy_rate(source: np.ndarray) -> float:
    """GB/s of a copy into shared memory that nobody has touched."""
    descriptor = os.memfd_create("bench-sync")
    try:
        os.ftruncate(descriptor, source.nbytes)
        with mmap.mmap(descriptor, source.nbytes) as shared:
            target = np.frombuffer(shared, np.uint8)
            start = time.perf_counter()
            np.copyto(target, source)
            seconds = time.perf_counter() - start
            del target
    finally:
        os.close(descriptor)
    return source.nbytes / 1e9 / seconds


def _line(row: dict[str, float]) -> str:
    return " ".join(
        f"{name.removesuffix('_bytes')}={value / 2**20:.0f}MiB" if name.endswith("_bytes") else f"{name}={value:.3f}"
        for name, value in row.items()
    )


if __name__ == "__main__":
    run_cli(main)
