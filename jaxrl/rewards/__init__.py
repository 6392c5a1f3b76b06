"""What a completion is worth.

A completion has one reward or several, of which it is worth the weighted sum. A reward is a float;
NaN means "unknown": the verifier failed, and the completion leaves its group instead of being
scored 0.
"""

import dataclasses
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxrl.config import Config, FurtherReward
from jaxrl.objectives.custom import load_function
from jaxrl.types import Prompt, UserError

Scorer = Callable[[str, Mapping[str, Any]], float]  # (answer, task) -> reward
Judge = Callable[[Prompt, str], float]  # (prompt, completion text) -> reward; it may raise

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Reward:
    """All that completions are judged by; the main reward is the first."""

    names: tuple[str, ...]  # of R rewards
    weights: np.ndarray  # float64 [R]
    judges: tuple[Judge, ...]

    def __call__(self, prompt: Prompt, completion: str) -> np.ndarray:
        """The rewards of a completion's text: float32 [R], NaN where unknown. Never raises."""
        return np.array(
            [
                judged(name, judge, prompt, completion)
                for name, judge in zip(self.names, self.judges, strict=True)
            ],
            np.float32,
        )


def judged(name: str, judge: Judge, prompt: Prompt, completion: str) -> float:
    try:
        value = float(judge(prompt, completion))
    except Exception as error:
        log.warning("the verifier %s failed on prompt %d: %r", name, prompt.id, error)
        return math.nan
    return value if math.isfinite(value) else math.nan


def make_reward(c: Config) -> Reward:
    """The rewards of `reward.*`.

    Raises:
      UserError: the task's scorer or a function does not exist, or a pattern is none.
    """
    also = c.reward.also
    return Reward(
        (c.reward.kind, *also),
        np.array([c.reward.weight, *(further.weight for further in also.values())]),
        (main_judge(c), *(further_judge(name, further) for name, further in also.items())),
    )


def main_judge(c: Config) -> Judge:
    if c.reward.kind == "task":
        from jaxrl.rewards.tasks import task_scorer

        scorer = task_scorer(c.data.task or "")
    else:
        scorer = exact
    answer_pattern = c.reward.answer_pattern
    pattern = compiled("reward.answer_pattern", answer_pattern) if answer_pattern else None
    return lambda prompt, completion: scorer(extract(completion, pattern), prompt.task)


def further_judge(name: str, c: FurtherReward) -> Judge:
    key = f"reward.also.{name}"
    if c.function is not None:
        function = load_function(f"{key}.function", c.function, ("prompt", "completion", "task"))
        return lambda prompt, completion: function(prompt.text, completion, prompt.task)
    assert c.matches is not None
    pattern = compiled(f"{key}.matches", c.matches)
    return lambda _, completion: float(pattern.search(completion) is not None)


def compiled(key: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{key}: not a regular expression: {error}") from None


def extract(completion: str, pattern: re.Pattern[str] | None) -> str:
    """The answer in a completion: the last match of `pattern`, or the whole text; stripped."""
    if pattern is None:
        return completion.strip()
    matches = list(pattern.finditer(completion))
    if not matches:
        return ""
    return (matches[-1].group(1 if pattern.groups else 0) or "").strip()


def exact(answer: str, task: Mapping[str, Any]) -> float:
    """1.0 if the answer is the reference, else 0.0."""
    return float(answer == str(task["answer"]).strip())


def score(
    reward: Reward, prompts: Sequence[Prompt], texts_PG: Sequence[Sequence[str]], group_size: int
) -> np.ndarray:
    """Rewards of all completions, float32 [P, G, R], NaN where unknown; those that a prompt with
    fewer than `group_size` texts lacks stand behind the others, and are unknown."""
    shape = (len(prompts), group_size, len(reward.names))
    rewards_PGR = np.full(shape, math.nan, np.float32)
    for rewards_GR, prompt, texts in zip(rewards_PGR, prompts, texts_PG, strict=True):
        for g, text in enumerate(texts):
            rewards_GR[g] = reward(prompt, text)
    return rewards_PGR


def total(rewards: np.ndarray, weights_R: np.ndarray) -> np.ndarray:
    """The sum over R of `rewards`, [..., R], each with its weight; NaN where one is unknown, also
    one without weight."""
    return (rewards * weights_R).sum(axis=-1).astype(np.float32)


def with_overlong(
    rewards_PGR: np.ndarray, weights_R: np.ndarray, lengths_PG: np.ndarray, c: Config
) -> tuple[np.ndarray, np.ndarray]:
    """`rewards_PGR` and their weights with one more: the penalty of `reward.overlong_tokens`,
    from 0 to -1 at the limit of the length (Yu et al. 2025, arXiv:2503.14476, eq. 13).

    Args:
      lengths_PG: int [P, G], sampled tokens.
    """
    buffer = c.reward.overlong_tokens
    if buffer is None:
        return rewards_PGR, weights_R
    over_PG = (lengths_PG - (c.rollout.max_new_tokens - buffer)) / buffer
    penalties_PG1 = -np.clip(over_PG, 0.0, 1.0)[:, :, None]
    rewards_PGS = np.concatenate([rewards_PGR, penalties_PG1], axis=2, dtype=np.float32)
    return rewards_PGS, np.append(weights_R, c.reward.overlong_penalty)


def describe_each(
    names: Sequence[str], rewards_PGR: np.ndarray, weights_R: np.ndarray
) -> dict[str, float]:
    """The mean of each reward that has a name, of completions where it is known, and the mean
    penalty of those where all are, if `with_overlong` put it behind them."""

    def mean(x: np.ndarray) -> float:
        known = x[np.isfinite(x)]
        return float(known.mean()) if known.size else math.nan

    found = {f"reward/{name}/mean": mean(rewards_PGR[:, :, r]) for r, name in enumerate(names)}
    if rewards_PGR.shape[2] > len(names):
        known_PG = np.isfinite(rewards_PGR).all(axis=2)
        found["reward/overlong_mean"] = mean(-weights_R[-1] * rewards_PGR[known_PG][:, -1])
    return found
