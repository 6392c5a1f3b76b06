"""Softmax attention over packed rows, by backend, behind one function.

    xla     chunks of queries over the keys before them: any device, any model
    splash  the Pallas kernel that ships with jax: TPU
    cudnn   cuDNN's flash attention: NVIDIA GPUs, 16-bit, no sinks, no soft cap

Sources: attention in tiles (Dao et al. 2022, arXiv:2205.14135); grouped queries (Ainslie et al.
2023, arXiv:2305.13245); soft caps (Gemma 2, arXiv:2408.00118); sinks (gpt-oss, arXiv:2508.10925).
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxrl.mesh import batch_sharding, row_shards
from jaxrl.models.config import DecoderConfig
from jaxrl.types import UserError

Array = jax.Array | np.ndarray
Backend = Literal["xla", "splash", "cudnn"]
# See make_attend: -> [B, T, N, H]. `sinks_N` may be None; `slides` is a scalar bool, or None where
# all layers are alike.
Attend = Callable[..., jax.Array]

_CHUNKS = 8  # of queries, at most: each is compiled apart
_CHUNK = 64  # queries: a chunk is a multiple, as odd sizes take XLA's CPU backend longer
_SPLASH_BLOCK = 512  # queries, and keys, of a tile
_FUSED_SLOTS = 4096  # of the longest row whose backward pass is one kernel
_LANES = 128  # of a TPU's vector registers: what splash tiles are multiples of


class Packed(NamedTuple):
    """Rows that attend to themselves; see `types.TrainBatch`.

    A token sees itself and the earlier tokens of its row that are of its group and of branch 0 or
    of its own branch. `branch_BT` None: no row has branches, and a group is one sequence.
    """

    group_BT: Array  # int32
    branch_BT: Array | None  # int32
    positions_BT: Array  # int32, within the token's own sequence

    def mask(self, queries: slice, keys: slice, window: int | None) -> Array:
        """Bool [B, queries, keys]: which of these keys each of these queries sees."""
        T = self.group_BT.shape[1]
        slots_T = jnp.arange(T)

        def pair(of_BT: Array) -> tuple[Array, Array]:
            return of_BT[:, queries, None], of_BT[:, None, keys]

        group, key_group = pair(self.group_BT)
        seen = (group == key_group) & (slots_T[None, queries, None] >= slots_T[None, None, keys])
        if self.branch_BT is not None:
            branch, key_branch = pair(self.branch_BT)
            seen &= (key_branch == 0) | (branch == key_branch)
        if window is not None:
            position, key_position = pair(self.positions_BT)
            seen &= position - key_position < window
        return seen


class Masked(NamedTuple):
    """Tokens that attend to the slots of a cache."""

    mask_BTS: Array  # bool, windows not counted
    distance_BTS: Array | None  # int32, position of the token less that of the slot's token


def backend_for(
    asked: str, platform: str, c: DecoderConfig, dtype: Any
) -> tuple[Backend, str | None]:
    """What `asked` (a backend, or auto) means on `platform` (cpu, gpu or tpu); and, where auto
    cannot have the one meant for the platform, a line that says why.

    Raises:
      UserError: a backend that was asked for by name cannot run there, or not this model.
    """
    meant = {"tpu": "splash", "gpu": "cudnn"}.get(platform, "xla") if asked == "auto" else asked
    if meant == "xla":
        return "xla", None
    needs = {"splash": "tpu", "cudnn": "gpu"}[meant]
    problem = f"needs {needs} devices, and these are {platform}" if platform != needs else None
    if meant == "cudnn" and not problem:
        problem = _cudnn_lacks(c, dtype)
    if problem is None:
        return ("splash" if meant == "splash" else "cudnn"), None
    if asked == "auto":
        return "xla", f"attention by xla: {meant} {problem}"
    raise UserError(f"model.attention = {asked}: {asked} {problem}; use model.attention: auto")


def _cudnn_lacks(c: DecoderConfig, dtype: Any) -> str | None:
    if jnp.dtype(dtype).itemsize != 2:
        return f"needs model.compute_dtype bfloat16, and it is {jnp.dtype(dtype).name}"
    if c.attention_sinks:
        return "has no attention sinks, and this model does"
    if c.attention_softcap is not None:
        return "has no soft cap of attention scores, and this model does"
    if c.head_dim > 128 or c.head_dim % 8:
        return f"needs a head_dim that is a multiple of 8 up to 128, and it is {c.head_dim}"
    return None


def make_attend(
    c: DecoderConfig,
    seen: Packed | Masked,
    backend: Backend,
    mesh: Mesh | None = None,
    interpret: bool = False,
) -> Attend:
    """Returns attend(q_BTNH, k_BTKH, v_BTKH, sinks_N, slides), made once for all layers; for the
    slots of a cache attend(q_BTNH, k_BKHS, v_BKSH, sinks_N, slides).

    Scores and softmax are float32. A layer that slides attends to positions less than
    `sliding_window` before its own.

    Args:
      seen: who sees whom.
      backend: for `Packed` rows; a cache is read by xla always.
      mesh: that rows and heads lie on; splash runs on each device's own.
      interpret: splash without a TPU, slowly.
    """
    if isinstance(seen, Masked):
        return _cached(c, seen)
    if backend == "splash" and _on_mesh(seen, mesh):
        return _splash(c, seen, mesh, interpret)
    if backend == "cudnn":
        return _cudnn(c, seen)
    return _chunked(c, seen)


def _on_mesh(seen: Packed, mesh: Mesh | None) -> bool:
    """Whether the mesh divides the rows: a single probe row it does not."""
    return mesh is None or seen.group_BT.shape[0] % row_shards(mesh) == 0


def scale_of(c: DecoderConfig) -> float:
    return c.attention_scale or c.head_dim**-0.5


def _either(c: DecoderConfig, make: Callable[[int | None], Any], slides: Any) -> Any:
    """make(window) for a layer that slides if `slides` says so, picked between the two."""
    if c.sliding_window is None:
        return make(None)
    if slides is None:
        return make(c.sliding_window)
    near, far = make(c.sliding_window), make(None)
    return jax.tree.map(lambda a, b: jnp.where(slides, a, b), near, far)


def _cached(c: DecoderConfig, seen: Masked) -> Attend:
    def mask(window: int | None) -> Array:
        if window is None:
            return seen.mask_BTS
        assert seen.distance_BTS is not None
        return seen.mask_BTS & (seen.distance_BTS < window)

    def attend(q_BTNH, k_BKHS, v_BKSH, sinks_N, slides):
        return _tile(c, q_BTNH, k_BKHS, v_BKSH, sinks_N, _either(c, mask, slides))

    return attend


def _chunked(c: DecoderConfig, seen: Packed) -> Attend:
    """No query sees a later slot, so a chunk of queries needs the keys up to its end only: half of
    the products of a square. The scores of one chunk exist at a time, in the gradient too."""
    T = seen.group_BT.shape[1]
    size = _CHUNK * -(-T // (_CHUNKS * _CHUNK))
    chunks = [slice(start, min(start + size, T)) for start in range(0, T, size)]

    def attend(q_BTNH, k_BTKH, v_BTKH, sinks_N, slides):
        k_BKHS, v_BKSH = k_BTKH.transpose(0, 2, 3, 1), v_BTKH.swapaxes(1, 2)

        def one(queries: slice) -> jax.Array:
            keys = slice(0, queries.stop)

            def tile(q, k, v, sinks, seen: Packed):
                masks = functools.partial(seen.mask, queries, keys)
                return _tile(c, q, k, v, sinks, _either(c, masks, slides))

            run = tile if len(chunks) == 1 else jax.checkpoint(tile, prevent_cse=False)
            return run(q_BTNH[:, queries], k_BKHS[..., keys], v_BKSH[:, :, keys], sinks_N, seen)

        return jnp.concatenate([one(queries) for queries in chunks], axis=1)

    return attend


def _tile(
    c: DecoderConfig,
    q_BTNH: jax.Array,
    k_BKHS: jax.Array,
    v_BKSH: jax.Array,
    sinks_N: jax.Array | None,
    mask_BTS: Array,
) -> jax.Array:
    """N query heads share K key/value heads, N / K to each: these are one matrix product."""
    B, T, N, H = q_BTNH.shape
    K, R = k_BKHS.shape[1], N // k_BKHS.shape[1]
    q_BKRTH = q_BTNH.reshape(B, T, K, R, H).transpose(0, 2, 3, 1, 4)
    scores_BKQS = scale_of(c) * jnp.einsum(
        "bkqh,bkhs->bkqs",
        q_BKRTH.reshape(B, K, R * T, H),
        k_BKHS,
        preferred_element_type=jnp.float32,
    )
    scores_BKRTS = scores_BKQS.reshape(B, K, R, T, -1)
    if c.attention_softcap is not None:
        scores_BKRTS = c.attention_softcap * jnp.tanh(scores_BKRTS / c.attention_softcap)
    # Finite, so that a row that may attend to nothing (padding) gives zeros' mean and not NaN.
    scores_BKRTS = jnp.where(mask_BTS[:, None, None], scores_BKRTS, -1e30)
    most_BKRT1 = jax.lax.stop_gradient(scores_BKRTS.max(axis=-1, keepdims=True))
    sinks_KR11 = None
    if sinks_N is not None:
        sinks_KR11 = sinks_N.astype(jnp.float32).reshape(K, R, 1, 1)
        most_BKRT1 = jnp.maximum(most_BKRT1, jax.lax.stop_gradient(sinks_KR11))
    weights_BKRTS = jnp.exp(scores_BKRTS - most_BKRT1)
    total_BKRT1 = weights_BKRTS.sum(axis=-1, keepdims=True)
    if sinks_KR11 is not None:  # a score for each head that takes its share and adds nothing
        total_BKRT1 = total_BKRT1 + jnp.exp(sinks_KR11 - most_BKRT1)
    if v_BKSH.dtype == jnp.float32:  # divided behind the product, where there is less of it
        share, weights = 1.0 / total_BKRT1, weights_BKRTS
    else:
        share, weights = None, (weights_BKRTS / total_BKRT1).astype(v_BKSH.dtype)
    mixed_BKQH = jnp.matmul(weights.reshape(B, K, R * T, -1), v_BKSH)
    mixed_BKRTH = mixed_BKQH.reshape(B, K, R, T, H)
    if share is not None:
        mixed_BKRTH = mixed_BKRTH * share
    return mixed_BKRTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _cudnn(c: DecoderConfig, seen: Packed) -> Attend:
    everything = slice(None)
    masks = functools.partial(seen.mask, everything, everything)

    def attend(q_BTNH, k_BTKH, v_BTKH, sinks_N, slides):
        mask_BTS = _either(c, masks, slides)
        return jax.nn.dot_product_attention(
            q_BTNH,
            k_BTKH,
            v_BTKH,
            mask=mask_BTS[:, None],
            scale=scale_of(c),
            implementation="cudnn",
        )

    return attend


def _splash(c: DecoderConfig, seen: Packed, mesh: Mesh | None, interpret: bool) -> Attend:
    """One kernel call a row. Where rows have branches its mask is data, and tiles that nobody sees
    are skipped; elsewhere the kernel computes it from segment ids."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    T = seen.group_BT.shape[1]
    slots = -(-T // _LANES) * _LANES
    block = math.gcd(slots, _SPLASH_BLOCK)
    # One backward kernel computes the scores once and not twice, and keeps dq of each tile of keys.
    fused = slots <= _FUSED_SLOTS
    kinds = ("q", "kv", "q_dkv", "kv_dkv", *(() if fused else ("q_dq", "kv_dq")))
    sizes: dict[str, Any] = {f"block_{kind}": block for kind in kinds}
    build = functools.partial(
        splash.make_splash_mha,
        block_sizes=splash.BlockSizes(**sizes, use_fused_bwd_kernel=fused),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=c.attention_softcap,
        residual_checkpoint_name="attention",  # as the decoder names what remat may keep
        interpret=interpret,
    )
    branched, whole = seen.branch_BT is not None, slice(None)

    def widen(x: jax.Array) -> jax.Array:
        """Padding of group 0 to whole registers, along the slots and, if it has one, the width."""
        width = [(0, -x.shape[-1] % _LANES)] if x.ndim == 4 else []
        return jnp.pad(x, [(0, 0), (0, slots - T), *[(0, 0)] * (x.ndim - 2 - len(width)), *width])

    def of_row(arrays: Any, sinks_N: Any, slides: Any) -> jax.Array:
        seen_T, *qkv = arrays
        heads_first = [x.swapaxes(0, 1) for x in qkv]
        row = jax.tree.map(lambda x: x[None], seen_T)

        def run(window: int | None) -> jax.Array:
            if branched:
                kernel, segments = _known_dynamic(build(row.mask(whole, whole, window))), None
            else:
                causal = splash.CausalMask((slots, slots))
                near = splash.LocalMask((slots, slots), (window and window - 1, 0), 0)
                masks = [near if window else causal] * heads_first[0].shape[0]
                kernel = build(splash.MultiHeadMask(masks))
                segments = splash.SegmentIds(seen_T.group_BT, seen_T.group_BT)
            mixed: Any = kernel(*heads_first, segments, sinks_N)
            return mixed.swapaxes(0, 1)

        if c.sliding_window is None or slides is None:
            return run(c.sliding_window)
        return jax.lax.cond(slides, lambda: run(c.sliding_window), lambda: run(None))

    def on_device(seen: Packed, q_BTNH, k_BTKH, v_BTKH, sinks_N, slides):
        return jax.lax.map(lambda row: of_row(row, sinks_N, slides), (seen, q_BTNH, k_BTKH, v_BTKH))

    def attend(q_BTNH, k_BTKH, v_BTKH, sinks_N, slides):
        N, K, H = q_BTNH.shape[2], k_BTKH.shape[2], q_BTNH.shape[3]
        split = mesh is not None and N % mesh.shape["tensor"] == 0
        tensor = mesh.shape["tensor"] if mesh is not None and split else 1
        if K % tensor:  # each device of the axis has the key/value heads of its queries
            copies = math.lcm(K, tensor) // K
            k_BTKH, v_BTKH = (jnp.repeat(x, copies, axis=2) for x in (k_BTKH, v_BTKH))
        run: Callable[..., jax.Array] = on_device
        if mesh is not None:
            rows = batch_sharding(mesh, 1).spec
            heads = P(*rows, None, "tensor" if split else None)
            run = jax.shard_map(
                on_device,
                mesh=mesh,
                in_specs=(rows, heads, heads, heads, P(*heads[2:]), P()),
                out_specs=heads,
                check_vma=False,
            )
        scaled_BTNH = (q_BTNH * scale_of(c)).astype(q_BTNH.dtype)
        sinks_N = None if sinks_N is None else sinks_N.astype(jnp.float32)
        arrays = jax.tree.map(widen, (seen, scaled_BTNH, k_BTKH, v_BTKH))
        return run(*arrays, sinks_N, slides)[:, :T, :, :H]

    return attend


def _known_dynamic(kernel: Any) -> Any:
    """jax 0.10's constructor makes, under jit, a traced array of the flag it later branches on."""
    for name in ("fwd_mask_info", "dq_mask_info", "dkv_mask_info"):
        info = getattr(kernel, name)
        setattr(kernel, name, info and info._replace(is_dynamic_mask=True))
    return kernel
