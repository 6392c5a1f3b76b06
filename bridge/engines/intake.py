"""The requests that an engine has taken on, until each is reported or cancelled.

For any engine that samples the completions of a request one by one, as coroutines; everything here
runs on the engine's event loop.
"""

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any

from bridge.engines.errors import EngineError, RequestRefused

Request = dict[str, Any]
Completion = dict[str, Any]
Samples = Sequence[Coroutine[Any, Any, Completion]]  # the siblings of one request, not yet begun

_FEWEST = 2  # completions that a group can be compared with


class Intake:
    """Each request is sampled by itself, so that none is lost with another."""

    def __init__(self, samples: Callable[[Request], Samples]) -> None:
        """`samples` raises RequestRefused where the request is at fault, as its coroutines may."""
        self._samples = samples
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._ended: dict[str, dict[str, Any]] = {}  # since the last `take`
        self._news = asyncio.Event()
        self._idle_s, self._idle_since = 0.0, time.monotonic()

    @property
    def idle_s(self) -> float:
        """Seconds in which no request was here."""
        return self._idle_s + (0.0 if self._tasks else time.monotonic() - self._idle_since)

    def submit(self, requests: Iterable[Request]) -> None:
        """Begins to sample each request; see VllmEngine.submit."""
        for request in requests:
            if not self._tasks:
                self._idle_s += time.monotonic() - self._idle_since
            self._tasks[request["id"]] = asyncio.create_task(self._serve(request))

    async def take(self, wait_s: float) -> list[dict[str, Any]]:
        """The requests that ended since the last call, as soon as there are any or `wait_s` is
        over."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), wait_s)
        self._news.clear()
        ended, self._ended = self._ended, {}
        return list(ended.values())

    def cancel(self, ids: Iterable[str]) -> None:
        """Aborts these requests, which are not reported any more; unknown ids are ignored."""
        for id in ids:
            self._ended.pop(id, None)
            if id in self._tasks:
                self._tasks[id].cancel()
                self._leave(id)

    def close(self) -> None:
        """Aborts everything, and lets nobody wait for it."""
        self.cancel(list(self._tasks))
        self._news.set()

    async def _serve(self, request: Request) -> None:
        id = request["id"]
        try:
            straggler_s = request["straggler_s"]
            end = {"completions": await siblings(self._samples(request), straggler_s)}
        except RequestRefused as error:
            end = {"refused": str(error)}
        except EngineError as error:
            end = {"failed": str(error)}
        except Exception as error:  # whatever it is, whoever waits for the request must hear of it
            end = {"failed": f"{type(error).__name__}: {error}"}
        self._leave(id)
        self._ended[id] = {"id": id} | end
        self._news.set()

    def _leave(self, id: str) -> None:
        del self._tasks[id]
        self._idle_since = time.monotonic()  # if it was the last


async def siblings(samples: Samples, straggler_s: float | None) -> list[Completion]:
    """The completions of one request, in the order of `samples`.

    With `straggler_s`, once half of them are there, and at least two, the others have so many more
    seconds; then they are aborted and left out. One that fails aborts all, and its error is raised.
    """
    tasks = [asyncio.create_task(sample) for sample in samples]
    try:
        if straggler_s is not None:
            enough = max(_FEWEST, (len(tasks) + 1) // 2)
            for first in itertools.islice(asyncio.as_completed(tasks), enough):
                await first
        await asyncio.wait(tasks, timeout=straggler_s, return_when=asyncio.FIRST_EXCEPTION)
        return [task.result() for task in tasks if task.done()]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
