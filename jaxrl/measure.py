"""What a step is described by: its times, its rewards, its rollouts."""

import math
import os
import resource
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrl.advantages import EQUAL
from jaxrl.types import Group, PublishReport, TrainBatch

FULL = 1.0 - EQUAL  # rewards from here on are the full one of 1


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


def describe_rewards(
    rewards_PG: np.ndarray, weights_PG: np.ndarray, main_PG: np.ndarray | None = None
) -> dict[str, float]:
    """Fractions of groups, but that of trained ones, are of those with a known reward, and look at
    the main one of several alone: `main_PG`."""
    main_PG = rewards_PG if main_PG is None else main_PG
    known, known_PG = rewards_PG[np.isfinite(rewards_PG)], np.isfinite(main_PG)
    lowest_P = np.where(known_PG, main_PG, np.inf).min(axis=1)[known_PG.any(axis=1)]
    highest_P = np.where(known_PG, main_PG, -np.inf).max(axis=1)[known_PG.any(axis=1)]
    worst_P = (highest_P <= lowest_P.min(initial=np.inf) + EQUAL) & (highest_P < FULL)
    return {
        "reward/mean": _mean(known),
        "reward/std": float(known.std()) if known.size else math.nan,
        "reward/unknown": float(rewards_PG.size - known.size),
        "reward/fraction_groups_trained": float(weights_PG.any(axis=1).mean()),
        "reward/fraction_groups_all_lowest": _mean(worst_P),
        "reward/fraction_groups_all_full": _mean(lowest_P >= FULL),
        "reward/pass_at_k": _mean(highest_P >= FULL),
    }


def describe_advantages(advantages_PG: np.ndarray, weights_PG: np.ndarray) -> dict[str, float]:
    """Of the completions that are trained on; NaN if there are none."""
    trained = advantages_PG[weights_PG > 0]
    if not trained.size:
        trained = np.array([np.nan])
    return {
        "advantage/mean": float(trained.mean()),
        "advantage/std": float(trained.std()),
        "advantage/min": float(trained.min()),
        "advantage/max": float(trained.max()),
    }


def _mean(x: np.ndarray) -> float:
    return float(x.mean()) if x.size else math.nan


def describe_rollouts(groups: list[Group]) -> dict[str, float]:
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    lengths = np.array([len(rollout.tokens) for rollout in rollouts])
    prompts = np.array([len(group.prompt.tokens) for group in groups])
    return {
        "prompt/mean_tokens": float(prompts.mean()),
        "prompt/max_tokens": float(prompts.max()),
        "completion/mean_tokens": float(lengths.mean()),
        "completion/min_tokens": float(lengths.min()),
        "completion/p95_tokens": float(np.percentile(lengths, 95)),
        "completion/max_tokens": float(lengths.max()),
        "completion/truncated": float(np.mean([r.finish_reason == "length" for r in rollouts])),
    }


def describe_times(clock: Clock, groups: list[Group], alternate: bool) -> dict[str, float]:
    """What a step took; phases that failure left out are unknown.

    Args:
      alternate: the engines sample when the trainer waits for them, and not all the time.
    """
    times = clock.metrics()
    step_s, update_s = times["time/step_s"], clock.seconds.get("update", math.nan)
    waited_s = clock.seconds["rollout"] + clock.seconds.get("wait", 0.0)
    sampled = sum(len(rollout.tokens) for group in groups for rollout in group.rollouts)
    prompts = sum(len(group.prompt.tokens) * len(group.rollouts) for group in groups)
    return {
        **times,
        "time/idle_fraction": waited_s / step_s,
        "tokens_per_s/rollout": sampled / (clock.seconds["rollout"] if alternate else step_s),
        "tokens_per_s/train": (sampled + prompts) / update_s,
    }


def describe_publish(report: PublishReport) -> dict[str, Any]:
    """Of the last publish that is through."""
    return {
        **{f"publish/{name}_s": seconds for name, seconds in report.phases.items()},
        "weights/version_served": report.version,
        "publish/bytes": report.bytes,
        "publish/device_bytes": report.device_bytes,
        "publish/delta": int(report.base is not None),
        "publish/pause_s": report.pause_s,
        "publish/engines": report.engines,
        "publish/probe_max_abs_dlogp": report.probe_max_abs_dlogp,
        "fleet/replaced": report.replaced,
        "fleet/quarantined": report.quarantined,
    }


def describe_lag(groups: list[Group], version: int, max_lag: int) -> dict[str, float]:
    """How old completions are that are trained at `version`: `lag/i` is the share of those whose
    oldest token was sampled i versions ago. And how many versions sampled one of them."""
    of_each = [rollout.versions for group in groups for rollout in group.rollouts]
    lags = version - np.array([versions.min() for versions in of_each if versions.size])
    kinds = [np.unique(versions).size for versions in of_each]
    shares = {f"lag/{i}": float(np.mean(lags == i)) for i in range(max_lag + 1)}
    return {
        "lag/max": int(lags.max()),
        "lag/mean": float(lags.mean()),
        **shares,
        "completion/mean_versions": float(np.mean(kinds)),
        "completion/max_versions": max(kinds),
    }


def describe_packing(groups: list[Group], batches: Sequence[TrainBatch]) -> dict[str, float]:
    """How full the rows are, and which share of the tokens standing behind a prompt of their own
    would have needed was saved."""
    packed = sum(np.count_nonzero(batch.group_BT) for batch in batches)
    unshared = sum(
        len(group.prompt.tokens) + len(rollout.tokens)
        for group in groups
        for rollout in group.rollouts
    )
    return {
        "pack/efficiency": float(packed / sum(batch.group_BT.size for batch in batches)),
        "pack/shared_prompt_saving": float(1 - packed / unshared),
    }


def describe_host(folder: str) -> dict[str, int]:
    """This process, and the disk that `folder` is on (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "host/resident_bytes": pages * resource.getpagesize(),
        "host/open_files": len(os.listdir("/proc/self/fd")),
        "host/disk_free_bytes": shutil.disk_usage(folder).free,
    }
