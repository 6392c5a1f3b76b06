"""Weights through a directory that the trainer writes and every worker reads.

One directory a version, `v00000012/`, laid out as a Hugging Face checkpoint that any tool can open:

    model-00001-of-00002.safetensors   one file a bucket
    model.safetensors.index.json       tensor name -> file
    manifest.json                      the wire manifest, with a digest for every tensor

Everything is written under a temporary name, fsynced, and renamed last: a directory under its final
name is complete and is never written again. A directory has one publisher; many may read.
"""

import contextlib
import json
import os
import re
import shutil
import time
from pathlib import Path

import numpy as np

from bridge.channels import ChannelError, Ticket
from bridge.wire import Manifest
from jaxrl.durable import sync_directory

NAME = "shuttle"
_VERSION_DIR = re.compile(r"v([0-9]{8,18})")
_TEMPORARY = ".partial-"  # a name that no reader takes for a version
_POLL_S = 0.05
_ALIGN = 64  # bytes: mapped tensors start on a cache line
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


class ShuttleChannel:
    """Writes versions under `root`, and removes all but the newest `keep_versions`.

    On a network filesystem a removed file disappears under a reader that has it mapped: keep at
    least the version being served and the one being staged.
    """

    def __init__(self, root: Path, keep_versions: int = 2):
        if keep_versions < 1:
            raise ValueError(f"keep_versions = {keep_versions}: the newest version must be kept")
        self._root = Path(root).absolute()
        self._keep = keep_versions

    def publish(self, manifest: Manifest, buckets: list[np.ndarray]) -> Ticket:
        """See `Channel.publish`. Returns once every byte is on the disk."""
        name = _directory_name(manifest.version)
        final, partial = self._root / name, self._root / f"{_TEMPORARY}{name}"
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            self._clear_temporaries()
            if final.exists():
                raise ChannelError(
                    f"weight version {manifest.version} exists at {final}, and a version is never "
                    "rewritten; publish a higher number"
                )
            partial.mkdir()
            _write_version(partial, manifest, buckets)
            sync_directory(partial)
            partial.rename(final)
            sync_directory(self._root)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise ChannelError(self._explain(manifest, error)) from error
        self._drop_old()
        return Ticket(NAME, manifest.version, manifest.digest, str(final))

    def close(self) -> None:
        """Nothing is held; published versions stay."""

    def _clear_temporaries(self) -> None:
        """Removes what a publisher that was killed left behind."""
        for leftover in self._root.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(leftover)

    def _drop_old(self) -> None:
        versions = sorted(
            (int(match[1]), path)
            for path in self._root.iterdir()
            if (match := _VERSION_DIR.fullmatch(path.name))
        )
        for _, old in versions[: -self._keep]:
            # Renamed first, so that no reader meets half a version. What cannot be removed now is
            # removed at the next publish, and does not spoil this one.
            with contextlib.suppress(OSError):
                hidden = old.with_name(f"{_TEMPORARY}{old.name}")
                old.rename(hidden)
                shutil.rmtree(hidden)

    def _explain(self, manifest: Manifest, error: OSError) -> str:
        free = "unknown"
        with contextlib.suppress(OSError):
            free = str(shutil.disk_usage(self._root).free)
        return (
            f"weight version {manifest.version} could not be written to {self._root}: "
            f"{error.strerror or error}; it has {manifest.nbytes} bytes, {free} are free, and "
            f"{self._keep + 1} versions must fit; no reader can see it"
        )


def fetch(ticket: Ticket, deadline_s: float) -> tuple[Manifest, list[np.ndarray]]:
    """See `bridge.channels.fetch`. The buckets are mapped files, read when they are touched.

    Waits for files that are not there yet: a shared filesystem may show them late.
    """
    directory = _version_directory(ticket)
    end = time.monotonic() + deadline_s
    while True:
        try:
            return _read_version(directory)
        except FileNotFoundError as error:
            if time.monotonic() >= end:
                raise ChannelError(
                    f"weight version {ticket.version}: {error.filename} was not there within "
                    f"{deadline_s:g} s; this host does not see that directory, or the version was "
                    "dropped because newer ones were published"
                ) from error
            time.sleep(_POLL_S)
        except OSError as error:
            raise ChannelError(f"weight version {ticket.version}: {error}") from error


def _version_directory(ticket: Ticket) -> Path:
    path = Path(ticket.address)
    if not path.is_absolute() or ".." in path.parts or path.name != _directory_name(ticket.version):
        raise ChannelError(
            f"weight version {ticket.version}: its ticket names {ticket.address!r}, which is not "
            f"an absolute path that ends in {_directory_name(ticket.version)}"
        )
    return path


def _directory_name(version: int) -> str:
    return f"v{version:08d}"


def _file_name(bucket: int, buckets: int) -> str:
    return f"model-{bucket + 1:05d}-of-{buckets:05d}.safetensors"


def _write_version(directory: Path, manifest: Manifest, buckets: list[np.ndarray]) -> None:
    count = len(manifest.bucket_bytes)
    for index, bucket in enumerate(buckets):
        header = _padded(json.dumps(_header(manifest, index), separators=(",", ":")).encode())
        prefix = len(header).to_bytes(8, "little")
        _write(directory / _file_name(index, count), prefix, header, bucket.data)
    weight_map = {entry.name: _file_name(entry.bucket, count) for entry in manifest.tensors}
    listing = {"metadata": {"total_size": manifest.nbytes}, "weight_map": weight_map}
    _write(directory / "model.safetensors.index.json", json.dumps(listing).encode())
    _write(directory / "manifest.json", manifest.to_json().encode())


def _read_version(directory: Path) -> tuple[Manifest, list[np.ndarray]]:
    manifest = Manifest.from_json((directory / "manifest.json").read_text())
    count = len(manifest.bucket_bytes)
    files = [directory / _file_name(index, count) for index in range(count)]
    return manifest, [_map_bucket(path, manifest, index) for index, path in enumerate(files)]


def _map_bucket(path: Path, manifest: Manifest, index: int) -> np.ndarray:
    """The data section of one file, checked against the manifest in all but its bytes."""
    where = f"weight version {manifest.version}: {path}"
    size = path.stat().st_size
    if size < 8:
        raise ChannelError(f"{where} has {size} bytes, too few for a header")
    mapped = np.asarray(np.memmap(path, np.uint8, mode="r"))
    start = 8 + int.from_bytes(mapped[:8].tobytes(), "little")
    if start + manifest.bucket_bytes[index] != size:
        raise ChannelError(
            f"{where} has {size} bytes; a header of {start} and data of "
            f"{manifest.bucket_bytes[index]} were promised"
        )
    try:
        header = json.loads(mapped[8:start].tobytes())
    except ValueError as error:
        raise ChannelError(f"{where} has a header that is not JSON") from error
    if header != _header(manifest, index):
        raise ChannelError(f"{where} has a header that does not describe the manifest's tensors")
    return mapped[start:]


def _header(manifest: Manifest, index: int) -> dict[str, dict]:
    """What a safetensors file says of one bucket: offsets count from the end of the header."""
    return {"__metadata__": {"format": "pt"}} | {
        entry.name: {
            "dtype": _DTYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [entry.offset, entry.offset + entry.nbytes],
        }
        for entry in manifest.tensors
        if entry.bucket == index
    }


def _padded(header: bytes) -> bytes:
    return header + b" " * (-(8 + len(header)) % _ALIGN)


def _write(path: Path, *parts: bytes | memoryview) -> None:
    with path.open("xb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
