"""One version of the weights, published as a transaction. The trainer half: jax, no torch."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from bridge.channels import Channel, Shipment, Ticket
from bridge.encoding import Encoder, Shadow
from bridge.wire import Base, HostTensor, Manifest, Outgoing, TensorEntry, entries, manifest_of
from jaxrl.types import PublishReport, RunError

Expected = Sequence[Sequence[Any]]  # [[name, dtype, shape], ...]
Score = Callable[[Any, Sequence[int]], np.ndarray]  # (params, tokens) -> log-probs, float32 [t]
_WRITERS = 2  # buckets on the host at a time: one is put while the next is hashed


class Engines(Protocol):
    """What a publish needs of the engines; `bridge.fleet.Fleet` is the real one.

    The outcome of each engine is a value: what it answered, or the exception that says what went
    wrong on it.
    """

    def stage(
        self, ticket: Ticket, expected: Expected | None = None
    ) -> Mapping[str, Exception | None]: ...
    def commit(self, version: int) -> Mapping[str, dict[str, Any] | Exception]: ...
    def score(self, tokens: Sequence[int]) -> Mapping[str, np.ndarray | Exception]: ...
    def admit(self, names: Sequence[str], version: int) -> None: ...


class Export(Protocol):
    """What a publish needs of the trainer; `bridge.export.Exporter` is the real one."""

    @property
    def plan(self) -> Sequence[Any]:
        """One item for each group."""
        ...

    @property
    def nbytes(self) -> int: ...
    @property
    def device_bytes(self) -> int:
        """What the last export brought from the devices to this host."""
        ...

    def groups(self, params: Any) -> Iterator[list[HostTensor]]: ...
    def groups_since(self, kept: Shadow, params: Any) -> Iterator[Outgoing]: ...


class Carrier(Protocol):
    """Brings the buckets of a version into a shipment."""

    device_bytes: int  # that left the devices for what was shipped last

    def ship(
        self, export: Any, params: Any, shipment: Shipment, base: Base | None, keep: bool
    ) -> list[TensorEntry]:
        """See `ship`; as differences from `base`, and kept to take differences from.

        Returns the entries of all buckets.

        Raises:
          bridge.channels.ChannelError: a bucket could not be put.
        """
        ...

    def settle(self, version: Base | None) -> None:
        """What was shipped last is there, or (None) never will be."""
        ...


class OwnCarrier:
    """This process ships all buckets."""

    def __init__(self) -> None:
        self._shadow, self.device_bytes = Shadow(), 0

    def ship(
        self, export: Export, params: Any, shipment: Shipment, base: Base | None, keep: bool
    ) -> list[TensorEntry]:
        shadow = self._shadow
        shadow.begin(base, keep)
        groups = export.groups_since(shadow, params) if keep else export.groups(params)
        shipped = ship(groups, shipment, shadow)
        self.device_bytes = export.device_bytes
        return shipped

    def settle(self, version: Base | None) -> None:
        self._shadow.settle(version)


class PublishError(RunError):
    """No engine serves the new version. Says what went wrong on each."""


class Publisher:
    """Export, announce, stage everywhere, load everywhere, prove, admit.

    An engine is admitted to serve version v only after it has acknowledged v with the digest of
    what it loaded, and its log-probs on the probe prompt are the trainer's. One that fails at any
    point is left out, and named; if none is left the publish has failed.
    """

    def __init__(
        self,
        export: Export,
        channel: Channel,
        engines: Engines,
        score: Score,
        *,
        probe: Sequence[int],
        probe_tolerance: float,
        encoder: Encoder | None = None,
        carrier: "Carrier | None" = None,
        warn: Callable[[str], None],
    ) -> None:
        self._export, self._channel, self._engines, self._score = export, channel, engines, score
        self._probe, self._tolerance = list(probe), probe_tolerance
        self._encoder, self._carrier = encoder or Encoder(), carrier or OwnCarrier()
        self._warn = warn

    def publish(self, params: Any, version: int) -> PublishReport:
        """Returns when every engine that will serve `version` has proved that it holds it.

        Raises:
          PublishError: no engine could be admitted.
          bridge.channels.ChannelError: the channel could not carry the version.
        """
        clock, failed = Phases(), {}
        manifest, loaded = self._carry(
            self._export, params, version, failed, clock, encoder=self._encoder
        )
        difference = self._prove(params, loaded - failed.keys(), failed)
        proven = self._survivors(loaded, version, failed)
        self._engines.admit(proven, version)
        clock.lap("prove")
        return PublishReport(
            version,
            manifest.digest,
            manifest.nbytes,
            sum(clock.seconds.values()),
            len(proven),
            difference,
            clock.seconds,
            clock.pause_s,
            None if manifest.base is None else manifest.base.version,
            self._carrier.device_bytes,
        )

    def publish_frozen(self, export: Export, params: Any, expected: Expected, version: int) -> None:
        """Carries the weights that never change, ahead of the first version of those that do.

        Nothing is admitted yet: an engine proves itself with the two together.

        Raises:
          PublishError, bridge.channels.ChannelError: as `publish`.
        """
        failed: dict[str, str] = {}
        _, loaded = self._carry(export, params, version, failed, Phases(), expected)
        self._survivors(loaded, version, failed)

    def _carry(
        self,
        export: Export,
        params: Any,
        version: int,
        failed: dict[str, str],
        clock: "Phases",
        expected: Expected | None = None,
        encoder: Encoder | None = None,
    ) -> tuple[Manifest, set[str]]:
        """Stages and commits; returns the engines that say they loaded just what was sent."""
        encoder = encoder or Encoder()
        shipment = self._channel.begin(version, len(export.plan), export.nbytes)
        try:
            base = encoder.base()
            shipped = self._carrier.ship(export, params, shipment, base, encoder.deltas)
            manifest = manifest_of(version, shipped, base, keep=encoder.deltas)
            ticket = shipment.finish(manifest)
        except BaseException:
            encoder.failed()
            self._carrier.settle(None)
            raise
        finally:
            shipment.abort()
        encoder.shipped(manifest)
        self._carrier.settle(Base(version, manifest.digest))
        clock.lap("ship")
        _answers(self._engines.stage(ticket, expected), failed)
        stage_s = clock.lap("stage")
        if failed:  # who could not have this version must not need it for the next
            encoder.failed()
        if manifest.base is None:
            encoder.measured(manifest.nbytes, stage_s)
        acknowledged = _answers(self._engines.commit(version), failed)
        clock.lap("load")
        clock.pause_s = max((said.get("pause_s", 0.0) for said in acknowledged.values()), default=0)
        for name, said in acknowledged.items():
            if (said["version"], said["digest"]) != (version, manifest.digest):
                failed[name] = (
                    f"acknowledged version {said['version']} with digest {said['digest']}, "
                    f"published was {version} with {manifest.digest}"
                )
        return manifest, acknowledged.keys() - failed.keys()

    def _survivors(self, names: set[str], version: int, failed: dict[str, str]) -> list[str]:
        proven = sorted(names - failed.keys())
        report = "; ".join(f"{name}: {why}" for name, why in sorted(failed.items()))
        if not proven:
            raise PublishError(f"weight version {version}: no engine serves it ({report})")
        if failed:
            self._warn(f"weight version {version}: left out {report}")
        return proven

    def _prove(self, params: Any, names: set[str], failed: dict[str, str]) -> float:
        """Largest difference of log-probs on the probe among the engines that pass, nats."""
        ours = self._score(params, self._probe)
        worst = 0.0
        theirs = _answers(self._engines.score(self._probe), failed)
        for name in names - failed.keys():
            if name not in theirs or theirs[name].shape != ours.shape:
                failed[name] = "it gave no log-prob for each token of the probe prompt"
                continue
            difference = float(np.max(np.abs(theirs[name] - ours)))
            if difference <= self._tolerance:  # False for NaN
                worst = max(worst, difference)
            else:
                failed[name] = (
                    f"its log-probs on the probe prompt differ from the trainer's by "
                    f"{difference:.2g} nats, more than publish.probe_tolerance = {self._tolerance}"
                )
        return worst


class Phases:
    """Seconds by phase, one after the other."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.pause_s = 0.0  # the longest that an engine sampled nothing
        self._since = time.perf_counter()

    def lap(self, name: str) -> float:
        now = time.perf_counter()
        self.seconds[name], self._since = now - self._since, now
        return self.seconds[name]


def ship(groups: Iterable[Outgoing], shipment: Shipment, shadow: Shadow) -> list[TensorEntry]:
    """Puts group i into bucket i, encoded and hashed on the way, while the next is exported; an
    empty list is another process's group.

    Every group is taken even if one cannot be put: of several processes all must take them.

    Raises:
      bridge.channels.ChannelError: a bucket could not be put.
    """

    def put(index: int, group: Outgoing) -> list[TensorEntry]:
        found, data = entries(index, *shadow.encoded(group))
        shipment.put(found, data)
        return found

    under_way: deque[Future[list[TensorEntry]]] = deque()
    shipped: list[TensorEntry] = []
    problem: BaseException | None = None
    with ThreadPoolExecutor(_WRITERS) as writers:
        for index, group in enumerate(groups):
            if len(under_way) == _WRITERS:
                problem = problem or under_way[0].exception()
                shipped += [] if problem else under_way.popleft().result()
            if group and problem is None:
                under_way.append(writers.submit(put, index, group))
    for future in under_way:
        shipped += future.result()
    return shipped


def _answers(outcomes: Mapping[str, Any], failed: dict[str, str]) -> dict[str, Any]:
    """What the engines answered; those that failed are added to `failed` instead."""
    answers = {}
    for name, outcome in outcomes.items():
        if isinstance(outcome, Exception):
            failed.setdefault(name, str(outcome))  # the first thing that went wrong is the cause
        else:
            answers[name] = outcome
    return answers
