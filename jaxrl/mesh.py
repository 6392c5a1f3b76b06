"""The device mesh, and the one table that says how arrays lie on it."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl.config import MeshSection
from jaxrl.models.params import ParamSpec, Path, tree_of
from jaxrl.types import UserError

AXES = ("data", "fsdp", "expert", "tensor")

# Logical axis -> mesh axes; of a leaf, each takes what those before it have left. Parameters are
# split over all but data, over which they are copied. Rows of a batch are split over all but
# tensor, by expert first: the rows of one index of `expert` then lie together.
RULES: dict[str, tuple[str, ...]] = {
    "layers": (),  # scanned over
    "vocab": ("tensor",),
    "embed": ("fsdp", "expert"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "experts": ("expert",),
    "choices": (),
    "rank": (),
    "rows": ("expert", "data", "fsdp"),
    "tokens": (),
}


def make_mesh(c: MeshSection, devices: Sequence[Any] | None = None) -> Mesh:
    """Over the first of `devices`, which are those that jax sees where none are given.

    Raises UserError if the mesh asks for more than jax sees, or of several processes for fewer.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(c, axis) for axis in AXES]
    need, have = math.prod(sizes), len(devices)
    asked = f"{_product(AXES)} = {' * '.join(map(str, sizes))} = {need} devices"
    if need > have:
        backend = jax.default_backend()
        divided = "; JAX_PLATFORMS=cpu divides the CPU into as many" if backend == "cpu" else ""
        raise UserError(f"{asked}, and jax sees {have} ({backend}){divided}")
    if need < have and jax.process_count() > 1:
        raise UserError(
            f"{asked}, and the {jax.process_count()} processes have {have}; the mesh must use all "
            "of them"
        )
    types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(sizes, AXES, axis_types=types, devices=devices[:need])


def partition(mesh: Mesh, axes: tuple[str, ...], shape: tuple[int, ...] | None = None) -> P:
    """How an array with these logical axes lies. With its shape, a dimension is split over as many
    of its mesh axes, the first of them first, as divide it."""
    parts, used = [], set()
    for i, axis in enumerate(axes):
        names = tuple(name for name in RULES[axis] if name not in used and mesh.shape[name] > 1)
        while shape is not None and shape[i] % _ways(mesh, names):
            names = names[:-1]
        used.update(names)
        parts.append(names[0] if len(names) == 1 else names or None)
    return P(*parts)


def param_shardings(specs: dict[Path, ParamSpec], mesh: Mesh) -> Any:
    """A NamedSharding for every leaf of `specs`, as the parameter tree.

    A dimension that its mesh axis does not divide (one key/value head, an odd vocabulary) is kept
    whole on every device of that axis; `kept_whole` says which these are.
    """
    return tree_of(
        {
            path: NamedSharding(mesh, partition(mesh, spec.axes, spec.shape))
            for path, spec in specs.items()
        }
    )


def kept_whole(specs: dict[Path, ParamSpec], mesh: Mesh) -> list[str]:
    """A line for each logical axis that could not be split: its size, and over what."""
    found = set()
    for spec in specs.values():
        asked, given = partition(mesh, spec.axes), partition(mesh, spec.axes, spec.shape)
        found |= set(
            zip(spec.axes, spec.shape, map(_names, asked), map(_names, given), strict=True)
        )
    return [
        f"{axis} = {size} is not a multiple of {_product(asked)}, and is "
        + (f"split over {_product(given)} alone" if given else "kept whole")
        for axis, size, asked, given in sorted(found)
        if asked != given
    ]


def _product(names: tuple[str, ...]) -> str:
    return " * ".join(f"mesh.{name}" for name in names)


def _names(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (part,) if isinstance(part, str) else part or ()


def _ways(mesh: Mesh, names: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[name] for name in names)


def batch_sharding(mesh: Mesh, rank: int) -> NamedSharding:
    """Of an array whose first axis is rows, of any rank."""
    return NamedSharding(mesh, partition(mesh, ("rows", *["tokens"] * (rank - 1))))


def put_rows(mesh: Mesh, rows: np.ndarray) -> jax.Array:
    """An array on the mesh from those of its rows that lie on the devices of this process."""
    return jax.make_array_from_process_local_data(batch_sharding(mesh, rows.ndim), rows)


def rows_of_process(mesh: Mesh, rows: int, process: int) -> np.ndarray:
    """Which rows of a batch lie on the devices of a process, ascending: int [b]."""
    held = batch_sharding(mesh, 1).devices_indices_map((rows,))
    ours = [
        np.arange(rows)[index] for device, index in held.items() if device.process_index == process
    ]
    return np.unique(np.concatenate(ours))


def replicated(x: jax.Array) -> jax.Array:
    """An array that each process can read. All of them call it; it waits for nothing."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return x
    assert isinstance(x.sharding, NamedSharding), x.sharding
    return _copier(NamedSharding(x.sharding.mesh, P()))(x)


@functools.cache
def _copier(sharding: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: x, out_shardings=sharding)


def row_shards(mesh: Mesh) -> int:
    """How many parts the rows of a batch are split into."""
    return _ways(mesh, RULES["rows"])


def keep_rows(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """`x`, whose first axis is rows, held to lie as batches do; without a mesh, or where rows are
    not a multiple of their shards, as XLA likes."""
    if mesh is None or x.shape[0] % row_shards(mesh):
        return x
    return jax.lax.with_sharding_constraint(x, batch_sharding(mesh, x.ndim))
