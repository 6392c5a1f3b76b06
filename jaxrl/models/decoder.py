"""The policy: one decoder that covers every family, by its configuration.

Layers are stacked and scanned, so that compile time does not grow with depth. Matrix products run
in `compute_dtype`, whatever the parameters are kept in; norms, softmax and logits are float32.

Sources: rotary positions (Su et al. 2021, arXiv:2104.09864); grouped-query attention (Ainslie et
al. 2023, arXiv:2305.13245); gated MLPs (Shazeer 2020, arXiv:2002.05202); q/k norms and biases
(Qwen 2.5 and 3, arXiv:2412.15115 and 2505.09388); norms after each sub-layer (OLMo 2,
arXiv:2501.00656); norms on both sides, soft caps, alternating windows (Gemma 2 and 3,
arXiv:2408.00118 and 2503.19786); mixtures of experts (Mixtral, arXiv:2401.04088); attention sinks
(gpt-oss, arXiv:2508.10925); low-rank adapters (Hu et al. 2021, arXiv:2106.09685).
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxrl.mesh import batch_sharding, keep_rows, partition, row_shards
from jaxrl.models.config import DecoderConfig, MoeConfig
from jaxrl.models.params import ParamSpec, Path, tree_of
from jaxrl.models.rope import Rope

Params = Any  # the nested dict of `param_specs`, as jax arrays
_OSS_ALPHA, _OSS_LIMIT = 1.702, 7.0  # of gpt-oss's gated activation

# What the forward pass keeps of a layer for the backward pass, beside its input; the rest is
# computed again. `attention` keeps what is named so, the heads' outputs; `dots` keeps the products
# with weights, those of experts excepted.
REMAT: dict[str, Callable[..., bool] | None] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "none": None,
}


class KVCache(NamedTuple):
    """Keys and values of every layer, [L, B, S, K, H]."""

    keys: jax.Array
    values: jax.Array


class Context(NamedTuple):
    """What a layer needs to know of the tokens: who sees whom, and how far positions turn."""

    mask_BTS: jax.Array
    cos_BT1F: jax.Array
    sin_BT1F: jax.Array


class Linear(nnx.Module):
    """x W, plus a bias and a low-rank adapter where the leaves have them."""

    def __init__(
        self, leaves: dict[str, Any], name: str, dtype: Any, inputs: int = 1, scale: float = 0.0
    ):
        self.weight = nnx.Param(leaves[name])
        bias, lora_b = leaves.get(f"{name}_bias"), leaves.get(f"{name}_lora_b")
        self.bias = None if bias is None else nnx.Param(bias)
        self.lora_b = None if lora_b is None else nnx.Param(lora_b)
        self.lora_a = None if lora_b is None else nnx.Param(_lora_a(leaves, name))
        self.inputs, self.dtype, self.scale = inputs, dtype, scale

    def __call__(self, x):
        y = project(x, self.weight[...].astype(self.dtype), self.inputs)
        if self.bias is not None:
            y = y + self.bias[...].astype(self.dtype)
        if self.lora_a is not None and self.lora_b is not None:
            low = project(x, self.lora_a[...].astype(self.dtype), self.inputs)
            y = y + self.scale * project(low, self.lora_b[...].astype(self.dtype))
        return y


class Norm(nnx.Module):
    def __init__(self, scale: Any, c: DecoderConfig):
        self.scale, self.eps, self.offset = nnx.Param(scale), c.norm_eps, float(c.norm_offset)

    def __call__(self, x):
        return rms_norm(x, self.offset + self.scale[...].astype(jnp.float32), self.eps)


class Attention(nnx.Module):
    def __init__(self, leaves: dict[str, Any], c: DecoderConfig, dtype: Any, lora_scale: float):
        linear = functools.partial(Linear, leaves, dtype=dtype, scale=lora_scale)
        self.query, self.key, self.value = linear("query"), linear("key"), linear("value")
        self.output = linear("output", inputs=2)
        norms = c.qk_norm is not None
        self.query_norm = Norm(leaves["query_norm"], c) if norms else None
        self.key_norm = Norm(leaves["key_norm"], c) if norms else None
        self.sinks = nnx.Param(leaves["sinks"]) if c.attention_sinks else None
        self.config = c

    def __call__(self, x_BTD, context: Context, cache=None, start=0):
        """Attends from T tokens to S slots; with a cache, writes its T keys from slot `start`."""
        c = self.config
        q_BTNH, k_BTKH, v_BTKH = self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)
        if self.query_norm is not None and self.key_norm is not None:
            q_BTNH = _norm_heads(self.query_norm, q_BTNH, c)
            k_BTKH = _norm_heads(self.key_norm, k_BTKH, c)
        q_BTNH, k_BTKH = turn(q_BTNH, context), turn(k_BTKH, context)
        if cache is not None:
            cache = KVCache(
                jax.lax.dynamic_update_slice_in_dim(cache.keys, k_BTKH, start, axis=1),
                jax.lax.dynamic_update_slice_in_dim(cache.values, v_BTKH, start, axis=1),
            )
            k_BTKH, v_BTKH = cache
        with jax.named_scope("attention"):
            mixed_BTNH = grouped_attention(
                q_BTNH,
                k_BTKH,
                v_BTKH,
                context.mask_BTS,
                scale=c.attention_scale or c.head_dim**-0.5,
                softcap=c.attention_softcap,
                sinks_N=None if self.sinks is None else self.sinks[...],
            )
        return self.output(checkpoint_name(mixed_BTNH, "attention")), cache


class Mlp(nnx.Module):
    def __init__(self, leaves: dict[str, Any], c: DecoderConfig, dtype: Any, lora_scale: float):
        linear = functools.partial(Linear, leaves, dtype=dtype, scale=lora_scale)
        self.gate, self.up, self.down = linear("gate"), linear("up"), linear("down")
        self.activation = c.activation

    def __call__(self, x_BTD):
        return self.down(activate(self.gate(x_BTD), self.activation) * self.up(x_BTD))


class Experts(nnx.Module):
    """Every token goes through the few experts that the router gives it the most weight for.

    On a mesh each device brings the tokens of its rows. Those of the devices along `expert` are
    gathered, each device runs them through the experts that it holds, and the sums are scattered
    back. Where a token has about as many experts as that axis has devices, this moves about as much
    as sending each token only where it is wanted; it drops none, and its shapes do not depend on
    where tokens go.
    """

    def __init__(
        self,
        leaves: dict[str, Any],
        moe: MoeConfig,
        c: DecoderConfig,
        dtype: Any,
        mesh: Mesh | None,
    ):
        self.router = Linear(leaves, "router", dtype)
        self.leaves = nnx.data({n: nnx.Param(w) for n, w in leaves.items() if "router" not in n})
        self.moe, self.activation, self.dtype, self.mesh = moe, c.activation, dtype, mesh

    def __call__(self, x_BTD):
        with jax.named_scope("router"):
            shares_BTE = jax.nn.softmax(self.router(x_BTD).astype(jnp.float32), axis=-1)
            shares_BTC, chosen_BTC = jax.lax.top_k(shares_BTE, self.moe.experts_per_token)
            if self.moe.normalize:
                shares_BTC /= shares_BTC.sum(axis=-1, keepdims=True)
        leaves = {name: leaf[...].astype(self.dtype) for name, leaf in self.leaves.items()}
        with jax.named_scope("experts"):
            if self.mesh is None or self.mesh.size == 1:
                return self._run(x_BTD, shares_BTC, chosen_BTC, leaves)
            return self._run_on_mesh(self.mesh, x_BTD, shares_BTC, chosen_BTC, leaves)

    def _run_on_mesh(self, mesh: Mesh, x_BTD, shares_BTC, chosen_BTC, leaves):
        split = x_BTD.shape[0] % row_shards(mesh) == 0
        rows = batch_sharding(mesh, 3).spec if split else P()
        specs = {name: self._layout(mesh, name, leaf, split) for name, leaf in leaves.items()}
        across = self.moe.intermediate_size % mesh.shape["tensor"] == 0

        def run(x_BTD, shares_BTC, chosen_BTC, leaves):
            if split:
                x_BTD, shares_BTC, chosen_BTC = (
                    jax.lax.all_gather(x, "expert", tiled=True)
                    for x in (x_BTD, shares_BTC, chosen_BTC)
                )
                leaves = {name: _whole(leaf, specs[name], "fsdp") for name, leaf in leaves.items()}
            first = jax.lax.axis_index("expert") * len(leaves["down"])
            if across and "down_bias" in leaves:  # added once, not on every device of `tensor`
                once = jax.lax.axis_index("tensor") == 0
                leaves["down_bias"] = jnp.where(once, leaves["down_bias"], 0)
            y_BTD = self._run(x_BTD, shares_BTC, chosen_BTC - first, leaves)
            y_BTD = jax.lax.psum(y_BTD, "tensor") if across else y_BTD
            if split:
                return jax.lax.psum_scatter(y_BTD, "expert", tiled=True)
            return jax.lax.psum(y_BTD, "expert")

        on_mesh = jax.shard_map(
            run, mesh=mesh, in_specs=(rows, rows, rows, specs), out_specs=rows, check_vma=False
        )
        return on_mesh(x_BTD, shares_BTC, chosen_BTC, leaves)

    def _layout(self, mesh: Mesh, name: str, leaf: jax.Array, split: bool) -> P:
        """How a leaf, without its axis of layers, enters `run`: as it lies, as far as it can."""
        inputs, output = ("mlp", "embed") if name.startswith("down") else ("embed", "mlp")
        axes = ("experts", output) if name.endswith("_bias") else ("experts", inputs, output)
        whole = {"embed"} if not split else set()
        if self.moe.intermediate_size % mesh.shape["tensor"]:
            whole.add("mlp")
        axes = tuple("tokens" if axis in whole else axis for axis in axes)
        return partition(mesh, axes, leaf.shape)

    def _run(self, x_BTD, shares_BTC, chosen_BTC, leaves):
        """What the experts in `leaves`, of which `chosen_BTC` counts from 0, make of the tokens.

        Choices below 0 or past the last are of experts elsewhere, and add nothing. Rows, a token
        for each of its choices, are sorted so that each expert multiplies one run (`ragged_dot`).
        """
        x_ND, experts = x_BTD.reshape(-1, x_BTD.shape[-1]), len(leaves["down"])
        chosen_R, shares_R = chosen_BTC.reshape(-1), shares_BTC.reshape(-1)
        here_R = (chosen_R >= 0) & (chosen_R < experts)
        chosen_R = jnp.where(here_R, chosen_R, experts)  # those elsewhere come last
        order_R = jnp.argsort(chosen_R, stable=True)
        token_R = order_R // chosen_BTC.shape[-1]
        y_RD = self._feed_forward(x_ND[token_R], chosen_R[order_R], leaves)
        weighted_RD = y_RD * shares_R[order_R, None].astype(y_RD.dtype)
        return jnp.zeros_like(x_ND).at[token_R].add(weighted_RD).reshape(x_BTD.shape)

    def _feed_forward(self, x_RD, expert_R, leaves):
        experts = len(leaves["down"])
        rows_E = jnp.bincount(expert_R, length=experts).astype(jnp.int32)

        def product(x, name):
            y, bias_EF = jax.lax.ragged_dot(x, leaves[name], rows_E), leaves.get(f"{name}_bias")
            y = y if bias_EF is None else y + bias_EF[expert_R]
            return jnp.where(expert_R[:, None] < experts, y, 0)  # no backend promises zeros there

        if self.moe.layout == "gpt_oss":
            both = product(x_RD, "gate_up")
            gate = jnp.minimum(both[:, ::2], _OSS_LIMIT)
            up = jnp.clip(both[:, 1::2], -_OSS_LIMIT, _OSS_LIMIT)
            return product((up + 1) * gate * jax.nn.sigmoid(_OSS_ALPHA * gate), "down")
        hidden = activate(product(x_RD, "gate"), self.activation) * product(x_RD, "up")
        return product(hidden, "down")


def _whole(x: jax.Array, spec: P, axis: str) -> jax.Array:
    """`x`, gathered where it is split over `axis` of the mesh."""
    for dimension, part in enumerate(spec):
        if part == axis:
            x = jax.lax.all_gather(x, axis, axis=dimension, tiled=True)
    return x


class Block(nnx.Module):
    def __init__(
        self,
        leaves: dict[str, Any],
        c: DecoderConfig,
        dtype: Any,
        lora_scale: float,
        mesh: Mesh | None,
    ):
        norms = ("attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm")
        self.norms = nnx.data({n: Norm(leaves[n]["scale"], c) for n in norms if n in leaves})
        self.attention = Attention(leaves["attention"], c, dtype, lora_scale)
        if c.moe:
            self.mlp = Experts(leaves["moe"], c.moe, c, dtype, mesh)
        else:
            self.mlp = Mlp(leaves["mlp"], c, dtype, lora_scale)
        self.residual = c.residual_multiplier

    def __call__(self, x_BTD, context: Context, cache=None, start=0):
        mixed_BTD, cache = self.attention(
            self._norm("attention_norm", x_BTD), context, cache, start
        )
        x_BTD = x_BTD + self.residual * self._norm("attention_post_norm", mixed_BTD)
        y_BTD = self.mlp(self._norm("mlp_norm", x_BTD))
        return x_BTD + self.residual * self._norm("mlp_post_norm", y_BTD), cache

    def _norm(self, name: str, x):
        return self.norms[name](x) if name in self.norms else x


class Decoder(nnx.Module):
    """Token ids to hidden states. Built on the leaves of `param_specs`, stacked over layers."""

    def __init__(
        self,
        params: Params,
        c: DecoderConfig,
        dtype: Any,
        remat: str,
        lora_scale: float,
        mesh: Mesh | None,
    ):
        self.embed = nnx.Param(params["embed"])
        self.layers = Block(params["layers"], c, dtype, lora_scale, mesh)
        self.final_norm = Norm(params["final_norm"]["scale"], c)
        self.config, self.dtype, self.remat = c, dtype, remat
        # Else XLA may split hidden states as it finds the weights split, by their embed axis, and
        # then every device computes every row's attention.
        self.rows = functools.partial(keep_rows, mesh=mesh)

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        mask_BTS: jax.Array,
        cache: KVCache | None = None,
        start: jax.Array | int = 0,
        slot_positions_BS: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Returns hidden states [B, T, D] for `unembed`, and the cache with T more slots filled.

        Args:
          tokens_BT: int32 token ids.
          positions_BT: int32 rotary position of each token.
          mask_BTS: bool, which of the S tokens (or cache slots) each token may attend to, windows
            not counted.
          cache: keys and values of earlier tokens; S is then its number of slots.
          start: first slot that these T tokens fill.
          slot_positions_BS: int32 position of the token in each slot; None: there is no cache, and
            the slots are the tokens.
        """
        c = self.config
        x_BTD = self.rows(jnp.take(self.embed[...], tokens_BT, axis=0).astype(self.dtype))
        if c.embedding_multiplier != 1.0:  # rounded to the compute dtype, as it is in the engines
            x_BTD = x_BTD * jnp.asarray(c.embedding_multiplier, self.dtype)
        if slot_positions_BS is None:
            if cache is not None and c.sliding_window is not None:
                raise ValueError("a cache and a window need the positions of the slots")
            slot_positions_BS = positions_BT
        contexts = contexts_of(c, positions_BT, mask_BTS, slot_positions_BS, self.dtype)

        def run(x_BTD, block, slides, layer_cache):
            y_BTD, layer_cache = block(self.rows(x_BTD), contexts(slides), layer_cache, start)
            return self.rows(y_BTD), layer_cache

        policy = REMAT[self.remat]
        run = run if policy is None else nnx.remat(run, policy=policy)
        scan = nnx.scan(run, in_axes=(nnx.Carry, 0, 0, 0), out_axes=(nnx.Carry, 0))
        slides_L = jnp.asarray(c.sliding) if any(c.sliding) and not all(c.sliding) else None
        x_BTD, cache = scan(x_BTD, self.layers, slides_L, cache)
        return self.final_norm(x_BTD), cache


class Policy(NamedTuple):
    """What the trainer and the sampler need of a model: its configuration and how to apply it.

    `remat` is a key of `REMAT`; gradients are the same with each. `lora_scale` is alpha / rank of
    the adapters that `params` may hold beside the leaves they adapt.
    """

    config: DecoderConfig
    compute_dtype: Any
    remat: str = "full"
    lora_scale: float = 0.0
    mesh: Mesh | None = None

    def hidden(self, params: Params, *args: Any, **kwargs: Any) -> tuple[jax.Array, Any]:
        """`Decoder.__call__` as a pure function of `params`."""
        return Decoder(params, *self)(*args, **kwargs)

    def unembed(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Float32 logits [..., V] of hidden states [..., D]."""
        c = self.config
        head_DV = params["embed"].T if c.tied_embeddings else params["lm_head"]
        with jax.named_scope("logits"):
            logits = project(hidden, head_DV.astype(self.compute_dtype), dtype=jnp.float32)
            if c.logit_divisor != 1.0:
                logits = logits / c.logit_divisor
            if c.logit_softcap is not None:
                logits = c.logit_softcap * jnp.tanh(logits / c.logit_softcap)
        return logits

    def apply(self, params: Params, *args: Any, **kwargs: Any) -> tuple[jax.Array, Any]:
        """Float32 logits [B, T, V], and the cache; arguments are those of `Decoder.__call__`."""
        hidden_BTD, cache = self.hidden(params, *args, **kwargs)
        return self.unembed(params, hidden_BTD), cache

    def hidden_of_rows(self, params: Params, tokens_BT: jax.Array | np.ndarray) -> jax.Array:
        """Hidden states [B, T, D] of right-padded rows: causal, positions 0, 1, 2, ...

        Padding stands after every real token, so causality alone keeps it out of their sight.
        """
        B, T = tokens_BT.shape
        positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
        mask_BTS = jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (B, T, T))
        return self.hidden(params, tokens_BT, positions_BT, mask_BTS)[0]

    def logits(self, params: Params, tokens_BT: jax.Array | np.ndarray) -> jax.Array:
        """Float32 logits [B, T, V] of right-padded rows; see `hidden_of_rows`."""
        return self.unembed(params, self.hidden_of_rows(params, tokens_BT))


def empty_cache(config: DecoderConfig, rows: int, slots: int, dtype: Any) -> KVCache:
    shape = (config.num_layers, rows, slots, config.num_kv_heads, config.head_dim)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def init_params(specs: dict[Path, ParamSpec], key: jax.Array) -> Params:
    """Random float32 parameters: matrices N(0, 0.02), norms the identity, biases 0; of an adapter,
    A uniform in +-1 / sqrt(inputs) (as PEFT has it) and B 0."""

    def leaf(spec: ParamSpec, key: jax.Array) -> jax.Array:
        if spec.init == "zeros":
            return jnp.zeros(spec.shape, jnp.float32)
        if spec.init == "ones":
            return jnp.ones(spec.shape, jnp.float32)
        if spec.init == "lora_a":
            bound = math.prod(spec.shape[spec.stack : -1]) ** -0.5
            return jax.random.uniform(key, spec.shape, jnp.float32, -bound, bound)
        return 0.02 * jax.random.normal(key, spec.shape, jnp.float32)

    return tree_of(
        {
            path: leaf(spec, jax.random.fold_in(key, i))
            for i, (path, spec) in enumerate(specs.items())
        }
    )


def contexts_of(
    c: DecoderConfig,
    positions_BT: jax.Array,
    mask_BTS: jax.Array,
    slot_positions_BS: jax.Array,
    dtype: Any,
) -> Callable[[jax.Array | None], Context]:
    """Returns context(slides) for a layer: made once for each kind of layer, picked in the scan."""
    full = Context(mask_BTS, *angles(c.rope, positions_BT, dtype))
    if c.sliding_window is None:
        return lambda _: full
    distance_BTS = positions_BT[:, :, None] - slot_positions_BS[:, None, :]
    rope = c.rope if c.sliding_rope is None else c.sliding_rope
    near_BTS = mask_BTS & (distance_BTS < c.sliding_window)
    sliding = Context(near_BTS, *angles(rope, positions_BT, dtype))

    def pick(slides: jax.Array | None) -> Context:
        if slides is None:  # every layer slides
            return sliding
        return jax.tree.map(lambda near, far: jnp.where(slides, near, far), sliding, full)

    return pick


def angles(rope: Rope, positions_BT: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine [B, T, 1, F] of each token's position times each frequency."""
    frequencies_F = jnp.asarray(rope.frequencies, jnp.float32)
    # Angles in float32: bfloat16 cannot tell position 256 from 257.
    angle_BT1F = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies_F
    cos, sin = jnp.cos(angle_BT1F) * rope.amplitude, jnp.sin(angle_BT1F) * rope.amplitude
    return cos.astype(dtype), sin.astype(dtype)


def turn(x_BTNH: jax.Array, context: Context) -> jax.Array:
    """Rotates pairs (i, i + F) of the first 2 F dimensions; those behind them pass."""
    cos, sin = context.cos_BT1F, context.sin_BT1F
    half = cos.shape[-1]
    low, high = x_BTNH[..., :half], x_BTNH[..., half : 2 * half]
    parts = [low * cos - high * sin, high * cos + low * sin, x_BTNH[..., 2 * half :]]
    return jnp.concatenate(parts, axis=-1)


def activate(x: jax.Array, kind: str) -> jax.Array:
    return jax.nn.silu(x) if kind == "silu" else jax.nn.gelu(x, approximate=True)


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


def grouped_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask_BTS: jax.Array,
    scale: float,
    softcap: float | None = None,
    sinks_N: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention in float32; N query heads share K key/value heads, N / K to each.

    `sinks_N` is a score for each head that takes its share of the softmax and adds nothing.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKRH = q_BTNH.reshape(B, T, K, N // K, H)
    scores_BKRTS = scale * jnp.einsum(
        "btkrh,bskh->bkrts", q_BTKRH, k_BSKH, preferred_element_type=jnp.float32
    )
    if softcap is not None:
        scores_BKRTS = softcap * jnp.tanh(scores_BKRTS / softcap)
    # Finite, so that a row that may attend to nothing (padding) gives zeros' mean and not NaN.
    scores_BKRTS = jnp.where(mask_BTS[:, None, None], scores_BKRTS, -1e30)
    if sinks_N is not None:
        sinks_KR = sinks_N.astype(jnp.float32).reshape(1, K, N // K, 1, 1)
        sinks = jnp.broadcast_to(sinks_KR, (*scores_BKRTS.shape[:-1], 1))
        scores_BKRTS = jnp.concatenate([scores_BKRTS, sinks], axis=-1)
    weights_BKRTS = jax.nn.softmax(scores_BKRTS, axis=-1).astype(v_BSKH.dtype)
    weights_BKRTS = weights_BKRTS[..., : v_BSKH.shape[1]]
    return jnp.einsum("bkrts,bskh->btkrh", weights_BKRTS, v_BSKH).reshape(B, T, N, H)


def _norm_heads(norm: Norm, x_BTNH: jax.Array, c: DecoderConfig) -> jax.Array:
    if c.qk_norm == "head":
        return norm(x_BTNH)
    scale = norm.scale[...]
    flat = rms_norm(x_BTNH.reshape(*x_BTNH.shape[:2], -1), scale.reshape(-1), c.norm_eps)
    return flat.reshape(x_BTNH.shape)


def _lora_a(leaves: dict[str, Any], name: str) -> Any:
    """The A that adapts `name`: its own, or the one that a fused projection's parts share."""
    fused = {"query": "qkv", "key": "qkv", "value": "qkv", "gate": "gate_up", "up": "gate_up"}
    own = {"query": "q", "key": "k", "value": "v", "output": "o"}.get(name, name)
    for module in (own, fused.get(name)):
        if f"{module}_proj_lora_a" in leaves:
            return leaves[f"{module}_proj_lora_a"]
    raise KeyError(f"{name}_lora_b has no lora_a among {sorted(leaves)}")
