"""Completions as padded arrays, for tools and users: whatever engines sample them.

Axis letters as in `jaxrl.types`: P prompts, G completions of each, T tokens of a prompt with its
padding, C = `max_new_tokens`, and S = T + C. No shape depends on what was sampled.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxrl.collect import seeds_for
from jaxrl.types import Group, Prompt, Request, Sampling

NOBODY: Mapping[str, Any] = {}  # judges what is generated here


class Submits(Protocol):
    """The part of `jaxrl.collect.Engines` that is needed here."""

    def submit(self, requests: Sequence[Request], urgent: bool = False) -> list[Future[Group]]: ...


@dataclasses.dataclass(frozen=True, slots=True)
class GenerationConfig:
    sampling: Sampling
    pad_id: int  # stands where there is no token
    seed: int = 0  # of the batch; a completion's is made of it, its prompt's row and its column
    straggler_s: float | None = None  # see Request
    timeout_s: float = 600.0  # for the whole batch


class Generated(NamedTuple):
    """Row p, column g is the completion that seed g of prompt p draws, with length 0 if it was
    left behind as a straggler. Prompts are padded on the left and completions on the right, so a
    sequence has its tokens in one run, and every completion begins in column T."""

    prompts_PT: np.ndarray  # int32
    prompt_mask_PT: np.ndarray  # bool, True on tokens
    completions_PGC: np.ndarray  # int32
    completion_mask_PGC: np.ndarray  # bool
    sequences_PGS: np.ndarray  # int32, prompt and completion
    sequence_mask_PGS: np.ndarray  # bool
    logprobs_PGC: np.ndarray  # float32 nats, of the sampling distribution; 0 on padding
    versions_PGC: np.ndarray  # int64, the weights that sampled each token; -1 on padding
    finish_PG: np.ndarray  # str: stop, length, or "" for one that was left behind
    lengths_PG: np.ndarray  # int32, sampled tokens


def generate(
    prompts: np.ndarray | Sequence[Sequence[int]],
    config: GenerationConfig,
    engines: Submits,
    mask: np.ndarray | None = None,
) -> Generated:
    """Samples `config.sampling.n` completions of each prompt.

    Args:
      prompts: int [P, T], with `mask`; or a list of lists of tokens, where T is the longest's
        length.
      mask: [P, T], true on tokens, which are one run at the left or right end of their row.

    Raises:
      ValueError: a prompt has no token, or gaps.
      TimeoutError: they were not there in time; nothing is sampled any more.
      jaxrl.types.RunError: no engine would sample one of them, or none is left.
    """
    rows = unpadded(prompts, mask)
    asked = [Prompt(index, "", tuple(row), NOBODY) for index, row in enumerate(rows)]
    seeds = seeds_for(config.seed, asked)
    futures = engines.submit(
        [
            Request(prompt, config.sampling, seed, config.straggler_s)
            for prompt, seed in zip(asked, seeds, strict=True)
        ]
    )
    try:
        done, _ = wait(futures, config.timeout_s, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
        if len(done) < len(futures):
            raise TimeoutError(
                f"{len(futures) - len(done)} of {len(futures)} prompts were not sampled within "
                f"{config.timeout_s:g} s"
            )
    finally:
        for future in futures:
            future.cancel()  # does nothing to one that is done
    width = np.shape(prompts)[1] if mask is not None else max(map(len, rows), default=0)
    return arrays([future.result() for future in futures], seeds, config, width)


def unpadded(
    prompts: np.ndarray | Sequence[Sequence[int]], mask: np.ndarray | None
) -> list[list[int]]:
    """The tokens of each prompt; see `generate`."""
    if mask is None:
        rows = [[int(token) for token in row] for row in prompts]
    else:
        tokens_PT, mask_PT = np.asarray(prompts), np.asarray(mask, bool)
        if tokens_PT.ndim != 2 or tokens_PT.shape != mask_PT.shape:
            raise ValueError(
                f"prompts of shape {tokens_PT.shape} have a mask of shape {mask_PT.shape}; both "
                "must be [P, T]"
            )
        for index, row in enumerate(mask_PT):
            if np.count_nonzero(row[1:] != row[:-1]) > 1:
                raise ValueError(
                    f"prompt {index}: its tokens are not one run at an end of its row, by its mask"
                )
        rows = [row[kept].tolist() for row, kept in zip(tokens_PT, mask_PT, strict=True)]
    if empty := [index for index, row in enumerate(rows) if not row]:
        raise ValueError(f"prompts {empty} have no tokens")
    return rows


def arrays(
    groups: Sequence[Group], seeds: Sequence[int], config: GenerationConfig, width: int
) -> Generated:
    """Groups, in the order of their prompts, as arrays with T = `width`."""
    shape = len(groups), config.sampling.n
    longest = config.sampling.max_new_tokens
    prompts_PT = np.full((len(groups), width), config.pad_id, np.int32)
    prompt_mask_PT = np.zeros(prompts_PT.shape, bool)
    completions_PGC = np.full((*shape, longest), config.pad_id, np.int32)
    completion_mask_PGC = np.zeros(completions_PGC.shape, bool)
    logprobs_PGC = np.zeros(completions_PGC.shape, np.float32)
    versions_PGC = np.full(completions_PGC.shape, -1, np.int64)
    finish_PG = np.full(shape, "", "<U6")
    for p, (group, seed) in enumerate(zip(groups, seeds, strict=True)):
        tokens = group.prompt.tokens
        prompts_PT[p, width - len(tokens) :] = tokens
        prompt_mask_PT[p, width - len(tokens) :] = True
        for rollout in group.rollouts:
            place = p, rollout.seed - seed, slice(len(rollout.tokens))
            completions_PGC[place] = rollout.tokens
            completion_mask_PGC[place] = True
            logprobs_PGC[place] = rollout.logprobs
            versions_PGC[place] = rollout.versions
            finish_PG[place[:2]] = rollout.finish_reason
    return Generated(
        prompts_PT=prompts_PT,
        prompt_mask_PT=prompt_mask_PT,
        completions_PGC=completions_PGC,
        completion_mask_PGC=completion_mask_PGC,
        sequences_PGS=_behind(prompts_PT, completions_PGC),
        sequence_mask_PGS=_behind(prompt_mask_PT, completion_mask_PGC),
        logprobs_PGC=logprobs_PGC,
        versions_PGC=versions_PGC,
        finish_PG=finish_PG,
        lengths_PG=completion_mask_PGC.sum(-1, dtype=np.int32),
    )


def _behind(array_PT: np.ndarray, array_PGC: np.ndarray) -> np.ndarray:
    """[P, G, T + C]: each completion behind its prompt."""
    shape = (*array_PGC.shape[:2], array_PT.shape[1])
    return np.concatenate([np.broadcast_to(array_PT[:, None], shape), array_PGC], axis=-1)
