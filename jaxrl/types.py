"""The nouns that travel round the loop.

NumPy and the standard library only: rollout workers import this file, and a worker that started
jax would reserve the accelerator memory that its engine needs.

Axis letters, used as name suffixes everywhere (`logprobs_BT` has shape [B, T]):

    P  prompts in one step            T  padded sequence length, prompt + completion
    G  completions of one prompt      V  vocabulary        D  hidden size      L  layers
    B  rows, B = P * G; the G rows of one prompt are adjacent

Every [B, T] array describes the token at its own position: `behavior_logprobs_BT[b, t]` is the
log-probability of `tokens_BT[b, t]` given `tokens_BT[b, :t]`. Column 0 has no prefix and is never
trained. The one shift between logits and tokens lives in `losses.token_logprobs`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np


class RunError(Exception):
    """The run cannot go on. Shown as one message, without a traceback: it says what was wrong,
    where, and the way out."""


class UserError(RunError):
    """Something the user can put right: a setting, a file, a missing package."""


@dataclasses.dataclass(frozen=True, slots=True)
class Prompt:
    """One question. `id` is its place in the data stream and identifies it, never its text."""

    id: int
    text: str
    tokens: tuple[int, ...]
    task: Mapping[str, Any]  # whatever the reward needs to judge an answer


@dataclasses.dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are drawn: from softmax(logits / temperature), nothing truncated.

    `temperature` 0 is greedy. A completion ends with the first of `stop_tokens`, which is kept as
    its last token, or after `max_new_tokens`.
    """

    n: int  # completions of each prompt
    max_new_tokens: int
    temperature: float
    stop_tokens: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Rollout:
    """One sampled completion, exactly as the engine sampled it."""

    tokens: np.ndarray  # int32 [t], the end-of-sequence token included when it was sampled
    logprobs: np.ndarray  # float32 [t], nats, of the sampling distribution
    versions: np.ndarray  # int64 [t], the weight version that sampled each token
    finish_reason: Literal["stop", "length"]
    seed: int


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Group:
    """All the completions of one prompt: the unit that GRPO compares."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class PublishReport:
    """What one publish did, once every engine that serves has acknowledged it."""

    version: int
    digest: str  # of the whole version, equal at both ends; "" where no bytes crossed
    bytes: int
    seconds: float
    engines: int  # that acknowledged
    probe_max_abs_dlogp: float  # nats, engine against trainer on the probe prompt


class TrainBatch(NamedTuple):
    """A NamedTuple, so that jax treats it as a pytree without this file importing jax."""

    tokens_BT: np.ndarray  # int32, right-padded
    loss_mask_BT: np.ndarray  # float32, 1 on trained tokens, 0 on prompt, padding and masked rows
    behavior_logprobs_BT: np.ndarray  # float32 nats, 0 where loss_mask_BT is 0
    advantages_B: np.ndarray  # float32
