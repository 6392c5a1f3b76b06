"""Times what changed between two versions of a tensor (`bridge.delta`); see `tools.bench`."""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bridge import delta

SHARES = (0.04, 0.01, 0.001)  # of the elements, changed by one unit in the last place
ROUNDS = 5


def bench_delta(elements: int) -> None:
    """Prints GB of a bfloat16 tensor a second, by CPU time of one core, and the size of payloads.

    The tensor has `elements` normal weights, and changes at random places. Each number is the
    median of several, measured in turn with a plain copy of the tensor's bytes.
    """
    rng = np.random.default_rng(0)
    old = _weights(rng, elements)
    target = old.copy()
    print(f"{old.nbytes / 1e9:.2f} GB of bfloat16; GB/s of one core by CPU time; copy: its memcpy")
    names = ("compare", "encode", "apply", "merge", "copy")
    print(f"{'changed':>8s}" + "".join(f"{name:>9s}" for name in names) + "    % of the bytes")
    for share in SHARES:
        new = _step(rng, old, share)
        changed = delta.changes(old, new)
        later = delta.changes(new, _step(rng, new, share))
        payload = delta.encode(changed, new)
        seconds = _in_turn(
            [
                functools.partial(delta.changes, old, new),
                functools.partial(delta.encode, changed, new),
                functools.partial(delta.apply, payload, target),
                functools.partial(delta.merge, changed, later),
                functools.partial(np.copyto, target, old),  # last: the base of the next apply
            ]
        )
        delta.apply(payload, target)
        assert np.array_equal(target, new)
        np.copyto(target, old)
        _print_row(f"{100 * share:g} %", old.nbytes, seconds, len(payload))
    payload = delta.encode_dense(old)
    seconds = _in_turn(
        [
            functools.partial(delta.encode_dense, old),
            functools.partial(delta.apply, payload, target),
            functools.partial(np.copyto, target, old),
        ]
    )
    _print_row("whole", old.nbytes, [None, *seconds[:2], None, seconds[2]], len(payload))


def _weights(rng: np.random.Generator, elements: int) -> np.ndarray:
    """The bits of bfloat16 weights of a normal distribution, uint16 [elements]."""
    bits = np.empty(elements, np.uint16)
    for start in range(0, elements, 1 << 22):
        part = bits[start : start + (1 << 22)]
        drawn = 0.02 * rng.standard_normal(part.size, np.float32)
        np.right_shift(drawn.view(np.uint32), 16, out=part, casting="unsafe")
    return bits


def _step(rng: np.random.Generator, old: np.ndarray, share: float) -> np.ndarray:
    """`old` after a step that moves a share of it by one unit in the last place."""
    new = old.copy()
    for start in range(0, new.size, 1 << 22):
        part = new[start : start + (1 << 22)]
        moved = np.flatnonzero(rng.random(part.size, np.float32) < share)
        part[moved] += rng.choice(np.array([1, 65535], np.uint16), moved.size)
    return new


def _in_turn(cases: list[Callable[[], Any]]) -> list[float]:
    """The median CPU seconds of each case."""
    seconds: list[list[float]] = [[] for _ in cases]
    for _ in range(ROUNDS):
        for times, run in zip(seconds, cases, strict=True):
            start = time.process_time()
            run()
            times.append(time.process_time() - start)
    return [statistics.median(times) for times in seconds]


def _print_row(name: str, nbytes: int, seconds: Sequence[float | None], size: int) -> None:
    speeds = ["-" if s is None else f"{nbytes / 1e9 / s:.2f}" for s in seconds]
    print(f"{name:>8s}" + "".join(f"{s:>9s}" for s in speeds) + f"{100 * size / nbytes:14.3f}")
