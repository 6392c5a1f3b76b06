"""Which engine samples which request: a queue, and engines that take from it when they have room.

No Ray, no clock, no threads. Requests are bound late, so that none waits at one engine while
another is idle.
"""

import dataclasses
import enum
import heapq
import itertools
from collections.abc import Mapping

_BACKLOG = 4  # an engine is given a quarter more than it samples at once: it never waits for us
# Of what it may have unfinished, in all: of long-tailed groups most completions have ended early,
# and an engine that says nothing of them must not be given everything.
_MOST = 4


class Rank(enum.IntEnum):
    """Who is ahead of whom in the queue."""

    AGAIN = 0
    URGENT = 1
    NEXT = 2


@dataclasses.dataclass(slots=True)
class Item:
    """A request: in the queue, or at an engine."""

    id: str
    completions: int
    version: int  # the oldest that may sample it
    rank: Rank
    number: int  # in order of arrival
    engine: str | None = None
    failed_by: set[str] = dataclasses.field(default_factory=set)


@dataclasses.dataclass(slots=True)
class Load:
    """What one engine has. Completions that ended while their siblings go on are known from what
    the engine says now and then, and from nothing else."""

    seqs: int  # that it samples at once
    items: dict[str, Item] = dataclasses.field(default_factory=dict)
    completions: int = 0  # of its items, all of them
    unfinished: int = 0  # of these, at most, by what it said last
    sent: int = 0  # since it was asked last

    @property
    def now(self) -> int:
        return min(self.completions, self.unfinished)

    @property
    def limit(self) -> int:
        return self.seqs + -(-self.seqs // _BACKLOG)

    @property
    def has_room(self) -> bool:
        return self.now < self.limit and self.completions < _MOST * self.limit


class Schedule:
    """All n completions of a request go to one engine: the one with the least to do for its size
    among those with room."""

    def __init__(self) -> None:
        self._items: dict[str, Item] = {}
        self._loads: dict[str, Load] = {}
        # By version: few, and what an engine may take is found without looking at what it may not.
        self._queues: dict[int, list[tuple[int, int, str]]] = {}
        self._numbers = itertools.count()
        self.queued = 0  # requests that no engine has

    def join(self, engine: str, seqs: int) -> None:
        """An engine that samples `seqs` completions at once."""
        self._loads[engine] = Load(seqs)

    def leave(self, engine: str) -> list[str]:
        """Takes an engine out; what it had is first in the queue again, and returned."""
        had = self.has(engine)
        for request in had:
            self.again(request)
        self._loads.pop(engine, None)
        return had

    def has(self, engine: str) -> list[str]:
        """The requests that an engine has."""
        return list(self._loads[engine].items) if engine in self._loads else []

    def at(self, request: str) -> str | None:
        """The engine that has the request."""
        return self._items[request].engine if request in self._items else None

    def add(self, request: str, completions: int, version: int, rank: Rank) -> None:
        """A new request, that engines which hold `version` or a newer one may sample."""
        item = Item(request, completions, version, rank, next(self._numbers))
        self._items[request] = item
        self._enqueue(item)

    def again(self, request: str, failed: bool = False) -> None:
        """Puts a request that an engine has first in the queue; if it failed there, for others."""
        item = self._items[request]
        engine = self._release(item)
        if failed:
            item.failed_by.add(engine)
        item.rank = Rank.AGAIN
        self._enqueue(item)

    def done(self, request: str) -> str | None:
        """Forgets a request, if it is there; returns the engine that had it."""
        item = self._items.pop(request, None)
        if item is None:
            return None
        if item.engine is None:
            self.queued -= 1  # its entry is passed over when it comes up
            return None
        return self._release(item)

    def said(self, engine: str, sequences: int) -> None:
        """The engine had so many unfinished completions when it answered. What it was given since
        it was asked may be among them or not; it is asked anew now."""
        load = self._loads[engine]
        load.unfinished, load.sent = sequences + load.sent, 0

    def assign(self, serving: Mapping[str, int]) -> dict[str, list[str]]:
        """Gives out requests until the queue is empty or nobody has room.

        Args:
          serving: the engines that take requests, and the version that each of them holds.
        """
        given: dict[str, list[str]] = {}
        able = {name: self._loads[name] for name in serving if self._loads[name].has_room}
        while self.queued and able:
            name = min(able, key=lambda name: able[name].now / able[name].seqs)
            item = self._take(name, serving)
            if item is None:
                del able[name]
                continue
            self._hold(name, item)
            given.setdefault(name, []).append(item.id)
            if not able[name].has_room:
                del able[name]
        return given

    def _enqueue(self, item: Item) -> None:
        entry = (item.rank, item.number, item.id)
        heapq.heappush(self._queues.setdefault(item.version, []), entry)
        self.queued += 1

    def _take(self, engine: str, serving: Mapping[str, int]) -> Item | None:
        """Takes the first request out of the queue that the engine may sample."""
        first: list[tuple[int, int, str]] | None = None  # the queue with the first of all
        passed = []
        for version, queue in list(self._queues.items()):
            if version > serving[engine]:
                continue
            while queue and not self._may(engine, queue[0][2], serving):
                entry = heapq.heappop(queue)
                if entry[2] in self._items:
                    passed.append((queue, entry))
            if queue and (first is None or queue[0] < first[0]):
                first = queue
        item = None if first is None else self._items[heapq.heappop(first)[2]]
        for queue, entry in passed:
            heapq.heappush(queue, entry)
        self._queues = {version: queue for version, queue in self._queues.items() if queue}
        self.queued -= item is not None
        return item

    def _may(self, engine: str, request: str, serving: Mapping[str, int]) -> bool:
        """Whether the request is there, and did not fail there while others can try."""
        item = self._items.get(request)
        return item is not None and (
            engine not in item.failed_by or serving.keys() <= item.failed_by
        )

    def _hold(self, engine: str, item: Item) -> None:
        load = self._loads[engine]
        load.items[item.id] = item
        load.unfinished = load.now + item.completions
        load.completions += item.completions
        load.sent += item.completions
        item.engine = engine

    def _release(self, item: Item) -> str:
        assert item.engine is not None, f"{item.id} is at no engine"
        load = self._loads[item.engine]
        del load.items[item.id]
        load.completions -= item.completions
        name, item.engine = item.engine, None
        return name
