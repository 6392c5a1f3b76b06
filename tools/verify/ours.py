"""The model as this project loads, computes and exports it."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bridge.names import hf_tensors
from jaxrl.config import MeshSection
from jaxrl.models.config import DecoderConfig
from jaxrl.models.params import ParamSpec
from jaxrl.models.params import Path as LeafPath
from jaxrl.types import Group, Prompt, Sampling
from tools.verify.reference import FILE_DTYPES, FileTensor


def load_on(directory: Path, specs: dict[LeafPath, ParamSpec], section: MeshSection) -> Any:
    """The weights in float32, read by the loader that training uses."""
    from bridge.checkpoints import load_params
    from jaxrl.mesh import make_mesh, param_shardings

    shardings = param_shardings(specs, make_mesh(section))
    return load_params(directory, specs, shardings)


def our_logits(
    config: DecoderConfig, params: Any, tokens_BT: Any, dtype: str = "float32", mesh: Any = None
) -> np.ndarray:
    """Float32 [B, T, V]. `mesh`: that of the parameters, if it is more than one device."""
    import jax

    from jaxrl.models.decoder import Policy

    policy = Policy(config, jax.numpy.dtype(dtype), mesh=mesh)
    return np.asarray(jax.jit(policy.logits)(params, tokens_BT))


def our_greedy(
    config: DecoderConfig, params: Any, prompts: Sequence[Sequence[int]], count: int
) -> list[Group]:
    """A Group for each prompt, in one batch; no token ends it, as none ends the reference."""
    from jaxrl.models.decoder import Policy
    from jaxrl.sampler import InProcessEngine

    engine = InProcessEngine(Policy(config, np.dtype("float32")))
    engine.publish(params, 1)
    asked = [Prompt(i, "", tuple(tokens), {}) for i, tokens in enumerate(prompts)]
    return engine.generate(asked, Sampling(1, count, 0.0, ()), [0] * len(asked))


def differing(
    params: Any,
    specs: dict[LeafPath, ParamSpec],
    files: Mapping[str, FileTensor],
    digests: Mapping[str, str],
) -> list[str]:
    """Names of tensors whose bytes, exported in the file's own dtype, are not the file's."""
    from bridge.export import Exporter

    differ = {name for name in hf_tensors(specs) if files[name].dtype not in FILE_DTYPES}
    for dtype in {tensor.dtype for tensor in files.values()} & FILE_DTYPES.keys():
        for tensor in Exporter(specs, FILE_DTYPES[dtype])(params):
            if files[tensor.name].dtype == dtype:
                found = hashlib.sha256(tensor.data.tobytes()).hexdigest()
                if found != digests[tensor.name]:
                    differ.add(tensor.name)
    return sorted(differ)


def perturbed(params: Any, seed: int) -> Any:
    """Every tensor changed, and not by a factor, which a norm behind it would undo."""
    import jax
    import jax.numpy as jnp

    def change(leaf: jax.Array, key: jax.Array) -> jax.Array:
        size = jnp.sqrt(jnp.mean(leaf**2))
        return leaf + jnp.where(size > 0, 0.05 * size, 0.01) * jax.random.normal(key, leaf.shape)

    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(tree, map(jax.jit(change), leaves, keys))
