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

WEIGHTS = [1.0, -0.5, 3.0]
GDPO = {"advantage": "gdpo"}
several = st.lists(
    st.lists(st.lists(rewards, min_size=3, max_size=3), min_size=4, max_size=4),
    min_size=3,
    max_size=3,
)


def compute(rewards_PG, tokens_PG=None, lengths_PG=None, truncated_PG=None, **options):
    """estimate_advantages on nested lists, as two numpy arrays."""
    rewards_PG = np.array(rewards_PG, np.float32)
    tokens_PG = np.ones(rewards_PG.shape, int) if tokens_PG is None else np.array(tokens_PG)
    lengths_PG = None if lengths_PG is None else np.array(lengths_PG)
    truncated_PG = None if truncated_PG is None else np.array(truncated_PG)
    found = estimate_advantages(
        rewards_PG,
        tokens_PG,
        AlgorithmSection(**options),
        lengths_PG=lengths_PG,
        truncated_PG=truncated_PG,
    )
    assert found.advantages_PG.dtype == found.weights_PG.dtype == np.float32
    return found


def compute_parts(parts_PGR, weights=WEIGHTS, **options):
    """estimate_advantages on several rewards of each completion, and on their weighted sum."""
    parts_PGR = np.array(parts_PGR, np.float32)
    totals_PG = (parts_PGR * np.array(weights)).sum(axis=2).astype(np.float32)
    ones_PG = np.ones(totals_PG.shape, int)
    c = AlgorithmSection(**(GDPO | options))
    return estimate_advantages(
        totals_PG, ones_PG, c, parts_PGR=parts_PGR, parts_weights_R=np.array(weights)
    )


def mean(values):
    return math.fsum(values) / len(values)


def std(values):
    return math.sqrt(math.fsum((x - mean(values)) ** 2 for x in values) / (len(values) - 1))


def best_of(known, i):
    second = sorted(known)[-2]
    return max(known[i] - second, 0.0) / (std(known) + EPS)


# (known rewards of the group, place in it, all rewards, those rewards once for each token, all
# distances to the mean of a group once for each token, and once each) -> advantage
FORMULAS = {
    "none": lambda *_: 0.0,
    "grpo": lambda known, i, *_: (known[i] - mean(known)) / (std(known) + EPS),
    "dr_grpo": lambda known, i, *_: known[i] - mean(known),
    "rloo": lambda known, i, *_: known[i] - mean(known[:i] + known[i + 1 :]),
    "batch_std": lambda known, i, every, *_: (known[i] - mean(known)) / (std(every) + EPS),
    "scalerl": lambda known, i, _, __, ___, each: (known[i] - mean(known)) / (std(each) + EPS),
    "maxrl": lambda known, i, *_: (
        (known[i] - mean(known)) / mean(known) if mean(known) > 1e-6 else 0.0
    ),
    "pass_at_k": lambda known, i, *_: best_of(known, i),
    "reinforce_pp": lambda known, i, _, tokens, *__: (
        (known[i] - mean(tokens)) / (std(tokens) + EPS)
    ),
    "reinforce_pp_baseline": lambda known, i, _, __, tokens, ___: (
        (known[i] - mean(known) - mean(tokens)) / (std(tokens) + EPS)
    ),
}


def reference(rewards_PG, tokens_PG, advantage, mask_equal_rewards):
    """In Python floats, one group at a time."""
    if advantage == "gdpo":
        alone = [[[reward] for reward in group] for group in rewards_PG]
        return reference_of_parts(alone, [1.0], mask_equal_rewards)
    groups = []  # places and rewards of those that stay in each group
    for group in rewards_PG:
        places = [g for g, reward in enumerate(group) if math.isfinite(reward)]
        known = [float(group[g]) for g in places]
        equal = len(known) > 0 and max(known) - min(known) <= 1e-6
        leaves = len(known) < 2 or (equal and mask_equal_rewards)
        if advantage == "none":  # looks at no reward
            places, known, leaves = list(range(len(group))), [0.0] * len(group), False
        groups.append(([], []) if leaves else (places, known))
    every = [reward for _, known in groups for reward in known]
    by_token, distances, each = [], [], []
    for (places, known), tokens_G in zip(groups, tokens_PG, strict=True):
        for g, reward in zip(places, known, strict=True):
            by_token += [reward] * tokens_G[g]
            distances += [reward - mean(known)] * tokens_G[g]
            each.append(reward - mean(known))
    advantages_PG, weights_PG = np.zeros((2, *np.shape(rewards_PG)))
    for p, (places, known) in enumerate(groups):
        for i, g in enumerate(places):
            formula = FORMULAS[advantage]
            advantages_PG[p, g] = formula(known, i, every, by_token, distances, each)
            weights_PG[p, g] = 1.0
    return advantages_PG, weights_PG


def reference_of_parts(parts_PGR, weights, mask_equal_rewards):
    """GDPO in Python floats, one reward of one group at a time."""
    sums = {}  # (group, place) -> weighted sum of normalised rewards
    for p, group in enumerate(parts_PGR):
        places = [g for g, parts in enumerate(group) if all(map(math.isfinite, parts))]
        columns = [[float(group[g][r]) for g in places] for r in range(len(weights))]
        if len(places) < 2:
            continue
        tell = [max(x) - min(x) > 1e-6 and w != 0 for x, w in zip(columns, weights, strict=True)]
        if mask_equal_rewards and not any(tell):
            continue
        for i, g in enumerate(places):
            sums[p, g] = math.fsum(
                w * (x[i] - mean(x)) / (std(x) + EPS) for w, x in zip(weights, columns, strict=True)
            )
    advantages_PG, weights_PG = np.zeros((2, len(parts_PGR), len(parts_PGR[0])))
    every = list(sums.values())
    for (p, g), value in sums.items():
        advantages_PG[p, g] = (value - mean(every)) / (std(every) + EPS)
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


@pytest.mark.parametrize("mask_equal_rewards", MASKED)
@fast
@given(parts_PGR=several, weights=st.permutations([1.0, -0.5, 3.0, 0.0]))
def test_several_rewards_equal_the_formula(mask_equal_rewards, parts_PGR, weights):
    found = compute_parts(parts_PGR, weights[:3], mask_equal_rewards=mask_equal_rewards)
    expected = reference_of_parts(parts_PGR, weights[:3], mask_equal_rewards)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-4, atol=2e-6)
    np.testing.assert_array_equal(found[1], expected[1])


def test_rewards_of_equal_sums_teach_gdpo_alone():
    parts_PGR = [[[0.0, 1.0, 0.0], [1.0, 3.0, 0.0], [0.5, 2.0, 0.0]]]  # weights 1, -0.5, 3
    assert not compute_parts(parts_PGR, advantage="grpo").weights_PG.any()
    assert compute_parts(parts_PGR).weights_PG.all()


def test_a_reward_without_weight_does_not_make_a_group_unequal():
    parts_PGR = [[[0.0, 1.0, 2.0], [1.0, 1.0, 2.0]]]
    assert not compute_parts(parts_PGR, [0.0, 1.0, 3.0]).weights_PG.any()
    assert compute_parts(parts_PGR, [0.1, 1.0, 3.0]).weights_PG.all()


@fast
@given(
    parts_PGR=several,
    members=st.permutations(range(4)),
    order=st.permutations(range(3)),
    shift=st.integers(-8, 8),
    r=st.integers(0, 2),
)
def test_what_several_rewards_do_not_look_at(parts_PGR, members, order, shift, r):
    """The order of groups and of siblings, and where the scale of one of the rewards begins."""
    parts_PGR = np.array(parts_PGR, np.float32)
    plain, permuted = compute_parts(parts_PGR), compute_parts(parts_PGR[order][:, members])
    parts_PGR[:, :, r] += shift
    shifted = compute_parts(parts_PGR)
    for was, moved, stayed in zip(plain, permuted, shifted, strict=True):
        np.testing.assert_allclose(moved, was[order][:, members], atol=1e-5)
        np.testing.assert_allclose(stayed, was, atol=1e-5)


THERE, GONE = [0, 2, 4], [1, 3]  # of five siblings


@pytest.mark.parametrize("why", ["unknown", "short", "long"])
@pytest.mark.parametrize("advantage", ADVANTAGES)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_a_completion_that_is_unknown_or_rejected_is_as_if_it_were_not_there(advantage, why, data):
    group = st.lists(known_rewards, min_size=5, max_size=5)
    rewards_PG = np.array(data.draw(st.lists(group, min_size=2, max_size=2)))
    lengths_PG = np.full((2, 5), 7)
    lengths_PG[:, [0, 2]] = 3, 9  # the bounds themselves are kept
    fewer = compute(rewards_PG[:, THERE], lengths_PG[:, THERE], advantage=advantage)
    tokens_PG = lengths_PG.copy()
    if why == "unknown" and advantage != "none":  # which asks for no reward
        rewards_PG[:, GONE] = NAN
    else:
        lengths_PG[:, GONE] = 2 if why == "short" else 10
    found = compute(rewards_PG, tokens_PG, lengths_PG, advantage=advantage, length_bounds=[3, 9])
    for kept, expected in zip(found, fewer, strict=True):
        np.testing.assert_allclose(kept[:, THERE], expected, atol=1e-6)
        assert not kept[:, GONE].any()


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_truncated_completions_leave_the_loss_and_no_statistic(advantage):
    rewards_PG = [[1.0, 0.0, 0.5, NAN], [3.0, 1.0, 1.0, 0.0]]
    truncated_PG = [[True, False, False, True], [False, False, False, True]]
    whole = compute(rewards_PG, advantage=advantage)
    same = compute(rewards_PG, truncated_PG=truncated_PG, advantage=advantage)
    found = compute(rewards_PG, truncated_PG=truncated_PG, advantage=advantage, mask_truncated=True)
    for were, are, masked in zip(whole, same, found, strict=True):
        np.testing.assert_array_equal(are, were)
        np.testing.assert_array_equal(masked, np.where(truncated_PG, 0.0, were))


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
