"""Rollouts -> rows of packed tokens, with few shapes in a run.

What is packed are units: a copy of a prompt and the completions behind it. Completions of a group
share a copy as far as a row has room for them; each has one of its own if they do not share.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrl.config import UpdateSection
from jaxrl.objectives.aggregation import Shares, token_mean
from jaxrl.types import Group, Rollout, TrainBatch, UserError

SHORTEST_ROW = 16  # tokens
LONGER = 6  # lengths beyond the least that a row may get


class Completion(NamedTuple):
    rollout: Rollout
    advantage: float
    share: float  # of the loss, of each of its tokens; 0 if it is not trained on


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


def few(count: int, to_an_octave: int = 8, multiple_of: int = 1) -> int:
    """The next of so many counts to an octave: a run meets few, and little is padding."""
    step = max(multiple_of, (1 << (count - 1).bit_length()) // (2 * to_an_octave))
    return -(-count // step) * step


def row_length(longest: int) -> int:
    """The next of sixteen lengths to an octave, a multiple of 16: the update is compiled once per
    length, not once per count of tokens."""
    return few(longest, 16, SHORTEST_ROW)


def minibatches(
    count: int, groups: Sequence[Group], *arrays_PG: np.ndarray
) -> list[tuple[Any, ...]]:
    """Groups, and the rows that arrays have of them, in `count` parts: in the order they come, and
    of numbers that differ by one at most. `count` is at most that of the groups."""
    bounds = [len(groups) * i // count for i in range(count + 1)]
    return [tuple(x[i:j] for x in (groups, *arrays_PG)) for i, j in itertools.pairwise(bounds)]


def pack(
    groups: Sequence[Group],
    advantages_PG: np.ndarray,
    weights_PG: np.ndarray,
    c: UpdateSection,
    shards: int = 1,
    key_cost: float = 0.0,
    shares: Shares = token_mean,
) -> TrainBatch:
    """Every completion behind its prompt, in as few rows as first-fit decreasing finds.

    A sampled token is trained on unless its completion's weight is 0 or its behaviour log-prob is
    not finite (engines have been seen to return NaN and -inf; no ratio can be made of those).

    Args:
      groups: P groups of at most G rollouts.
      advantages_PG: float32 [P, G]; of a smaller group its first.
      weights_PG: float32 [P, G], 1 for completions that are trained on, else 0.
      shards: parts that the mesh splits rows into; empty rows make B a multiple of it.
      key_cost: what attending to one key costs, in the rest of a token's work: long rows share
        prompts among more completions, and have more keys to attend to.
      shares: see `objectives.aggregation`.
    """
    layouts = [Layout.of(groups, T, c, shards) for T in row_lengths(groups, c)]
    layout = min(layouts, key=lambda layout: layout.cost(key_cost))
    tokens_PG = usable_tokens(groups, weights_PG.shape[1]) * weights_PG
    shares_PG = shares(tokens_PG) * weights_PG
    units = [
        unit
        for group, advantages_G, shares_G, members in zip(
            groups, advantages_PG, shares_PG, layout.members, strict=True
        )
        for unit in units_of(group, advantages_G, shares_G, members)
    ]
    rows = [[units[i] for i in row] for row in layout.rows]
    C = row_length(max(sum(unit.sampled for unit in row) for row in rows))
    batch = empty_batch(layout.B, layout.T, C)
    for b, row in enumerate(rows):
        fill_row(TrainBatch(*(array[b] for array in batch)), row)
    return batch


def usable_tokens(groups: Sequence[Group], group_size: int) -> np.ndarray:
    """How many tokens of each completion can be trained on: int [P, group_size]."""
    return of_each(groups, group_size, lambda rollout: np.isfinite(rollout.logprobs).sum())


def of_each(
    groups: Sequence[Group], group_size: int, count: Callable[[Rollout], int]
) -> np.ndarray:
    """What `count` says of each completion, 0 of those that a group lacks: int [P, group_size]."""
    counts_PG = np.zeros((len(groups), group_size), int)
    for counts_G, group in zip(counts_PG, groups, strict=True):
        counts_G[: len(group.rollouts)] = [count(rollout) for rollout in group.rollouts]
    return counts_PG


def row_lengths(groups: Sequence[Group], c: UpdateSection) -> list[int]:
    """Lengths of a row to choose from: what the longest completion and its prompt need and, where
    prompts are shared, some more, up to what the largest group needs if `update` allows that.

    Raises:
      UserError: a micro-batch has no room for the longest.
    """
    limit = c.max_tokens_per_microbatch
    longest = max(len(g.prompt.tokens) + len(r.tokens) for g in groups for r in g.rollouts)
    if limit is not None and limit < longest:
        raise UserError(
            f"update.max_tokens_per_microbatch = {limit} is less than the {longest} tokens of the "
            f"longest prompt and its completion; make it at least {longest}"
        )
    least = row_length(longest) if limit is None else min(row_length(longest), limit)
    if not c.share_prompts:
        return [least]
    largest = max(len(g.prompt.tokens) + sum(len(r.tokens) for r in g.rollouts) for g in groups)
    most = min(row_length(largest), c.row_tokens, limit or c.row_tokens)
    longer = {row_length(round(least * (most / least) ** (i / LONGER))) for i in range(1, LONGER)}
    return [least, *sorted(T for T in longer if least < T < most), *([most] * (most > least))]


class Layout(NamedTuple):
    """Which completions share a row of T tokens, and which a copy of their prompt there."""

    T: int
    B: int
    members: list[list[list[int]]]  # of each group, of each of its units: completions
    rows: list[list[int]]  # of each row: units, counted over all groups

    @classmethod
    def of(cls, groups: Sequence[Group], T: int, c: UpdateSection, shards: int) -> "Layout":
        """The layout for rows of T tokens. Members of a group share as few copies of their prompt
        as rows of that length allow; without sharing each has its own."""
        members, sizes = [], []
        for group in groups:
            lengths, start = [len(r.tokens) for r in group.rollouts], len(group.prompt.tokens)
            bins = [[i] for i in range(len(lengths))]
            if c.share_prompts:
                bins = [sorted(found) for found in first_fit(lengths, T - start)]
            members.append(bins)
            sizes += [start + sum(lengths[i] for i in found) for found in bins]
        rows = first_fit(sizes, T)
        B = shards * few(-(-len(rows) // shards))
        return cls(T, B, members, rows)

    def cost(self, key_cost: float) -> float:
        """Work of the update, in tokens that attend to nothing: a token sees half of its row."""
        return self.B * self.T * (1 + key_cost * self.T / 2)


def units_of(
    group: Group, advantages_G: np.ndarray, shares_G: np.ndarray, members: list[list[int]]
) -> list[Unit]:
    """A group's completions, each behind the copy of the prompt that `members` puts it behind."""
    there = slice(len(group.rollouts))
    completions = [
        Completion(rollout, float(advantage), float(share))
        for rollout, advantage, share in zip(
            group.rollouts, advantages_G[there], shares_G[there], strict=True
        )
    ]
    return [Unit(group.prompt.tokens, [completions[i] for i in unit]) for unit in members]


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


def rows_of_microbatch(B: int, T: int, limit: int, shards: int) -> int:
    """Rows whose gradient is computed at a time: the most that divide B evenly, whole rows of every
    shard, and have at most `limit` slots; at least one row of each shard."""
    most = max(limit // (T * shards), 1)
    return shards * max(rows for rows in range(1, most + 1) if B // shards % rows == 0)


def empty_batch(B: int, T: int, C: int) -> TrainBatch:
    def zeros(width: int, dtype: type) -> np.ndarray:
        return np.zeros((B, width), dtype)

    tokens = [zeros(T, np.int32) for _ in range(4)]
    sampled = [zeros(C, np.int32) for _ in range(3)]
    return TrainBatch(*tokens, *sampled, *(zeros(C, np.float32) for _ in range(4)))


def fill_row(row: TrainBatch, units: Sequence[Unit]) -> None:
    """Writes the units end to end into `row`, whose arrays are [T] and [C]."""
    t = c = n = 0
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
            n += 1
            put_targets(row, c, n, completion)
            t, c = t + len(tokens), c + len(tokens)


def put_tokens(
    row: TrainBatch, t: int, tokens: Sequence[int] | np.ndarray, start: int, group: int, branch: int
) -> None:
    """Tokens from slot `t` on, the first of them at position `start` of its sequence."""
    here = slice(t, t + len(tokens))
    row.tokens_BT[here] = tokens
    row.positions_BT[here] = np.arange(start, start + len(tokens))
    row.group_BT[here], row.branch_BT[here] = group, branch


def put_targets(row: TrainBatch, c: int, n: int, completion: Completion) -> None:
    """Sampled tokens from `c` on, of the row's n-th completion."""
    rollout, advantage, share = completion
    here = slice(c, c + len(rollout.tokens))
    trained = np.isfinite(rollout.logprobs) & (share > 0)
    row.targets_BC[here] = rollout.tokens
    row.completion_BC[here] = n
    row.loss_mask_BC[here] = trained
    row.behavior_logprobs_BC[here] = np.where(trained, rollout.logprobs, 0.0)
    row.advantages_BC[here] = advantage
    row.share_BC[here] = np.where(trained, share, 0.0)
