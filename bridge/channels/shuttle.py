"""Weights through a directory that the trainer writes and every worker reads.

A version is laid out as `bridge.channels.layout` says. Everything is written under a temporary
name, fsynced, and renamed last: a directory under its final name is complete and is never written
again. A directory belongs to one run, which has one publisher; many may read.
"""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from bridge.channels import Channel, ChannelError, Ticket, layout, live
from bridge.channels.layout import BASE, MANIFEST, VERSION_DIR, directory_name, file_name
from bridge.wire import Manifest, TensorEntry
from jaxrl.durable import sync_directory, try_directory

NAME = "shuttle"
_TEMPORARY = ".partial-"  # a name that no reader takes for a version
_POLL_S = 0.05

T = TypeVar("T")


class ShuttleChannel(Channel):
    """Writes versions under `root`, and removes old ones there.

    A directory belongs to one run, whose versions only grow, also when it is resumed: the newest
    are kept, by number.

    On a network filesystem a removed file disappears under a reader that has it mapped: keep at
    least the version being served and the one being staged.
    """

    def __init__(self, root: Path, keep_versions: int = 2):
        super().__init__(keep_versions)
        self._root = full_path(Path(root))

    def begin(self, version: int, buckets: int, nbytes: int) -> "ShuttleShipment":
        """See `Channel.begin`."""
        final = self._root / directory_name(version)
        shipment = ShuttleShipment(final, buckets, nbytes, self._keep, self._pinned)
        with shipment.plain_errors():
            self._root.mkdir(parents=True, exist_ok=True)
            self._clear_temporaries()
            self._check_number(version, set(_versions(self._root)), str(self._root))
            shipment.partial.mkdir()
        return shipment

    def check(self, new_run: bool) -> None:
        """See `Channel.check`."""
        try:
            try_directory(self._root)
            there = _versions(self._root)
        except OSError as error:
            raise ChannelError(
                f"weights cannot be published at {self._root}: {error.strerror or error}"
            ) from error
        self._check_place(new_run, there, str(self._root))

    def close(self) -> None:
        """Nothing is held; published versions stay."""

    def _clear_temporaries(self) -> None:
        """Removes what a publisher that was killed left behind; what cannot be removed stays."""
        for leftover in self._root.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(leftover, ignore_errors=True)


class ShuttleShipment:
    """See `bridge.channels.Shipment`. A bucket is a file; the manifest comes last."""

    def __init__(
        self, final: Path, buckets: int, nbytes: int, keep: int, pinned: Collection[int] = ()
    ):
        self._final, self._buckets, self._nbytes = final, buckets, nbytes
        self._keep, self._pinned = keep, pinned
        self.partial = final.with_name(f"{_TEMPORARY}{final.name}")
        self._done = False

    def put(self, entries: Sequence[TensorEntry], data: Sequence[np.ndarray]) -> None:
        """Returns once every byte is on the disk."""
        path = self.partial / file_name(entries[0].bucket, self._buckets)
        with self.plain_errors():
            _write(path, layout.head(entries), *(array.data for array in data))

    def finish(self, manifest: Manifest) -> Ticket:
        with self.plain_errors():
            documents = layout.documents(manifest, lambda name: (self.partial / name).exists())
            for name, content in documents.items():
                _write(self.partial / name, content)
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
        versions = _versions(self._final.parent)
        bases = {version: _base(path) for version, path in versions.items()}
        for version in versions.keys() - live(bases, self._keep, self._pinned):
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


def full_path(path: Path) -> Path:
    """As a ticket names it: from the root on and without "..", which is followed here."""
    return path.resolve() if ".." in path.parts else path.absolute()


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
    return _read(ticket, deadline_s, _read_version)


def fetch_manifest(ticket: Ticket, deadline_s: float) -> Manifest:
    """See `bridge.channels.fetch_manifest`."""
    return _read(ticket, deadline_s, _read_manifest)


def _read(ticket: Ticket, deadline_s: float, read: Callable[[Path], T]) -> T:
    """What `read` finds in the version's directory, once it is there."""
    directory = _version_directory(ticket)
    end = time.monotonic() + deadline_s
    while True:
        try:
            return read(directory)
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
    return str(Path(address).with_name(directory_name(version)))


def _versions(root: Path) -> dict[int, Path]:
    return {
        int(match[1]): path
        for path in root.iterdir()
        if (match := VERSION_DIR.fullmatch(path.name))
    }


def _base(directory: Path) -> int | None:
    try:
        return int((directory / BASE).read_text())
    except (OSError, ValueError):
        return None


def _version_directory(ticket: Ticket) -> Path:
    path = Path(ticket.address)
    if not path.is_absolute() or ".." in path.parts or path.name != directory_name(ticket.version):
        raise ChannelError(
            f"weight version {ticket.version}: its ticket names {ticket.address!r}, which is not "
            f"an absolute path that ends in {directory_name(ticket.version)}"
        )
    return path


def _read_manifest(directory: Path) -> Manifest:
    return Manifest.from_json((directory / MANIFEST).read_text())


def _read_version(directory: Path) -> tuple[Manifest, list[np.ndarray]]:
    manifest = _read_manifest(directory)
    files = layout.entries_by_file(manifest)
    sections = []
    for (name, entries), nbytes in zip(files.items(), manifest.bucket_bytes, strict=True):
        path = directory / name
        where = f"weight version {manifest.version}: {path}"
        sections.append(layout.data_section(where, _mapped(path), entries, nbytes))
    return manifest, layout.tensors(manifest, sections)


def _mapped(path: Path) -> np.ndarray:
    if path.stat().st_size == 0:  # which cannot be mapped
        return np.empty(0, np.uint8)
    return np.asarray(np.memmap(path, np.uint8, mode="r"))


def _write(path: Path, *parts: bytes | memoryview) -> None:
    with path.open("xb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
