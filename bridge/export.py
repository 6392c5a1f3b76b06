"""Parameters on a mesh -> host buffers under Hugging Face names. The trainer half: jax.

Layout and cast run on the devices, a group of layers at a time, in programs whose size does not
grow with depth; while the host takes what one group gave, the devices work on the next. A group is
a bucket of the wire, so that a host holds a few buckets of a version and never a model.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bridge.names import hf_name, hf_tensors, to_hf
from bridge.wire import ITEM_BYTES, HostTensor
from jaxrl.models.params import ParamSpec, Path, leaf_at

BUCKET_BYTES = 256 << 20
_AHEAD = 1  # groups that the devices work on while the host takes another


class Group(NamedTuple):
    """Whole Hugging Face tensors, by the pattern of their name, of some layers."""

    names: tuple[str, ...]  # `ParamSpec.hf_name`
    start: int  # first layer
    layers: int  # 0 where there are none
    nbytes: int


class Exporter:
    """Makes the Hugging Face tensors of the leaves in `specs`, in `dtype`.

    The parameters it is given may have more leaves; they stay.
    """

    def __init__(
        self, specs: dict[Path, ParamSpec], dtype: str, bucket_bytes: int = BUCKET_BYTES
    ) -> None:
        """A group has at most `bucket_bytes`, or one tensor at one layer if that has more."""
        self._specs, self._dtype = specs, dtype
        self._order = list(hf_tensors(specs))
        self._leaves: dict[str, tuple[Path, ...]] = {}  # of each name, in the order of their rows
        for path in sorted(specs, key=lambda path: specs[path].row):
            name = specs[path].hf_name
            self._leaves[name] = (*self._leaves.get(name, ()), path)
        self.plan = list(self._planned(bucket_bytes))

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(group.nbytes for group in self.plan)

    def __call__(self, params: Any) -> list[HostTensor]:
        """All tensors, in the order of `names.hf_tensors`; see `groups`."""
        tensors = {t.name: t for group in self.groups(params) for t in group}
        return [tensors[name] for name in self._order if name in tensors]

    def groups(
        self, params: Any, owners: Sequence[int] | None = None
    ) -> Iterator[list[HostTensor]]:
        """The tensors of each group of `plan`, in turn. They share no memory with `params`, which
        may be consumed once the last group has come.

        Of several processes all call it and take every group: the mesh gathers each, and its owner
        gets the tensors, the others an empty list. `owners` None: the first process.
        """
        owners = owners or [0] * len(self.plan)
        running: collections.deque[tuple[int, Group, dict[str, jax.Array]]] = collections.deque()
        for owner, group in zip(owners, self.plan, strict=True):
            stacked = self.program(group, params)(*self.inputs(group, params))
            running.append((owner, group, _cast(stacked, self._dtype)))
            if len(running) > _AHEAD:
                yield self._taken(*running.popleft())
        while running:
            yield self._taken(*running.popleft())

    def owners(self, processes: int) -> list[int]:
        """A process for each group, so that all export about as many bytes."""
        loads = [0] * processes
        found = []
        for group in self.plan:
            found.append(loads.index(min(loads)))
            loads[found[-1]] += group.nbytes
        return found

    def inputs(self, group: Group, params: Any) -> tuple[dict[Path, Any], int]:
        """What the program of a group takes: its leaves, all layers of them, and the first layer
        that it makes tensors of."""
        paths = [path for name in group.names for path in self._leaves[name]]
        return {path: leaf_at(params, path) for path in paths}, group.start

    def program(self, group: Group, params: Any) -> Any:
        """Jitted inputs -> tensors stacked by layer (and expert), by name. On a mesh of several
        processes every device has all of them. On CPU they are not cast yet."""
        leaves, _ = self.inputs(group, params)
        sharding = getattr(next(iter(leaves.values())), "sharding", None)
        mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
        specs = tuple((path, self._specs[path]) for path in leaves)
        return _program(specs, group.layers, self._dtype, mesh)

    def _planned(self, most: int) -> Iterator[Group]:
        """Layers are cut into groups first, by all their tensors; where one layer is too much, by
        some of its tensors."""
        width = ITEM_BYTES[self._dtype]
        sizes = {  # of each name: bytes of one layer
            name: width * sum(_layer_size(self._specs[path]) for path in paths)
            for name, paths in self._leaves.items()
        }
        layers = {name: _layers(self._specs[paths[0]]) for name, paths in self._leaves.items()}
        for count in sorted(set(layers.values())):
            names = [name for name in layers if layers[name] == count]
            for part in _filled(names, sizes, most):
                nbytes = sum(sizes[name] for name in part)
                step = max(1, min(count, most // max(nbytes, 1)))
                for start in range(0, max(count, 1), step):
                    here = min(step, count - start)
                    yield Group(part, start, max(here, 0), nbytes * max(here, 1))

    def _taken(self, owner: int, group: Group, stacked: dict[str, jax.Array]) -> list[HostTensor]:
        if jax.process_index() != owner:
            return []
        tensors = []
        for name, array in zip(stacked, to_host(list(stacked.values())), strict=True):
            spec = self._specs[self._leaves[name][0]]
            for index in np.ndindex(array.shape[: spec.stack]):
                layer = tuple(i + group.start if axis == 0 else i for axis, i in enumerate(index))
                one = np.ascontiguousarray(array[index])
                data = one.reshape(-1).view(np.uint8)
                tensors.append(HostTensor(hf_name(spec, layer), self._dtype, one.shape, data))
        return tensors


def to_host(arrays: list[jax.Array]) -> list[np.ndarray]:
    """Arrays that this process can read. Of those that each of its devices has all of, every one
    comes from another device."""
    parts = []
    for i, array in enumerate(arrays):
        shards = array.addressable_shards
        parts.append(shards[i % len(shards)].data if array.is_fully_replicated else array)
        parts[-1].copy_to_host_async()
    return [np.asarray(part) for part in parts]


@functools.lru_cache(maxsize=64)
def _program(
    specs: tuple[tuple[Path, ParamSpec], ...], layers: int, dtype: str, mesh: Mesh | None
) -> Callable[[dict[Path, jax.Array], int], dict[str, jax.Array]]:
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform

    def run(leaves: dict[Path, jax.Array], start: int) -> dict[str, jax.Array]:
        rows: dict[str, list[jax.Array]] = {}
        for path, spec in specs:
            leaf = leaves[path]
            if layers:
                leaf = jax.lax.dynamic_slice_in_dim(leaf, start, layers, axis=0)
                spec = dataclasses.replace(spec, shape=(layers, *spec.shape[1:]))
            # XLA's CPU backend would transpose and cast in one loop, at a third of the speed.
            wire = leaf if platform == "cpu" else leaf.astype(dtype)
            rows.setdefault(spec.hf_name, []).append(to_hf(spec, wire))
        stacks = {spec.hf_name: spec.stack for _, spec in specs}
        whole = {
            name: parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=stacks[name])
            for name, parts in rows.items()
        }
        if mesh is None or len({device.process_index for device in mesh.devices.flat}) == 1:
            return whole  # each device's part goes to the host by itself
        return jax.lax.with_sharding_constraint(whole, NamedSharding(mesh, P()))

    return jax.jit(run)


@functools.partial(jax.jit, static_argnums=1)
def _cast(stacked: dict[str, jax.Array], dtype: str) -> dict[str, jax.Array]:
    return {name: array.astype(dtype) for name, array in stacked.items()}


def _layers(spec: ParamSpec) -> int:
    return spec.shape[0] if spec.stack else 0


def _layer_size(spec: ParamSpec) -> int:
    """Elements of one layer, of all its experts."""
    return math.prod(spec.shape[1:] if spec.stack else spec.shape)


def _filled(names: list[str], sizes: dict[str, int], most: int) -> Iterator[tuple[str, ...]]:
    """Cuts `names` into runs of at most `most` bytes; a larger one is alone."""
    run: list[str] = []
    for name in names:
        if run and sum(sizes[other] for other in run) + sizes[name] > most:
            yield tuple(run)
            run = []
        run.append(name)
    if run:
        yield tuple(run)
