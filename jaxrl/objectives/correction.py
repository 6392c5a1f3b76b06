"""What the engine sampled with is not quite the trainer's policy: weights, masks, measurements.

mu is the engine's policy, rho = pi_old / mu of a token. With `algorithm.proximal: engine` pi_old is
mu, so that ratios measure from there; then rho here is pi / mu, and there is nothing to weight by.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl.config import AlgorithmSection
from jaxrl.objectives.tokens import Tokens, exp


class Correction(NamedTuple):
    """Both detached. A token that a mask drops keeps its place in every denominator."""

    weight_BC: jax.Array  # importance weight, truncated
    kept_BC: jax.Array  # bool, by all masks
    metrics: dict[str, jax.Array]


def correct(tokens: Tokens, c: AlgorithmSection) -> Correction:
    """Weights by `algorithm.correction`, masks by those of `algorithm.*_mask` and
    `opsm_threshold` that are set.

    Metrics, of trained tokens, measured whether or not anything is corrected; docs/metrics.md has
    their formulas: `mismatch/*` of rho, and `correction/*` of the weight as it is used and of what
    the masks drop.

    Sources: truncated importance sampling, Ionides 2008; apart from the ratio, Hilton et al. 2021,
    arXiv:2110.00641; off-policy sequence mask, DeepSeek-V3.2; k1 and k3, Schulman 2020,
    "Approximating KL divergence".
    """
    tokens = jax.lax.stop_gradient(tokens)
    policy_BC = tokens.logprobs_BC if c.proximal == "engine" else tokens.proximal_BC
    log_BC = policy_BC - tokens.behavior_BC
    rho_BC = exp(log_BC)
    product_BC = exp(tokens.sum_of_completion(log_BC))
    geometric_BC = exp(tokens.mean_of_completion(log_BC))
    k3_BC = rho_BC - 1.0 - log_BC
    # Of rho log(2 rho / (1 + rho)) + log(2 / (1 + rho)), the half: never negative, and 0 at 1.
    js_BC = (rho_BC * _log_share(log_BC) + _log_share(-log_BC)) / 2

    weight_BC = {
        "none": jnp.ones_like(rho_BC),
        "token_tis": jnp.minimum(rho_BC, c.correction_cap),
        "sequence_tis": jnp.minimum(product_BC, c.correction_cap),
    }[c.correction]

    kept_BC = jnp.ones_like(tokens.trained_BC)
    above_BC = below_BC = ~kept_BC
    for bounds, ratio_BC in (
        (c.token_mask, rho_BC),
        (c.sequence_mask, product_BC),
        (c.geometric_mask, geometric_BC),
    ):
        if bounds is not None:
            kept_BC &= (ratio_BC >= bounds[0]) & (ratio_BC <= bounds[1])
            below_BC |= ratio_BC < bounds[0]
            above_BC |= ratio_BC > bounds[1]
    if c.k3_mask is not None:
        kept_BC &= tokens.mean_of_completion(k3_BC) <= c.k3_mask
    if c.opsm_threshold is not None:
        moved_BC = tokens.mean_of_completion(tokens.behavior_BC - tokens.logprobs_BC)
        kept_BC &= (tokens.advantages_BC >= 0) | (moved_BC <= c.opsm_threshold)

    used_BC = weight_BC * kept_BC
    used = tokens.mean(used_BC)
    abs_BC, log_ppl_BC = jnp.abs(log_BC), -tokens.mean_of_completion(log_BC)
    dropped_BC = jnp.where(kept_BC, 0.0, tokens.advantages_BC)
    metrics = {
        "mismatch/mean_abs_dlogp": tokens.mean(abs_BC),
        "mismatch/max_abs_dlogp": tokens.most(abs_BC),
        "mismatch/k1": -tokens.mean(log_BC),
        "mismatch/k3": tokens.mean(k3_BC),
        "mismatch/js": tokens.mean(js_BC),
        "mismatch/token_mult_prob_error": tokens.mean(exp(abs_BC)),
        "mismatch/log_ppl_diff": tokens.mean_over_completions(log_ppl_BC),
        "mismatch/log_ppl_abs_diff": tokens.mean_over_completions(jnp.abs(log_ppl_BC)),
        "mismatch/chi2": tokens.mean(rho_BC**2 - 1.0),
        "mismatch/chi2_sequence": tokens.mean_over_completions(product_BC**2 - 1.0),
        "mismatch/ratio_mean": tokens.mean(rho_BC),
        "mismatch/ratio_max": tokens.most(rho_BC),
        "mismatch/geometric_min": tokens.least(geometric_BC),
        "mismatch/geometric_max": tokens.most(geometric_BC),
        "mismatch/ess": effective_sample_size(tokens, rho_BC),
        "correction/mean": used,
        "correction/std": jnp.sqrt(tokens.mean((used_BC - used) ** 2)),
        "correction/min": tokens.least(used_BC),
        "correction/max": tokens.most(used_BC),
        "correction/ess": effective_sample_size(tokens, used_BC),
        "correction/capped_fraction": tokens.mean(rho_BC > c.correction_cap),
        "correction/low_fraction": tokens.mean(rho_BC < 1.0 / c.correction_cap),
        "correction/above_fraction": tokens.mean(above_BC),
        "correction/below_fraction": tokens.mean(below_BC),
        "correction/masked_fraction": tokens.mean(~kept_BC),
        "correction/masked_completions": tokens.mean_over_completions(
            tokens.sum_of_completion(~kept_BC) > 0
        ),
        "correction/masked_advantage_positive": tokens.mean(jnp.maximum(dropped_BC, 0.0)),
        "correction/masked_advantage_negative": tokens.mean(jnp.minimum(dropped_BC, 0.0)),
    }
    return Correction(weight_BC, kept_BC, metrics)


def effective_sample_size(tokens: Tokens, weight_BC: jax.Array) -> jax.Array:
    """(sum w)^2 / (n sum w^2): 1 where all weigh the same."""
    return tokens.mean(weight_BC) ** 2 / jnp.maximum(tokens.mean(weight_BC**2), 1e-30)


def _log_share(log_BC: jax.Array) -> jax.Array:
    """log(2 r / (1 + r)) of log r."""
    return math.log(2) - jax.nn.softplus(-log_BC)
