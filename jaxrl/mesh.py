"""The device mesh, and the one table that says how arrays lie on it."""

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl.config import MeshSection
from jaxrl.models.params import ParamSpec, Path, tree_of
from jaxrl.types import UserError

# Logical axis -> mesh axis. Parameters are split over fsdp and tensor and copied over data; the
# rows of a batch are split over data and fsdp.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "layers": None,  # scanned over
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "experts": None,
    "rank": None,
    "rows": ("data", "fsdp"),
    "tokens": None,
}


def make_mesh(c: MeshSection) -> Mesh:
    """Over the first devices. Raises UserError if the mesh asks for more than jax sees."""
    need, have = c.data * c.fsdp * c.tensor, jax.device_count()
    if need > have:
        raise UserError(
            f"mesh.data * mesh.fsdp * mesh.tensor = {c.data} * {c.fsdp} * {c.tensor} = {need} "
            f"devices, and jax sees {have} ({jax.default_backend()})"
        )
    devices = jax.devices()[:need]
    axes = ("data", "fsdp", "tensor")
    types = (AxisType.Auto,) * 3
    return jax.make_mesh((c.data, c.fsdp, c.tensor), axes, axis_types=types, devices=devices)


def partition(axes: tuple[str, ...]) -> P:
    return P(*(RULES[axis] for axis in axes))


def param_shardings(specs: dict[Path, ParamSpec], mesh: Mesh) -> Any:
    """A NamedSharding for every leaf of `specs`, as the parameter tree.

    A dimension that its mesh axis does not divide (one key/value head, an odd vocabulary) is kept
    whole on every device of that axis; `kept_whole` says which these are.
    """
    shardings = {}
    for path, spec in specs.items():
        rules = [
            RULES[axis] if _divides(mesh, axis, size) else None
            for size, axis in zip(spec.shape, spec.axes, strict=True)
        ]
        shardings[path] = NamedSharding(mesh, P(*rules))
    return tree_of(shardings)


def kept_whole(specs: dict[Path, ParamSpec], mesh: Mesh) -> list[str]:
    """A line for each logical axis that could not be split: its size, and over what."""
    dimensions = {
        (axis, size)
        for spec in specs.values()
        for size, axis in zip(spec.shape, spec.axes, strict=True)
    }
    return [
        f"{axis} = {size} is not a multiple of mesh.{RULES[axis]}, and is kept whole"
        for axis, size in sorted(dimensions)
        if not _divides(mesh, axis, size)
    ]


def _divides(mesh: Mesh, axis: str, size: int) -> bool:
    rule = RULES[axis]
    return not isinstance(rule, str) or size % mesh.shape[rule] == 0


def batch_sharding(mesh: Mesh, rank: int) -> NamedSharding:
    """Of an array whose first axis is rows, of any rank."""
    return NamedSharding(mesh, partition(("rows", *["tokens"] * (rank - 1))))


def row_shards(mesh: Mesh) -> int:
    """How many parts the rows of a batch are split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def keep_rows(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """`x`, whose first axis is rows, held to lie as batches do; without a mesh, or where rows are
    not a multiple of their shards, as XLA likes."""
    if mesh is None or x.shape[0] % row_shards(mesh):
        return x
    return jax.lax.with_sharding_constraint(x, batch_sharding(mesh, x.ndim))
