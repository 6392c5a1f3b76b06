"""Real vLLM engines, one after another, for a few seconds each.

Importing vLLM takes most of an engine's start, and vLLM would do it twice for every engine. Here
one process imports it once, and every engine is a fork of that process, with a state of its own.
"""

import asyncio
import contextlib
import multiprocessing
import os
from collections.abc import Iterator
from unittest import mock

import psutil

from bridge.engines.vllm import VllmEngine, actor_environment

_ANSWER_S = 120


class ForkedEngines:
    """The process that engines are forked from. One engine lives at a time."""

    def __init__(self, before=None):
        """`before` is called in that process, ahead of everything."""
        # Not daemonic, because it must have children: `close` ends it.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        with mock.patch.dict(os.environ, actor_environment(cpu=True)):
            self._process = context.Process(target=_serve, args=(theirs, before))
            self._process.start()
        theirs.close()  # so that a process that died is noticed at once

    @contextlib.contextmanager
    def engine(self, settings, model) -> Iterator["ForkedEngines"]:
        """An engine that has started; its methods are reached by `call`."""
        self._ask("open", ["forked-engine", settings, model])
        try:
            self.call("start")
            yield self
        finally:
            self.call("shutdown")

    def call(self, method, *args):
        """What the engine's method returns, or raises."""
        return self._ask(method, args)

    def call_during(self, delay_s, during, *args):
        """`call` of the second, `delay_s` after the first began; returns both answers.

        `during` is a (method, *args) that takes long.
        """
        return self._ask("both", (delay_s, during, args))

    def kill_core(self):
        """Kills what the engine's own process started."""
        for process in psutil.Process(self._process.pid).children():
            process.kill()

    def _ask(self, method, args):
        self._pipe.send((method, args))
        if not self._pipe.poll(_ANSWER_S):
            raise TimeoutError(f"{method} gave no answer in {_ANSWER_S} s")
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self):
        self._pipe.close()
        self._process.join(timeout=10)
        assert self._process.exitcode == 0, "an engine's processes outlived it"


def _serve(pipe, before):
    _fork_without_asking()
    if before is not None:
        before()
    engine = None
    with asyncio.Runner() as runner, contextlib.suppress(EOFError):
        while True:
            method, args = pipe.recv()
            if method == "open":
                os.environ.update(actor_environment(cpu=True))  # engines change it
                engine = VllmEngine(*args)
                pipe.send(None)
                continue
            call = _both(engine, *args) if method == "both" else getattr(engine, method)(*args)
            try:
                answer = runner.run(call)
            except Exception as error:  # the test decides what it expected
                answer = error
            pipe.send(answer)


async def _both(engine, delay_s, first, second):
    under_way = asyncio.create_task(getattr(engine, first[0])(*first[1:]))
    await asyncio.sleep(delay_s)
    answer = await getattr(engine, second[0])(*second[1:])
    return await under_way, answer


def _fork_without_asking():
    """vLLM starts fresh processes on CPU, also for a look at each model's class.

    They would inherit threads and open devices otherwise; this process has neither.
    """
    from vllm.model_executor.models import registry
    from vllm.v1.engine import async_llm, utils  # noqa: F401  (imported once, here)
    from vllm.v1.executor import multiproc_executor
    from vllm.v1.worker import cpu_model_runner, cpu_worker  # noqa: F401

    import bridge.engines.weight_transfer  # noqa: F401

    fork = multiprocessing.get_context("fork")
    utils.get_mp_context = lambda: fork
    multiproc_executor.get_mp_context = lambda: fork
    registry._run_in_subprocess = lambda look: look()
