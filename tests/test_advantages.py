"""Advantages are the formula of their name, and what is unknown or equal teaches nothing."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.advantages import estimate_advantages
from jaxrl.config import AlgorithmSection
from jaxrl.objectives.choices import ADVANTAGES
from jaxrl.types import UserError

EPS = 1e-6
NAN = math.nan
MASKED = [True, False]

# Quarters: differences and means are exact, so that no example sits on the edge of "equal".
known_rewards = st.integers(-16, 16).map(lambda quarters: quarters / 4)
rewards = st.one_of(known_rewards, st.just(NAN))
groups = st.lists(st.lists(rewards, min_size=4, max_size=4), min_size=3, max_size=3)
fast = settings(max_examples=50, deadline=None)


def compute(rewards_PG, tokens_PG=None, **options):
    """estimate_advantages on nested lists, as two numpy arrays."""
    rewards_PG = np.array(rewards_PG, np.float32)
    tokens_PG = np.ones(rewards_PG.shape, int) if tokens_PG is None else np.array(tokens_PG)
    found = estimate_advantages(rewards_PG, tokens_PG, AlgorithmSection(**options))
    assert found.advantages_PG.dtype == found.weights_PG.dtype == np.float32
    return found


def mean(values):
    return math.fsum(values) / len(values)


def std(values):
    return math.sqrt(math.fsum((x - mean(values)) ** 2 for x in values) / (len(values) - 1))


def best_of(known, i):
    second = sorted(known)[-2]
    return max(known[i] - second, 0.0) / (std(known) + EPS)


# (known rewards of the group, place in it, all rewards, those rewards once for each token, all
# distances to the mean of a group once for each token) -> advantage
FORMULAS = {
    "grpo": lambda known, i, *_: (known[i] - mean(known)) / (std(known) + EPS),
    "dr_grpo": lambda known, i, *_: known[i] - mean(known),
    "rloo": lambda known, i, *_: known[i] - mean(known[:i] + known[i + 1 :]),
    "batch_std": lambda known, i, every, *_: (known[i] - mean(known)) / (std(every) + EPS),
    "maxrl": lambda known, i, *_: (
        (known[i] - mean(known)) / mean(known) if mean(known) > 1e-6 else 0.0
    ),
    "pass_at_k": lambda known, i, *_: best_of(known, i),
    "reinforce_pp": lambda known, i, _, tokens, __: (known[i] - mean(tokens)) / (std(tokens) + EPS),
    "reinforce_pp_baseline": lambda known, i, _, __, tokens: (
        (known[i] - mean(known) - mean(tokens)) / (std(tokens) + EPS)
    ),
}


def reference(rewards_PG, tokens_PG, advantage, mask_equal_rewards):
    """In Python floats, one group at a time."""
    groups = []  # places and rewards of those that stay in each group
    for group in rewards_PG:
        places = [g for g, reward in enumerate(group) if math.isfinite(reward)]
        known = [float(group[g]) for g in places]
        equal = len(known) > 0 and max(known) - min(known) <= 1e-6
        leaves = len(known) < 2 or (equal and mask_equal_rewards)
        groups.append(([], []) if leaves else (places, known))
    every = [reward for _, known in groups for reward in known]
    by_token, distances = [], []
    for (places, known), tokens_G in zip(groups, tokens_PG, strict=True):
        for g, reward in zip(places, known, strict=True):
            by_token += [reward] * tokens_G[g]
            distances += [reward - mean(known)] * tokens_G[g]
    advantages_PG, weights_PG = np.zeros((2, *np.shape(rewards_PG)))
    for p, (places, known) in enumerate(groups):
        for i, g in enumerate(places):
            advantages_PG[p, g] = FORMULAS[advantage](known, i, every, by_token, distances)
            weights_PG[p, g] = 1.0
    return advantages_PG, weights_PG


@pytest.mark.parametrize("mask_equal_rewards", MASKED)
@pytest.mark.parametrize("advantage", ADVANTAGES)
@settings(max_examples=20, deadline=None)
@given(rewards_PG=groups, data=st.data())
def test_advantages_equal_the_formula(advantage, mask_equal_rewards, rewards_PG, data):
    options = {"advantage": advantage, "mask_equal_rewards": mask_equal_rewards}
    counts = st.lists(st.integers(1, 5), min_size=4, max_size=4)
    tokens_PG = data.draw(st.lists(counts, min_size=3, max_size=3))
    advantages_PG, weights_PG = compute(rewards_PG, tokens_PG, **options)
    expected_PG, expected_weights_PG = reference(rewards_PG, tokens_PG, **options)
    np.testing.assert_allclose(advantages_PG, expected_PG, rtol=1e-4, atol=2e-6)
    np.testing.assert_array_equal(weights_PG, expected_weights_PG)


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_advantages_equal_the_formula_where_rewards_are_unknown(advantage):
    rewards_PG = [
        [1.0, 0.0, 0.5, 0.25],
        [NAN, 1.0, 0.0, -3.0],
        [2.0, 2.0, 2.0, NAN],
        [NAN, NAN, 1.0, NAN],
        [NAN, NAN, NAN, NAN],
        [math.inf, -math.inf, 1.0, 2.0],
        [0.0, 0.0, 0.0, 0.0],
    ]
    tokens_PG = np.arange(1, 29).reshape(7, 4).tolist()
    for mask in MASKED:
        found = compute(rewards_PG, tokens_PG, advantage=advantage, mask_equal_rewards=mask)
        expected = reference(rewards_PG, tokens_PG, advantage, mask)
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(found[1], expected[1])


def test_reinforce_pp_learns_from_groups_of_equal_rewards_unless_told_otherwise():
    rewards_PG = [[1.0, 1.0], [0.0, 0.0], [0.0, 1.0]]
    assert compute(rewards_PG, advantage="reinforce_pp").weights_PG.all()
    told = compute(rewards_PG, advantage="reinforce_pp", mask_equal_rewards=True)
    np.testing.assert_array_equal(told.weights_PG, [[0, 0], [0, 0], [1, 1]])


def own(rewards_PG, tokens_PG):
    return np.where(tokens_PG > 1, rewards_PG * tokens_PG, np.nan)


def flat(rewards_PG, tokens_PG):
    return rewards_PG.reshape(-1)


def test_an_estimator_of_the_user_s_own_gets_rewards_and_tokens_and_leaves_out_with_nan():
    found = compute([[1.0, 2.0, NAN]], [[3, 1, 9]], advantage=f"{__name__}:own")
    np.testing.assert_array_equal(found.advantages_PG, [[3.0, 0.0, 0.0]])
    np.testing.assert_array_equal(found.weights_PG, [[1.0, 0.0, 0.0]])
    with pytest.raises(
        UserError, match=r"flat: it returned shape \(3,\) .*, \(1, 3\), was expected"
    ):
        compute([[1.0, 2.0, NAN]], advantage=f"{__name__}:flat")


@fast
@given(rewards_PG=groups, order=st.permutations(range(4)))
def test_the_order_of_siblings_does_not_matter(rewards_PG, order):
    rewards_PG = np.array(rewards_PG, np.float32)
    advantages_PG, weights_PG = compute(rewards_PG)
    permuted_PG, permuted_weights_PG = compute(rewards_PG[:, order])
    np.testing.assert_allclose(permuted_PG, np.asarray(advantages_PG)[:, order], atol=1e-6)
    np.testing.assert_array_equal(permuted_weights_PG, np.asarray(weights_PG)[:, order])


@fast
@given(rewards_PG=groups, shift=st.integers(-100, 100))
def test_adding_a_constant_to_a_group_changes_nothing(rewards_PG, shift):
    rewards_PG = np.array(rewards_PG, np.float32)
    shifted_PG = rewards_PG + np.float32([[shift], [0], [2 * shift]])
    for moved, stayed in zip(compute(shifted_PG), compute(rewards_PG), strict=True):
        np.testing.assert_allclose(moved, stayed, rtol=1e-4, atol=1e-4)


@fast
@given(rewards_PG=groups, other=st.lists(known_rewards, min_size=4, max_size=4))
def test_groups_do_not_see_each_other(rewards_PG, other):
    changed_PG = [rewards_PG[0], other, rewards_PG[2]]
    for x, y in zip(
        compute(rewards_PG),
        compute(changed_PG),
        strict=True,
    ):
        np.testing.assert_array_equal(x[0], y[0])
        np.testing.assert_array_equal(x[2], y[2])


@pytest.mark.parametrize("unknown", [NAN, math.inf, -math.inf])
def test_an_unknown_reward_is_as_if_its_completion_were_not_there(unknown):
    advantages_PG, weights_PG = compute([[1.0, unknown, 0.0, unknown, 0.25]])
    fewer_PG, _ = compute([[1.0, 0.0, 0.25]])
    np.testing.assert_allclose(advantages_PG[0, [0, 2, 4]], fewer_PG[0], rtol=1e-6)
    np.testing.assert_array_equal(advantages_PG[0, [1, 3]], 0.0)
    np.testing.assert_array_equal(weights_PG[0], [1.0, 0.0, 1.0, 0.0, 1.0])


@pytest.mark.parametrize("mask_equal_rewards", [True, False])
@pytest.mark.parametrize("group", [[5.0, NAN, NAN], [NAN, NAN, NAN]])
def test_fewer_than_two_known_rewards_leave_the_loss(group, mask_equal_rewards):
    advantages_PG, weights_PG = compute([group], mask_equal_rewards=mask_equal_rewards)
    assert not advantages_PG.any() and not weights_PG.any()


def test_a_group_of_one_completion_leaves_the_loss():
    advantages_PG, weights_PG = compute([[5.0]], mask_equal_rewards=False)
    assert not advantages_PG.any() and not weights_PG.any()


@pytest.mark.parametrize(
    "group",
    [
        [0.1 + 0.2, 0.3, 0.3, 0.3],  # differs in the last bit of a double
        [0.3, np.nextafter(np.float32(0.3), np.float32(1.0)), 0.3, 0.3],  # and of a float
        [0.0] * 7 + [0.9e-6],  # far from the mean, near to each other
        [1.0, 1.0, NAN, 1.0],
    ],
)
def test_rewards_equal_up_to_rounding_are_equal(group):
    advantages_PG, weights_PG = compute([group])
    assert not advantages_PG.any() and not weights_PG.any()
    advantages_PG, weights_PG = compute([group], mask_equal_rewards=False)
    assert not advantages_PG.any()
    np.testing.assert_array_equal(weights_PG[0], np.isfinite(group))


@fast
@given(reward=st.floats(-1e6, 1e6, width=32))
def test_one_reward_seven_times_is_equal_whatever_the_rounding_of_its_mean(reward):
    advantages_PG, weights_PG = compute(np.full((1, 7), reward))
    assert not np.any(advantages_PG) and not np.any(weights_PG)


def test_rewards_further_apart_than_rounding_are_different():
    advantages_PG, weights_PG = compute([[0.0, 1e-4]])
    std = 1e-4 / math.sqrt(2)
    expected = 0.5e-4 / (std + EPS)
    np.testing.assert_allclose(advantages_PG[0], [-expected, expected], rtol=1e-4)
    np.testing.assert_array_equal(weights_PG, 1.0)


def test_without_the_deviation_the_difference_to_the_mean_remains():
    advantages_PG, _ = compute([[4.0, 0.0, 1.0, -1.0]], advantage="dr_grpo")
    np.testing.assert_array_equal(advantages_PG[0], [3.0, -1.0, 0.0, -2.0])
