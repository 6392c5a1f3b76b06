"""The objective, against its formula in Python floats, and what must not reach it."""

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl.config import UpdateSection
from jaxrl.losses import grpo_loss, token_logprobs
from jaxrl.models.config import load_config
from jaxrl.models.decoder import Policy
from jaxrl.types import TrainBatch

CLIP = {"clip_low": 0.2, "clip_high": 0.28}
CAP = 1.5
OPTIONS = CLIP | {"correction_cap": CAP}
CAPS = pytest.mark.parametrize("cap", [CAP, None], ids=["token_tis", "none"])
TRANSFORMS = pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])


@pytest.fixture(autouse=True)
def no_silent_broadcasting():
    with jax.numpy_rank_promotion("raise"):
        yield


def random_case(seed: int, B: int = 8, C: int = 9):
    """Current and proximal log-probs [B, C] and a batch; wide ratios, a masked row, unequal
    lengths, holes."""
    rng = np.random.default_rng(seed)
    mask_BC = (np.arange(C) >= 2) & (np.arange(C) < rng.integers(4, C + 1, (B, 1)))
    mask_BC[3] = False
    mask_BC[4, 3] = False
    mask_BC = mask_BC.astype(np.float32)
    behavior_BC = (rng.normal(-1.5, 0.5, (B, C)) * mask_BC).astype(np.float32)
    proximal_BC = (behavior_BC + rng.normal(0.0, 0.6, (B, C))).astype(np.float32)
    logprobs_BC = (proximal_BC + rng.normal(0.0, 0.5, (B, C))).astype(np.float32)
    advantages_BC = np.where(rng.random((B, C)) < 0.5, 1.0, -1.0) * rng.uniform(0.2, 2.0, (B, C))
    return logprobs_BC, proximal_BC, batch_of(mask_BC, behavior_BC, advantages_BC)


def batch_of(mask_BC, behavior_BC, advantages_BC) -> TrainBatch:
    """With nothing in what the loss does not look at."""
    unused = [np.zeros((len(mask_BC), 1), np.int32)] * 6
    return TrainBatch(*unused, mask_BC, behavior_BC, np.float32(advantages_BC))


def reference(logprobs_BC, proximal_BC, batch, cap):
    """Loss, metrics and gradient of the docstring, one token at a time; also how often each branch
    was taken."""
    trained = [
        (b, t)
        for b, row in enumerate(batch.loss_mask_BC.tolist())
        for t, weight in enumerate(row)
        if weight > 0
    ]
    n = len(trained)
    total, ratios, rhos, weights, mismatches = 0.0, [], [], [], []
    branches = dict.fromkeys(("high", "low", "left_high", "left_low", "inside"), 0)
    gradient_BC = np.zeros(logprobs_BC.shape)
    for b, t in trained:
        advantage = float(batch.advantages_BC[b, t])
        ratio = math.exp(float(logprobs_BC[b, t]) - float(proximal_BC[b, t]))
        mismatch = float(proximal_BC[b, t]) - float(batch.behavior_logprobs_BC[b, t])
        rho = math.exp(mismatch)
        weight = 1.0 if cap is None else min(rho, cap)
        if ratio > 1 + CLIP["clip_high"]:
            branch = "high" if advantage > 0 else "left_high"
        elif ratio < 1 - CLIP["clip_low"]:
            branch = "low" if advantage < 0 else "left_low"
        else:
            branch = "inside"
        branches[branch] += 1
        bound = {"high": 1 + CLIP["clip_high"], "low": 1 - CLIP["clip_low"]}.get(branch)
        total -= weight * advantage * (ratio if bound is None else bound)
        gradient_BC[b, t] = 0.0 if bound else -weight * advantage * ratio / n
        ratios.append(ratio)
        rhos.append(rho)
        weights.append(weight)
        mismatches.append(mismatch)
    metrics = {
        "clip_fraction": (branches["high"] + branches["low"]) / n,
        "ratio/mean": sum(ratios) / n,
        "ratio/max": max(ratios),
        "mismatch/mean_abs_dlogp": sum(map(abs, mismatches)) / n,
        "mismatch/max_abs_dlogp": max(map(abs, mismatches)),
        "mismatch/k1": -sum(mismatches) / n,
        "mismatch/k3": sum(r - 1 - m for r, m in zip(rhos, mismatches, strict=True)) / n,
        "correction/mean": sum(rhos) / n,
        "correction/max": max(rhos),
        "correction/capped_fraction": sum(rho > (cap or math.inf) for rho in rhos) / n,
        "correction/ess": sum(weights) ** 2 / (n * sum(w * w for w in weights)),
    }
    return total / n, metrics, gradient_BC, branches


def loss_only(logprobs_BC, proximal_BC, batch, **options):
    return grpo_loss(logprobs_BC, proximal_BC, batch, **(OPTIONS | options))[0]


# --- log-probs of tokens ---


def identity(hidden):
    """The states are the logits."""
    return hidden


@TRANSFORMS
@pytest.mark.parametrize("chunk_tokens", [None, 1, 4, 6, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_token_logprobs_are_the_log_softmax_of_the_logits(transform, temperature, chunk_tokens):
    rng = np.random.default_rng(0)
    logits_BCV = rng.normal(0, 3, (2, 5, 7)).astype(np.float32)
    targets_BC = rng.integers(0, 7, (2, 5)).astype(np.int32)
    logprobs_BC, entropy_BC = transform(
        lambda x, y: token_logprobs(x, identity, y, temperature, chunk_tokens)
    )(logits_BCV, targets_BC)
    assert logprobs_BC.dtype == entropy_BC.dtype == jnp.float32
    for b in range(2):
        for c in range(5):
            scaled = [float(x) / temperature for x in logits_BCV[b, c]]
            log_total = math.log(math.fsum(math.exp(x) for x in scaled))
            logs = [x - log_total for x in scaled]
            assert logprobs_BC[b, c] == pytest.approx(logs[targets_BC[b, c]], abs=2e-6)
            entropy = -math.fsum(math.exp(x) * x for x in logs)
            assert entropy_BC[b, c] == pytest.approx(entropy, abs=2e-6)


def test_token_logprobs_of_bfloat16_logits_are_computed_in_float32():
    logits_BCV = jnp.array([[[0.0, 8.0, 9.0]]], jnp.bfloat16)
    logprobs_BC, _ = token_logprobs(logits_BCV, identity, jnp.array([[1]], jnp.int32), 1.0)
    expected = 8.0 - math.log(1.0 + math.exp(8.0) + math.exp(9.0))
    assert logprobs_BC[0, 0] == pytest.approx(expected, abs=1e-6)


def test_token_logprobs_of_huge_logits_are_finite():
    logits_BCV = jnp.array([[[1e4, -1e4]]], jnp.float32)
    logprobs_BC, entropy_BC = token_logprobs(logits_BCV, identity, jnp.array([[1]], jnp.int32), 1.0)
    assert logprobs_BC[0, 0] == pytest.approx(-2e4) and entropy_BC[0, 0] == 0.0


@pytest.mark.parametrize("chunk_tokens", [1, 8, 9, 12, 21])
def test_chunks_change_neither_log_probs_nor_gradients_and_bound_the_logits(chunk_tokens):
    rng = np.random.default_rng(1)
    hidden_BCD = rng.normal(size=(3, 7, 5)).astype(np.float32)
    head_DV = rng.normal(size=(5, 11)).astype(np.float32)
    targets_BC = rng.integers(0, 11, (3, 7)).astype(np.int32)
    factors_BC = rng.normal(size=(2, 3, 7)).astype(np.float32)
    tokens_at_a_time = []

    def total(hidden_BCD, head_DV, chunk):
        def unembed(hidden):
            tokens_at_a_time.append(hidden.shape[0] * hidden.shape[1])
            return jnp.matmul(hidden, head_DV)

        scores = token_logprobs(hidden_BCD, unembed, targets_BC, 0.9, chunk)
        return sum((x * f).sum() for x, f in zip(scores, factors_BC, strict=True))

    run = jax.jit(jax.value_and_grad(total, argnums=(0, 1)), static_argnums=2)
    expected, expected_gradients = run(hidden_BCD, head_DV, None)
    tokens_at_a_time.clear()
    found, gradients = run(hidden_BCD, head_DV, chunk_tokens)
    assert max(tokens_at_a_time) <= max(chunk_tokens, 3)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for one, other in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max(), rtol=0)


def test_chunks_keep_the_memory_of_a_large_vocabulary_small():
    """4,096 tokens, 151,936 entries, 1,024 features, bfloat16 products: compiled, not run."""
    V, D, tokens = 151_936, 1024, 4096
    tiny = load_config(Path("configs/tiny_policy"))  # its embedding is tied
    policy = Policy(tiny, jnp.dtype("bfloat16"))
    shapes = [((V, D), jnp.float32), ((1, tokens, D), jnp.bfloat16), ((1, tokens), jnp.int32)]

    def gib(chunk_tokens):
        def total(embed_VD, hidden_BCD, targets_BC):
            unembed = functools.partial(policy.unembed, {"embed": embed_VD})
            return token_logprobs(hidden_BCD, unembed, targets_BC, 1.0, chunk_tokens)[0].sum()

        arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
        compiled = jax.jit(jax.grad(total, argnums=(0, 1))).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes / 2**30

    at_a_time = (UpdateSection().logits_mib << 20) // (4 * V)
    assert gib(at_a_time) <= 1.4
    assert gib(None) > 4


# --- the objective ---


@CAPS
@pytest.mark.parametrize(
    ("seed", "transform"),
    [(0, lambda f: f), *[(seed, jax.jit) for seed in range(4)]],
    ids=["eager", "jit0", "jit1", "jit2", "jit3"],
)
def test_loss_metrics_and_gradient_equal_the_formula_token_by_token(seed, transform, cap):
    logprobs_BC, proximal_BC, batch = random_case(seed)
    expected_loss, expected, expected_gradient_BC, branches = reference(
        logprobs_BC, proximal_BC, batch, cap
    )
    # The case takes every branch.
    assert all(branches.values()), branches
    assert cap is None or 0 < expected["correction/capped_fraction"] < 1

    run = transform(
        lambda x: jax.value_and_grad(grpo_loss, has_aux=True)(
            x, proximal_BC, batch, **CLIP, correction_cap=cap
        )
    )
    (loss, metrics), gradient_BC = run(jnp.asarray(logprobs_BC))
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    np.testing.assert_allclose(gradient_BC, expected_gradient_BC, rtol=1e-5, atol=1e-8)
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-5, atol=1e-7, err_msg=name)


def test_the_largest_ratio_is_that_of_a_trained_token_though_all_fell():
    _, _, batch = random_case(0)
    behavior_BC = batch.behavior_logprobs_BC
    _, metrics = grpo_loss(behavior_BC - 3.0, behavior_BC - 1.0, batch, **OPTIONS)
    assert metrics["ratio/max"] == pytest.approx(math.exp(-2.0), rel=1e-5)
    assert metrics["correction/max"] == pytest.approx(math.exp(-1.0), rel=1e-5)


def test_on_policy_gradient_is_reinforce():
    """Where engine and trainer agree the gradient is -A / N on trained tokens, 0 elsewhere."""
    _, _, batch = random_case(0)
    logprobs_BC = jnp.asarray(batch.behavior_logprobs_BC)
    gradient_BC = jax.grad(loss_only)(logprobs_BC, logprobs_BC, batch)
    expected_BC = -batch.advantages_BC * batch.loss_mask_BC / batch.loss_mask_BC.sum()
    np.testing.assert_allclose(gradient_BC, expected_BC, rtol=1e-5, atol=1e-8)


def test_the_importance_weight_is_detached():
    """With the proximal policy the current one, as in the update, the weight stays a constant."""
    _, proximal_BC, batch = random_case(1)
    gradient_BC = jax.grad(lambda x: loss_only(x, x, batch))(jnp.asarray(proximal_BC))
    weight_BC = np.minimum(np.exp(proximal_BC - batch.behavior_logprobs_BC), CAP)
    expected_BC = -weight_BC * batch.advantages_BC * batch.loss_mask_BC
    np.testing.assert_allclose(
        gradient_BC, expected_BC / batch.loss_mask_BC.sum(), rtol=1e-5, atol=1e-8
    )


def test_no_gradient_flows_into_the_proximal_log_probs():
    logprobs_BC, proximal_BC, batch = random_case(1)
    gradient_BC = jax.grad(loss_only, argnums=1)(logprobs_BC, jnp.asarray(proximal_BC), batch)
    assert not np.any(gradient_BC)


@CAPS
def test_untrained_positions_cannot_reach_loss_metrics_or_gradient(cap):
    logprobs_BC, proximal_BC, batch = random_case(2)
    untrained_BC = batch.loss_mask_BC == 0
    assert untrained_BC.any()
    run = jax.jit(
        lambda x, y, b: jax.value_and_grad(grpo_loss, has_aux=True)(
            x, y, b, **CLIP, correction_cap=cap
        )
    )
    clean, clean_gradient_BC = run(logprobs_BC, proximal_BC, batch)

    for garbage in np.float32([200.0, -200.0, math.inf, -math.inf, math.nan]):  # exp(200): inf

        def spoil(x_BC, garbage=garbage):
            return np.where(untrained_BC, garbage, x_BC)

        behavior_BC = spoil(batch.behavior_logprobs_BC)
        advantages_BC = spoil(batch.advantages_BC)
        for spoilt in (
            (spoil(logprobs_BC), proximal_BC, batch),
            (logprobs_BC, spoil(proximal_BC), batch),
            (logprobs_BC, proximal_BC, batch._replace(behavior_logprobs_BC=behavior_BC)),
            (logprobs_BC, proximal_BC, batch._replace(advantages_BC=advantages_BC)),
            (spoil(logprobs_BC), spoil(proximal_BC), batch._replace(advantages_BC=advantages_BC)),
        ):
            found, gradient_BC = run(*spoilt)
            jax.tree.map(np.testing.assert_array_equal, found, clean)
            np.testing.assert_array_equal(gradient_BC, clean_gradient_BC)
            assert not np.any(gradient_BC[untrained_BC])


@CAPS
@pytest.mark.parametrize("log_ratio", [80.0, -80.0, 1e4])
def test_huge_ratios_stay_finite(log_ratio, cap):
    _, _, batch = random_case(3)
    behavior_BC = jnp.asarray(batch.behavior_logprobs_BC)
    for current_BC, proximal_BC in (
        (behavior_BC + log_ratio, behavior_BC),
        (behavior_BC + log_ratio, behavior_BC + log_ratio),
    ):
        (loss, metrics), gradient_BC = jax.value_and_grad(grpo_loss, has_aux=True)(
            current_BC, proximal_BC, batch, **CLIP, correction_cap=cap
        )
        assert np.isfinite(loss) and np.all(np.isfinite(gradient_BC))
        assert all(np.isfinite(value) for value in metrics.values()), metrics


@CAPS
def test_a_batch_with_nothing_to_train_has_zero_loss_and_gradient(cap):
    logprobs_BC, proximal_BC, batch = random_case(4)
    empty = batch._replace(loss_mask_BC=np.zeros_like(batch.loss_mask_BC))
    (loss, metrics), gradient_BC = jax.value_and_grad(grpo_loss, has_aux=True)(
        jnp.asarray(logprobs_BC), proximal_BC, empty, **CLIP, correction_cap=cap
    )
    assert loss == 0.0 and not np.any(gradient_BC)
    assert all(np.isfinite(value) for value in metrics.values()), metrics


def test_the_loss_of_a_batch_is_the_token_weighted_mean_of_its_parts():
    logprobs_BC, proximal_BC, batch = random_case(5)
    loss = jax.jit(loss_only)
    whole = loss(logprobs_BC, proximal_BC, batch)
    for rows in ([0, 5, 6, 7], [0, 1, 2, 3]):
        total, of_parts = 0.0, 0.0
        for part in (np.array(rows), np.setdiff1d(np.arange(8), rows)):
            piece = jax.tree.map(lambda x, part=part: x[part], batch)
            tokens = piece.loss_mask_BC.sum()
            total += loss(logprobs_BC[part], proximal_BC[part], piece) * tokens
            of_parts += loss(
                logprobs_BC[part], proximal_BC[part], piece, tokens=batch.loss_mask_BC.sum()
            )
        np.testing.assert_allclose(of_parts, whole, rtol=1e-5)
        np.testing.assert_allclose(total / batch.loss_mask_BC.sum(), whole, rtol=1e-5)


def test_padding_changes_nothing():
    logprobs_BC, proximal_BC, batch = random_case(5)
    padded = batch_of(*(np.pad(x, ((0, 3), (0, 7))) for x in batch[6:]))
    longer_BC, proximal_longer_BC = (
        np.pad(x, ((0, 3), (0, 7))) for x in (logprobs_BC, proximal_BC)
    )
    np.testing.assert_allclose(
        loss_only(longer_BC, proximal_longer_BC, padded),
        loss_only(logprobs_BC, proximal_BC, batch),
        rtol=1e-6,
    )


def test_sharding_the_batch_changes_neither_loss_nor_gradient():
    case = random_case(6)
    rows = NamedSharding(jax.make_mesh((8,), ("rows",)), P("rows"))
    put = jax.tree.map(lambda x: jax.device_put(x, rows), case)
    run = jax.jit(jax.value_and_grad(loss_only))
    loss, gradient_BC = run(*case)
    sharded_loss, sharded_gradient_BC = run(*put)
    assert len(sharded_gradient_BC.sharding.device_set) == 8
    np.testing.assert_allclose(sharded_loss, loss, rtol=1e-6)
    np.testing.assert_allclose(sharded_gradient_BC, gradient_BC, rtol=1e-6, atol=1e-9)
