"""What the user sees: a line for each check, or all of them as one JSON object."""

import contextlib
import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TextIO


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of the table. `values` are the measurements as numbers, for --json."""

    name: str
    status: Literal["pass", "FAIL", "skipped"]
    measured: str
    limit: str = ""
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    details: Sequence[str] = ()

    def lines(self) -> list[str]:
        limit = f"  [limit: {self.limit}]" if self.limit else ""
        first = f"{self.name:<22} {self.status:<8} {self.measured}{limit}"
        return [first, *(f"{'':31} - {detail}" for detail in self.details)]

    def record(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"values": _plain(self.values)}


class Report:
    """Prints each check when it is done, or all of them as one JSON object at the end."""

    def __init__(self, out: TextIO, model: str, weights: str, *, as_json: bool) -> None:
        self._out, self._model, self._weights, self._json = out, model, weights, as_json
        self._checks: list[Check] = []
        if not as_json:
            self._print(f"{model}: {weights}", f"{'check':<22} {'result':<8} measured")

    def add(self, check: Check) -> None:
        self._checks.append(check)
        if not self._json:
            self._print(*check.lines())

    def finish(self) -> int:
        """Returns the exit code."""
        statuses = [check.status for check in self._checks]
        ok = "FAIL" not in statuses
        if self._json:
            whole = {
                "model": self._model,
                "weights": self._weights,
                "checks": [check.record() for check in self._checks],
                "ok": ok,
            }
            self._print(json.dumps(whole, indent=2, allow_nan=False))
        else:
            counts = [f"{n} {s}" for s in ("pass", "FAIL", "skipped") if (n := statuses.count(s))]
            self._print(", ".join(counts))
        return 0 if ok else 1

    def _print(self, *lines: str) -> None:
        print(*lines, sep="\n", file=self._out, flush=True)


@contextlib.contextmanager
def clean_stdout() -> Iterator[TextIO]:
    """Yields the real stdout; what anything else prints, child processes too, goes to stderr."""
    sys.stdout.flush()
    real = os.dup(1)
    os.dup2(2, 1)
    try:
        with os.fdopen(os.dup(real), "w") as out, contextlib.redirect_stdout(sys.stderr):
            yield out
    finally:
        os.dup2(real, 1)
        os.close(real)


def progress(text: str) -> None:
    print(f"... {text}", file=sys.stderr, flush=True)


def first_line(error: Exception | None) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else repr(error)


def _plain(value: Any) -> Any:
    """For JSON, which has no NaN: not finite is null."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
