"""What a completion is worth.

A reward is a float; NaN means "unknown": the verifier failed, and the completion leaves its group
instead of being scored 0.
"""

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxrl.config import Config
from jaxrl.types import Prompt, UserError

Scorer = Callable[[str, Mapping[str, Any]], float]  # (answer, task) -> reward
Reward = Callable[[Prompt, str], float]  # (prompt, completion text) -> reward or NaN

log = logging.getLogger(__name__)


def make_reward(c: Config) -> Reward:
    """Returns reward(prompt, completion text), which never raises.

    Raises:
      UserError: the task's scorer or the answer pattern does not exist.
    """
    if c.reward.kind == "task":
        from jaxrl.rewards.tasks import task_scorer

        scorer = task_scorer(c.data.task or "")
    else:
        scorer = exact
    try:
        pattern = re.compile(c.reward.answer_pattern) if c.reward.answer_pattern else None
    except re.error as error:
        raise UserError(f"reward.answer_pattern: not a regular expression: {error}") from None

    def reward(prompt: Prompt, completion: str) -> float:
        try:
            value = float(scorer(extract(completion, pattern), prompt.task))
        except Exception as error:
            log.warning("the verifier failed on prompt %d: %r", prompt.id, error)
            return math.nan
        return value if math.isfinite(value) else math.nan

    return reward


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
    """Rewards of all completions, float32 [P, G], NaN where unknown; those that a prompt with fewer
    than `group_size` texts lacks stand behind the others, and are unknown."""
    rewards_PG = np.full((len(prompts), group_size), math.nan, np.float32)
    for rewards_G, prompt, texts in zip(rewards_PG, prompts, texts_PG, strict=True):
        rewards_G[: len(texts)] = [reward(prompt, text) for text in texts]
    return rewards_PG
