"""Beam search: which beginnings of a completion go on, and which completions are the best.

Numbers in, numbers out; whoever has a model asks it for the log-probs of each step. It is the
search of vLLM's own `beam_search` with its default length penalty, and finds what that finds: a
completion is worth the sum of its log-probs divided by the tokens of prompt and completion, without
the stop token that ends it.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from jaxrl.types import Sampling


@dataclasses.dataclass(frozen=True, slots=True)
class Beam:
    """A completion, or the beginning of one."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()  # nats, of each token given those before it
    total: float = 0.0  # of `logprobs`
    stopped: bool = False  # its last token is a stop token


@dataclasses.dataclass(frozen=True, slots=True)
class Search:
    """A search under way: while it is not `over`, `step` gives the next."""

    prompt: int  # tokens, at least one
    sampling: Sampling  # its n, beams, max_new_tokens and stop_tokens
    live: tuple[Beam, ...] = (Beam(),)  # all of one length, the likeliest first
    stopped: tuple[Beam, ...] = ()  # the n best

    @property
    def wanted(self) -> int:
        """Tokens, the likeliest, whose log-probs a step must know: then as many beams go on as
        there may be, however many candidates stop."""
        return self.sampling.beams + max(self.sampling.beams, len(self.sampling.stop_tokens))

    @property
    def over(self) -> bool:
        """Whether nothing that is still to come could be among the `n` best."""
        if not self.live or len(self.live[0].tokens) == self.sampling.max_new_tokens:
            return True
        if len(self.stopped) < self.sampling.n:
            return False
        # No token adds to a sum of log-probs, and none makes a completion longer than the longest.
        longest = self.prompt + self.sampling.max_new_tokens
        return self._score(self.stopped[-1]) >= self.live[0].total / longest

    def step(self, likeliest: Sequence[Mapping[int, float]]) -> "Search":
        """One token more.

        Args:
          likeliest: for each of `live` the log-probs of the `wanted` likeliest tokens after it, or
            of the whole vocabulary if it has no more; in nats, the likeliest first.
        """
        stop_tokens = set(self.sampling.stop_tokens)
        candidates = [
            (beam.total + logprob, beam, token, logprob)
            for beam, logprobs in zip(self.live, likeliest, strict=True)
            for token, logprob in logprobs.items()
        ]
        candidates.sort(key=lambda candidate: -candidate[0])  # the earlier beam's of two equal ones
        stopped, live = list(self.stopped), []
        for total, beam, token, logprob in candidates:
            stops = token in stop_tokens
            if stops or len(live) < self.sampling.beams:
                tokens, logprobs = (*beam.tokens, token), (*beam.logprobs, logprob)
                (stopped if stops else live).append(Beam(tokens, logprobs, total, stops))
        return dataclasses.replace(self, live=tuple(live), stopped=self._best(stopped))

    def completions(self) -> tuple[Beam, ...]:
        """Of a search that is over, the `n` best, the best first; fewer if there are no more."""
        return self._best([*self.stopped, *self.live])

    def _best(self, beams: Sequence[Beam]) -> tuple[Beam, ...]:
        return tuple(sorted(beams, key=self._score, reverse=True)[: self.sampling.n])

    def _score(self, beam: Beam) -> float:
        return beam.total / (self.prompt + len(beam.tokens) - beam.stopped)
