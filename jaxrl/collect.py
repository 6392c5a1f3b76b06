"""What the loop needs of the engines, and the seeds that make their samples repeatable."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import numpy as np

from jaxrl.types import Group, Prompt, PublishReport, Request, Rollout, Sampling

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

    def submit(self, requests: Sequence[Request], urgent: bool = False) -> list[Future[Group]]:
        """Samples each request as soon as there is room for it; returns at once.

        A request is sampled by weights no older than those that serve now, and may be sampled by
        newer ones from any token on. It is in the queue until its future is done; cancelling the
        future takes it out, or aborts it. Futures end with a Group, or raise EnginesGone (nobody
        is left to sample it) or another RunError (no engine would).

        Args:
          urgent: ahead of whatever waits already.
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
