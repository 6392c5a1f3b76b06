"""An engine that is a server which somebody else started: vLLM's or SGLang's, spoken to over HTTP.

The class is plain Python with coroutines and has the methods of `bridge.engines.vllm.VllmEngine`;
`bridge.fleet` makes an actor of it, which needs no share of a CPU or GPU. One run has a server for
itself: it decides what the server serves. What differs between the two kinds of server is in
`bridge.engines.servers`.
"""

import asyncio
import dataclasses
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bridge.channels import Ticket
from bridge.engines.errors import (
    EngineDead,
    EngineError,
    RequestRefused,
    require_served,
    require_staged,
)
from bridge.engines.intake import Intake, Samples, siblings
from bridge.engines.sampling import check_tokens, sampling_of
from bridge.engines.servers import About, Client, Counters, Server, server_at

_RETRY_S = 0.5
_COUNT_S = 0.25  # for which what the server counted is new enough
_DYING_S = 0.5  # for which a server may fail requests, and still listen: vLLM's does for 0.1 s
_SILENCE_S = 15.0  # for which a server may leave that question unanswered


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Where a server listens. Plain types: this crosses from the driver to the actor."""

    url: str  # http://HOST:PORT
    wait_s: float = 60.0  # for it to answer, when the engine starts


class HttpEngine:
    """See VllmEngine, whose methods these are.

    The server goes on when the engine is shut down or killed; then it serves nobody, and the next
    engine that is started for it brings it a version first. A load that fails leaves it paused.
    """

    def __init__(self, name: str, settings: ServerSettings, model: str | Mapping[str, bytes]):
        """`model` is what the server serves: a Hugging Face directory, or its small files by name;
        only config.json is read."""
        self._name, self._settings = name, settings
        self._vocab_size = _vocab_size(model)
        self._client: Client | None = None
        self._server: Server
        self._about: About
        self._version: int | None = None  # acknowledged; None until one was loaded
        self._staged: int | None = None
        self._updating = asyncio.Lock()
        self._intake = Intake(self._samples)
        self._first: Counters
        self._last: Counters
        self._counted = 0.0  # when `_last` was true, on the monotonic clock
        self._progress = 0

    async def start(self) -> dict[str, Any]:
        """Waits for the server to answer, and checks that it can be used as it was started.

        Whatever it served before, it has no version that is known.

        Raises:
          EngineDead: it does not answer within `wait_s`, or lacks something, which is named.
        """
        started = time.perf_counter()
        self._client = Client(self._settings.url)
        try:
            model = await self._served_model(time.monotonic() + self._settings.wait_s)
            self._server = server_at(self._client, model["owned_by"], model["max_model_len"])
            self._about = await self._server.ready()
            self._first = self._last = await self._server.counters()
        except Exception as error:  # what another release answers may lack anything
            await self.shutdown()
            why = str(error) if isinstance(error, EngineError) else repr(error)
            raise EngineDead(f"{self._name} cannot use {self._settings.url}: {why}") from error
        self._counted = time.monotonic()
        self._intake = Intake(self._samples)  # from here on it counts who is idle
        return {
            "name": self._name,
            "software": self._about.software,
            "version": None,
            "seconds": time.perf_counter() - started,
            "pid": os.getpid(),
            "node": os.uname().nodename,
            "max_num_seqs": self._about.max_num_seqs,
        }

    async def _served_model(self, end: float) -> dict[str, Any]:
        assert self._client is not None
        while True:
            try:
                return (await self._client.get("/v1/models"))["data"][0]
            except EngineError:
                if time.monotonic() >= end:
                    raise
            await asyncio.sleep(_RETRY_S)

    async def submit(self, requests: list[dict[str, Any]]) -> None:
        """See VllmEngine.submit."""
        self._require_running()
        self._intake.submit(requests)

    async def poll(self, wait_s: float) -> dict[str, Any]:
        """See VllmEngine.poll; what the server counted is up to 0.25 s old. Requests that failed
        are reported half a second later, if the server is still there.

        Raises:
          EngineDead: the server is gone, or has not said for 15 s what it counted.
        """
        self._require_running()
        done = await self._intake.take(wait_s)
        if any("failed" in each for each in done):  # is it the requests, or the server?
            await asyncio.sleep(_DYING_S)  # what it counted is old then, and it is asked anew
        self._require_running()
        counters = await self._counters()
        return {
            "done": done,
            "progress": self._progress,
            "running": counters.running,
            "waiting": counters.waiting,
            "tokens": counters.tokens - self._first.tokens,
            "idle_s": self._intake.idle_s,
            "kv_use": counters.kv_use,
            "prompt_tokens": counters.prompt_tokens - self._first.prompt_tokens,
            "prefix_hits": counters.prefix_hits - self._first.prefix_hits,
        }

    async def cancel(self, ids: list[str]) -> None:
        """See VllmEngine.cancel."""
        self._intake.cancel(ids)

    async def generate(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        """Samples the completions of one prompt; see VllmEngine.generate.

        Raises:
          RequestRefused: no engine could serve this request.
          StaleVersion: this engine has not acknowledged the request's version.
          EngineError: the server did not finish it.
        """
        return await siblings(self._samples(request), straggler_s=None)

    async def stage(
        self, ticket_json: str, expected: list[list[Any]], deadline_s: float
    ) -> dict[str, Any]:
        """See VllmEngine.stage.

        Raises:
          EngineError: the version is late, torn, incomplete, not the model's, not where this kind
            of server can read it, or an adapter. The server serves on.
        """
        self._require_running()
        ticket = Ticket.from_json(ticket_json)
        if any(".lora_" in name for name, _, _ in expected):
            raise EngineError(
                f"{self._name}: weight version {ticket.version} is an adapter, and those are not "
                "brought to servers; sample with engines of the run's own (vllm.engines)"
            )
        async with self._updating:
            started = time.perf_counter()
            self._staged = None
            await self._server.stage(ticket, expected, deadline_s)
            self._staged = ticket.version
            return {"version": ticket.version, "stage_s": time.perf_counter() - started}

    async def commit(self, version: int) -> dict[str, Any]:
        """See VllmEngine.commit. After a failure the server stays paused."""
        async with self._updating:
            self._require_running()
            require_staged(self._name, self._staged, version)
            self._staged = None
            started = time.perf_counter()
            try:
                loaded = await self._server.commit(version)
            except Exception as error:  # whatever it was, the weights are not known any more
                await self.shutdown()
                raise EngineDead(
                    f"{self._name}: loading version {version} failed half way, and "
                    f"{self._settings.url} was left paused; restart that server: {error}"
                ) from error
            self._version = version
            return loaded | {"pause_s": time.perf_counter() - started}

    async def acknowledged(self) -> int | None:
        """The version that the server serves, or None before the first."""
        return self._version

    async def abort_update(self) -> None:
        """Drops a staged version. The server serves what it served, and can stage again."""
        self._require_running()
        async with self._updating:
            self._staged = None
            await self._server.abort()

    async def examine(self, deadline_s: float) -> dict[str, Any]:
        """See VllmEngine.examine. Of an SGLang server every tensor is unchecked."""
        self._require_running()
        async with self._updating:
            return await self._server.examine(deadline_s)

    async def score(self, tokens: list[int]) -> np.ndarray:
        """See VllmEngine.score."""
        self._require_running()
        if self._version is None:
            raise EngineError(f"{self._name} has no weights yet")
        self._check_tokens(tokens, new=1)
        return await self._server.score(tokens)

    async def shutdown(self) -> None:
        """Lets go of the server, and of all requests."""
        client, self._client = self._client, None
        self._version = None
        self._intake.close()
        if client is not None:
            await client.close()

    def _samples(self, request: dict[str, Any]) -> Samples:
        """Each sibling is a request of its own to the server, whose prefix cache shares the
        prompt."""
        self._require_running()
        require_served(self._name, self._version, request["version"])
        sampling = sampling_of(request, self._about.tokenizer)
        if sampling.beams > 1:
            raise RequestRefused(
                f"beams {sampling.beams}: {self._name} is a server, and those are not asked for a "
                "beam search; sample with engines of the run's own (vllm.engines), or set beams to "
                "1"
            )
        tokens, seed = list(request["tokens"]), request["seed"]
        self._check_tokens(tokens, new=sampling.max_new_tokens)
        return [self._server.sample(tokens, sampling, seed + i) for i in range(sampling.n)]

    def _check_tokens(self, tokens: Sequence[int], new: int) -> None:
        check_tokens(tokens, new, self._about.max_model_len, self._vocab_size)

    async def _counters(self) -> Counters:
        now = time.monotonic()
        if now - self._counted >= _COUNT_S:
            try:
                counters = await self._server.counters()
            except EngineDead:
                raise
            except EngineError as error:
                if now - self._counted > _SILENCE_S:
                    raise EngineDead(
                        f"{self._name}: no answer for {_SILENCE_S:g} s: {error}"
                    ) from error
            else:
                self._progress += counters != self._last
                self._last, self._counted = counters, now
        return self._last

    def _require_running(self) -> None:
        if self._client is None:
            raise EngineDead(f"{self._name} is not running")


def _vocab_size(model: str | Mapping[str, bytes]) -> int:
    name = "config.json"
    config = json.loads(
        (Path(model) / name).read_bytes() if isinstance(model, str) else model[name]
    )
    return config.get("text_config", config)["vocab_size"]
