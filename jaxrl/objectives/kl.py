"""Distance from the reference policy, estimated at the sampled token.

Schulman 2020, "Approximating KL divergence". With x = log pi - log ref: k1 and k3 have the expected
value of KL(pi || ref), but only k2 has its gradient where samples are from pi.
"""

import jax

from jaxrl.objectives.tokens import Tokens, exp


def kl_to_reference(tokens: Tokens, estimator: str) -> jax.Array:
    """[B, C], nats; `estimator` as in `algorithm.kl_estimator`.

    k1  = x                 its gradient is zero in expectation: it only measures
    k2  = x^2 / 2
    k3  = exp(-x) + x - 1   never negative, and of less variance
    k3+ = the value of k3 with the gradient of k2
    """
    x_BC = tokens.logprobs_BC - tokens.reference_BC
    if estimator == "k1":
        return x_BC
    k2_BC, k3_BC = x_BC**2 / 2, exp(-x_BC) + x_BC - 1.0
    if estimator == "k2":
        return k2_BC
    if estimator == "k3":
        return k3_BC
    assert estimator == "k3+", estimator
    return k2_BC + jax.lax.stop_gradient(k3_BC - k2_BC)
