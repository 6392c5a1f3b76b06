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
from jaxrl.models.attention import Attend, Backend, Masked, Packed, make_attend
from jaxrl.models.config import DecoderConfig, MoeConfig
from jaxrl.models.grouped import grouped_dot
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


# For what is cheap to compute: the gradient keeps its inputs alone, and none of the float32 values
# between. Where remat computes the whole layer again this changes nothing.
computed_again = functools.partial(jax.checkpoint, prevent_cse=False)


class KVCache(NamedTuple):
    """Of every layer; what a head reads lies together, and both products with it run along rows."""

    keys: jax.Array  # [L, B, K, H, S]
    values: jax.Array  # [L, B, K, S, H]

    @property
    def slots(self) -> int:
        return self.values.shape[3]

    def grown(self, slots: int) -> "KVCache":
        """With room for so many slots, the new ones empty."""
        more, none = (0, slots - self.slots), (0, 0)
        return KVCache(
            jnp.pad(self.keys, (none, none, none, none, more)),
            jnp.pad(self.values, (none, none, none, more, none)),
        )

    def written(
        self, keys_BTKH: jax.Array, values_BTKH: jax.Array, layer: jax.Array, start: jax.Array | int
    ) -> "KVCache":
        """With the keys and values of T tokens in a layer's slots from `start` on."""
        keys_1BKHT = keys_BTKH.transpose(0, 2, 3, 1)[None].astype(self.keys.dtype)
        values_1BKTH = values_BTKH.swapaxes(1, 2)[None].astype(self.values.dtype)
        put = jax.lax.dynamic_update_slice
        return KVCache(
            put(self.keys, keys_1BKHT, (layer, 0, 0, 0, start)),
            put(self.values, values_1BKTH, (layer, 0, 0, start, 0)),
        )


class Context(NamedTuple):
    """What a layer needs to know of the tokens: how far they turn, and who sees whom."""

    cos_BT1F: jax.Array
    sin_BT1F: jax.Array
    attend: Attend
    slides: jax.Array | None  # bool; None where all layers are alike
    layer: jax.Array  # int32
    start: jax.Array | int  # first slot of a cache that the tokens fill


class Linear(nnx.Module):
    """W x, plus a bias and a low-rank adapter where the leaves have them."""

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

    def __call__(self, x_BTD, context: Context, cache: KVCache | None = None):
        """Attends from T tokens to T tokens; with a cache, writes theirs and attends to its S."""
        c = self.config
        q_BTNH, k_BTKH, v_BTKH = self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)
        if self.query_norm is not None and self.key_norm is not None:
            q_BTNH = _norm_heads(self.query_norm, q_BTNH, c)
            k_BTKH = _norm_heads(self.key_norm, k_BTKH, c)
        q_BTNH, k_BTKH = turn(q_BTNH, context), turn(k_BTKH, context)
        keys, values = k_BTKH, v_BTKH
        if cache is not None:
            cache = cache.written(keys, values, context.layer, context.start)
            keys, values = (jax.lax.dynamic_index_in_dim(x, context.layer, 0, False) for x in cache)
        with jax.named_scope("attention"):
            sinks_N = None if self.sinks is None else self.sinks[...]
            mixed_BTNH = context.attend(q_BTNH, keys, values, sinks_N, context.slides)
        return self.output(checkpoint_name(mixed_BTNH, "attention")), cache


class Mlp(nnx.Module):
    def __init__(self, leaves: dict[str, Any], c: DecoderConfig, dtype: Any, lora_scale: float):
        linear = functools.partial(Linear, leaves, dtype=dtype, scale=lora_scale)
        self.gate, self.up, self.down = linear("gate"), linear("up"), linear("down")
        self.activation = c.activation

    def __call__(self, x_BTD):
        return self.down(gated(self.gate(x_BTD), self.up(x_BTD), self.activation))


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
        for each of its choices, are sorted so that each expert multiplies one run (`grouped_dot`).
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
        tpu = self.mesh is not None and self.mesh.devices.flat[0].platform == "tpu"

        def product(x, name):
            y, bias_EF = grouped_dot(x, leaves[name], rows_E, tpu), leaves.get(f"{name}_bias")
            y = y if bias_EF is None else y + bias_EF[expert_R]
            return jnp.where(expert_R[:, None] < experts, y, 0)  # no backend promises zeros there

        if self.moe.layout == "gpt_oss":
            both = product(x_RD, "gate_up")
            gate = jnp.minimum(both[:, ::2], _OSS_LIMIT)
            up = jnp.clip(both[:, 1::2], -_OSS_LIMIT, _OSS_LIMIT)
            return product((up + 1) * gate * jax.nn.sigmoid(_OSS_ALPHA * gate), "down")
        hidden = gated(product(x_RD, "gate"), product(x_RD, "up"), self.activation)
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

    def __call__(self, x_BTD, context: Context, cache: KVCache | None = None):
        mixed_BTD, cache = self.attention(self._norm("attention_norm", x_BTD), context, cache)
        x_BTD = x_BTD + self.residual * self._norm("attention_post_norm", mixed_BTD)
        y_BTD = self.mlp(self._norm("mlp_norm", x_BTD))
        return x_BTD + self.residual * self._norm("mlp_post_norm", y_BTD), cache

    def _norm(self, name: str, x):
        return self.norms[name](x) if name in self.norms else x


class Decoder(nnx.Module):
    """Token ids to hidden states. Built on the leaves of `param_specs`, stacked over layers."""

    def __init__(self, params: Params, policy: "Policy"):
        c, dtype = policy.config, policy.compute_dtype
        self.embed = nnx.Param(params["embed"])
        self.layers = Block(params["layers"], c, dtype, policy.lora_scale, policy.mesh)
        self.final_norm = Norm(params["final_norm"]["scale"], c)
        self.policy = policy

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        seen: Packed | Masked,
        cache: KVCache | None = None,
        start: jax.Array | int = 0,
    ) -> tuple[jax.Array, KVCache | None]:
        """Returns hidden states [B, T, D] for `unembed`, and the cache with T more slots filled.

        Args:
          tokens_BT: int32 token ids.
          positions_BT: int32 rotary position of each token.
          seen: which tokens each token attends to; with a cache, which of its S slots.
          cache: keys and values of earlier tokens.
          start: first slot that these T tokens fill.
        """
        c, dtype = self.policy.config, self.policy.compute_dtype
        # Else XLA may split hidden states as it finds the weights split, by their embed axis, and
        # then every device computes every row's attention.
        rows = functools.partial(keep_rows, mesh=self.policy.mesh)
        x_BTD = rows(jnp.take(self.embed[...], tokens_BT, axis=0).astype(dtype))
        if c.embedding_multiplier != 1.0:  # rounded to the compute dtype, as it is in the engines
            x_BTD = x_BTD * jnp.asarray(c.embedding_multiplier, dtype)
        attend = make_attend(c, seen, self.policy.attention, self.policy.mesh)
        rotations = rotations_of(c, positions_BT, dtype)

        def run(carry, block, slides, layer):
            x_BTD, cache = carry
            context = Context(*rotations(slides), attend, slides, layer, start)
            y_BTD, cache = block(rows(x_BTD), context, cache)
            return rows(y_BTD), cache

        keep = REMAT[self.policy.remat]
        run = run if keep is None else nnx.remat(run, policy=keep)
        # The cache is carried and not stacked, so that a layer writes into it in place.
        scan = nnx.scan(run, in_axes=(nnx.Carry, 0, 0, 0), out_axes=nnx.Carry)
        slides_L = jnp.asarray(c.sliding) if any(c.sliding) and not all(c.sliding) else None
        layers_L = jnp.arange(c.num_layers, dtype=jnp.int32)
        x_BTD, cache = scan((x_BTD, cache), self.layers, slides_L, layers_L)
        return self.final_norm(x_BTD), cache


class Policy(NamedTuple):
    """What the trainer and the sampler need of a model: its configuration and how to apply it.

    `remat` is a key of `REMAT`; gradients are the same with each. `lora_scale` is alpha / rank of
    the adapters that `params` may hold beside the leaves they adapt. `attention` is the backend for
    rows without a cache, and `mesh` what rows, heads and experts lie on.
    """

    config: DecoderConfig
    compute_dtype: Any
    remat: str = "full"
    lora_scale: float = 0.0
    attention: Backend = "xla"
    mesh: Mesh | None = None

    def hidden(self, params: Params, *args: Any, **kwargs: Any) -> tuple[jax.Array, Any]:
        """`Decoder.__call__` as a pure function of `params`."""
        return Decoder(params, self)(*args, **kwargs)

    def unembed(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Float32 logits [..., V] of hidden states [..., D]."""
        return self.unembed_by(self.head(params), hidden)

    def head(self, params: Params) -> jax.Array:
        """[V, D], in the compute dtype."""
        return params["embed" if self.config.tied_embeddings else "lm_head"].astype(
            self.compute_dtype
        )

    def unembed_by(self, head_VD: jax.Array, hidden: jax.Array) -> jax.Array:
        """`unembed` with a head of any dtype, which is rounded to the compute dtype."""
        c = self.config
        with jax.named_scope("logits"):
            logits = project(hidden, head_VD.astype(self.compute_dtype), dtype=jnp.float32)
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
        alone = Packed(jnp.ones((B, T), jnp.int32), None, positions_BT)
        return self.hidden(params, tokens_BT, positions_BT, alone)[0]

    def logits(self, params: Params, tokens_BT: jax.Array | np.ndarray) -> jax.Array:
        """Float32 logits [B, T, V] of right-padded rows; see `hidden_of_rows`."""
        return self.unembed(params, self.hidden_of_rows(params, tokens_BT))


def empty_cache(config: DecoderConfig, rows: int, slots: int, dtype: Any) -> KVCache:
    heads = (config.num_layers, rows, config.num_kv_heads)
    return KVCache(
        jnp.zeros((*heads, config.head_dim, slots), dtype),
        jnp.zeros((*heads, slots, config.head_dim), dtype),
    )


def init_params(specs: dict[Path, ParamSpec], key: jax.Array) -> Params:
    """Random float32 parameters: matrices N(0, 0.02), norms the identity, biases 0; of an adapter,
    A uniform in +-1 / sqrt(inputs) (as PEFT has it) and B 0."""

    def leaf(spec: ParamSpec, key: jax.Array) -> jax.Array:
        if spec.init == "zeros":
            return jnp.zeros(spec.shape, jnp.float32)
        if spec.init == "ones":
            return jnp.ones(spec.shape, jnp.float32)
        if spec.init == "lora_a":
            bound = math.prod(spec.shape[spec.stack + 1 :]) ** -0.5
            return jax.random.uniform(key, spec.shape, jnp.float32, -bound, bound)
        return 0.02 * jax.random.normal(key, spec.shape, jnp.float32)

    return tree_of(
        {
            path: leaf(spec, jax.random.fold_in(key, i))
            for i, (path, spec) in enumerate(specs.items())
        }
    )


def rotations_of(
    c: DecoderConfig, positions_BT: jax.Array, dtype: Any
) -> Callable[[jax.Array | None], tuple[jax.Array, jax.Array]]:
    """Returns rotation(slides): made once for each kind of layer, picked in the scan."""
    far = angles(c.rope, positions_BT, dtype)
    if c.sliding_window is None or c.sliding_rope is None:
        return lambda _: far
    near = angles(c.sliding_rope, positions_BT, dtype)

    def pick(slides: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        if slides is None:  # every layer slides
            return near
        cos, sin = (jnp.where(slides, a, b) for a, b in zip(near, far, strict=True))
        return cos, sin

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


@functools.partial(computed_again, static_argnums=2)
def gated(gate: jax.Array, up: jax.Array, kind: str) -> jax.Array:
    return (jax.nn.silu(gate) if kind == "silu" else jax.nn.gelu(gate, approximate=True)) * up


def project(x: jax.Array, w: jax.Array, inputs: int = 1, dtype: Any = None) -> jax.Array:
    """Contracts the last `inputs` axes of `x` with the last `inputs` axes of `w`.

    As a product of two matrices: XLA's CPU backend takes twice as long for the gradient of `w` when
    the rows it sums over are two axes (batch and tokens) and not one.
    """
    rows, outputs = x.shape[: x.ndim - inputs], w.shape[: w.ndim - inputs]
    size = math.prod(x.shape[x.ndim - inputs :])
    both = (((1,), (1,)), ((), ()))
    y = jax.lax.dot_general(
        x.reshape(-1, size), w.reshape(-1, size), both, preferred_element_type=dtype
    )
    return y.reshape(*rows, *outputs)


@computed_again
def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * scale over the last axis, in float32 (Zhang and Sennrich, arXiv:1910.07467)."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    # The model rounds before it scales (as its Hugging Face reference does).
    return (normed.astype(x.dtype) * scale.astype(x.dtype)).astype(x.dtype)


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
