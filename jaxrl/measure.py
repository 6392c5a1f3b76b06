"""What a step is described by: its times, its rewards, its rollouts."""

import time

import numpy as np

from jaxrl.types import Group, TrainBatch


class Clock:
    """Seconds of each phase of one step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = now - self._last
        self._last = now

    def metrics(self) -> dict[str, float]:
        laps = {f"time/{phase}_s": seconds for phase, seconds in self.seconds.items()}
        return laps | {"time/step_s": time.perf_counter() - self._start}


def describe_rewards(rewards_PG: np.ndarray, weights_PG: np.ndarray) -> dict[str, float]:
    known = rewards_PG[np.isfinite(rewards_PG)]
    return {
        "reward/mean": float(known.mean()) if known.size else float("nan"),
        "reward/std": float(known.std()) if known.size else float("nan"),
        "reward/unknown": float(rewards_PG.size - known.size),
        "reward/fraction_groups_trained": float(weights_PG.any(axis=1).mean()),
    }


def describe_rollouts(groups: list[Group], rollout_s: float, update_s: float) -> dict[str, float]:
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    lengths = np.array([len(rollout.tokens) for rollout in rollouts])
    prompts = sum(len(group.prompt.tokens) * len(group.rollouts) for group in groups)
    return {
        "completion/mean_tokens": float(lengths.mean()),
        "completion/max_tokens": float(lengths.max()),
        "completion/truncated": float(np.mean([r.finish_reason == "length" for r in rollouts])),
        "tokens_per_s/rollout": float(lengths.sum() / rollout_s),
        "tokens_per_s/train": float((lengths.sum() + prompts) / update_s),
    }


def describe_packing(groups: list[Group], batch: TrainBatch) -> dict[str, float]:
    """How full the rows are, and which share of the tokens standing behind a prompt of their own
    would have needed was saved."""
    packed = np.count_nonzero(batch.group_BT)
    unshared = sum(
        len(group.prompt.tokens) + len(rollout.tokens)
        for group in groups
        for rollout in group.rollouts
    )
    return {
        "pack/efficiency": float(packed / batch.group_BT.size),
        "pack/shared_prompt_saving": float(1 - packed / unshared),
    }
