"""The engines as Ray actors: started, updated, watched, and given work.

The driver's side: no jax, no torch, no vllm. Engines fail: one that dies, hangs or cannot load
leaves the roster with its reason, its work goes to the others, and another is started in its place,
which joins at the first publish after it is ready. Only a fleet with nobody left ends a run.
"""

import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from bridge.channels import Ticket
from bridge.engines.vllm import (
    EngineDead,
    EngineSettings,
    RequestRefused,
    StaleVersion,
    VllmEngine,
    actor_environment,
)
from bridge.guard import guarded
from bridge.roster import Engine, FleetError, Roster
from bridge.transaction import EngineFailed, EngineLost, begun
from jaxrl.types import Group, Prompt, Rollout, Sampling

Expected = Sequence[Sequence[Any]]  # [[name, dtype, shape], ...]: what every version must hold
_DEFAULT_STORE_BYTES = 1 << 30
_SHUTDOWN_S = 10.0
_QUARANTINES = 2  # of engines in one place, and it is left empty: it is not the engine's fault
_EXAMINE_SHARE = 0.9  # of the time for an answer, so that one who is late can say so


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FleetSettings:
    engines: int = 1
    cpus_per_engine: float = 1
    gpus_per_engine: float = 0
    start_timeout_s: float = 300.0  # until an engine is ready
    request_timeout_s: float = 600.0  # for what is sent to one engine at once
    max_restarts: int = 3  # engines that are started in the place of one, one after the other
    ray_address: str | None = None  # None: a Ray of our own on this machine
    object_store_bytes: int | None = None  # of a Ray of our own; None: 1 GiB


@dataclasses.dataclass(frozen=True, slots=True)
class Dispatch:
    """Prompts that one engine is working on."""

    name: str
    version: int
    indices: list[int]
    completions: int
    deadline: float  # on the monotonic clock


class Fleet:
    """The engines of one run. `generate` may be called by several threads at once."""

    def __init__(
        self,
        settings: FleetSettings,
        engine_settings: EngineSettings | Sequence[EngineSettings],
        model: str | Mapping[str, bytes],
        expected: Expected,
        warn: Callable[[str], None] = print,
    ):
        """Nothing starts yet.

        Args:
          engine_settings: of each engine; of several, engine i has item i modulo their number.
          model: see VllmEngine.
          expected: see VllmEngine.stage.
          warn: is told which engines are replaced, and which are not.
        """
        self._settings = settings
        several = isinstance(engine_settings, Sequence)
        self._engine_settings = list(engine_settings) if several else [engine_settings]
        self._model = model if isinstance(model, str) else dict(model)
        self._expected = _plain(expected)
        self._warn = warn
        self._roster = Roster()
        self._owns_ray = False
        self._replacing = False  # only what has been ready once is worth another try
        self._lifecycle = threading.RLock()  # held by whoever starts or ends engines

    def start(self) -> None:
        """Starts or joins Ray and creates the actors, without waiting for them."""
        self._connect()
        self.add(self._settings.engines)

    def add(self, count: int = 1) -> None:
        """Starts so many more engines, without waiting: each joins at the first publish after it is
        ready."""
        with self._lifecycle:
            for _ in range(count):
                self._launch(self._roster.slots)

    def _launch(self, slot: int) -> Engine:
        settings = self._settings
        actor_class = ray.remote(VllmEngine).options(
            num_cpus=settings.cpus_per_engine,
            num_gpus=settings.gpus_per_engine,
            runtime_env={"env_vars": actor_environment(settings.gpus_per_engine == 0)},
            max_restarts=0,  # by Ray, which knows nothing of versions
        )
        before = len(self._roster.of_slot(slot))
        name = f"engine-{slot}.{before}" if before else f"engine-{slot}"
        engine_settings = self._engine_settings[slot % len(self._engine_settings)]
        actor: Any = actor_class.remote(name, engine_settings, self._model)
        ready_by = time.monotonic() + settings.start_timeout_s
        engine = Engine(name, actor, actor.start.remote(), slot, ready_by)
        self._roster.add(engine)
        return engine

    def _connect(self) -> None:
        if ray.is_initialized():
            return
        quiet = {"log_to_driver": False, "logging_level": "error"}
        if self._settings.ray_address is not None:
            try:
                ray.init(address=self._settings.ray_address, **quiet)
            except ConnectionError as error:
                raise FleetError(
                    f"no Ray cluster lets this process in at {self._settings.ray_address} "
                    f"({error}); is one started there, of this release of Ray, and does it want a "
                    "token (set RAY_AUTH_MODE=token, and have its token here)?"
                ) from error
        else:
            wanted = self._settings.engines * self._settings.cpus_per_engine
            with guarded():
                ray.init(
                    address="local",  # without it Ray may join a cluster that it finds here
                    # Ray only counts these, and would never start an engine that has no CPU.
                    num_cpus=max(os.cpu_count() or 1, int(wanted) + 1),
                    object_store_memory=self._settings.object_store_bytes or _DEFAULT_STORE_BYTES,
                    include_dashboard=False,
                    **quiet,
                )
        self._owns_ray = True

    def wait_ready(self) -> list[dict[str, Any]]:
        """Waits until every engine can serve; returns what each says of itself.

        Raises:
          FleetError: naming each engine that failed or is late, and why.
        """
        infos = []
        for engine in self._roster.starting:
            try:
                infos.append(self._await_start(engine))
            except EngineFailed:
                continue  # and look at the others
        if self._roster.failures:
            raise FleetError("; ".join(self._roster.failures.values()))
        self._replacing = True
        return infos

    def _await_start(self, engine: Engine) -> dict[str, Any]:
        left = engine.ready_by - time.monotonic()
        try:
            info = self._answer(engine.name, engine.started, left, "starting")
        except EngineFailed as error:
            self._end(engine.name, str(error))
            raise
        self._roster.acknowledge(engine.name, info["version"])
        return info

    def members(self) -> list[str]:
        """The engines that a version can be offered to: those that are ready by now."""
        self._take_in(0.0)
        return self._roster.ready

    def wait_members(self) -> list[str]:
        """Waits for engines that are starting; returns those that are ready first, or none if
        nobody is starting or none is ready within start_timeout_s."""
        end = time.monotonic() + self._settings.start_timeout_s
        while self._roster.starting and (left := end - time.monotonic()) > 0:
            if joined := self._take_in(left):
                return joined
        return []

    def _take_in(self, timeout_s: float) -> list[str]:
        """Waits for one of the engines that are starting to be ready, or to fail; returns who is
        ready."""
        starting = self._roster.starting
        if not starting:
            return []
        now = time.monotonic()
        wait_s = min(timeout_s, *(max(0.0, e.ready_by - now) for e in starting))
        started = [e.started for e in starting]
        done, _ = ray.wait(started, num_returns=1, timeout=wait_s)
        done, _ = ray.wait(started, num_returns=len(started), timeout=0) if done else ([], [])
        ready = []
        for engine in starting:
            if engine.started in done or engine.ready_by <= time.monotonic():
                with contextlib.suppress(EngineFailed):  # replaced, if it may be
                    self._await_start(engine)
                    ready.append(engine.name)
        return ready

    @property
    def alive(self) -> list[str]:
        """The engines that have not ended, whether they serve or not."""
        return self._roster.alive

    @property
    def serving(self) -> list[str]:
        """The engines that get requests."""
        return self._roster.serving

    @property
    def failures(self) -> dict[str, str]:
        """The engines that left the fleet, and why."""
        return self._roster.failures

    @property
    def replaced(self) -> int:
        """Engines that were started in the place of others."""
        return self._roster.replaced

    @property
    def quarantined(self) -> int:
        """Engines that held something else than they were sent."""
        return self._roster.quarantined

    def holds(self, name: str) -> int | None:
        """The version that the engine loaded last; None before the first."""
        return self._roster[name].version

    def stage(
        self,
        name: str,
        ticket: Ticket,
        fetch_s: float,
        timeout_s: float,
        expected: Expected | None = None,
    ) -> None:
        """Has an engine fetch and check a version, while it serves the old one.

        Args:
          fetch_s: for it to fetch the version; it takes up to twice as long to say that it is late.
          expected: what this one version must hold, where it is not what every version must.

        Raises:
          EngineFailed: it refuses; it serves on. EngineLost: no answer within `timeout_s`.
        """
        wanted = self._expected if expected is None else _plain(expected)
        self._ask(name, timeout_s, "stage", ticket.to_json(), wanted, fetch_s)

    def commit(self, name: str, version: int, timeout_s: float) -> dict[str, Any]:
        """Has an engine that staged `version` serve it; see VllmEngine.commit.

        Requests under way go on. New ones wait until `admit` says who serves what.

        Raises:
          EngineFailed: it had not staged it, and keeps its old version. EngineLost: it failed half
          way through loading, or gave no answer within `timeout_s`.
        """
        self._roster.suspend()
        said = self._ask(name, timeout_s, "commit", version)
        self._roster.acknowledge(name, version)
        return said

    def score(self, name: str, tokens: Sequence[int], timeout_s: float) -> np.ndarray:
        """Log-probabilities of `tokens` on an engine; see VllmEngine.score."""
        return self._ask(name, timeout_s, "score", [int(token) for token in tokens])

    def examine(self, name: str, timeout_s: float) -> dict[str, Any]:
        """What an engine's model holds, against what it loaded; see VllmEngine.examine."""
        return self._ask(name, timeout_s, "examine", _EXAMINE_SHARE * timeout_s)

    def admit(self, name: str, version: int) -> None:
        """Gives an engine requests, beside those that serve `version` already; others get none.

        Raises:
          EngineLost: it has ended.
          FleetError: it has not acknowledged `version`; nothing has changed.
        """
        if reason := self._roster.failures.get(name):
            raise EngineLost(reason)
        self._roster.admit([name], version)

    def withdraw(self, name: str) -> None:
        """Gives an engine no new requests; it lives, and may have the next version."""
        self._roster.withdraw(name)

    def quarantine(self, name: str, why: str) -> None:
        """Ends an engine that holds something else than it was sent."""
        self._end(name, f"{name}: {why}", "quarantined")

    def begin(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]
    ) -> Callable[[], list[Group]]:
        """As `generate`, in a thread; what is returned waits for its result, or raises."""
        return begun(self.generate, prompts, sampling, seeds).result

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]
    ) -> list[Group]:
        """The completions of each prompt, in the order of `prompts`.

        Completion i of a prompt is sampled with the prompt's seed + i; all of them on one engine.
        What an engine did not finish goes to the others with the same seeds.

        Raises:
          EnginesGone: no engine is left.
          FleetError: no engine would serve one of the requests.
        """
        requests = [
            _request(prompt, sampling, seed) for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        groups: dict[int, Group] = {}
        pending: dict[Any, Dispatch] = {}
        waiting = list(range(len(prompts)))
        try:
            while waiting or pending:
                if waiting:
                    pending |= self._dispatch(requests, waiting)
                waiting = []
                for reference in _next_done(pending):
                    dispatch = pending.pop(reference)
                    self._roster.release(dispatch.name, dispatch.completions)
                    results = self._collect(dispatch, reference)
                    if results is None:
                        waiting += dispatch.indices
                        continue
                    for index, result in zip(dispatch.indices, results, strict=True):
                        groups[index] = _group(prompts[index], sampling, result)
        finally:
            for dispatch in pending.values():
                self._roster.release(dispatch.name, dispatch.completions)
        return [groups[index] for index in range(len(prompts))]

    def _dispatch(self, requests: list[dict[str, Any]], waiting: list[int]) -> dict[Any, Dispatch]:
        """Sends the waiting requests, one message to each serving engine."""
        timeout_s = self._settings.request_timeout_s
        version, shares = self._roster.assign([requests[i]["n"] for i in waiting], timeout_s)
        sent = {}
        for name, share in shares.items():
            indices = [waiting[position] for position in share]
            work = [requests[index] | {"version": version} for index in indices]
            completions = sum(request["n"] for request in work)
            reference = self._roster[name].actor.generate_many.remote(work)
            deadline = time.monotonic() + timeout_s
            sent[reference] = Dispatch(name, version, indices, completions, deadline)
        return sent

    def _collect(self, dispatch: Dispatch, reference: Any) -> list[Any] | None:
        """The results of a dispatch, or None if its prompts must be sent again."""
        try:
            return ray.get(reference, timeout=0)
        except RequestRefused as error:
            raise FleetError(f"{dispatch.name} refused a request: {_cause(error)}") from error
        except RayError as error:
            # A request that crossed an update on its way is nobody's fault.
            crossed = isinstance(error, StaleVersion) and dispatch.version != self._roster.version
            if not crossed:
                self._fail(dispatch.name, f"sampling {len(dispatch.indices)} prompts", error)
            return None

    def _ask(self, name: str, timeout_s: float, method: str, *args: Any) -> Any:
        """Calls a method of an engine; see `_answer`."""
        reference = getattr(self._roster[name].actor, method).remote(*args)
        return self._answer(name, reference, timeout_s, method)

    def _answer(self, name: str, reference: Any, timeout_s: float, doing: str) -> Any:
        """Raises EngineFailed if the engine refuses, EngineLost if it died or is late."""
        try:
            return ray.get(reference, timeout=max(0.0, timeout_s))
        except RayError as error:
            if isinstance(error, RayTaskError) and not isinstance(error, EngineDead):
                raise EngineFailed(_cause(error)) from error
            raise EngineLost(self._fail(name, doing, error)) from error

    def _fail(self, name: str, doing: str, error: RayError) -> str:
        """Ends an engine; returns the reason."""
        if isinstance(error, GetTimeoutError):
            reason = f"{name} did not finish before its deadline: {doing}"
        elif isinstance(error, RayActorError):
            reason = f"{name} died: {doing}. {_how_it_died(error)}"
        else:
            reason = f"{name} failed: {doing}: {_cause(error)}"
        self._end(name, reason)
        return reason

    def _end(
        self, name: str, reason: str, state: Literal["failed", "quarantined"] = "failed"
    ) -> None:
        """Takes an engine out for good, and starts another in its place if there may be one more.

        Several threads may find out about the same engine.
        """
        with self._lifecycle:
            engine = self._roster[name]
            if engine.ended:
                return
            if self._replacing:
                self._replace(engine, reason, state)
            self._roster.end(name, reason, state)
            ray.kill(engine.actor)

    def _replace(self, engine: Engine, reason: str, state: str) -> None:
        """Ahead of the old one's end, or those who wait for work would see nobody left."""
        had = self._roster.of_slot(engine.slot)
        quarantines = (state == "quarantined") + sum(e.state == "quarantined" for e in had)
        if quarantines >= _QUARANTINES:
            then = "not replaced: it is the second in its place that did not hold what it was sent"
        elif len(had) > self._settings.max_restarts:
            then = f"not replaced: vllm.max_restarts = {self._settings.max_restarts} is reached"
        else:
            then = f"{self._launch(engine.slot).name} starts in its place"
        self._warn(f"{reason}; {then}")

    def close(self) -> None:
        """Ends every engine, and Ray if this fleet started it."""
        with self._lifecycle:
            self._replacing = False
            engines = self._roster.clear()
        leaving = [e.actor.shutdown.remote() for e in engines if not e.ended]
        if leaving:
            ray.wait(leaving, num_returns=len(leaving), timeout=_SHUTDOWN_S)
        for engine in engines:
            ray.kill(engine.actor)
        if self._owns_ray:
            ray.shutdown()
            self._owns_ray = False


def _next_done(pending: Mapping[Any, Dispatch]) -> list[Any]:
    """Waits for a dispatch to be done or past its deadline; returns those that are."""
    first = min(dispatch.deadline for dispatch in pending.values())
    timeout = max(0.0, first - time.monotonic())
    done, _ = ray.wait(list(pending), num_returns=1, timeout=timeout)
    now = time.monotonic()
    return done or [ref for ref, dispatch in pending.items() if dispatch.deadline <= now]


def _request(prompt: Prompt, sampling: Sampling, seed: int) -> dict[str, Any]:
    return {
        "tokens": list(prompt.tokens),
        "n": sampling.n,
        "max_new_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "stop_tokens": list(sampling.stop_tokens),
        "seed": int(seed),
    }


def _group(prompt: Prompt, sampling: Sampling, results: list[dict[str, Any]]) -> Group:
    rollouts = tuple(Rollout(**result) for result in results)
    lengths = [{len(r.tokens), len(r.logprobs), len(r.versions)} for r in rollouts]
    if len(rollouts) != sampling.n or any(len(length) != 1 for length in lengths):
        raise FleetError(
            f"prompt {prompt.id}: {len(rollouts)} of {sampling.n} completions came back, with "
            f"tokens, log-probs and versions of lengths {lengths}"
        )
    return Group(prompt, rollouts)


def _how_it_died(error: RayActorError) -> str:
    """Ray's account of a dead actor, without its guesses at the cause."""
    return str(error).strip().splitlines()[-1].split(" Some common causes")[0].strip()


def _cause(error: Exception) -> str:
    """The engine's own sentence, without Ray's account of how it travelled."""
    return str(error.cause) if isinstance(error, RayTaskError) else str(error)


def _plain(expected: Expected) -> list[list[Any]]:
    return [[name, dtype, list(shape)] for name, dtype, shape in expected]
