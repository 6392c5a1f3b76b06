"""The receiving end of a channel: every version whole and proven, however it travelled.

NumPy only; what makes tensors of the bytes is `bridge.torch_view`.
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from bridge import channels, delta, wire
from bridge.channels import ChannelError, Ticket
from bridge.wire import Manifest

Prove = Callable[[Manifest, Sequence[np.ndarray]], str]

_ELEMENTS = {name: delta.ELEMENTS[width] for name, width in wire.ITEM_BYTES.items()}


class Received(NamedTuple):
    """A version: the bytes of each tensor in the manifest's order, uint8, each proven."""

    manifest: Manifest
    data: list[np.ndarray]
    digest: str  # what the proof found
    nbytes: int  # that came for it, of all versions in the chain


class Receiver:
    """Receives one version after the other, and keeps the newest: deltas are applied to it.

    A version that is a delta on one that is not here, or not right here, is had by way of the ones
    it is based on, from the last that needs no other; the channel keeps them. What is kept is the
    channel's own memory until the first delta comes, and from then on a copy.
    """

    def __init__(self, prove: Prove = wire.verify) -> None:
        """`prove` raises WireError unless the bytes of each tensor are what the manifest promises,
        and returns their digest."""
        self._prove = prove
        self._held: Received | None = None
        self._ours = False  # whether the arrays are our own, and may be written

    def receive(self, ticket: Ticket, deadline_s: float) -> Received:
        """The arrays stay as they are until the next call.

        Raises:
          ChannelError, wire.WireError, delta.DeltaError: naming the version, and the tensors; the
            next call starts afresh.
        """
        end = time.monotonic() + deadline_s
        held, self._held = self._held, None  # forgotten by whatever fails
        if held is not None:
            try:
                self._held = self._brought_up(held, ticket, end)
                return self._held
            except (delta.DeltaError, wire.WireError):
                pass  # what is held is not what it says it is: from the beginning, then
        self._held = self._brought_up(None, ticket, end)
        return self._held

    def _brought_up(self, held: Received | None, ticket: Ticket, end: float) -> Received:
        nbytes, arrays = 0, {} if held is None else _by_name(held.manifest, held.data)
        chain = _chain(held, ticket, end)
        for manifest, data in chain:
            nbytes += manifest.nbytes
            if manifest.base is None:
                arrays, self._ours = _by_name(manifest, data), False
            else:
                arrays = self._patched(arrays, manifest, data)
        newest, _ = chain[-1]
        data = [arrays[entry.name] for entry in newest.tensors]
        return Received(newest, data, self._prove(newest, data), nbytes)

    def _patched(
        self, arrays: dict[str, np.ndarray], manifest: Manifest, sent: list[np.ndarray]
    ) -> dict[str, np.ndarray]:
        if not self._ours:
            arrays = {name: array.copy() for name, array in arrays.items()}
            self._ours = True
        patched = {}
        for entry, data in zip(manifest.tensors, sent, strict=True):
            where = f"weight version {manifest.version}, tensor {entry.name!r}"
            if entry.encoding == "raw":
                patched[entry.name] = data.copy()
                continue
            if entry.name not in arrays:
                raise wire.WireError(f"{where}: is a delta on a tensor that its base lacks")
            try:
                delta.apply(data, arrays[entry.name].view(_ELEMENTS[entry.dtype]))
            except delta.DeltaError as error:
                raise delta.DeltaError(f"{where}: {error}") from error
            patched[entry.name] = arrays[entry.name]
        return patched


def _by_name(manifest: Manifest, data: list[np.ndarray]) -> dict[str, np.ndarray]:
    return {entry.name: array for entry, array in zip(manifest.tensors, data, strict=True)}


def _chain(
    held: Received | None, ticket: Ticket, end: float
) -> list[tuple[Manifest, list[np.ndarray]]]:
    """The versions from what is held, or from one that needs no other, up to the ticket's."""
    chain: list[tuple[Manifest, list[np.ndarray]]] = []
    have = None if held is None else wire.Base(held.manifest.version, held.manifest.digest)
    while True:
        chain.append(channels.fetch(ticket, max(0.0, end - time.monotonic())))
        base = chain[-1][0].base
        if base is None or base == have:
            return chain[::-1]
        if base.version >= ticket.version:  # checked by the wire too: a chain has an end
            raise ChannelError(f"weight version {ticket.version} is based on {base.version}")
        ticket = channels.earlier(ticket, base)
