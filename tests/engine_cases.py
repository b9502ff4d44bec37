"""Real vLLM engines on this machine's CPU for small random models, and a learner beside them.

Engines are Ray actors, a process each: vLLM can be relied on to start once in a process. Nothing here imports vLLM in
the process of the tests, and neither does what it calls.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import oracle
import ray

from lmmr1_jax.config.schema import LearnerConfig, MeshConfig, ModelConfig, RolloutConfig, TrainConfig, VllmConfig
from lmmr1_jax.data.processor import Processor
from lmmr1_jax.learner.learner import Learner
from lmmr1_jax.packing.pack import PackShapes, gather, grow, pack, plan_shapes
from lmmr1_jax.rollout.engines.protocol import EngineSettings, GroupRequest, SampledCompletion
from lmmr1_jax.rollout.engines.transport import init_info
from lmmr1_jax.rollout.engines.vllm import settings as vllm_settings
from lmmr1_jax.rollout.engines.vllm.actor import EngineActor
from lmmr1_jax.rollout.sampler import SamplerLimits
from lmmr1_jax.run import setup
from lmmr1_jax.run.policy import assemble_policy
from lmmr1_jax.types.records import Completion, EncodedPrompt, Rollout
from weights_bridge.config_json import read_architecture
from weights_bridge.load import load
from weights_bridge.stream import TensorStream
from weights_bridge.tensor_table import read_layout
from weights_bridge.transports.host import HostTransport
from weights_bridge.vllm import cpu_compat

MODELS = [("qwen2", True), ("qwen2_vl", True), ("qwen2_5_vl", False)]
"""Every family once, tied and untied: each costs three engines."""
UPDATES = 5
ONE_BUCKET = 1 << 30
PATIENCE = 200.0
"""Seconds that anything an engine is asked for may take on a busy machine."""


def model(kind: str, tied: bool) -> Path:
    """A random model whose heads are 32 wide: vLLM's attention on CPUs takes no smaller ones."""
    text: dict[str, Any] = {"hidden_size": 128}
    if kind == "qwen2":
        return oracle.random_model(kind, tied, text=text)
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10_000.0}
    width = "out_hidden_size" if kind == "qwen2_5_vl" else "hidden_size"
    return oracle.random_model(kind, tied, text=text, vision={width: 128})


def config(folder: Path, *, temperature: float = 1.0, **vllm: Any) -> TrainConfig:
    """A run's config with one small engine, and a learning rate at which a few updates change everything."""
    return TrainConfig(
        model=ModelConfig(path=str(folder)),
        rollout=RolloutConfig(sampler="vllm", temperature=temperature, max_new_tokens=1024),
        learner=LearnerConfig(
            learning_rate=0.005, warmup_ratio=0.0, min_learning_rate_ratio=1.0, remat="none", logprob_chunk=256
        ),
        mesh=MeshConfig(1, 1, 1),
        vllm=VllmConfig(**{"cpus": 1, "max_num_seqs": 64, "kv_cache_gib": 0.125, "max_images": 3} | vllm),
    )


class Student:
    """A model with its learner and the built-in sampler (`policy.sampler`)."""

    def __init__(self, run: TrainConfig):
        self.config, self.policy = run, assemble_policy(run)
        self.learner: Learner = setup.build_learner(run, self.policy, UPDATES)
        self._shapes: PackShapes | None = None

    def pack(self, rollouts: Sequence[Rollout]):
        """The rollouts as a minibatch; shapes change only where they must."""
        vision = self.policy.network.config.vision
        if self._shapes is None:
            longest = max(len(c.token_ids) for rollout in rollouts for c in rollout.completions)
            self._shapes = plan_shapes(
                rollouts, learner=self.config.learner, max_new_tokens=longest, vision=vision, tokens_per_device=1024
            )
        self._shapes = grow(self._shapes, rollouts, vision)
        return pack(rollouts, self._shapes, vision, self.policy.processor.patches)

    def log_probs(self, params: Mapping[str, Any], rollouts: Sequence[Rollout]) -> list[np.ndarray]:
        """The learner's policy log-probs of each completion, float32 `[R]`."""
        batch = self.pack(rollouts)
        return gather(self.learner.log_probs(params, batch), batch, sum(len(r.completions) for r in rollouts))


def rewarded(rollouts: Sequence[Rollout], seed: int) -> list[Rollout]:
    """The rollouts with advantages of rewards that are made up at random: five updates must not make the model sure
    of itself, for then no log-prob could differ from another."""
    rng = np.random.default_rng(seed)
    out = []
    for rollout in rollouts:
        rewards = rng.standard_normal(len(rollout.completions))
        pairs = zip(rollout.completions, rewards - rewards.mean(), strict=True)
        advantages = tuple(np.full(len(completion.token_ids), reward, np.float32) for completion, reward in pairs)
        out.append(dataclasses.replace(rollout, advantages=advantages))
    return out


def noisy(params: Mapping[str, Any], amount: float, seed: int = 0) -> dict[str, Any]:
    """Every parameter with noise of `amount` times its own spread."""
    rng = np.random.default_rng(seed)

    def shaken(leaf: Any) -> np.ndarray:
        leaf = np.asarray(leaf)
        return leaf + (amount * leaf.std() * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree.map(shaken, params)


def engine_settings(folder: Path, **changes: Any) -> EngineSettings:
    """What a run would tell its engines, but for some fields."""
    chosen = vllm_settings.engine_settings(
        config(folder), Processor(folder), SamplerLimits(), on_gpu=False, backend=HostTransport.backend
    )
    return dataclasses.replace(chosen, **changes)


def side_files(folder: Path) -> dict[str, bytes]:
    """Config and tokenizer by file name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".json", ".jinja")}


def stream(folder: Path, params: Mapping[str, Any], bucket_bytes: int = ONE_BUCKET) -> TensorStream:
    """The parameters as engines in float32 take them."""
    nbytes = HostTransport(bucket_bytes=bucket_bytes).stream_bytes
    return TensorStream(params, read_layout(folder), dtype=np.dtype(np.float32), bucket_bytes=nbytes, for_engines=True)


def announcement(folder: Path, sent: TensorStream) -> dict[str, Any]:
    """What a learner of the folder's model says of itself."""
    return init_info(read_architecture(folder), sent)


def short_ids(encoded: EncodedPrompt) -> np.ndarray:
    """The prompt with one token per image."""
    ids, pad = encoded.token_ids, oracle.token_id("<|image_pad|>")
    return ids[~np.concatenate([[False], (ids[1:] == pad) & (ids[:-1] == pad)])]


class LiveEngine:
    """An engine without a fleet: the test itself says when what happens."""

    def __init__(self, folder: Path, **settings: Any):
        """Starts it; `settings` are fields of `EngineSettings` over those that a run would choose."""
        self.folder, self.settings = folder, engine_settings(folder, **settings)
        options = {"num_cpus": 1, "max_concurrency": 1000}
        self.handle = ray.remote(EngineActor).options(**options).remote(self.settings, side_files(folder))
        self._numbers, self._versions = itertools.count(), itertools.count()

    def ask(self, method: str, *arguments: Any) -> Any:
        """The answer of one of the actor's methods."""
        return ray.get(getattr(self.handle, method).remote(*arguments), timeout=PATIENCE)

    def announcement(self) -> dict[str, Any]:
        """What a learner of this engine's model says of itself."""
        return announcement(self.folder, self.stream(load(self.folder)))

    def stream(self, params: Mapping[str, Any], bucket_bytes: int = ONE_BUCKET) -> TensorStream:
        """The parameters as they are sent."""
        return stream(self.folder, params, bucket_bytes)

    def send(self, params: Mapping[str, Any], bucket_bytes: int = ONE_BUCKET) -> None:
        """All tensors, to an engine that has begun an update."""
        transport = HostTransport(bucket_bytes=bucket_bytes, timeout=PATIENCE)
        lost = transport.send(self.stream(params, bucket_bytes), [self.handle])
        assert not lost, lost

    def next_version(self) -> int:
        """A version that this engine has not had: tests that share it must not share what it keeps by version."""
        return next(self._versions)

    def sync(self, params: Mapping[str, Any], *, in_flight: bool = False, bucket_bytes: int = ONE_BUCKET) -> int:
        """A whole update; returns its version."""
        self.ask("begin_update", in_flight)
        self.send(params, bucket_bytes)
        version = self.next_version()
        self.ask("finish_update", version)
        return version

    def begin(self, encoded: EncodedPrompt, n: int, max_new_tokens: int, **how: Any) -> Any:
        """Asks for completions; returns what `finished` and `group` take."""
        images = tuple(image.pixels for image in encoded.images)
        name = f"request-{next(self._numbers)}"
        request = GroupRequest(name, encoded.token_ids, short_ids(encoded), images, n, max_new_tokens, **how)
        return self.handle.generate.remote(request)

    def sample(self, encoded: EncodedPrompt, n: int, max_new_tokens: int, **how: Any) -> Rollout:
        """A group, waited for."""
        return group(encoded, self.begin(encoded, n, max_new_tokens, **how))

    def in_the_midst(self, encoded: EncodedPrompt, n: int, tokens: int) -> Any:
        """Begins completions of exactly so many tokens, and returns when some of them are there, hardly all."""
        running = self.begin(encoded, n, tokens, ignore_ends=True)
        self.sample(encoded, 1, 8, ignore_ends=True)  # began no earlier, and is at its end
        assert not finished(running)
        return running


def group(encoded: EncodedPrompt, asked: Any) -> Rollout:
    """Waits for what `LiveEngine.begin` asked for."""
    sampled: list[SampledCompletion] = ray.get(asked, timeout=PATIENCE)
    return Rollout(encoded, tuple(Completion(**vars(completion)) for completion in sampled))


def finished(asked: Any, seconds: float = 0.0) -> bool:
    """Whether it has come, or comes within so many seconds."""
    return bool(ray.wait([asked], timeout=seconds)[0])


class PlainVllm:
    """vLLM as anybody would use it, with nothing of ours: its own loader, its own loop, no bridge."""

    def __init__(self):
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
        cpu_compat.activate()
        import vllm

        self._vllm = vllm

    def greedy(self, folder: str, prompts: list[dict[str, Any]], allowed: list[int], ends: list[int], limit: int):
        """Token ids and log-probs of the likeliest completion of each prompt (as `LLM.generate` takes it)."""
        arguments: dict[str, Any] = {}
        if any("multi_modal_data" in prompt for prompt in prompts):
            arguments["limit_mm_per_prompt"] = {"image": 3, "video": 0}
            arguments["mm_processor_kwargs"] = {"size": {"shortest_edge": 1, "longest_edge": 1 << 21}}
        llm = self._vllm.LLM(
            folder,
            dtype="float32",
            enforce_eager=True,
            max_model_len=1024,
            kv_cache_memory_bytes=1 << 27,
            logprobs_mode="processed_logprobs",
            generation_config="vllm",
            distributed_executor_backend="uni",
            **arguments,
        )
        params = self._vllm.SamplingParams(
            temperature=0,
            max_tokens=limit,
            logprobs=0,
            allowed_token_ids=allowed,
            ignore_eos=True,
            stop_token_ids=ends,
            detokenize=False,
        )
        done = [request.outputs[0] for request in llm.generate(prompts, params, use_tqdm=False)]
        return [(list(o.token_ids), [p[t].logprob for p, t in zip(o.logprobs, o.token_ids, strict=True)]) for o in done]
