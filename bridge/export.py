"""Parameters on a mesh -> host buffers under Hugging Face names. The trainer half: jax.

Layout and cast run on the devices, a group of layers at a time, in programs whose size does not
grow with depth; while the host takes what one group gave, the devices work on the next. A group is
a bucket of the wire, so that a host holds a few buckets of a version and never a model. Where the
devices keep the last version (`bridge.compare`), only what changed comes to the host.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bridge import compare
from bridge.names import hf_axes, hf_name, hf_tensors, to_hf
from bridge.wire import ITEM_BYTES, NOTHING, HostChanges, HostTensor, Outgoing
from jaxrl.mesh import partition, replicated
from jaxrl.models.params import ParamSpec, Path, leaf_at

Compare = Literal["auto", "mesh", "host"]
Stacks = dict[str, jax.Array]  # of a group: by name, stacked by layer (and expert), on the devices

_T = TypeVar("_T")

BUCKET_BYTES = 256 << 20
_EACH = 4  # groups of a process, at least, so that all ship about as much
_AHEAD = 1  # groups that devices with memory of their own work on while the host takes another
_SPENT = 4  # groups whose memory is kept: three are on their way at a time, and one is of odd shape
_WORTH_BYTES = 32 << 20  # of a group; memory for less is not fresh, but the allocator's


class Group(NamedTuple):
    """Whole Hugging Face tensors, by the pattern of their name, of some layers."""

    names: tuple[str, ...]  # `ParamSpec.hf_name`
    start: int  # first layer
    layers: int  # 0 where there are none
    nbytes: int


class Kept(Protocol):
    """Where the devices' last version is kept; `bridge.encoding.Shadow` is the real one."""

    def exchange(self, group: int, bits: Any) -> Any | None:
        """Keeps the bits of a group, and gives up those of the last version to compare with."""
        ...


@dataclasses.dataclass
class Snapshot:
    """A version on the devices, in the wire's layout and dtype. Its groups can be taken once."""

    stacks: collections.deque[Stacks]
    mesh: Mesh | None


class _Compared(NamedTuple):
    """A group of which the devices hold two versions; see `bridge.compare`."""

    stacks: Stacks
    layout: compare.Layout
    new: jax.Array
    words: jax.Array
    counts: jax.Array


class _Changed(NamedTuple):
    """What changed in a group, on the devices."""

    names: tuple[str, ...]
    layout: compare.Layout
    counts: np.ndarray
    places: jax.Array
    values: jax.Array


class _Spent:
    """Memory of groups that came to the host, to make others in: on a CPU, whose arrays the host
    reads where they are, to write to fresh memory takes longer than the cast.

    The runtime makes no use of what the host has a view of still.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[Hashable, Stacks]] = []

    def take(self, group: Group) -> Stacks:
        """The oldest of the same shapes; empty if there is none."""
        alike = (stacks for kind, stacks in self._unspent() if kind == _kind(group))
        return next(alike, {})

    def keep(self, group: Group, stacks: Stacks) -> None:
        """Once the host's views are made."""
        self._kept = [*self._unspent(), (_kind(group), stacks)][-_SPENT:]

    def _unspent(self) -> list[tuple[Hashable, Stacks]]:
        """Those of which the runtime has made no use yet."""
        return [one for one in self._kept if not any(map(_is_used, one[1].values()))]


def _is_used(array: jax.Array) -> bool:
    """Whether any device's part was: where the host has a view of one's, only the others' are."""
    return array.is_deleted() or any(s.data.is_deleted() for s in array.addressable_shards)


class Exporter:
    """Makes the Hugging Face tensors of the leaves in `specs`, in `dtype`.

    The parameters it is given may have more leaves; they stay.
    """

    def __init__(
        self,
        specs: dict[Path, ParamSpec],
        dtype: str,
        bucket_bytes: int = BUCKET_BYTES,
        compare_on: Compare = "auto",
        processes: int = 1,
    ) -> None:
        """A group has at most `bucket_bytes`, of several processes at most a part of each one's
        share, or one tensor at one layer if that has more.

        `compare_on` says where versions are compared: by the devices of a mesh, or on the host.
        `auto`: by the devices unless they are CPUs, whose memory is the host's.
        """
        self._specs, self._dtype, self._compare_on = specs, dtype, compare_on
        self.device_bytes = 0  # that the last export brought to this host
        self._spent = _Spent()
        self._order = list(hf_tensors(specs))
        self._leaves: dict[str, tuple[Path, ...]] = {}  # of each name, in the order of their rows
        for path in sorted(specs, key=lambda path: specs[path].row):
            name = specs[path].hf_name
            self._leaves[name] = (*self._leaves.get(name, ()), path)
        if processes > 1:
            total = ITEM_BYTES[dtype] * sum(math.prod(spec.shape) for spec in specs.values())
            bucket_bytes = min(bucket_bytes, total // (_EACH * processes))
        # The last is waited for while nothing else is done, so it is a small one.
        self.plan = sorted(self._planned(bucket_bytes), key=lambda group: -group.nbytes)

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(group.nbytes for group in self.plan)

    def __call__(self, params: Any) -> list[HostTensor]:
        """All tensors, in the order of `names.hf_tensors`; see `groups`."""
        tensors = {t.name: t for group in self.groups(params) for t in group}
        return [tensors[name] for name in self._order if name in tensors]

    def snapshot(self, params: Any) -> Snapshot:
        """The tensors of `params` as they are now, for `groups` or `groups_since` to take later:
        dispatched, not waited for. `params` may go to a program that consumes them at once.

        It takes a copy of them on the devices, in the wire's dtype and split as they are, until
        its groups are taken.
        """
        return Snapshot(collections.deque(self._made(params, gather=False)), self._mesh(params))

    def groups(
        self, params: Any, owners: Sequence[int] | None = None
    ) -> Iterator[list[HostTensor]]:
        """The tensors of each group of `plan`, in turn. They share no memory with `params`, which
        may be consumed once the last group has come, and at once if they are a `Snapshot`.

        Of several processes all call it and take every group: the mesh gathers each, and its owner
        gets the tensors, the others an empty list. `owners` None: the first process.
        """
        self.device_bytes = 0
        made = map(_gathered, self._made(params, gather=True))
        mesh = self._mesh(params)
        for group, stacks in self._own(owners, _ahead(made, mesh)):
            yield [] if stacks is None else self._whole(group, stacks)
            if stacks is not None and _on_cpu(mesh) and self._recycles(group, stacks):
                self._spent.keep(group, stacks)

    def groups_since(
        self, kept: Kept, params: Any, owners: Sequence[int] | None = None
    ) -> Iterator[Outgoing]:
        """As `groups`, for a version to take differences from. Where the devices compare, they hold
        it in `kept` from now on, and of a group that they held of the last version only changes
        come, unless so many that they would take more bytes.

        The host's part of finding them is done by whoever iterates over a group.
        """
        mesh = self._mesh(params)
        if mesh is None or not self._compares(mesh):
            yield from self.groups(params, owners)
            return
        self.device_bytes = 0
        made = enumerate(self._made(params, gather=False))
        compared = (self._compared(kept, index, stacks, mesh) for index, stacks in made)
        found = (self._compacted(one) for one in _ahead(compared, mesh))
        for group, one in self._own(owners, _ahead(found, mesh)):
            if isinstance(one, _Changed):
                yield self._changes(group, one, *self._to_host([one.places, one.values]))
            else:
                yield [] if one is None else self._whole(group, one)

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

    def program(self, group: Group, params: Any, gather: bool = True) -> Any:
        """Jitted inputs -> tensors stacked by layer (and expert), by name, split over the mesh as
        parameters are; on a mesh of several processes every device has all of them if they are to
        `gather`. On CPU those that were transposed are not cast yet."""
        leaves, _ = self.inputs(group, params)
        specs = tuple((path, self._specs[path]) for path in leaves)
        return _program(specs, group.layers, self._dtype, self._mesh(params), gather)

    def layout(self, stacks: Mapping[str, Any], mesh: Mesh) -> compare.Layout:
        """How the tensors of a group lie on the mesh."""
        shapes = {name: tuple(array.shape) for name, array in stacks.items()}
        specs = [_partition(self._first(name), shape, mesh) for name, shape in shapes.items()]
        return compare.Layout(mesh, tuple(shapes.values()), tuple(specs))

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
                step = _step(count, most // max(nbytes, 1))
                for start in range(0, max(count, 1), step):
                    here = min(step, count - start)
                    yield Group(part, start, max(here, 0), nbytes * max(here, 1))

    def _mesh(self, params: Any) -> Mesh | None:
        if isinstance(params, Snapshot):
            return params.mesh
        sharding = getattr(leaf_at(params, next(iter(self._specs))), "sharding", None)
        return getattr(sharding, "mesh", None)  # a single device has none

    def _compares(self, mesh: Mesh) -> bool:
        return self._compare_on == "mesh" or (self._compare_on == "auto" and not _on_cpu(mesh))

    def _made(self, params: Any, gather: bool) -> Iterator[Stacks]:
        """Each group's tensors, dispatched when asked for."""
        if isinstance(params, Snapshot):
            while params.stacks:
                yield params.stacks.popleft()
            return
        for group in self.plan:
            program = self.program(group, params, gather)
            stacks = program(*self.inputs(group, params), self._spent.take(group))
            yield {name: _cast(array, self._dtype) for name, array in stacks.items()}

    def _recycles(self, group: Group, stacks: Stacks) -> bool:
        """Whether a group was made without a cast of its own, and the host reads it as it lies."""
        return group.nbytes >= _WORTH_BYTES and all(
            array.is_fully_addressable
            and array.is_fully_replicated
            and not self._first(name).inputs_first
            for name, array in stacks.items()
        )

    def _own(
        self, owners: Sequence[int] | None, found: Iterable[_T]
    ) -> Iterator[tuple[Group, _T | None]]:
        """What was found of each group; None of those of other processes."""
        owners = owners or [0] * len(self.plan)
        for owner, group, one in zip(owners, self.plan, found, strict=True):
            yield group, one if owner == jax.process_index() else None

    def _compared(self, kept: Kept, index: int, stacks: Stacks, mesh: Mesh) -> Stacks | _Compared:
        layout = self.layout(stacks, mesh)
        new = compare.vector(layout, list(stacks.values()))
        old = kept.exchange(index, new)
        if old is None:
            return stacks
        words, counts = compare.found(layout, old, new)
        return _Compared(stacks, layout, new, words, replicated(counts))

    def _compacted(self, one: Stacks | _Compared) -> Stacks | _Changed:
        """Waits for the counts, which all processes have, and so all go on in the same way."""
        if not isinstance(one, _Compared):
            return _gathered(one)
        (counts,) = self._to_host([one.counts])
        most = compare.capacity(one.layout, ITEM_BYTES[self._dtype], counts)
        if most is None:
            return _gathered(one.stacks)
        places, values = compare.compact(one.layout, one.new, one.words, most)
        found = (counts, replicated(places), replicated(values))
        return _Changed(tuple(one.stacks), one.layout, *found)

    def _whole(self, group: Group, stacks: Stacks) -> list[HostTensor]:
        tensors = []
        for name, array in zip(stacks, self._to_host(list(stacks.values())), strict=True):
            for index, hf in self._names(group, name, array.shape):
                one = np.ascontiguousarray(array[index])
                data = one.reshape(-1).view(np.uint8)
                tensors.append(HostTensor(hf, self._dtype, one.shape, data))
        return tensors

    def _changes(
        self, group: Group, found: _Changed, places: np.ndarray, values: np.ndarray
    ) -> Iterator[HostChanges]:
        changes = found.layout.changes(found.counts, places, values)
        of_stacks = zip(found.names, found.layout.shapes, changes, strict=True)
        for name, shape, (indices, bits) in of_stacks:
            one = shape[self._first(name).stack :]
            size = math.prod(one)
            for i, (_, hf) in enumerate(self._names(group, name, shape)):
                here = slice(*np.searchsorted(indices, (i * size, (i + 1) * size)))
                yield HostChanges(hf, self._dtype, one, indices[here] - i * size, bits[here])

    def _first(self, name: str) -> ParamSpec:
        """Of the leaf that has a tensor's first rows."""
        return self._specs[self._leaves[name][0]]

    def _names(
        self, group: Group, name: str, shape: tuple[int, ...]
    ) -> Iterator[tuple[tuple[int, ...], str]]:
        """Index within a group's stack of this shape, and name, of each Hugging Face tensor."""
        spec = self._first(name)
        for index in np.ndindex(shape[: spec.stack]):
            layer = tuple(i + group.start if axis == 0 else i for axis, i in enumerate(index))
            yield index, hf_name(spec, layer)

    def _to_host(self, arrays: list[jax.Array]) -> list[np.ndarray]:
        self.device_bytes += sum(array.nbytes for array in arrays)
        return to_host(arrays)


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
    specs: tuple[tuple[Path, ParamSpec], ...],
    layers: int,
    dtype: str,
    mesh: Mesh | None,
    gather: bool,
) -> Callable[[dict[Path, jax.Array], int], dict[str, jax.Array]]:
    on_cpu = _on_cpu(mesh)
    gathered = gather and mesh is not None and _processes(mesh) > 1
    firsts: dict[str, ParamSpec] = {}
    for _, spec in specs:
        firsts.setdefault(spec.hf_name, spec)

    def run(
        leaves: dict[Path, jax.Array], start: int, spent: Mapping[str, jax.Array] = NOTHING
    ) -> dict[str, jax.Array]:
        rows: dict[str, list[jax.Array]] = {}
        for path, spec in specs:
            leaf = leaves[path]
            if layers:
                leaf = jax.lax.dynamic_slice_in_dim(leaf, start, layers, axis=0)
                spec = dataclasses.replace(spec, shape=(layers, *spec.shape[1:]))
            # XLA's CPU backend would transpose and cast in one loop, at a third of the speed.
            wire = leaf if on_cpu and spec.inputs_first else leaf.astype(dtype)
            rows.setdefault(spec.hf_name, []).append(to_hf(spec, wire))
        whole = {
            name: parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=firsts[name].stack)
            for name, parts in rows.items()
        }
        if mesh is None:
            return whole
        shardings = {
            name: NamedSharding(
                mesh, P() if gathered else _partition(firsts[name], array.shape, mesh)
            )
            for name, array in whole.items()
        }
        return jax.lax.with_sharding_constraint(whole, shardings)

    return jax.jit(run, donate_argnames="spent", keep_unused=True)


def _cast(array: jax.Array, dtype: str) -> jax.Array:
    """A program would copy what has the dtype already."""
    return array if array.dtype == dtype else array.astype(dtype)


def _gathered(stacks: Stacks) -> Stacks:
    """Where this process can read them."""
    return {name: replicated(array) for name, array in stacks.items()}


def _ahead(dispatched: Iterable[_T], mesh: Mesh | None) -> Iterator[_T]:
    """What the devices work on, some of it before its turn; where their memory is the host's, that
    would be one group more in it."""
    ahead = 0 if _on_cpu(mesh) else _AHEAD
    running: collections.deque[_T] = collections.deque()
    for one in dispatched:
        running.append(one)
        if len(running) > ahead:
            yield running.popleft()
    yield from running


def _partition(spec: ParamSpec, shape: tuple[int, ...], mesh: Mesh) -> P:
    """How a stack of Hugging Face tensors lies, so that a device makes its part of its own part of
    the leaf; `spec` is that of the tensors' first rows."""
    return partition(mesh, (*spec.axes[: spec.stack], *hf_axes(spec)), shape)


def _processes(mesh: Mesh) -> int:
    return len({device.process_index for device in mesh.devices.flat})


def _on_cpu(mesh: Mesh | None) -> bool:
    """None: a single device."""
    return (jax.default_backend() if mesh is None else mesh.devices.flat[0].platform) == "cpu"


def _layers(spec: ParamSpec) -> int:
    return spec.shape[0] if spec.stack else 0


def _layer_size(spec: ParamSpec) -> int:
    """Elements of one layer, of all its experts."""
    return math.prod(spec.shape[1:] if spec.stack else spec.shape)


def _kind(group: Group) -> Hashable:
    """Equal for groups of the same shapes."""
    return group.names, group.layers


def _step(count: int, most: int) -> int:
    """Of `count` layers, those that go into a group: as many as may, or some fewer if all groups
    have the same then, which is one program to compile."""
    most = max(1, min(count, most))
    return next((step for step in range(most, most // 2, -1) if count % step == 0), most)


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
