"""Which parameters move is said by patterns of their paths."""

import pytest

from lmmr1_jax.learner.trainable import merge, split, trainable_mask

PARAMS = {
    "language": {"layers": {"q": {"kernel": 1, "bias": 2}, "norm": {"scale": 3}}, "embed": {"embedding": 4}},
    "vision": {"blocks": {"q": {"kernel": 5}}},
}


def test_a_frozen_tower_is_no_part_of_what_is_trained():
    mask = trainable_mask(PARAMS, frozen=["vision/*"])
    assert split(PARAMS, mask) == ({"language": PARAMS["language"]}, {"vision": PARAMS["vision"]})


def test_a_pattern_reaches_any_depth_and_frozen_wins_over_trained():
    mask = trainable_mask(PARAMS, trained=["*/q/*"], frozen=["vision/*", "*/bias"])
    trained, frozen = split(PARAMS, mask)
    assert trained == {"language": {"layers": {"q": {"kernel": 1}}}}
    assert frozen == {
        "language": {"layers": {"q": {"bias": 2}, "norm": {"scale": 3}}, "embed": {"embedding": 4}},
        "vision": {"blocks": {"q": {"kernel": 5}}},
    }


@pytest.mark.parametrize("patterns", [{}, {"frozen": ["vision/*"]}, {"trained": ["*/kernel"]}])
def test_the_trained_and_the_frozen_parts_together_are_the_whole_again(patterns):
    assert merge(*split(PARAMS, trainable_mask(PARAMS, **patterns))) == PARAMS
    assert merge(*split(PARAMS, None)) == PARAMS


@pytest.mark.parametrize("patterns", [{"frozen": ["vison/*"]}, {"trained": ["*/lora_a/*"]}])
def test_a_pattern_that_matches_nothing_is_an_error(patterns):
    with pytest.raises(ValueError, match="matches none"):
        trainable_mask(PARAMS, **patterns)


def test_a_mask_that_leaves_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="nothing is left to train"):
        trainable_mask(PARAMS, frozen=["*"])
