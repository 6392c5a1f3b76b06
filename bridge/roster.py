"""Which engines there are, and what state each is in. No Ray, no clock, no threads."""

import dataclasses
import enum
import math
from collections.abc import Iterator, Mapping
from typing import Any

from jaxrl.types import RunError


class FleetError(RunError):
    """What an engine, or all of them, could not do, and where to look."""


class EngineState(enum.StrEnum):
    STARTING = "starting"  # it is not built yet, or has no process yet
    LOADING = "loading"  # it can be given weights, and has not proved what it holds
    READY = "ready"  # it gets requests
    SUSPECT = "suspect"  # it was ready, and has been silent for a while: no new requests
    DEAD = "dead"
    QUARANTINED = "quarantined"  # it held something else than it was sent, and was ended


_ENDED = frozenset({EngineState.DEAD, EngineState.QUARANTINED})
# From the end there is no way back: what takes an engine's place is new, and loads what is current.
NEXT: Mapping[EngineState, frozenset[EngineState]] = {
    EngineState.STARTING: frozenset({EngineState.LOADING, *_ENDED}),
    EngineState.LOADING: frozenset({EngineState.READY, *_ENDED}),
    EngineState.READY: frozenset({EngineState.LOADING, EngineState.SUSPECT, *_ENDED}),
    EngineState.SUSPECT: frozenset({EngineState.LOADING, EngineState.READY, *_ENDED}),
    EngineState.DEAD: frozenset(),
    EngineState.QUARANTINED: frozenset(),
}


@dataclasses.dataclass(eq=False)
class Engine:
    """One engine, and what the driver knows of it. Times are in seconds on the fleet's watch."""

    name: str
    slot: int = 0  # which of the places for engines it has; who replaces it has the same
    actor: Any = None
    pending: Any = None  # the result of a first call, then of `start`, then of each `poll`
    has_process: bool = False
    unplaced: bool = False  # it never had one: it was to run on a node that had died
    sending: dict[Any, list[str]] = dataclasses.field(default_factory=dict)  # requests, by message
    unwanted: set[str] = dataclasses.field(default_factory=set)  # requests it is to drop
    ready_by: float = math.inf  # counts from when there is a process
    state: EngineState = EngineState.STARTING
    version: int | None = None  # the last it acknowledged
    reason: str = ""  # why it ended
    removed: bool = False  # on purpose: nobody takes its place
    offered: bool = False  # whether the publisher was told of it
    info: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # what `start` returned
    said: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # what `poll` returned last
    up_since: float = 0.0
    heard: float = 0.0  # when it answered last
    moved: float = 0.0  # when it made progress last, or had nothing to do
    admitted_at: int | None = None  # the last version it was
    _proven: set[int] = dataclasses.field(default_factory=set)  # all versions it was admitted at
    _unproven: int | None = None  # that it loads or has loaded, and may yet be admitted at
    _committing: bool = False

    @property
    def ended(self) -> bool:
        return self.state in _ENDED

    @property
    def up(self) -> bool:
        """Whether it can be offered a version."""
        return not self.ended and self.state is not EngineState.STARTING

    @property
    def serves(self) -> bool:
        """Whether it gets requests, or will once it has proved what it loads now."""
        return self.state in (EngineState.READY, EngineState.SUSPECT) or (
            self.up and self.admitted_at is not None and self._unproven is not None
        )

    def advance(self, to: EngineState) -> None:
        """Raises ValueError if `to` cannot follow."""
        if to not in NEXT[self.state]:
            raise ValueError(f"{self.name}: {to} cannot follow {self.state}")
        self.state = to

    def is_up(self, info: Mapping[str, Any], now: float) -> None:
        """It started, with these weights (see VllmEngine.start)."""
        self.advance(EngineState.LOADING)
        self.info, self.version = info, info["version"]
        self.up_since = self.heard = self.moved = now

    def begins_commit(self, version: int) -> None:
        """From here on it may sample with `version`, and gets no requests."""
        if self.state is not EngineState.LOADING:
            self.advance(EngineState.LOADING)
        self._unproven, self._committing = version, True

    def ends_commit(self, acknowledged: int | None, now: float) -> None:
        """It acknowledged this version; None: it keeps the one that it had."""
        self._committing = False
        self.heard = self.moved = now
        if acknowledged is not None:
            self.version = acknowledged

    def admit(self, version: int) -> None:
        """Raises FleetError if it has not acknowledged `version`; nothing has changed."""
        if not self.up or self.version != version:
            raise FleetError(
                f"{self.name} cannot be admitted at weight version {version}: it is {self.state} "
                f"and acknowledged {self.version}. {self.reason}".strip()
            )
        if self.state is not EngineState.READY:
            self.advance(EngineState.READY)
        self._proven.add(version)
        self.admitted_at, self._unproven = version, None

    def withdraw(self) -> None:
        """It gets no requests until it is admitted again."""
        if self.state in (EngineState.READY, EngineState.SUSPECT):
            self.advance(EngineState.LOADING)
        self._unproven = None

    def proves(self, versions: set[int]) -> bool | None:
        """Whether it was admitted at all of these versions; None: not yet, and may be."""
        rest = versions - self._proven
        return None if rest and rest == {self._unproven} else not rest

    def answered(self, said: Mapping[str, Any], now: float, busy: bool) -> None:
        """What `poll` returned; `busy` if there are requests it has not finished."""
        if said["progress"] != self.said.get("progress") or not busy:
            self.moved = now
        self.said, self.heard = said, now
        if self.state is EngineState.SUSPECT:
            self.advance(EngineState.READY)

    def trouble(self, now: float, busy: bool, suspect_s: float, silence_s: float) -> str:
        """Marks it as suspect if it is; says why it must be ended, or nothing."""
        if not self.up or self._committing:  # a commit has a deadline of its own
            return ""
        if now - self.heard > silence_s:
            return f"{self.name} has not answered for {silence_s:g} s"
        if busy and now - self.moved > silence_s:
            return f"{self.name} answers, and has made no progress for {silence_s:g} s"
        if self.state is EngineState.READY and now - self.heard > suspect_s:
            self.advance(EngineState.SUSPECT)
        return ""


class Roster:
    """The engines of a run, by name; those that ended too."""

    def __init__(self, least: int = 1) -> None:
        """`least` engines must be up, or requests will not be waited for."""
        self._engines: dict[str, Engine] = {}
        self._least = least
        self.enough_at = 0.0  # when there were engines enough, or one more came up

    def __getitem__(self, name: str) -> Engine:
        return self._engines[name]

    def __iter__(self) -> Iterator[Engine]:
        return iter(list(self._engines.values()))

    def add(self, engine: Engine) -> None:
        self._engines[engine.name] = engine

    def find(self, name: str) -> Engine:
        """Raises FleetError if there is none of this name."""
        if name not in self._engines:
            raise FleetError(f"{name} is not one of {sorted(self._engines)}")
        return self._engines[name]

    def clear(self) -> list[Engine]:
        """Empties the roster, and returns who was on it."""
        engines, self._engines = list(self._engines.values()), {}
        return engines

    def of_slot(self, slot: int) -> list[Engine]:
        """All that ever had the place, the first of them first."""
        return [e for e in self if e.slot == slot]

    @property
    def slots(self) -> int:
        return len({e.slot for e in self})

    @property
    def starting(self) -> list[Engine]:
        return [e for e in self if e.state is EngineState.STARTING]

    @property
    def up(self) -> list[Engine]:
        return [e for e in self if e.up]

    @property
    def replaced(self) -> int:
        """Engines that were started in the place of others."""
        return len(self._engines) - self.slots

    @property
    def quarantined(self) -> int:
        return sum(e.state is EngineState.QUARANTINED for e in self)

    @property
    def failures(self) -> dict[str, str]:
        return {e.name: e.reason for e in self if e.ended}

    def serving(self) -> dict[str, int]:
        """Those that get requests, and the version that each of them holds."""
        return {
            e.name: e.version
            for e in self
            if e.state is EngineState.READY and e.version is not None
        }

    def oldest_served(self) -> int | None:
        """The oldest version that any engine which serves was admitted at last."""
        served = (e.admitted_at for e in self if e.serves)
        return min((version for version in served if version is not None), default=None)

    def looked_at(self, now: float) -> None:
        """Notes whether there are engines enough."""
        if not self._lacking():
            self.enough_at = now

    def lacking_for(self, timeout_s: float, now: float) -> str:
        """What has kept requests from being served for longer than `timeout_s`, or nothing."""
        return self._lacking() if now - self.enough_at > timeout_s else ""

    def _lacking(self) -> str:
        if len(self.up) < self._least:
            return f"{len(self.up)} engines were up, fewer than {self._least}"
        if not self.starting and not any(engine.serves for engine in self.up):
            return "no engine was admitted"
        return ""
