"""The scorers of the reasoning-gym library (Stojanovski et al. 2025, arXiv:2505.24760)."""

from collections.abc import Callable, Mapping
from typing import Any

from jaxrl.types import UserError


def task_scorer(task: str) -> Callable[[str, Mapping[str, Any]], float]:
    """The library's own scorer of `task`: 1.0 for a right answer, often a little for a near one."""
    try:
        import reasoning_gym
    except ImportError:
        raise UserError(
            "reward.kind = task needs the reasoning-gym library: pip install 'jaxrl-bridge[tasks]'"
        ) from None
    try:
        scorer: Any = reasoning_gym.get_score_answer_fn(task)
    except ValueError as error:
        raise UserError(f"data.task = {task!r}: {error}") from None
    return scorer
