"""The table, and the same as JSON."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from tools.plan.topology import GIB


@dataclasses.dataclass(frozen=True)
class Line:
    name: str
    text: str
    values: dict[str, Any] = dataclasses.field(default_factory=dict)  # for --json


@dataclasses.dataclass(frozen=True)
class Section:
    title: str
    lines: Sequence[Line]


def table(sections: Sequence[Section]) -> str:
    rows = []
    for section in sections:
        rows += ["", section.title]
        rows += [f"  {line.name:<26} {line.text}".rstrip() for line in section.lines]
    return "\n".join(rows[1:])


def record(sections: Sequence[Section]) -> dict[str, Any]:
    """By section and line; lines of one name, such as changes that were tried, are a list."""
    found: dict[str, Any] = {}
    for section in sections:
        lines = found.setdefault(section.title, {})
        for line in section.lines:
            lines.setdefault(line.name, []).append({"text": line.text, **line.values})
    return {
        title: {name: same[0] if len(same) == 1 else same for name, same in lines.items()}
        for title, lines in found.items()
    }


def gib(count: float) -> str:
    return f"{count / GIB:.2f} GiB" if abs(count) >= GIB / 100 else f"{count / 2**20:.2f} MiB"


def gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if abs(count) >= 1e7 else f"{count / 1e6:.2f} MB"


def seconds(count: float) -> str:
    return f"{count:.2f} s" if count >= 1 else f"{1000 * count:.1f} ms"


def flops(count: float) -> str:
    return f"{count / 1e12:.3g} TFLOP" if count >= 1e11 else f"{count / 1e9:.3g} GFLOP"


def rate(count: float) -> str:
    return f"{count:,.0f}" if count >= 10 or math.isclose(count, round(count)) else f"{count:.2g}"
