"""One version of the weights, published as a transaction. The trainer half: jax, no torch."""

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Protocol

import numpy as np

from bridge.channels import Channel, ChannelError, Shipment, Ticket
from bridge.delta import DeltaError
from bridge.encoding import Encoder, Shadow
from bridge.receive import Receiver
from bridge.transaction import EngineFailed, EngineLost, State, Transaction, begun, settle
from bridge.wire import (
    Base,
    HostTensor,
    Manifest,
    Outgoing,
    TensorEntry,
    WireError,
    entries,
    manifest_of,
    pack,
)
from jaxrl.types import PublishReport, RunError

Expected = Sequence[Sequence[Any]]  # [[name, dtype, shape], ...]
Score = Callable[[Any, Sequence[int]], np.ndarray]  # (params, tokens) -> log-probs, float32 [t]
_WRITERS = 2  # buckets on the host at a time: one is put while the next is hashed
_RESENT_BUCKET_BYTES = 256 << 20
_AGAIN_S = (5.0, 60.0)  # before an engine is welcomed again: the first time, and at most
_NAMED = 8  # tensors, in a message
# Of the time for a version: until then it must be fetched, or there is none left to load it in.
_FETCH_SHARE = 0.8
_FIRST_SHARE = 0.4  # and from its own channel, where there is another to turn to
_PHASES = {"stage": State.FETCHED, "load": State.APPLIED, "prove": State.ACKNOWLEDGED}


class Engines(Protocol):
    """What a publish needs of the engines; `bridge.fleet.Fleet` is the real one.

    What asks one engine raises EngineFailed if that refuses, and EngineLost if it had to be ended;
    an engine that has not answered within `timeout_s` is. Several threads ask, one for each engine.
    """

    @property
    def replaced(self) -> int: ...
    @property
    def quarantined(self) -> int: ...

    def members(self) -> Sequence[str]:
        """Those that can be offered a version, whoever became ready since the last one too."""
        ...

    def wait_members(self) -> Sequence[str]:
        """Waits for some that are starting to be ready; none if nobody is, or not in time."""
        ...

    def holds(self, name: str) -> int | None:
        """The version that it loaded last; None before the first."""
        ...

    def stage(
        self,
        name: str,
        ticket: Ticket,
        fetch_s: float,
        timeout_s: float,
        expected: Expected | None = None,
    ) -> None:
        """It has `fetch_s` to fetch the version, and as long again to check it, or is late."""
        ...

    def commit(self, name: str, version: int, timeout_s: float) -> Mapping[str, Any]:
        """It loads what it staged, and gets no new requests until it is admitted."""
        ...

    def score(self, name: str, tokens: Sequence[int], timeout_s: float) -> np.ndarray: ...
    def examine(self, name: str, timeout_s: float) -> Mapping[str, Any]: ...
    def quarantine(self, name: str, why: str) -> None: ...

    def admit(self, name: str, version: int) -> None:
        """It gets requests from now on. EngineLost: it has ended since it acknowledged."""
        ...

    def withdraw(self, name: str) -> None:
        """It gets no new requests: it is alive, and without the version."""
        ...


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


class Unproven(Exception):
    """An engine holds something else than was sent. Says what."""


@dataclasses.dataclass
class Sent:
    """A version that lies in a channel."""

    ticket: Ticket
    fallback: Channel | None
    expected: Expected | None = None  # what it must hold; None: what every version must
    _resent: Future[Ticket] | None = None
    _asking: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def again(self, deadline_s: float) -> Ticket:
        """For a second attempt: of the same version, whole, in the fallback if there is one. Who
        asks first puts it there, and what comes of that is for all who ask meanwhile or later,
        unless it could not be put: then the next tries again.

        Raises:
          ChannelError, WireError, DeltaError: it could not be had from its own channel, or not be
            put.
        """
        if self.fallback is None:
            return self.ticket
        with self._asking:
            resent = self._resent
            if resent is None or (resent.done() and resent.exception()):
                resent = self._resent = begun(self._resend, self.fallback, deadline_s)
        try:
            return resent.result(deadline_s)
        except TimeoutError as error:
            raise ChannelError(
                f"weight version {self.ticket.version} was not there within {deadline_s:.3g} s"
            ) from error

    def _resend(self, fallback: Channel, deadline_s: float) -> Ticket:
        received = Receiver(shared=False).receive(self.ticket, deadline_s)
        tensors = [
            HostTensor(entry.name, entry.dtype, entry.shape, data)
            for entry, data in zip(received.manifest.tensors, received.data, strict=True)
        ]
        return fallback.publish(*pack(self.ticket.version, tensors, _RESENT_BUCKET_BYTES))


@dataclasses.dataclass(frozen=True)
class Delivery:
    """A version on its way to the engines: what each needs of it, and what becomes of it there."""

    sent: Sent
    examine: bool  # every engine; those that are new are examined anyway
    # The trainer's, of the probe: float32 [t], nats.
    logprobs: Future[np.ndarray] = dataclasses.field(default_factory=Future)
    under_way: dict[str, Future[Transaction]] = dataclasses.field(default_factory=dict)

    @property
    def version(self) -> int:
        return self.sent.ticket.version


class Publisher:
    """Ships a version; each engine then fetches, loads and proves it at its own pace, and is
    admitted as soon as it has.

    An engine is admitted to serve version v only after it has acknowledged v with the digest of
    what it loaded, its log-probs on the probe prompt are the trainer's, and, where it was examined,
    its model holds every tensor. One that fails at any point is left out, and named; if none is
    left the publish has failed.

    Versions are published by one thread; engines may be welcomed by any.
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
        timeout_s: float = 120.0,
        examine_every: int = 0,
        fallback: Channel | None = None,
        encoder: Encoder | None = None,
        carrier: "Carrier | None" = None,
        warn: Callable[[str], None],
    ) -> None:
        """
        Args:
          timeout_s: from the announcement until an engine has proved itself.
          examine_every: versions from one that every engine examines to the next; 0: none.
          fallback: where a version is put for engines that could not have it from `channel`.
        """
        self._export, self._channel, self._engines, self._score = export, channel, engines, score
        self._probe, self._tolerance = list(probe), probe_tolerance
        self._timeout_s, self._examine_every = timeout_s, examine_every
        self._encoder, self._carrier = encoder or Encoder(), carrier or OwnCarrier()
        self._warn = warn
        self._fallback = fallback
        self._frozen: Sent | None = None
        self._published = 0
        self._unchecked: set[str] = set()  # tensors that no examination could find
        self._proven: set[str] = set()  # engines that were admitted once
        # What engines that come late are brought: None before the first version, and while the next
        # is shipped. The lock is held to look at it and to begin, never to wait.
        self._delivery: Delivery | None = None
        self._door = threading.Lock()
        self._report: Future[PublishReport] | None = None  # of the last version

    def publish(self, params: Any, version: int) -> PublishReport:
        """`begin`, and waits for what comes of it."""
        return self.begin(params, version)()

    def begin(self, params: Any, version: int) -> Callable[[], PublishReport]:
        """Ships the version and computes the probe's log-probs; engines fetch, load and prove it in
        the background. When it returns, `params` are not needed any more.

        Waits first until every engine has an outcome for the version before, so that no channel
        drops a version that is still fetched.

        Returns:
          What waits until every engine has proved that it holds `version`, or failed to in time. It
          raises PublishError if none could be admitted, and none that was starting was ready in
          time.

        Raises:
          bridge.channels.ChannelError: the channel could not carry the version.
        """
        self._await_last()
        began = time.perf_counter()
        manifest, ticket = self._send(self._export, params, version, self._encoder)
        shipped_s = time.perf_counter() - began
        every = self._examine_every
        examine = every > 0 and self._published % every == 0
        self._published += 1
        delivery = Delivery(Sent(ticket, self._fallback), examine)
        with self._door:
            self._delivery = delivery
        self._report = begun(self._deliver, delivery, manifest, began, shipped_s)
        settle(delivery.logprobs, self._score, params, self._probe)  # while the engines fetch
        delivery.logprobs.result()
        return self._report.result

    def welcome(self, name: str) -> None:
        """Brings an engine that came late to the version published last, and admits it.

        Does nothing where a publish sees to it: before the first, while a version is shipped, and
        for an engine that has been offered that version. Never raises, but warns. One that could
        not have it is offered it again, in the background, until the next is shipped: where it is
        the only one there may be no next.
        """
        with self._door:
            delivery = self._delivery
            if delivery is None or name in delivery.under_way:
                return
            under_way = self._offered(name, delivery)
        if self._left_out(name, delivery, under_way):
            begun(self._welcome_again, name, delivery)

    def _welcome_again(self, name: str, delivery: Delivery) -> None:
        pause, longest = _AGAIN_S
        while True:
            time.sleep(pause)
            pause = min(2 * pause, longest)
            with self._door:
                if self._delivery is not delivery:
                    return
                del delivery.under_way[name]
                under_way = self._offered(name, delivery)
            if not self._left_out(name, delivery, under_way):
                return

    def _left_out(self, name: str, delivery: Delivery, under_way: Future[Transaction]) -> bool:
        """Whether an engine that was offered a version could not have it, and still may."""
        if error := under_way.exception():
            self._warn(f"weight version {delivery.version} was not brought to {name}: {error!r}")
            return False
        transaction = under_way.result()
        if transaction.state is not State.ADMITTED:
            self._warn(f"weight version {delivery.version}: left out {transaction}")
        return transaction.state is State.ABORTED

    def _await_last(self) -> None:
        """Until nothing is under way. Whatever is asked of an engine has a deadline."""
        with self._door:
            delivery, self._delivery = self._delivery, None
        if self._report is not None:
            wait([self._report])
        if delivery is not None:
            wait(delivery.under_way.values())

    def _deliver(
        self, delivery: Delivery, manifest: Manifest, began: float, shipped_s: float
    ) -> PublishReport:
        version, passed = delivery.version, self._bring_all(delivery)
        admitted = [t for t in passed if t.state is State.ADMITTED]
        failed = "; ".join(str(t) for t in passed if t not in admitted)
        fetched = [t.seconds[State.FETCHED] for t in passed if State.FETCHED in t.seconds]
        if not fetched:  # what nobody could have, the next must not need
            self._encoder.failed()
        if not admitted:
            raise PublishError(
                f"weight version {version}: no engine serves it ({failed or 'none is left'})"
            )
        if manifest.base is None:
            self._encoder.measured(manifest.nbytes, max(fetched))
        if failed:
            self._warn(f"weight version {version}: left out {failed}")
        phases = {"ship": shipped_s}
        for phase, state in _PHASES.items():
            phases[phase] = max(t.seconds.get(state, 0.0) for t in passed)
        return PublishReport(
            version=version,
            digest=manifest.digest,
            bytes=manifest.nbytes,
            seconds=time.perf_counter() - began,
            engines=len(admitted),
            probe_max_abs_dlogp=max(t.probe_max_abs_dlogp for t in admitted),
            phases=phases,
            pause_s=max(t.pause_s for t in passed),
            base=None if manifest.base is None else manifest.base.version,
            device_bytes=self._carrier.device_bytes,
            outcomes={t.name: t.outcome() for t in passed},
            replaced=self._engines.replaced,
            quarantined=self._engines.quarantined,
        )

    def publish_frozen(self, export: Export, params: Any, expected: Expected, version: int) -> None:
        """Ships the weights that never change, which every engine loads ahead of its first version.

        They stay in the channel, for engines that are started later.

        Raises:
          bridge.channels.ChannelError: the channel could not carry them.
        """
        for channel in (self._channel, self._fallback):
            if channel is not None:
                channel.pin(version)
        _, ticket = self._send(export, params, version, Encoder())
        self._frozen = Sent(ticket, self._fallback, expected)

    def _send(
        self, export: Export, params: Any, version: int, encoder: Encoder
    ) -> tuple[Manifest, Ticket]:
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
        return manifest, ticket

    def _bring_all(self, delivery: Delivery) -> list[Transaction]:
        """Until one engine serves the version, or there is none to wait for: their transactions."""
        passed: dict[str, Transaction] = {}
        names = self._engines.members() or self._engines.wait_members()
        while names:
            with self._door:
                under_way = {name: self._offered(name, delivery) for name in names}
            passed |= {name: future.result() for name, future in under_way.items()}
            if any(t.state is State.ADMITTED for t in passed.values()):
                break
            names = self._engines.wait_members() or self._engines.members()  # who was welcomed too
            names = [name for name in names if name not in passed]
        return list(passed.values())

    def _offered(self, name: str, delivery: Delivery) -> Future[Transaction]:
        """What becomes of the version at an engine. Who asks first, holding the lock, has it
        brought there."""
        if name not in delivery.under_way:
            delivery.under_way[name] = begun(self._bring, name, delivery)
        return delivery.under_way[name]

    def _bring(self, name: str, delivery: Delivery) -> Transaction:
        """One engine's way to a version. All that goes wrong there is in what is returned."""
        transaction, sent = Transaction(name, self._timeout_s), delivery.sent
        try:
            new = self._engines.holds(name) is None
            if new and self._frozen is not None:
                self._load(Transaction(name, self._timeout_s), self._frozen)
            self._load(transaction, sent)
            self._compare(transaction, delivery.logprobs)
            if delivery.examine or (self._examine_every and name not in self._proven):
                self._examine(transaction, delivery.version)
            transaction.advance(State.ACKNOWLEDGED)
            self._engines.admit(name, delivery.version)
            self._proven.add(name)
            transaction.advance(State.ADMITTED)
        except Unproven as error:
            self._engines.quarantine(name, str(error))
            transaction.fail(State.QUARANTINED, str(error))
        except EngineLost as error:
            transaction.fail(State.LOST, str(error))
        except EngineFailed as error:
            self._engines.withdraw(name)
            transaction.fail(State.ABORTED, str(error))
        return transaction

    def _load(self, transaction: Transaction, sent: Sent) -> None:
        name, version, digest = transaction.name, sent.ticket.version, sent.ticket.digest
        transaction.advance(State.ANNOUNCED)
        self._fetch(transaction, sent)
        transaction.advance(State.FETCHED)
        said = self._engines.commit(name, version, transaction.left())
        transaction.advance(State.APPLIED)
        transaction.digest, transaction.pause_s = said["digest"], said.get("pause_s", 0.0)
        if (said["version"], said["digest"]) != (version, digest):
            raise Unproven(
                f"acknowledged version {said['version']} with digest {said['digest']}, "
                f"published was {version} with {digest}"
            )

    def _fetch(self, transaction: Transaction, sent: Sent) -> None:
        """Has the engine fetch the version, and once more, through the fallback if there is one,
        if it could not and there is time.

        It has half of the time for the bytes, because to check them may take as long again.
        """
        name, fallback = transaction.name, sent.fallback is not None
        fetch_s = transaction.left(_FIRST_SHARE if fallback else _FETCH_SHARE) / 2
        try:
            return self._engines.stage(
                name, sent.ticket, fetch_s, transaction.left(), sent.expected
            )
        except EngineLost:
            raise
        except EngineFailed as error:
            first = error
        if not (fetch_s := transaction.left(_FETCH_SHARE) / 2):
            raise first
        try:
            self._channel.refresh()
            ticket = sent.again(fetch_s)
            fetch_s = transaction.left(_FETCH_SHARE) / 2
            self._engines.stage(name, ticket, fetch_s, transaction.left(), sent.expected)
        except EngineLost:
            raise
        except (EngineFailed, ChannelError, WireError, DeltaError) as error:
            how = "through publish.fallback" if fallback else "again"
            raise EngineFailed(f"{first}; {how}: {error}") from error

    def _compare(self, transaction: Transaction, logprobs: Future[np.ndarray]) -> None:
        """The engine's log-probs on the probe prompt with the trainer's."""
        theirs = self._engines.score(transaction.name, self._probe, transaction.left())
        began = time.monotonic()
        ours = logprobs.result()  # the trainer's own forward pass, which costs no engine its time
        transaction.extend(time.monotonic() - began)
        if theirs.shape != ours.shape:
            raise Unproven("it gave no log-prob for each token of the probe prompt")
        difference = float(np.max(np.abs(theirs - ours)))
        if not difference <= self._tolerance:  # NaN too
            raise Unproven(
                f"its log-probs on the probe prompt differ from the trainer's by "
                f"{difference:.2g} nats, more than publish.probe_tolerance = {self._tolerance}"
            )
        transaction.probe_max_abs_dlogp = difference

    def _examine(self, transaction: Transaction, version: int) -> None:
        """What the engine's model holds, tensor by tensor, with what was sent."""
        found = self._engines.examine(transaction.name, transaction.left())
        if found["version"] != version:
            raise Unproven(f"examined was version {found['version']}, published was {version}")
        if found["wrong"]:
            listed = "; ".join(f"{tensor}: {why}" for tensor, why in found["wrong"].items())
            raise Unproven(f"its model does not hold what was sent: {listed}")
        if new := set(found["unchecked"]) - self._unchecked:
            self._unchecked |= new
            self._warn(
                f"{transaction.name}: {len(new)} tensors cannot be examined in its model, and are "
                f"proved by digest and probe alone: {', '.join(sorted(new)[:_NAMED])}"
                + (", ..." if len(new) > _NAMED else "")
            )


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
