"""What a step reports is what happened in it."""

import math

import numpy as np
import psutil
import pytest

from jaxrl import measure
from jaxrl.config import UpdateSection
from jaxrl.measure import (
    Clock,
    describe_advantages,
    describe_host,
    describe_lag,
    describe_packing,
    describe_rewards,
    describe_rollouts,
    describe_times,
)
from jaxrl.packing import pack
from jaxrl.types import Group, Prompt, Rollout


def group(prompt_tokens: int, *completions: tuple[int, str]) -> Group:
    """Completions as (length, finish reason)."""
    rollouts = tuple(
        Rollout(np.zeros(n, np.int32), np.zeros(n, np.float32), np.zeros(n, np.int64), reason, i)
        for i, (n, reason) in enumerate(completions)
    )
    return Group(Prompt(0, "", (1,) * prompt_tokens, {}), rollouts)


def test_rewards_are_described_by_the_known_ones():
    rewards_PG = np.array(
        [
            [1.0, 0.0, math.nan],
            [0.5, 0.5, 0.5],
            [1.0, math.nan, 1.0],
            [0.0, 5e-7, 0.0],
            [math.nan] * 3,
        ],
        np.float32,
    )
    weights_PG = np.array([[1.0, 1.0, 0.0], *[[0.0, 0.0, 0.0]] * 4], np.float32)
    found = describe_rewards(rewards_PG, weights_PG)
    known = [1.0, 0.0, 0.5, 0.5, 0.5, 1.0, 1.0, 0.0, 5e-7, 0.0]
    mean = sum(known) / 10
    assert found == pytest.approx(
        {
            "reward/mean": mean,
            "reward/std": math.sqrt(sum((r - mean) ** 2 for r in known) / 10),
            "reward/unknown": 5.0,
            "reward/fraction_groups_trained": 1 / 5,
            "reward/fraction_groups_all_lowest": 1 / 4,
            "reward/fraction_groups_all_full": 1 / 4,
            "reward/pass_at_k": 2 / 4,
        }
    )


def test_groups_of_several_rewards_are_solved_or_not_by_the_main_one():
    main_PG = np.array([[1.0, 0.0], [0.0, 0.0], [math.nan, math.nan]])
    found = describe_rewards(main_PG - 1.0, np.ones((3, 2)), main_PG)
    assert (found["reward/mean"], found["reward/unknown"]) == (-0.75, 2.0)
    assert (found["reward/pass_at_k"], found["reward/fraction_groups_all_full"]) == (0.5, 0.0)
    assert found["reward/fraction_groups_all_lowest"] == 0.5


def test_a_step_that_is_all_solved_has_no_lowest_groups():
    found = describe_rewards(np.ones((3, 2), np.float32), np.zeros((3, 2)))
    assert found["reward/fraction_groups_all_full"] == 1.0
    assert found["reward/fraction_groups_all_lowest"] == 0.0


def test_no_known_reward_and_nothing_trained_have_no_mean():
    found = describe_rewards(np.full((1, 2), math.nan), np.zeros((1, 2)))
    assert found.pop("reward/unknown") == 2.0
    assert found.pop("reward/fraction_groups_trained") == 0.0
    found |= describe_advantages(np.zeros((1, 2)), np.zeros((1, 2)))
    assert len(found) == 9 and all(math.isnan(value) for value in found.values())


def test_advantages_are_described_by_those_that_are_trained():
    advantages_PG = np.array([[1.0, -2.0, 9.0], [0.0, 4.0, -9.0]], np.float32)
    weights_PG = np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]], np.float32)
    assert describe_advantages(advantages_PG, weights_PG) == pytest.approx(
        {
            "advantage/mean": 0.75,
            "advantage/std": math.sqrt(sum((a - 0.75) ** 2 for a in (1, -2, 0, 4)) / 4),
            "advantage/min": -2.0,
            "advantage/max": 4.0,
        }
    )


def test_rollouts_are_described_by_their_lengths_and_ends():
    groups = [group(10, (3, "stop"), (8, "length")), group(20, (4, "stop"), (1, "stop"))]
    assert describe_rollouts(groups) == pytest.approx(
        {
            "prompt/mean_tokens": 15.0,
            "prompt/max_tokens": 20.0,
            "completion/mean_tokens": 4.0,
            "completion/min_tokens": 1.0,
            "completion/p95_tokens": 4 + 0.85 * (8 - 4),  # the place 0.95 * 3 among 1, 3, 4, 8
            "completion/max_tokens": 8.0,
            "completion/truncated": 0.25,
        }
    )


def test_lag_is_that_of_each_completion_s_oldest_token():
    groups = [group(1, (4, "stop"), (3, "stop")), group(1, (2, "stop"), (1, "stop"))]
    versions = [[5, 5, 6, 7], [7, 7, 7], [7, 6], [7]]
    for rollout, of_tokens in zip(
        [rollout for g in groups for rollout in g.rollouts], versions, strict=True
    ):
        rollout.versions[:] = of_tokens
    assert describe_lag(groups, 7, max_lag=3) == {
        "lag/max": 2,
        "lag/mean": 0.75,
        "lag/0": 0.5,
        "lag/1": 0.25,
        "lag/2": 0.25,
        "lag/3": 0.0,
        "completion/mean_versions": 1.75,
        "completion/max_versions": 3,
    }


@pytest.mark.parametrize(("alternate", "sampling_s"), [(True, 2.0), (False, 8.0)])
def test_a_step_s_time_is_shared_out_and_gives_its_speed(monkeypatch, alternate, sampling_s):
    groups = [group(10, (3, "stop"), (8, "length")), group(20, (4, "stop"), (1, "stop"))]
    now = iter([100.0, 102.0, 106.0, 107.0, 108.0])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(now))
    clock = Clock()
    for phase in ("rollout", "update", "wait"):
        clock.lap(phase)
    assert describe_times(clock, groups, alternate) == {
        "time/rollout_s": 2.0,
        "time/update_s": 4.0,
        "time/wait_s": 1.0,
        "time/step_s": 8.0,
        "time/idle_fraction": 3.0 / 8.0,
        "tokens_per_s/rollout": 16 / sampling_s,
        "tokens_per_s/train": (16 + 2 * 10 + 2 * 20) / 4.0,
    }


@pytest.mark.parametrize(("share", "tokens"), [(True, 10 + 11 + 20 + 5), (False, 21 + 45 + 10)])
def test_packing_is_described_by_how_full_rows_are_and_what_sharing_saved(share, tokens):
    groups = [group(10, (3, "stop"), (8, "length")), group(20, (4, "stop"), (1, "stop"))]
    c = UpdateSection(share_prompts=share)
    ones = np.ones((1, 2))
    batches = [pack([each], ones, ones, c) for each in groups]
    expected = {
        "pack/efficiency": tokens / sum(batch.tokens_BT.size for batch in batches),
        "pack/shared_prompt_saving": 1 - tokens / (21 + 45 + 10),
    }
    assert describe_packing(groups, batches) == pytest.approx(expected)


def test_laps_of_a_clock_share_out_the_step(monkeypatch):
    now = iter([100.0, 101.0, 103.5, 103.75])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(now))
    clock = Clock()
    clock.lap("rollout")
    clock.lap("update")
    assert clock.metrics() == {"time/rollout_s": 1.0, "time/update_s": 2.5, "time/step_s": 3.75}


def test_the_host_is_described_as_psutil_sees_it(tmp_path):
    host = describe_host(str(tmp_path))
    process = psutil.Process()
    assert host["host/resident_bytes"] == pytest.approx(process.memory_info().rss, rel=0.2)
    assert host["host/disk_free_bytes"] == pytest.approx(
        psutil.disk_usage(str(tmp_path)).free, rel=0.2
    )
    with (tmp_path / "open").open("w"):
        assert describe_host(str(tmp_path))["host/open_files"] == host["host/open_files"] + 1
