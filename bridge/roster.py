"""Which engines there are, what each of them serves, and who gets work. No Ray in here."""

import dataclasses
import math
import threading
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from jaxrl.types import EnginesGone, RunError


class FleetError(RunError):
    """What an engine, or all of them, could not do, and where to look."""


@dataclasses.dataclass
class Engine:
    """One actor, and what the driver knows of it."""

    name: str
    actor: Any
    started: Any  # the pending result of `VllmEngine.start`
    slot: int = 0  # which of the places for engines it has; who replaces it has the same
    ready_by: float = math.inf  # on the monotonic clock
    state: Literal["starting", "ready", "failed", "quarantined"] = "starting"
    version: int | None = None  # the last it acknowledged
    reason: str = ""  # why it ended
    load: int = 0  # completions under way

    @property
    def ended(self) -> bool:
        return self.state in ("failed", "quarantined")


class Roster:
    """The engines, by name. Every method may be called from any thread.

    Work is given only to the admitted engines, all of which serve one version. Between `suspend`
    and the next `admit` nobody is given any, and those who ask wait.
    """

    def __init__(self) -> None:
        self._engines: dict[str, Engine] = {}
        self._serving: set[str] = set()
        self._version: int | None = None
        self._suspended = False
        self._changed = threading.Condition()

    def __getitem__(self, name: str) -> Engine:
        return self._engines[name]

    def add(self, engine: Engine) -> None:
        with self._changed:
            self._engines[engine.name] = engine

    def clear(self) -> list[Engine]:
        """Empties the roster, and returns who was on it."""
        with self._changed:
            engines = list(self._engines.values())
            self._engines, self._serving = {}, set()
            self._changed.notify_all()
            return engines

    @property
    def version(self) -> int | None:
        """The version of the admitted engines."""
        return self._version

    @property
    def alive(self) -> list[str]:
        with self._changed:
            return [name for name, e in self._engines.items() if not e.ended]

    @property
    def ready(self) -> list[str]:
        """Those that are alive and started."""
        with self._changed:
            return [name for name, e in self._engines.items() if e.state == "ready"]

    @property
    def starting(self) -> list[Engine]:
        with self._changed:
            return [e for e in self._engines.values() if e.state == "starting"]

    def of_slot(self, slot: int) -> list[Engine]:
        """All that ever had the place, the first of them first."""
        with self._changed:
            return [e for e in self._engines.values() if e.slot == slot]

    @property
    def slots(self) -> int:
        with self._changed:
            return len({e.slot for e in self._engines.values()})

    @property
    def replaced(self) -> int:
        """Engines that were started in the place of others."""
        with self._changed:
            return len(self._engines) - len({e.slot for e in self._engines.values()})

    @property
    def quarantined(self) -> int:
        with self._changed:
            return sum(e.state == "quarantined" for e in self._engines.values())

    @property
    def serving(self) -> list[str]:
        with self._changed:
            return sorted(self._serving)

    @property
    def failures(self) -> dict[str, str]:
        with self._changed:
            return {e.name: e.reason for e in self._engines.values() if e.ended}

    def acknowledge(self, name: str, version: int | None) -> None:
        """Notes that an engine is ready, with `version` loaded."""
        with self._changed:
            self._engines[name].state = "ready"
            self._engines[name].version = version

    def end(
        self, name: str, reason: str, state: Literal["failed", "quarantined"] = "failed"
    ) -> None:
        """Takes an engine out for good."""
        with self._changed:
            self._engines[name].state = state
            self._engines[name].reason = reason
            self._serving.discard(name)
            self._changed.notify_all()

    def suspend(self) -> None:
        with self._changed:
            self._suspended = True

    def admit(self, names: Iterable[str], version: int) -> None:
        """Gives these engines work, beside those that serve `version` already; others get none.

        Raises:
          FleetError: one of them has not acknowledged `version`; nothing has changed.
        """
        admitted = set(names)
        with self._changed:
            for name in sorted(admitted):
                engine = self._engines.get(name)
                if engine is None:
                    raise FleetError(f"{name} is not one of {sorted(self._engines)}")
                if engine.state != "ready" or engine.version != version:
                    raise FleetError(
                        f"{name} cannot be admitted at weight version {version}: it is "
                        f"{engine.state} and acknowledged {engine.version}. {engine.reason}".strip()
                    )
            self._serving = admitted | (self._serving if version == self._version else set())
            self._version, self._suspended = version, False
            self._changed.notify_all()

    def withdraw(self, name: str) -> None:
        with self._changed:
            self._serving.discard(name)

    def assign(self, costs: Sequence[int], timeout_s: float) -> tuple[int, dict[str, list[int]]]:
        """Shares out pieces of work, each to the engine with the least of it.

        Returns:
          The version they all serve, and for each engine the indices of its pieces. What an engine
          was given counts as its load until `release`.

        Raises:
          EnginesGone: nobody serves.
          FleetError: an update was not admitted within `timeout_s`.
        """
        with self._changed:
            if not self._changed.wait_for(self._decided, timeout_s):
                raise FleetError(
                    f"the engines loaded new weights and none was admitted within {timeout_s:g} s"
                )
            if not self._serving or self._version is None:
                raise EnginesGone(self._why_nobody_serves())
            shares: dict[str, list[int]] = {}
            for index, cost in enumerate(costs):
                name = min(sorted(self._serving), key=lambda name: self._engines[name].load)
                self._engines[name].load += cost
                shares.setdefault(name, []).append(index)
            return self._version, shares

    def release(self, name: str, cost: int) -> None:
        with self._changed:
            if name in self._engines:
                self._engines[name].load -= cost

    def _decided(self) -> bool:
        """Whether it is known who serves, or that nobody will."""
        return not self._suspended or all(e.ended for e in self._engines.values())

    def _why_nobody_serves(self) -> str:
        reasons = [e.reason for e in self._engines.values() if e.ended]
        return (
            f"no engine is left that serves weight version {self._version}: "
            f"{'; '.join(reasons) or 'none was admitted'}. What each engine printed is in Ray's "
            "session directory, logs/worker-*.err"
        )
