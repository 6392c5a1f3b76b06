"""The nouns that travel round the loop.

NumPy and the standard library only: rollout workers import this file, and a worker that started
jax would reserve the accelerator memory that its engine needs.

Axis letters, used as name suffixes everywhere (`logprobs_BT` has shape [B, T]):

    P  prompts in one step            T  tokens of a row, padding included
    G  completions of one prompt      C  sampled tokens of a row, padding included
    B  rows of a batch                V  vocabulary        D  hidden size      L  layers
    R  rewards of one completion

A row holds prompts and the completions behind them, end to end (`TrainBatch`). What the model
computes has axis T, what is trained on has axis C: every [B, C] array describes one sampled token,
and `behavior_logprobs_BC[b, c]` is the log-probability of `targets_BC[b, c]` given what it was
sampled behind. The one shift between hidden states and tokens lives in `predictor_BC`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np


class RunError(Exception):
    """The run cannot go on. Shown as one message, without a traceback: it says what was wrong,
    where, and the way out."""


class EnginesGone(RunError):
    """No engine is left that serves, and none is to come."""


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
class Example(Prompt):
    """A prompt with the completion that is to be learned."""

    completion: tuple[int, ...]  # its end-of-sequence token included


MOST_BEAMS = 64  # of one search


@dataclasses.dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are drawn: from softmax(logits / temperature), unless an option below `n`
    changes that distribution, which training refuses (`exact`).

    `temperature` 0 is greedy. A completion ends with the first of `stop_tokens`, which is kept as
    its last token, with the token that completes one of `stop_strings`, or after `max_new_tokens`.
    With `beams` > 1 nothing is drawn: they are the n best that a beam search of that width finds
    (`bridge.beam`), which wants temperature 0 and no option of the distribution.
    """

    n: int  # completions of each prompt
    max_new_tokens: int
    temperature: float
    stop_tokens: tuple[int, ...]
    stop_strings: tuple[str, ...] = ()
    top_p: float = 1.0  # 1: off
    top_k: int = 0  # 0: off
    min_p: float = 0.0  # 0: off
    repetition_penalty: float = 1.0  # 1: off
    bad_words: tuple[str, ...] = ()  # never sampled
    regex: str | None = None  # that a completion must match
    json_schema: str | None = None  # that a completion must satisfy, as JSON
    beams: int = 1  # of a beam search, n to MOST_BEAMS; 1: off

    @property
    def exact(self) -> bool:
        """Whether completions are drawn from softmax(logits / temperature), as a trainer has it."""
        plain = (self.top_p, self.top_k, self.min_p, self.repetition_penalty) == (1.0, 0, 0.0, 1.0)
        free = not self.bad_words and self.regex is None and self.json_schema is None
        return plain and free and self.beams == 1

    @property
    def sequences(self) -> int:
        """That an engine computes at once for a request."""
        return max(self.n, self.beams)


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """One prompt to be sampled. Completion i is drawn with `seed + i`."""

    prompt: Prompt
    sampling: Sampling
    seed: int
    straggler_s: float | None = None  # that a group waits for the rest once half of it is there


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
    """The completions of one prompt: the unit that GRPO compares."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]  # fewer than were asked for, if stragglers were left behind
    engine: str = ""  # that sampled them


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """A group, and what its completions are worth."""

    group: Group
    texts: list[str]  # one for each rollout
    # float32, NaN where unknown; completions that are not there stand last.
    rewards_GR: np.ndarray  # the main reward first
    rewards_G: np.ndarray  # their weighted sums


@dataclasses.dataclass(frozen=True, slots=True)
class EngineOutcome:
    """How far one engine came with one version; `bridge.transaction.State` has the states."""

    state: str  # the last: admitted, aborted, lost or quarantined
    seconds: Mapping[str, float]  # that it took to reach each state
    failed_in: str | None  # the state in which it failed; None if it was admitted
    why: str  # it failed
    digest: str  # of what it says it loaded; "" if it loaded nothing


@dataclasses.dataclass(frozen=True, slots=True)
class PublishReport:
    """What one publish did, once every engine that serves has acknowledged it."""

    version: int
    digest: str  # of the whole version, equal at both ends; "" where no bytes crossed
    bytes: int  # that crossed
    seconds: float
    engines: int  # that were admitted
    probe_max_abs_dlogp: float  # nats, engine against trainer on the probe prompt
    phases: Mapping[str, float] = dataclasses.field(default_factory=dict)  # seconds, of the slowest
    pause_s: float = 0.0  # the longest that an engine sampled nothing
    base: int | None = None  # the version that it went as a difference from
    device_bytes: int = 0  # that left the trainer's devices for it
    outcomes: Mapping[str, EngineOutcome] = dataclasses.field(default_factory=dict)  # by engine
    replaced: int = 0  # engines started in the place of others, in the whole run
    quarantined: int = 0  # engines that held something else than was sent, in the whole run


class TrainBatch(NamedTuple):
    """Packed rows. A NamedTuple, so that jax treats it as a pytree without this file importing it.

    A token sees itself and the earlier tokens of its row that are of the same group and of branch 0
    or of its own branch: the completions of a prompt stand behind one copy of it, and do not see
    each other. Padding is group 0, and trains nothing.
    """

    tokens_BT: np.ndarray  # int32
    positions_BT: np.ndarray  # int32, within the token's own prompt + completion
    group_BT: np.ndarray  # int32, which copy of a prompt of this row: 1, 2, ...; 0 is padding
    branch_BT: np.ndarray  # int32, 0 for a prompt, i for the i-th completion behind it
    predictor_BC: np.ndarray  # int32, where in the row the token stands that predicts this one
    targets_BC: np.ndarray  # int32, the sampled token
    completion_BC: np.ndarray  # int32, which completion of this row: 1, 2, ...; 0 is padding
    loss_mask_BC: np.ndarray  # float32, 1 on trained tokens, 0 on padding and masked completions
    behavior_logprobs_BC: np.ndarray  # float32 nats, 0 where loss_mask_BC is 0
    advantages_BC: np.ndarray  # float32, that of the token's completion
    share_BC: np.ndarray  # float32, of the loss of the whole batch, 0 where loss_mask_BC is 0
