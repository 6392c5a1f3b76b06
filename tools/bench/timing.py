"""Cases timed in turn, because the machine's speed drifts."""

import statistics
import time
from collections.abc import Callable
from typing import Any


def in_turn(cases: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The median seconds of each case, after a round that does not count."""
    for run in cases.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, run in cases.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}
