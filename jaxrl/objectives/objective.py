"""The scalar that an update minimises, put together as `algorithm.*` says."""

from typing import Protocol

import jax
import jax.numpy as jnp

from jaxrl.config import AlgorithmSection, SftSection
from jaxrl.logprobs import Scores
from jaxrl.objectives.correction import correct
from jaxrl.objectives.kl import kl_to_reference
from jaxrl.objectives.policy import Loss, make_loss
from jaxrl.objectives.tokens import NO_ANCHORS, Anchors, Tokens, exp, gather
from jaxrl.types import TrainBatch

Metrics = dict[str, jax.Array]


class Objective(Protocol):
    """objective(scores, batch, anchors) -> (scalar loss, scalars worth logging).

    Of a part of the batch's rows it is that part of the loss: parts add up to the whole.
    """

    def __call__(
        self, scores: Scores, batch: TrainBatch, anchors: Anchors = NO_ANCHORS, /
    ) -> tuple[jax.Array, Metrics]: ...


def make_objective(c: AlgorithmSection | SftSection) -> Objective:
    """With the share of each token (`aggregation`), its weight w and its masks M (`correction`):

        loss = sum of share * (w M policy_loss + kl_coefficient KL - entropy_coefficient entropy)

    Of supervised fine-tuning it is `likelihood`.

    With `kl_corrected` the KL term is that of tokens drawn from pi: KL times w r.

    Metrics, all over trained tokens, are those of `correct` and `describe`, and `kl/reference`
    where there is one; docs/metrics.md has their formulas.

    Raises:
      UserError: see `make_loss`.
    """
    if isinstance(c, SftSection):
        return likelihood
    policy_loss = make_loss(c.loss)

    def objective(
        scores: Scores, batch: TrainBatch, anchors: Anchors = NO_ANCHORS, /
    ) -> tuple[jax.Array, Metrics]:
        tokens = gather(scores, batch, anchors, c.proximal)
        weight_BC, kept_BC, metrics = correct(tokens, c)
        total_BC = weight_BC * kept_BC * policy_loss(tokens, c)
        if c.kl_coefficient:
            assert anchors.reference_BC is not None
            kl_BC = kl_to_reference(tokens, c.kl_estimator)
            metrics["kl/reference"] = tokens.mean(kl_BC)
            if c.kl_corrected:
                kl_BC = weight_BC * exp(tokens.log_ratio_BC) * kl_BC
            total_BC += c.kl_coefficient * kl_BC
        if c.entropy_coefficient:
            total_BC -= c.entropy_coefficient * tokens.entropy_BC
        loss = (tokens.only(total_BC) * tokens.only(jnp.asarray(batch.share_BC))).sum()
        return loss, metrics | describe(tokens, policy_loss, c)

    return objective


def likelihood(
    scores: Scores, batch: TrainBatch, anchors: Anchors = NO_ANCHORS, /
) -> tuple[jax.Array, Metrics]:
    """The negative log-likelihood, as much of each token as its share; no metrics."""
    trained_BC = jnp.asarray(batch.loss_mask_BC > 0)
    return -(jnp.where(trained_BC, scores[0], 0.0) * batch.share_BC).sum(), {}


def describe(tokens: Tokens, policy_loss: Loss, c: AlgorithmSection) -> Metrics:
    tokens = jax.lax.stop_gradient(tokens)

    def total(logprobs_BC: jax.Array) -> jax.Array:
        return tokens.only(policy_loss(tokens._replace(logprobs_BC=logprobs_BC), c)).sum()

    stopped_BC = jax.grad(total)(tokens.logprobs_BC) == 0
    up_BC, down_BC = tokens.advantages_BC > 0, tokens.advantages_BC < 0
    ratio_BC = exp(tokens.log_ratio_BC)
    return {
        "clip_fraction": tokens.mean(stopped_BC & (up_BC | down_BC)),
        "clip/up_fraction": tokens.mean(stopped_BC & up_BC),
        "clip/down_fraction": tokens.mean(stopped_BC & down_BC),
        "ratio/mean": tokens.mean(ratio_BC),
        "ratio/min": tokens.least(ratio_BC),
        "ratio/max": tokens.most(ratio_BC),
        "kl/proximal": tokens.mean(ratio_BC - 1.0 - tokens.log_ratio_BC),
    }
