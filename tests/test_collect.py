"""Seeds follow the prompt, and lag is counted from the oldest token."""

import numpy as np
import pytest

from jaxrl.collect import lag, seeds_for
from jaxrl.types import Group, Prompt, Rollout


def prompts(ids):
    return [Prompt(i, f"question {i % 3}", (1, 2), {}) for i in ids]


def group(*versions: list[int]) -> Group:
    rollouts = tuple(
        Rollout(np.zeros(len(v), np.int32), np.zeros(len(v), np.float32), np.array(v), "length", i)
        for i, v in enumerate(versions)
    )
    return Group(prompts([0])[0], rollouts)


def test_a_prompt_has_the_same_seed_in_whatever_batch_it_is():
    together = dict(zip(range(8), seeds_for(5, prompts(range(8))), strict=True))
    assert seeds_for(5, prompts([6, 2])) == [together[6], together[2]]


def test_seeds_are_those_of_every_earlier_release():
    """A resumed run must draw what the interrupted one would have drawn: the recipe is pinned."""
    expected = [
        int(np.random.SeedSequence([7, i]).generate_state(1, np.uint32)[0]) // 2 for i in range(5)
    ]
    assert seeds_for(7, prompts(range(5))) == expected


def test_seeds_differ_between_prompts_of_the_same_text_and_between_runs():
    seeds = [seed for run in range(4) for seed in seeds_for(run, prompts(range(500)))]
    assert len(set(seeds)) == len(seeds)


def test_seeds_leave_room_for_the_completions_of_a_group_in_32_bits():
    assert all(0 <= seed < 2**31 for seed in seeds_for(2**31 - 1, prompts(range(500))))


def test_lag_is_that_of_the_oldest_token():
    assert lag([group([4, 4], [4])], 4) == 0
    assert lag([group([4, 4], [4]), group([4], [3, 4])], 4) == 1
    assert lag([group([2, 3, 4])], 5) == 3


def test_a_token_from_the_future_is_an_error_that_names_its_version():
    with pytest.raises(ValueError, match=r"version 6\b.* newer than 5"):
        lag([group([5, 5]), group([5, 6])], 5)
