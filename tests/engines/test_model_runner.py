"""vLLM has two model runners, each with logits processors of its own kind."""

import pytest

pytest.importorskip("vllm")

import ray  # noqa: E402


@ray.remote(num_cpus=0)
class WithTriton:
    """vLLM as it is where Triton is, as on every GPU."""

    def runner_takes_the_ban(self, prepared: bool) -> bool:
        from types import SimpleNamespace

        from lmmr1_jax.rollout.engines.vllm.build import set_environment
        from weights_bridge.vllm.cpu_compat.cuda_builds import tolerate

        tolerate()
        if prepared:
            set_environment()
        import vllm.config.vllm as config
        from vllm.v1.sample import logits_processor as first
        from vllm.v1.worker.gpu.sample import logits_processor as second

        from lmmr1_jax.rollout.engines.vllm.banned_tokens import BannedTokens

        config.HAS_TRITON = True
        asked = SimpleNamespace(
            attention_config=SimpleNamespace(hisparse_config=None),
            _get_v2_model_runner_unsupported_features=lambda: [],
        )
        chosen = second if config.VllmConfig.use_v2_model_runner.fget(asked) else first
        return issubclass(BannedTokens, chosen.LogitsProcessor)


def test_engines_take_the_runner_that_the_ban_is_written_for(cluster):
    assert ray.get(WithTriton.remote().runner_takes_the_ban.remote(True), timeout=120)
    assert not ray.get(WithTriton.remote().runner_takes_the_ban.remote(False), timeout=120)  # vLLM's own choice
