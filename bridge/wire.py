"""What crosses the bridge: raw bytes in a few buckets, and a JSON manifest that describes them.

Both ends load this file, in different environments: NumPy and the standard library only. Nothing
here is ever a pickle. A tensor is a name, a dtype, a shape, a place in a bucket and the SHA-256 of
its bytes; a version's digest covers all of those, so that equal digests mean equal weights.

Inside a bucket tensors lie end to end, widest dtype first: every tensor is aligned to its own
element, and a bucket is byte for byte the data section of a safetensors file.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MAX_TENSORS = 1_000_000
MAX_DIMENSIONS = 8
MAX_BYTES = 1 << 44  # of one version; more is a lie, or a bug, and would be allocated
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")


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
class TensorEntry:
    name: str
    dtype: str
    shape: tuple[int, ...]
    bucket: int
    offset: int  # bytes from the start of the bucket
    nbytes: int
    sha256: str


@dataclasses.dataclass(frozen=True, slots=True)
class Manifest:
    version: int
    tensors: tuple[TensorEntry, ...]
    bucket_bytes: tuple[int, ...]
    digest: str

    @property
    def nbytes(self) -> int:
        return sum(self.bucket_bytes)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

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
            )
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise WireError(f"not a weight manifest: {error!r}") from error
        manifest.check()
        return manifest

    def check(self) -> None:
        """Raises WireError unless the entries tile the buckets and agree with the digest."""
        if self.nbytes > MAX_BYTES:
            raise WireError(f"version {self.version}: promises more than {MAX_BYTES} bytes")
        ends = [0] * len(self.bucket_bytes)
        names = set()
        for entry in self.tensors:
            where = f"version {self.version}, tensor {entry.name!r}"
            if not _NAME.fullmatch(entry.name) or entry.name in names:
                raise WireError(f"{where}: the name is malformed or listed twice")
            names.add(entry.name)
            if entry.dtype not in ITEM_BYTES:
                raise WireError(f"{where}: dtype {entry.dtype!r} is not one of {list(ITEM_BYTES)}")
            if len(entry.shape) > MAX_DIMENSIONS:
                raise WireError(f"{where}: has more than {MAX_DIMENSIONS} dimensions")
            if entry.nbytes != math.prod(entry.shape) * ITEM_BYTES[entry.dtype]:
                raise WireError(
                    f"{where}: {entry.nbytes} bytes cannot hold {entry.dtype} {entry.shape}"
                )
            if not 0 <= entry.bucket < len(ends) or entry.offset != ends[entry.bucket]:
                raise WireError(f"{where}: does not follow the tensor before it in its bucket")
            if entry.offset % ITEM_BYTES[entry.dtype]:
                raise WireError(f"{where}: offset {entry.offset} is not aligned to {entry.dtype}")
            ends[entry.bucket] += entry.nbytes
        if tuple(ends) != self.bucket_bytes:
            raise WireError(
                f"version {self.version}: the tensors fill {ends} bytes of buckets that are said "
                f"to have {list(self.bucket_bytes)}"
            )
        if self.digest != version_digest(self.tensors):
            raise WireError(f"version {self.version}: the digest is not that of the entries")


def version_digest(tensors: Iterable[TensorEntry]) -> str:
    """SHA-256 over (name, dtype, shape, content digest), sorted by name: layout does not count."""
    lines = sorted(
        f"{t.name} {t.dtype} {','.join(map(str, t.shape))} {t.sha256}\n" for t in tensors
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def pack(
    version: int, tensors: Iterable[HostTensor], bucket_bytes: int
) -> tuple[Manifest, list[np.ndarray]]:
    """Copies `tensors` into buckets of at most `bucket_bytes` (a larger tensor gets its own).

    Returns the manifest and the buckets, uint8 arrays that share no memory with the input.
    """
    ordered = sorted(tensors, key=lambda t: -ITEM_BYTES[t.dtype])  # stable: widest first
    sizes: list[int] = []
    entries = []
    for tensor in ordered:
        nbytes = tensor.data.nbytes
        if not sizes or (sizes[-1] and sizes[-1] + nbytes > bucket_bytes):
            sizes.append(0)
        entries.append(
            TensorEntry(
                tensor.name,
                tensor.dtype,
                tuple(tensor.shape),
                len(sizes) - 1,
                sizes[-1],
                nbytes,
                sha256(tensor.data),
            )
        )
        sizes[-1] += nbytes
    buckets = [np.empty(size, np.uint8) for size in sizes]
    for entry, tensor in zip(entries, ordered, strict=True):
        buckets[entry.bucket][entry.offset : entry.offset + entry.nbytes] = tensor.data
    manifest = Manifest(version, tuple(entries), tuple(sizes), version_digest(entries))
    manifest.check()
    return manifest, buckets


def tensor_bytes(entry: TensorEntry, buckets: Sequence[np.ndarray]) -> np.ndarray:
    """The bytes of one tensor, uint8 [nbytes], a view."""
    return buckets[entry.bucket][entry.offset : entry.offset + entry.nbytes]


def verify(manifest: Manifest, buckets: Sequence[np.ndarray]) -> None:
    """Raises WireError unless `buckets` hold exactly the bytes that `manifest` promises."""
    sizes = tuple(bucket.nbytes for bucket in buckets)
    if sizes != manifest.bucket_bytes:
        raise WireError(
            f"version {manifest.version}: buckets of {list(sizes)} bytes arrived, the manifest "
            f"promises {list(manifest.bucket_bytes)}"
        )
    for entry in manifest.tensors:
        found = sha256(tensor_bytes(entry, buckets))
        if found != entry.sha256:
            raise WireError(
                f"version {manifest.version}, tensor {entry.name!r}: SHA-256 {found[:16]}… "
                f"arrived, the manifest promises {entry.sha256[:16]}…"
            )


def sha256(data: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(data).data).hexdigest()


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is not a non-negative integer")
    return value


def _entry(item: dict[str, Any]) -> TensorEntry:
    if not _SHA256.fullmatch(item["sha256"]):
        raise ValueError(f"{item['sha256']!r} is not a SHA-256")
    return TensorEntry(
        name=str(item["name"]),
        dtype=str(item["dtype"]),
        shape=tuple(_count(size) for size in item["shape"]),
        bucket=_count(item["bucket"]),
        offset=_count(item["offset"]),
        nbytes=_count(item["nbytes"]),
        sha256=item["sha256"],
    )
