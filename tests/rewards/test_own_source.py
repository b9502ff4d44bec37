"""A source of rewards that the package has never seen, beside the rules: docs/extending.md."""

import pytest
from judged_groups import decode, rollout

from lmmr1_jax.config.schema import RewardsConfig
from lmmr1_jax.rewards.rules.service import Verifier
from lmmr1_jax.rewards.sources.base import RewardFailed, Rewards, RuleSource
from lmmr1_jax.rewards.workers.pool import WorkerFailure
from lmmr1_jax.types.records import Reward


class Wideness:
    """Earns more with wider images; can't tell of completions that say nothing."""

    name = "wideness"

    def __init__(self):
        self.checked, self.closed = [], False

    def check(self, group):
        self.checked.append(group.label)

    def score(self, groups, scored):
        scores = [[self._one(group, text) for text in group.texts] for group in groups]
        scored(sum(map(len, scores)))
        return scores

    def close(self):
        self.closed = True

    def _one(self, group, text):
        if not text:
            return WorkerFailure("error", "nothing was said")
        ratio = group.rollout.encoded.images[0].pixels.shape[1] / group.rollout.encoded.images[0].pixels.shape[0]
        return Reward(0.5 * ratio, {self.name: ratio})


@pytest.fixture(scope="module")
def verifier():
    with Verifier(RewardsConfig(workers=1)) as verifier:
        yield verifier


GOOD = "<think> </think><answer> $\\boxed{3}$ </answer>"


def test_an_own_sources_parts_stand_beside_the_rules_and_its_weight_counts(verifier):
    own, progress = Wideness(), []
    with Rewards([RuleSource(verifier), own], decode, on_error="stop") as rewards:
        rewards.check(rollout([GOOD]))
        (scored,) = rewards.score([rollout([GOOD, "2"])], lambda done, total: progress.append((done, total)))
    right, wrong = scored.rewards
    assert right.parts == {"accuracy": 1.0, "format": 1.0, "wideness": 2.0} and right.total == 1.0 + 0.5 + 1.0
    assert wrong.parts == {"accuracy": 0.0, "format": 0.0, "wideness": 2.0} and wrong.total == 1.0
    assert own.checked == ["3"] and own.closed
    assert progress[-1] == (2, 2) and all(done <= total == 2 for done, total in progress)


def test_what_an_own_source_cannot_tell_is_treated_as_the_config_says(verifier):
    groups = [rollout([GOOD, ""])]
    with pytest.raises(RewardFailed, match="nothing was said"):
        Rewards([RuleSource(verifier), Wideness()], decode, on_error="stop").score(groups)
    rewards = Rewards([RuleSource(verifier), Wideness()], decode, on_error="zero")
    (scored,) = rewards.score(groups)
    assert [reward.fault for reward in scored.rewards] == [None, "error"]
    assert [reward.total for reward in scored.rewards] == [2.5, 0.0]
    assert rewards.warnings() == ["nothing was said; the completions concerned earn 0"]
