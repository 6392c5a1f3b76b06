"""What crosses the bridge: raw bytes in a few buckets, and a JSON manifest that describes them.

Both ends load this file, in different environments: NumPy, xxhash and the standard library only.
Nothing here is ever a pickle. A tensor is a name, a dtype, a shape, a place in a bucket and the
XXH3-128 of its bytes; a version's digest, the SHA-256 of all of those, says that equal digests mean
equal weights. XXH3 finds what accidents do to bytes, at ten times the speed of SHA-256, and no
forger: what outlives a run is kept under SHA-256 (`bridge.safetensors_files`, `jaxrl.durable`).

Inside a bucket tensors lie end to end, widest dtype first: every tensor is aligned to its own
element, and a bucket is byte for byte the data section of a safetensors file. In memory a bucket is
the list of its tensors' bytes, so that nothing is copied to make one.

A tensor may also travel as its difference from the one in an earlier version, the base
(`bridge.delta`). What its entry says of it is then said of the result, all but place and size; so
the digest of a version does not depend on how it travelled, nor on what the next may be.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import xxhash

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MAX_TENSORS = 1_000_000
MAX_DIMENSIONS = 8
MAX_BYTES = 1 << 44  # of one version; more is a lie, or a bug, and would be allocated
NOTHING: Mapping[str, Any] = {}
_HASHING = 4  # threads
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_XXH3 = re.compile(r"[0-9a-f]{32}")


class WireError(Exception):
    """A manifest or a buffer that is not what it says it is. Names the version and the tensor."""


@dataclasses.dataclass(frozen=True, slots=True)
class HostTensor:
    """A tensor on its way out: `data` is its row-major bytes, uint8 [nbytes], not copied."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray


@dataclasses.dataclass(frozen=True, slots=True)
class HostChanges:
    """What changed in a tensor since the last version, of a tensor on its way out: `values`, the
    bits, uint16 or uint32 [changed], at the row-major `indices`, int64 [changed], ascending."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    indices: np.ndarray
    values: np.ndarray


Outgoing = Iterable[HostTensor | HostChanges]  # a bucket on its way out


@dataclasses.dataclass(frozen=True, slots=True)
class TensorEntry:
    name: str
    dtype: str
    shape: tuple[int, ...]
    bucket: int
    offset: int  # bytes from the start of the bucket
    nbytes: int  # in the bucket
    xxh3: str  # of the tensor
    encoding: str = "raw"  # raw: its bytes; delta: a payload for its bytes in the base

    @property
    def size(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclasses.dataclass(frozen=True, slots=True)
class Base:
    """The version that deltas are taken from."""

    version: int
    digest: str


@dataclasses.dataclass(frozen=True, slots=True)
class Manifest:
    version: int
    tensors: tuple[TensorEntry, ...]
    bucket_bytes: tuple[int, ...]
    digest: str
    base: Base | None = None  # None: nothing else is needed to have this version
    keep: bool = False  # the next version may be a difference from this one

    @property
    def nbytes(self) -> int:
        """That travel."""
        return sum(self.bucket_bytes)

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.size for entry in self.tensors)

    def to_json(self) -> str:
        return json.dumps(self, default=_fields, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> "Manifest":
        """Parses and checks a manifest from outside.

        Raises:
          WireError: it is malformed, names one tensor twice, leaves or shares bytes of a bucket,
            or its digest is not that of its entries.
        """
        try:
            raw = json.loads(text)
            if len(raw["tensors"]) > MAX_TENSORS:
                raise WireError(f"the manifest lists more than {MAX_TENSORS} tensors")
            tensors = tuple(_entry(item) for item in raw["tensors"])
            manifest = Manifest(
                version=_count(raw["version"]),
                tensors=tensors,
                bucket_bytes=tuple(_count(size) for size in raw["bucket_bytes"]),
                digest=str(raw["digest"]),
                base=_base(raw["base"]),
                keep=_flag(raw["keep"]),
            )
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise WireError(f"not a weight manifest: {error!r}") from error
        manifest.check()
        return manifest

    def check(self) -> None:
        """Raises WireError unless the entries tile the buckets and agree with the digest."""
        if self.nbytes > MAX_BYTES:
            raise WireError(f"version {self.version}: promises more than {MAX_BYTES} bytes")
        if self.base is not None and self.base.version >= self.version:
            raise WireError(f"version {self.version}: cannot be based on {self.base.version}")
        ends = [0] * len(self.bucket_bytes)
        names, last = set(), -1
        for entry in self.tensors:
            where = f"version {self.version}, tensor {entry.name!r}"
            if not _NAME.fullmatch(entry.name) or entry.name in names:
                raise WireError(f"{where}: the name is malformed or listed twice")
            names.add(entry.name)
            if entry.dtype not in ITEM_BYTES:
                raise WireError(f"{where}: dtype {entry.dtype!r} is not one of {list(ITEM_BYTES)}")
            if len(entry.shape) > MAX_DIMENSIONS:
                raise WireError(f"{where}: has more than {MAX_DIMENSIONS} dimensions")
            raw = entry.encoding == "raw"
            if not raw and (entry.encoding != "delta" or self.base is None):
                raise WireError(f"{where}: is {entry.encoding!r}, with {self.base} as its base")
            fits = entry.nbytes == entry.size if raw else entry.nbytes < entry.size
            if not fits:
                raise WireError(
                    f"{where}: {entry.nbytes} bytes cannot hold {entry.dtype} {entry.shape} "
                    f"{entry.encoding}"
                )
            next_place = max(last, 0) <= entry.bucket <= last + 1 and entry.bucket < len(ends)
            if not next_place or entry.offset != ends[entry.bucket]:
                raise WireError(f"{where}: does not follow the tensor before it")
            last = entry.bucket
            if raw and entry.offset % ITEM_BYTES[entry.dtype]:
                raise WireError(f"{where}: offset {entry.offset} is not aligned to {entry.dtype}")
            ends[entry.bucket] += entry.nbytes
        if tuple(ends) != self.bucket_bytes:
            raise WireError(
                f"version {self.version}: the tensors fill {ends} bytes of buckets that are said "
                f"to have {list(self.bucket_bytes)}"
            )
        if self.size > MAX_BYTES:  # which a receiver makes room for, however little arrives
            raise WireError(f"version {self.version}: promises more than {MAX_BYTES} bytes")
        if self.digest != version_digest(self.tensors):
            raise WireError(f"version {self.version}: the digest is not that of the entries")


def version_digest(tensors: Iterable[TensorEntry]) -> str:
    """SHA-256 over (name, dtype, shape, XXH3 of the bytes), sorted by name: layout does not
    count."""
    return digest_of_lines((t.name, t.dtype, t.shape, t.xxh3) for t in tensors)


def digest_of_lines(tensors: Iterable[tuple[str, str, Sequence[int], str]]) -> str:
    """SHA-256 over a line for each (name, dtype, shape, digest of the bytes), sorted by name."""
    lines = sorted(
        f"{name} {dtype} {','.join(map(str, shape))} {digest}\n"
        for name, dtype, shape, digest in tensors
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def buckets(tensors: Iterable[HostTensor], most: int) -> Iterator[list[HostTensor]]:
    """Cuts a stream of tensors into buckets of at most `most` bytes; a larger tensor is alone."""
    bucket: list[HostTensor] = []
    for tensor in tensors:
        if bucket and sum(t.data.nbytes for t in bucket) + tensor.data.nbytes > most:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def entries(
    index: int, bucket: Iterable[HostTensor], payloads: Mapping[str, np.ndarray] = NOTHING
) -> tuple[list[TensorEntry], list[np.ndarray]]:
    """Lays out and hashes the tensors of bucket `index`; returns them and their bytes, in order.

    Args:
      payloads: by name, for the tensors that travel as differences; uint8.
    """
    found, data, offset = [], [], 0
    # Widest first, and payloads, whose sizes are odd, last; otherwise as they came.
    for t in sorted(bucket, key=lambda t: (t.name in payloads, -ITEM_BYTES[t.dtype])):
        encoding = "delta" if t.name in payloads else "raw"
        data.append(payloads.get(t.name, t.data))
        nbytes = data[-1].nbytes
        about = (t.name, t.dtype, tuple(t.shape), index, offset, nbytes, xxh3(t.data), encoding)
        found.append(TensorEntry(*about))
        offset += nbytes
    return found, data


def manifest_of(
    version: int, entries: Iterable[TensorEntry], base: Base | None = None, *, keep: bool = False
) -> Manifest:
    """Of the entries of all buckets; `keep`: the next version may be a difference from this one.

    Raises:
      WireError: they do not fill buckets 0, 1, 2, ... without a gap, or name a tensor twice.
    """
    ordered = tuple(sorted(entries, key=lambda t: (t.bucket, t.offset)))
    sizes = [0] * (ordered[-1].bucket + 1 if ordered else 0)
    for entry in ordered:
        sizes[entry.bucket] += entry.nbytes
    manifest = Manifest(version, ordered, tuple(sizes), version_digest(ordered), base, keep)
    manifest.check()
    return manifest


def pack(
    version: int, tensors: Iterable[HostTensor], bucket_bytes: int
) -> tuple[Manifest, list[list[np.ndarray]]]:
    """The manifest and the buckets of tensors that are all in memory; nothing is copied."""
    packed = [entries(i, bucket) for i, bucket in enumerate(buckets(tensors, bucket_bytes))]
    manifest = manifest_of(version, itertools.chain.from_iterable(found for found, _ in packed))
    return manifest, [data for _, data in packed]


def verify(manifest: Manifest, data: Sequence[np.ndarray]) -> str:
    """Returns the digest of a version, of whose tensors, in the manifest's order, `data` has the
    bytes, uint8: no payloads.

    Raises:
      WireError: they are not what the manifest promises.
    """
    if len(data) != len(manifest.tensors):
        raise WireError(
            f"version {manifest.version}: {len(data)} tensors arrived, the manifest promises "
            f"{len(manifest.tensors)}"
        )
    for entry, found, digest in zip(manifest.tensors, data, xxh3_of_each(data), strict=True):
        where = f"version {manifest.version}, tensor {entry.name!r}"
        if found.nbytes != entry.size:
            raise WireError(f"{where}: {found.nbytes} bytes arrived, promised are {entry.size}")
        if digest != entry.xxh3:
            raise WireError(
                f"{where}: XXH3 {digest[:16]}… arrived, the manifest promises {entry.xxh3[:16]}…"
            )
    return manifest.digest


def xxh3(data: np.ndarray) -> str:
    """XXH3-128 of an array's bytes, 32 hex digits. Releases the interpreter's lock."""
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(data).data)


def xxh3_of_each(arrays: Iterable[np.ndarray]) -> list[str]:
    """`xxh3` of each, several at a time."""
    with ThreadPoolExecutor(_HASHING) as threads:
        return list(threads.map(xxh3, arrays))


def sha256(data: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(data).data).hexdigest()


def _fields(item: Any) -> dict[str, Any]:
    return {field.name: getattr(item, field.name) for field in dataclasses.fields(item)}


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is not a non-negative integer")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is neither true nor false")
    return value


def _base(item: dict[str, Any] | None) -> Base | None:
    return None if item is None else Base(_count(item["version"]), str(item["digest"]))


def _entry(item: dict[str, Any]) -> TensorEntry:
    if not _XXH3.fullmatch(item["xxh3"]):
        raise ValueError(f"{item['xxh3']!r} is not an XXH3-128")
    return TensorEntry(
        name=str(item["name"]),
        dtype=str(item["dtype"]),
        shape=tuple(_count(size) for size in item["shape"]),
        bucket=_count(item["bucket"]),
        offset=_count(item["offset"]),
        nbytes=_count(item["nbytes"]),
        xxh3=item["xxh3"],
        encoding=str(item["encoding"]),
    )
