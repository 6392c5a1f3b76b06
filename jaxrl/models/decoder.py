"""The policy: a pre-norm decoder with rotary positions, grouped-query attention and SwiGLU.

Layers are stacked and scanned, so that compile time does not grow with depth. Parameters are
float32; matrix products run in `compute_dtype`; norms, softmax and logits are float32.

Sources: Qwen3 (Yang et al. 2025, arXiv:2505.09388); rotary positions (Su et al. 2021,
arXiv:2104.09864); grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245); SwiGLU (Shazeer
2020, arXiv:2002.05202).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrl.models.config import DecoderConfig
from jaxrl.models.params import ParamSpec, param_specs

Params = Any  # the nested dict of `param_specs`, as jax arrays


class KVCache(NamedTuple):
    """Keys and values of every layer, [L, B, S, K, H]; slot s holds the token at position s."""

    keys: jax.Array
    values: jax.Array


class Attention(nnx.Module):
    def __init__(self, leaves: dict[str, Any], config: DecoderConfig, dtype: Any):
        self.query, self.key, self.value, self.output = (
            nnx.Param(leaves[name]) for name in ("query", "key", "value", "output")
        )
        self.query_norm = nnx.Param(leaves["query_norm"])
        self.key_norm = nnx.Param(leaves["key_norm"])
        self.config, self.dtype = config, dtype

    def __call__(self, x_BTD, positions_BT, mask_BTS, cache=None, start=0):
        """Attends from T tokens to S slots; with a cache, writes its T keys from slot `start`."""
        c, dtype = self.config, self.dtype
        q_BTNH = project(x_BTD, self.query[...].astype(dtype))
        k_BTKH = project(x_BTD, self.key[...].astype(dtype))
        v_BTKH = project(x_BTD, self.value[...].astype(dtype))
        q_BTNH = rope(rms_norm(q_BTNH, self.query_norm[...], c.norm_eps), positions_BT, c)
        k_BTKH = rope(rms_norm(k_BTKH, self.key_norm[...], c.norm_eps), positions_BT, c)
        if cache is not None:
            cache = KVCache(
                jax.lax.dynamic_update_slice_in_dim(cache.keys, k_BTKH, start, axis=1),
                jax.lax.dynamic_update_slice_in_dim(cache.values, v_BTKH, start, axis=1),
            )
            k_BTKH, v_BTKH = cache
        with jax.named_scope("attention"):
            mixed_BTNH = grouped_attention(q_BTNH, k_BTKH, v_BTKH, mask_BTS)
        return project(mixed_BTNH, self.output[...].astype(dtype), inputs=2), cache


class Mlp(nnx.Module):
    def __init__(self, leaves: dict[str, Any], dtype: Any):
        self.gate, self.up, self.down = (nnx.Param(leaves[name]) for name in ("gate", "up", "down"))
        self.dtype = dtype

    def __call__(self, x_BTD):
        gate, up, down = (w[...].astype(self.dtype) for w in (self.gate, self.up, self.down))
        return project(jax.nn.silu(project(x_BTD, gate)) * project(x_BTD, up), down)


class Norm(nnx.Module):
    def __init__(self, leaves: dict[str, Any], eps: float):
        self.scale, self.eps = nnx.Param(leaves["scale"]), eps

    def __call__(self, x):
        return rms_norm(x, self.scale[...], self.eps)


class Block(nnx.Module):
    def __init__(self, leaves: dict[str, Any], config: DecoderConfig, dtype: Any):
        self.attention_norm = Norm(leaves["attention_norm"], config.norm_eps)
        self.attention = Attention(leaves["attention"], config, dtype)
        self.mlp_norm = Norm(leaves["mlp_norm"], config.norm_eps)
        self.mlp = Mlp(leaves["mlp"], dtype)

    def __call__(self, x_BTD, positions_BT, mask_BTS, cache=None, start=0):
        mixed_BTD, cache = self.attention(
            self.attention_norm(x_BTD), positions_BT, mask_BTS, cache, start
        )
        x_BTD = x_BTD + mixed_BTD
        return x_BTD + self.mlp(self.mlp_norm(x_BTD)), cache


class Decoder(nnx.Module):
    """Token ids to float32 logits. Built on the leaves of `param_specs`, stacked over layers."""

    def __init__(self, params: Params, config: DecoderConfig, compute_dtype: Any, remat: bool):
        self.embed = nnx.Param(params["embed"])
        self.layers = Block(params["layers"], config, compute_dtype)
        self.final_norm = Norm(params["final_norm"], config.norm_eps)
        self.lm_head = None if config.tied_embeddings else nnx.Param(params["lm_head"])
        self.config, self.dtype, self.remat = config, compute_dtype, remat

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        mask_BTS: jax.Array,
        cache: KVCache | None = None,
        start: jax.Array | int = 0,
    ) -> tuple[jax.Array, KVCache | None]:
        """Returns float32 logits [B, T, V] and the cache with T more slots filled (or None).

        Args:
          tokens_BT: int32 token ids.
          positions_BT: int32 rotary position of each token.
          mask_BTS: bool, which of the S tokens (or cache slots) each token may attend to.
          cache: keys and values of earlier tokens; S is then its number of slots.
          start: first slot that these T tokens fill.
        """
        x_BTD = jnp.take(self.embed[...], tokens_BT, axis=0).astype(self.dtype)

        def run(x_BTD, block, layer_cache):
            return block(x_BTD, positions_BT, mask_BTS, layer_cache, start)

        run = nnx.remat(run) if self.remat else run
        scan = nnx.scan(run, in_axes=(nnx.Carry, 0, 0), out_axes=(nnx.Carry, 0))
        x_BTD, cache = scan(x_BTD, self.layers, cache)
        x_BTD = self.final_norm(x_BTD)
        head_DV = self.embed[...].T if self.lm_head is None else self.lm_head[...]
        with jax.named_scope("logits"):
            logits_BTV = project(x_BTD, head_DV.astype(self.dtype), dtype=jnp.float32)
        return logits_BTV, cache


class Policy(NamedTuple):
    """What the trainer and the sampler need of a model: its configuration and how to apply it.

    With `remat` the gradient keeps one activation a layer and computes the rest again: a fraction
    of the memory, and less time where memory is slow (CPU).
    """

    config: DecoderConfig
    compute_dtype: Any
    remat: bool = True

    def apply(self, params: Params, *args: Any, **kwargs: Any) -> tuple[jax.Array, Any]:
        """`Decoder.__call__` as a pure function of `params`."""
        return Decoder(params, self.config, self.compute_dtype, self.remat)(*args, **kwargs)

    def logits(self, params: Params, tokens_BT: jax.Array | np.ndarray) -> jax.Array:
        """Float32 logits [B, T, V] of right-padded rows: causal, positions 0, 1, 2, ...

        Padding stands after every real token, so causality alone keeps it out of their sight.
        """
        B, T = tokens_BT.shape
        positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
        mask_BTS = jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (B, T, T))
        return self.apply(params, tokens_BT, positions_BT, mask_BTS)[0]


def empty_cache(config: DecoderConfig, rows: int, slots: int, dtype: Any) -> KVCache:
    shape = (config.num_layers, rows, slots, config.num_kv_heads, config.head_dim)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def init_params(config: DecoderConfig, key: jax.Array) -> Params:
    """Random float32 parameters: matrices N(0, 0.02), norms 1."""

    def leaf(spec: ParamSpec, key: jax.Array) -> jax.Array:
        if spec.init == "ones":
            return jnp.ones(spec.shape, jnp.float32)
        return 0.02 * jax.random.normal(key, spec.shape, jnp.float32)

    specs = param_specs(config)
    leaves = {
        path: leaf(spec, jax.random.fold_in(key, i)) for i, (path, spec) in enumerate(specs.items())
    }
    return tree_of(leaves)


def tree_of(leaves: dict[tuple[str, ...], Any]) -> Any:
    """A nested dict from a flat one keyed by path."""
    tree: dict[str, Any] = {}
    for (*parents, name), leaf in leaves.items():
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def project(x: jax.Array, w: jax.Array, inputs: int = 1, dtype: Any = None) -> jax.Array:
    """Contracts the last `inputs` axes of `x` with the first `inputs` axes of `w`.

    As a product of two matrices: XLA's CPU backend takes twice as long for the gradient of `w` when
    the rows it sums over are two axes (batch and tokens) and not one.
    """
    rows, outputs = x.shape[: x.ndim - inputs], w.shape[inputs:]
    size = math.prod(w.shape[:inputs])
    y = jnp.matmul(x.reshape(-1, size), w.reshape(size, -1), preferred_element_type=dtype)
    return y.reshape(*rows, *outputs)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * scale over the last axis, in float32 (Zhang and Sennrich, arXiv:1910.07467)."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    # The model rounds before it scales (as its Hugging Face reference does).
    return (normed.astype(x.dtype) * scale.astype(x.dtype)).astype(x.dtype)


def rope(x_BTNH: jax.Array, positions_BT: jax.Array, c: DecoderConfig) -> jax.Array:
    """Rotates the pairs (h, h + H/2) of each head by position * theta^(-2h/H)."""
    half = c.head_dim // 2
    frequency = c.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    # Angles in float32: bfloat16 cannot tell position 256 from 257.
    angle_BT1F = positions_BT[:, :, None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle_BT1F).astype(x_BTNH.dtype), jnp.sin(angle_BT1F).astype(x_BTNH.dtype)
    low, high = x_BTNH[..., :half], x_BTNH[..., half:]
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def grouped_attention(q_BTNH, k_BSKH, v_BSKH, mask_BTS) -> jax.Array:
    """Softmax attention in float32; N query heads share K key/value heads, N / K to each."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKRH = q_BTNH.reshape(B, T, K, N // K, H)
    scores_BKRTS = jnp.einsum(
        "btkrh,bskh->bkrts", q_BTKRH, k_BSKH, preferred_element_type=jnp.float32
    ) * (H**-0.5)
    # Finite, so that a row that may attend to nothing (padding) gives zeros' mean and not NaN.
    scores_BKRTS = jnp.where(mask_BTS[:, None, None], scores_BKRTS, -1e30)
    weights_BKRTS = jax.nn.softmax(scores_BKRTS, axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("bkrts,bskh->btkrh", weights_BKRTS, v_BSKH).reshape(B, T, N, H)
