"""How the pieces of tensors get onto the devices. The trainer half: jax.

A tensor's pieces go there in chunks: a few rows are read, cast and laid out as the leaf has them,
while the next ones are being read.
"""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bridge.names import Piece, from_hf, hf_axes, hf_shape
from bridge.safetensors_files import StoredTensor, read_into
from jaxrl.models.params import ParamSpec, Path

# Bytes placed at a time. Small enough that the allocator hands the same memory out again (fresh
# pages cost more than the copy) and that what is on its way does not count; large enough that
# starting a program (0.1 to 0.4 ms) does not count either.
_CHUNK = 8 << 20
# Backends whose pieces are transposed on the way in. The CPU's does that at 2 GB/s, and at 0.3 in a
# program, where XLA's loop walks the rows of one side and the columns of the other.
_TRANSPOSED = {"cpu"}


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
    """What is placed at once: of every shard of a piece the same rows, `count` indices from `start`
    on along the first output axis."""

    tensor: StoredTensor
    piece: Piece
    start: int
    count: int
    stretches: tuple[tuple[int, int], ...]  # (byte in the tensor, bytes), those of this process

    def read(self, memory: np.ndarray) -> np.ndarray:
        """Fills `memory`, uint8, with the stretches; returns them as [rows, ...].

        Raises:
          DamageError: they cannot be read; names file and tensor.
        """
        end = 0
        for start, nbytes in self.stretches:
            read_into(self.tensor, start, memory[end : end + nbytes])
            end += nbytes
        rows = memory[:end].view(jnp.dtype(self.tensor.dtype))
        return rows.reshape(-1, *self.tensor.shape[1:])


class Place:
    """Where the pieces of one leaf go.

    Everything is said of one shard, and every device does its own part: the programs hold no
    communication, so that no device ever needs room for more than its shard and a chunk.
    """

    def __init__(self, spec: ParamSpec, sharding: NamedSharding, dtype: str) -> None:
        self.spec, self.sharding, self.dtype = spec, sharding, dtype
        parts = (*sharding.spec, *[None] * (len(spec.shape) - len(sharding.spec)))
        split = {None: None} | dict(zip(spec.axes, parts, strict=True))
        whole = [axis for axis in spec.axes[spec.stack :] if axis not in hf_axes(spec)]
        if any(split[axis] for axis in whole):
            raise ValueError(f"{spec.hf_name}: {whole} cannot be split over {sharding}")
        hf_sharding = NamedSharding(sharding.mesh, P(*(split[axis] for axis in hf_axes(spec))))
        everywhere = {
            device: _bounds(index or (), hf_shape(spec))
            for device, index in hf_sharding.devices_indices_map(hf_shape(spec)).items()
        }
        self.devices = list(hf_sharding.addressable_devices_indices_map(hf_shape(spec)))
        self.held = [everywhere[device] for device in self.devices]
        self.blocks = sorted({rows.start for rows, *_ in self.held})  # first rows of our shards
        # The processes run the same programs, so a chunk is as large in each of them.
        blocks = {(device.process_index, rows.start) for device, (rows, *_) in everywhere.items()}
        self.most_blocks = max(Counter(process for process, _ in blocks).values())
        # One shard, by a name that leaves of one kind share: they share their programs.
        stacked = "".join(key for key in ("{layer}", "{expert}") if key in spec.hf_name)
        self.shard = dataclasses.replace(
            spec, shape=sharding.shard_shape(spec.shape), axes=(), hf_name=stacked, row=0
        )
        self.axis = spec.first_output  # chunks are cut there
        self.transposed = self.devices[0].platform in _TRANSPOSED
        # There bfloat16 is updated by way of a float32 copy of the whole leaf, integers in place.
        self.held_as = "uint16" if self.transposed and dtype == "bfloat16" else dtype
        ours = NamedSharding(sharding.mesh, P(*parts[spec.stack :]))
        self.piece_sharding = ours if self.transposed else hf_sharding

    def chunks(self, tensor: StoredTensor, piece: Piece) -> Iterator[Chunk]:
        """What is to be read and placed of one piece."""
        size = self.shard.shape[self.axis]
        if not tensor.nbytes:
            return
        row_bytes = tensor.nbytes // tensor.shape[0]
        unit = hf_shape(self.shard)[0] // size  # rows of one index
        count = min(max(_CHUNK // (unit * row_bytes * self.most_blocks), 1), size)
        for step in range(0, size, count):
            start = min(step, size - count)  # the last may overlap: it has the shape of the others
            stretches = [
                ((piece.start + block + start * unit) * row_bytes, count * unit * row_bytes)
                for block in self.blocks
            ]
            yield Chunk(tensor, piece, start, count, tuple(stretches))

    def put(self, leaf: jax.Array, chunk: Chunk, rows: np.ndarray) -> jax.Array:
        """Returns the leaf with the chunk in it; the leaf that was passed in is consumed.

        `rows`, which `chunk.read` returned, are not needed after the return.
        """
        shape, axis = self.shard.shape, self.axis
        shape = (*shape[:axis], chunk.count, *shape[axis + 1 :])
        part = dataclasses.replace(self.shard, shape=shape)
        length = len(rows) // len(self.blocks)
        views = []
        for held in self.held:
            first = self.blocks.index(held[0].start) * length
            view = rows[first : first + length, *held[1:]]
            views.append(from_hf(part, view) if self.transposed else view)
        program = _setter(part, self.sharding, self.piece_sharding, self.transposed, self.dtype)
        at = np.array([*chunk.piece.index, chunk.start], np.int32)
        return program(leaf, self._assemble(views), at).block_until_ready()

    def finish(self, leaf: jax.Array) -> jax.Array:
        """The leaf in its own dtype, which takes over the memory of the one passed in."""
        if self.held_as == self.dtype:
            return leaf
        held = leaf.addressable_shards
        views = [np.asarray(shard.data).view(jnp.dtype(self.dtype)) for shard in held]
        parts = jax.device_put(views, [shard.device for shard in held])  # the CPU: without a copy
        return jax.make_array_from_single_device_arrays(leaf.shape, self.sharding, parts)

    def _assemble(self, views: list[np.ndarray]) -> jax.Array:
        """One array of which every device holds its view."""
        parts = (*self.piece_sharding.spec,)
        sizes = zip(views[0].shape, parts, strict=True)
        shape = tuple(size * _ways(self.sharding, part) for size, part in sizes)
        arrays = jax.device_put(views, self.devices)
        return jax.make_array_from_single_device_arrays(shape, self.piece_sharding, arrays)


def read_ahead(chunks: Sequence[Chunk]) -> Iterator[tuple[Chunk, np.ndarray]]:
    """Reads each chunk while the one before it is being placed.

    What is yielded is overwritten once the one after it is asked for: two stretches of memory take
    turns, because fresh pages cost more than reading does.
    """
    most = max((sum(n for _, n in chunk.stretches) for chunk in chunks), default=0)
    memory = [_aligned(most), _aligned(most)]
    with ThreadPoolExecutor(1) as pool:
        reading = [pool.submit(chunk.read, memory[i]) for i, chunk in enumerate(chunks[:1])]
        for i, chunk in enumerate(chunks):
            rows = reading.pop().result()
            if i + 1 < len(chunks):
                reading.append(pool.submit(chunks[i + 1].read, memory[(i + 1) % 2]))
            yield chunk, rows


def zeros(places: dict[Path, Place]) -> dict[Path, jax.Array]:
    """Every leaf as zeros, each device its own shards, in one program."""
    kinds = [(place.spec.shape, place.held_as) for place in places.values()]
    shardings = [place.sharding for place in places.values()]
    make = jax.jit(lambda: [jnp.zeros(*kind) for kind in kinds], out_shardings=shardings)
    return dict(zip(places, make(), strict=True))


@functools.cache
def _setter(
    spec: ParamSpec, sharding: NamedSharding, piece: NamedSharding, transposed: bool, dtype: str
):
    """Returns set(leaf, piece, at) -> leaf, compiled once for each kind of leaf.

    Layout and cast to `dtype` run on the device; the leaf has that dtype, or holds its bits. `spec`
    is what one device gets of a piece; `at`, int32 [stack + 1], is the index in the stack, and the
    start on the first output axis.
    """
    stack, axis = spec.stack, spec.first_output
    parts = (*sharding.spec, *[None] * stack)[:stack]

    def set_shard(leaf: jax.Array, rows: jax.Array, at: jax.Array) -> jax.Array:
        rows = (rows if transposed else from_hf(spec, rows)).astype(dtype)
        rows = rows.view(leaf.dtype).reshape((1,) * stack + rows.shape)
        start = [jnp.int32(0)] * leaf.ndim
        start[axis] = at[stack]
        here = jnp.bool_(True)
        for i, part in enumerate(parts):
            start[i] = at[i]
            if part is not None:  # the index may be one of another device's
                start[i] = at[i] - jax.lax.axis_index(part) * leaf.shape[i]
                here &= (start[i] >= 0) & (start[i] < leaf.shape[i])
        if any(part is not None for part in parts):
            rows = jnp.where(here, rows, jax.lax.dynamic_slice(leaf, start, rows.shape))
        return jax.lax.dynamic_update_slice(leaf, rows, start)

    return jax.jit(
        jax.shard_map(
            set_shard,
            mesh=sharding.mesh,
            in_specs=(sharding.spec, piece.spec, P()),
            out_specs=sharding.spec,
        ),
        donate_argnums=0,
    )


def _aligned(nbytes: int, boundary: int = 64) -> np.ndarray:
    """Memory that the CPU backend can take for an array of its own, without a copy."""
    memory = np.empty(nbytes + boundary, np.uint8)
    start = -memory.ctypes.data % boundary
    return memory[start : start + nbytes]


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    index = (*index, *[slice(None)] * (len(shape) - len(index)))
    return tuple(slice(*i.indices(n)[:2]) for i, n in zip(index, shape, strict=True))


def _ways(sharding: NamedSharding, part: str | tuple[str, ...] | None) -> int:
    """Into how many parts a dimension is split."""
    names = (part,) if isinstance(part, str) else part or ()
    return math.prod(sharding.mesh.shape[name] for name in names)
