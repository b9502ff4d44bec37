"""The weight source, by vLLM's own classes: what it announces is what it yields, in the order that vLLM checks."""

import jax
import numpy as np
import pytest
from random_checkpoint import CASES, config_of, random_tensors, table, write_checkpoint

from weights_bridge.vllm.cpu_compat.cuda_builds import tolerate

tolerate()
pytest.importorskip("vllm")

import torch  # noqa: E402
from vllm.distributed.weight_transfer.base import WeightSource  # noqa: E402
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine  # noqa: E402

from weights_bridge.load import load  # noqa: E402
from weights_bridge.vllm.source import JaxWeightSource  # noqa: E402


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "tied"), CASES)
def test_what_the_source_announces_is_what_it_yields_group_by_group(tmp_path, kind, tied, dtype):
    config = config_of(kind, tied)
    tensors = random_tensors(config)
    params = load(write_checkpoint(tmp_path, config, tensors))
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    source = JaxWeightSource(lambda: params, table(config), dtype=dtype)
    assert isinstance(source, WeightSource)
    metadata = {meta.name: meta for meta in source.metadata()}
    assert metadata.keys() == tensors.keys()
    # iter_groups raises where a name comes out of order.
    groups = source.iter_groups()
    came = {name: tensor.clone() for names, group in groups for name, tensor in zip(names, group, strict=True)}
    assert list(came) == list(metadata)
    for name, tensor in came.items():
        assert (tensor.dtype, tuple(tensor.shape)) == (metadata[name].dtype, metadata[name].shape)
        assert torch.equal(tensor, torch.from_numpy(tensors[name]).to(getattr(torch, dtype)))


def test_each_pass_is_accepted_by_vllms_trainer_and_yields_the_parameters_of_the_day(tmp_path):
    config = config_of("qwen2_5_vl", True)
    params = load(write_checkpoint(tmp_path, config, random_tensors(config)))
    today = {"params": params}
    source = JaxWeightSource(lambda: today["params"], table(config))
    checked = NCCLTrainerWeightTransferEngine._checked_iter
    first = {name: tensor.clone() for name, tensor in checked(source, source.metadata())}
    today["params"] = jax.tree.map(lambda leaf: leaf + 1, params)
    second = dict(checked(source, source.metadata()))
    assert all(np.array_equal(second[name].numpy(), first[name].numpy() + 1) for name in first)
