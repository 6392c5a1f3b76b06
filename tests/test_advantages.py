"""Advantages are GRPO's formula, and what is unknown or equal teaches nothing."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.advantages import group_advantages

EPS = 1e-6
NAN = math.nan
SWITCHES = [(std, mask) for std in (True, False) for mask in (True, False)]

# Quarters: differences and means are exact, so that no example sits on the edge of "equal".
known_rewards = st.integers(-16, 16).map(lambda quarters: quarters / 4)
rewards = st.one_of(known_rewards, st.just(NAN))
groups = st.lists(st.lists(rewards, min_size=4, max_size=4), min_size=3, max_size=3)
fast = settings(max_examples=50, deadline=None)


def compute(rewards_PG, **options):
    """group_advantages on nested lists, as two numpy arrays."""
    advantages_PG, weights_PG = group_advantages(np.array(rewards_PG, np.float32), **options)
    assert advantages_PG.dtype == weights_PG.dtype == np.float32
    return np.asarray(advantages_PG), np.asarray(weights_PG)


def reference(rewards_PG, normalize_std, mask_equal_rewards):
    """The docstring in Python floats, one group at a time."""
    advantages_PG, weights_PG = [], []
    for group in rewards_PG:
        known = [reward for reward in group if math.isfinite(reward)]
        if len(known) < 2:
            advantages_PG.append([0.0] * len(group))
            weights_PG.append([0.0] * len(group))
            continue
        mean = math.fsum(known) / len(known)
        std = math.sqrt(math.fsum((r - mean) ** 2 for r in known) / (len(known) - 1))
        scale = std + EPS if normalize_std else 1.0
        equal = max(known) - min(known) <= 1e-6
        advantages_PG.append(
            [0.0 if equal or not math.isfinite(r) else (r - mean) / scale for r in group]
        )
        weights_PG.append(
            [float(math.isfinite(r) and not (equal and mask_equal_rewards)) for r in group]
        )
    return np.array(advantages_PG), np.array(weights_PG)


@pytest.mark.parametrize(("normalize_std", "mask_equal_rewards"), SWITCHES)
@fast
@given(rewards_PG=groups)
def test_advantages_equal_the_formula(normalize_std, mask_equal_rewards, rewards_PG):
    options = {"normalize_std": normalize_std, "mask_equal_rewards": mask_equal_rewards}
    advantages_PG, weights_PG = compute(rewards_PG, **options)
    expected_PG, expected_weights_PG = reference(rewards_PG, **options)
    np.testing.assert_allclose(advantages_PG, expected_PG, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(weights_PG, expected_weights_PG)


def test_advantages_equal_the_formula_where_rewards_are_unknown():
    rewards_PG = [
        [1.0, 0.0, 0.5, 0.25],
        [NAN, 1.0, 0.0, -3.0],
        [2.0, 2.0, 2.0, NAN],
        [NAN, NAN, 1.0, NAN],
        [NAN, NAN, NAN, NAN],
        [math.inf, -math.inf, 1.0, 2.0],
    ]
    advantages_PG, weights_PG = compute(rewards_PG)
    expected_PG, expected_weights_PG = reference(rewards_PG, True, True)
    np.testing.assert_allclose(advantages_PG, expected_PG, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(weights_PG, expected_weights_PG)


@fast
@given(rewards_PG=groups, order=st.permutations(range(4)))
def test_the_order_of_siblings_does_not_matter(rewards_PG, order):
    rewards_PG = np.array(rewards_PG, np.float32)
    advantages_PG, weights_PG = group_advantages(rewards_PG)
    permuted_PG, permuted_weights_PG = group_advantages(rewards_PG[:, order])
    np.testing.assert_allclose(permuted_PG, np.asarray(advantages_PG)[:, order], atol=1e-6)
    np.testing.assert_array_equal(permuted_weights_PG, np.asarray(weights_PG)[:, order])


@fast
@given(rewards_PG=groups, shift=st.integers(-100, 100))
def test_adding_a_constant_to_a_group_changes_nothing(rewards_PG, shift):
    rewards_PG = np.array(rewards_PG, np.float32)
    shifted_PG = rewards_PG + np.float32([[shift], [0], [2 * shift]])
    for moved, stayed in zip(
        group_advantages(shifted_PG), group_advantages(rewards_PG), strict=True
    ):
        np.testing.assert_allclose(moved, stayed, rtol=1e-4, atol=1e-4)


@fast
@given(rewards_PG=groups, other=st.lists(known_rewards, min_size=4, max_size=4))
def test_groups_do_not_see_each_other(rewards_PG, other):
    changed_PG = [rewards_PG[0], other, rewards_PG[2]]
    for x, y in zip(
        group_advantages(np.float32(rewards_PG)),
        group_advantages(np.float32(changed_PG)),
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
    advantages_PG, weights_PG = group_advantages(np.full((1, 7), reward, np.float32))
    assert not np.any(advantages_PG) and not np.any(weights_PG)


def test_rewards_further_apart_than_rounding_are_different():
    advantages_PG, weights_PG = compute([[0.0, 1e-4]])
    std = 1e-4 / math.sqrt(2)
    expected = 0.5e-4 / (std + EPS)
    np.testing.assert_allclose(advantages_PG[0], [-expected, expected], rtol=1e-4)
    np.testing.assert_array_equal(weights_PG, 1.0)


def test_without_the_deviation_the_difference_to_the_mean_remains():
    advantages_PG, _ = compute([[4.0, 0.0, 1.0, -1.0]], normalize_std=False)
    np.testing.assert_array_equal(advantages_PG[0], [3.0, -1.0, 0.0, -2.0])
