"""Log-probabilities and entropies of tokens, from hidden states, a chunk of logits at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray
Unembed = Callable[[Any], jax.Array]  # hidden states [..., D] -> float32 logits [..., V]
Scores = tuple[Array, Array]  # log-probs and entropies of sampled tokens, float32 [B, C]


def token_logprobs(
    hidden_BCD: Array,
    unembed: Unembed,
    targets_BC: Array,
    temperature: float,
    chunk_tokens: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target under the state that predicts it, and the entropy there.

    Both are of the sampling distribution, softmax(logits / temperature). With `chunk_tokens` the
    logits of that many targets exist at a time, in the backward pass too, where they are computed
    again: [tokens, vocabulary] in float32 is what would otherwise fill the memory. A chunk is some
    columns of every row, so that rows stay on their devices.

    Args:
      hidden_BCD: the states that `unembed` makes float32 logits of.
      targets_BC: int32 token ids.

    Returns:
      float32 [B, C] log-probs and entropies, in nats.
    """

    def score(hidden: Array, targets: Array) -> tuple[jax.Array, jax.Array]:
        logs = jax.nn.log_softmax(unembed(hidden).astype(jnp.float32) / temperature)
        picked = jnp.take_along_axis(logs, targets[..., None], axis=-1)[..., 0]
        return picked, -(jnp.exp(logs) * logs).sum(axis=-1)

    B, C, _ = hidden_BCD.shape
    columns = C if chunk_tokens is None else max(1, chunk_tokens // B)
    if columns >= C:
        return score(hidden_BCD, targets_BC)
    chunks = -(-C // columns)

    def cut(x: Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, chunks * columns - C), *[(0, 0)] * (x.ndim - 2)))
        return x.reshape(B, chunks, columns, *x.shape[2:]).swapaxes(0, 1)

    def join(x: jax.Array) -> jax.Array:
        return x.swapaxes(0, 1).reshape(B, chunks * columns)[:, :C]

    step = jax.checkpoint(lambda _, chunk: (None, score(*chunk)))
    _, (logprobs, entropy) = jax.lax.scan(step, None, (cut(hidden_BCD), cut(targets_BC)))
    return join(logprobs), join(entropy)
