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


class Shadow:
    """The last version, as far as this process has it in memory: what differences are taken from.

    Of several processes each has one, of the buckets that it ships.
    """

    def __init__(self) -> None:
        self._held: Base | None = None
        self._base: Base | None = None  # of the version on its way
        self._keep = False
        self._last: dict[str, np.ndarray] = {}  # the bytes of each tensor of what is held
        self._next: dict[str, np.ndarray] = {}

    def begin(self, base: Base | None, keep: bool) -> None:
        """A version is on its way, as a difference from `base` if that is not None and held here;
        `keep` it to take differences from."""
        self._base, self._keep, self._next = base, keep, {}

    def payloads(self, group: Iterable[HostTensor]) -> Mapping[str, np.ndarray]:
        """By name, for the tensors of a group that are smaller as a difference. Several threads may
        call it at a time."""
        made = {}
        for tensor in group if self._keep else []:
            self._next[tensor.name] = tensor.data
            if self._base is not None and self._base == self._held and tensor.name in self._last:
                payload = _difference(self._last[tensor.name], tensor)
                if payload.nbytes < tensor.data.nbytes:
                    made[tensor.name] = payload
        return made

    def settle(self, version: Base | None) -> None:
        """The version on its way is there, or (None) never will be."""
        held = version if self._keep else None
        self._held, self._last = held, {} if held is None else self._next
        self._next = {}


class Encoder:
    """Decides whether a version travels whole or as a difference (`bridge.delta`).

    To take differences the whole of the last version stays in the memory of the hosts. A whole
    version, an anchor, comes first, after every `anchor_every` differences, and after a version
    that failed.
    """

    def __init__(self, encoding: Encoding = "full", anchor_every: int = 16) -> None:
        """`auto`: differences, once a version was slow to reach the engines (`measured`)."""
        self._auto, self.deltas = encoding == "auto", encoding == "delta"
        self._anchor_every, self._since_anchor = anchor_every, 0
        self._base: Base | None = None

    def base(self) -> Base | None:
        """What the next version is a difference from; None if all of it must travel."""
        return None if self._since_anchor >= self._anchor_every else self._base

    def shipped(self, manifest: Manifest) -> None:
        """The version can be read: the next may be a difference from it."""
        if self.deltas:
            self._since_anchor = 0 if manifest.base is None else self._since_anchor + 1
            self._base = Base(manifest.version, manifest.digest)

    def failed(self) -> None:
        """Not everyone can have the version: the next must be whole."""
        self._base = None

    def measured(self, nbytes: int, seconds: float) -> None:
        """So many bytes of a whole version were with the engines after so many seconds."""
        if self._auto and not self.deltas:
            self.deltas = seconds > WORTH_S and nbytes < SLOW_BYTES_PER_S * seconds


def _difference(old: np.ndarray, tensor: HostTensor) -> np.ndarray:
    elements = delta.ELEMENTS[ITEM_BYTES[tensor.dtype]]
    before, after = old.view(elements), tensor.data.view(elements)
    return np.frombuffer(delta.encode(delta.changes(before, after), after), np.uint8)
