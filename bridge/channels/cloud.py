"""Weights through an object storage: the shuttle under a URL, s3://bucket/run or gs://bucket/run.

A version is laid out as `bridge.channels.layout` says. There is no rename here, but an object
appears whole or not at all: so the manifest is written last and removed first, and a version exists
while its manifest does. A URL has one publisher, whose processes may all put buckets; many may
read.

Through fsspec, which takes every protocol's credentials and endpoint from the environment of each
machine: a ticket and an invitation hold the URL and no secret. The clients retry a request and give
up a silent connection by themselves; a fetch goes on where they end, until its deadline.
"""

import contextlib
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from bridge.channels import Channel, ChannelError, Ticket, layout, live
from bridge.channels.layout import BASE, MANIFEST, VERSION_DIR, directory_name, file_name
from bridge.channels.shuttle import ShuttleChannel
from bridge.wire import Manifest, TensorEntry

NAME = "cloud"
_BEGUN = "begun"  # an object of a version on its way: other processes of the publisher look for it
_PROBE = "probe"  # an object that is written and removed before the first version
_URL = re.compile(r"[a-z][a-z0-9+.-]*://[^?#*\[\]]+")
_THREADS = 8  # requests of a fetch at a time
_RANGE = 16 << 20  # bytes of a request
_POLL_S = 0.5
_PAUSES_S = (0.2, 5.0)  # before a request is tried again: the first time, and at most

T = TypeVar("T")


def open_shuttle(where: str, keep_versions: int) -> Channel:
    """The shuttle at a path, or, of a URL, the one in that object storage."""
    if "://" in where:
        return CloudChannel(where, keep_versions)
    return ShuttleChannel(Path(where), keep_versions)


class CloudChannel(Channel):
    """Writes versions under the URL `root`, which belongs to one run, and removes old ones there;
    see `ShuttleChannel`."""

    def __init__(self, root: str, keep_versions: int = 2):
        super().__init__(keep_versions)
        self._root = root.rstrip("/")

    def begin(self, version: int, buckets: int, nbytes: int) -> "CloudShipment":
        """See `Channel.begin`. Removes what a publisher that was killed left behind."""
        url = f"{self._root}/{directory_name(version)}"
        shipment = CloudShipment(url, version, buckets, self._keep, self._pinned)
        shipment.begin(lambda there: self._check_number(version, there, self._root))
        return shipment

    def check(self, new_run: bool) -> None:
        """See `Channel.check`."""
        files, root = _open(self._root, "weights")
        with _plain_errors(f"weights cannot be published at {self._root}"):
            files.pipe_file(f"{root}/{_PROBE}", b"")
            files.rm_file(f"{root}/{_PROBE}")
            there = _whole(_versions(files, root))
        self._check_place(new_run, there, self._root)

    def close(self) -> None:
        """Nothing is held; published versions stay."""


class CloudShipment:
    """See `bridge.channels.Shipment`. A bucket is an object; the manifest comes last."""

    def __init__(
        self, url: str, version: int, buckets: int, keep: int = 1, pinned: Collection[int] = ()
    ):
        self._url, self._version, self._buckets = url, version, buckets
        self._keep, self._pinned = keep, pinned
        self._files, self._directory = _open(url, f"weight version {version}")
        self._done = False

    def begin(self, check: Callable[[Collection[int]], None]) -> None:
        """`check`: of the versions that are there."""
        root = self._directory.rpartition("/")[0]
        with self._plain_errors():
            versions = _versions(self._files, root)
            whole = _whole(versions)
            check(whole)
            for version in versions.keys() - whole.keys():
                _remove(self._files, f"{root}/{directory_name(version)}")
            self._write(_BEGUN, os.uname().nodename.encode())

    def join(self) -> None:
        with self._plain_errors():
            if not self._files.exists(f"{self._directory}/{_BEGUN}"):
                raise ChannelError(
                    f"weight version {self._version}: {os.uname().nodename} does not see "
                    f"{self._url}/{_BEGUN}, which another process of the trainer has made; all of "
                    "them need the same endpoint and credentials for publish.shuttle_dir"
                )

    def put(self, entries: Sequence[TensorEntry], data: Sequence[np.ndarray]) -> None:
        """Returns once the storage has it all; takes the memory of one bucket meanwhile."""
        name = file_name(entries[0].bucket, self._buckets)
        with self._plain_errors():
            self._write(name, b"".join((layout.head(entries), *(array.data for array in data))))

    def finish(self, manifest: Manifest) -> Ticket:
        with self._plain_errors():
            there = _names(self._files, self._directory)
            for name, content in layout.documents(manifest, there.__contains__).items():
                self._write(name, content)
        self._done = True
        with contextlib.suppress(Exception):  # what stays is removed after the next version
            self._files.rm_file(f"{self._directory}/{_BEGUN}")
            self._drop_old()
        return Ticket(NAME, manifest.version, manifest.digest, self._url)

    def invitation(self) -> str:
        about = {"url": self._url, "version": self._version, "buckets": self._buckets}
        return json.dumps({"channel": NAME} | about)

    def abort(self) -> None:
        if not self._done:
            self._done = True
            with contextlib.suppress(Exception):
                _remove(self._files, self._directory)

    def _write(self, name: str, content: bytes) -> None:
        self._files.pipe_file(f"{self._directory}/{name}", content)  # in parts, if it is large

    def _drop_old(self) -> None:
        root = self._directory.rpartition("/")[0]
        whole = _whole(_versions(self._files, root))
        directories = {version: f"{root}/{directory_name(version)}" for version in whole}
        bases = {
            version: int(self._files.cat_file(f"{directories[version]}/{BASE}"))
            if BASE in names
            else None
            for version, names in whole.items()
        }
        for version in bases.keys() - live(bases, self._keep, self._pinned):
            with contextlib.suppress(Exception):
                _remove(self._files, directories[version])

    def _plain_errors(self) -> AbstractContextManager[None]:
        return _plain_errors(
            f"weight version {self._version} could not be written to {self._url}, and no reader "
            "can see it"
        )


@contextlib.contextmanager
def _plain_errors(failed: str) -> Iterator[None]:
    try:
        yield
    except ChannelError:
        raise
    except Exception as error:  # each client has errors of its own
        raise ChannelError(
            f"{failed}: {error!r}; is there such a bucket, and may this machine list, read, write "
            "and delete in it?"
        ) from error


def join(invitation: dict[str, Any]) -> CloudShipment:
    """See `bridge.channels.join`."""
    shipment = CloudShipment(*(invitation[field] for field in ("url", "version", "buckets")))
    shipment.join()
    return shipment


def fetch(ticket: Ticket, deadline_s: float) -> tuple[Manifest, list[np.ndarray]]:
    """See `bridge.channels.fetch`. The arrays are memory of this process, one block a bucket."""
    with _Reader(ticket, deadline_s) as reader:
        return reader.read()


def fetch_manifest(ticket: Ticket, deadline_s: float) -> Manifest:
    """See `bridge.channels.fetch_manifest`."""
    with _Reader(ticket, deadline_s) as reader:
        return reader.manifest()


def _check_address(ticket: Ticket) -> None:
    root, _, name = ticket.address.rpartition("/")
    if (
        not _URL.fullmatch(root)
        or ".." in root.split("/")
        or name != directory_name(ticket.version)
    ):
        raise ChannelError(
            f"weight version {ticket.version}: its ticket names {ticket.address!r}, which is not "
            f"a URL that ends in {directory_name(ticket.version)}"
        )


def address_of(address: str, version: int) -> str:
    """Versions lie beside each other."""
    return f"{address.rpartition('/')[0]}/{directory_name(version)}"


class _Reader:
    """One fetch: ranges of objects read by a few threads, each tried again until the deadline."""

    def __init__(self, ticket: Ticket, deadline_s: float):
        _check_address(ticket)
        self._where = f"weight version {ticket.version}: {ticket.address}"
        self._files, self._directory = _open(ticket.address, f"weight version {ticket.version}")
        self._deadline_s, self._end = deadline_s, time.monotonic() + deadline_s
        self._trouble: Exception | None = None  # the last that a request had
        self._left = threading.Event()

    def __enter__(self) -> "_Reader":
        self._pool = ThreadPoolExecutor(_THREADS, "fetch")
        return self

    def __exit__(self, *_: object) -> None:
        """Waits for nobody: a request that hangs ends when its client gives it up."""
        self._left.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def manifest(self) -> Manifest:
        (text,) = self._together([self._manifest])
        return Manifest.from_json(text.decode())

    def read(self) -> tuple[Manifest, list[np.ndarray]]:
        manifest = self.manifest()
        (sizes,) = self._together([lambda: self._tried(self._sizes)])
        files, sections, ranges = layout.entries_by_file(manifest), [], []
        for (name, entries), nbytes in zip(files.items(), manifest.bucket_bytes, strict=True):
            size = len(layout.head(entries)) + nbytes
            if name not in sizes:
                raise ChannelError(
                    f"{self._where}/{name} is gone: the version was dropped because newer ones "
                    "were published; raise publish.keep_versions, or stage sooner"
                )
            if sizes[name] != size:
                raise ChannelError(f"{self._where}/{name} has {sizes[name]} bytes, not {size}")
            file = np.empty(size, np.uint8)
            ranges += [(name, file[at : at + _RANGE], at) for at in range(0, size, _RANGE)]
            sections.append(file)
        self._together([lambda part=part: self._fill(*part) for part in ranges])
        for index, (name, entries) in enumerate(files.items()):
            where, nbytes = f"{self._where}/{name}", manifest.bucket_bytes[index]
            sections[index].flags.writeable = False
            sections[index] = layout.data_section(where, sections[index], entries, nbytes)
        return manifest, layout.tensors(manifest, sections)

    def _together(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """What each returns, or the first error of any."""
        futures = [self._pool.submit(call) for call in calls]
        done, waiting = wait(futures, max(0.0, self._end - time.monotonic()), FIRST_EXCEPTION)
        for future in done:
            future.result()
        if waiting:
            raise self._late()
        return [future.result() for future in futures]

    def _manifest(self) -> bytes:
        """Waits for it: some storages show a new object late."""
        while True:
            try:
                return self._tried(lambda: self._files.cat_file(f"{self._directory}/{MANIFEST}"))
            except FileNotFoundError as error:
                self._pause(_POLL_S, error)

    def _sizes(self) -> dict[str, int]:
        return _names(self._files, self._directory)

    def _fill(self, name: str, target: np.ndarray, start: int) -> None:
        """Reads `target` from byte `start` of an object; what has arrived stays."""
        path, have = f"{self._directory}/{name}", 0
        while have < target.size:
            first, end = start + have, start + target.size
            try:
                data = self._tried(
                    lambda a=first, b=end: self._files.cat_file(path, start=a, end=b)
                )
            except FileNotFoundError as error:
                raise ChannelError(f"{self._where}/{name} was dropped while it was read") from error
            if not 0 < len(data) <= end - first:
                raise ChannelError(
                    f"{self._where}/{name} gave {len(data)} bytes for those from {first} to {end}"
                )
            target[have : have + len(data)] = np.frombuffer(data, np.uint8)
            have += len(data)

    def _tried(self, request: Callable[[], T]) -> T:
        """Tries `request` until the deadline, unless what it asks for is not there."""
        pause, longest = _PAUSES_S
        while True:
            try:
                return request()
            except FileNotFoundError:
                raise
            except PermissionError as error:
                raise ChannelError(
                    f"{self._where}: this machine's credentials may not list and read there: "
                    f"{error}"
                ) from error
            except Exception as error:  # each client has errors of its own
                self._pause(pause, error)
                pause = min(2 * pause, longest)

    def _pause(self, seconds: float, trouble: Exception) -> None:
        self._trouble = trouble
        if time.monotonic() + seconds >= self._end or self._left.wait(seconds):
            raise self._late() from trouble

    def _late(self) -> ChannelError:
        cause = "" if self._trouble is None else f"; the last trouble was {self._trouble!r}"
        return ChannelError(
            f"{self._where} was not there, or not read, within {self._deadline_s:.3g} s{cause}; "
            "this host does not see that URL, the version was dropped because newer ones were "
            "published, or publish.timeout_s is too short for its bytes"
        )


def _open(url: str, what: str) -> tuple[Any, str]:
    """The filesystem of a URL, and the path in it. Reaches for no network.

    Raises:
      ChannelError: a package is missing here, no package knows such URLs, or it is a pattern; says
        `what` is concerned.
    """
    if not _URL.fullmatch(url):
        raise ChannelError(
            f"{what}: {url} cannot be used: a URL here is PROTOCOL://BUCKET/RUN and holds none of "
            "?, #, *, [ and ], which storages take for patterns or options"
        )
    for client in ("gcsfs", "s3fs"):  # what they had to try again is said where it is given up
        logging.getLogger(client).setLevel(logging.CRITICAL)
    try:
        import fsspec

        # Listings are not cached: other processes write here too.
        return fsspec.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        raise ChannelError(
            f"{what}: {os.uname().nodename} cannot open {url}: {error}; install the extra of that "
            "storage, jaxrl-bridge[s3] or jaxrl-bridge[gcs], on every machine"
        ) from error
    except ValueError as error:
        raise ChannelError(
            f"{what}: {os.uname().nodename} cannot open {url}: {error}; s3://BUCKET/RUN, "
            "gs://BUCKET/RUN and URLs that another package of fsspec knows can be"
        ) from error


def _names(files: Any, directory: str) -> dict[str, int]:
    """What lies in a directory, and its sizes in bytes."""
    try:
        listed = files.ls(directory, detail=True)
    except FileNotFoundError:
        return {}
    return {item["name"].rstrip("/").rpartition("/")[2]: item["size"] for item in listed}


def _versions(files: Any, root: str) -> dict[int, dict[str, int]]:
    """The versions under `root`, whole or not, and the names and sizes of what lies in each."""
    return {
        int(match[1]): _names(files, f"{root}/{name}")
        for name in _names(files, root)
        if (match := VERSION_DIR.fullmatch(name))
    }


def _whole(versions: dict[int, dict[str, int]]) -> dict[int, dict[str, int]]:
    return {version: names for version, names in versions.items() if MANIFEST in names}


def _remove(files: Any, directory: str) -> None:
    """The manifest first, so that nobody begins to read half a version."""
    with contextlib.suppress(FileNotFoundError):
        files.rm_file(f"{directory}/{MANIFEST}")
    files.rm(directory, recursive=True)  # it would take a name for a pattern; see `_URL`
