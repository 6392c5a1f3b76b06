"""How one version of the weights travels from the trainer to every engine.

The trainer begins a shipment, puts the buckets of one version into it, in any order and from
several threads, and finishes it with the manifest. The ticket it gets is sent, by whatever means,
to the workers, and a worker calls `fetch` with it. A ticket is small JSON and names exactly one
version: `fetch` returns all of that version or raises. Nothing outside this package asks which
channel it has: a new channel is one file here and one row in `_FETCHERS`.

Both ends load this package: no jax, no torch, and ray only where the object store is used.
"""

import contextlib
import dataclasses
import importlib
import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from bridge.wire import Base, Manifest, TensorEntry, WireError
from jaxrl.types import RunError

# Channel name -> the module whose `fetch(ticket, deadline_s)` reads what that channel publishes,
# `fetch_manifest` only what a version is said to be, and `address_of(address, version)` makes of
# one version's address another's.
_FETCHERS = {
    "object_store": "bridge.channels.object_store",
    "shuttle": "bridge.channels.shuttle",
    "cloud": "bridge.channels.cloud",
}


class ChannelError(RunError):
    """A version that could not be published or fetched. Names the version, and the way out."""


@dataclasses.dataclass(frozen=True, slots=True)
class Ticket:
    """Where one version lies, and the digest that proves it is that version."""

    channel: str
    version: int
    digest: str
    address: str  # meaningful only to the channel that issued it

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> "Ticket":
        """Raises ChannelError unless `text` is what `to_json` writes."""
        try:
            raw = json.loads(text)
            ticket = Ticket(**raw)
        except (TypeError, ValueError, RecursionError) as error:
            raise ChannelError(f"not a weight ticket: {error}") from error
        types = {field.name: field.type for field in dataclasses.fields(Ticket)}
        for name, kind in types.items():
            if type(getattr(ticket, name)) is not kind:
                raise ChannelError(f"not a weight ticket: {name} is not of type {kind}")
        return ticket


def live(bases: Mapping[int, int | None], keep: int, pinned: Collection[int] = ()) -> set[int]:
    """Of versions and what each is based on: the newest `keep`, those pinned, and all that they
    need."""
    needed: set[int] = set()
    for kept in {*sorted(bases)[-keep:], *(bases.keys() & pinned)}:
        version: int | None = kept
        while version is not None and version not in needed:
            needed.add(version)
            version = bases.get(version)
    return needed


class Shipment(Protocol):
    """One version on its way into a channel. No reader sees any of it until it is finished."""

    def put(self, entries: Sequence[TensorEntry], data: Sequence[np.ndarray]) -> None:
        """Stores one whole bucket: its entries in order, and the bytes of each.

        The arrays may change once this has returned. Several threads may call it at a time.

        Raises:
          ChannelError: it could not be stored.
        """
        ...

    def finish(self, manifest: Manifest) -> Ticket:
        """Makes the version readable as a whole; old ones that no other needs may be dropped.

        Raises:
          ChannelError: it is not readable, and never will be.
        """
        ...

    def abort(self) -> None:
        """Drops what was put. Does nothing once the shipment is finished."""
        ...

    def invitation(self) -> str:
        """What another process needs to put buckets into this shipment; see `join`."""
        ...


class Channel(ABC):
    """The sending half of a channel. The receiving half is a module function, `fetch`.

    The newest `keep_versions` versions can be fetched, those that are pinned, and all that any of
    them is based on. What is not among them is dropped when a version is finished, and not before:
    until then an engine may join with the version that the new one is to replace.
    """

    def __init__(self, keep_versions: int):
        if keep_versions < 1:
            raise ValueError(f"keep_versions = {keep_versions}: the newest version must be kept")
        self._keep = keep_versions
        self._pinned: set[int] = set()
        self._begun: set[int] = set()
        self._publishing = threading.Lock()

    def pin(self, version: int) -> None:
        """Keeps `version`, if it is there or will be, however many come after it."""
        self._pinned.add(version)

    @abstractmethod
    def begin(self, version: int, buckets: int, nbytes: int) -> Shipment:
        """Begins a version of so many buckets and bytes, under a number never used before.

        Raises:
          ChannelError: there is no room for it, or the number was used; nothing has changed.
        """

    @abstractmethod
    def close(self) -> None:
        """Releases what only this process holds. Tickets may stop working."""

    def check(self, new_run: bool) -> None:
        """Finds out ahead of the first version whether a run, a new one or one that is resumed, can
        put its versions here.

        Raises:
          ChannelError: it cannot.
        """
        return None

    def refresh(self) -> None:
        """Makes versions readable again that should be, and are not any more, if it can.

        Raises:
          ChannelError: it could not.
        """
        return None

    def _check_number(self, version: int, there: Collection[int], where: str) -> None:
        """Raises ChannelError unless `version` can join those that are `there` already: it is a new
        one, and none of another run, which would be kept in its place, has a higher number."""
        if version in there:
            raise ChannelError(
                f"weight version {version} exists at {where}, and a version is never rewritten; "
                "publish a higher number"
            )
        if later := [other for other in there if other > version and other not in self._begun]:
            raise ChannelError(
                f"weight version {version} cannot be published: {_of_another_run(where, later)}"
            )
        self._begun.add(version)

    def _check_place(self, new_run: bool, there: Collection[int], where: str) -> None:
        """See `check`; `there`: the versions."""
        if new_run and there:
            raise ChannelError(_of_another_run(where, there))

    def publish(self, manifest: Manifest, buckets: Sequence[Sequence[np.ndarray]]) -> Ticket:
        """Stores a version that is all in memory; see `wire.pack`. Of several threads one at a
        time.

        Raises:
          ChannelError: nothing was stored, and versions published before are as they were
            or were dropped because they were the oldest.
        """
        with self._publishing:
            shipment = self.begin(manifest.version, len(buckets), manifest.nbytes)
            try:
                for index, data in enumerate(buckets):
                    shipment.put([e for e in manifest.tensors if e.bucket == index], data)
                return shipment.finish(manifest)
            finally:
                shipment.abort()


def _of_another_run(where: str, versions: Collection[int]) -> str:
    return (
        f"{where} holds version {max(versions)} of another run; give each run a "
        "publish.shuttle_dir of its own, or empty that one if its run is over"
    )


def fetch(ticket: Ticket, deadline_s: float) -> tuple[Manifest, list[np.ndarray]]:
    """Returns the version that `ticket` names: its manifest, and what lies in the buckets for each
    tensor, in the manifest's order, uint8, read-only and not copied if possible.

    The manifest is proven to be the ticket's; the bytes are not checked against it: the receiver
    does that once, on what it hands to its model.

    Raises:
      ChannelError: the version is not there within `deadline_s`, or is not the ticket's.
    """
    with _plain_errors(ticket):
        manifest, data = _receiving(ticket).fetch(ticket, deadline_s)
    return _proven(ticket, manifest), data


def fetch_manifest(ticket: Ticket, deadline_s: float) -> Manifest:
    """The manifest alone; see `fetch`."""
    with _plain_errors(ticket):
        manifest = _receiving(ticket).fetch_manifest(ticket, deadline_s)
    return _proven(ticket, manifest)


@contextlib.contextmanager
def _plain_errors(ticket: Ticket) -> Iterator[None]:
    try:
        yield
    except (WireError, UnicodeDecodeError) as error:
        raise ChannelError(f"weight version {ticket.version}: {error}") from error


def _proven(ticket: Ticket, manifest: Manifest) -> Manifest:
    """Raises ChannelError unless it is the ticket's."""
    if (manifest.version, manifest.digest) != (ticket.version, ticket.digest):
        raise ChannelError(
            f"weight version {ticket.version}, digest {ticket.digest[:16]}…, was announced, and "
            f"{ticket.channel} holds version {manifest.version}, digest {manifest.digest[:16]}…"
        )
    return manifest


def join(invitation: str) -> Shipment:
    """The shipment that another process began: to put buckets into, not to finish or abort.

    Raises:
      ChannelError: it cannot be reached from here.
    """
    raw = json.loads(invitation)
    return importlib.import_module(_FETCHERS[raw["channel"]]).join(raw)


def earlier(ticket: Ticket, base: Base) -> Ticket:
    """The ticket of the version that the ticket's one is based on."""
    address = _receiving(ticket).address_of(ticket.address, base.version)
    return Ticket(ticket.channel, base.version, base.digest, address)


def _receiving(ticket: Ticket) -> Any:
    if ticket.channel not in _FETCHERS:
        raise ChannelError(
            f"weight version {ticket.version}: its ticket is for channel {ticket.channel!r}, and "
            f"this worker knows {sorted(_FETCHERS)}; install the trainer's release here too"
        )
    return importlib.import_module(_FETCHERS[ticket.channel])
