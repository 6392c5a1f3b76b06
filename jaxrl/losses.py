"""Policy objectives: pure functions of arrays, which know nothing of models or optimizers."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.types import TrainBatch

Array = jax.Array | np.ndarray

MAX_LOG_RATIO = 20.0  # exp(20) is 5e8: beyond any clip, far from float32's overflow


def token_logprobs(
    logits_BTV: Array, tokens_BT: Array, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each token given its prefix, and the entropy it was drawn with.

    Logits at t - 1 predict the token at t; this is the only place where that shift is written.
    Both are of the sampling distribution, softmax(logits / temperature).

    Returns:
      float32 [B, T] log-probs and entropies, in nats; column 0 is 0.
    """
    predicted_BSV = jax.nn.log_softmax(logits_BTV[:, :-1].astype(jnp.float32) / temperature)
    picked_BS = jnp.take_along_axis(predicted_BSV, tokens_BT[:, 1:, None], axis=-1)[..., 0]
    entropy_BS = -(jnp.exp(predicted_BSV) * predicted_BSV).sum(axis=-1)
    shift = ((0, 0), (1, 0))
    return jnp.pad(picked_BS, shift), jnp.pad(entropy_BS, shift)


def grpo_loss(
    logprobs_BT: Array,
    proximal_logprobs_BT: Array,
    batch: TrainBatch,
    *,
    clip_low: float,
    clip_high: float,
    correction_cap: float | None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Clipped policy-gradient loss, averaged over every trained token of the global batch.

        r    = exp(logprobs - proximal)                     the trainer's own change
        w    = min(exp(proximal - behavior), cap)           the engine's difference, detached
        loss = -sum(mask * w * min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)) / sum(mask)

    Dividing once by the token count of the whole batch gives every token the same weight; under
    jit on a mesh both sums are global. Log-ratios are clamped to +-20 before exp.

    Args:
      logprobs_BT: nats, under the policy being trained. Gradients flow through this only.
      proximal_logprobs_BT: nats, under the trainer's policy when the batch arrived.
      batch: what was sampled; see `types.TrainBatch`.
      clip_low: how far the ratio may fall below 1 before a token stops contributing.
      clip_high: how far it may rise above 1.
      correction_cap: ceiling of the importance weight w; None leaves w at 1.

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
    mask_BT = batch.loss_mask_BT
    trained_BT = mask_BT > 0
    tokens = jnp.maximum(mask_BT.sum(), 1.0)  # a batch with nothing to train has zero loss
    advantages_B1 = batch.advantages_B[:, None]

    def mean(x_BT: Array) -> jax.Array:
        return jnp.where(trained_BT, x_BT, 0.0).sum() / tokens

    def ratio(new_BT: Array, old_BT: Array) -> tuple[jax.Array, jax.Array]:
        # Selected before exp: an infinity in the branch not taken would still poison the gradient.
        log_BT = jnp.where(trained_BT, new_BT - old_BT, 0.0)
        return log_BT, jnp.exp(jnp.clip(log_BT, -MAX_LOG_RATIO, MAX_LOG_RATIO))

    proximal_BT = jax.lax.stop_gradient(proximal_logprobs_BT)
    _, ratio_BT = ratio(logprobs_BT, proximal_BT)
    log_mismatch_BT, mismatch_BT = ratio(proximal_BT, batch.behavior_logprobs_BT)
    weight_BT = jnp.ones_like(mismatch_BT)
    if correction_cap is not None:
        weight_BT = jnp.minimum(mismatch_BT, correction_cap)

    unclipped_BT = ratio_BT * advantages_B1
    clipped_BT = jnp.clip(ratio_BT, 1.0 - clip_low, 1.0 + clip_high) * advantages_B1
    loss = -mean(weight_BT * jnp.minimum(unclipped_BT, clipped_BT))

    abs_mismatch_BT = jnp.abs(log_mismatch_BT)
    metrics = {
        "clip_fraction": mean(clipped_BT < unclipped_BT),
        "ratio/mean": mean(ratio_BT),
        "ratio/max": jnp.where(trained_BT, ratio_BT, 0.0).max(),
        "mismatch/mean_abs_dlogp": mean(abs_mismatch_BT),
        "mismatch/max_abs_dlogp": abs_mismatch_BT.max(),
        "mismatch/k1": -mean(log_mismatch_BT),
        "mismatch/k3": mean(mismatch_BT - 1.0 - log_mismatch_BT),
        "correction/mean": mean(mismatch_BT),
        "correction/max": jnp.where(trained_BT, mismatch_BT, 0.0).max(),
        "correction/capped_fraction": mean(mismatch_BT > (correction_cap or jnp.inf)),
        "correction/ess": mean(weight_BT) ** 2 / jnp.maximum(mean(weight_BT**2), 1e-30),
    }
    return loss, metrics
