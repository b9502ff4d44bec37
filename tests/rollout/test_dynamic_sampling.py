"""Dynamic sampling: what it keeps, when it stops, and that nothing but its arguments decides."""

from algorithms.rewarded import group

from lmmr1_jax.rollout.dynamic_sampling import replace_equal_groups


def batch(*rewards, name="p"):
    return [group(pair, [1] * len(pair), f"{name}{i}") for i, pair in enumerate(rewards)]


def names(groups):
    return [g.encoded.prompt.prompt_id for g in groups]


def never(number):
    raise AssertionError("no fresh prompts are wanted")


def test_groups_that_all_differ_are_left_as_they_are():
    given = batch((0, 1), (1, 0.5))
    kept, told = replace_equal_groups(given, never, rounds=3)
    assert kept == given and told == {"dynamic/rounds": 0, "dynamic/dropped": 0}


def test_without_rounds_nothing_is_replaced():
    given = batch((1, 1), (1, 0))
    kept, told = replace_equal_groups(given, never, rounds=0)
    assert sorted(names(kept)) == ["p0", "p1"] and told["dynamic/dropped"] == 0


def test_equal_groups_give_way_to_fresh_ones_in_the_order_of_sampling():
    fresh = {1: batch((0, 0), (0, 1), (0, 1), name="q"), 2: batch((1, 0), (0, 0), (1, 0), name="r")}
    kept, told = replace_equal_groups(batch((1, 1), (0, 1), (0, 0)), fresh.__getitem__, rounds=5)
    assert names(kept) == ["p1", "q1", "q2"]
    assert told == {"dynamic/rounds": 1, "dynamic/dropped": 3}


def test_the_bound_ends_the_search_and_equal_groups_fill_up():
    asked = []

    def more(number):
        asked.append(number)
        return batch((1, 1), (0, 0), (1, 1), name=f"round{number}-")

    kept, told = replace_equal_groups(batch((1, 1), (0, 0), (0, 1)), more, rounds=2)
    assert asked == [1, 2]
    assert names(kept) == ["p2", "p0", "p1"]
    assert told == {"dynamic/rounds": 2, "dynamic/dropped": 6}


def test_a_group_of_one_or_none_never_differs():
    kept, _ = replace_equal_groups(batch((1,), ()), lambda number: batch((0, 1), (0, 1), name="q"), rounds=1)
    assert names(kept) == ["q0", "q1"]
