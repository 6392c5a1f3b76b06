"""The in-process engine: a jitted sampler with a KV cache, behind the same protocol as vLLM.

For machines without vLLM or Ray, and the oracle of the tests. A completion depends on its prompt,
its seed and the weights alone, never on the rows beside it.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.losses import token_logprobs
from jaxrl.mesh import replicated
from jaxrl.models.decoder import KVCache, Params, Policy, empty_cache
from jaxrl.models.lora import with_adapters
from jaxrl.packing import row_length
from jaxrl.types import Group, Prompt, PublishReport, Rollout, Sampling


def make_score(
    policy: Policy, frozen: Params | None = None
) -> Callable[[Params, Sequence[int]], np.ndarray]:
    """Returns score(params, tokens) -> log-prob of each token given those before it.

    Float32 [t], nats, at temperature 1; the first is 0. With `frozen` weights `params` are the
    adapters beside them. Of several processes all call it.
    """

    @jax.jit
    def logprobs(params: Params, frozen: Params, tokens_1T: jax.Array) -> jax.Array:
        whole = with_adapters(frozen, params)
        hidden_1TD = policy.hidden_of_rows(whole, tokens_1T)
        unembed = functools.partial(policy.unembed, whole)
        logprobs_1S, _ = token_logprobs(hidden_1TD[:, :-1], unembed, tokens_1T[:, 1:], 1.0)
        return jnp.pad(logprobs_1S, ((0, 0), (1, 0)))

    def score(params: Params, tokens: Sequence[int]) -> np.ndarray:
        tokens_1T = np.zeros((1, row_length(len(tokens))), np.int32)
        tokens_1T[0, : len(tokens)] = tokens
        scored = replicated(logprobs(params, frozen or {}, tokens_1T))
        return np.asarray(scored)[0, : len(tokens)]

    return score


class InProcessEngine:
    """Samples with the newest published weights, on the trainer's own devices.

    Of several processes all do so at the same time, and all get the same groups.
    """

    def __init__(self, policy: Policy, frozen: Params | None = None) -> None:
        """With `frozen` weights what is published are adapters."""
        self._policy, self._frozen = policy, frozen or {}
        self._params: Params | None = None
        self._version = -1
        # A copy: the next update donates, and so destroys, the parameters it was given.
        self._copy = jax.jit(lambda params: jax.tree.map(jnp.copy, params))

    def publish(self, params: Params, version: int) -> PublishReport:
        start = time.perf_counter()
        if version <= self._version:
            raise ValueError(f"weight version {version} does not follow {self._version}")
        self._params, self._version = jax.block_until_ready(self._copy(params)), version
        return PublishReport(version, "", 0, time.perf_counter() - start, 1, 0.0)

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]
    ) -> list[Group]:
        """`sampling.n` rollouts of each prompt, in the order of `prompts`.

        Sample i of a prompt is drawn with seed `seeds[p] + i`.
        """
        return self.begin(prompts, sampling, seeds)()

    def begin(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]
    ) -> Callable[[], list[Group]]:
        """As `generate`, whose result comes when what is returned is called; the device starts."""
        if self._params is None:
            raise RuntimeError("nothing was published yet: no weights to sample with")
        rows = [
            (prompt, seed + i)
            for prompt, seed in zip(prompts, seeds, strict=True)
            for i in range(sampling.n)
        ]
        lengths_B = np.array([len(prompt.tokens) for prompt, _ in rows], np.int32)
        prompts_BT = np.zeros((len(rows), row_length(int(lengths_B.max()))), np.int32)
        for row, (prompt, _) in zip(prompts_BT, rows, strict=True):
            row[: len(prompt.tokens)] = prompt.tokens
        drawn = _sample(
            self._policy,
            with_adapters(self._frozen, self._params),
            prompts_BT,
            lengths_B,
            np.array([seed for _, seed in rows], np.uint32),
            sampling.temperature,
            sampling.max_new_tokens,
            sampling.stop_tokens,
        )
        drawn = [replicated(x) for x in drawn]
        version = self._version

        def wait() -> list[Group]:
            tokens_BN, logprobs_BN = map(np.asarray, drawn)
            rollouts = [
                _rollout(tokens_BN[b], logprobs_BN[b], sampling, seed, version)
                for b, (_, seed) in enumerate(rows)
            ]
            n = sampling.n
            return [
                Group(prompt, tuple(rollouts[p * n : (p + 1) * n]))
                for p, prompt in enumerate(prompts)
            ]

        return wait

    def close(self) -> None:
        self._params = None


def _rollout(
    tokens: np.ndarray, logprobs: np.ndarray, sampling: Sampling, seed: int, version: int
) -> Rollout:
    stops = np.flatnonzero(np.isin(tokens, sampling.stop_tokens))
    length = int(stops[0]) + 1 if len(stops) else len(tokens)
    return Rollout(
        tokens[:length],
        logprobs[:length],
        np.full(length, version, np.int64),
        "stop" if len(stops) else "length",
        seed,
    )


class _Draw(NamedTuple):
    """State of the decoding loop, after `step` new tokens of every row."""

    step: jax.Array
    logits_BV: jax.Array
    tokens_BN: jax.Array
    logprobs_BN: jax.Array
    stopped_B: jax.Array
    cache: KVCache


@functools.partial(jax.jit, static_argnums=(0, 5, 6, 7))
def _sample(
    policy: Policy,
    params: Any,
    prompts_BT: jax.Array,
    lengths_B: jax.Array,
    seeds_B: jax.Array,
    temperature: float,
    max_new_tokens: int,
    stop_tokens: tuple[int, ...],
) -> tuple[jax.Array, jax.Array]:
    """Tokens and log-probs, both [B, max_new_tokens]; what follows a stop token is meaningless.

    Prompts are right-padded. The cache has a slot for every padded prompt position, then one for
    each new token; the mask hides the slots of padding, and positions skip them.
    """
    B, T = prompts_BT.shape
    S = T + max_new_tokens
    keys_B = jax.vmap(jax.random.key)(seeds_B)
    slots_S = jnp.arange(S)
    prompt_BS = slots_S[None] < lengths_B[:, None]
    new_BS = lengths_B[:, None] + slots_S[None] - T
    slot_positions_BS = jnp.where(slots_S[None] < T, slots_S[None], new_BS)

    positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    causal_BTS = (slots_S[None, None] <= positions_BT[:, :, None]) & prompt_BS[:, None]
    cache = empty_cache(policy.config, B, S, policy.compute_dtype)
    hidden_BTD, cache = policy.hidden(
        params, prompts_BT, positions_BT, causal_BTS, cache, 0, slot_positions_BS
    )
    last_BD = jnp.take_along_axis(hidden_BTD, (lengths_B - 1)[:, None, None], axis=1)[:, 0]
    last_BV = policy.unembed(params, last_BD)

    def step(draw: _Draw) -> _Draw:
        n = draw.step
        if temperature == 0.0:
            logprobs_BV = jax.nn.log_softmax(draw.logits_BV)
            token_B = jnp.argmax(draw.logits_BV, axis=-1)
        else:
            logprobs_BV = jax.nn.log_softmax(draw.logits_BV / temperature)
            now_B = jax.vmap(lambda key: jax.random.fold_in(key, n))(keys_B)
            token_B = jax.vmap(jax.random.categorical)(now_B, logprobs_BV)
        token_B = token_B.astype(jnp.int32)
        logprob_B = jnp.take_along_axis(logprobs_BV, token_B[:, None], axis=1)[:, 0]
        stopped_B = draw.stopped_B | jnp.isin(token_B, jnp.array(stop_tokens, jnp.int32))
        visible_BS = prompt_BS | ((slots_S >= T) & (slots_S <= T + n))[None]
        logits_B1V, cache = policy.apply(
            params,
            token_B[:, None],
            (lengths_B + n)[:, None],
            visible_BS[:, None],
            draw.cache,
            T + n,
            slot_positions_BS,
        )
        return _Draw(
            n + 1,
            logits_B1V[:, 0],
            draw.tokens_BN.at[:, n].set(token_B),
            draw.logprobs_BN.at[:, n].set(logprob_B),
            stopped_B,
            cache,
        )

    start = _Draw(
        jnp.zeros((), jnp.int32),
        last_BV,
        jnp.zeros((B, max_new_tokens), jnp.int32),
        jnp.zeros((B, max_new_tokens), jnp.float32),
        jnp.zeros((B,), bool),
        cache,
    )
    end = jax.lax.while_loop(
        lambda draw: (draw.step < max_new_tokens) & ~draw.stopped_B.all(), step, start
    )
    return end.tokens_BN, end.logprobs_BN
