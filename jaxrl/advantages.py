"""Rewards -> advantages. Pure functions of arrays.

On the host: they are few numbers, and a trip to the device costs more than computing them.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxrl.config import AlgorithmSection
from jaxrl.objectives.custom import is_custom, load
from jaxrl.types import UserError

EQUAL = 1e-6  # rewards closer than this are the same reward: floats that are summed differ in bits
EPS = 1e-6  # added to a standard deviation


class Advantages(NamedTuple):
    """`weights_PG` is 1 where a completion is trained on, 0 where it is left out."""

    advantages_PG: np.ndarray
    weights_PG: np.ndarray


def estimate_advantages(
    rewards_PG: np.ndarray,
    tokens_PG: np.ndarray,
    c: AlgorithmSection,
    *,
    parts_PGR: np.ndarray | None = None,
    parts_weights_R: np.ndarray | None = None,
    lengths_PG: np.ndarray | None = None,
    truncated_PG: np.ndarray | None = None,
) -> Advantages:
    """How much better each completion is than was to be expected, by `algorithm.advantage`.

    A reward that is not finite means "unknown" (the verifier failed): that completion leaves the
    group, all statistics and the loss. So does one whose length is outside `length_bounds`. A group
    with fewer than two known rewards has nothing to compare and leaves them as well. A group whose
    known rewards are equal (within 1e-6), for `gdpo` in each part that has a weight, has exactly
    equal ones for the estimator; with `mask_equal_rewards` it leaves like an unknown. With
    `mask_truncated` truncated completions leave the loss, and nothing else.

    `none` asks for no reward: every advantage is 0, and unknown rewards leave nothing out.

    Args:
      rewards_PG: float32 [P, G], NaN where unknown.
      tokens_PG: int [P, G], how many tokens of each completion can be trained on.
      parts_PGR: float32 [P, G, R], what `rewards_PG` is the weighted sum of; `gdpo` alone looks at
        them. None: a reward is its only part.
      parts_weights_R: float [R], their weights.
      lengths_PG: int [P, G], sampled tokens; for `length_bounds`. None: `tokens_PG`.
      truncated_PG: bool [P, G], which completions ended at their length limit; for
        `mask_truncated`. None: none did.

    Returns:
      float32 advantages and weights, both [P, G].

    Raises:
      UserError: the estimator is the user's own, and cannot be called, or returns something else
        than [P, G].
    """
    lengths_PG = tokens_PG if lengths_PG is None else lengths_PG
    fewest, most = c.length_bounds or (0, np.inf)
    kept_PG = (fewest <= lengths_PG) & (lengths_PG <= most)
    in_loss_PG = kept_PG
    if c.mask_truncated and truncated_PG is not None:
        in_loss_PG = kept_PG & ~truncated_PG
    if c.advantage == "none":
        return Advantages(np.zeros(kept_PG.shape, np.float32), in_loss_PG.astype(np.float32))
    known_PG = kept_PG & np.isfinite(rewards_PG)
    if c.advantage != "gdpo" or parts_PGR is None or parts_weights_R is None:
        parts_PGR, parts_weights_R = rewards_PG[:, :, None], np.ones(1)

    known_PG1 = known_PG[:, :, None]
    parts_PGR = np.where(known_PG1, parts_PGR, 0.0).astype(np.float64)
    # Of the rewards themselves: the mean of equal floats may differ from each of them.
    highest_P1R = np.where(known_PG1, parts_PGR, -np.inf).max(axis=1, keepdims=True)
    lowest_P1R = np.where(known_PG1, parts_PGR, np.inf).min(axis=1, keepdims=True)
    equal_P1R = highest_P1R - lowest_P1R <= EQUAL
    trained_PG = known_PG & (known_PG.sum(axis=1, keepdims=True) >= 2)
    if c.mask_equal_rewards:
        trained_PG &= ~(equal_P1R | (parts_weights_R == 0)).all(axis=2)

    parts_PGR = np.where(equal_P1R, lowest_P1R, parts_PGR)
    parts_PGR = np.where(trained_PG[:, :, None], parts_PGR, np.nan)
    tokens_PG = np.where(trained_PG, tokens_PG, 0)
    advantages_PG = _estimate(c.advantage, parts_PGR, parts_weights_R, tokens_PG)
    trained_PG &= in_loss_PG & np.isfinite(advantages_PG)
    advantages_PG = np.where(trained_PG, advantages_PG, 0.0)
    return Advantages(advantages_PG.astype(np.float32), trained_PG.astype(np.float32))


# An estimator is a function of rewards [P, G], float64 and NaN for completions that are left out,
# and of the tokens that each trains, 0 for those. Completions with NaN in its result leave as well.
# gdpo alone is one of several rewards.
Estimator = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _estimate(
    name: str, parts_PGR: np.ndarray, weights_R: np.ndarray, tokens_PG: np.ndarray
) -> np.ndarray:
    if name == "gdpo":
        return gdpo(parts_PGR, weights_R)
    rewards_PG = parts_PGR[:, :, 0]
    if not is_custom(name):
        return OWN[name](rewards_PG, tokens_PG)
    advantages_PG = np.asarray(load("advantage", name)(rewards_PG, tokens_PG))
    if advantages_PG.shape != rewards_PG.shape:
        raise UserError(
            f"algorithm.advantage = {name}: it returned shape {advantages_PG.shape} where one "
            f"advantage for each completion, {rewards_PG.shape}, was expected"
        )
    return advantages_PG


def grpo(rewards_PG: np.ndarray, _: np.ndarray) -> np.ndarray:
    """(R - mean of the group) / (std of the group + eps); ddof 1.

    Shao et al. 2024, arXiv:2402.03300, section 4.1.2.
    """
    return _centered(rewards_PG) / (_deviation(rewards_PG, axis=1) + EPS)


def dr_grpo(rewards_PG: np.ndarray, _: np.ndarray) -> np.ndarray:
    """R - mean of the group. Liu et al. 2025, arXiv:2503.20783."""
    return _centered(rewards_PG)


def rloo(rewards_PG: np.ndarray, _: np.ndarray) -> np.ndarray:
    """R - mean of the siblings' rewards. Ahmadian et al. 2024, arXiv:2402.14740."""
    count_P1 = _count(rewards_PG, axis=1)
    return _centered(rewards_PG) * count_P1 / np.maximum(count_P1 - 1, 1)


def reinforce_pp(rewards_PG: np.ndarray, tokens_PG: np.ndarray) -> np.ndarray:
    """R whitened over the batch's tokens: (R - mean) / (std + eps), where a completion counts as
    often as it has tokens; ddof 1. Hu et al. 2025, arXiv:2501.03262, at discount 1."""
    return _whitened(rewards_PG, tokens_PG)


def reinforce_pp_baseline(rewards_PG: np.ndarray, tokens_PG: np.ndarray) -> np.ndarray:
    """R - mean of the group, whitened over the batch's tokens. As `reinforce_pp`."""
    return _whitened(_centered(rewards_PG), tokens_PG)


def batch_std(rewards_PG: np.ndarray, _: np.ndarray) -> np.ndarray:
    """(R - mean of the group) / (std of all rewards + eps); ddof 1. LitePPO, arXiv:2508.08221."""
    return _centered(rewards_PG) / (_deviation(rewards_PG, axis=None) + EPS)


def scalerl(rewards_PG: np.ndarray, _: np.ndarray) -> np.ndarray:
    """A = R - mean of the group, over (std of all A + eps); ddof 1. Unlike `batch_std` it does not
    see how far apart the means of groups are. Khatri et al. 2025, arXiv:2510.13786, section 4."""
    centered_PG = _centered(rewards_PG)
    return centered_PG / (_deviation(centered_PG, axis=None) + EPS)


def gdpo(parts_PGR: np.ndarray, weights_R: np.ndarray) -> np.ndarray:
    """A = weighted sum of (R - mean of the group) / (std of the group + eps) of each reward, over
    (std of all A + eps); ddof 1. Liu et al. 2026, arXiv:2601.05242.

    The paper subtracts the mean of all A too. It is that of the groups, which is 0.
    """
    normalized_PGR = _centered(parts_PGR) / (_deviation(parts_PGR, axis=1) + EPS)
    sum_PG = (normalized_PGR * weights_R).sum(axis=2)
    return sum_PG / (_deviation(sum_PG, axis=None) + EPS)


def maxrl(rewards_PG: np.ndarray, _: np.ndarray) -> np.ndarray:
    """(R - mean) / mean of the group, for rewards of 0 and more; 0 where the mean is not positive.

    arXiv:2602.02710.
    """
    mean_P1 = _mean(rewards_PG, axis=1)
    return _centered(rewards_PG) / np.where(mean_P1 > EQUAL, mean_P1, np.inf)


def pass_at_k(rewards_PG: np.ndarray, _: np.ndarray) -> np.ndarray:
    """(R - second best of the group) / (std of the group + eps) for the best, 0 for the others:
    what the best of k completions, the group, owes to this one. arXiv:2503.19595."""
    known_PG = np.isfinite(rewards_PG)
    ranked_PG = np.sort(np.where(known_PG, rewards_PG, -np.inf), axis=1)
    ahead_PG = np.maximum(rewards_PG - ranked_PG[:, -2:][:, :1], 0.0)
    return ahead_PG / (_deviation(rewards_PG, axis=1) + EPS)


OWN: dict[str, Estimator] = {
    estimator.__name__: estimator
    for estimator in (
        grpo,
        dr_grpo,
        rloo,
        reinforce_pp,
        reinforce_pp_baseline,
        batch_std,
        scalerl,
        maxrl,
        pass_at_k,
    )
}


# Of what is finite, with the reduced axes kept. Without any the results are 0.


def _count(x_PG: np.ndarray, axis: int | None) -> np.ndarray:
    return np.isfinite(x_PG).sum(axis=axis, keepdims=True)


def _mean(x_PG: np.ndarray, axis: int | None) -> np.ndarray:
    return np.nansum(x_PG, axis=axis, keepdims=True) / np.maximum(_count(x_PG, axis), 1)


def _centered(x_PG: np.ndarray) -> np.ndarray:
    """Minus the group's mean; exactly 0 where all of a group are the same float."""
    lowest_P1 = np.where(np.isfinite(x_PG), x_PG, np.inf).min(axis=1, keepdims=True)
    above_PG = x_PG - lowest_P1
    return above_PG - _mean(above_PG, axis=1)


def _deviation(x_PG: np.ndarray, axis: int | None) -> np.ndarray:
    squares_PG = (x_PG - _mean(x_PG, axis)) ** 2
    freedom = np.maximum(_count(x_PG, axis) - 1, 1)
    return np.sqrt(np.nansum(squares_PG, axis=axis, keepdims=True) / freedom)


def _whitened(x_PG: np.ndarray, tokens_PG: np.ndarray) -> np.ndarray:
    total = max(tokens_PG.sum(), 1)
    mean = np.nansum(x_PG * tokens_PG) / total
    variance = np.nansum((x_PG - mean) ** 2 * tokens_PG) / max(total - 1, 1)
    return (x_PG - mean) / (np.sqrt(variance) + EPS)
