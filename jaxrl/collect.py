"""What the loop needs of the engines, and the seeds that make their samples repeatable."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from jaxrl.types import Group, Prompt, PublishReport, Rollout, Sampling

Publish = Callable[[Any, int], PublishReport]  # (params, version)


class Engines(Protocol):
    """Whatever samples completions: `sampler.InProcessEngine`, `bridge.fleet.Fleet`."""

    def begin(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]
    ) -> Callable[[], list[Group]]:
        """Starts to sample `sampling.n` rollouts of each prompt, every token by the newest
        published weights. Sample i of prompt p is drawn with seed `seeds[p] + i`.

        Returns at once; what it returns waits for the groups, which are in the order of `prompts`,
        or raises EnginesGone. Nothing is published meanwhile.
        """
        ...

    def close(self) -> None: ...


def seeds_for(run_seed: int, prompts: Sequence[Prompt]) -> list[int]:
    """A seed below 2^31 for each prompt, of the run's seed and the prompt's identity alone: a
    prompt that is dispatched again, by a resumed run too, is drawn with the same seed."""
    return [
        int(np.random.SeedSequence([run_seed, prompt.id]).generate_state(1)[0] >> 1)
        for prompt in prompts
    ]


def lag(groups: Sequence[Group], trained_version: int) -> int:
    """Versions between the weights being trained and the oldest sampled token.

    Raises:
      ValueError: a token from the future: some version was stamped wrongly.
    """
    rollouts: list[Rollout] = [rollout for group in groups for rollout in group.rollouts]
    versions = np.concatenate([rollout.versions for rollout in rollouts])
    if versions.max() > trained_version:
        raise ValueError(
            f"a token carries weight version {versions.max()}, newer than {trained_version}"
        )
    return trained_version - int(versions.min())
