"""transformers agrees with the table, and opens what is exported."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import oracle  # noqa: E402
from oracle import KINDS, flax_params, hf_logits, load_model, random_model, text_tokens, vision_span  # noqa: E402
from test_load import assert_equal_trees  # noqa: E402

from weights_bridge.export import export  # noqa: E402
from weights_bridge.load import load  # noqa: E402


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_loaded_parameters_are_those_of_the_transformers_model(kind, tied):
    folder = random_model(kind, tied)
    assert_equal_trees(load(folder), flax_params(load_model(folder)))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_opens_an_export_and_computes_the_same(tmp_path, kind, tied):
    import transformers

    folder = random_model(kind, tied)
    export(load(folder), folder, tmp_path / "out", max_shard_bytes=100_000)
    grid = (1, 4, 6)
    vision = {} if kind == "qwen2" else dict(patches=oracle.random_patches([grid]), grids=[grid])
    tokens = text_tokens(7) + (vision_span(grid) if vision else []) + text_tokens(5, seed=1)
    ours, theirs = load_model(tmp_path / "out"), load_model(folder)
    np.testing.assert_array_equal(hf_logits(ours, tokens, **vision), hf_logits(theirs, tokens, **vision))
    assert ours.generation_config.eos_token_id == theirs.generation_config.eos_token_id
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    message = [{"role": "user", "content": "How many?"}]
    assert tokenizer.apply_chat_template(message, tokenize=False) == oracle.build_tokenizer().apply_chat_template(
        message, tokenize=False
    )


def test_transformers_takes_the_dtype_that_an_export_says(tmp_path):
    import transformers

    folder = random_model("qwen2", True)
    export(load(folder), folder, tmp_path / "out", dtype="bfloat16")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.bfloat16
