"""The in-process engine: a jitted sampler with a KV cache, behind the same protocol as vLLM.

For machines without vLLM or Ray, and the oracle of the tests. A completion depends on its prompt,
its seed and the weights alone, never on the rows beside it.
"""

import functools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.logprobs import token_logprobs
from jaxrl.mesh import replicated
from jaxrl.models.attention import Masked
from jaxrl.models.decoder import KVCache, Params, Policy, empty_cache
from jaxrl.models.lora import with_adapters
from jaxrl.packing import row_length
from jaxrl.types import Group, Prompt, PublishReport, Request, Rollout, Sampling

FIRST_STAGE = 32  # new tokens


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
        self._most: dict[Sampling, int] = {}  # prompts that were sampled at a time
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

    def submit(self, requests: Sequence[Request], urgent: bool = False) -> list[Future[Group]]:
        """See `collect.Engines`. All of `requests` are of one sampling, and end together; the
        devices start here, in the order of the calls."""
        (sampling,) = {request.sampling for request in requests}
        wait = self.begin([r.prompt for r in requests], sampling, [r.seed for r in requests])
        futures: list[Future[Group]] = [Future() for _ in requests]

        def complete() -> None:
            try:
                groups = wait()
            except BaseException as error:
                for future in futures:
                    future.set_exception(error)
                return
            for future, group in zip(futures, groups, strict=True):
                if future.set_running_or_notify_cancel():
                    future.set_result(group)

        threading.Thread(target=complete, daemon=True).start()
        return futures

    def status(self) -> dict[str, float]:
        """Nothing: the devices are the trainer's."""
        return {}

    def begin(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]
    ) -> Callable[[], list[Group]]:
        """As `generate`, whose result comes when what is returned is called; the device starts.

        Fewer prompts than before are filled up with copies of the last, so that the sampler is
        compiled for few numbers of them: a quarter of the most, or a power of two."""
        if self._params is None:
            raise RuntimeError("nothing was published yet: no weights to sample with")
        if not sampling.exact or sampling.stop_strings:
            raise ValueError(f"the in-process engine has no such options: {sampling}")
        asked, most = len(prompts), max(len(prompts), self._most.get(sampling, 0))
        self._most[sampling] = most
        copies = min(most, max(most // 4, 1 << (asked - 1).bit_length())) - asked
        prompts = [*prompts, *[prompts[-1]] * copies]
        seeds = [*seeds, *[seeds[-1]] * copies]
        lengths_P = np.array([len(prompt.tokens) for prompt in prompts], np.int32)
        prompts_PT = np.zeros((len(prompts), row_length(int(lengths_P.max()))), np.int32)
        for row, prompt in zip(prompts_PT, prompts, strict=True):
            row[: len(prompt.tokens)] = prompt.tokens
        seeds_B = np.add.outer(np.asarray(seeds, np.uint32), np.arange(sampling.n, dtype=np.uint32))
        drawn = draw(
            self._policy,
            with_adapters(self._frozen, self._params),
            prompts_PT,
            lengths_P,
            seeds_B.reshape(-1),
            sampling,
        )
        version, n = self._version, sampling.n

        def wait() -> list[Group]:
            tokens_BN, logprobs_BN = map(np.asarray, drawn)
            rollouts = [
                _rollout(tokens_BN[b], logprobs_BN[b], sampling, int(seed), version)
                for b, seed in enumerate(seeds_B.reshape(-1))
            ]
            return [
                Group(prompt, tuple(rollouts[p * n : (p + 1) * n]))
                for p, prompt in enumerate(prompts[:asked])
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


class _Drawn(NamedTuple):
    """State of the decoding loop, after `step` new tokens of every row."""

    step: jax.Array
    logits_BV: jax.Array
    tokens_BN: jax.Array
    logprobs_BN: jax.Array
    stopped_B: jax.Array
    cache: KVCache


def draw(
    policy: Policy,
    params: Params,
    prompts_PT: np.ndarray,
    lengths_P: np.ndarray,
    seeds_B: np.ndarray,
    sampling: Sampling,
) -> tuple[jax.Array, jax.Array]:
    """Tokens and log-probs, both [P * sampling.n, sampling.max_new_tokens]; what follows a stop
    token is meaningless. Starts the devices, and does not wait for them.

    Prompts are right-padded. The cache has a slot for every padded prompt position, then one for
    each new token; masks hide the slots of padding, and positions skip them. It grows by stages,
    since every step reads all of it; once every row has stopped a stage has nothing to do.
    """
    n, most = sampling.n, sampling.max_new_tokens
    state = _prefill(policy, params, prompts_PT, lengths_P, n, most)
    lengths_B = np.repeat(lengths_P, n)
    for end in stages(most):
        state = _decode(
            policy, params, state, lengths_B, seeds_B, sampling, prompts_PT.shape[1], end
        )
    return replicated(state.tokens_BN), replicated(state.logprobs_BN)


def stages(max_new_tokens: int) -> list[int]:
    """After how many new tokens the cache grows: each stage is compiled apart, and reads at most
    half as much again as it has to."""
    ends, end = [], FIRST_STAGE
    while end < max_new_tokens:
        ends.append(end)
        end = row_length(end * 3 // 2)
    return [*ends, max_new_tokens]


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _prefill(
    policy: Policy,
    params: Params,
    prompts_PT: jax.Array,
    lengths_P: jax.Array,
    n: int,
    max_new_tokens: int,
) -> _Drawn:
    """The state before the first new token of each of `n` rows a prompt, computed once for all."""
    P, T = prompts_PT.shape
    slots_T = jnp.arange(T)
    positions_PT = jnp.broadcast_to(slots_T, (P, T))
    causal_PTS = (slots_T <= slots_T[:, None]) & (slots_T < lengths_P[:, None, None])
    seen = Masked(causal_PTS, positions_PT[:, :, None] - slots_T)
    cache = empty_cache(policy.config, P, T, policy.compute_dtype)
    hidden_PTD, cache = policy.hidden(params, prompts_PT, positions_PT, seen, cache)
    last_PD = jnp.take_along_axis(hidden_PTD, (lengths_P - 1)[:, None, None], axis=1)[:, 0]
    return _Drawn(
        jnp.zeros((), jnp.int32),
        jnp.repeat(policy.unembed(params, last_PD), n, axis=0),
        jnp.zeros((P * n, max_new_tokens), jnp.int32),
        jnp.zeros((P * n, max_new_tokens), jnp.float32),
        jnp.zeros((P * n,), bool),
        KVCache(*(jnp.repeat(x, n, axis=1) for x in cache)),
    )


@functools.partial(jax.jit, static_argnums=(0, 5, 6, 7))
def _decode(
    policy: Policy,
    params: Params,
    state: _Drawn,
    lengths_B: jax.Array,
    seeds_B: jax.Array,
    sampling: Sampling,
    T: int,
    end: int,
) -> _Drawn:
    """Goes on until `end` new tokens, or until every row has stopped."""
    S = T + end
    state = state._replace(cache=state.cache.grown(S))
    keys_B = jax.vmap(jax.random.key)(seeds_B)
    slots_S = jnp.arange(S)
    prompt_BS = slots_S < lengths_B[:, None]
    positions_BS = jnp.where(slots_S < T, slots_S, lengths_B[:, None] + slots_S - T)

    def step(drawn: _Drawn) -> _Drawn:
        n = drawn.step
        if sampling.temperature == 0.0:
            logprobs_BV = jax.nn.log_softmax(drawn.logits_BV)
            token_B = jnp.argmax(drawn.logits_BV, axis=-1)
        else:
            logprobs_BV = jax.nn.log_softmax(drawn.logits_BV / sampling.temperature)
            now_B = jax.vmap(lambda key: jax.random.fold_in(key, n))(keys_B)
            token_B = jax.vmap(jax.random.categorical)(now_B, logprobs_BV)
        token_B = token_B.astype(jnp.int32)
        logprob_B = jnp.take_along_axis(logprobs_BV, token_B[:, None], axis=1)[:, 0]
        stops = jnp.isin(token_B, jnp.array(sampling.stop_tokens, jnp.int32))
        position_B = lengths_B + n
        visible_BS = prompt_BS | ((slots_S >= T) & (slots_S <= T + n))
        logits_B1V, cache = policy.apply(
            params,
            token_B[:, None],
            position_B[:, None],
            Masked(visible_BS[:, None], (position_B[:, None] - positions_BS)[:, None]),
            drawn.cache,
            T + n,
        )
        return _Drawn(
            n + 1,
            logits_B1V[:, 0],
            drawn.tokens_BN.at[:, n].set(token_B),
            drawn.logprobs_BN.at[:, n].set(logprob_B),
            drawn.stopped_B | stops,
            cache,
        )

    return jax.lax.while_loop(
        lambda drawn: (drawn.step < end) & ~drawn.stopped_B.all(), step, state
    )
