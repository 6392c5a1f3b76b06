"""The lines a run prints: its numbers as text. Pure functions, no files and no clock."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Console column -> (metric, format). Metrics that a step lacks show as "-"; an evaluation is shown
# until the next one.
COLUMNS = {
    "reward": ("reward/mean", "{:.3f}"),
    "accuracy": ("eval/accuracy", "{:.1%}"),
    "rollout tok/s": ("tokens_per_s/rollout", "{:,.0f}"),
    "train tok/s": ("tokens_per_s/train", "{:,.0f}"),
    "lag": ("lag/max", "{:.0f}"),
    "idle": ("time/idle_fraction", "{:.0%}"),
    "sync s": ("time/publish_s", "{:.2f}"),
    "update s": ("time/update_s", "{:.2f}"),
}
SFT_COLUMNS = {
    "epoch": ("data/epochs", "{:.2f}"),
    "loss": ("loss", "{:.4f}"),
    "held-out": ("eval/nll", "{:.4f}"),
    "train tok/s": ("tokens_per_s/train", "{:,.0f}"),
    "update s": ("time/update_s", "{:.2f}"),
}
# What the closing lines compare, first and last: metric -> (its name there, format).
CLOSING = {
    "reward/mean": ("reward", "{:.3f}"),
    "eval/accuracy": ("held-out accuracy", "{:.1%}"),
    "eval/nll": ("held-out loss", "{:.4f}"),
}
Columns = Mapping[str, tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Summary:
    """How a run ended. `command` continues it, or does more with it."""

    ended: str  # "finished", "stopped by SIGTERM", ...
    outputs: Mapping[str, Path]  # what lies there -> where
    command: str


@dataclasses.dataclass
class History:
    """First and latest value of what the closing lines compare."""

    step: int | None = None
    first: dict[str, float] = dataclasses.field(default_factory=dict)
    latest: dict[str, float] = dataclasses.field(default_factory=dict)

    def add(self, step: int, metrics: Mapping[str, Any]) -> None:
        self.step = step
        for name in CLOSING:
            value = metrics.get(name)
            if value is not None and math.isfinite(value):
                self.first.setdefault(name, value)
                self.latest[name] = value


def format_header(steps_total: int, columns: Columns = COLUMNS) -> str:
    cells = [name.rjust(_width(name)) for name in columns]
    return "  ".join(["step".rjust(_step_width(steps_total)), *cells, "time left".rjust(9)])


def format_step(
    step: int,
    steps_total: int,
    metrics: Mapping[str, float],
    left_s: float | None,
    columns: Columns = COLUMNS,
) -> str:
    """One console line, aligned with `format_header`."""
    cells = []
    for name, (metric, template) in columns.items():
        value = metrics.get(metric)
        cells.append(("-" if value is None else template.format(value)).rjust(_width(name)))
    position = f"{step}/{steps_total}".rjust(_step_width(steps_total))
    left = "-" if left_s is None else format_duration(left_s)
    return "  ".join([position, *cells, left.rjust(9)])


def format_duration(seconds: float) -> str:
    """Two units at most: 45s, 3m 20s, 1h 02m, 2d 03h."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d {h:02d}h"
    if hours:
        return f"{hours}h {m:02d}m"
    return f"{m}m {s:02d}s" if m else f"{s}s"


def format_closing(summary: Summary, history: History, steps_total: int) -> str:
    done = 0 if history.step is None else history.step
    lines = ["", f"{summary.ended}: {done} of {steps_total} steps"]
    for metric, (label, template) in CLOSING.items():
        if metric in history.latest:
            first, latest = history.first[metric], history.latest[metric]
            lines.append(f"  {label}: {template.format(first)} -> {template.format(latest)}")
    lines += [f"  {label}: {path}" for label, path in summary.outputs.items()]
    return "\n".join([*lines, f"  to go on: {summary.command}"])


def seconds_left(step_seconds: Sequence[float], steps: int) -> float | None:
    """From the median, so that a compilation or an evaluation does not move the estimate.

    None while there is only the first step, which compiles; the lower median, for the second.
    """
    if len(step_seconds) < 2:
        return None
    return statistics.median_low(step_seconds) * max(steps, 0)


def _width(name: str) -> int:
    return max(len(name), 8)


def _step_width(steps_total: int) -> int:
    return max(len("step"), 2 * len(str(steps_total)) + 1)
