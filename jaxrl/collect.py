"""Keeps the engines at work, and hands the trainer groups that are no staler than it allows.

Versions count steps: what is trained at version v is followed by v + 1. A group that is asked for
while engines serve u has the deadline u + max_lag, the last version that may be trained with it.

A group is judged when it arrives, while others are sampled: what it is worth decides whether it is
trained on, and whether its prompt is asked for again.
"""

import math
import queue
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np

from jaxrl.advantages import EQUAL
from jaxrl.config import Config
from jaxrl.ledger import Ledger
from jaxrl.types import Group, Judged, Prompt, PublishReport, Request, Rollout, RunError, Sampling

T = TypeVar("T")
_NAMED = 8  # prompts, in a message


class Publish(Protocol):
    """Brings a version of the weights to the engines."""

    def __call__(self, params: Any, version: int) -> "Published":
        """Returns once `params` may change. Each engine serves the version from when it has it."""
        ...


class Published(Protocol):
    """What a publish returns."""

    def __call__(self) -> PublishReport:
        """Waits until all engines that serve have the version; raises RunError if none has."""
        ...


class Engines(Protocol):
    """Whatever samples completions: `sampler.InProcessEngine`, `bridge.fleet.Fleet`."""

    def submit(self, requests: Sequence[Request], urgent: bool = False) -> list[Future[Group]]:
        """Samples each request as soon as there is room for it; returns at once.

        A request is sampled by weights no older than those that serve now, and may be sampled by
        newer ones from any token on. It is in the queue until its future is done; cancelling the
        future takes it out, or aborts it. Futures end with a Group, or raise EnginesGone (nobody
        is left to sample it) or another RunError (no engine would).

        Args:
          urgent: ahead of whatever waits already.
        """
        ...

    def status(self) -> dict[str, float]:
        """How they do, as metrics by name."""
        ...

    def close(self) -> None: ...


class Prompts(Protocol):
    """Where prompts come from; `data.PromptStream` is the real one."""

    def take(self, count: int) -> list[Prompt]: ...
    def at(self, index: int) -> Prompt: ...
    def measured(self, index: int, reward: float) -> None:
        """The completions of this prompt had this mean reward; NaN: nobody knows."""
        ...


def seeds_for(run_seed: int, prompts: Sequence[Prompt]) -> list[int]:
    """A seed below 2^31 for each prompt, of the run's seed and the prompt's identity alone: a
    prompt that is dispatched again, by a resumed run too, is drawn with the same seed."""
    return [
        int(np.random.SeedSequence([run_seed, prompt.id]).generate_state(1)[0] >> 1)
        for prompt in prompts
    ]


def requests_for(
    run_seed: int, prompts: Sequence[Prompt], sampling: Sampling, straggler_s: float | None = None
) -> list[Request]:
    seeds = seeds_for(run_seed, prompts)
    return [
        Request(prompt, sampling, seed, straggler_s)
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]


def lag(groups: Sequence[Group], trained_version: int) -> int:
    """Versions between the weights being trained and the oldest sampled token, if there is one.

    Raises:
      ValueError: a token from the future: some version was stamped wrongly.
    """
    rollouts: list[Rollout] = [rollout for group in groups for rollout in group.rollouts]
    versions = np.concatenate([rollout.versions for rollout in rollouts])
    if not versions.size:
        return 0
    if versions.max() > trained_version:
        raise ValueError(
            f"a token carries weight version {versions.max()}, newer than {trained_version}"
        )
    return trained_version - int(versions.min())


def slack(deadlines: Mapping[int, int], trained: int, per_step: int, since: int) -> int:
    """How many groups more, with a deadline of `since` or later, can be trained in time; if it is
    negative, so many cannot that are there.

    Steps train `per_step` groups each, at versions `trained`, `trained` + 1, ...: until any version
    no more may be due than are trained until then.

    Args:
      deadlines: of the groups that are there: deadline -> groups.
    """
    return min(
        max(0, end - trained + 1) * per_step
        - sum(count for deadline, count in deadlines.items() if deadline <= end)
        for end in range(since, max([since, *deadlines]) + 1)
    )


@dataclass(eq=False)
class Pending:
    """A group that was asked for and is not trained yet."""

    prompt: Prompt
    deadline: int  # the last version that may be trained with it
    future: Future[Group]
    judged: Judged | None = None  # once it is finished
    reward: float = math.nan  # the mean of its main ones that are known
    equal: bool = False  # all sums are, or fewer than two are known: there is nothing to compare


@dataclass
class Judging:
    """What it took, and what it did, until a step was taken."""

    seconds: float = 0.0
    dropped: list[float] = field(default_factory=list)  # mean rewards of groups of equal ones
    taken_equal: int = 0  # groups


class Collector:
    """Asks for as many groups as can be trained in time, and hands over those of each step.

    One thread, the caller's: what ends elsewhere only puts itself into the queue of this one.
    """

    def __init__(
        self,
        engines: Engines,
        stream: Prompts,
        ledger: Ledger,
        sampling: Sampling,
        judge: Callable[[Group], Judged],
        c: Config,
        version: int,
        steps: int,
        warn: Callable[[str], None],
    ) -> None:
        """Nothing is asked for before `serve`; what the ledger says is in flight goes first then.

        Args:
          version: that the next step trains.
          steps: that are left.
        """
        self._engines, self._stream, self._ledger = engines, stream, ledger
        self._sampling, self._seed = sampling, c.run.seed
        self._judge, self._warn = judge, warn
        self._per_step, self._max_lag = c.rollout.prompts_per_step, c.max_lag
        self._too_old, self._straggler_s = c.rollout.too_old, c.rollout.straggler_s
        # Longer than an engine may take: what one does not finish, others are given once more.
        self._timeout_s = 2 * c.rollout.timeout_s
        self._beyond_a_step = c.rollout.mode == "continuous"
        self._in_batches = c.rollout.engine == "inprocess"  # whose groups end together
        self._resample_equal = c.rollout.resample_equal
        self._most_dropped = c.rollout.max_resample * self._per_step
        self._warned = False
        self._next, self._steps = version, steps
        self._serving: int | None = None
        self._coming: tuple[int, Future[Any]] | None = None  # version; done when engines serve it
        self._again = deque(stream.at(index) for index in ledger.outstanding)
        self._drawn: deque[Prompt] = deque()
        self._pending: dict[int, Pending] = {}  # by prompt, in the order they were asked for
        self._under_way: dict[Future[Group], Pending] = {}
        self._events: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
        self._heard = time.monotonic()
        self._judging, self._judging_of_last = Judging(), Judging()

    def serve(self, version: int, published: Future[Any]) -> None:
        """Engines serve `version` from when `published` is done; asks for what then can be."""
        self._coming = (version, published)
        published.add_done_callback(self._events.put)
        if published.done() and published.exception() is None:
            self._fill()

    def take(self, version: int) -> list[Judged]:
        """Waits for the groups of the step that trains `version`: finished ones, those with the
        earliest deadlines first, then in the order they were asked for.

        What cannot be trained in time after this step is waited for, dropped or sampled again, as
        rollout.too_old has it. With rollout.resample_equal groups of equal rewards are dropped, up
        to rollout.max_resample batches of them for a step.

        Raises:
          RunError: no group ended in twice rollout.timeout_s, or engines break their promises.
          EnginesGone: see `Engines.submit`.
        """
        self._next = version
        self._fill()
        while (chosen := self._chosen()) is None or not self._events.empty():
            if chosen is None and not self._under_way and self._coming is None:
                raise RunError(f"version {version} lacks groups, and none is under way: a bug")
            self._hear()
        taken = [self._pending.pop(pending.prompt.id).judged for pending in chosen]
        taken = [judged for judged in taken if judged is not None]
        if (found := lag([judged.group for judged in taken], version)) > self._max_lag:
            raise RunError(f"{self._stale(version - found)}: a bug")
        self._judging.taken_equal = sum(pending.equal for pending in chosen)
        self._judging_of_last, self._judging = self._judging, Judging()
        self._next, self._steps = version + 1, self._steps - 1
        self._drop_equal()
        self._give_up_late()
        self._fill()
        return taken

    def ask(self, requests: Sequence[Request]) -> list[Group]:
        """Has these sampled ahead of everything else, and waits for them. Raises as `take`."""
        futures = [
            self._watch(Pending(request.prompt, self._next, future)).future
            for request, future in zip(
                requests, self._engines.submit(requests, urgent=True), strict=True
            )
        ]
        return [self.until(future) for future in futures]

    def until(self, future: Future[T]) -> T:
        """The result of `future`; meanwhile the engines are kept at work. Raises as `take`, and
        what `future` does."""
        future.add_done_callback(self._events.put)
        while not future.done():
            self._hear()
        self._fill()
        return future.result()

    def finish(self) -> None:
        """Waits until nothing is under way. Raises as `take`."""
        while self._under_way:
            self._hear()

    def prepare(self) -> None:
        """Draws the prompts of a step ahead, while there is time for it."""
        if self._steps:
            self._draw(self._per_step)

    def check(self) -> None:
        """Raises LedgerError unless the ledger and this one know of the same samples."""
        self._ledger.check([*self._pending, *(prompt.id for prompt in self._again)])

    def metrics(self) -> dict[str, float]:
        """How things stand, and what was done for the step that was taken last."""
        finished = sum(pending.judged is not None for pending in self._pending.values())
        judging = self._judging_of_last
        return {
            "rollout/in_flight": len(self._pending) - finished,
            "rollout/finished_waiting": finished,
            "rollout/dropped_equal": len(judging.dropped),
            "rollout/dropped_all_0": sum(abs(reward) <= EQUAL for reward in judging.dropped),
            "rollout/dropped_all_1": sum(abs(reward - 1) <= EQUAL for reward in judging.dropped),
            "rollout/taken_equal": judging.taken_equal,
            "time/reward_s": judging.seconds,
        }

    def _chosen(self) -> list[Pending] | None:
        finished = [pending for pending in self._pending.values() if pending.judged is not None]
        if len(finished) < self._per_step:
            return None
        chosen = sorted(finished, key=lambda pending: pending.deadline)[: self._per_step]
        if self._too_old == "wait":
            rest = _deadlines(self._pending.values()) - _deadlines(chosen)
            if rest and slack(rest, self._next + 1, self._per_step, min(rest)) < 0:
                return None
        return chosen

    def _hear(self) -> None:
        """Waits for the next thing that ends, and sees to it."""
        left = None  # what else is waited for has a deadline of its own
        if self._under_way:
            left = max(0.0, self._heard + self._timeout_s - time.monotonic())
        try:
            ended = self._events.get(timeout=left)
        except queue.Empty:
            named = ", ".join(str(p.prompt.id) for p in list(self._under_way.values())[:_NAMED])
            raise RunError(
                f"no group was finished in {self._timeout_s:g} s (twice rollout.timeout_s) while "
                f"{len(self._under_way)} are under way, prompts {named}, ...: the engines hang, or "
                "need longer for one than that"
            ) from None
        pending = self._under_way.pop(ended, None)
        if pending is not None:
            group = ended.result()
            if self._pending.get(pending.prompt.id) is pending:
                pending.deadline = self._next - lag([group], self._next) + self._max_lag
                self._value(pending, group)
                self._drop_equal()
                self._give_up_late()
            self._heard = time.monotonic()  # judging may have taken its time
        self._fill()

    def _value(self, pending: Pending, group: Group) -> None:
        """Has a finished group judged, and notes what its prompt is worth."""
        start = time.perf_counter()
        pending.judged = self._judge(group)
        self._judging.seconds += time.perf_counter() - start
        judged = pending.judged
        known = judged.rewards_G[np.isfinite(judged.rewards_G)].astype(np.float64)
        pending.equal = known.size < 2 or bool(np.ptp(known) <= EQUAL)
        main = judged.rewards_GR[:, 0].astype(np.float64)
        main = main[np.isfinite(main)]
        pending.reward = float(main.mean()) if main.size else math.nan
        self._stream.measured(pending.prompt.id, pending.reward)

    def _drop_equal(self) -> None:
        """Drops finished groups of equal rewards, until it was done often enough for a step."""
        if not self._resample_equal:
            return
        dropped = self._judging.dropped
        for pending in [pending for pending in self._pending.values() if pending.equal]:
            if len(dropped) == self._most_dropped:
                return self._warn_of_equal()
            del self._pending[pending.prompt.id]
            self._ledger.drop([pending.prompt.id], "equal_rewards")
            dropped.append(pending.reward)

    def _warn_of_equal(self) -> None:
        if not self._warned:
            self._warned = True
            self._warn(
                f"version {self._next}: {self._most_dropped} groups of equal rewards were dropped, "
                "rollout.max_resample batches of them, and this step is trained with what comes: "
                "the policy can do nearly all of the tasks, or nearly none; look at "
                "rollout/dropped_all_1 and rollout/dropped_all_0"
            )

    def _fill(self) -> None:
        """Asks for as many groups as can be trained in time."""
        if self._coming is not None and self._coming[1].done():
            (version, published), self._coming = self._coming, None
            published.result()
            self._serving = version
        if self._serving is None:
            return
        if self._in_batches and any(p.judged is None for p in self._pending.values()):
            return  # or how many are sampled together would depend on when which was heard of
        deadline = self._serving + self._max_lag
        in_time = slack(_deadlines(self._pending.values()), self._next, self._per_step, deadline)
        steps = self._steps if self._beyond_a_step else min(self._steps, 1)
        count = min(in_time, steps * self._per_step - len(self._pending))
        if count <= 0:
            return
        again = [self._again.popleft() for _ in range(min(count, len(self._again)))]
        self._draw(count - len(again))
        new = [self._drawn.popleft() for _ in range(count - len(again))]
        self._ledger.again([prompt.id for prompt in again], self._serving)
        self._ledger.dispatch([prompt.id for prompt in new], self._sampling.n, self._serving)
        requests = requests_for(self._seed, again + new, self._sampling, self._straggler_s)
        for request, future in zip(requests, self._engines.submit(requests), strict=True):
            pending = self._watch(Pending(request.prompt, deadline, future))
            self._pending[request.prompt.id] = pending

    def _watch(self, pending: Pending) -> Pending:
        if not self._under_way:
            self._heard = time.monotonic()
        self._under_way[pending.future] = pending
        pending.future.add_done_callback(self._events.put)
        return pending

    def _draw(self, count: int) -> None:
        """Has at least `count` prompts ready."""
        if count > len(self._drawn):
            self._drawn.extend(self._stream.take(count - len(self._drawn)))

    def _give_up_late(self) -> None:
        late = self._late()
        if late and self._too_old == "wait":
            raise RunError(self._stale(min(pending.deadline for pending in late) - self._max_lag))
        for pending in late:
            del self._pending[pending.prompt.id]
            if self._under_way.pop(pending.future, None) is not None:
                pending.future.cancel()
        if self._too_old == "resample":
            self._again.extend(pending.prompt for pending in late)
        else:
            self._ledger.drop([pending.prompt.id for pending in late], "too_old")

    def _late(self) -> list[Pending]:
        """The fewest without which all others can be trained in time, the youngest."""
        due = _deadlines(self._pending.values())
        if not due or slack(due, self._next, self._per_step, min(due)) >= 0:
            return []
        kept: Counter[int] = Counter()
        late = []
        for pending in self._pending.values():
            kept[pending.deadline] += 1
            if slack(kept, self._next, self._per_step, min(kept)) < 0:
                kept[pending.deadline] -= 1
                late.append(pending)
        return late

    def _stale(self, oldest: int) -> str:
        return (
            f"version {self._next}: an engine returned tokens sampled {self._next - oldest} weight "
            "versions ago, older than it was asked for, where rollout.max_lag = "
            f"{self._max_lag} is allowed; nothing of this step was trained on"
        )


def _deadlines(pending: Any) -> Counter[int]:
    return Counter(p.deadline for p in pending)
