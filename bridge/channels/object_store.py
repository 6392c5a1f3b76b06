"""Weights through Ray's object store: shared memory, one copy on a node for all its workers.

Buckets travel as uint8 arrays, which Ray maps into every reader without a copy. (It pickles
bfloat16 arrays element by element: more than ten times slower.)

The publisher owns the objects. A reader is not always a Ray worker (vLLM loads weights in a child
process of the actor), and a reference that is pickled outside Ray's own messages pins its object
until the owner exits: each version would stay in memory for ever. So references are only ever
handed out by a small actor, the shelf, and a ticket says where the shelf is.
"""

import json
import logging
import uuid
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayError

from bridge.channels import ChannelError, Ticket
from bridge.wire import Manifest

NAME = "object_store"
_PUBLISH_TIMEOUT_S = 60.0  # to start the shelf or to hear from it; bytes do not wait for this


class Shelf:
    """Holds the references of the live versions and hands them to whoever asks. A Ray actor."""

    def __init__(self) -> None:
        self._refs: dict[int, list[Any]] = {}

    def put(self, version: int, refs: list[Any]) -> None:
        self._refs[version] = refs

    def drop(self, version: int) -> None:
        self._refs.pop(version, None)

    def take(self, version: int) -> tuple[list[Any] | None, list[int]]:
        """The references of `version` or None, and the versions that there are."""
        return self._refs.get(version), sorted(self._refs)


class ObjectStoreChannel:
    """Keeps the newest `keep_versions` versions in the object store of the trainer's node.

    Ray must be initialised in this process before the first `publish`.
    """

    def __init__(self, keep_versions: int = 2):
        if keep_versions < 1:
            raise ValueError(f"keep_versions = {keep_versions}: the newest version must be kept")
        self._keep = keep_versions
        self._kept: list[int] = []
        self._newest = -1
        self._name = f"weights-{uuid.uuid4().hex}"
        self._shelf: Any = None

    def publish(self, manifest: Manifest, buckets: list[np.ndarray]) -> Ticket:
        """See `Channel.publish`. Blocks while the bytes are copied, at memory speed."""
        version = manifest.version
        if version <= self._newest:
            raise ChannelError(
                f"weight version {version} cannot be published after version {self._newest}: "
                "versions only grow"
            )
        _check_capacity(manifest, self._keep)
        try:
            shelf = self._shelf or self._start_shelf()
            refs = [ray.put(manifest.to_json())]
            refs += [ray.put(_plain_bytes(bucket)) for bucket in buckets]
            _wait(shelf.put.remote(version, refs))
            self._kept.append(version)
            while len(self._kept) > self._keep:
                _wait(shelf.drop.remote(self._kept[0]))
                self._kept.pop(0)
        except RayError as error:
            raise ChannelError(
                f"weight version {version}, {manifest.nbytes} bytes, could not be put into the "
                f"object store: {error}"
            ) from error
        self._newest = version
        return Ticket(NAME, version, manifest.digest, self._address())

    def close(self) -> None:
        if self._shelf is not None:
            ray.kill(self._shelf)
            self._shelf = None

    def _start_shelf(self) -> Any:
        # A name and a namespace, because a reader may belong to another Ray job than the trainer.
        options = {"name": self._name, "namespace": self._name, "num_cpus": 0}
        self._shelf = ray.remote(Shelf).options(**options).remote()
        return self._shelf

    def _address(self) -> str:
        gcs = ray.get_runtime_context().gcs_address
        return json.dumps({"gcs": gcs, "shelf": self._name})


def fetch(ticket: Ticket, deadline_s: float) -> tuple[Manifest, list[np.ndarray]]:
    """See `bridge.channels.fetch`. The buckets are views of shared memory and keep it alive."""
    try:
        address = json.loads(ticket.address)
        gcs, name = str(address["gcs"]), str(address["shelf"])
    except (KeyError, TypeError, ValueError) as error:
        raise ChannelError(f"weight version {ticket.version}: malformed address") from error
    try:
        _join(gcs)
        shelf = ray.get_actor(name, namespace=name)
        refs, there = ray.get(shelf.take.remote(ticket.version), timeout=deadline_s)
        if refs is None:
            raise ChannelError(
                f"weight version {ticket.version} is not in the object store any more: it holds "
                f"versions {there}; keep more versions, or stage sooner"
            )
        text, *buckets = ray.get(refs, timeout=deadline_s)
    except GetTimeoutError as error:
        raise ChannelError(
            f"weight version {ticket.version} did not arrive from the object store within "
            f"{deadline_s:g} s; is the network between this node and the trainer's up?"
        ) from error
    except (ObjectLostError, RayError, ConnectionError, ValueError) as error:
        raise ChannelError(
            f"weight version {ticket.version} cannot be had from the object store at {gcs} within "
            f"{deadline_s:g} s; the trainer that published it, or its node, is gone: {error}"
        ) from error
    return Manifest.from_json(text), buckets


def _join(gcs: str) -> None:
    """Joins the cluster of the ticket, where this process is not in one: vLLM's child process."""
    if ray.is_initialized():
        return
    ray.init(address=gcs, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)


def _wait(ref: Any) -> Any:
    return ray.get(ref, timeout=_PUBLISH_TIMEOUT_S)


def _plain_bytes(bucket: np.ndarray) -> np.ndarray:
    if bucket.dtype != np.uint8 or bucket.ndim != 1:
        raise ChannelError(f"a bucket is uint8 [bytes], not {bucket.dtype} {list(bucket.shape)}")
    return bucket


def _check_capacity(manifest: Manifest, keep: int) -> None:
    """Raises ChannelError unless this node's object store can hold `keep` + 1 such versions.

    One more than are kept, because the oldest goes when the newest is there. Ray itself would not
    refuse: it would spill to disk, and every engine would read from there.
    """
    here = ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == here)
    have = int(node["Resources"].get("object_store_memory", 0))
    need = (keep + 1) * manifest.nbytes
    if need > have:
        raise ChannelError(
            f"weight version {manifest.version}: {keep} versions to keep and one on its way, of "
            f"{manifest.nbytes} bytes each, need {need} bytes, and the object store of this node "
            f"has {have}; give Ray a larger one (object_store_memory), keep fewer versions, or use "
            "the shuttle channel"
        )
