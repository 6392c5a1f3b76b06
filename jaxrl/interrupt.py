"""Ending a run from outside, without losing the step."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any


class EndedAtOnce(KeyboardInterrupt):
    """By this signal, wherever the main thread was."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = number


class Interrupt:
    """The first SIGINT or SIGTERM lets the step end and be saved; the second ends at once."""

    signal: int | None = None

    def __init__(
        self, tell: Callable[[int], object] = lambda signal: None, starting: bool = False
    ) -> None:
        """
        Args:
          tell: who else is to know of the first signal.
          starting: until `begin` there is no step that could end: the first signal ends at once.
        """
        self._tell, self._starting = tell, starting

    def begin(self) -> None:
        """The first step begins."""
        self._starting = False

    def asked_elsewhere(self, number: int) -> None:
        """Another process got the signal. Any thread may say so."""
        if self._starting:  # the main thread may be waiting, from which only a signal wakes it
            main = threading.main_thread().ident
            assert main is not None
            signal.pthread_kill(main, number)
        else:
            self.signal = self.signal or number

    @contextlib.contextmanager
    def listening(self) -> Iterator[Interrupt]:
        def handle(number: int, _: Any) -> None:
            if self._starting or self.signal is not None:
                raise EndedAtOnce(number)
            self.signal = number
            self._tell(number)
            print("\nending after this step; once more to end at once", file=sys.stderr)

        before = {n: signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
