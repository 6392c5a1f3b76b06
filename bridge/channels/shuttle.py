"""Weights through a directory that the trainer writes and every worker reads.

One directory a version, `v00000012/`, laid out as a Hugging Face checkpoint that any tool can open:

    model-00001-of-00002.safetensors   one file a bucket
    model.safetensors.index.json       tensor name -> file
    manifest.json                      the wire manifest, with a digest for every tensor
    base                               of a version with deltas: the number of the one they are from

In a version with deltas those tensors are payloads, arrays of bytes (`bridge.delta`).
Everything is written under a temporary name, fsynced, and renamed last: a directory under its final
name is complete and is never written again. A directory has one publisher; many may read.
"""

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bridge.channels import Channel, ChannelError, Ticket, live
from bridge.wire import Manifest, TensorEntry
from jaxrl.durable import sync_directory

NAME = "shuttle"
_VERSION_DIR = re.compile(r"v([0-9]{8,18})")
_BASE = "base"  # the version that this one's deltas are taken from, if there are any
_TEMPORARY = ".partial-"  # a name that no reader takes for a version
_POLL_S = 0.05
_ALIGN = 64  # bytes: mapped tensors start on a cache line
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


class ShuttleChannel(Channel):
    """Writes versions under `root`; removes all but the newest `keep_versions` and their bases.

    On a network filesystem a removed file disappears under a reader that has it mapped: keep at
    least the version being served and the one being staged.
    """

    def __init__(self, root: Path, keep_versions: int = 2):
        if keep_versions < 1:
            raise ValueError(f"keep_versions = {keep_versions}: the newest version must be kept")
        self._root = Path(root).absolute()
        self._keep = keep_versions

    def begin(self, version: int, buckets: int, nbytes: int) -> "ShuttleShipment":
        """See `Channel.begin`."""
        final = self._root / _directory_name(version)
        shipment = ShuttleShipment(final, buckets, nbytes, self._keep)
        with shipment.plain_errors():
            self._root.mkdir(parents=True, exist_ok=True)
            self._clear_temporaries()
            if final.exists():
                raise ChannelError(
                    f"weight version {version} exists at {final}, and a version is never "
                    "rewritten; publish a higher number"
                )
            shipment.partial.mkdir()
        return shipment

    def close(self) -> None:
        """Nothing is held; published versions stay."""

    def _clear_temporaries(self) -> None:
        """Removes what a publisher that was killed left behind."""
        for leftover in self._root.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(leftover)


class ShuttleShipment:
    """See `bridge.channels.Shipment`. A bucket is a file; the manifest comes last."""

    def __init__(self, final: Path, buckets: int, nbytes: int, keep: int):
        self._final, self._buckets, self._nbytes, self._keep = final, buckets, nbytes, keep
        self.partial = final.with_name(f"{_TEMPORARY}{final.name}")
        self._done = False

    def put(self, entries: Sequence[TensorEntry], data: Sequence[np.ndarray]) -> None:
        """Returns once every byte is on the disk."""
        header = _padded(json.dumps(_header(entries), separators=(",", ":")).encode())
        prefix = len(header).to_bytes(8, "little")
        path = self.partial / _file_name(entries[0].bucket, self._buckets)
        with self.plain_errors():
            _write(path, prefix, header, *(array.data for array in data))

    def finish(self, manifest: Manifest) -> Ticket:
        names = {i: _file_name(i, self._buckets) for i in range(self._buckets)}
        if missing := [name for name in names.values() if not (self.partial / name).exists()]:
            raise ChannelError(
                f"weight version {manifest.version} lacks {', '.join(missing)}: they were never put"
            )
        weight_map = {entry.name: names[entry.bucket] for entry in manifest.tensors}
        listing = {"metadata": {"total_size": manifest.nbytes}, "weight_map": weight_map}
        with self.plain_errors():
            _write(self.partial / "model.safetensors.index.json", json.dumps(listing).encode())
            if manifest.base is not None:
                _write(self.partial / _BASE, str(manifest.base.version).encode())
            _write(self.partial / "manifest.json", manifest.to_json().encode())
            sync_directory(self.partial)
            self.partial.rename(self._final)
            self._done = True
            sync_directory(self._final.parent)
        self._drop_old()
        return Ticket(NAME, manifest.version, manifest.digest, str(self._final))

    def invitation(self) -> str:
        about = {"final": str(self._final), "buckets": self._buckets, "nbytes": self._nbytes}
        return json.dumps({"channel": NAME, "keep": self._keep} | about)

    def abort(self) -> None:
        if not self._done:
            self._done = True
            shutil.rmtree(self.partial, ignore_errors=True)

    @contextlib.contextmanager
    def plain_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ChannelError(self._explain(error)) from error

    def _drop_old(self) -> None:
        versions = {
            int(match[1]): path
            for path in self._final.parent.iterdir()
            if (match := _VERSION_DIR.fullmatch(path.name))
        }
        bases = {version: _base(path) for version, path in versions.items()}
        for version in versions.keys() - live(bases, self._keep):
            old = versions[version]
            # Renamed first, so that no reader meets half a version. What cannot be removed now is
            # removed at the next publish, and does not spoil this one.
            with contextlib.suppress(OSError):
                hidden = old.with_name(f"{_TEMPORARY}{old.name}")
                old.rename(hidden)
                shutil.rmtree(hidden)

    def _explain(self, error: OSError) -> str:
        free, root = "unknown", self._final.parent
        with contextlib.suppress(OSError):
            free = str(shutil.disk_usage(root).free)
        return (
            f"weight version {int(self._final.name[1:])} could not be written to {root}: "
            f"{error.strerror or error}; it has {self._nbytes} bytes, {free} are free, and "
            f"{self._keep + 1} versions must fit; no reader can see it"
        )


def join(invitation: dict[str, Any]) -> ShuttleShipment:
    """See `bridge.channels.join`."""
    final = Path(invitation["final"])
    shipment = ShuttleShipment(
        final, invitation["buckets"], invitation["nbytes"], invitation["keep"]
    )
    if not shipment.partial.is_dir():
        raise ChannelError(
            f"weight version {int(final.name[1:])}: {os.uname().nodename} does not see "
            f"{shipment.partial}, which another process of the trainer has made; "
            "publish.shuttle_dir must be a directory that all of them share"
        )
    return shipment


def fetch(ticket: Ticket, deadline_s: float) -> tuple[Manifest, list[np.ndarray]]:
    """See `bridge.channels.fetch`. The arrays lie in mapped files, read when they are touched.

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
                    f"{deadline_s:.3g} s; this host does not see that directory, or the version "
                    "was dropped because newer ones were published"
                ) from error
            time.sleep(_POLL_S)
        except OSError as error:
            raise ChannelError(f"weight version {ticket.version}: {error}") from error


def address_of(address: str, version: int) -> str:
    """Versions lie beside each other."""
    return str(Path(address).with_name(_directory_name(version)))


def _base(directory: Path) -> int | None:
    try:
        return int((directory / _BASE).read_text())
    except (OSError, ValueError):
        return None


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


def _read_version(directory: Path) -> tuple[Manifest, list[np.ndarray]]:
    manifest = Manifest.from_json((directory / "manifest.json").read_text())
    count = len(manifest.bucket_bytes)
    inside: list[list[TensorEntry]] = [[] for _ in range(count)]
    for entry in manifest.tensors:
        inside[entry.bucket].append(entry)
    mapped = [
        _map_bucket(directory / _file_name(index, count), manifest, index, entries)
        for index, entries in enumerate(inside)
    ]
    return manifest, [
        mapped[entry.bucket][entry.offset : entry.offset + entry.nbytes]
        for entry in manifest.tensors
    ]


def _map_bucket(
    path: Path, manifest: Manifest, index: int, entries: Sequence[TensorEntry]
) -> np.ndarray:
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
    if header != _header(entries):
        raise ChannelError(f"{where} has a header that does not describe the manifest's tensors")
    return mapped[start:]


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


def _padded(header: bytes) -> bytes:
    return header + b" " * (-(8 + len(header)) % _ALIGN)


def _write(path: Path, *parts: bytes | memoryview) -> None:
    with path.open("xb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
