"""What losses and corrections look at: each sampled token under every policy that matters."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.logprobs import Scores
from jaxrl.types import TrainBatch

Array = jax.Array | np.ndarray

MAX_LOG_RATIO = 20.0  # exp(20) is 5e8: beyond any clip, far from float32's overflow


class Anchors(NamedTuple):
    """Log-probs of a batch's tokens under policies that stand still while it is trained on."""

    proximal_BC: Array | None = None  # None: the policy being trained, as it is, detached
    reference_BC: Array | None = None  # None: there is no reference


NO_ANCHORS = Anchors()


class Tokens(NamedTuple):
    """Arrays are [B, C], float32 unless noted, log-probs in nats, and 0 where nothing is trained:
    what stands there can reach neither a loss nor its gradient."""

    logprobs_BC: jax.Array  # under the policy being trained; gradients flow through it
    entropy_BC: jax.Array  # of that policy where it was sampled; gradients flow through it
    proximal_BC: jax.Array  # under pi_old: what ratios are measured from
    behavior_BC: jax.Array  # under mu: the engine
    reference_BC: jax.Array  # under the reference policy
    advantages_BC: jax.Array
    completion_BC: jax.Array  # int32, which completion of its row; 0 is padding
    trained_BC: jax.Array  # bool

    @property
    def log_ratio_BC(self) -> jax.Array:
        return self.logprobs_BC - self.proximal_BC

    def mean(self, x_BC: jax.Array) -> jax.Array:
        """Over trained tokens; 0 if there are none, as in `least` and `most`."""
        return self.only(x_BC).sum() / jnp.maximum(self.trained_BC.sum(), 1)

    def least(self, x_BC: jax.Array) -> jax.Array:
        found = jnp.where(self.trained_BC, x_BC, jnp.inf).min()
        return jnp.where(self.trained_BC.any(), found, 0.0)

    def most(self, x_BC: jax.Array) -> jax.Array:
        return -self.least(-x_BC)

    def only(self, x_BC: jax.Array) -> jax.Array:
        return jnp.where(self.trained_BC, x_BC, 0.0)

    def sum_of_completion(self, x_BC: jax.Array) -> jax.Array:
        """At every token the sum over the trained tokens of its completion: float32 [B, C]."""

        def of_row(x_C: jax.Array, completion_C: jax.Array) -> jax.Array:
            sums = jax.ops.segment_sum(x_C, completion_C, num_segments=len(x_C) + 1)
            return sums[completion_C]

        return jax.vmap(of_row)(self.only(x_BC).astype(jnp.float32), self.completion_BC)

    def mean_of_completion(self, x_BC: jax.Array) -> jax.Array:
        """As `sum_of_completion`: the mean."""
        count_BC = self.sum_of_completion(jnp.ones_like(x_BC))
        return self.sum_of_completion(x_BC) / jnp.maximum(count_BC, 1.0)

    def mean_over_completions(self, x_BC: jax.Array) -> jax.Array:
        """As `mean`, with every completion counted once; all tokens of one have the same x."""
        part_BC = self.only(1.0 / jnp.maximum(self.sum_of_completion(jnp.ones_like(x_BC)), 1.0))
        return (part_BC * self.only(x_BC)).sum() / jnp.maximum(part_BC.sum(), 1.0)


def gather(scores: Scores, batch: TrainBatch, anchors: Anchors, proximal: str) -> Tokens:
    """With pi_old as `algorithm.proximal` has it: the trainer's policy, or the engine's."""
    # Selected before any arithmetic: an infinity in a branch not taken poisons the gradient.
    trained_BC = jnp.asarray(batch.loss_mask_BC > 0)

    def only(x_BC: Array) -> jax.Array:
        return jnp.where(trained_BC, x_BC, 0.0)

    logprobs_BC, entropy_BC = map(only, scores)
    behavior_BC = only(batch.behavior_logprobs_BC)
    held_BC = jax.lax.stop_gradient(logprobs_BC)
    if proximal == "engine":
        proximal_BC = behavior_BC
    elif anchors.proximal_BC is None:
        proximal_BC = held_BC
    else:
        proximal_BC = jax.lax.stop_gradient(only(anchors.proximal_BC))
    reference_BC = held_BC
    if anchors.reference_BC is not None:
        reference_BC = jax.lax.stop_gradient(only(anchors.reference_BC))
    return Tokens(
        logprobs_BC,
        entropy_BC,
        proximal_BC,
        behavior_BC,
        reference_BC,
        only(batch.advantages_BC),
        jnp.asarray(batch.completion_BC),
        trained_BC,
    )


def exp(log_ratio: jax.Array) -> jax.Array:
    """Of a log-ratio clamped to +-20."""
    return jnp.exp(jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))
