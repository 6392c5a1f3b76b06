"""The engines as Ray actors: started, updated, watched, and given work.

The driver's side: no jax, no torch, no vllm. Engines fail: one that dies, hangs or cannot load
leaves the roster with its reason, its work goes to the others, and another is started in its place.
One thread waits for all of them: for those that start, and for what those that are up say next.
"""

import contextlib
import dataclasses
import functools
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from bridge.channels import Ticket
from bridge.engines.vllm import EngineDead, VllmEngine, actor_environment
from bridge.guard import guarded
from bridge.requests import Requests
from bridge.roster import Engine, EngineState, FleetError, Roster
from bridge.transaction import EngineFailed, EngineLost, begun
from jaxrl.types import EnginesGone, Group, Prompt, Request, Sampling

Expected = Sequence[Sequence[Any]]  # [[name, dtype, shape], ...]: what every version must hold
_DEFAULT_STORE_BYTES = 1 << 30
_SHUTDOWN_S = 10.0
_QUARANTINES = 2  # of engines in one place, and it is left empty: it is not the engine's fault
_EXAMINE_SHARE = 0.9  # of the time for an answer, so that one who is late can say so
_POLL_S = 0.5  # for which an engine with nothing new to say keeps its answer
_TURN_S = 0.2  # between two looks at the deadlines, at most
_REACH_S = 5.0  # for a Ray cluster to take a connection
_LEAST_SHARE = 1e-4  # of a GPU, that Ray counts
_NODE_DIED = "its node has died"  # of Ray's account of a dead actor
_LONG_TURN_S = 1.0  # what a turn counts at most: a driver that was stopped finds no engine late


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FleetSettings:
    min_engines: int = 1  # that a run begins with
    keep_engines: int = 1  # of these, that it cannot long be without
    max_engines: int = 1  # that are started; those that Ray has no room for yet come later
    cpus_per_engine: float = 1
    gpus_per_engine: float = 0
    start_timeout_s: float = 300.0  # from an engine's first sign of life until it is ready
    request_timeout_s: float = 600.0  # for a request, at one engine
    suspect_s: float = 2.0  # of silence, after which an engine gets no new requests
    silence_s: float = 60.0  # or of no progress, after which it is ended
    max_restarts: int = 3  # engines that are started in the place of one, one after the other
    ray_address: str | None = None  # None: a Ray of our own on this machine
    object_store_bytes: int | None = None  # of a Ray of our own; None: 1 GiB


class Fleet:
    """The engines of one run. Every method may be called from any thread."""

    def __init__(
        self,
        settings: FleetSettings,
        engine_settings: Any,
        model: str | Mapping[str, bytes],
        expected: Expected,
        warn: Callable[[str], None] = print,
        engine_class: type = VllmEngine,
        servers: Sequence[Any] = (),
    ):
        """Nothing starts yet.

        Args:
          engine_settings: of each engine; of several, engine i has item i modulo their number.
          model: see VllmEngine.
          expected: see VllmEngine.stage.
          warn: is told which engines are replaced, and which are not.
          engine_class: has the methods of VllmEngine, and is made from a name, settings and model.
          servers: ServerSettings of each server that is an engine (`bridge.engines.http`); they are
            the first of `max_engines`.
        """
        self._settings = settings
        several = isinstance(engine_settings, Sequence)
        self._engine_settings = list(engine_settings) if several else [engine_settings]
        self._model = model if isinstance(model, str) else dict(model)
        self._expected = _plain(expected)
        self._warn, self._engine_class, self._servers = warn, engine_class, list(servers)
        self.newcomers: Callable[[str], None] | None = None  # told who came up after `wait_ready`
        self._roster, self._requests = Roster(settings.keep_engines), Requests()
        self._owns_ray = False
        self._running = False  # only what has been ready once is worth another try
        self._start_by = 0.0  # for the first `min_engines`; on the monotonic clock
        # All below, and the roster and the requests, are touched with the lock held.
        self._changed = threading.Condition(threading.RLock())
        self._depth = 0  # of changes within changes
        self._now = 0.0  # seconds, on a watch that stands still while this process does
        self._floor = 0  # no request may be sampled by older weights
        self._broken = ""  # why the thread ended
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fleet", daemon=True)
        self._before = Said()

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Holds the lock while something changes; then gives out what there is room for, and tells
        those who wait, without it."""
        with self._changed:
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
            if self._depth:
                return
            self._dispatch()
            settled = self._requests.take_settled()
            self._changed.notify_all()
        for future, outcome in settled:
            with contextlib.suppress(InvalidStateError):  # it was cancelled just now
                if isinstance(outcome, Exception):
                    future.set_exception(outcome)
                else:
                    future.set_result(outcome)

    def _dispatch(self) -> None:
        if why := self._why_gone():
            for name, requests in self._requests.give_up(lambda: EnginesGone(why)).items():
                self._cancel(self._roster[name], requests)
            return
        deadline = self._now + self._settings.request_timeout_s
        for name, messages in self._requests.assign(self._roster.serving(), deadline).items():
            engine = self._roster[name]
            sent = engine.actor.submit.remote(messages)
            engine.sending[sent] = [message["id"] for message in messages]

    def _cancel(self, engine: Engine, requests: Sequence[str] = ()) -> None:
        """Has the engine drop requests, once it surely has them: Ray may swap two messages."""
        engine.unwanted.update(requests)
        if there := engine.unwanted.difference(*engine.sending.values()):
            engine.unwanted -= there
            engine.actor.cancel.remote(sorted(there))

    def start(self) -> None:
        """Starts or joins Ray and creates the actors, without waiting for them."""
        self._connect()
        self._start_by = time.monotonic() + self._settings.start_timeout_s
        self.add(self._settings.max_engines)
        self._thread.start()

    def add(self, count: int = 1) -> None:
        """Starts so many more engines, without waiting: each joins once it is ready."""
        with self._changing():
            for _ in range(count):
                self._launch(self._roster.slots)

    def remove(self, name: str) -> None:
        """Ends an engine, and starts none in its place; what it had goes to the others.

        Raises:
          FleetError: there is none of this name.
        """
        with self._changing():
            engine = self._roster.find(name)
            engine.removed = True
            self._end(engine, f"{name} was removed")

    def _launch(self, slot: int) -> Engine:
        before = len(self._roster.of_slot(slot))
        name = f"engine-{slot}.{before}" if before else f"engine-{slot}"
        if slot < len(self._servers):
            actor = self._actor_of_server(name, self._servers[slot])
        else:
            actor = self._actor(name, slot - len(self._servers))
        # Answered as soon as there is a process, for which Ray may have to wait for room.
        engine = Engine(name, slot, actor, pending=actor.acknowledged.remote())
        self._roster.add(engine)
        return engine

    def _actor(self, name: str, index: int) -> Any:
        settings = self._settings
        actor_class: Any = ray.remote(self._engine_class).options(
            num_cpus=settings.cpus_per_engine,
            num_gpus=settings.gpus_per_engine,
            runtime_env={"env_vars": actor_environment(settings.gpus_per_engine == 0)},
            max_restarts=0,  # by Ray, which knows nothing of versions
        )
        engine_settings = self._engine_settings[index % len(self._engine_settings)]
        return actor_class.remote(name, engine_settings, self._model)

    def _actor_of_server(self, name: str, server: Any) -> Any:
        from bridge.engines.http import HttpEngine

        actor_class: Any = ray.remote(HttpEngine).options(num_cpus=0, max_restarts=0)
        return actor_class.remote(name, server, self._model)

    def _connect(self) -> None:
        if ray.is_initialized():
            return
        quiet = {"log_to_driver": False, "logging_level": "error"}
        if self._settings.ray_address is not None:
            _require_listener(self._settings.ray_address)
            try:
                with _own_sigterm():
                    ray.init(address=self._settings.ray_address, **quiet)
            except ConnectionError as error:
                raise FleetError(
                    f"no Ray cluster lets this process in at {self._settings.ray_address} "
                    f"({error}); is one started there, of this release of Ray, and does it want a "
                    "token (set RAY_AUTH_MODE=token, and have its token here)?"
                ) from error
        else:
            wanted = self._settings.max_engines * self._settings.cpus_per_engine
            with guarded(), _own_sigterm():
                ray.init(
                    address="local",  # without it Ray may join a cluster that it finds here
                    # Ray only counts these, and would never start an engine that has no CPU.
                    num_cpus=max(os.cpu_count() or 1, int(wanted) + 1),
                    object_store_memory=self._settings.object_store_bytes or _DEFAULT_STORE_BYTES,
                    include_dashboard=False,
                    **quiet,
                )
        self._owns_ray = True
        if self._settings.ray_address is None and (lacking := self._lacking_gpus()):
            self.close()
            raise FleetError(lacking)

    def _lacking_gpus(self) -> str:
        """Why this machine, to which no other can be added, is too small for the run, or nothing.

        CPUs are only counted, and what the engines ask of them is always there.
        """
        each, there = self._settings.gpus_per_engine, ray.cluster_resources().get("GPU", 0.0)
        engines = max(0, self._settings.min_engines - len(self._servers))
        if each * engines <= there + _LEAST_SHARE:
            return ""
        return (
            f"this machine has {there:g} GPUs, and {engines} engine(s) of {each:g} need "
            f"{each * engines:g}; set vllm.gpus_per_engine: 0 for vLLM's CPU build, lower "
            "vllm.engines, or name a cluster in vllm.ray_address"
        )

    def wait_ready(self) -> list[dict[str, Any]]:
        """Waits for `min_engines` to be up; returns what each that is says of itself.

        Others are started in the place of those that were up by then, and ended.

        Raises:
          FleetError: naming each engine that failed or is late, and why.
        """
        least = self._settings.min_engines

        def decided() -> bool:
            up = len(self._roster.up)
            return up >= least or up + len(self._roster.starting) < least or bool(self._broken)

        with self._changed:
            self._changed.wait_for(decided, max(0.0, self._start_by - time.monotonic()))
            up = self._roster.up
            failures = list(self._roster.failures.values())
            if len(up) < least:
                late = [] if decided() else [self._late(e) for e in self._roster.starting]
                raise FleetError("; ".join([*failures, *late]) or self._broken)
            for engine in up:
                engine.offered = True
        with self._changing():
            if not self._running:
                self._running = True
                for engine in self._roster:
                    if engine.ended and not engine.removed:
                        self._make_up_for(engine)
        return [dict(engine.info) for engine in up]

    def _make_up_for(self, engine: Engine) -> None:
        """For one that ended before the run began: it may be minutes from when the engines are up
        until the trainer is."""
        if engine.info:
            self._replace(engine)
        else:
            self._warn(f"{engine.reason}; not replaced: it never started")

    def _late(self, engine: Engine) -> str:
        if engine.has_process:
            return (
                f"{engine.name} did not finish before its deadline: starting; raise "
                f"vllm.start_timeout_s ({self._settings.start_timeout_s:g}) if it only needs longer"
            )
        waited = f"{engine.name} has no process after {self._settings.start_timeout_s:g} s"
        if engine.slot < len(self._servers):
            return f"{waited}: Ray did not start one, though it needs no CPU and no GPU"
        return (
            f"{waited}: has a node of Ray {self._settings.cpus_per_engine:g} CPUs and "
            f"{self._settings.gpus_per_engine:g} GPUs free? Add nodes, lower vllm.engines, "
            "or set vllm.gpus_per_engine (0 for vLLM's CPU build)"
        )

    def members(self) -> list[str]:
        """The engines that a version can be offered to: those that are up by now."""
        with self._changed:
            up = self._roster.up
            for engine in up:
                engine.offered = True
            return [engine.name for engine in up]

    def wait_members(self) -> list[str]:
        """Waits for engines that are starting; returns those that came up and were not returned
        before, or none if nobody is starting or none is up within start_timeout_s."""

        def new() -> list[Engine]:
            return [engine for engine in self._roster.up if not engine.offered]

        with self._changed:
            self._changed.wait_for(
                lambda: new() or not self._roster.starting, self._settings.start_timeout_s
            )
            joined = new()
            for engine in joined:
                engine.offered = True
            return [engine.name for engine in joined]

    @property
    def alive(self) -> list[str]:
        """The engines that have not ended, whether they serve or not."""
        with self._changed:
            return [engine.name for engine in self._roster if not engine.ended]

    @property
    def serving(self) -> list[str]:
        """The engines that get requests."""
        with self._changed:
            return sorted(self._roster.serving())

    @property
    def failures(self) -> dict[str, str]:
        """The engines that left the fleet, and why."""
        with self._changed:
            return self._roster.failures

    @property
    def replaced(self) -> int:
        """Engines that were started in the place of others."""
        with self._changed:
            return self._roster.replaced

    @property
    def quarantined(self) -> int:
        """Engines that held something else than they were sent."""
        with self._changed:
            return self._roster.quarantined

    def holds(self, name: str) -> int | None:
        """The version that the engine loaded last; None before the first."""
        with self._changed:
            return self._roster.find(name).version

    def status(self) -> dict[str, float]:
        """What the fleet is doing, under the names of the metrics.

        Idle fraction and prefix hit rate are of the time since the last call; kv_use is the
        largest of the engines'; tokens and requeued count over the run.
        """
        with self._changed:
            before, self._before = self._before, Said.of(self._roster)
            since, up = self._before.since(before), self._roster.up
            states = {
                f"fleet/{state}": float(sum(e.state is state for e in self._roster))
                for state in EngineState
            }
            return states | {
                "fleet/queued": float(self._requests.schedule.queued),
                "fleet/running": float(sum(e.said.get("running", 0) for e in up)),
                "fleet/waiting": float(sum(e.said.get("waiting", 0) for e in up)),
                "fleet/tokens": float(self._before.tokens),
                "fleet/idle_fraction": min(1.0, since.idle_s / since.up_s) if since.up_s else 0.0,
                "fleet/kv_use": max((float(e.said.get("kv_use", 0.0)) for e in up), default=0.0),
                "fleet/prefix_hit_rate": since.prefix_hits / max(1, since.prompt_tokens),
                "fleet/requeued": float(self._requests.requeued),
            }

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

        Its requests under way go on. It gets no new ones until `admit`; the others do.

        Raises:
          EngineFailed: it had not staged it, and keeps its old version. EngineLost: it failed half
          way through loading, or gave no answer within `timeout_s`.
        """
        with self._changing():
            engine = self._living(name)
            engine.begins_commit(version)
        acknowledged = None
        try:
            said = self._ask(name, timeout_s, "commit", version)
            acknowledged = version
            return said
        finally:
            with self._changing():
                engine.ends_commit(acknowledged, self._now)

    def score(self, name: str, tokens: Sequence[int], timeout_s: float) -> np.ndarray:
        """Log-probabilities of `tokens` on an engine; see VllmEngine.score."""
        return self._ask(name, timeout_s, "score", [int(token) for token in tokens])

    def examine(self, name: str, timeout_s: float) -> dict[str, Any]:
        """What an engine's model holds, against what it loaded; see VllmEngine.examine."""
        return self._ask(name, timeout_s, "examine", _EXAMINE_SHARE * timeout_s)

    def admit(self, name: str, version: int) -> None:
        """The engine gets requests from now on, and what it sampled with `version` is delivered.

        Raises:
          EngineLost: it has ended. FleetError: it has not acknowledged `version`.
        """
        with self._changing():
            engine = self._living(name)
            engine.admit(version)
            self._requests.decide(engine)

    def withdraw(self, name: str) -> None:
        """The engine gets no new requests until it is admitted again. Those it has go on; what
        versions sampled that it did not prove is sampled again."""
        with self._changing():
            engine = self._roster.find(name)
            engine.withdraw()
            self._requests.decide(engine)

    def quarantine(self, name: str, why: str) -> None:
        """Ends an engine that holds something else than it was sent."""
        with self._changing():
            self._end(self._roster.find(name), f"{name}: {why}", EngineState.QUARANTINED)

    def submit(self, requests: Sequence[Request], urgent: bool = False) -> list[Future[Group]]:
        """See `jaxrl.collect.Engines.submit`.

        Completion i of a request is sampled with its seed + i; all of them on one engine. What an
        engine did not finish goes to the others with the same seeds.

        Futures raise EnginesGone if no engine is left, or for `start_timeout_s` fewer than
        `keep_engines` were up or none was admitted; FleetError if no engine would serve the
        request.
        """
        with self._changing():
            self._floor = max(self._floor, self._roster.oldest_served() or 0)
            asked = [self._requests.add(request, self._floor, urgent) for request in requests]
        for name, future in asked:
            future.add_done_callback(functools.partial(self._forget, name))
        return [future for _, future in asked]

    def _forget(self, name: str, future: Future[Group]) -> None:
        if future.cancelled():
            with self._changing():
                if engine := self._requests.drop(name):
                    self._cancel(self._roster[engine], [name])

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]
    ) -> list[Group]:
        """`submit`, and the groups in the order of `prompts`."""
        asked = zip(prompts, seeds, strict=True)
        futures = self.submit([Request(prompt, sampling, seed) for prompt, seed in asked])
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()

    def _run(self) -> None:
        """What the thread does until the fleet is closed."""
        began = time.monotonic()
        try:
            while not self._closing.is_set():
                answers = self._next_answers()
                now = time.monotonic()
                with self._changing():
                    self._now += min(now - began, _LONG_TURN_S)
                    began = now
                    for engine, reference, answer in answers:
                        self._heard(engine, reference, answer)
                    self._look()
        except Exception as error:
            with self._changing():
                self._broken = f"the thread that watches the engines failed: {error!r}"
            raise

    def _next_answers(self) -> list[tuple[Engine, Any, Any]]:
        """Waits for an engine to answer; returns who did, and which call with what: an error, or
        a result."""
        with self._changed:
            living = [engine for engine in self._roster if not engine.ended]
            pending = {
                ref: engine for engine in living for ref in [engine.pending, *engine.sending]
            }
        if not pending:
            self._closing.wait(_TURN_S)
            return []
        done, _ = ray.wait(list(pending), num_returns=1, timeout=_TURN_S)
        if done:  # and whoever else did
            done, _ = ray.wait(list(pending), num_returns=len(pending), timeout=0)
        return [(pending[reference], reference, _outcome(reference)) for reference in done]

    def _heard(self, engine: Engine, reference: Any, answer: Any) -> None:
        if engine.ended:
            return
        if isinstance(answer, RayError):
            self._fail(engine, self._doing(engine), answer)
            return
        if engine.sending.pop(reference, None) is not None:
            self._cancel(engine)
        elif engine.state is not EngineState.STARTING:
            self._take(engine, answer)
        elif engine.has_process:
            self._is_up(engine, answer)
        else:
            engine.has_process, engine.pending = True, engine.actor.start.remote()
            engine.ready_by = self._now + self._settings.start_timeout_s

    def _is_up(self, engine: Engine, info: Mapping[str, Any]) -> None:
        engine.is_up(info, self._now)
        engine.pending = engine.actor.poll.remote(_POLL_S)
        self._requests.schedule.join(engine.name, info["max_num_seqs"])
        self._roster.enough_at = self._now
        if self._running and self.newcomers is not None:
            begun(self.newcomers, engine.name)

    def _take(self, engine: Engine, said: Mapping[str, Any]) -> None:
        """Takes what an engine has to say, and asks it anew."""
        schedule = self._requests.schedule
        for result in said["done"]:
            self._requests.came_back(engine, result)
        schedule.said(engine.name, said["running"] + said["waiting"])
        engine.answered(said, self._now, busy=bool(schedule.has(engine.name)))
        engine.pending = engine.actor.poll.remote(_POLL_S)

    def _look(self) -> None:
        """Ends whoever is late, silent or stuck."""
        settings = self._settings
        for name, requests in self._requests.overdue(self._now).items():
            engine = self._roster[name]
            why = f"{name} did not finish before its deadline: {self._doing(engine)}"
            for request in requests:
                self._requests.failed(request, why)
            self._end(engine, why)
        for engine in self._roster:
            if engine.state is EngineState.STARTING and engine.ready_by < self._now:
                self._end(engine, self._late(engine))
            busy = bool(self._requests.schedule.has(engine.name))
            if why := engine.trouble(self._now, busy, settings.suspect_s, settings.silence_s):
                self._end(engine, f"{why}: {self._doing(engine)}")
        self._roster.looked_at(self._now)

    def _doing(self, engine: Engine) -> str:
        if engine.state is EngineState.STARTING:
            return "starting"
        if engine.state is EngineState.LOADING:
            return "loading"
        return f"sampling {len(self._requests.schedule.has(engine.name))} prompts"

    def _why_gone(self) -> str:
        """Why requests are not waited for any longer, or nothing."""
        timeout_s = self._settings.start_timeout_s
        if self._broken:
            return self._broken
        if all(engine.ended for engine in self._roster):
            why = "no engine is left"
        elif lacking := self._roster.lacking_for(timeout_s, self._now):
            why = f"for {timeout_s:g} s {lacking}"
        else:
            return ""
        late = [self._late(e) for e in self._roster.starting if not e.has_process]
        reasons = [*self._roster.failures.values(), *late]
        return (
            f"{why}: {'; '.join(reasons) or 'none failed'}. What each engine printed is in Ray's "
            "session directory, logs/worker-*.err"
        )

    def _living(self, name: str) -> Engine:
        engine = self._roster.find(name)
        if engine.ended:
            raise EngineLost(engine.reason)
        return engine

    def _ask(self, name: str, timeout_s: float, method: str, *args: Any) -> Any:
        """Calls a method of an engine.

        Raises:
          EngineFailed: the engine refuses. EngineLost: it died or is late.
        """
        with self._changed:
            engine = self._living(name)
            reference = getattr(engine.actor, method).remote(*args)
        try:
            return ray.get(reference, timeout=max(0.0, timeout_s))
        except RayError as error:
            if isinstance(error, RayTaskError) and not isinstance(error, EngineDead):
                raise EngineFailed(_cause(error)) from error
            raise EngineLost(self._fail(engine, method, error)) from error

    def _fail(self, engine: Engine, doing: str, error: RayError) -> str:
        """Ends an engine; returns the reason, of whoever found out first."""
        if isinstance(error, GetTimeoutError):
            reason = f"{engine.name} did not finish before its deadline: {doing}"
        elif isinstance(error, RayActorError):
            reason = f"{engine.name} died: {doing}. {_how_it_died(error)}"
        else:
            reason = f"{engine.name} failed: {doing}: {_cause(error)}"
        with self._changing():
            # For seconds Ray takes a node that died for one with room, and gives it new actors.
            engine.unplaced = not engine.has_process and _NODE_DIED in str(error)
            self._end(engine, reason)
        return engine.reason or reason

    def _end(
        self,
        engine: Engine,
        reason: str,
        state: EngineState = EngineState.DEAD,
    ) -> None:
        """Takes an engine out for good, and starts another in its place if there may be one more.

        Several threads may find out about the same engine, or that the fleet was closed.
        """
        if engine.ended or self._closing.is_set():
            return
        engine.advance(state)
        engine.reason = reason
        self._requests.engine_ended(engine)
        ray.kill(engine.actor)
        if self._running and not engine.removed:
            self._replace(engine)

    def _replace(self, engine: Engine) -> None:
        had = self._roster.of_slot(engine.slot)
        quarantines = sum(e.state is EngineState.QUARANTINED for e in had)
        if quarantines >= _QUARANTINES:
            then = "not replaced: it is the second in its place that did not hold what it was sent"
        elif sum(not e.unplaced for e in had) > self._settings.max_restarts:
            then = f"not replaced: vllm.max_restarts = {self._settings.max_restarts} is reached"
        else:
            then = f"{self._launch(engine.slot).name} starts in its place"
        self._warn(f"{engine.reason}; {then}")

    def close(self) -> None:
        """Ends every engine, and Ray if this fleet started it. Futures that are open raise."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(_SHUTDOWN_S)
        with self._changing():
            self._running = False
            self._requests.give_up(lambda: EnginesGone("the engines were closed"))
            engines = self._roster.clear()
        leaving = [e.actor.shutdown.remote() for e in engines if e.has_process and not e.ended]
        if leaving:
            ray.wait(leaving, num_returns=len(leaving), timeout=_SHUTDOWN_S)
        for engine in engines:
            ray.kill(engine.actor)
        if self._owns_ray:
            ray.shutdown()
            self._owns_ray = False


@dataclasses.dataclass(frozen=True, slots=True)
class Said:
    """What all engines said together, those that ended too: since the run began, or between two
    times."""

    tokens: int = 0
    prompt_tokens: int = 0
    prefix_hits: int = 0
    idle_s: float = 0.0
    up_s: float = 0.0  # of engines: two that were up for a second make two

    @classmethod
    def of(cls, engines: Roster) -> "Said":
        spoke = [engine for engine in engines if engine.said]
        names = ("tokens", "prompt_tokens", "prefix_hits", "idle_s")
        sums = {name: sum(engine.said[name] for engine in spoke) for name in names}
        return cls(**sums, up_s=sum(engine.heard - engine.up_since for engine in spoke))

    def since(self, before: "Said") -> "Said":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(before), strict=True)
        return Said(*(now - then for now, then in pairs))


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Ray takes SIGTERM for itself, and ends this process where it stands: it is taken back."""
    handler = signal.getsignal(signal.SIGTERM)  # None: it is not Python's to put back
    yield
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _require_listener(address: str) -> None:
    """Ray would try an address where nobody is for minutes, without a word and deaf to Ctrl-C.

    Raises:
      FleetError: `address` is HOST:PORT, and nobody listens there.
    """
    host, _, port = address.rpartition(":")
    if "://" in address or not port.isdecimal():  # "auto", or Ray finds out by itself
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_S).close()
    except (OSError, UnicodeError) as error:  # the latter of what can be no name
        raise FleetError(
            f"no Ray cluster at {address} ({getattr(error, 'strerror', None) or error}); is "
            "vllm.ray_address right, and the port open?"
        ) from error


def _outcome(reference: Any) -> Any:
    """The result, which is there, or the error."""
    try:
        return ray.get(reference, timeout=0)
    except RayError as error:
        return error


def _how_it_died(error: RayActorError) -> str:
    """Ray's account of a dead actor, without its guesses at the cause."""
    lines = str(error).strip().splitlines()
    of_node = [line for line in lines if _NODE_DIED in line]
    return [*lines, *of_node][-1].split(" Some common causes")[0].strip()


def _cause(error: Exception) -> str:
    """The engine's own sentence, without Ray's account of how it travelled."""
    return str(error.cause) if isinstance(error, RayTaskError) else str(error)


def _plain(expected: Expected) -> list[list[Any]]:
    return [[name, dtype, list(shape)] for name, dtype, shape in expected]
