"""What of a version travels: all of it, or what changed since the last. The trainer half."""

import dataclasses
from typing import Any, Literal

import numpy as np

from bridge import delta
from bridge.wire import ITEM_BYTES, Base, HostChanges, HostTensor, Manifest, Outgoing

Encoding = Literal["auto", "full", "delta"]

# Below this, sending all of a version takes longer than finding and applying what changed. One that
# is there in less than a second is not worth the memory; how long a small one takes says nothing of
# the link.
SLOW_BYTES_PER_S = 2.5e9
WORTH_S = 1.0
WORTH_BYTES = 64 << 20


@dataclasses.dataclass
class _Kept:
    """A version to take differences from."""

    tensors: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # bytes, uint8
    on_devices: dict[int, Any] = dataclasses.field(default_factory=dict)  # by group


class Shadow:
    """The last version, as far as this process has it: what differences are taken from.

    All of it is in the memory of the host, and on the devices too if they are to compare. Of
    several processes each has one, of the buckets that it ships.
    """

    def __init__(self) -> None:
        self._held: Base | None = None
        self._keep = False
        self._last, self._next = _Kept(), _Kept()

    def begin(self, base: Base | None, keep: bool) -> None:
        """A version is on its way, as a difference from `base` if that is not None and held here;
        `keep` it to take differences from."""
        self._keep, self._next = keep, _Kept()
        if base is None or base != self._held:
            self._last = _Kept()

    def exchange(self, group: int, bits: Any) -> Any | None:
        """Keeps what the devices have of a group of the version on its way, and gives up what they
        had of the one that it is a difference from, if it is one."""
        self._next.on_devices[group] = bits
        return self._last.on_devices.pop(group, None)

    def encoded(self, group: Outgoing) -> tuple[list[HostTensor], dict[str, np.ndarray]]:
        """The tensors of a group, and by name, for those that are smaller as a difference, what
        travels instead. Several threads may call it at a time."""
        tensors, payloads = [], {}
        for item in group:
            tensor, changed = self._brought_up(item)
            tensors.append(tensor)
            if self._keep:
                self._next.tensors[tensor.name] = tensor.data
            if changed is not None:
                after = tensor.data.view(changed.values.dtype)
                payload = np.frombuffer(delta.encode(changed, after), np.uint8)
                if payload.nbytes < tensor.data.nbytes:
                    payloads[tensor.name] = payload
        return tensors, payloads

    def settle(self, version: Base | None) -> None:
        """The version on its way is there, or (None) never will be."""
        self._held = version if self._keep else None
        self._last = _Kept() if self._held is None else self._next
        self._next = _Kept()

    def _brought_up(
        self, item: HostTensor | HostChanges
    ) -> tuple[HostTensor, delta.Changes | None]:
        """The whole tensor, and what changed in it if that can be said. Of the last version what is
        held is written to, so that no more than one version and a few buckets are in memory."""
        # Given up here: if this version fails, the next travels whole.
        last = self._last.tensors.pop(item.name, None)
        if last is None:
            assert isinstance(item, HostTensor), f"{item.name}: changed, and nothing of it is held"
            return item, None
        if not last.flags.writeable:  # memory of the devices' own
            last = last.copy()
        held = last.view(delta.ELEMENTS[ITEM_BYTES[item.dtype]])
        if isinstance(item, HostTensor):
            changed = delta.changes(held, item.data.view(held.dtype))
            np.copyto(last, item.data)
        else:
            changed = delta.Changes(held.size, item.indices, item.values, held[item.indices])
            held[item.indices] = item.values
        return HostTensor(item.name, item.dtype, item.shape, last), changed


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
            worth = nbytes >= WORTH_BYTES and seconds > WORTH_S
            self.deltas = worth and nbytes < SLOW_BYTES_PER_S * seconds
