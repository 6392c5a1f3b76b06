"""What changed in a tensor between two versions: found, packed small without loss, and applied.

Both ends load this file, in different environments: NumPy, zstandard and the standard library only.
Nothing here is ever a pickle. Elements are a tensor's bits as unsigned integers, so that NaNs and
negative zeros count like any value: uint16 for bfloat16 and float16, uint32 for float32.

At the learning rates of RL about 99 % of bfloat16 weights keep their bits in a step ("Understanding
and Exploiting Weight Update Sparsity for Communication-Efficient Distributed RL", 2026,
arXiv:2602.03839), and the others move little. So a payload holds the gaps between the places that
changed, mostly a byte each, and what happened there; or every element, where that is smaller.

A payload is little-endian, as are the machines that it is meant for:

    "delta", format, width of an element in bytes, form           5 bytes, uint8, uint8, uint8
    elements of the tensor, values in the payload, gap bytes      3 x uint64
    stored bytes of each stream                                   (1 + width) x uint64
    the streams, end to end: gaps, then the values' bytes, lowest plane first

A stream is raw if it is stored in as many bytes as it has, and one frame of zstd if in fewer. A gap
is the number of elements passed over before the next that changed: 255 says 255 and goes on, a
smaller byte ends it. The form says what the values are: DENSE, the bits of all elements, without
gaps; BITS, the new bits where something changed; DIFFERENCES, new - old of the bits as integers,
modulo their range, folded so that small ones of either sign are small (0, -1, 1, -2 -> 0, 1, 2, 3).

Differences are right only on the values that they were taken from: on another base they give other
values, and nothing here can tell. Nor is a flipped bit in a stream always noticed. The digest of
the result proves it, and that is the caller's (`bridge.wire`).
"""

import dataclasses
import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import zstandard

FORMAT = 1
DENSE, BITS, DIFFERENCES = 0, 1, 2
FORMS = {DENSE: "dense", BITS: "bits", DIFFERENCES: "differences"}
ELEMENTS = {2: np.dtype(np.uint16), 4: np.dtype(np.uint32)}  # by width in bytes

_MAGIC = b"delta"
_HEAD = struct.Struct("<5sBBBQQQ")
_GOES_ON = 255  # the gap byte that does not end its gap
_LEVEL = 1  # of zstd: on gaps and differences the next ones are slower and no smaller
_WORTH_IT = 0.95  # a stream is stored raw unless zstd brings it below this share of its bytes
_CHUNK = 1 << 17  # elements compared or changes merged at once, so that they stay in the cache


class DeltaError(Exception):
    """A payload, or an array, that is not what it should be: what, expected and found."""


class Changes(NamedTuple):
    """The elements that differ between two versions of a tensor, in ascending order."""

    size: int  # elements of the whole tensor
    indices: np.ndarray  # int64 [changed], ascending
    values: np.ndarray  # uint16 or uint32 [changed]: the bits after
    before: np.ndarray  # likewise: the bits before


@dataclasses.dataclass(frozen=True, slots=True)
class _Header:
    width: int  # bytes of an element
    form: int
    size: int  # elements of the tensor
    count: int  # values in the payload
    gap_bytes: int
    stored: tuple[int, ...]  # bytes of each stream as stored, gaps first

    @property
    def nbytes(self) -> int:
        return _HEAD.size + 8 * len(self.stored)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Bytes of each stream, gaps first."""
        return (self.gap_bytes, *[self.count] * self.width)

    def pack(self) -> bytes:
        numbers = (self.size, self.count, self.gap_bytes)
        head = _HEAD.pack(_MAGIC, FORMAT, self.width, self.form, *numbers)
        return head + struct.pack(f"<{len(self.stored)}Q", *self.stored)


def changes(old: np.ndarray, new: np.ndarray) -> Changes:
    """Compares two versions of a tensor, by their bits.

    Beside the result it takes as much memory again, and what a chunk needs.

    Args:
      old, new: uint16 or uint32 [size], contiguous.

    Raises:
      DeltaError: they are not, or not of one dtype and size.
    """
    _check_elements("the old version", old)
    _check_elements("the new version", new, old.dtype, old.size)
    differ = np.zeros(_CHUNK, np.bool_)
    found = [np.empty(0, np.int64)]
    for start in range(0, old.size, _CHUNK):
        ours, theirs = old[start : start + _CHUNK], new[start : start + _CHUNK]
        np.not_equal(ours, theirs, out=differ[: ours.size])
        differ[ours.size :] = False
        found.append(_places(differ) + start)
    indices = np.concatenate(found)
    return Changes(old.size, indices, new[indices], old[indices])


def merge(first: Changes, second: Changes) -> Changes:
    """The changes from before `first` to after `second`, which follows it.

    What went back to where it came from has not changed: equal to comparing the two ends.

    Raises:
      DeltaError: they are of different tensors, or a value that both changed is not in `second`
        what `first` left.
    """
    if (first.size, first.values.dtype) != (second.size, second.values.dtype):
        raise DeltaError(
            f"the second changes are of {second.size} elements of {second.values.dtype}, expected "
            f"{first.size} of {first.values.dtype} like the first"
        )
    most = first.indices.size + second.indices.size
    merged = Changes(
        first.size,
        np.empty(most, np.int64),
        np.empty(most, first.values.dtype),
        np.empty(most, first.values.dtype),
    )
    end = 0
    for piece in _merged_pieces(first, second):
        start, end = end, end + piece.indices.size
        for whole, part in zip(merged[1:], piece[1:], strict=True):
            whole[start:end] = part
    return _cut(merged, 0, end)


def encode(changed: Changes, new: np.ndarray, *, differences: bool = True) -> bytes:
    """The payload that brings a tensor up to date: what changed, or all of it if that is smaller.

    Args:
      changed: what changed.
      new: the whole tensor after the change, uint16 or uint32 [size], contiguous.
      differences: values as differences from those before. Half the bytes where values move to
        their neighbours, and right on the version before only; bits are right on any that has
        this version's values everywhere else.

    Raises:
      DeltaError: `changed` is not of this tensor, or its indices do not ascend within it.
    """
    _check_elements("the new version", new, changed.values.dtype, changed.size)
    sparse = _encode_sparse(changed, differences)
    if len(sparse) <= new.nbytes // 4:  # weights as a whole hardly get that small
        return sparse
    return min(sparse, encode_dense(new), key=len)


def encode_dense(new: np.ndarray) -> bytes:
    """The payload that holds all elements of `new`, uint16 or uint32 [size], contiguous.

    Of bfloat16 weights about two thirds remain: their exponents are much alike.
    """
    _check_elements("the new version", new)
    return _payload(DENSE, new.size, np.empty(0, np.uint8), new)


def apply(payload: bytes | bytearray | memoryview | np.ndarray, array: np.ndarray) -> None:
    """Brings `array` to the version of `payload`, in place.

    Everything is checked before the first value is written, and a stream is decompressed only if
    it has as many bytes as the header allows a tensor of this size. See the top of this file for
    what only a digest of the result can tell.

    Args:
      payload: what `encode` returned, as bytes or contiguous uint8.
      array: the version before, uint16 or uint32 [size], contiguous and writable.

    Raises:
      DeltaError: the payload is truncated, corrupted, lies or is for another tensor, or `array`
        is no such array. It is untouched then.
    """
    _check_elements("the array", array)
    if not array.flags.writeable:
        raise DeltaError("the array is read-only, expected a writable one")
    buffer = np.frombuffer(payload, np.uint8)
    header = _read_header(buffer)
    if (header.width, header.size) != (array.itemsize, array.size):
        raise DeltaError(
            f"the array has {array.size} elements of {array.itemsize} bytes, the payload is for "
            f"{header.size} of {header.width}"
        )
    gaps, *planes = _streams(buffer, header)
    if header.form == DENSE:
        _join(planes, array)
        return
    indices = _indices(gaps, header)
    values = np.empty(header.count, array.dtype)
    _join(planes, values)
    if header.form == DIFFERENCES:
        values = _unfold(values)
        values += array[indices]
    array[indices] = values


def _cut(changed: Changes, start: int, end: int) -> Changes:
    return Changes(changed.size, *(array[start:end] for array in changed[1:]))


def _merged_pieces(first: Changes, second: Changes) -> Iterator[Changes]:
    """`merge`, a stretch of the tensor at a time: what it needs beside stays in the cache."""
    longer = max(first.indices, second.indices, key=len)
    starts = (0, 0)
    for edge in (*longer[_CHUNK::_CHUNK], first.size):
        ends = tuple(int(np.searchsorted(c.indices, edge)) for c in (first, second))
        yield _merge_piece(_cut(first, starts[0], ends[0]), _cut(second, starts[1], ends[1]))
        starts = ends


def _merge_piece(first: Changes, second: Changes) -> Changes:
    indices = np.concatenate([first.indices, second.indices])
    order = np.argsort(indices, kind="stable")  # two ascending runs; `first` leads where they meet
    indices = indices[order]
    values = np.concatenate([first.values, second.values])[order]
    before = np.concatenate([first.before, second.before])[order]
    edge = np.ones(indices.size + 1, np.bool_)  # False between two entries of one place
    np.not_equal(indices[1:], indices[:-1], out=edge[1:-1])
    broken = ~edge[1:-1] & (before[1:] != values[:-1])
    if broken.any():
        at = int(np.argmax(broken))
        raise DeltaError(
            f"the second changes do not follow the first: at {indices[at]} they found "
            f"{before[at + 1]:#x}, expected {values[at]:#x}"
        )
    indices, values, before = indices[edge[1:]], values[edge[1:]], before[edge[:-1]]
    moved = values != before
    return Changes(first.size, indices[moved], values[moved], before[moved])


def _encode_sparse(changed: Changes, differences: bool) -> bytes:
    values = changed.values
    if differences:
        values = _fold(values - changed.before)
    form = DIFFERENCES if differences else BITS
    return _payload(form, changed.size, _gaps(changed), values)


def _payload(form: int, size: int, gaps: np.ndarray, values: np.ndarray) -> bytes:
    planes = [values.view(np.uint8)[k :: values.itemsize] for k in range(values.itemsize)]
    streams = [_squeeze(np.ascontiguousarray(stream)) for stream in (gaps, *planes)]
    stored = tuple(memoryview(stream).nbytes for stream in streams)
    header = _Header(values.itemsize, form, size, values.size, gaps.size, stored)
    return b"".join([header.pack(), *streams])


def _read_header(buffer: np.ndarray) -> _Header:
    """The header, its numbers checked against one another and the payload. Raises DeltaError."""
    if buffer.nbytes < _HEAD.size:
        raise DeltaError(f"the payload has {buffer.nbytes} bytes, a header has {_HEAD.size}")
    magic, version, width, form, size, count, gap_bytes = _HEAD.unpack_from(buffer.data)
    if magic != _MAGIC:
        raise DeltaError(f"the payload starts with {magic!r}, expected {_MAGIC!r}")
    if version != FORMAT:
        raise DeltaError(f"the payload is of format {version}, expected {FORMAT}")
    if width not in ELEMENTS or form not in FORMS:
        raise DeltaError(
            f"the payload has width {width} and form {form}, expected one of {list(ELEMENTS)} and "
            f"of {list(FORMS)}"
        )
    sizes = struct.Struct(f"<{1 + width}Q")
    if buffer.nbytes < _HEAD.size + sizes.size:
        raise DeltaError(f"the payload ends within its header, after {buffer.nbytes} bytes")
    stored = sizes.unpack_from(buffer.data, _HEAD.size)
    header = _Header(width, form, size, count, gap_bytes, stored)
    _check_counts(header)
    if buffer.nbytes != header.nbytes + sum(stored):
        raise DeltaError(
            f"the payload has {buffer.nbytes} bytes, its header promises "
            f"{header.nbytes + sum(stored)}"
        )
    return header


def _check_counts(header: _Header) -> None:
    """Raises DeltaError unless the counts can be those of one tensor."""
    size, count = header.size, header.count
    least = size if header.form == DENSE else 0
    if not least <= count <= size:
        raise DeltaError(f"the payload has {count} values, expected {least} to {size}")
    # A gap has a byte, and one more for each 255 of the elements that it passes over.
    most = 0 if header.form == DENSE else count + (size - count) // _GOES_ON
    if header.gap_bytes > most:
        raise DeltaError(f"the payload has {header.gap_bytes} gap bytes, expected at most {most}")
    for stored, nbytes in zip(header.stored, header.lengths, strict=True):
        if stored > nbytes:
            raise DeltaError(f"a stream of {nbytes} bytes is stored in {stored}, expected no more")


def _streams(buffer: np.ndarray, header: _Header) -> list[np.ndarray]:
    """The streams, uint8 each: views of the payload, or decompressed. Raises DeltaError."""
    streams, start = [], header.nbytes
    for stored, nbytes in zip(header.stored, header.lengths, strict=True):
        streams.append(_expand(buffer[start : start + stored], nbytes))
        start += stored
    return streams


def _squeeze(stream: np.ndarray) -> bytes | memoryview:
    """A stream as it is stored: zstd where that is worth it, otherwise as it is."""
    squeezed = zstandard.ZstdCompressor(level=_LEVEL).compress(stream.data)
    return squeezed if len(squeezed) < _WORTH_IT * stream.size else stream.data


def _expand(stored: np.ndarray, nbytes: int) -> np.ndarray:
    """The `nbytes` bytes of a stream, uint8. Raises DeltaError before it allocates others."""
    if stored.size == nbytes:
        return stored
    try:
        promised = zstandard.frame_content_size(stored.data)
        if promised != nbytes:
            raise DeltaError(f"a stream of {nbytes} bytes claims to expand to {promised}")
        expanded = zstandard.ZstdDecompressor().decompress(stored.data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise DeltaError(f"a stream of {nbytes} bytes is corrupted: {error}") from error
    return np.frombuffer(expanded, np.uint8)  # zstd holds a frame to the size that it claims


def _gaps(changed: Changes) -> np.ndarray:
    """The gap stream, uint8. Raises DeltaError unless the indices ascend within the tensor."""
    gaps = np.diff(changed.indices, prepend=-1)
    gaps -= 1
    if gaps.size and (gaps.min() < 0 or changed.indices[-1] >= changed.size):
        raise DeltaError(f"the indices do not ascend from 0 to less than {changed.size}")
    going_on = gaps // _GOES_ON
    gaps -= _GOES_ON * going_on
    ends = np.cumsum(going_on + 1)
    stream = np.full(ends[-1] if ends.size else 0, _GOES_ON, np.uint8)
    stream[ends - 1] = gaps
    return stream


def _indices(gaps: np.ndarray, header: _Header) -> np.ndarray:
    """The places of the values, int64 [count], ascending. Raises DeltaError."""
    last = gaps != _GOES_ON
    found = np.count_nonzero(last)
    if found != header.count:
        raise DeltaError(f"{found} gaps arrived, expected {header.count} for as many values")
    if gaps.size and not last[-1]:
        raise DeltaError(f"the last gap goes on past {header.count} values, expected its end")
    ends = gaps.astype(np.int64)
    ends += last  # past the element that the gap leads to
    np.cumsum(ends, out=ends)
    if ends.size and ends[-1] > header.size:
        raise DeltaError(f"the last change is at {ends[-1] - 1} of {header.size} elements")
    return ends[last] - 1


def _fold(differences: np.ndarray) -> np.ndarray:
    """0, -1, 1, -2, ... -> 0, 1, 2, 3, ..., of the same unsigned dtype."""
    bits = 8 * differences.itemsize
    return (differences << 1) ^ -(differences >> (bits - 1))


def _unfold(folded: np.ndarray) -> np.ndarray:
    return (folded >> 1) ^ -(folded & 1)


def _join(planes: list[np.ndarray], elements: np.ndarray) -> None:
    """Writes byte planes, lowest first, into contiguous `elements`."""
    flat = elements.view(np.uint8)
    for k, plane in enumerate(planes):
        flat[k :: elements.itemsize] = plane


def _places(flags: np.ndarray) -> np.ndarray:
    """Where `flags`, bool [a multiple of 8], is True, int64; eight at a time where few are."""
    words = flags.view(np.uint64)
    hits = np.flatnonzero(words != 0)
    inside = np.flatnonzero(words[hits].view(np.bool_))
    return (hits[inside >> 3] << 3) + (inside & 7)


def _check_elements(
    what: str, array: np.ndarray, dtype: np.dtype | None = None, size: int | None = None
) -> None:
    """Raises DeltaError unless `array` is contiguous elements, of this dtype and size if given."""
    if array.ndim != 1 or not array.flags.c_contiguous or array.dtype not in ELEMENTS.values():
        raise DeltaError(
            f"{what} is {array.dtype} {list(array.shape)}, expected uint16 or uint32 in one "
            "contiguous dimension"
        )
    if dtype is not None and (array.dtype, array.size) != (dtype, size):
        raise DeltaError(
            f"{what} has {array.size} elements of {array.dtype}, expected {size} of {dtype}"
        )
