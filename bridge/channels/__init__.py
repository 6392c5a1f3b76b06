"""How one version of the weights travels from the trainer to every engine.

The trainer calls `publish` and sends the ticket, by whatever means, to the workers; a worker calls
`fetch` with it. A ticket is small JSON and names exactly one version: `fetch` returns all of that
version or raises. Nothing outside this package asks which channel it has: a new channel is one file
here and one row in `_FETCHERS`.

Both ends load this package: no jax, no torch, and ray only where the object store is used.
"""

import dataclasses
import importlib
import json
from typing import Protocol

import numpy as np

from bridge.wire import Manifest, WireError
from jaxrl.types import RunError

# Channel name -> the module whose `fetch(ticket, deadline_s)` reads what that channel publishes.
_FETCHERS = {
    "object_store": "bridge.channels.object_store",
    "shuttle": "bridge.channels.shuttle",
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
        except (TypeError, ValueError) as error:
            raise ChannelError(f"not a weight ticket: {error}") from error
        types = {field.name: field.type for field in dataclasses.fields(Ticket)}
        for name, kind in types.items():
            if type(getattr(ticket, name)) is not kind:
                raise ChannelError(f"not a weight ticket: {name} is not of type {kind}")
        return ticket


class Channel(Protocol):
    """The sending half of a channel. The receiving half is a module function, `fetch`."""

    def publish(self, manifest: Manifest, buckets: list[np.ndarray]) -> Ticket:
        """Stores one version under a number never used before; old versions may be dropped.

        Raises:
          ChannelError: nothing was stored, and versions published before are as they were
            or were dropped because they were the oldest.
        """
        ...

    def close(self) -> None:
        """Releases what only this process holds. Tickets may stop working."""
        ...


def fetch(ticket: Ticket, deadline_s: float) -> tuple[Manifest, list[np.ndarray]]:
    """Returns the version that `ticket` names, as read-only uint8 buckets, not copied if possible.

    The manifest is proven to be the ticket's; the bytes in the buckets are not checked against it:
    the receiver does that once, on what it hands to its model.

    Raises:
      ChannelError: the version is not there within `deadline_s`, or is not the ticket's.
    """
    if ticket.channel not in _FETCHERS:
        raise ChannelError(
            f"weight version {ticket.version}: its ticket is for channel {ticket.channel!r}, and "
            f"this worker knows {sorted(_FETCHERS)}; install the trainer's release here too"
        )
    channel = importlib.import_module(_FETCHERS[ticket.channel])
    try:
        manifest, buckets = channel.fetch(ticket, deadline_s)
    except WireError as error:
        raise ChannelError(f"weight version {ticket.version}: {error}") from error
    if (manifest.version, manifest.digest) != (ticket.version, ticket.digest):
        raise ChannelError(
            f"weight version {ticket.version}, digest {ticket.digest[:16]}…, was announced, and "
            f"{ticket.channel} holds version {manifest.version}, digest {manifest.digest[:16]}…"
        )
    return manifest, buckets
