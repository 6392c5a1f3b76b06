"""The engines as Ray actors: started, updated, watched, and given work.

The driver's side: no jax, no torch, no vllm. Engines fail, and that is an outcome here and not an
exception: an engine that dies, hangs or cannot load leaves the roster with its reason, its work
goes to the others, and only a fleet with nobody left raises.
"""

import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

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
from bridge.roster import Engine, FleetError, Roster
from jaxrl.types import Group, Prompt, Rollout, Sampling

Expected = Sequence[Sequence[Any]]  # [[name, dtype, shape], ...]: what every version must hold
_DEFAULT_STORE_BYTES = 1 << 30
_SHUTDOWN_S = 10.0
# Of update_timeout_s. An engine takes up to twice its deadline to say that a version is late, and
# must have said so before it counts as hung itself.
_FETCH_SHARE = 0.45


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FleetSettings:
    engines: int = 1
    cpus_per_engine: float = 1
    gpus_per_engine: float = 0
    start_timeout_s: float = 300.0  # from `start` until every engine is ready
    request_timeout_s: float = 600.0  # for what is sent to one engine at once
    update_timeout_s: float = 300.0  # to stage, again to commit, and to score
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
        engine_settings: EngineSettings,
        model: str | Mapping[str, bytes],
        expected: Expected,
    ):
        """`model`: see VllmEngine. `expected`: see VllmEngine.stage. Nothing starts yet."""
        self._settings = settings
        self._engine_settings = engine_settings
        self._model = model if isinstance(model, str) else dict(model)
        self._expected = _plain(expected)
        self._roster = Roster()
        self._owns_ray = False
        self._ready_by = 0.0

    def start(self) -> None:
        """Starts or joins Ray and creates the actors, without waiting for them."""
        self._connect()
        self._ready_by = time.monotonic() + self._settings.start_timeout_s
        actor_class = ray.remote(VllmEngine).options(
            num_cpus=self._settings.cpus_per_engine,
            num_gpus=self._settings.gpus_per_engine,
            runtime_env={"env_vars": actor_environment(self._settings.gpus_per_engine == 0)},
            max_restarts=0,
        )
        for index in range(self._settings.engines):
            name = f"engine-{index}"
            actor: Any = actor_class.remote(name, self._engine_settings, self._model)
            self._roster.add(Engine(name, actor, actor.start.remote()))

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
            ray.init(
                address="local",  # without it Ray may join a cluster that it finds on this machine
                # Ray only counts these, and would never start an engine that it has no CPU for.
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
        starting = {name: self._roster[name].started for name in self._roster.alive}
        outcomes = self._outcomes(starting, self._ready_by - time.monotonic(), "starting")
        infos = [info for info in outcomes.values() if not isinstance(info, FleetError)]
        if self._roster.failures:
            raise FleetError("; ".join(self._roster.failures.values()))
        for info in infos:
            self._roster.acknowledge(info["name"], info["version"])
        return infos

    @property
    def alive(self) -> list[str]:
        """The engines that have not failed, whether they serve or not."""
        return self._roster.alive

    @property
    def serving(self) -> list[str]:
        """The engines that get requests."""
        return self._roster.serving

    @property
    def failures(self) -> dict[str, str]:
        """The engines that left the fleet, and why."""
        return self._roster.failures

    def stage(self, ticket: Ticket, expected: Expected | None = None) -> dict[str, Any]:
        """Has every live engine fetch and check a version, while it serves the old one.

        The value is None, or the reason of an engine that refuses; it serves on. `expected`: what
        this one version must hold, where it is not what every version must.
        """
        deadline_s = self._settings.update_timeout_s * _FETCH_SHARE
        wanted = self._expected if expected is None else _plain(expected)
        outcomes = self._ask("stage", ticket.to_json(), wanted, deadline_s)
        return {n: out if isinstance(out, FleetError) else None for n, out in outcomes.items()}

    def commit(self, version: int) -> dict[str, dict[str, Any] | FleetError]:
        """Has every live engine that staged `version` serve it; see VllmEngine.commit.

        Requests under way go on. New ones wait until `admit` says who serves what. An engine that
        fails half way through loading is ended; one that had staged nothing keeps its old version.
        """
        self._roster.suspend()
        outcomes = self._ask("commit", version)
        for name, outcome in outcomes.items():
            if not isinstance(outcome, FleetError):
                self._roster.acknowledge(name, version)
        return outcomes

    def admit(self, names: Iterable[str], version: int) -> None:
        """Makes exactly these engines the ones that get requests, which ask for `version`.

        Raises:
          FleetError: one of them has not acknowledged `version`; nothing has changed.
        """
        self._roster.admit(names, version)

    def abort_update(self) -> dict[str, FleetError | None]:
        """Has every live engine drop what it staged."""
        return self._ask("abort_update")

    def score(self, tokens: Sequence[int]) -> dict[str, np.ndarray | FleetError]:
        """Log-probabilities of `tokens` on every live engine; see VllmEngine.score."""
        return self._ask("score", [int(token) for token in tokens])

    def begin(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]
    ) -> Callable[[], list[Group]]:
        """As `generate`, in a thread; what is returned waits for its result, or raises."""
        outcome: Future[list[Group]] = Future()

        def work() -> None:
            try:
                outcome.set_result(self.generate(prompts, sampling, seeds))
            except BaseException as error:
                outcome.set_exception(error)

        # Not of a pool: those are waited for when the interpreter ends, and engines may hang.
        threading.Thread(target=work, daemon=True).start()
        return outcome.result

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]
    ) -> list[Group]:
        """The completions of each prompt, in the order of `prompts`.

        Completion i of a prompt is sampled with the prompt's seed + i; all of them on one engine.
        What an engine did not finish goes to the others with the same seeds.

        Raises:
          FleetError: no engine would serve one of the requests, or no engine is left.
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

    def _ask(self, method: str, *args: Any) -> dict[str, Any]:
        """Calls a method of every live engine: its result, or the FleetError it ended with."""
        calls = {n: getattr(self._roster[n].actor, method).remote(*args) for n in self.alive}
        return self._outcomes(calls, self._settings.update_timeout_s, method)

    def _outcomes(self, calls: Mapping[str, Any], timeout_s: float, doing: str) -> dict[str, Any]:
        if calls:
            ray.wait(list(calls.values()), num_returns=len(calls), timeout=max(0.0, timeout_s))
        outcomes: dict[str, Any] = {}
        for name, reference in calls.items():
            try:
                outcomes[name] = ray.get(reference, timeout=0)
            except RayError as error:
                if isinstance(error, RayTaskError) and not isinstance(error, EngineDead):
                    outcomes[name] = FleetError(_cause(error))
                else:
                    outcomes[name] = self._fail(name, doing, error)
        return outcomes

    def _fail(self, name: str, doing: str, error: RayError) -> FleetError:
        """Ends an engine and takes it out for good; returns the reason."""
        if isinstance(error, GetTimeoutError):
            reason = f"{name} did not finish before its deadline: {doing}"
        elif isinstance(error, RayActorError):
            reason = f"{name} died: {doing}. {_how_it_died(error)}"
        else:
            reason = f"{name} failed: {doing}: {_cause(error)}"
        self._roster.fail(name, reason)
        ray.kill(self._roster[name].actor)
        return FleetError(reason)

    def close(self) -> None:
        """Ends every engine, and Ray if this fleet started it."""
        engines = self._roster.clear()
        leaving = [e.actor.shutdown.remote() for e in engines if e.state != "failed"]
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
