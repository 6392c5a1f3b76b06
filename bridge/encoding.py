"""What of a version travels: all of it, or what changed since the last. The trainer half."""

from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np

from bridge import delta
from bridge.wire import ITEM_BYTES, Base, HostTensor, Manifest

Encoding = Literal["auto", "full", "delta"]

# Below this, sending all of a version takes longer than finding and applying what changed; and a
# version that is there in less than a second is not worth the memory.
SLOW_BYTES_PER_S = 2.5e9
WORTH_S = 1.0


class Encoder:
    """Decides for each version, and makes the payloads of its tensors (`bridge.delta`).

    To take differences the whole of the last version stays in the host's memory. A full version,
    an anchor, comes first, after every `anchor_every` versions, and after one that failed.
    """

    def __init__(self, encoding: Encoding = "full", anchor_every: int = 16) -> None:
        """`auto`: deltas, once a version was slow to reach the engines (`measured`)."""
        self._encoding, self._anchor_every = encoding, anchor_every
        self._deltas = encoding == "delta"
        self._base: Base | None = None
        self._since_anchor = 0
        self._last: dict[str, np.ndarray] = {}  # the bytes of each tensor of the base
        self._next: dict[str, np.ndarray] = {}

    def begin(self) -> Base | None:
        """What the next version is a difference from; None if all of it must travel."""
        if self._since_anchor >= self._anchor_every:
            self._base = None
        self._next = {}
        return self._base

    def payloads(self, group: Iterable[HostTensor]) -> Mapping[str, np.ndarray]:
        """By name, for the tensors of a group that are smaller as a difference. Several threads may
        call it at a time."""
        if not self._deltas:
            return {}
        made = {}
        for tensor in group:
            self._next[tensor.name] = tensor.data
            if self._base is not None and tensor.name in self._last:
                payload = _difference(self._last[tensor.name], tensor)
                if payload.nbytes < tensor.data.nbytes:
                    made[tensor.name] = payload
        return made

    def shipped(self, manifest: Manifest) -> None:
        """The version can be read: the next may be a difference from it."""
        if self._deltas:
            self._since_anchor = 0 if manifest.base is None else self._since_anchor + 1
            self._base, self._last = Base(manifest.version, manifest.digest), self._next
        self._next = {}

    def failed(self) -> None:
        """The version cannot be read: the next must be whole."""
        self._base, self._last, self._next = None, {}, {}

    def measured(self, nbytes: int, seconds: float) -> None:
        """So many bytes of a full version were with the engines after so many seconds."""
        if self._encoding == "auto" and not self._deltas:
            self._deltas = seconds > WORTH_S and nbytes < SLOW_BYTES_PER_S * seconds


def _difference(old: np.ndarray, tensor: HostTensor) -> np.ndarray:
    elements = delta.ELEMENTS[ITEM_BYTES[tensor.dtype]]
    before, after = old.view(elements), tensor.data.view(elements)
    return np.frombuffer(delta.encode(delta.changes(before, after), after), np.uint8)
