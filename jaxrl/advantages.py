"""Rewards of a group -> advantages. Pure functions of arrays.

On the host: they are few numbers, and a trip to the device costs more than computing them.
"""

from typing import NamedTuple

import numpy as np

EQUAL = 1e-6  # rewards closer than this are the same reward: floats that are summed differ in bits


class Advantages(NamedTuple):
    """`weights_PG` is 1 where a completion is trained on, 0 where it is left out."""

    advantages_PG: np.ndarray
    weights_PG: np.ndarray


def group_advantages(
    rewards_PG: np.ndarray,
    *,
    normalize_std: bool = True,
    mask_equal_rewards: bool = True,
    eps: float = 1e-6,
) -> Advantages:
    """How much better each completion is than its siblings.

        A_i = (R_i - mean(R)) / (std(R) + eps)

    std has Bessel's correction (ddof 1). Without `normalize_std` the difference alone remains.

    A reward that is not finite means "unknown" (the verifier failed): that completion leaves the
    group, its statistics and the loss. A group with fewer than two known rewards has nothing to
    compare and leaves the loss as well. A group whose known rewards are equal (within 1e-6) has
    advantage 0; with `mask_equal_rewards` it leaves the loss and its denominator too.

    Args:
      rewards_PG: float32 [P, G], NaN where unknown.

    Returns:
      float32 advantages and weights, both [P, G].

    Sources: GRPO, Shao et al. 2024, arXiv:2402.03300, section 4.1.2; the mean alone, Liu et al.
    2025 (Dr. GRPO), arXiv:2503.20783.
    """
    known_PG = np.isfinite(rewards_PG)
    count_P1 = known_PG.sum(axis=1, keepdims=True)
    rewards_PG = np.where(known_PG, rewards_PG, 0.0).astype(np.float64)

    mean_P1 = rewards_PG.sum(axis=1, keepdims=True) / np.maximum(count_P1, 1)
    centered_PG = np.where(known_PG, rewards_PG - mean_P1, 0.0)
    # Of the rewards, not of `centered_PG`: the mean of equal floats may differ from each of them.
    highest_P1 = np.where(known_PG, rewards_PG, -np.inf).max(axis=1, keepdims=True)
    lowest_P1 = np.where(known_PG, rewards_PG, np.inf).min(axis=1, keepdims=True)
    equal_P1 = highest_P1 - lowest_P1 <= EQUAL
    comparable_P1 = count_P1 >= 2

    scale_P1 = np.ones_like(mean_P1)
    if normalize_std:
        variance_P1 = (centered_PG**2).sum(axis=1, keepdims=True) / np.maximum(count_P1 - 1, 1)
        scale_P1 = np.sqrt(variance_P1) + eps
    advantages_PG = np.where(comparable_P1 & ~equal_P1, centered_PG / scale_P1, 0.0)
    trained_PG = known_PG & comparable_P1
    if mask_equal_rewards:
        trained_PG &= ~equal_P1
    return Advantages(advantages_PG.astype(np.float32), trained_PG.astype(np.float32))
