"""Policy losses: loss(tokens, algorithm) -> [B, C], one term for each token.

A = advantage, r = pi / pi_old of a token (`algorithm.proximal` says what pi_old is). Where pi is
pi_old the gradient of each of them is REINFORCE's, -A d log pi. Terms are weighted and added up
elsewhere; what a term is where nothing is trained does not matter.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrl.config import AlgorithmSection
from jaxrl.objectives.custom import is_custom, load
from jaxrl.objectives.tokens import Tokens, exp
from jaxrl.types import UserError

Loss = Callable[[Tokens, AlgorithmSection], jax.Array]


def ppo_clip(tokens: Tokens, c: AlgorithmSection) -> jax.Array:
    """-min(r A, clip(r, 1 - low, 1 + high) A).

    Schulman et al. 2017, arXiv:1707.06347; separate bounds, Yu et al. 2025 (DAPO),
    arXiv:2503.14476; dual clip, Ye et al. 2020, arXiv:1912.09729.
    """
    return _clipped(exp(tokens.log_ratio_BC), tokens.advantages_BC, c)


def gspo(tokens: Tokens, c: AlgorithmSection) -> jax.Array:
    """ppo_clip with s, the geometric mean of a completion's ratios, in the place of r.

    Zheng et al. 2025, arXiv:2507.18071.
    """
    log_ratio_BC = tokens.mean_of_completion(tokens.log_ratio_BC)
    return _clipped(exp(log_ratio_BC), tokens.advantages_BC, c)


def gspo_token(tokens: Tokens, c: AlgorithmSection) -> jax.Array:
    """As `gspo`, where a token's gradient is its own alone: s = sg(s) pi / sg(pi). The same as long
    as the tokens of a completion have one advantage and one weight."""
    held = jax.lax.stop_gradient
    log_ratio_BC = held(tokens.mean_of_completion(tokens.log_ratio_BC))
    own_BC = tokens.logprobs_BC - held(tokens.logprobs_BC)
    return _clipped(exp(log_ratio_BC + own_BC), tokens.advantages_BC, c)


def _clipped(ratio_BC: jax.Array, advantages_BC: jax.Array, c: AlgorithmSection) -> jax.Array:
    clipped_BC = jnp.clip(ratio_BC, 1.0 - c.clip_low, 1.0 + c.clip_high)
    surrogate_BC = jnp.minimum(ratio_BC * advantages_BC, clipped_BC * advantages_BC)
    if c.dual_clip is not None:
        floor_BC = jnp.maximum(surrogate_BC, c.dual_clip * advantages_BC)
        surrogate_BC = jnp.where(advantages_BC < 0, floor_BC, surrogate_BC)
    return -surrogate_BC


def cispo(tokens: Tokens, c: AlgorithmSection) -> jax.Array:
    """-sg(min(r, max)) A log pi: the ratio is capped, and no token loses its gradient.

    MiniMax 2025, arXiv:2506.13585.
    """
    ratio_BC = jax.lax.stop_gradient(jnp.minimum(exp(tokens.log_ratio_BC), c.cispo_max))
    return -ratio_BC * tokens.advantages_BC * tokens.logprobs_BC


def sapo(tokens: Tokens, c: AlgorithmSection) -> jax.Array:
    """-(4 / tau) sigmoid(tau (r - 1)) A: a gate that closes smoothly on both sides.

    Gao et al. 2025, arXiv:2511.20347.
    """
    positive_BC = tokens.advantages_BC > 0
    tau_BC = jnp.where(positive_BC, c.sapo_tau_positive, c.sapo_tau_negative)
    gate_BC = jax.nn.sigmoid(tau_BC * (exp(tokens.log_ratio_BC) - 1.0))
    return -(4.0 / tau_BC) * gate_BC * tokens.advantages_BC


def dppo(tokens: Tokens, c: AlgorithmSection) -> jax.Array:
    """-M r A, where M is 0 for a token whose probability has already moved, the way that A pushes
    it, by more than the bound: pi - pi_old > high, or pi_old - pi > low.

    With binary total variation: arXiv:2602.04879.
    """
    moved_BC = jnp.exp(tokens.logprobs_BC) - jnp.exp(tokens.proximal_BC)
    up_BC = tokens.advantages_BC > 0
    stopped_BC = jnp.where(up_BC, moved_BC > c.clip_high, moved_BC < -c.clip_low)
    return -jnp.where(stopped_BC, 0.0, exp(tokens.log_ratio_BC) * tokens.advantages_BC)


def gmpo(tokens: Tokens, c: AlgorithmSection) -> jax.Array:
    """-A times the geometric mean of a completion's ratios, of which each is held to
    log r <= high where A > 0, and to log r >= -low where A < 0.

    Zhao et al. 2025, arXiv:2507.20673.
    """
    log_BC, up_BC = tokens.log_ratio_BC, tokens.advantages_BC > 0
    bounded_BC = jnp.where(
        up_BC, jnp.minimum(log_BC, c.clip_high), jnp.maximum(log_BC, -c.clip_low)
    )
    return -exp(tokens.mean_of_completion(bounded_BC)) * tokens.advantages_BC


OWN: dict[str, Loss] = {
    loss.__name__: loss for loss in (ppo_clip, gspo, gspo_token, cispo, sapo, dppo, gmpo)
}


def make_loss(name: str) -> Loss:
    """The loss that `algorithm.loss` names.

    Raises:
      UserError: it is the user's own, and cannot be called, or returns something else than [B, C].
    """
    if not is_custom(name):
        return OWN[name]
    function = load("loss", name)

    def loss(tokens: Tokens, c: AlgorithmSection) -> jax.Array:
        loss_BC = function(tokens, c)
        shape = tokens.trained_BC.shape
        if jnp.shape(loss_BC) != shape:
            raise UserError(
                f"algorithm.loss = {name}: it returned shape {jnp.shape(loss_BC)} where one term "
                f"for each token, {shape}, was expected; weights and sums are added to them later"
            )
        return loss_BC

    return loss
