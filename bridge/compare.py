"""What changed since the last version, found by the devices that hold both. Trainer half: jax.

A device lays its parts of a bucket's arrays end to end, as bits, in one vector, and keeps that of
the last version. It compares the two by itself: nothing travels between devices, and all that they
send is how much changed, and then the places and the new bits. Elements are those of `bridge.delta`
(NaNs and negative zeros count like any value), and so is the result.

The programs are made of what a TPU does well: no scatter and no sort. The changed elements are one
bit each of a vector of words; the r-th of them is found by a binary search in how many there are up
to each word, and then within the word.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bridge.delta import ELEMENTS

_WORD = 32  # elements that share a word
_ROW = 1024  # words that are counted on at once: XLA compiles a longer sum for minutes on TPU
_PLACE_BYTES = 4  # of an element in a device's vector


@dataclasses.dataclass(frozen=True)
class Layout:
    """How arrays of one dtype lie in the devices' vectors: each device's parts, end to end.

    A row is the vector of one device; devices that hold the same parts of all arrays share it.
    """

    mesh: Mesh
    shapes: tuple[tuple[int, ...], ...]
    specs: tuple[P, ...]  # each divides its shape

    @property
    def rows(self) -> NamedSharding:
        """Of the vectors, and whatever else each row has, end to end in one array."""
        return NamedSharding(self.mesh, P(self._axes))

    @property
    def sizes(self) -> list[int]:
        """Elements of each array in a row."""
        return [math.prod(part) for part in self._parts]

    @property
    def _axes(self) -> tuple[str, ...]:
        """Of the mesh, those that any array is split over."""
        used: set[str] = set()
        for part in itertools.chain.from_iterable(self.specs):
            used.update((part,) if isinstance(part, str) else part or ())
        return tuple(name for name in self.mesh.axis_names if name in used)

    @property
    def _parts(self) -> list[tuple[int, ...]]:
        pairs = zip(self.specs, self.shapes, strict=True)
        return [NamedSharding(self.mesh, spec).shard_shape(shape) for spec, shape in pairs]

    def changes(
        self, counts: np.ndarray, places: np.ndarray, values: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """What changed in each array, from what `found` and `compact` made of all rows.

        Yields:
          Indices in the whole array, row-major, int64 [changed], ascending; and the bits there.
        """
        rows = counts.size
        places, values = places.reshape(rows, -1), values.reshape(rows, -1)
        ends = itertools.accumulate(self.sizes)
        for i, (size, end) in enumerate(zip(self.sizes, ends, strict=True)):
            indices, bits = [], []
            for row, starts in self._holders(i):
                edges = np.searchsorted(places[row, : counts[row]], (end - size, end))
                here = slice(*edges)
                inside = places[row, here].astype(np.int64) - (end - size)
                indices.append(_in_whole(inside, self._parts[i], starts, self.shapes[i]))
                bits.append(values[row, here])
            whole = np.concatenate(indices)
            order = np.argsort(whole, kind="stable")  # a few ascending runs
            yield whole[order], np.concatenate(bits)[order]

    def _holders(self, i: int) -> list[tuple[int, tuple[int, ...]]]:
        """Where array i is: (row, first index along each axis) of each of its parts, once."""
        rows = self.rows.devices_indices_map((math.prod(self.mesh.shape[a] for a in self._axes),))
        held: dict[tuple[int, ...], int] = {}
        lies = NamedSharding(self.mesh, self.specs[i]).devices_indices_map(self.shapes[i])
        for device, index in lies.items():
            held.setdefault(tuple(axis.start or 0 for axis in index), rows[device][0].start or 0)
        return [(row, starts) for starts, row in held.items()]


def vector(layout: Layout, arrays: Sequence[jax.Array]) -> jax.Array:
    """The bits of arrays that lie as `layout` says, uint16 or uint32 [rows * elements]: dispatched,
    not waited for. It shares no memory with them."""
    return _vector(layout, arrays[0].dtype)(*arrays)


def found(layout: Layout, old: jax.Array, new: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Compares two vectors: a bit for each element, uint32 [rows * words], and how many are set,
    int32 [rows]."""
    return _compare(layout.rows)(old, new)


def capacity(layout: Layout, width: int, counts: np.ndarray) -> int | None:
    """How many changes `compact` must hold for a row; None if all elements take no more bytes.

    A power of two: a run compiles few programs, of which one does for most versions.

    Args:
      width: bytes of an element.
      counts: of each row.
    """
    most = 1 << max(0, int(counts.max()) - 1).bit_length()
    return most if most * (_PLACE_BYTES + width) < sum(layout.sizes) * width else None


def compact(
    layout: Layout, new: jax.Array, words: jax.Array, most: int
) -> tuple[jax.Array, jax.Array]:
    """Where bits are set, ascending in each row, int32 [rows * most], and what `new` has there.

    What a row has beyond its count means nothing.
    """
    return _compact(layout.rows, most)(new, words)


@functools.lru_cache(maxsize=64)
def _vector(layout: Layout, dtype: np.dtype) -> Callable[..., jax.Array]:
    elements = ELEMENTS[dtype.itemsize]
    size = sum(layout.sizes)
    assert size < 1 << 31, f"{size} elements of a bucket on one device, and places are int32"

    def run(*arrays: jax.Array) -> jax.Array:
        bits = [jax.lax.bitcast_convert_type(array, elements).reshape(-1) for array in arrays]
        return jnp.concatenate([*bits, jnp.zeros(-size % (_WORD * _ROW), elements)])

    return _on_each(run, layout.rows, layout.specs, 1)


@functools.lru_cache(maxsize=64)
def _compare(rows: NamedSharding) -> Callable[..., Any]:
    def run(old: jax.Array, new: jax.Array) -> tuple[jax.Array, jax.Array]:
        bit = jnp.uint32(1) << jnp.arange(_WORD, dtype=jnp.uint32)
        differ = (old != new).reshape(-1, _WORD)
        words = jnp.sum(jnp.where(differ, bit, jnp.uint32(0)), axis=1, dtype=jnp.uint32)
        return words, jnp.sum(_ones(words))[None]

    return _on_each(run, rows, (rows.spec,) * 2, 2)


@functools.lru_cache(maxsize=64)
def _compact(rows: NamedSharding, most: int) -> Callable[..., Any]:
    def run(new: jax.Array, words: jax.Array) -> tuple[jax.Array, jax.Array]:
        ends = _running_sum(_ones(words))  # up to the end of each word
        ranks = jnp.arange(most, dtype=jnp.int32)
        at = jnp.minimum(jnp.searchsorted(ends, ranks, side="right"), words.size - 1)
        word = words[at]
        place = _WORD * at + _set_bit(word, ranks - ends[at] + _ones(word))
        return place, new[place]

    return _on_each(run, rows, (rows.spec,) * 2, 2)


def _on_each(
    run: Callable[..., Any], rows: NamedSharding, into: tuple[P, ...], outputs: int
) -> Callable[..., Any]:
    """`run` by each device, of its own parts and without the others; its outputs are rows."""
    out = rows.spec if outputs == 1 else (rows.spec,) * outputs
    return jax.jit(
        jax.shard_map(run, mesh=rows.mesh, in_specs=into, out_specs=out, check_vma=False)
    )


def _ones(words: jax.Array) -> jax.Array:
    """How many bits of each are set, int32."""
    return jax.lax.population_count(words).astype(jnp.int32)


def _running_sum(counts: jax.Array) -> jax.Array:
    inside = jnp.cumsum(counts.reshape(-1, _ROW), axis=1)
    totals = inside[:, -1]
    return (inside + (jnp.cumsum(totals) - totals)[:, None]).reshape(-1)


def _set_bit(words: jax.Array, rank: jax.Array) -> jax.Array:
    """Which bit of each word is the set one with so many below it, int32."""
    place = jnp.zeros_like(rank)
    for half in (16, 8, 4, 2, 1):
        lower = (words >> place.astype(jnp.uint32)) & jnp.uint32((1 << half) - 1)
        below = _ones(lower)
        upper = rank >= below
        place = jnp.where(upper, place + half, place)
        rank = jnp.where(upper, rank - below, rank)
    return place


def _in_whole(
    indices: np.ndarray, part: tuple[int, ...], starts: tuple[int, ...], shape: tuple[int, ...]
) -> np.ndarray:
    """Row-major indices in a part of an array, whose first element is at `starts`, as indices in
    the whole of it: one division for each axis along which the array is cut."""
    # From the last axis to the first, the part grows to the whole length of each.
    for axis in reversed(range(len(shape))):
        block = math.prod((*part[axis : axis + 1], *shape[axis + 1 :]))
        if part[axis] < shape[axis]:
            grown = math.prod(shape[axis:])
            indices = indices + indices // block * (grown - block)
    return indices + sum(start * math.prod(shape[axis + 1 :]) for axis, start in enumerate(starts))
