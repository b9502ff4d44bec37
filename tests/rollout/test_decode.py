"""Decoding with caches, without a checkpoint: what the compiled loop does, and what the draws depend on."""

import functools
import gc
import math
import re
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmmr1_jax.models.attention.mask import causal_intervals
from lmmr1_jax.models.log_probs import token_log_probs
from lmmr1_jax.models.network import build
from lmmr1_jax.rollout.local.decode import DecoderWeights, Request, decode, unstack_layers
from lmmr1_jax.rollout.local.sampler import JaxSampler, sampling_key
from lmmr1_jax.rollout.local.scoring import Scorer
from lmmr1_jax.rollout.sampler import SamplingSettings, sample
from lmmr1_jax.types.records import FINISH_LENGTH, FINISH_STOP, EncodedPrompt, Prompt
from weights_bridge.architecture import Architecture, TextConfig

TEXT = TextConfig(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rms_norm_eps=1e-6,
    rope_theta=10_000.0,
    mrope_section=None,
    tie_word_embeddings=False,
)
BANNED, ENDS = (40, 41), (3, 7)


@pytest.fixture(scope="module")
def network():
    return build(Architecture("qwen2", TEXT))


@pytest.fixture(scope="module")
def params(network):
    """Random parameters, larger than an initialisation: the distributions are far from uniform."""
    return jax.tree.map(lambda leaf: leaf * 8 if leaf.ndim > 1 else leaf, network.init(jax.random.key(1)))


@pytest.fixture(scope="module")
def sampler(network, params):
    made = make_sampler(network)
    made.load(params, version=5)
    return made


def make_sampler(network, **options):
    return JaxSampler(network, banned_ids=BANNED, end_ids=ENDS, patches_of=None, **options)


def prompt(length: int, name: str) -> EncodedPrompt:
    ids = np.random.default_rng(length).integers(8, 40, length).astype(np.int32)
    return EncodedPrompt(
        prompt=Prompt([], None, name, "source", "file", 0),
        token_ids=ids,
        positions=np.tile(np.arange(length, dtype=np.int32), (3, 1)),
        images=(),
        image_slots=np.zeros(0, np.int32),
        next_position=length,
    )


PROMPTS = [prompt(5, "a"), prompt(23, "b"), prompt(64, "c")]


def as_lists(groups) -> list:
    return [[completion.token_ids.tolist() for completion in group] for group in groups]


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_log_probs_are_the_learners_at_any_temperature(network, params, sampler, temperature):
    groups = sample(
        sampler, PROMPTS, 4, SamplingSettings(max_new_tokens=20, key=sampling_key(0, 0), temperature=temperature)
    )
    expected = policy_log_probs(network, params, temperature)
    for encoded, group in zip(PROMPTS, groups, strict=True):
        for completion in group:
            np.testing.assert_allclose(completion.log_probs, expected(encoded, completion.token_ids), atol=1e-4)


def policy_log_probs(network, params, temperature: float):
    """The learner's own computation for one sequence, without caches."""
    banned = jnp.zeros(TEXT.vocab_size, bool).at[jnp.asarray(BANNED)].set(True)

    @jax.jit
    def all_log_probs(tokens, lengths):
        model = network.bind(params)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), (3, *tokens.shape))
        hidden = model.hidden(model.embed(tokens), positions, causal_intervals(lengths, 96))[:, :-1]
        table, targets = model.head_embedding(), tokens[:, 1:]
        return token_log_probs(hidden, table, targets, banned=banned, temperature=temperature, chunk=64)[0][0]

    def of_completion(encoded: EncodedPrompt, completion: np.ndarray) -> np.ndarray:
        start, end = len(encoded.token_ids), len(encoded.token_ids) + len(completion)
        tokens = np.zeros((1, 96), np.int32)
        tokens[0, :end] = [*encoded.token_ids, *completion]
        return np.asarray(all_log_probs(tokens, np.array([end])))[start - 1 : end - 1]

    return of_completion


def test_completions_end_at_the_first_end_token_or_the_limit(sampler):
    groups = sample(sampler, PROMPTS, 16, SamplingSettings(max_new_tokens=12, key=sampling_key(3, 1)))
    reasons = set()
    for completion in (completion for group in groups for completion in group):
        ids = completion.token_ids
        reasons.add(completion.finish_reason)
        assert not np.isin(ids, BANNED).any() and not np.isin(ids[:-1], ENDS).any()
        assert (completion.finish_reason == FINISH_STOP) == (ids[-1] in ENDS)
        assert completion.finish_reason == FINISH_STOP or len(ids) == 12
        assert completion.log_probs.shape == ids.shape and completion.policy_version.tolist() == [5] * len(ids)
    assert reasons == {FINISH_STOP, FINISH_LENGTH}


def test_ignored_end_tokens_give_completions_of_exactly_the_limit(sampler):
    groups = sample(sampler, PROMPTS, 8, SamplingSettings(max_new_tokens=12, key=sampling_key(3, 1), ignore_ends=True))
    completions = [completion for group in groups for completion in group]
    assert {len(completion.token_ids) for completion in completions} == {12}
    assert {completion.finish_reason for completion in completions} == {FINISH_LENGTH}
    assert any(np.isin(completion.token_ids[:-1], ENDS).any() for completion in completions)


def test_a_seed_and_step_reproduce_and_others_differ(sampler):
    first, again, seed, step = (
        as_lists(sample(sampler, PROMPTS, 4, SamplingSettings(max_new_tokens=12, key=sampling_key(*numbers))))
        for numbers in ((0, 0), (0, 0), (1, 0), (0, 1))
    )
    assert first == again and first != seed and first != step


def test_draws_depend_on_the_prompt_and_not_on_its_company(network, params, sampler):
    whole = as_lists(sample(sampler, PROMPTS, 6, SamplingSettings(max_new_tokens=12, key=sampling_key(0, 0))))
    turned = as_lists(sample(sampler, PROMPTS[::-1], 6, SamplingSettings(max_new_tokens=12, key=sampling_key(0, 0))))
    assert turned[::-1] == whole
    alone = as_lists(sample(sampler, PROMPTS[1:2], 6, SamplingSettings(max_new_tokens=12, key=sampling_key(0, 0))))
    assert alone[0] == whole[1]
    narrow = make_sampler(network, max_num_seqs=4)  # every group is sampled in two parts
    narrow.load(params)
    assert as_lists(sample(narrow, PROMPTS, 6, SamplingSettings(max_new_tokens=12, key=sampling_key(0, 0)))) == whole


def test_completions_of_a_group_and_repeated_prompts_differ(sampler):
    groups = as_lists(
        sample(sampler, [PROMPTS[0], PROMPTS[0]], 8, SamplingSettings(max_new_tokens=12, key=sampling_key(0, 0)))
    )
    assert len({tuple(ids) for group in groups for ids in group}) > 12


def test_first_tokens_follow_the_models_distribution(network, params, sampler):
    encoded, draws = PROMPTS[0], 4096
    groups = sample(
        sampler, [encoded], draws, SamplingSettings(max_new_tokens=1, key=sampling_key(0, 0), temperature=1.3)
    )
    log_prob = policy_log_probs(network, params, 1.3)
    plain = [index for index in range(TEXT.vocab_size) if index not in BANNED]
    expected = np.zeros(TEXT.vocab_size)
    expected[plain] = [draws * np.exp(log_prob(encoded, np.array([index]))[0]) for index in plain]
    assert abs(expected.sum() - draws) < 1e-2 * draws
    counts = np.bincount([c.token_ids[0] for c in groups[0]], minlength=TEXT.vocab_size)
    likely = expected > 5
    rest = counts[~likely].sum(), expected[~likely].sum()
    statistic = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
    assert counts[list(BANNED)].sum() == 0 and abs(rest[0] - rest[1]) < 5 * np.sqrt(rest[1] + 1)
    assert (statistic - likely.sum()) / np.sqrt(2 * likely.sum()) < 5


def test_greedy_reports_log_probs_at_temperature_one(sampler, network, params):
    groups = sample(sampler, PROMPTS, 1, SamplingSettings(max_new_tokens=12, key=sampling_key(0, 0), temperature=0))
    scorer = Scorer(network, params, None)
    pairs = [(encoded, group[0].token_ids) for encoded, group in zip(PROMPTS, groups, strict=True)]
    for scored, (completion,) in zip(scorer.score(pairs), groups, strict=True):
        gap = completion.log_probs - scored  # the scorer bans nothing, so its log-probs are a little lower
        assert (gap > -1e-5).all() and (gap < 0.5).all()


def test_scoring_takes_empty_completions(network, params):
    scorer = Scorer(network, params, None, rows=2)
    pairs = [(PROMPTS[0], np.zeros(0, np.int32)), (PROMPTS[1], np.array([9], np.int32)), (PROMPTS[2], np.arange(9))]
    assert [len(scored) for scored in scorer.score(pairs)] == [0, 1, 9]


def test_sampling_without_weights_is_an_error(network):
    with pytest.raises(RuntimeError, match="no weights"):
        sample(make_sampler(network), PROMPTS, 1, SamplingSettings(max_new_tokens=1, key=sampling_key(0, 0)))


def test_a_sampler_that_slept_keeps_no_weights_and_samples_the_same_after_the_next_load(network, params):
    sampler = make_sampler(network)
    sampler.load(params, version=0)
    settings = SamplingSettings(max_new_tokens=4, key=sampling_key(0, 0))
    before = as_lists(sample(sampler, PROMPTS, 2, settings))
    kept = [weakref.ref(leaf) for leaf in jax.tree.leaves(sampler._weights.layers)]
    sampler.sleep()
    gc.collect()
    assert kept and not any(ref() is not None for ref in kept)
    with pytest.raises(RuntimeError, match="again after it slept"):
        sample(sampler, PROMPTS, 2, settings)
    sampler.load(params, version=1)
    assert as_lists(sample(sampler, PROMPTS, 2, settings)) == before


def test_progress_counts_every_part_of_prompts_and_groups(network, params):
    narrow = make_sampler(network, max_num_seqs=4)
    narrow.load(params)
    told = []
    settings = SamplingSettings(max_new_tokens=2, key=sampling_key(0, 0))
    handle = narrow.submit(PROMPTS, 6, settings)
    assert not told
    narrow.collect(handle, lambda done, of: told.append((done, of)))
    assert told == [(done, 6) for done in range(1, 7)]  # three prompts one by one, each group in two parts


def compiled_decode(params, new_tokens: int, group: int = 4):
    text = TEXT
    language = params["language"]
    layers = unstack_layers(language["layers"], text, jnp.float32)
    weights = DecoderWeights(
        language["embed"]["embedding"], language["head"]["embedding"], language["norm"]["scale"], layers
    )
    prompts, length = 3, 64
    cache = jnp.zeros((text.num_layers, prompts, length, text.num_kv_heads, text.head_dim))
    request = Request(
        keys=jax.random.split(jax.random.key(0), (prompts, group)),
        wanted=jnp.ones((prompts, group), bool),
        temperature=jnp.float32(1),
        banned=jnp.asarray(BANNED),
        ends=jnp.asarray(ENDS),
        limit=jnp.int32(new_tokens),
    )
    function = jax.jit(functools.partial(decode, config=text, new_tokens=new_tokens, greedy=False))
    lengths = jnp.full(prompts, length)
    hidden = jnp.zeros((prompts, text.hidden_size))
    return function.lower(weights, hidden, cache, cache, lengths, lengths, request).compile()


def test_a_step_copies_no_cache(params):
    """Caches are updated in place: inside the loop's body nothing of a cache's size is copied."""
    compiled = compiled_decode(params, 128).as_text()
    computations = re.split(r"\n(?=%|ENTRY)", compiled)
    in_loop = [c for c in computations if not c.startswith("ENTRY") and ("while/body" in c or "region" in c[:40])]
    assert in_loop
    shapes = [shape for c in in_loop for shape in re.findall(r"= f32\[([\d,]+)\]\S* copy\(", c)]
    prompt_cache = 3 * 64 * 2 * 8  # the smaller one
    assert shapes and all(math.prod(map(int, shape.split(","))) < prompt_cache for shape in shapes), shapes


def test_a_prompts_cache_is_not_copied_for_each_completion(params):
    """The memory of the compiled program grows with the completions' own caches only."""
    few, many = (compiled_decode(params, 8, group).memory_analysis().temp_size_in_bytes for group in (4, 32))
    own_cache_of_a_row = 2 * TEXT.num_layers * TEXT.num_kv_heads * TEXT.head_dim * 8 * 4
    prompt_cache = 2 * TEXT.num_layers * TEXT.num_kv_heads * TEXT.head_dim * 64 * 4
    assert many - few < 3 * 28 * (own_cache_of_a_row + prompt_cache)
