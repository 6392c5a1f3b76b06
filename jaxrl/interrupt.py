"""Ending a run from outside, without losing the step."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any


class Interrupt:
    """The first SIGINT or SIGTERM lets the step end and be saved; the second ends at once."""

    signal: int | None = None

    def __init__(self, tell: Callable[[int], object] = lambda signal: None) -> None:
        """`tell`: who else is to know of the first signal."""
        self._tell = tell

    def asked_elsewhere(self, number: int) -> None:
        """Another process got the signal."""
        self.signal = self.signal or number

    @contextlib.contextmanager
    def listening(self) -> Iterator[Interrupt]:
        def handle(number: int, _: Any) -> None:
            if self.signal is not None:
                raise KeyboardInterrupt
            self.signal = number
            self._tell(number)
            print("\nending after this step; once more to end at once", file=sys.stderr)

        before = {n: signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
