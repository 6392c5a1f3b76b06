"""The scorers of the reasoning-gym library (Stojanovski et al. 2025, arXiv:2505.24760)."""

from jaxrl.rewards import Scorer
from jaxrl.types import UserError


def task_scorer(task: str) -> Scorer:
    """The library's own scorer of `task`: 1.0 for a right answer, often a little for a near one."""
    try:
        import reasoning_gym
    except ImportError:
        raise UserError(
            "reward.kind = task needs the reasoning-gym library: pip install 'jaxrl-bridge[tasks]'"
        ) from None
    return reasoning_gym.get_score_answer_fn(task)
