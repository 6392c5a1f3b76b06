"""Low-rank adapters beside frozen weights (Hu et al. 2021, arXiv:2106.09685).

The trained parameters are the leaves of `params.lora_specs`, a tree of their own: the optimizer,
the checkpoints and the wire hold nothing else. The frozen weights lie in bfloat16.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxrl.models.config import LoraConfig
from jaxrl.models.params import ParamSpec, Path, leaf_at, tree_of


def with_adapters(frozen: dict[str, Any], adapters: dict[str, Any]) -> dict[str, Any]:
    """One tree of both, for `Policy.apply`. No array is copied."""
    merged = dict(frozen)
    for name, node in adapters.items():
        merged[name] = with_adapters(frozen.get(name, {}), node) if isinstance(node, dict) else node
    return merged


def merged_params(specs: dict[Path, ParamSpec], lora: LoraConfig, params: Any) -> Any:
    """Float32 weights W + alpha / rank * B A in the tree of `specs`; others as they are.

    Args:
      params: frozen weights and adapters in one tree, as `with_adapters` makes it.
    """
    leaves = {}
    for path, spec in specs.items():
        node = leaf_at(params, path[:-1])
        weight = node[path[-1]].astype(jnp.float32)
        lora_b = node.get(f"{path[-1]}_lora_b")
        if lora_b is not None:
            assert spec.inputs
            lora_a = node[f"{spec.module}_lora_a"]
            layers, rank = lora_a.shape[:2]
            # Of each layer [outputs, rank] times [rank, inputs]. Accelerators would round float32
            # factors, and the tools that merge on a CPU do not.
            factors = lora_b.reshape(layers, -1, rank), lora_a.reshape(layers, rank, -1)
            change = jnp.matmul(*factors, precision="highest")
            weight = weight + lora.scale * change.reshape(weight.shape)
        leaves[path] = weight
    return tree_of(leaves)


@jax.jit
def fingerprint(params: Any) -> jax.Array:
    """A uint32 checksum of the parameters' bits, the same on every mesh.

    Adapters mean nothing beside other weights than those they were trained with; a resumed run
    compares. Integer sums, because those do not depend on their order.
    """
    total = jnp.zeros((), jnp.uint32)
    for leaf in jax.tree.leaves(params):
        bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)
        place = jnp.ones((), jnp.uint32)
        for axis in range(leaf.ndim):
            index = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
            place = place * jnp.uint32(2654435761) + index
        total = total * jnp.uint32(31) + jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)
    return total
