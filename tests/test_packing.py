"""Every number of a rollout lands at its own token, in rows that hold as much as they can."""

import math
from collections import Counter

import numpy as np
import pytest

from jaxrl.config import UpdateSection
from jaxrl.packing import (
    SHORTEST_ROW,
    few,
    first_fit,
    minibatches,
    pack,
    row_length,
    rows_of_microbatch,
)
from jaxrl.types import Group, Prompt, Rollout, UserError


def group(prompt_id: int, prompt_tokens, *completions) -> Group:
    """Completions are lists of (token, log-prob)."""
    rollouts = tuple(
        Rollout(
            np.array([token for token, _ in completion], np.int32),
            np.array([logprob for _, logprob in completion], np.float32),
            np.full(len(completion), 3, np.int64),
            "stop",
            i,
        )
        for i, completion in enumerate(completions)
    )
    return Group(Prompt(prompt_id, "", tuple(prompt_tokens), {}), rollouts)


GROUPS = [
    group(0, [11, 12, 13], [(21, -0.5), (22, -0.25)], [(23, -1.0)]),
    group(1, [14], [(24, -2.0), (25, -3.0), (26, -4.0)], [(27, -0.125), (28, -0.75)]),
]
ADVANTAGES_PG = np.array([[1.0, -1.0], [0.5, -0.5]], np.float32)
ONES_PG = np.ones((2, 2), np.float32)
SHARED, ALONE = UpdateSection(), UpdateSection(share_prompts=False)


def random_groups(seed: int, P: int = 20, G: int = 6, left_behind: int = 0):
    """Groups, advantages and weights; lengths from 0 sampled tokens on, some log-probs not usable,
    and no two tokens with the same log-prob. Some groups lack up to `left_behind` completions."""
    rng = np.random.default_rng(seed)
    logprobs = iter(-rng.permutation(P * G * 41) / 7.0)
    bad = (math.nan, -math.inf)

    def completion():
        length = int(rng.integers(0, 41) if rng.random() < 0.3 else rng.integers(1, 9))
        spoilt = rng.random(length) < 0.1
        return [
            (int(rng.integers(1, 99)), bad[int(s)] if s and rng.random() < 0.9 else next(logprobs))
            for s in spoilt
        ]

    groups = [
        group(p, rng.integers(1, 99, rng.integers(1, 13)), *(completion() for _ in range(there)))
        for p, there in enumerate(G - p % (left_behind + 1) for p in range(P))
    ]
    weights_PG = (rng.random((P, G)) < 0.8).astype(np.float32)
    return groups, rng.normal(size=(P, G)).astype(np.float32), weights_PG


def asked_for(groups, advantages_PG, weights_PG) -> Counter:
    """(prompt, completion, its trained log-probs, advantage) of each completion, from the input."""
    found = Counter()
    for g, advantages_G, weights_G in zip(groups, advantages_PG, weights_PG, strict=True):
        for rollout, advantage, weight in zip(g.rollouts, advantages_G, weights_G, strict=False):
            logprobs = tuple(
                float(x) if weight and math.isfinite(x) else None for x in rollout.logprobs
            )
            key = g.prompt.tokens, tuple(rollout.tokens.tolist()), logprobs
            found[(*key, float(advantage) if logprobs else None)] += 1
    return found


def read_back(batch) -> tuple[Counter, int]:
    """The same from the rows, by who sees whom and by which token predicts which; and how many
    copies of prompts there are. Completions without a token leave no trace."""
    found, copies, total = Counter(), 0, batch.loss_mask_BC.sum()
    for b in range(len(batch.tokens_BT)):
        slots = list(zip(*(x[b].tolist() for x in batch[:4]), strict=True))
        sampled = list(zip(*(x[b].tolist() for x in batch[4:]), strict=True))
        places = [t for t, (_, _, _, branch) in enumerate(slots) if branch]
        assert not any(any(numbers[2:]) for numbers in sampled[len(places) :])
        numbers, seen = dict(zip(places, sampled, strict=False)), set()
        for g in range(1, max(group for _, _, group, _ in slots) + 1):
            prompt = [t for t, slot in enumerate(slots) if slot[2:] == (g, 0)]
            copies += 1
            for branch in {slot[3] for slot in slots if slot[2] == g} - {0}:
                own = [t for t, slot in enumerate(slots) if slot[2:] == (g, branch)]
                whole = prompt + own
                assert whole == sorted(whole)  # causality is by place in the row
                assert [slots[t][1] for t in whole] == list(range(len(whole)))
                predictors, targets, completions, masks, logprobs, advantages, shares = zip(
                    *(numbers[t] for t in own), strict=True
                )
                (completion,) = set(completions)
                assert completion not in seen and completion > 0
                seen.add(completion)
                assert shares == tuple(np.float32(1 / total) if mask else 0.0 for mask in masks)
                assert list(predictors) == whole[len(prompt) - 1 : -1]
                assert list(targets) == [slots[t][0] for t in own]
                numbered = list(zip(masks, logprobs, strict=True))
                assert all(m in (0.0, 1.0) and (m or x == 0.0) for m, x in numbered)
                trained = tuple(x if m else None for m, x in numbered)
                (advantage,) = set(advantages)
                texts = (tuple(slots[t][0] for t in part) for part in (prompt, own))
                found[(*texts, trained, advantage)] += 1
    return found, copies


# --- what stands where ---


def test_completions_stand_behind_one_copy_of_their_prompt():
    batch = pack(GROUPS, ADVANTAGES_PG, ONES_PG, SHARED)
    assert batch.tokens_BT.shape == batch.targets_BC.shape == (1, SHORTEST_ROW)
    expected = {
        "tokens_BT": [11, 12, 13, 21, 22, 23, 14, 24, 25, 26, 27, 28],
        "positions_BT": [0, 1, 2, 3, 4, 3, 0, 1, 2, 3, 1, 2],
        "group_BT": [1] * 6 + [2] * 6,
        "branch_BT": [0, 0, 0, 1, 1, 2, 0, 1, 1, 1, 2, 2],
        "predictor_BC": [2, 3, 2, 6, 7, 8, 6, 10],
        "targets_BC": [21, 22, 23, 24, 25, 26, 27, 28],
        "completion_BC": [1, 1, 2, 3, 3, 3, 4, 4],
        "loss_mask_BC": [1] * 8,
        "behavior_logprobs_BC": [-0.5, -0.25, -1, -2, -3, -4, -0.125, -0.75],
        "advantages_BC": [1.0] * 2 + [-1.0] + [0.5] * 3 + [-0.5] * 2,
        "share_BC": [1 / 8] * 8,
    }
    for name, values in expected.items():
        row = getattr(batch, name)[0].tolist()
        assert row == values + [0] * (SHORTEST_ROW - len(values)), name


def test_completions_that_do_not_share_stand_behind_a_prompt_each():
    batch = pack(GROUPS, ADVANTAGES_PG, ONES_PG, ALONE)
    assert batch.tokens_BT.shape == (1, SHORTEST_ROW)
    rows = [[11, 12, 13, 21, 22, 11, 12, 13, 23, 14, 24, 25, 26, 14, 27, 28]]
    assert sorted(batch.tokens_BT.reshape(-1).tolist()) == sorted(rows[0])
    assert set(batch.branch_BT.reshape(-1).tolist()) == {0, 1}
    assert set(batch.group_BT.reshape(-1).tolist()) == {1, 2, 3, 4}


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize(
    "c",
    [
        SHARED,
        ALONE,
        UpdateSection(row_tokens=64),
        UpdateSection(max_tokens_per_microbatch=256),
        UpdateSection(share_prompts=False, max_tokens_per_microbatch=128),
    ],
    ids=["shared", "alone", "split", "microbatches", "alone_microbatches"],
)
@pytest.mark.parametrize("seed", range(3))
def test_every_number_of_every_completion_is_read_back_from_the_rows(seed, c, shards):
    case = random_groups(seed, left_behind=2)
    batch = pack(*case, c, shards)
    found, copies = read_back(batch)
    asked = asked_for(*case)
    empty = sum(count for key, count in asked.items() if not key[1])
    assert empty  # the case has completions without a token
    assert found == Counter({key: count for key, count in asked.items() if key[1]})
    completions = sum(len(g.rollouts) for g in case[0])
    if c.share_prompts:
        assert len(case[0]) <= copies < completions
    else:
        assert copies == completions
    assert len(batch.tokens_BT) % shards == 0


def test_a_batch_has_the_types_that_the_update_was_compiled_for():
    batch = pack(GROUPS, ADVANTAGES_PG, ONES_PG, SHARED)
    assert [x.dtype for x in batch] == [np.int32] * 7 + [np.float32] * 4
    B, T = batch.tokens_BT.shape
    assert [x.shape for x in batch[:4]] == [(B, T)] * 4
    assert len({x.shape for x in batch[4:]}) == 1


@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf])
def test_a_token_without_a_finite_log_prob_is_not_trained_on(bad):
    groups = [group(0, [11, 12], [(21, -0.5), (22, bad), (23, -1.0)], [(24, -2.0)])]
    batch = pack(groups, ADVANTAGES_PG[:1], ONES_PG[:1], SHARED)
    assert batch.tokens_BT[0, :6].tolist() == [11, 12, 21, 22, 23, 24]
    assert batch.loss_mask_BC[0, :4].tolist() == [1, 0, 1, 1]
    assert batch.behavior_logprobs_BC[0, :4].tolist() == [-0.5, 0, -1.0, -2.0]


def test_a_completion_of_weight_zero_is_in_the_batch_and_not_trained_on():
    weights_PG = np.array([[1.0, 0.0], [1.0, 1.0]], np.float32)
    batch = pack(GROUPS[:1], ADVANTAGES_PG[:1], weights_PG[:1], SHARED)
    assert batch.targets_BC[0, :3].tolist() == [21, 22, 23]
    assert batch.loss_mask_BC[0, :3].tolist() == [1, 1, 0]
    assert batch.behavior_logprobs_BC[0, 2] == 0.0


# --- shapes ---


@pytest.mark.parametrize(
    ("longest", "length"),
    [(1, 16), (16, 16), (17, 32), (33, 48), (256, 256), (257, 272), (513, 544), (1064, 1088)],
)
def test_a_row_is_as_long_as_what_it_must_hold_and_a_little_more(longest, length):
    assert row_length(longest) == length


def test_lengths_of_rows_are_few_and_at_most_a_sixteenth_more():
    lengths = {longest: row_length(longest) for longest in range(1, 4097)}
    assert all(T % 16 == 0 for T in lengths.values())
    assert all(n <= T <= max(1.0625 * n, n + 15) for n, T in lengths.items())
    assert len({T for T in lengths.values() if T > 256}) == 4 * 16


def test_counts_of_rows_are_few_and_at_most_an_eighth_more():
    counts = {count: few(count) for count in range(1, 4097)}
    assert all(count <= rows <= 1.125 * count for count, rows in counts.items())
    assert len(set(counts.values())) == 16 + 8 * 8


def packed(c, *lengths, prompt=10, key_cost=0.0, shards=1):
    completions = [[(5, -1.0)] * length for length in lengths]
    groups, ones = [group(0, range(1, prompt + 1), *completions)], np.ones((1, len(lengths)))
    return pack(groups, ones, ones, c, shards, key_cost)


@pytest.mark.parametrize(
    ("c", "T", "copies"),
    [
        (SHARED, 112, 1),  # 10 + 4 * 25 = 110
        (UpdateSection(row_tokens=111), 111, 1),
        (UpdateSection(row_tokens=109), 64, 2),  # a prompt and two completions: 60
        (UpdateSection(max_tokens_per_microbatch=109), 64, 2),
        (UpdateSection(max_tokens_per_microbatch=36), 36, 4),  # no room for 48
        (UpdateSection(row_tokens=1), 48, 4),  # the longest completion decides: 35
        (ALONE, 48, 4),
    ],
)
def test_a_row_holds_a_whole_group_where_it_may(c, T, copies):
    batch = packed(c, 25, 25, 25, 25)
    assert batch.tokens_BT.shape[1] == T and read_back(batch)[1] == copies


def test_rows_are_chosen_for_the_least_work():
    """Slots of rows, and keys that a slot of them attends to on average: half a row."""
    lengths = [100] * 8  # behind a prompt of 10: 810 together, in a row of 832
    assert packed(SHARED, *lengths).tokens_BT.shape == (1, 832)
    assert packed(SHARED, *lengths, key_cost=0.001).tokens_BT.shape == (8, 112)  # 946 < 1178
    long = [20] * 8  # behind a prompt of 100: 260
    assert packed(SHARED, *long, prompt=100).tokens_BT.shape == (1, 272)
    assert packed(SHARED, *long, prompt=100, key_cost=0.001).tokens_BT.shape == (1, 272)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
def test_minibatches_have_every_group_once_in_order_and_as_evenly_as_can_be(count):
    parts = minibatches(count, list(range(7)), np.arange(14).reshape(7, 2))
    assert [group for groups, _ in parts for group in groups] == list(range(7))
    assert all((rows[:, 0] == 2 * np.array(groups)).all() for groups, rows in parts)
    sizes = [len(groups) for groups, _ in parts]
    assert len(sizes) == count and max(sizes) - min(sizes) <= 1


def test_empty_rows_fill_up_shards():
    case = random_groups(0)
    batch = pack(*case, UpdateSection(row_tokens=64, max_tokens_per_microbatch=192), 3)
    used = np.count_nonzero(batch.group_BT.any(axis=1))
    assert len(batch.tokens_BT) % 3 == 0 and len(batch.tokens_BT) > used
    assert not any(x[used:].any() for x in batch)


@pytest.mark.parametrize(
    ("B", "limit", "shards", "rows"),
    [
        (8, 10_000, 1, 8),
        (8, 64, 1, 1),
        (8, 300, 1, 4),  # four at a time fit; three would leave rows over
        (9, 300, 1, 3),
        (7, 300, 1, 1),
        (8, 300, 2, 4),
        (8, 64, 4, 4),  # a row of each shard, whatever the limit
        (12, 600, 4, 4),  # two of each would fit, and leave one over
    ],
)
def test_a_micro_batch_has_whole_rows_of_every_shard_and_none_are_left(B, limit, shards, rows):
    assert rows_of_microbatch(B, 64, limit, shards) == rows


def test_a_micro_batch_without_room_for_the_longest_is_named_with_its_knob():
    with pytest.raises(UserError, match=r"update.max_tokens_per_microbatch = 34 .* 35 tokens"):
        packed(UpdateSection(max_tokens_per_microbatch=34), 25, 3)


# --- first fit ---


def test_first_fit_is_the_textbook_s():
    assert first_fit([4, 8, 1, 4, 2, 1], 10) == [[1, 4], [0, 3, 2, 5]]


@pytest.mark.parametrize("seed", range(5))
def test_bins_hold_everything_once_and_are_nearly_as_few_as_can_be(seed):
    sizes = np.random.default_rng(seed).integers(0, 101, 3000).tolist()
    bins = first_fit(sizes, 100)
    assert sorted(i for members in bins for i in members) == list(range(3000))
    assert max(sum(sizes[i] for i in members) for members in bins) <= 100
    assert len(bins) <= 11 / 9 * (sum(sizes) / 100) + 1
