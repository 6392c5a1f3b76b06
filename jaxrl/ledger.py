"""What became of every sample that was asked for: trained, dropped, or still in flight.

runs/NAME/ledger.jsonl is only ever appended to, a line for each event:

    {"n": 4, "what": "dispatched", "version": 3, "samples": {"17": 8, "18": 8}}
    {"n": 5, "what": "dropped", "why": "straggler", "samples": {"17": 1}}
    {"n": 6, "what": "trained", "step": 3, "version": 4, "samples": {"17": 7}}
    {"n": 6, "what": "resumed", "step": 2, "samples": {}}

`samples` are counted by prompt id, `n` counts the lines that stand. A line takes the place of all
earlier ones from its `n` on: in the example step 3 was rolled back, by a run that went on from the
checkpoint of step 2. What is no line of JSON was torn by a kill, and stands for nothing.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrl.types import Group, RunError

REASONS = ("too_old", "straggler", "equal_rewards")  # to drop a sample


class LedgerError(RunError):
    """The books do not balance, or cannot be kept."""


class Book:
    """The counts after some events."""

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        """`state`: what `state()` once returned."""
        state = state or {}
        self.lines: int = state.get("lines", 0)
        self.cursor: int = state.get("cursor", 0)  # ids below it were dispatched, or passed over
        self.dispatched: int = state.get("dispatched", 0)
        self.trained: int = state.get("trained", 0)
        self.dropped = Counter({why: 0 for why in REASONS} | state.get("dropped", {}))
        self.outstanding: dict[int, int] = dict(state.get("outstanding", []))  # in order: id -> n

    def state(self) -> dict[str, Any]:
        """All of it, JSON-able."""
        return {
            "lines": self.lines,
            "cursor": self.cursor,
            "dispatched": self.dispatched,
            "trained": self.trained,
            "dropped": dict(self.dropped),
            "outstanding": [list(item) for item in self.outstanding.items()],
        }

    @property
    def in_flight(self) -> int:
        """Samples."""
        return sum(self.outstanding.values())

    def enter(self, line: Mapping[str, Any]) -> None:
        """Raises LedgerError for an event that cannot be, such as a sample trained twice."""
        self.lines += 1
        samples = {int(prompt): count for prompt, count in line["samples"].items()}
        match line["what"]:
            case "dispatched":
                for prompt, count in samples.items():
                    if prompt < self.cursor:
                        raise LedgerError(
                            f"ledger: prompt {prompt} was dispatched as a new one twice"
                        )
                    self.cursor, self.outstanding[prompt] = prompt + 1, count
                    self.dispatched += count
            case "again":
                if lost := samples.keys() - self.outstanding.keys():
                    raise LedgerError(f"ledger: prompts {sorted(lost)} are not in flight")
            case "trained":
                self.trained += self._settle(samples)
            case "dropped":
                self.dropped[line["why"]] += self._settle(samples)

    def check(self, in_flight: Iterable[int] | None = None) -> None:
        """Raises LedgerError unless every sample is accounted for once.

        Args:
          in_flight: the prompts that are, as their collector has it.
        """
        settled = self.trained + self.dropped.total()
        if self.dispatched != settled + self.in_flight:
            raise LedgerError(
                f"ledger: {self.dispatched} samples were dispatched, but {self.trained} trained + "
                f"{self.dropped.total()} dropped + {self.in_flight} in flight are "
                f"{settled + self.in_flight}; this is a bug"
            )
        if in_flight is not None and (odd := set(in_flight) ^ self.outstanding.keys()):
            raise LedgerError(
                f"ledger: prompts {sorted(odd)[:8]} are in flight for the ledger or for the "
                "collector, but not for both; this is a bug"
            )

    def _settle(self, samples: Mapping[int, int]) -> int:
        for prompt, count in samples.items():
            left = self.outstanding.pop(prompt, 0) - count
            if left < 0:
                raise LedgerError(
                    f"ledger: prompt {prompt} has {left + count} samples in flight, of which "
                    f"{count} cannot be settled; this is a bug"
                )
            if left:
                self.outstanding[prompt] = left
        return sum(samples.values())


class Ledger(Book):
    """The book of a run, and its file."""

    def __init__(self, path: Path, state: Mapping[str, Any] | None = None, step: int = 0) -> None:
        """Args:
          state: that of the checkpoint which the run goes on from, that of `step`.

        Raises:
          LedgerError: the file cannot be written.
        """
        super().__init__(state)
        self._path = path
        try:
            self._file = path.open("ab+")
            if end := self._file.tell():
                self._file.seek(end - 1)
                torn = self._file.read(1) != b"\n"
                self._file.write(b"\n" if torn else b"")
        except OSError as error:
            raise self._unwritable(error) from error
        if end:
            self._enter("resumed", {}, step=step)

    def dispatch(self, prompts: Sequence[int], samples: int, version: int) -> None:
        """These are asked for, the first time; engines serve `version`."""
        if prompts:
            self._enter("dispatched", dict.fromkeys(prompts, samples), version=version)

    def again(self, prompts: Sequence[int], version: int) -> None:
        """These are asked for once more: of what they were asked for before nothing is left."""
        if prompts:
            self._enter(
                "again", {prompt: self.outstanding[prompt] for prompt in prompts}, version=version
            )

    def drop(self, prompts: Sequence[int], why: str) -> None:
        if prompts:
            self._enter(
                "dropped", {prompt: self.outstanding[prompt] for prompt in prompts}, why=why
            )

    def train(self, step: int, version: int, groups: Sequence[Group]) -> None:
        """The batch of `step` was made of these, whatever their rewards. Rollouts that a group
        lacks are stragglers."""
        there = {group.prompt.id: len(group.rollouts) for group in groups}
        missing = {id: self.outstanding.get(id, 0) - count for id, count in there.items()}
        if stragglers := {id: count for id, count in missing.items() if count > 0}:
            self._enter("dropped", stragglers, why="straggler")
        self._enter("trained", there, step=step, version=version)

    def saved(self) -> dict[str, Any]:
        """`state()`, once all that led to it is on the disk."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._unwritable(error) from error
        return self.state()

    def metrics(self) -> dict[str, int]:
        dropped = {f"ledger/dropped_{why}": count for why, count in self.dropped.items()}
        return {
            "ledger/dispatched": self.dispatched,
            "ledger/trained": self.trained,
            "ledger/in_flight": self.in_flight,
            **dropped,
        }

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _enter(self, what: str, samples: Mapping[int, int], **facts: Any) -> None:
        line = {"n": self.lines, "what": what, **facts, "samples": samples}
        self.enter(line)
        try:
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> LedgerError:
        return LedgerError(
            f"{self._path}: cannot be written: {error}; put that right, then continue with --resume"
        )


def replay(path: Path) -> Book:
    """What the lines of a ledger that stand add up to, checked.

    Raises:
      LedgerError: a line is missing, or the books do not balance.
    """
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(path.read_bytes().split(b"\n"), start=1):
        try:
            line = json.loads(text)
        except ValueError:
            continue
        del lines[line["n"] :]
        if line["n"] > len(lines):
            raise LedgerError(f"{path}, line {number}: {line['n'] - len(lines)} lines are missing")
        lines.append(line)
    book = Book()
    for line in lines:
        book.enter(line)
        book.check()
    return book
