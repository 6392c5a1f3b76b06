"""Which rows of a file are asked for again, by how well they were answered.

A row comes once an epoch, at a place that `Order` gives. What decides is the mean reward of its
completions when it was last sampled, so everything here follows from that and the epoch alone.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxrl.config import RolloutDataSection

Order = Callable[[int], np.ndarray]  # epoch -> int [rows], the row at each of its places


class Curriculum:
    """Passes over rows of `data.easy` and more for good, and those of `data.hard` and less for
    `data.revisit` epochs. An epoch keeps at least `at_least` rows, or a step would have some more
    than once: where fewer are left, those sampled longest ago come all the same."""

    def __init__(
        self,
        order: Order,
        rows: int,
        c: RolloutDataSection,
        at_least: int,
        warn: Callable[[str], None],
    ) -> None:
        self._order, self._at_least, self._warn = order, at_least, warn
        self._easy = np.inf if c.easy is None else c.easy
        self._hard = -np.inf if c.hard is None else c.hard
        self._revisit, self._warned = c.revisit, False
        self._reward = np.full(rows, np.nan)  # NaN: not sampled yet, or unknown
        self._epoch = np.zeros(rows, np.int64)  # in which it was asked for then
        self._never = np.zeros(rows, bool)
        self._places: dict[int, np.ndarray] = {}  # by epoch, until something changes

    def next(self, index: int) -> int:
        """The first index from this one on whose row is asked for; this one if no row ever is."""
        rows = len(self._reward)
        for start in (index, (index // rows + 1) * rows):
            epoch, place = divmod(start, rows)
            places = self._places_of(epoch)
            found = int(np.searchsorted(places, place))
            if found < len(places):
                return epoch * rows + int(places[found])
        return index

    def measured(self, index: int, reward: float) -> None:
        """The completions of this index had this mean reward; NaN: nobody knows."""
        epoch, row = self._row(index)
        self._reward[row], self._epoch[row] = reward, epoch
        self._places.clear()

    def never(self, index: int) -> None:
        """The row at this index cannot be asked for: it is held out, or too long."""
        self._never[self._row(index)[1]] = True
        self._places.clear()

    def passed_over(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Which rows are too easy and which too hard in `epoch`: bool [rows] each."""
        hard = (self._reward <= self._hard) & (epoch - self._epoch <= self._revisit)
        return self._reward >= self._easy, hard

    def state(self) -> dict[str, Any]:
        """What was learned of the rows, JSON-able."""
        rows = np.flatnonzero(~np.isnan(self._reward))
        return {
            "rows": rows.tolist(),
            "rewards": self._reward[rows].tolist(),
            "epochs": self._epoch[rows].tolist(),
            "never": np.flatnonzero(self._never).tolist(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Of one that knows nothing yet."""
        self._reward[state["rows"]] = state["rewards"]
        self._epoch[state["rows"]] = state["epochs"]
        self._never[state["never"]] = True

    def _row(self, index: int) -> tuple[int, int]:
        epoch, place = divmod(index, len(self._reward))
        return epoch, int(self._order(epoch)[place])

    def _places_of(self, epoch: int) -> np.ndarray:
        """Of the rows that are asked for in `epoch`, ascending."""
        if epoch not in self._places:
            self._places[epoch] = np.flatnonzero(self._wanted(epoch)[self._order(epoch)])
        return self._places[epoch]

    def _wanted(self, epoch: int) -> np.ndarray:
        """bool [rows]"""
        easy, hard = self.passed_over(epoch)
        wanted = ~(easy | hard | self._never)
        spare = np.flatnonzero(easy | hard)
        lacking = max(0, self._at_least - np.count_nonzero(wanted))
        if lacking and spare.size:
            wanted[spare[np.argsort(self._epoch[spare], kind="stable")[:lacking]]] = True
            self._say_few(spare.size)
        return wanted

    def _say_few(self, passed_over: int) -> None:
        if not self._warned:
            self._warned = True
            self._warn(
                f"data.easy and data.hard pass over {passed_over} of {len(self._reward)} rows, and "
                f"leave fewer than rollout.prompts_per_step = {self._at_least}: of those passed "
                "over, the rows sampled longest ago are asked for all the same"
            )
