"""Rollouts -> one batch of fixed shape, with few shapes in a run."""

from collections.abc import Sequence

import numpy as np

from jaxrl.types import Group, TrainBatch

SHORTEST_ROW = 16  # tokens


def row_length(longest: int) -> int:
    """The next power of two: a run compiles the update once per power, not once per length."""
    return max(SHORTEST_ROW, 1 << (longest - 1).bit_length())


def pack(groups: Sequence[Group], advantages_PG: np.ndarray, weights_PG: np.ndarray) -> TrainBatch:
    """One completion a row, behind its prompt, right-padded; siblings adjacent.

    A sampled token is trained on unless its completion's weight is 0 or its behaviour log-prob is
    not finite (engines have been seen to return NaN and -inf; no ratio can be made of those).

    Args:
      groups: P groups of G rollouts.
      advantages_PG: float32 [P, G].
      weights_PG: float32 [P, G], 1 for completions that are trained on, else 0.
    """
    rollouts = [(group.prompt, rollout) for group in groups for rollout in group.rollouts]
    T = row_length(max(len(prompt.tokens) + len(rollout.tokens) for prompt, rollout in rollouts))
    B = len(rollouts)
    tokens_BT = np.zeros((B, T), np.int32)
    mask_BT = np.zeros((B, T), np.float32)
    logprobs_BT = np.zeros((B, T), np.float32)
    for b, (prompt, rollout) in enumerate(rollouts):
        start, end = len(prompt.tokens), len(prompt.tokens) + len(rollout.tokens)
        usable = np.isfinite(rollout.logprobs)
        tokens_BT[b, :start] = prompt.tokens
        tokens_BT[b, start:end] = rollout.tokens
        logprobs_BT[b, start:end] = np.where(usable, rollout.logprobs, 0.0)
        mask_BT[b, start:end] = usable * weights_PG.reshape(B)[b]
    return TrainBatch(tokens_BT, mask_BT, logprobs_BT * mask_BT, advantages_PG.reshape(B))
