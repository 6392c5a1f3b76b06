"""What other projects compute is ours, or differs by what stands here.

Their published formulas in torch, on one completion a row, right-padded; ours through the
objective. Values and gradients are compared.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxrl.config import AlgorithmSection
from jaxrl.objectives.aggregation import make_shares
from jaxrl.objectives.objective import make_objective
from jaxrl.objectives.tokens import Anchors
from jaxrl.types import TrainBatch

LENGTHS = np.array([[3, 9, 1], [6, 2, 7]])  # of completions, by prompt
B, T, LONGEST = LENGTHS.size, LENGTHS.max(), 12
MASK = (np.arange(T) < LENGTHS.reshape(-1, 1)).astype(np.float64)


def drawn(seed: int) -> dict[str, np.ndarray]:
    """Log-probs that are somewhat apart, token by token and completion by completion."""
    rng = np.random.default_rng(seed)

    def apart(scale: float) -> np.ndarray:
        return rng.normal(0.0, scale, (B, T)) + rng.normal(0.0, scale / 2, (B, 1))

    mu = apart(0.5) - 2.0
    old = mu + apart(0.3)
    new = old + apart(0.5)
    signs = np.array([1, -1, 1, -1, 1, -1])[:, None]
    advantage = signs * rng.uniform(0.5, 2.0, (B, 1))
    return {"new": new, "old": old, "mu": mu, "reference": new + apart(0.3), "A": advantage}


# --- theirs ---


def clipped(ratio, x, low, high, dual=None):
    """Of a token: PPO's, as verl, TRL and most others have it."""
    worst = torch.maximum(-ratio * x.A, -ratio.clamp(1 - low, 1 + high) * x.A)
    if dual is None:
        return worst
    return torch.where(x.A < 0, torch.minimum(worst, -dual * x.A), worst)


def token_mean(loss, x):
    return (loss * x.mask).sum() / x.mask.sum()


def verl_token_tis(x):
    """`rollout_is: token`, threshold 2, on its PPO loss, which has a dual clip of 3."""
    weight = (x.old - x.mu).clamp(-20, 20).exp().clamp(max=2.0)
    return token_mean(clipped((x.new - x.old).exp(), x, 0.2, 0.2, 3.0) * weight, x)


def verl_sequence_tis(x):
    product = ((x.old - x.mu) * x.mask).sum(-1, keepdim=True).clamp(-20, 20).exp()
    weight = product.clamp(max=2.0)
    return token_mean(clipped((x.new - x.old).exp(), x, 0.2, 0.2, 3.0) * weight, x)


def trl_sequence_mask(x):
    """TRL's default between engine and trainer. What is kept is weighted by its product, too: our
    `sequence_mask` alone would only drop."""
    product = ((x.old - x.mu) * x.mask).sum(-1, keepdim=True).exp()
    weight = product.masked_fill(product > 3.0, 0.0)
    return token_mean(clipped((x.new - x.old).exp(), x, 0.2, 0.2) * weight, x)


def trl_gspo(x):
    """`importance_sampling_level: sequence`, with `loss_type: grpo`."""
    log_ratio = ((x.new - x.old) * x.mask).sum(-1) / x.mask.sum(-1)
    loss = clipped(log_ratio.exp()[:, None], x, 0.05, 0.08).expand(B, T)
    return ((loss * x.mask).sum(-1) / x.mask.sum(-1)).mean()


def trl_cispo(x):
    """`epsilon_high` is the ratio itself. In verl and slime it is counted from 1, so theirs of 0.2
    is our 1.2; verl's `epsilon_low` is a floor as well, which we and the paper do not have."""
    ratio = (x.new - x.old).exp().clamp(max=1.2).detach()
    return token_mean(-ratio * x.A * x.new, x)


def prime_rl_dppo(x):
    """Its loss less `kl_tau` times the squared log-ratio of every token, dropped ones too, which we
    do not have. Ratios are from the engine."""
    log_ratio = x.new - x.mu
    moved = x.new.exp() - x.mu.exp()
    invalid = torch.where(x.A > 0, moved > 0.02, moved < -0.02)
    theirs = token_mean(-(log_ratio.exp() * x.A * ~invalid) + 1e-3 * log_ratio.square(), x)
    return theirs - 1e-3 * token_mean(log_ratio.square(), x)


def trl_dr_grpo(x):
    """`loss_type: dr_grpo` divides by all completions and the longest that there may be."""
    loss = clipped((x.new - x.old).exp(), x, 0.2, 0.2)
    return (loss * x.mask).sum() / (B * LONGEST)


def verl_dr_grpo(x):
    """`seq-mean-token-sum-norm` was not divided by the number of completions until 2026, so that
    its size depended on the batch's. Divided here."""
    loss = clipped((x.new - x.old).exp(), x, 0.2, 0.2)
    return ((loss * x.mask).sum(-1).sum() / LONGEST) / B


def trl_corrected_kl(x):
    """`use_bias_correction_kl`: k3 times the ratio, which has a gradient of its own; beta 0.5."""
    ratio = (x.new - x.old).exp()
    back = x.reference - x.new
    return token_mean(clipped(ratio, x, 0.2, 0.2) + 0.5 * ratio * (back.exp() - back - 1), x)


PPO = {"clip_low": 0.2, "clip_high": 0.2}
NONE = {"correction": "none"}
NORM = {"aggregation": "sequence_mean_token_sum_norm", **PPO, **NONE}
PEERS = {
    verl_token_tis: {"correction": "token_tis", "dual_clip": 3.0, **PPO},
    verl_sequence_tis: {"correction": "sequence_tis", "dual_clip": 3.0, **PPO},
    trl_sequence_mask: {
        "correction": "sequence_tis",
        "correction_cap": 3.0,
        "sequence_mask": [0.0, 3.0],
        **PPO,
    },
    trl_gspo: {
        "loss": "gspo",
        "clip_low": 0.05,
        "clip_high": 0.08,
        "aggregation": "sequence_mean_token_mean",
        **NONE,
    },
    trl_cispo: {"loss": "cispo", "cispo_max": 1.2, **NONE},
    prime_rl_dppo: {"loss": "dppo", "clip_low": 0.02, "clip_high": 0.02, "proximal": "engine"},
    trl_dr_grpo: NORM,
    verl_dr_grpo: NORM,
    trl_corrected_kl: {"kl_coefficient": 0.5, "kl_corrected": True, **PPO, **NONE},
}


class Case:
    """The numbers as tensors; `new` wants a gradient."""

    def __init__(self, numbers: dict[str, np.ndarray]):
        self.new, self.old, self.mu, self.reference, self.A = (
            torch.tensor(numbers[name]) for name in ("new", "old", "mu", "reference", "A")
        )
        self.mask = torch.tensor(MASK)
        self.new.requires_grad_()


def ours(section: AlgorithmSection):
    """run(numbers) -> (loss, its gradient) of the same completions, one a row."""
    shares_B1 = make_shares(section.aggregation, LONGEST)(LENGTHS).reshape(-1, 1)
    objective = make_objective(section)

    @jax.jit
    @jax.value_and_grad
    def loss(new_BC, old_BC, mu_BC, reference_BC, advantages_BC):
        batch = TrainBatch(
            *[np.zeros((B, 1), np.int32)] * 6,
            MASK.astype(np.int32),
            np.float32(MASK),
            mu_BC,
            advantages_BC,
            np.float32(shares_B1 * MASK),
        )
        anchors = Anchors(old_BC, reference_BC)
        return objective((new_BC, jnp.zeros_like(new_BC)), batch, anchors)[0]

    def run(numbers: dict[str, np.ndarray]):
        arrays = (numbers[name] for name in ("new", "old", "mu", "reference", "A"))
        return loss(*(np.float32(np.broadcast_to(x, (B, T))) for x in arrays))

    return run


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.__name__)
def test_a_peer_s_formula_is_ours_but_for_what_it_says(peer):
    run = ours(AlgorithmSection(**PEERS[peer]))
    for seed in range(4):
        numbers = drawn(seed)
        case = Case(numbers)
        theirs = peer(case)
        theirs.backward()
        loss, gradient_BC = run(numbers)
        np.testing.assert_allclose(loss, theirs.item(), rtol=1e-5, atol=1e-6)
        assert case.new.grad is not None
        np.testing.assert_allclose(gradient_BC, case.new.grad.numpy(), rtol=1e-4, atol=1e-7)
