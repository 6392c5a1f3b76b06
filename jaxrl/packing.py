"""Rollouts -> rows of packed tokens, with few shapes in a run.

What is packed are units: a copy of a prompt and the completions behind it. Completions of a group
share a copy as far as a row has room for them; each has one of its own if they do not share.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxrl.config import UpdateSection
from jaxrl.types import Group, Rollout, TrainBatch, UserError

SHORTEST_ROW = 16  # tokens


class Completion(NamedTuple):
    rollout: Rollout
    advantage: float
    weight: float  # 1 if it is trained on, else 0


class Unit(NamedTuple):
    """One copy of a prompt, and the completions that stand behind it."""

    prompt: tuple[int, ...]
    completions: list[Completion]

    @property
    def sampled(self) -> int:
        return sum(len(completion.rollout.tokens) for completion in self.completions)

    @property
    def size(self) -> int:
        return len(self.prompt) + self.sampled


def row_length(longest: int) -> int:
    """The next power of two: a run compiles the update once per power, not once per length."""
    return max(SHORTEST_ROW, 1 << (longest - 1).bit_length())


def pack(
    groups: Sequence[Group],
    advantages_PG: np.ndarray,
    weights_PG: np.ndarray,
    c: UpdateSection,
    shards: int = 1,
) -> TrainBatch:
    """Every completion behind its prompt, in as few rows as first-fit decreasing finds.

    A sampled token is trained on unless its completion's weight is 0 or its behaviour log-prob is
    not finite (engines have been seen to return NaN and -inf; no ratio can be made of those).

    Args:
      groups: P groups of G rollouts.
      advantages_PG: float32 [P, G].
      weights_PG: float32 [P, G], 1 for completions that are trained on, else 0.
      shards: parts that the mesh splits rows into; empty rows make B a multiple of it, and of the
        rows of a micro-batch.
    """
    T = choose_row_length(groups, c)
    units = [
        unit
        for group, advantages_G, weights_G in zip(groups, advantages_PG, weights_PG, strict=True)
        for unit in units_of(group, advantages_G, weights_G, T, c.share_prompts)
    ]
    rows = [[units[i] for i in row] for row in first_fit([unit.size for unit in units], T)]
    B = padded_rows(len(rows), rows_of_microbatch(T, c, shards), shards)
    C = row_length(max(sum(unit.sampled for unit in row) for row in rows))
    batch = empty_batch(B, T, C)
    for b, row in enumerate(rows):
        fill_row(TrainBatch(*(array[b] for array in batch)), row)
    return batch


def choose_row_length(groups: Sequence[Group], c: UpdateSection) -> int:
    """Tokens of a row: as many as the longest completion and its prompt need or, where prompts are
    shared, the largest group, if `update` allows rows of that length."""
    longest = max(len(g.prompt.tokens) + len(r.tokens) for g in groups for r in g.rollouts)
    if not c.share_prompts:
        return row_length(longest)
    largest = max(len(g.prompt.tokens) + sum(len(r.tokens) for r in g.rollouts) for g in groups)
    most = min(c.row_tokens, c.max_tokens_per_microbatch or c.row_tokens)
    return max(row_length(longest), min(row_length(largest), 1 << (most.bit_length() - 1)))


def units_of(
    group: Group, advantages_G: np.ndarray, weights_G: np.ndarray, T: int, share: bool
) -> list[Unit]:
    """A group's completions, behind as few copies of their prompt as rows of T tokens allow."""
    prompt = group.prompt.tokens
    completions = [
        Completion(rollout, float(advantage), float(weight))
        for rollout, advantage, weight in zip(group.rollouts, advantages_G, weights_G, strict=True)
    ]
    if not share:
        return [Unit(prompt, [completion]) for completion in completions]
    sizes = [len(rollout.tokens) for rollout in group.rollouts]
    return [
        Unit(prompt, [completions[i] for i in sorted(members)])
        for members in first_fit(sizes, T - len(prompt))
    ]


def first_fit(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Indices into `sizes`, in bins of at most `room`: the largest first, each into the first bin
    that has room for it (at most 11 / 9 of the fewest bins; Johnson et al. 1974)."""
    left = np.full(len(sizes), room)
    bins: list[list[int]] = []
    for i in np.argsort(-np.asarray(sizes), kind="stable").tolist():
        place = int(np.argmax(left >= sizes[i]))  # a bin that is not open yet has room for all
        if place == len(bins):
            bins.append([])
        bins[place].append(i)
        left[place] -= sizes[i]
    return bins


def few(count: int) -> int:
    """The next of 1, 1.25, 1.5 and 1.75 times a power of two: at most a fifth is padding."""
    step = max(1, (1 << (count - 1).bit_length()) // 8)
    return -(-count // step) * step


def padded_rows(rows: int, at_a_time: int | None, shards: int) -> int:
    """A multiple of `shards` and, if there are more rows than one micro-batch has, of its rows."""
    if at_a_time is not None and rows > at_a_time:
        return at_a_time * few(-(-rows // at_a_time))
    padded = shards * few(-(-rows // shards))
    return padded if at_a_time is None else min(padded, at_a_time)


def rows_of_microbatch(T: int, c: UpdateSection, shards: int) -> int | None:
    """Rows whose gradient is computed at a time, a multiple of `shards`; None: all of them."""
    limit = c.max_tokens_per_microbatch
    if limit is None:
        return None
    if limit < T:
        raise UserError(
            f"update.max_tokens_per_microbatch = {limit} is less than one row of {T} tokens; make "
            f"it at least {T}"
        )
    return max(limit // T // shards, 1) * shards


def empty_batch(B: int, T: int, C: int) -> TrainBatch:
    def zeros(width: int, dtype: type) -> np.ndarray:
        return np.zeros((B, width), dtype)

    tokens = [zeros(T, np.int32) for _ in range(4)]
    sampled = [zeros(C, np.int32) for _ in range(2)]
    return TrainBatch(*tokens, *sampled, *(zeros(C, np.float32) for _ in range(3)))


def fill_row(row: TrainBatch, units: Sequence[Unit]) -> None:
    """Writes the units end to end into `row`, whose arrays are [T] and [C]."""
    t = c = 0
    for group, unit in enumerate(units, start=1):
        start = len(unit.prompt)
        put_tokens(row, t, unit.prompt, 0, group, 0)
        last = t + start - 1
        t += start
        for branch, completion in enumerate(unit.completions, start=1):
            tokens = completion.rollout.tokens
            put_tokens(row, t, tokens, start, group, branch)
            row.predictor_BC[c : c + len(tokens)] = np.arange(t - 1, t - 1 + len(tokens))
            row.predictor_BC[c : c + len(tokens)][:1] = last
            put_targets(row, c, completion)
            t, c = t + len(tokens), c + len(tokens)


def put_tokens(
    row: TrainBatch, t: int, tokens: Sequence[int] | np.ndarray, start: int, group: int, branch: int
) -> None:
    """Tokens from slot `t` on, the first of them at position `start` of its sequence."""
    here = slice(t, t + len(tokens))
    row.tokens_BT[here] = tokens
    row.positions_BT[here] = np.arange(start, start + len(tokens))
    row.group_BT[here], row.branch_BT[here] = group, branch


def put_targets(row: TrainBatch, c: int, completion: Completion) -> None:
    rollout, advantage, weight = completion
    here = slice(c, c + len(rollout.tokens))
    trained = np.isfinite(rollout.logprobs) * weight
    row.targets_BC[here] = rollout.tokens
    row.loss_mask_BC[here] = trained
    row.behavior_logprobs_BC[here] = np.where(trained > 0, rollout.logprobs, 0.0)
    row.advantages_BC[here] = advantage
