"""Log-probs and entropies of tokens, whatever part of the logits exists at a time."""

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.config import UpdateSection
from jaxrl.logprobs import token_logprobs
from jaxrl.models.config import load_config
from jaxrl.models.decoder import Policy

TRANSFORMS = pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])


@pytest.fixture(autouse=True)
def no_silent_broadcasting():
    with jax.numpy_rank_promotion("raise"):
        yield


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
