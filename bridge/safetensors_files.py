"""The safetensors files of one model directory: found, checked, read and written. No jax, no torch.

A file is 8 bytes n (little endian), n bytes of JSON, and the tensors' bytes, row-major, end to end:

    {"__metadata__": {str: str}, NAME: {"dtype": "BF16", "shape": [..], "data_offsets": [a, b]}, ..}

The checks are our own: the library's messages name neither file nor tensor, and it has no word for
a damaged tensor. Our files carry the SHA-256 of each tensor in `__metadata__` (a JSON object under
"sha256"): it cannot be parted from the bytes it vouches for, a directory rewritten by another tool
loses it instead of keeping a stale one, and transformers and vLLM pass over keys they do not know.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from bridge.wire import ITEM_BYTES, HostTensor, sha256

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# Of what is checked for its size, and then refused by name.
_OTHER_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4}
_OTHER_BITS |= {"F6_E2M3": 6, "F6_E3M2": 6, "I16": 16, "U16": 16, "I32": 32, "U32": 32}
_OTHER_BITS |= {"F64": 64, "I64": 64, "U64": 64, "C64": 64}
_BITS = {tag: 8 * ITEM_BYTES[dtype] for tag, dtype in DTYPES.items()} | _OTHER_BITS
_MAX_JSON = 100_000_000  # bytes; the format's own bound
_ALIGN = 64  # bytes: mapped tensors start on a cache line
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_READ = 1 << 20  # bytes that are digested at a time: they stay in the processor's cache


class DamageError(Exception):
    """A file that is not what it says it is; the message does not repeat its name."""


@dataclasses.dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file whose header has been checked."""

    name: str
    file: Path
    dtype: str  # "float32", "bfloat16", "float16", or the tag of a dtype that is not loaded
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    nbytes: int
    sha256: str | None  # hex; None where its writer left no digest

    @property
    def where(self) -> str:
        return f"{self.file.name}: {self.name}"


@dataclasses.dataclass(slots=True)
class Scan:
    """What a directory holds, from its headers alone."""

    tensors: dict[str, StoredTensor]
    named: set[str]  # the tensors above, and those that only the index names
    complete: bool  # False: the names are not all known, so nothing can be said to be missing
    problems: list[str]
    largest_file: int  # bytes


def scan(directory: Path) -> Scan:
    """Checks the index and every header of `directory`; reads no weights, raises nothing."""
    found = Scan({}, set(), True, [], 0)
    try:
        index = _read_index(directory)
    except DamageError as problem:
        found.problems, found.complete = [str(problem)], False
        return found
    files = [SINGLE] if index is None else sorted(set(index.values()))
    found.named |= set(index or ())
    broken = set()
    for file in files:
        try:
            tensors = read_header(directory / file)
        except DamageError as problem:
            found.problems.append(f"{file}: damaged: {problem}")
            found.complete = index is not None
            broken.add(file)
            continue
        found.largest_file = max(found.largest_file, (directory / file).stat().st_size)
        for name, tensor in tensors.items():
            if name in found.tensors:
                other = found.tensors[name].file.name
                found.problems.append(f"{file}: {name}: damaged: is also in {other}")
            elif index is not None and index.get(name) != file:
                found.problems.append(f"{file}: {name}: damaged: {INDEX} does not place it here")
            found.tensors[name] = tensor
        found.named |= tensors.keys()
        listed = {name for name, place in (index or {}).items() if place == file}
        for name in sorted(listed - tensors.keys()):
            found.problems.append(f"{file}: {name}: damaged: {INDEX} places it here, it is not")
    return found


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of one file by name, in the order of the bytes.

    Raises:
      DamageError: the header is malformed, or does not describe every byte of the file once.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
            raise DamageError("is not a regular file")
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_JSON):
                raise DamageError(f"a header of {length} bytes does not fit in its {size} bytes")
            header = _object(stream.read(length))
    except OSError as error:
        raise DamageError(error.strerror or str(error)) from None
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise DamageError("__metadata__ is not an object of strings")
    digests = _digests(metadata, header)
    start = 8 + length
    tensors = [_stored(path, name, entry, start, digests) for name, entry in header.items()]
    for tensor in tensors:
        if tensor.offset + tensor.nbytes > size:
            raise DamageError(f"{tensor.name}: ends behind the last of {size} bytes")
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    end = start
    for tensor in tensors:
        if tensor.offset != end:
            raise DamageError(f"{tensor.name}: does not follow the tensor before it")
        end += tensor.nbytes
    if end != size:
        raise DamageError(f"has {size} bytes, its header describes {end}")
    return {tensor.name: tensor for tensor in tensors}


def read_into(tensor: StoredTensor, start: int, memory: np.ndarray) -> None:
    """Fills `memory`, uint8 [n], with the tensor's bytes from its `start`-th on.

    Read, not mapped: a file that shrinks or a bad sector is an error here, and would be a signal
    that ends the process there.

    Raises:
      DamageError: the bytes cannot be read; names file and tensor.
    """
    try:
        with tensor.file.open("rb", buffering=0) as stream:
            stream.seek(tensor.offset + start)
            done = 0
            while done < memory.nbytes:
                count = stream.readinto(memory[done:].data)
                if not count:
                    raise DamageError(f"{tensor.where}: damaged: the file ends within it")
                done += count
    except OSError as error:
        raise DamageError(f"{tensor.where}: damaged: {error.strerror or error}") from None


def check_digest(tensor: StoredTensor) -> None:
    """Reads a tensor that has a digest, `_READ` bytes at a time.

    Raises:
      DamageError: its bytes are not those that were once written; names file and tensor.
    """
    digest, memory = hashlib.sha256(), np.empty(_READ, np.uint8)
    for start in range(0, tensor.nbytes, _READ):
        part = memory[: tensor.nbytes - start]
        read_into(tensor, start, part)
        digest.update(part.data)
    if (found := digest.hexdigest()) != tensor.sha256:
        raise DamageError(
            f"{tensor.where}: damaged: has SHA-256 {found[:16]}…, was written with "
            f"{str(tensor.sha256)[:16]}…; copy or export the model again"
        )


def write_file(path: Path, tensors: Sequence[HostTensor]) -> None:
    """Writes `tensors` and their digests to the new file `path`, mode 0644, flushed to the disk."""
    # Widest first, so that each starts at a multiple of its element.
    tensors = sorted(tensors, key=lambda tensor: -ITEM_BYTES[tensor.dtype])
    with path.open("xb") as stream, ThreadPoolExecutor(1) as pool:
        # The digests are taken while the bytes are written; the header has the same length before.
        digests = [(tensor.name, pool.submit(sha256, tensor.data)) for tensor in tensors]
        stream.write(_header(tensors, {tensor.name: "0" * 64 for tensor in tensors}))
        for tensor in tensors:
            stream.write(np.ascontiguousarray(tensor.data).data)
        stream.seek(0)
        stream.write(_header(tensors, {name: digest.result() for name, digest in digests}))
        stream.flush()
        os.fchmod(stream.fileno(), 0o644)
        os.fsync(stream.fileno())


def shards(tensors: Iterator[HostTensor], most: int) -> Iterator[list[HostTensor]]:
    """`tensors` in order, in lists of at most `most` bytes; a larger one is alone in its list."""
    shard: list[HostTensor] = []
    size = 0
    for tensor in tensors:
        if shard and size + tensor.data.nbytes > most:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += tensor.data.nbytes
    if shard:
        yield shard


def _header(tensors: Sequence[HostTensor], digests: dict[str, str]) -> bytes:
    tags = {dtype: tag for tag, dtype in DTYPES.items()}
    # transformers refuses a file whose "format" it does not know.
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "sha256": json.dumps(digests)}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.data.nbytes
        header[tensor.name] = {
            "dtype": tags[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGN)
    return len(text).to_bytes(8, "little") + text


def _read_index(directory: Path) -> dict[str, str] | None:
    """Tensor name -> name of a file in `directory`; None where a single file is the whole."""
    path = directory / INDEX
    single = (directory / SINGLE).exists()
    if not os.path.lexists(path):
        if single or os.path.lexists(directory / SINGLE):
            return None
        raise DamageError(_no_weights(directory))
    try:
        index = _object(path.read_bytes()).get("weight_map")
    except OSError as error:
        raise DamageError(f"{INDEX}: damaged: {error.strerror or error}") from None
    except DamageError as problem:
        raise DamageError(f"{INDEX}: damaged: {problem}") from None
    if not isinstance(index, dict) or not index:
        raise DamageError(f"{INDEX}: damaged: has no weight_map of tensor names to file names")
    for name, file in index.items():
        # A link may lead elsewhere, as those of the hub's cache do; a name may not.
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\\0\ud800-\udfff]+", file):
            raise DamageError(f"{INDEX}: {name}: damaged: {file!r} is not the name of a file here")
    if single and SINGLE not in index.values():
        raise DamageError(
            f"{SINGLE} and {INDEX} are two checkpoints in one directory, and programs differ in "
            "which they open; remove one"
        )
    return index


def _no_weights(directory: Path) -> str:
    pickles = sorted(file.name for pattern in _PICKLES for file in directory.glob(pattern))
    there = f"there is no {SINGLE} and no {INDEX}"
    if pickles:
        return (
            f"{there}; {pickles[0]} is a pickle, which is never opened here; convert it to "
            "safetensors (save_pretrained of transformers does)"
        )
    return there


def _object(text: bytes) -> dict[str, Any]:
    """Raises DamageError unless `text` is one JSON object, and no object in it repeats a key."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
            raise DamageError(f"{twice!r} is there twice")
        return found

    try:
        found = json.loads(text.decode(), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise DamageError(f"not JSON ({error})") from None
    if not isinstance(found, dict):
        raise DamageError("not a JSON object")
    return found


def _digests(metadata: dict[str, str], header: dict[str, Any]) -> dict[str, str]:
    if "sha256" not in metadata:
        return {}
    digests = _object(metadata["sha256"].encode("utf-8", "surrogatepass"))
    if digests.keys() != header.keys() or not all(isinstance(v, str) for v in digests.values()):
        raise DamageError("the digests in __metadata__ are not those of its tensors")
    return digests


def _stored(path: Path, name: str, entry: Any, start: int, digests: dict[str, str]) -> StoredTensor:
    """One entry of a header whose data begin at byte `start`."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise DamageError(f"{name}: its entry is not dtype, shape and data_offsets")
    tag, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(tag, str) or not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise DamageError(f"{name}: dtype {tag!r}, shape {shape}, data_offsets {offsets}")
    nbytes = offsets[1] - offsets[0]
    if nbytes < 0 or (tag in _BITS and 8 * nbytes != math.prod(shape) * _BITS[tag]):
        raise DamageError(f"{name}: {nbytes} bytes cannot hold {tag} {tuple(shape)}")
    dtype = DTYPES.get(tag, tag)
    return StoredTensor(
        name, path, dtype, tuple(shape), start + offsets[0], nbytes, digests.get(name)
    )


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)
