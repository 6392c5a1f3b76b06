"""What was asked of the engines and is not answered yet: queued, at an engine, or withheld.

No Ray, no clock, no threads. A result is withheld while its engine has not proved the weights that
sampled it, and sampled again if it never will.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import numpy as np

from bridge.roster import Engine, FleetError
from bridge.schedule import Rank, Schedule
from jaxrl.types import Group, Request, Rollout

_FAILURES = 3  # of engines at one request, and it is the request


@dataclasses.dataclass(slots=True, eq=False)
class Asked:
    """A request, and what became of it so far."""

    request: Request
    version: int  # the oldest that may sample it
    future: Future[Group]
    deadline: float = math.inf  # of the engine that has it
    failures: list[str] = dataclasses.field(default_factory=list)
    withheld: tuple[Group, set[int]] | None = None  # with the versions that sampled it


class Requests:
    def __init__(self) -> None:
        self._asked: dict[str, Asked] = {}
        self._withheld: dict[str, list[str]] = collections.defaultdict(list)  # by engine
        self._numbers = itertools.count()
        self._settled: list[tuple[Future[Group], Group | Exception]] = []
        self.schedule = Schedule()
        self.requeued = 0  # times that a request was sampled again

    def add(self, request: Request, version: int, urgent: bool) -> tuple[str, Future[Group]]:
        name = f"{request.prompt.id}-{next(self._numbers)}"
        asked = self._asked[name] = Asked(request, version, Future())
        rank = Rank.URGENT if urgent else Rank.NEXT
        self.schedule.add(name, request.sampling.sequences, version, rank)
        return name, asked.future

    def assign(
        self, serving: Mapping[str, int], deadline: float
    ) -> dict[str, list[dict[str, Any]]]:
        """Gives out what there is room for (see Schedule.assign), as messages to the engines."""
        given = self.schedule.assign(serving)
        for names in given.values():
            for name in names:
                self._asked[name].deadline = deadline
        return {
            engine: [_message(name, self._asked[name]) for name in names]
            for engine, names in given.items()
        }

    def came_back(self, engine: Engine, result: Mapping[str, Any]) -> None:
        """One of `done` of a poll. A request that the engine does not have any more is ignored."""
        name = result["id"]
        if self.schedule.at(name) != engine.name:
            return
        if "refused" in result:
            why = f"{engine.name} refused a request: {result['refused']}"
            self._finish(name, FleetError(why))
        elif "failed" in result:
            self.failed(name, f"{engine.name}: {result['failed']}")
        else:
            self._sampled(name, engine, result["completions"])

    def failed(self, name: str, why: str) -> None:
        """The engine that has the request could not do it; another may."""
        asked = self._asked[name]
        asked.failures.append(why)
        if len(asked.failures) < _FAILURES:
            self.requeued += 1
            self.schedule.again(name, failed=True)
            return
        prompt = asked.request.prompt.id
        reasons = "; ".join(asked.failures)
        why = f"prompt {prompt}: engines failed at it {_FAILURES} times, and it is given up: "
        self._finish(name, FleetError(why + reasons))

    def _sampled(self, name: str, engine: Engine, completions: list[Mapping[str, Any]]) -> None:
        asked = self._asked[name]
        try:
            group = _group(asked.request, engine.name, completions)
        except FleetError as error:
            self._finish(name, error)
            return
        versions = {int(v) for rollout in group.rollouts for v in np.unique(rollout.versions)}
        match engine.proves(versions):
            case True:
                self._finish(name, group)
            case None:
                self.schedule.done(name)
                asked.withheld = group, versions
                self._withheld[engine.name].append(name)
            case False:
                self.requeued += 1
                self.schedule.again(name)

    def decide(self, engine: Engine) -> None:
        """What of the engine was withheld is delivered, or sampled again, as it proved itself."""
        for name in self._withheld.pop(engine.name, []):
            if name not in self._asked:  # cancelled
                continue
            asked = self._asked[name]
            assert asked.withheld is not None, f"{name} is not withheld"
            group, versions = asked.withheld
            proven = False if engine.ended else engine.proves(versions)
            if proven is None:
                self._withheld[engine.name].append(name)
            elif proven:
                self._finish(name, group)
            else:
                asked.withheld = None
                self.requeued += 1
                sequences = asked.request.sampling.sequences
                self.schedule.add(name, sequences, asked.version, Rank.AGAIN)

    def engine_ended(self, engine: Engine) -> None:
        """All that it had, or that was withheld, is sampled again by others, with the same seeds.
        Call it once the engine's state says so."""
        self.requeued += len(self.schedule.leave(engine.name))
        self.decide(engine)

    def drop(self, name: str) -> str | None:
        """Forgets a request that nobody waits for; returns the engine that has it."""
        return None if self._asked.pop(name, None) is None else self.schedule.done(name)

    def give_up(self, why: Callable[[], Exception]) -> dict[str, list[str]]:
        """Settles all with an error each; returns what each engine has."""
        at: dict[str, list[str]] = collections.defaultdict(list)
        for name in list(self._asked):
            if engine := self._finish(name, why()):
                at[engine].append(name)
        return at

    def overdue(self, now: float) -> dict[str, list[str]]:
        """The requests that an engine has for too long, by engine."""
        late: dict[str, list[str]] = collections.defaultdict(list)
        for name, asked in self._asked.items():
            if asked.deadline < now and (engine := self.schedule.at(name)):
                late[engine].append(name)
        return late

    def take_settled(self) -> list[tuple[Future[Group], Group | Exception]]:
        """What came of requests since the last call, to be told to those who wait."""
        settled, self._settled = self._settled, []
        return settled

    def _finish(self, name: str, outcome: Group | Exception) -> str | None:
        self._settled.append((self._asked.pop(name).future, outcome))
        return self.schedule.done(name)


def _message(name: str, asked: Asked) -> dict[str, Any]:
    """A request as engines understand it: plain types only."""
    request, sampling = asked.request, asked.request.sampling
    options = {field.name: getattr(sampling, field.name) for field in dataclasses.fields(sampling)}
    return {
        "id": name,
        "tokens": list(request.prompt.tokens),
        "seed": int(request.seed),
        "version": asked.version,
        "straggler_s": request.straggler_s,
    } | {key: list(v) if isinstance(v, tuple) else v for key, v in options.items()}


def _group(request: Request, engine: str, completions: list[Mapping[str, Any]]) -> Group:
    rollouts = tuple(Rollout(**completion) for completion in completions)
    lengths = [{len(r.tokens), len(r.logprobs), len(r.versions)} for r in rollouts]
    n = request.sampling.n
    fewest = n if request.straggler_s is None else min(n, max(2, -(-n // 2)))
    if not fewest <= len(rollouts) <= n or any(len(length) != 1 for length in lengths):
        raise FleetError(
            f"prompt {request.prompt.id}: {len(rollouts)} of {n} completions came back from "
            f"{engine}, with tokens, log-probs and versions of lengths {lengths}"
        )
    return Group(request.prompt, rollouts, engine)
