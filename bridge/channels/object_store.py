"""Weights through Ray's object store: shared memory, one copy on a node for all its workers.

A bucket is one object, a list of uint8 arrays: Ray copies them into shared memory, end to end, and
maps them into every reader without a copy. (It pickles bfloat16 arrays element by element: more
than ten times slower; an object for each tensor would be five times slower; and it starts threads
to copy each array, so tensors that follow each other in memory are one: twice as fast.)

The publisher owns the objects. A reader is not always a Ray worker (vLLM loads weights in a child
process of the actor), and a reference that is pickled outside Ray's own messages pins its object
until the owner exits: each version would stay in memory for ever. So references are only ever
handed out by a small actor, the shelf, and a ticket says where the shelf is. A shelf that was
killed (Ray itself does it where memory runs out) is set up again, with all that was on it.

Nodes that fetched the newest version are brought the buckets of the next one while others of it are
still shipped, by a small actor on each, the relay. So on a network a version travels while it is
made. That is all it does: what engines fetch, and what they prove, is the same without it.
"""

import contextlib
import itertools
import json
import logging
import math
import os
import time
import uuid
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import ray
from numpy.lib.stride_tricks import as_strided
from ray.exceptions import (
    ActorUnavailableError,
    GetTimeoutError,
    ObjectLostError,
    OutOfMemoryError,
    RayError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bridge.channels import Channel, ChannelError, Ticket, live
from bridge.wire import Manifest, TensorEntry

NAME = "object_store"
_ATTEMPTS = 3  # to fetch
_ATTEMPT_S = 1.0  # of the time that is left, at least, for one
_PAUSE_S = 0.2  # before the next
# What may be otherwise the next time: the network, or where Ray looks for an object.
_TRANSIENT = (GetTimeoutError, ObjectLostError, ActorUnavailableError, ConnectionError)
_FILLED = 0.8  # of a store, before Ray spills: its object_spilling_threshold
_PUBLISH_TIMEOUT_S = 60.0  # to start the shelf or to hear from it; bytes do not wait for this
_BRINGING = 16  # buckets at a time, to a node
_BRING_S = 300.0  # after that a bucket is left to those who fetch it
_LOG = logging.getLogger(__name__)


class Relay:
    """Brings buckets to its node before anybody there asks for them. A Ray actor.

    It holds a bucket only until it is there: who fetches it finds it, unless Ray needed its place.
    """

    def bring(self, refs: list[Any]) -> None:
        with contextlib.suppress(RayError):  # then there is nothing to find
            ray.wait(refs, num_returns=len(refs), timeout=_BRING_S)


class Shelf:
    """Holds the references of the live versions and hands them to whoever asks. A Ray actor.

    References come and go in lists: Ray would replace one that is an argument by its object.
    """

    def __init__(self) -> None:
        self._coming: dict[int, dict[int, Any]] = {}  # version -> bucket -> reference
        self._refs: dict[int, list[Any]] = {}  # version -> manifest, bucket 0, 1, ...
        self._takers: set[str] = set()  # nodes where the newest version was read
        self._relays: dict[str, tuple[Any, Any]] = {}  # by node; and what each was asked last

    def begin(self) -> tuple[list[int], bool]:
        """The versions that there are, and whether what is added for the next is brought anywhere:
        to the other nodes where the newest was taken."""
        nodes = self._takers - {ray.get_runtime_context().get_node_id()}
        alive = {n: relay for n, relay in self._relays.items() if not _has_failed(relay[1])}
        self._relays = {node: alive.get(node) or _relay(node) for node in nodes}
        return self.versions(), bool(nodes)

    def versions(self) -> list[int]:
        """Those that there are."""
        return sorted(self._refs)

    def add(self, version: int, bucket: int, refs: list[Any]) -> None:
        self._coming.setdefault(version, {})[bucket] = refs[0]
        for node, (relay, _) in self._relays.items():
            self._relays[node] = relay, relay.bring.remote(refs)

    def coming(self, version: int) -> dict[int, Any]:
        """What was added for a version."""
        return self._coming.get(version, {})

    def show(self, versions: dict[int, list[Any]], gone: Collection[int] = ()) -> list[int]:
        """Makes versions readable, and others not any more. Returns those that there are."""
        self._refs |= versions
        for version in gone:
            self._refs.pop(version, None)
        for version in versions:
            self._coming.pop(version, None)
        self._takers.clear()
        return self.versions()

    def abort(self, version: int) -> None:
        self._coming.pop(version, None)

    def take(self, version: int, node: str) -> tuple[list[Any] | None, list[int]]:
        """The references of `version` or None, and the versions that there are. `node`: where it
        will be read."""
        if version == max(self._refs, default=None):
            self._takers.add(node)
        return self._refs.get(version), self.versions()


def _relay(node: str) -> tuple[Any, Any]:
    options = {"num_cpus": 0, "max_concurrency": _BRINGING, **_on(node)}
    relay: Any = ray.remote(Relay).options(**options).remote()
    return relay, relay.__ray_ready__.remote()


def _has_failed(ref: Any) -> bool:
    """Whether what was asked of an actor came back as an error: it is gone."""
    if ray.wait([ref], timeout=0)[0]:
        try:
            ray.get(ref)
        except RayError:
            return True
    return False


def _on(node: str) -> dict[str, Any]:
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}


class ObjectStoreChannel(Channel):
    """Keeps versions in the object store of the trainer's node.

    With whole versions it holds, beside those pinned, at most `keep_versions` of them and the one
    that is on its way. What was dropped stays in memory, not to be fetched, for as long as a reader
    on this node has it mapped: that is one version more where an engine was left out of the last.

    Ray must be initialised in this process before the first `begin`.
    """

    def __init__(self, keep_versions: int = 2):
        super().__init__(keep_versions)
        self._newest = -1
        self._nbytes: dict[int, int] = {}  # of each version that was begun
        self._refs: dict[int, list[Any]] = {}  # what is on the shelf
        self._bases: dict[int, int | None] = {}
        self._name = f"weights-{uuid.uuid4().hex}"
        self._shelf: Any = None
        self._relayed = False  # whether buckets are brought to other nodes as they come

    def begin(self, version: int, buckets: int, nbytes: int) -> "ObjectStoreShipment":
        """See `Channel.begin`."""
        if version <= self._newest:
            raise ChannelError(
                f"weight version {version} cannot be published after version {self._newest}: "
                "versions only grow"
            )
        pinned = sum(self._nbytes.get(other, 0) for other in self._pinned)
        _check_capacity(version, nbytes, self._keep, pinned)
        with _plain_errors(version, "begun"):
            there, self._relayed = self._asked("begin")
            self._refill(there)
        self._newest = version
        self._nbytes[version] = nbytes
        gcs = ray.get_runtime_context().gcs_address
        return ObjectStoreShipment(version, {"gcs": gcs, "shelf": self._name}, self)

    def refresh(self) -> None:
        """See `Channel.refresh`. The shelf may have been killed."""
        if self._refs:
            with _plain_errors(max(self._refs), "made readable again"):
                self._refill(self._asked("versions"))

    def announce(self, version: int, bucket: int, ref: Any) -> None:
        """Has a bucket brought to where versions are read. Does not wait."""
        if self._relayed:
            self._shelf.add.remote(version, bucket, [ref])

    def coming(self, version: int) -> dict[int, Any]:
        """What other processes put for a version."""
        return self._asked("coming", version)

    def keep(self, version: int, base: int | None, refs: list[Any]) -> None:
        """Puts a whole version on the shelf, and takes old ones off."""
        self._refs[version], self._bases[version] = refs, base
        gone = self._refs.keys() - live(self._bases, self._keep, self._pinned)
        for old in gone:
            del self._refs[old], self._bases[old]
        self._refill(self._asked("show", {version: refs}, gone))

    def _asked(self, method: str, *arguments: Any) -> Any:
        """What a method of the shelf returns, which Ray may be starting again."""
        if self._shelf is None:
            # By name, because a reader may belong to another Ray job than the trainer; on this
            # node, because others may go. Ray starts it again if its process is killed.
            here = ray.get_runtime_context().get_node_id()
            options = {"name": self._name, "namespace": self._name, "num_cpus": 0, **_on(here)}
            self._shelf = ray.remote(Shelf).options(max_restarts=-1, **options).remote()
        end = time.monotonic() + _PUBLISH_TIMEOUT_S
        while True:
            try:
                return _wait(getattr(self._shelf, method).remote(*arguments))
            except (ActorUnavailableError, OutOfMemoryError):  # it is being started again
                if time.monotonic() > end:
                    raise
            time.sleep(_PAUSE_S)

    def _refill(self, there: Sequence[int]) -> None:
        """Gives the shelf what it must have, if it says that it holds other versions."""
        if set(there) != self._refs.keys():
            _LOG.warning("what hands out weight versions was killed, and is set up again")
            self._asked("show", self._refs)

    def close(self) -> None:
        if self._shelf is not None:
            ray.kill(self._shelf)
        self._shelf, self._refs = None, {}


class ObjectStoreShipment:
    """See `bridge.channels.Shipment`. Of one that was joined the channel is None: another process
    has it, and finds on the shelf what is put here."""

    def __init__(self, version: int, address: dict[str, str], channel: ObjectStoreChannel | None):
        self._version, self._address, self._channel = version, address, channel
        self._refs: dict[int, Any] = {}  # of the buckets that were put here
        self._shared = False  # whether others may have put some
        self._done = False

    def put(self, entries: Sequence[TensorEntry], data: Sequence[np.ndarray]) -> None:
        """Copies at memory speed."""
        with _plain_errors(self._version, f"put into the object store, bucket {entries[0].bucket}"):
            reference = ray.put(_joined([_plain_bytes(array) for array in data]))
            if self._channel is not None:
                self._refs[entries[0].bucket] = reference
                self._channel.announce(self._version, entries[0].bucket, reference)
            else:
                shelf = _shelf(**self._address)
                _wait(shelf.add.remote(self._version, entries[0].bucket, [reference]))

    def finish(self, manifest: Manifest) -> Ticket:
        assert self._channel is not None, "whoever began a shipment finishes it"
        count = len(manifest.bucket_bytes)
        with _plain_errors(self._version, "finished"):
            refs = self._refs | (self._channel.coming(self._version) if self._shared else {})
            if missing := sorted(set(range(count)) - refs.keys()):
                raise ChannelError(
                    f"weight version {self._version} lacks buckets {missing} of {count}: they were "
                    "never put"
                )
            text = ray.put(manifest.to_json())
            base = None if manifest.base is None else manifest.base.version
            self._channel.keep(self._version, base, [text, *(refs[i] for i in range(count))])
            self._refs = {}
        self._done = True
        return Ticket(NAME, self._version, manifest.digest, json.dumps(self._address))

    def invitation(self) -> str:
        self._shared = True
        return json.dumps({"channel": NAME, "version": self._version} | self._address)

    def abort(self) -> None:
        if not self._done:
            self._done = True
            self._refs.clear()
            with contextlib.suppress(RayError, ConnectionError, ValueError):  # it may be gone
                _shelf(**self._address).abort.remote(self._version)


def join(invitation: dict[str, Any]) -> ObjectStoreShipment:
    """See `bridge.channels.join`. There must be a Ray node of the cluster on this host."""
    version, address = invitation["version"], {key: invitation[key] for key in ("gcs", "shelf")}
    with _plain_errors(version, f"shipped from {os.uname().nodename}"):
        _shelf(**address)
    return ObjectStoreShipment(version, address, None)


def fetch(ticket: Ticket, deadline_s: float) -> tuple[Manifest, list[np.ndarray]]:
    """See `bridge.channels.fetch`. The arrays are views of shared memory and keep it alive."""
    text, *buckets = _taken(ticket, deadline_s, whole=True)
    manifest = Manifest.from_json(text)
    return manifest, list(_cut(manifest, itertools.chain.from_iterable(buckets)))


def fetch_manifest(ticket: Ticket, deadline_s: float) -> Manifest:
    """See `bridge.channels.fetch_manifest`."""
    (text,) = _taken(ticket, deadline_s, whole=False)
    return Manifest.from_json(text)


def _taken(ticket: Ticket, deadline_s: float, whole: bool) -> list[Any]:
    """The manifest's text, and of a `whole` version what is in each bucket."""
    try:
        address = json.loads(ticket.address)
        gcs, name = str(address["gcs"]), str(address["shelf"])
    except (KeyError, TypeError, ValueError) as error:
        raise ChannelError(f"weight version {ticket.version}: malformed address") from error
    end = time.monotonic() + deadline_s
    attempt = 0
    while True:
        attempt += 1
        left = max(0.0, end - time.monotonic())
        share = max(_ATTEMPT_S, left / (_ATTEMPTS + 1 - attempt))
        try:
            return _get(ticket.version, gcs, name, min(left, share), whole)
        except (RayError, ConnectionError, ValueError) as error:
            again = isinstance(error, _TRANSIENT) and attempt < _ATTEMPTS
            if not again or time.monotonic() + _PAUSE_S >= end:
                raise _explained(error, ticket.version, gcs, deadline_s, attempt) from error
        time.sleep(_PAUSE_S)


def _get(version: int, gcs: str, name: str, timeout_s: float, whole: bool) -> list[Any]:
    """What came for an attempt that timed out is still on this node unless Ray needed its place."""
    end = time.monotonic() + timeout_s
    shelf, node = _shelf(gcs, name), ray.get_runtime_context().get_node_id()
    refs, there = ray.get(shelf.take.remote(version, node), timeout=timeout_s)
    if refs is None:
        why = (
            "keep more versions, or stage sooner"
            if there
            else "what hands them out was killed, and gets them back from the trainer"
        )
        raise ChannelError(
            f"weight version {version} is not in the object store any more: it holds versions "
            f"{there}; {why}"
        )
    return ray.get(refs if whole else refs[:1], timeout=max(0.0, end - time.monotonic()))


def _explained(
    error: Exception, version: int, gcs: str, deadline_s: float, attempts: int
) -> ChannelError:
    tried = f"within {deadline_s:.3g} s, in {attempts} attempt{'s' if attempts > 1 else ''}"
    if isinstance(error, GetTimeoutError):
        return ChannelError(
            f"weight version {version} did not arrive from the object store {tried}; is the "
            "network between this node and the trainer's up?"
        )
    return ChannelError(
        f"weight version {version} cannot be had from the object store at {gcs} {tried}; the "
        f"trainer that published it, or its node, is gone: {error}"
    )


def address_of(address: str, version: int) -> str:
    """All versions are on one shelf."""
    return address


def _shelf(gcs: str, shelf: str) -> Any:
    """Joins its cluster first, where this process is not in one: vLLM's child process."""
    if not ray.is_initialized():
        level = logging.ERROR
        ray.init(address=gcs, log_to_driver=False, logging_level=level, configure_logging=False)
    return ray.get_actor(shelf, namespace=shelf)


def _wait(ref: Any) -> Any:
    return ray.get(ref, timeout=_PUBLISH_TIMEOUT_S)


@contextlib.contextmanager
def _plain_errors(version: int, doing: str) -> Iterator[None]:
    try:
        yield
    except (RayError, ConnectionError, ValueError) as error:
        raise ChannelError(f"weight version {version} could not be {doing}: {error}") from error


def _plain_bytes(data: np.ndarray) -> np.ndarray:
    if data.dtype != np.uint8 or data.ndim != 1:
        raise ChannelError(f"a tensor's bytes are uint8, not {data.dtype} {list(data.shape)}")
    return data


def _joined(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The same bytes: arrays that follow each other in memory as one, valid for as long as they."""
    runs: list[list[np.ndarray]] = []
    for array in filter(len, arrays):
        if runs and runs[-1][-1].ctypes.data + runs[-1][-1].nbytes == array.ctypes.data:
            runs[-1].append(array)
        else:
            runs.append([array])
    sizes = [sum(array.nbytes for array in run) for run in runs]
    return [as_strided(run[0], (size,)) for run, size in zip(runs, sizes, strict=True)]


def _cut(manifest: Manifest, joined: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """What is in the buckets for each tensor; the reverse of `_joined`."""
    following, rest = iter(joined), np.empty(0, np.uint8)
    for entry in manifest.tensors:
        if entry.nbytes and not rest.nbytes:
            rest = next(following, rest)
        if rest.nbytes < entry.nbytes:
            raise ChannelError(
                f"weight version {manifest.version}, tensor {entry.name!r}: the object store does "
                f"not hold the {entry.nbytes} bytes that the manifest promises; does the trainer "
                "run another release than the engines?"
            )
        yield rest[: entry.nbytes]
        rest = rest[entry.nbytes :]


def _check_capacity(version: int, nbytes: int, keep: int, pinned: int) -> None:
    """Raises ChannelError unless this node's object store can hold `keep` + 1 such versions, and
    `pinned` bytes of others.

    One more than are kept, because the oldest goes when the newest is there. Ray itself would not
    refuse: it would spill to disk, and every engine would read from there. It does so before the
    store is full.
    """
    here = ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == here)
    have = int(node["Resources"].get("object_store_memory", 0))
    need = (keep + 1) * nbytes + pinned
    if need > _FILLED * have:
        raise ChannelError(
            f"weight version {version}: {keep} versions to keep and one on its way, of {nbytes} "
            f"bytes each, and {pinned} bytes of versions that are pinned, need {need} bytes, and "
            f"the object store of this node has {have}, of which Ray fills {_FILLED:.0%} before it "
            f"spills to disk; give it {math.ceil(need / _FILLED / 2**20)} MiB "
            "(vllm.object_store_mib where the trainer starts Ray, else its object_store_memory), "
            "keep fewer versions, or use the shuttle channel"
        )
