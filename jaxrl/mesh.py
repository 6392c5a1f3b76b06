"""The device mesh, and the one table that says how arrays lie on it."""

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl.config import MeshSection
from jaxrl.models.decoder import tree_of
from jaxrl.models.params import ParamSpec, Path
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

    Raises:
      UserError: a dimension that its mesh axis does not divide; all of them together.
    """
    problems, shardings = [], {}
    for path, spec in specs.items():
        shardings[path] = NamedSharding(mesh, partition(spec.axes))
        for size, axis in zip(spec.shape, spec.axes, strict=True):
            rule = RULES[axis]
            if isinstance(rule, str) and size % mesh.shape[rule]:
                problems.append(
                    f"{'/'.join(path)} {spec.shape}: {axis} = {size} cannot be split over "
                    f"mesh.{rule} = {mesh.shape[rule]}"
                )
    if problems:
        raise UserError("the policy does not fit the mesh:\n  " + "\n  ".join(problems))
    return tree_of(shardings)


def batch_sharding(mesh: Mesh, rank: int) -> NamedSharding:
    """Of an array whose first axis is rows, of any rank."""
    return NamedSharding(mesh, partition(("rows", *["tokens"] * (rank - 1))))
