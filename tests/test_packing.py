"""Every number of a rollout lands at its own token, and nothing else is trained on."""

import math

import numpy as np
import pytest

from jaxrl.packing import SHORTEST_ROW, pack, row_length
from jaxrl.types import Group, Prompt, Rollout


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


def test_rows_hold_prompt_then_completion_then_padding():
    batch = pack(GROUPS, ADVANTAGES_PG, ONES_PG)
    rows = [[11, 12, 13, 21, 22], [11, 12, 13, 23], [14, 24, 25, 26], [14, 27, 28]]
    for found, row in zip(batch.tokens_BT.tolist(), rows, strict=True):
        assert found == row + [0] * (SHORTEST_ROW - len(row))


def test_mask_and_log_probs_stand_at_the_sampled_tokens():
    batch = pack(GROUPS, ADVANTAGES_PG, ONES_PG)
    expected = [{3: -0.5, 4: -0.25}, {3: -1.0}, {1: -2.0, 2: -3.0, 3: -4.0}, {1: -0.125, 2: -0.75}]
    for b, at in enumerate(expected):
        for t in range(SHORTEST_ROW):
            assert batch.loss_mask_BT[b, t] == float(t in at), (b, t)
            assert batch.behavior_logprobs_BT[b, t] == at.get(t, 0.0), (b, t)


def test_advantages_follow_their_completions():
    batch = pack(GROUPS, ADVANTAGES_PG, ONES_PG)
    assert batch.advantages_B.tolist() == [1.0, -1.0, 0.5, -0.5]


def test_a_batch_has_the_types_that_the_update_was_compiled_for():
    batch = pack(GROUPS, ADVANTAGES_PG, ONES_PG)
    assert [x.dtype for x in batch] == [np.int32, np.float32, np.float32, np.float32]
    assert [x.shape for x in batch] == [(4, SHORTEST_ROW)] * 3 + [(4,)]


@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf])
def test_a_token_without_a_finite_log_prob_is_not_trained_on(bad):
    groups = [group(0, [11, 12], [(21, -0.5), (22, bad), (23, -1.0)], [(24, -2.0)])]
    batch = pack(groups, ADVANTAGES_PG[:1], ONES_PG[:1])
    assert batch.tokens_BT[0, :5].tolist() == [11, 12, 21, 22, 23]
    assert batch.loss_mask_BT[0, :5].tolist() == [0, 0, 1, 0, 1]
    assert batch.behavior_logprobs_BT[0, :5].tolist() == [0, 0, -0.5, 0, -1.0]


def test_a_completion_of_weight_zero_is_in_the_batch_and_not_trained_on():
    weights_PG = np.array([[1.0, 0.0], [1.0, 1.0]], np.float32)
    batch = pack(GROUPS, ADVANTAGES_PG, weights_PG)
    assert batch.loss_mask_BT.sum(axis=1).tolist() == [2, 0, 3, 2]
    assert not batch.behavior_logprobs_BT[1].any()
    assert batch.tokens_BT[1, :4].tolist() == [11, 12, 13, 23]


@pytest.mark.parametrize(
    ("longest", "length"),
    [(33, 64), (63, 64), (64, 64), (65, 128), (1000, 1024), (1024, 1024), (1025, 2048)],
)
def test_row_length_is_the_next_power_of_two(longest, length):
    assert row_length(longest) == length


def test_no_row_is_shorter_than_the_shortest_and_few_lengths_exist():
    assert row_length(1) == row_length(SHORTEST_ROW) == SHORTEST_ROW
    assert row_length(SHORTEST_ROW + 1) == 2 * SHORTEST_ROW
    assert len({row_length(longest) for longest in range(1, 4097)}) <= 10


def test_the_longest_row_decides_the_shape_and_is_not_cut():
    completion = [(5, -1.0)] * 30
    batch = pack([group(0, [1, 2, 3], completion, completion[:1])], ADVANTAGES_PG[:1], ONES_PG[:1])
    assert batch.tokens_BT.shape == (2, 64)
    assert batch.loss_mask_BT[0].sum() == 30 and batch.loss_mask_BT[0, 32] == 1.0
