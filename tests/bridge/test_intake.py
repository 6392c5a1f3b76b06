"""An engine's intake, with completions that the test ends by hand."""

import asyncio
import time

import pytest

from bridge.engines.errors import EngineError, RequestRefused
from bridge.engines.intake import Intake

LONG_S = 60.0  # never waited for


class Bench:
    """An intake whose completions are futures, by (request, sibling)."""

    def __init__(self):
        self.intake, self.futures, self.aborted = Intake(self.samples), {}, set()

    def samples(self, request):
        if "fault" in request:
            raise request["fault"]
        return [self.sample(request["id"], sibling) for sibling in range(request["n"])]

    async def sample(self, id, sibling):
        self.futures[id, sibling] = asyncio.get_running_loop().create_future()
        try:
            return await self.futures[id, sibling]
        except asyncio.CancelledError:
            self.aborted.add((id, sibling))
            raise

    async def submit(self, *ids, n=1, straggler_s=None, **more):
        self.intake.submit([{"id": id, "n": n, "straggler_s": straggler_s} | more for id in ids])
        await asyncio.sleep(0.01)  # they begin

    def end(self, id, sibling=0):
        self.futures[id, sibling].set_result(f"{id}{sibling}")


def run(test):
    """`test` is a coroutine, and gets a bench of its own."""
    asyncio.run(test(Bench()))


async def all_of(intake, count):
    found = []
    while len(found) < count:
        found += await intake.take(LONG_S)
    return {entry["id"]: entry for entry in found}


def test_each_request_is_reported_once_and_as_soon_as_it_ends():
    async def test(bench):
        await bench.submit("a", "b", n=2)
        for id in "b", "a":
            bench.end(id, 1)
            bench.end(id, 0)
            completions = [f"{id}0", f"{id}1"]
            assert await bench.intake.take(LONG_S) == [{"id": id, "completions": completions}]
        assert await bench.intake.take(0.0) == []

    run(test)


def test_what_goes_wrong_with_a_request_is_its_own():
    async def test(bench):
        await bench.submit("refused", fault=RequestRefused("too long"))
        await bench.submit("failed", fault=EngineError("stale"))
        await bench.submit("unforeseen", "sibling", "served", n=2)
        bench.futures["unforeseen", 0].set_exception(KeyError("x"))
        bench.futures["sibling", 1].set_exception(EngineError("ended with 'error'"))
        bench.end("served", 0)
        bench.end("served", 1)
        ends = await all_of(bench.intake, 5)
        assert ends["refused"] == {"id": "refused", "refused": "too long"}
        assert ends["failed"] == {"id": "failed", "failed": "stale"}
        assert ends["unforeseen"]["failed"] == "KeyError: 'x'"
        assert ends["sibling"]["failed"] == "ended with 'error'"
        assert ends["served"]["completions"] == ["served0", "served1"]
        assert bench.aborted == {("unforeseen", 1), ("sibling", 0)}

    run(test)


def test_what_is_cancelled_is_aborted_and_never_reported():
    async def test(bench):
        await bench.submit("under way", "ended", "other", n=1)
        bench.end("ended")
        await asyncio.sleep(0.01)
        bench.intake.cancel(["under way", "ended", "unknown"])
        await asyncio.sleep(0.01)
        assert bench.aborted == {("under way", 0)}
        bench.end("other")
        assert list(await all_of(bench.intake, 1)) == ["other"]
        assert await bench.intake.take(0.0) == []

    run(test)


@pytest.mark.parametrize(("n", "enough"), [(2, 2), (3, 2), (4, 2), (5, 3), (8, 4)])
def test_stragglers_are_left_behind_once_half_of_a_group_is_there(n, enough):
    async def test(bench):
        await bench.submit("a", n=n, straggler_s=0.01)
        for sibling in reversed(range(n - enough + 1, n)):
            bench.end("a", sibling)
        assert await bench.intake.take(0.1) == []
        bench.end("a", n - enough)
        there = [f"a{sibling}" for sibling in range(n - enough, n)]
        assert await bench.intake.take(LONG_S) == [{"id": "a", "completions": there}]
        assert bench.aborted == {("a", sibling) for sibling in range(n - enough)}

    run(test)


@pytest.mark.parametrize("straggler_s", [None, LONG_S])
def test_a_group_that_ends_in_time_is_whole(straggler_s):
    async def test(bench):
        await bench.submit("a", n=4, straggler_s=straggler_s)
        for sibling in range(3):
            bench.end("a", sibling)
        assert await bench.intake.take(0.1) == []
        bench.end("a", 3)
        (entry,) = await bench.intake.take(LONG_S)
        assert entry["completions"] == ["a0", "a1", "a2", "a3"]

    run(test)


def test_only_time_without_any_request_is_idle():
    async def test(bench):
        async def passes():
            before = bench.intake.idle_s
            await asyncio.sleep(0.01)
            return bench.intake.idle_s > before

        began = time.monotonic()
        bench.intake = Intake(bench.samples)
        assert await passes()
        await bench.submit("a", "b")
        assert not await passes()
        bench.end("a")
        assert not await passes()
        bench.intake.cancel(["b"])
        assert await passes()
        busy_s = 0.029  # at least
        assert bench.intake.idle_s < time.monotonic() - began - busy_s

    run(test)


def test_who_waits_is_let_go_when_the_intake_closes():
    async def test(bench):
        await bench.submit("a")
        waiting = asyncio.create_task(bench.intake.take(LONG_S))
        await asyncio.sleep(0)
        bench.intake.close()
        assert await waiting == []
        assert bench.aborted == {("a", 0)}

    run(test)
