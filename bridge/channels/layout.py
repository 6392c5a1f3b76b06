"""How one version lies in files: in a directory of the shuttle, and in an object storage.

One directory a version, `v00000012/`, laid out as a Hugging Face checkpoint that any tool can open:

    model-00001-of-00002.safetensors   one file a bucket
    model.safetensors.index.json       tensor name -> file
    base                               of a version with deltas: the number of the one they are from
    manifest.json                      the wire manifest, with a digest for every tensor

In a version with deltas those tensors are payloads, arrays of bytes (`bridge.delta`).
"""

import json
import re
from collections.abc import Callable, Sequence

import numpy as np

from bridge.channels import ChannelError
from bridge.wire import Manifest, TensorEntry

MANIFEST, BASE = "manifest.json", "base"
VERSION_DIR = re.compile(r"v([0-9]{8,18})")
_ALIGN = 64  # bytes: mapped tensors start on a cache line
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def directory_name(version: int) -> str:
    return f"v{version:08d}"


def file_name(bucket: int, buckets: int) -> str:
    return f"model-{bucket + 1:05d}-of-{buckets:05d}.safetensors"


def head(entries: Sequence[TensorEntry]) -> bytes:
    """What stands before the tensors in the file of one bucket."""
    header = json.dumps(_header(entries), separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % _ALIGN)
    return len(header).to_bytes(8, "little") + header


def documents(manifest: Manifest, exists: Callable[[str], bool]) -> dict[str, bytes]:
    """The files of a version that come after its buckets: name -> content, in the order of writing.

    Raises:
      ChannelError: one was never put.
    """
    count = len(manifest.bucket_bytes)
    names = [file_name(index, count) for index in range(count)]
    if missing := [name for name in names if not exists(name)]:
        raise ChannelError(
            f"weight version {manifest.version} lacks {', '.join(missing)}: they were never put"
        )
    weight_map = {entry.name: names[entry.bucket] for entry in manifest.tensors}
    listing = {"metadata": {"total_size": manifest.nbytes}, "weight_map": weight_map}
    texts = {"model.safetensors.index.json": json.dumps(listing)}
    if manifest.base is not None:
        texts[BASE] = str(manifest.base.version)
    texts[MANIFEST] = manifest.to_json()
    return {name: text.encode() for name, text in texts.items()}


def entries_by_file(manifest: Manifest) -> dict[str, list[TensorEntry]]:
    """Of each bucket: the name of its file, and its entries in order."""
    count = len(manifest.bucket_bytes)
    files: dict[str, list[TensorEntry]] = {file_name(index, count): [] for index in range(count)}
    for entry in manifest.tensors:
        files[file_name(entry.bucket, count)].append(entry)
    return files


def data_section(
    where: str, file: np.ndarray, entries: Sequence[TensorEntry], nbytes: int
) -> np.ndarray:
    """What follows the header in the bytes of one file, uint8: a view.

    Raises:
      ChannelError: it is not a bucket of `entries` with so many bytes; names `where`.
    """
    if file.size < 8:
        raise ChannelError(f"{where} has {file.size} bytes, too few for a header")
    start = 8 + int.from_bytes(file[:8].tobytes(), "little")
    if start + nbytes != file.size:
        raise ChannelError(
            f"{where} has {file.size} bytes; a header of {start} and data of {nbytes} were promised"
        )
    try:
        header = json.loads(file[8:start].tobytes())
    except (ValueError, RecursionError) as error:
        raise ChannelError(f"{where} has a header that is not JSON") from error
    if header != _header(entries):
        raise ChannelError(f"{where} has a header that does not describe the manifest's tensors")
    return file[start:]


def tensors(manifest: Manifest, sections: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Views of each tensor's bytes, in the manifest's order, from the data of each bucket."""
    return [
        sections[entry.bucket][entry.offset : entry.offset + entry.nbytes]
        for entry in manifest.tensors
    ]


def _header(entries: Sequence[TensorEntry]) -> dict[str, dict]:
    """What a safetensors file says of one bucket: offsets count from the end of the header."""
    return {"__metadata__": {"format": "pt"}} | {
        entry.name: {
            "dtype": _DTYPES[entry.dtype] if entry.encoding == "raw" else "U8",
            "shape": list(entry.shape) if entry.encoding == "raw" else [entry.nbytes],
            "data_offsets": [entry.offset, entry.offset + entry.nbytes],
        }
        for entry in entries
    }
