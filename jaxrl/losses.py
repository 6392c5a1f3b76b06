"""Policy objectives: pure functions of arrays, which know nothing of models or optimizers."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.types import TrainBatch

Array = jax.Array | np.ndarray
Unembed = Callable[[Any], jax.Array]  # hidden states [..., D] -> float32 logits [..., V]

MAX_LOG_RATIO = 20.0  # exp(20) is 5e8: beyond any clip, far from float32's overflow


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


def grpo_loss(
    logprobs_BC: Array,
    proximal_logprobs_BC: Array,
    batch: TrainBatch,
    *,
    clip_low: float,
    clip_high: float,
    correction_cap: float | None,
    tokens: Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Clipped policy-gradient loss, averaged over every trained token of the global batch.

        r    = exp(logprobs - proximal)                     the trainer's own change
        w    = min(exp(proximal - behavior), cap)           the engine's difference, detached
        loss = -sum(mask * w * min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)) / sum(mask)

    Dividing once by the token count of the whole batch gives every token the same weight; under
    jit on a mesh both sums are global. Log-ratios are clamped to +-20 before exp.

    Args:
      logprobs_BC: float32 nats, under the policy being trained. Gradients flow through this only.
      proximal_logprobs_BC: nats, under the trainer's policy when the batch arrived.
      batch: what was sampled; see `types.TrainBatch`.
      clip_low: how far the ratio may fall below 1 before a token stops contributing.
      clip_high: how far it may rise above 1.
      correction_cap: ceiling of the importance weight w; None leaves w at 1.
      tokens: what to divide by where `batch` is a part of the global batch: its trained tokens.

    Returns:
      The scalar loss, and scalars worth logging (all means over trained tokens):
        `clip_fraction`: share of tokens where the clipped branch was taken;
        `ratio/mean`, `ratio/max`: of r;
        `mismatch/mean_abs_dlogp`, `mismatch/max_abs_dlogp`: |proximal - behavior|, nats;
        `mismatch/k1`, `mismatch/k3`: estimates of KL(behavior || proximal), nats per token;
        `correction/mean`, `correction/max`, `correction/capped_fraction`: of the untruncated w;
        `correction/ess`: effective sample size of the truncated w, as a share of the tokens.

    Sources: the clipped objective, Schulman et al. 2017, arXiv:1707.06347; token mean and separate
    bounds, Yu et al. 2025 (DAPO), arXiv:2503.14476; the split of r and w, Hilton et al. 2021,
    arXiv:2110.00641; truncated importance sampling, Ionides 2008; k1 and k3, Schulman 2020,
    "Approximating KL divergence".
    """
    mask_BC = batch.loss_mask_BC
    trained_BC = mask_BC > 0
    # At least 1: a batch with nothing to train has zero loss.
    tokens = jnp.maximum(mask_BC.sum() if tokens is None else tokens, 1.0)

    def mean(x_BC: Array) -> jax.Array:
        return jnp.where(trained_BC, x_BC, 0.0).sum() / tokens

    def ratio(new_BC: Array, old_BC: Array) -> tuple[jax.Array, jax.Array]:
        # Selected before exp: an infinity in the branch not taken would still poison the gradient.
        log_BC = jnp.where(trained_BC, new_BC - old_BC, 0.0)
        return log_BC, jnp.exp(jnp.clip(log_BC, -MAX_LOG_RATIO, MAX_LOG_RATIO))

    proximal_BC = jax.lax.stop_gradient(proximal_logprobs_BC)
    _, ratio_BC = ratio(logprobs_BC, proximal_BC)
    log_mismatch_BC, mismatch_BC = ratio(proximal_BC, batch.behavior_logprobs_BC)
    weight_BC = jnp.ones_like(mismatch_BC)
    if correction_cap is not None:
        weight_BC = jnp.minimum(mismatch_BC, correction_cap)

    unclipped_BC = ratio_BC * batch.advantages_BC
    clipped_BC = jnp.clip(ratio_BC, 1.0 - clip_low, 1.0 + clip_high) * batch.advantages_BC
    loss = -mean(weight_BC * jnp.minimum(unclipped_BC, clipped_BC))

    abs_mismatch_BC = jnp.abs(log_mismatch_BC)
    metrics = {
        "clip_fraction": mean(clipped_BC < unclipped_BC),
        "ratio/mean": mean(ratio_BC),
        "ratio/max": jnp.where(trained_BC, ratio_BC, 0.0).max(),
        "mismatch/mean_abs_dlogp": mean(abs_mismatch_BC),
        "mismatch/max_abs_dlogp": abs_mismatch_BC.max(),
        "mismatch/k1": -mean(log_mismatch_BC),
        "mismatch/k3": mean(mismatch_BC - 1.0 - log_mismatch_BC),
        "correction/mean": mean(mismatch_BC),
        "correction/max": jnp.where(trained_BC, mismatch_BC, 0.0).max(),
        "correction/capped_fraction": mean(mismatch_BC > (correction_cap or jnp.inf)),
        "correction/ess": mean(weight_BC) ** 2 / jnp.maximum(mean(weight_BC**2), 1e-30),
    }
    return loss, metrics


def nll_loss(
    logprobs_BC: Array,
    proximal_logprobs_BC: Array,
    batch: TrainBatch,
    *,
    tokens: Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Negative log-likelihood, averaged over every trained token of the global batch.

    Args:
      logprobs_BC: float32 nats, under the policy being trained.
      proximal_logprobs_BC: not looked at; objectives have the same arguments.
      batch, tokens: as for `grpo_loss`.

    Returns:
      The scalar loss in nats, and nothing else to log.
    """
    trained_BC = batch.loss_mask_BC > 0
    tokens = jnp.maximum(batch.loss_mask_BC.sum() if tokens is None else tokens, 1.0)
    return -jnp.where(trained_BC, logprobs_BC, 0.0).sum() / tokens, {}
