"""The receiving end of a channel: every version whole and proven, however it travelled.

NumPy only; what makes tensors of the bytes is `bridge.torch_view`.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from bridge import channels, delta, wire
from bridge.channels import ChannelError, Ticket
from bridge.node_copy import Copy, Layout, NodeCopy, layout_of
from bridge.wire import Base, Manifest

Prove = Callable[[Manifest, Sequence[np.ndarray]], str]
Fetched = tuple[Manifest, list[np.ndarray]]

# The share of its deadline that a receiver waits for the node's copy: while another writes it, or
# still reads the version before. With what is left it makes a copy of its own.
PATIENCE = 0.5

_ELEMENTS = {name: delta.ELEMENTS[width] for name, width in wire.ITEM_BYTES.items()}
_LOG = logging.getLogger(__name__)


class Received(NamedTuple):
    """A version: the bytes of each tensor in the manifest's order, uint8, each proven. They are
    shared with others, or the channel's, and must not be written."""

    manifest: Manifest
    data: list[np.ndarray]
    digest: str  # what the proof found
    nbytes: int  # that came for it, of all versions in the chain


class Receiver:
    """Receives one version after the other.

    A version that is and has no base of a difference is the channel's own memory. Any other is made
    in a copy that all receivers of this node share (`bridge.node_copy`): the first to come brings
    it up to date, each proves what it reads. Where the copy cannot be had in time, or there is no
    room for one, a receiver makes do with a copy of its own.

    A version that is a delta on one that is not here, or not right here, is had by way of the ones
    it is based on, from the last that needs no other; the channel keeps them.
    """

    def __init__(self, prove: Prove = wire.verify, *, shared: bool = True) -> None:
        """
        Args:
          prove: raises WireError unless the bytes of each tensor are what the manifest promises,
            and returns their digest.
          shared: False for who must not keep the engines of this node from their copy.
        """
        self._prove, self._shared = prove, shared
        self._node: NodeCopy | None = None
        self._own: Copy | None = None
        self._reading: Copy | None = None  # where the version received last lies; None: the channel
        self._last: tuple[Ticket, Received] | None = None

    def receive(self, ticket: Ticket, deadline_s: float) -> Received:
        """The arrays stay as they are until `release` or the next call.

        Raises:
          ChannelError, wire.WireError, delta.DeltaError: naming the version, and the tensors; the
            next call starts afresh.
        """
        end = time.monotonic() + deadline_s
        self.release()
        self._reading = self._last = None
        try:
            received = self._received(channels.fetch(ticket, deadline_s), ticket, end)
        except BaseException:
            self.release()
            self._own = None
            raise
        # What is the channel's is the caller's to hold, and gone when he lets go.
        self._last = ticket, received if self._reading else received._replace(data=[])
        return received

    def release(self) -> None:
        """What was received is not read any more: others may bring the copy up to date."""
        if self._reading is not None:
            self._reading.unlock()

    def reread(self, deadline_s: float) -> Received:
        """What was received last, as it was, to be read until `release`; it is not proven again.

        Raises:
          ChannelError: it is here no more, or nothing was received.
        """
        if self._last is None:
            raise ChannelError("no weight version is held: none was received")
        ticket, received = self._last
        if self._reading is None:
            return received._replace(data=channels.fetch(ticket, deadline_s)[1])
        if self._reading.lock(_as_base(received.manifest), time.monotonic()) != "read":
            self.release()
            raise ChannelError(
                f"weight version {ticket.version} is not held any more: other engines of this node "
                "have gone on to the next; read it before that is published"
            )
        return received

    def close(self) -> None:
        """Keeps nothing. The node's copy goes with the last receiver that uses it."""
        self.release()
        if self._node is not None:
            self._node.close()
        self._node = self._own = self._reading = self._last = None

    def _received(self, newest: Fetched, ticket: Ticket, end: float) -> Received:
        manifest, data = newest
        if manifest.base is None and not manifest.keep:
            self.close()
            return Received(manifest, data, self._prove(manifest, data), manifest.nbytes)
        return next(
            received
            for copy in self._copies(manifest, ticket)
            if (received := self._had(copy, newest, ticket, end)) is not None
        )

    def _copies(self, manifest: Manifest, ticket: Ticket) -> Iterator[Copy]:
        """Where the version may be had, the best first. In the last it can."""
        node = self._joined(manifest, ticket)
        if node is not None:
            yield node
        if self._own is not None and self._own.layout == layout_of(manifest):
            yield self._own
        elif node is not None:
            self._note(manifest, "theirs was not free in time, or not what it should be")
        self._own = _copy(manifest)
        if node is not None and manifest.base is not None:
            if node.lock(manifest.base, 0.0) == "read":
                self._own.fill(node)
            node.unlock()
        yield self._own

    def _joined(self, manifest: Manifest, ticket: Ticket) -> NodeCopy | None:
        """The copy of this node for the ticket's stream; None if there can be none."""
        if not self._shared:
            return None
        # A stream is what remains of a ticket without its version.
        stream = f"{ticket.channel} {channels.earlier(ticket, Base(0, '')).address}"
        node = self._node
        if node is None or (node.stream, node.layout) != (stream, layout_of(manifest)):
            if node is not None:
                node.close()
            self._node = None
            try:
                self._node = NodeCopy(stream, manifest)
            except OSError as error:
                self._note(manifest, str(error))
        return self._node

    def _note(self, manifest: Manifest, why: str) -> None:
        if self._own is None:
            _LOG.warning(
                f"weight version {manifest.version}: this process makes a copy of its own, of "
                f"{manifest.size} bytes, until it can share one with the others of this node: {why}"
            )

    def _had(self, copy: Copy, newest: Fetched, ticket: Ticket, end: float) -> Received | None:
        """The version in `copy`, locked for reading; None if it cannot be had there in time, or
        what lies there is not what it is said to be."""
        manifest, _ = newest
        now = time.monotonic()
        until = now + PATIENCE * (end - now)
        self._reading = copy
        nbytes, digest = manifest.nbytes, None
        while (lock := copy.lock(_as_base(manifest), until)) == "write":
            nbytes, digest = self._made(copy, newest, ticket, end)
        if lock is None:
            return None
        data = _in_order(manifest, copy.tensors())
        try:
            digest = digest or self._prove(manifest, data)
        except wire.WireError:
            copy.unlock()
            return None
        if copy is self._node:
            self._own = None
        return Received(manifest, data, digest, nbytes)

    def _made(self, copy: Copy, newest: Fetched, ticket: Ticket, end: float) -> tuple[int, str]:
        """Brings `copy`, locked for writing, up to date; returns the bytes that came for it, and
        the digest that was found."""
        held = copy.held
        if held is not None:
            try:
                return self._written(copy, newest, _before(held, newest[0], ticket, end), end)
            except (delta.DeltaError, wire.WireError):
                pass  # what is held is not what it says it is: from the beginning, then
        return self._written(copy, newest, _before(None, newest[0], ticket, end), end)

    def _written(
        self, copy: Copy, newest: Fetched, before: Sequence[Ticket], end: float
    ) -> tuple[int, str]:
        """Writes the versions `before`, each of which is there only meanwhile, and the newest."""
        manifest, data = newest
        nbytes = manifest.nbytes
        with copy.writing(_as_base(manifest)) as arrays:
            for ticket in before:
                fetched = channels.fetch(ticket, max(0.0, end - time.monotonic()))
                _write(*fetched, arrays, copy.layout)
                nbytes += fetched[0].nbytes
                del fetched
            _write(manifest, data, arrays, copy.layout)
            digest = self._prove(manifest, _in_order(manifest, copy.tensors()))
        return nbytes, digest


def _copy(manifest: Manifest) -> Copy:
    try:
        return Copy(manifest)
    except (OSError, OverflowError) as error:
        raise ChannelError(
            f"weight version {manifest.version}: there is no memory for its {manifest.size} bytes "
            f"in this process: {error}"
        ) from error


def _as_base(manifest: Manifest) -> Base:
    return Base(manifest.version, manifest.digest)


def _in_order(manifest: Manifest, arrays: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    return [arrays[entry.name] for entry in manifest.tensors]


def _write(
    manifest: Manifest, sent: Sequence[np.ndarray], arrays: Mapping[str, np.ndarray], layout: Layout
) -> None:
    """Makes of `arrays`, in place, what arrived for a version, or what it is a difference from.

    Raises:
      WireError, DeltaError: it cannot be. The arrays are of no version then.
    """
    if layout_of(manifest) != layout:
        raise wire.WireError(
            f"weight version {manifest.version}: has other tensors than the version that is a "
            "difference from it; publish that one whole"
        )
    for entry, data in zip(manifest.tensors, sent, strict=True):
        where = f"weight version {manifest.version}, tensor {entry.name!r}"
        if entry.encoding == "delta":
            try:
                delta.apply(data, arrays[entry.name].view(_ELEMENTS[entry.dtype]))
            except delta.DeltaError as error:
                raise delta.DeltaError(f"{where}: {error}") from error
        elif data.nbytes != entry.size:
            raise wire.WireError(f"{where}: {data.nbytes} bytes arrived, promised are {entry.size}")
        else:
            np.copyto(arrays[entry.name], data)


def _before(held: Base | None, newest: Manifest, ticket: Ticket, end: float) -> list[Ticket]:
    """Those of the versions from what is held, or from one that needs no other, to the newest."""
    found: list[Ticket] = []
    manifest = newest
    while (base := manifest.base) not in (None, held):
        if base.version >= ticket.version:  # checked by the wire too: a chain has an end
            raise ChannelError(f"weight version {ticket.version} is based on {base.version}")
        ticket = channels.earlier(ticket, base)
        manifest = channels.fetch_manifest(ticket, max(0.0, end - time.monotonic()))
        found.append(ticket)
    return found[::-1]
