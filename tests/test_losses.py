"""The objective, against its formula in Python floats, and what must not reach it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl.losses import grpo_loss, token_logprobs
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


def random_case(seed: int, B: int = 8, T: int = 9):
    """Current and proximal log-probs [B, T] and a batch; wide ratios, a masked row, unequal
    lengths, holes."""
    rng = np.random.default_rng(seed)
    mask_BT = (np.arange(T) >= 2) & (np.arange(T) < rng.integers(4, T + 1, (B, 1)))
    mask_BT[3] = False
    mask_BT[4, 3] = False
    mask_BT = mask_BT.astype(np.float32)
    behavior_BT = (rng.normal(-1.5, 0.5, (B, T)) * mask_BT).astype(np.float32)
    proximal_BT = (behavior_BT + rng.normal(0.0, 0.6, (B, T))).astype(np.float32)
    logprobs_BT = (proximal_BT + rng.normal(0.0, 0.5, (B, T))).astype(np.float32)
    tokens_BT = rng.integers(0, 50, (B, T)).astype(np.int32)
    signs_B = np.where(np.arange(B) % 2, 1.0, -1.0)
    advantages_B = (signs_B * rng.uniform(0.2, 2.0, B)).astype(np.float32)
    return logprobs_BT, proximal_BT, TrainBatch(tokens_BT, mask_BT, behavior_BT, advantages_B)


def reference(logprobs_BT, proximal_BT, batch, cap):
    """Loss, metrics and gradient of the docstring, one token at a time; also how often each branch
    was taken."""
    trained = [
        (b, t)
        for b, row in enumerate(batch.loss_mask_BT.tolist())
        for t, weight in enumerate(row)
        if weight > 0
    ]
    n = len(trained)
    total, ratios, rhos, weights, mismatches = 0.0, [], [], [], []
    branches = dict.fromkeys(("high", "low", "left_high", "left_low", "inside"), 0)
    gradient_BT = np.zeros(logprobs_BT.shape)
    for b, t in trained:
        advantage = float(batch.advantages_B[b])
        ratio = math.exp(float(logprobs_BT[b, t]) - float(proximal_BT[b, t]))
        mismatch = float(proximal_BT[b, t]) - float(batch.behavior_logprobs_BT[b, t])
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
        gradient_BT[b, t] = 0.0 if bound else -weight * advantage * ratio / n
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
    return total / n, metrics, gradient_BT, branches


def loss_only(logprobs_BT, proximal_BT, batch, **options):
    return grpo_loss(logprobs_BT, proximal_BT, batch, **(OPTIONS | options))[0]


@TRANSFORMS
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_token_logprobs_are_the_log_softmax_at_the_position_before(transform, temperature):
    rng = np.random.default_rng(0)
    logits_BTV = rng.normal(0, 3, (2, 5, 7)).astype(np.float32)
    tokens_BT = rng.integers(0, 7, (2, 5)).astype(np.int32)
    logprobs_BT, entropy_BT = transform(lambda *x: token_logprobs(*x, temperature))(
        logits_BTV, tokens_BT
    )
    assert logprobs_BT.dtype == entropy_BT.dtype == jnp.float32
    for b in range(2):
        assert logprobs_BT[b, 0] == entropy_BT[b, 0] == 0.0
        for t in range(1, 5):
            scaled = [float(x) / temperature for x in logits_BTV[b, t - 1]]
            log_total = math.log(math.fsum(math.exp(x) for x in scaled))
            logs = [x - log_total for x in scaled]
            assert logprobs_BT[b, t] == pytest.approx(logs[tokens_BT[b, t]], abs=2e-6)
            entropy = -math.fsum(math.exp(x) * x for x in logs)
            assert entropy_BT[b, t] == pytest.approx(entropy, abs=2e-6)


def test_token_logprobs_of_bfloat16_logits_are_computed_in_float32():
    logits_BTV = jnp.array([[[0.0, 8.0, 9.0], [0.0, 0.0, 0.0]]], jnp.bfloat16)
    logprobs_BT, _ = token_logprobs(logits_BTV, jnp.array([[0, 1]], jnp.int32), 1.0)
    expected = 8.0 - math.log(1.0 + math.exp(8.0) + math.exp(9.0))
    assert logprobs_BT[0, 1] == pytest.approx(expected, abs=1e-6)


def test_token_logprobs_of_huge_logits_are_finite():
    logits_BTV = jnp.array([[[1e4, -1e4], [0.0, 0.0]]], jnp.float32)
    logprobs_BT, entropy_BT = token_logprobs(logits_BTV, jnp.array([[0, 1]], jnp.int32), 1.0)
    assert logprobs_BT[0, 1] == pytest.approx(-2e4) and entropy_BT[0, 1] == 0.0


@CAPS
@pytest.mark.parametrize(
    ("seed", "transform"),
    [(0, lambda f: f), *[(seed, jax.jit) for seed in range(4)]],
    ids=["eager", "jit0", "jit1", "jit2", "jit3"],
)
def test_loss_metrics_and_gradient_equal_the_formula_token_by_token(seed, transform, cap):
    logprobs_BT, proximal_BT, batch = random_case(seed)
    expected_loss, expected, expected_gradient_BT, branches = reference(
        logprobs_BT, proximal_BT, batch, cap
    )
    # The case takes every branch.
    assert all(branches.values()), branches
    assert cap is None or 0 < expected["correction/capped_fraction"] < 1

    run = transform(
        lambda x: jax.value_and_grad(grpo_loss, has_aux=True)(
            x, proximal_BT, batch, **CLIP, correction_cap=cap
        )
    )
    (loss, metrics), gradient_BT = run(jnp.asarray(logprobs_BT))
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    np.testing.assert_allclose(gradient_BT, expected_gradient_BT, rtol=1e-5, atol=1e-8)
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-5, atol=1e-7, err_msg=name)


def test_the_largest_ratio_is_that_of_a_trained_token_though_all_fell():
    _, _, batch = random_case(0)
    behavior_BT = batch.behavior_logprobs_BT
    _, metrics = grpo_loss(behavior_BT - 3.0, behavior_BT - 1.0, batch, **OPTIONS)
    assert metrics["ratio/max"] == pytest.approx(math.exp(-2.0), rel=1e-5)
    assert metrics["correction/max"] == pytest.approx(math.exp(-1.0), rel=1e-5)


def test_on_policy_gradient_is_reinforce():
    """Where engine and trainer agree the gradient is -A / N on trained tokens, 0 elsewhere."""
    _, _, batch = random_case(0)
    logprobs_BT = jnp.asarray(batch.behavior_logprobs_BT)
    gradient_BT = jax.grad(loss_only)(logprobs_BT, logprobs_BT, batch)
    expected_BT = -batch.advantages_B[:, None] * batch.loss_mask_BT / batch.loss_mask_BT.sum()
    np.testing.assert_allclose(gradient_BT, expected_BT, rtol=1e-5, atol=1e-8)


def test_the_importance_weight_is_detached():
    """With the proximal policy the current one, as in the update, the weight stays a constant."""
    _, proximal_BT, batch = random_case(1)
    gradient_BT = jax.grad(lambda x: loss_only(x, x, batch))(jnp.asarray(proximal_BT))
    weight_BT = np.minimum(np.exp(proximal_BT - batch.behavior_logprobs_BT), CAP)
    expected_BT = -weight_BT * batch.advantages_B[:, None] * batch.loss_mask_BT
    np.testing.assert_allclose(
        gradient_BT, expected_BT / batch.loss_mask_BT.sum(), rtol=1e-5, atol=1e-8
    )


def test_no_gradient_flows_into_the_proximal_log_probs():
    logprobs_BT, proximal_BT, batch = random_case(1)
    gradient_BT = jax.grad(loss_only, argnums=1)(logprobs_BT, jnp.asarray(proximal_BT), batch)
    assert not np.any(gradient_BT)


@CAPS
def test_untrained_positions_cannot_reach_loss_metrics_or_gradient(cap):
    logprobs_BT, proximal_BT, batch = random_case(2)
    untrained_BT = batch.loss_mask_BT == 0
    masked_B = untrained_BT.all(axis=1)
    assert masked_B.any()
    run = jax.jit(
        lambda x, y, b: jax.value_and_grad(grpo_loss, has_aux=True)(
            x, y, b, **CLIP, correction_cap=cap
        )
    )
    clean, clean_gradient_BT = run(logprobs_BT, proximal_BT, batch)

    for garbage in np.float32([200.0, -200.0, math.inf, -math.inf, math.nan]):  # exp(200): inf

        def spoil(x_BT, garbage=garbage):
            return np.where(untrained_BT, garbage, x_BT)

        behavior_BT = spoil(batch.behavior_logprobs_BT)
        advantages_B = np.where(masked_B, garbage, batch.advantages_B)
        for spoilt in (
            (spoil(logprobs_BT), proximal_BT, batch),
            (logprobs_BT, spoil(proximal_BT), batch),
            (logprobs_BT, proximal_BT, batch._replace(behavior_logprobs_BT=behavior_BT)),
            (logprobs_BT, proximal_BT, batch._replace(advantages_B=advantages_B)),
            (spoil(logprobs_BT), spoil(proximal_BT), batch._replace(advantages_B=advantages_B)),
        ):
            found, gradient_BT = run(*spoilt)
            jax.tree.map(np.testing.assert_array_equal, found, clean)
            np.testing.assert_array_equal(gradient_BT, clean_gradient_BT)
            assert not np.any(gradient_BT[untrained_BT])


@CAPS
@pytest.mark.parametrize("log_ratio", [80.0, -80.0, 1e4])
def test_huge_ratios_stay_finite(log_ratio, cap):
    _, _, batch = random_case(3)
    behavior_BT = jnp.asarray(batch.behavior_logprobs_BT)
    for current_BT, proximal_BT in (
        (behavior_BT + log_ratio, behavior_BT),
        (behavior_BT + log_ratio, behavior_BT + log_ratio),
    ):
        (loss, metrics), gradient_BT = jax.value_and_grad(grpo_loss, has_aux=True)(
            current_BT, proximal_BT, batch, **CLIP, correction_cap=cap
        )
        assert np.isfinite(loss) and np.all(np.isfinite(gradient_BT))
        assert all(np.isfinite(value) for value in metrics.values()), metrics


@CAPS
def test_a_batch_with_nothing_to_train_has_zero_loss_and_gradient(cap):
    logprobs_BT, proximal_BT, batch = random_case(4)
    empty = batch._replace(loss_mask_BT=np.zeros_like(batch.loss_mask_BT))
    (loss, metrics), gradient_BT = jax.value_and_grad(grpo_loss, has_aux=True)(
        jnp.asarray(logprobs_BT), proximal_BT, empty, **CLIP, correction_cap=cap
    )
    assert loss == 0.0 and not np.any(gradient_BT)
    assert all(np.isfinite(value) for value in metrics.values()), metrics


def test_the_loss_of_a_batch_is_the_token_weighted_mean_of_its_parts():
    logprobs_BT, proximal_BT, batch = random_case(5)
    loss = jax.jit(loss_only)
    whole = loss(logprobs_BT, proximal_BT, batch)
    for rows in ([0, 5, 6, 7], [0, 1, 2, 3]):
        total = 0.0
        for part in (np.array(rows), np.setdiff1d(np.arange(8), rows)):
            piece = jax.tree.map(lambda x, part=part: x[part], batch)
            tokens = piece.loss_mask_BT.sum()
            total += loss(logprobs_BT[part], proximal_BT[part], piece) * tokens
        np.testing.assert_allclose(total / batch.loss_mask_BT.sum(), whole, rtol=1e-5)


def test_padding_changes_nothing():
    logprobs_BT, proximal_BT, batch = random_case(5)
    wider = [((0, 0), (0, 7))] * 3 + [((0, 0),)]
    padded = TrainBatch(*(np.pad(x, w) for x, w in zip(batch, wider, strict=True)))
    longer_BT, proximal_longer_BT = (
        np.pad(x, ((0, 0), (0, 7))) for x in (logprobs_BT, proximal_BT)
    )
    np.testing.assert_allclose(
        loss_only(longer_BT, proximal_longer_BT, padded),
        loss_only(logprobs_BT, proximal_BT, batch),
        rtol=1e-6,
    )


def test_sharding_the_batch_changes_neither_loss_nor_gradient():
    case = random_case(6)
    rows = NamedSharding(jax.make_mesh((8,), ("rows",)), P("rows"))
    put = jax.tree.map(lambda x: jax.device_put(x, rows), case)
    run = jax.jit(jax.value_and_grad(loss_only))
    loss, gradient_BT = run(*case)
    sharded_loss, sharded_gradient_BT = run(*put)
    assert len(sharded_gradient_BT.sharding.device_set) == 8
    np.testing.assert_allclose(sharded_loss, loss, rtol=1e-6)
    np.testing.assert_allclose(sharded_gradient_BT, gradient_BT, rtol=1e-6, atol=1e-9)
