"""What becomes of one version at one engine: its states, and which may follow which."""

import enum
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

from jaxrl.types import EngineOutcome, RunError

Result = TypeVar("Result")


class EngineFailed(RunError):
    """What one engine could not do, and why. It is alive, and holds what it held."""


class EngineLost(EngineFailed):
    """The engine was ended: it died, hung, or cannot say what it holds."""


class State(enum.StrEnum):
    STAGED = "staged"  # all of the version lies in a channel; the engine knows nothing of it
    ANNOUNCED = "announced"  # the engine was told where
    FETCHED = "fetched"  # it has the version beside the one it serves, every tensor proven
    APPLIED = "applied"  # its model loaded it
    ACKNOWLEDGED = "acknowledged"  # it proved that it holds this version and nothing else
    ADMITTED = "admitted"  # it gets requests
    ABORTED = "aborted"  # it goes without: it serves nothing, is alive, and may have the next
    LOST = "lost"  # it was ended, because nobody can say what it holds
    QUARANTINED = "quarantined"  # it was ended, because it holds something else


_FAILED = {State.ABORTED, State.LOST}
NEXT: Mapping[State, frozenset[State]] = {
    # An engine that is new may have to load frozen weights first, and those too can be wrong.
    State.STAGED: frozenset({State.ANNOUNCED, State.QUARANTINED, *_FAILED}),
    State.ANNOUNCED: frozenset({State.FETCHED, *_FAILED}),
    State.FETCHED: frozenset({State.APPLIED, *_FAILED}),
    State.APPLIED: frozenset({State.ACKNOWLEDGED, State.QUARANTINED, *_FAILED}),
    State.ACKNOWLEDGED: frozenset({State.ADMITTED, State.LOST}),
    State.ADMITTED: frozenset(),
    State.ABORTED: frozenset(),
    State.LOST: frozenset(),
    State.QUARANTINED: frozenset(),
}


class Transaction:
    """One version on its way into one engine. Its time runs from the announcement."""

    def __init__(self, name: str, timeout_s: float) -> None:
        self.name, self.state, self.timeout_s = name, State.STAGED, timeout_s
        self.seconds: dict[State, float] = {}  # that it took to reach each state
        self.failed_in: State | None = None
        self.why = ""  # it failed
        self.digest = ""  # of what the engine says it loaded
        self.pause_s = 0.0  # for which the engine sampled nothing
        self.probe_max_abs_dlogp = 0.0  # nats, engine against trainer
        self._since, self._announced = time.monotonic(), 0.0

    def advance(self, to: State) -> None:
        """Raises ValueError if `to` cannot follow."""
        if to not in NEXT[self.state]:
            raise ValueError(f"{self.name}: {to} cannot follow {self.state}")
        now = time.monotonic()
        self.seconds[to], self._since, self.state = now - self._since, now, to
        if to is State.ANNOUNCED:
            self._announced = now

    def fail(self, to: State, why: str) -> None:
        self.failed_in, self.why = self.state, why
        self.advance(to)

    def extend(self, seconds: float) -> None:
        """So long the engine was not to blame."""
        self._announced += seconds

    def left(self, share: float = 1.0) -> float:
        """Seconds until this share of the time is over; not negative."""
        return max(0.0, self._announced + share * self.timeout_s - time.monotonic())

    def outcome(self) -> EngineOutcome:
        seconds = {str(state): seconds for state, seconds in self.seconds.items()}
        failed_in = None if self.failed_in is None else str(self.failed_in)
        return EngineOutcome(str(self.state), seconds, failed_in, self.why, self.digest)

    def __str__(self) -> str:
        return f"{self.name}: {self.why} ({self.state} when {self.failed_in})"


def begun(work: Callable[..., Result], *args: Any) -> Future[Result]:
    """Does `work` in a thread, not of a pool: those are waited for when the interpreter ends, and
    engines may hang."""
    outcome: Future[Result] = Future()
    threading.Thread(target=settle, args=(outcome, work, *args), daemon=True).start()
    return outcome


def settle(outcome: Future[Result], work: Callable[..., Result], *args: Any) -> None:
    """Does `work`, and has `outcome` be what came of it."""
    try:
        outcome.set_result(work(*args))
    except BaseException as error:
        outcome.set_exception(error)
