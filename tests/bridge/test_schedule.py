"""Who samples what: late, evenly, the urgent first, and never by weights that are too old."""

import heapq
import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.schedule import Rank, Schedule

N = 8


def simulate(speeds, groups, seqs=64):
    """Engines that sample `seqs` completions at once, each at its speed, and say what they have
    every 0.5 s and when a request ends, until the queue is empty. Returns the share of its places
    that each used, the requests each finished, and the most that one had."""
    lengths = np.random.default_rng(0).lognormal(5.0, 0.8, (groups, N)).astype(int) + 1
    schedule, serving = Schedule(), dict.fromkeys(speeds, 1)
    for name in speeds:
        schedule.join(name, seqs)
    for group in range(groups):
        schedule.add(str(group), N, 1, Rank.NEXT)
    events, left, now, most = [(0.5, name, "") for name in speeds], {}, 0.0, 0
    running, waiting = dict.fromkeys(speeds, 0), {name: [] for name in speeds}
    used, since, finished = (
        dict.fromkeys(speeds, 0.0),
        dict.fromkeys(speeds, 0.0),
        dict.fromkeys(speeds, 0),
    )

    def run(name, change):
        used[name] += (now - since[name]) * running[name]
        since[name] = now
        running[name] += change

    def fill(name):
        while waiting[name] and running[name] < seqs:
            group, length = waiting[name].pop(0)
            run(name, 1)
            heapq.heappush(events, (now + length / speeds[name], name, group))

    def give():
        for name, requests in schedule.assign(serving).items():
            for group in requests:
                left[group] = N
                waiting[name] += [(group, int(length)) for length in lengths[int(group)]]
            fill(name)

    give()
    while schedule.queued:
        now, name, group = heapq.heappop(events)
        if group:
            run(name, -1)
            left[group] -= 1
            fill(name)
            if left[group]:
                continue
            schedule.done(group)
            finished[name] += 1
        else:
            heapq.heappush(events, (now + 0.5, name, ""))
        schedule.said(name, running[name] + len(waiting[name]))
        give()
        most = max(most, *(len(schedule.has(engine)) for engine in speeds))
    for name in speeds:
        run(name, 0)
    return [used[name] / (now * seqs) for name in speeds], finished, most


def test_sixty_four_engines_are_equally_busy_and_none_is_idle():
    used, _, _ = simulate({f"engine-{i}": 50.0 for i in range(64)}, groups=64 * 100)
    assert max(used) < 1.05 * min(used) and min(used) > 0.97


def test_a_slow_engine_gets_less_and_holds_nobody_up():
    speeds = {f"engine-{i}": 50.0 for i in range(7)} | {"engine-7": 12.5}
    used, finished, most = simulate(speeds, groups=8 * 60)
    assert finished["engine-7"] < 0.4 * finished["engine-0"] and min(used) > 0.95
    assert most <= 4 * (64 + 16) / N  # whatever it says of itself


def test_load_is_measured_by_what_an_engine_can_do():
    schedule, serving = Schedule(), {"large": 1, "small": 1}
    schedule.join("large", 96)
    schedule.join("small", 32)

    def give(count=0):
        for _ in range(count):
            schedule.add(str(next(numbers)), N, 1, Rank.NEXT)
        return {name: len(requests) for name, requests in schedule.assign(serving).items()}

    numbers = itertools.count()
    assert give(8) == {"large": 6, "small": 2}
    assert give(92) == {"large": 9, "small": 3} and schedule.queued == 80
    schedule.said("small", 20)  # was asked before it was given any: these may not be among them
    assert not give()
    schedule.said("small", 20)  # completions of the same requests: the others have ended
    assert give() == {"small": 3}
    for _ in range(9):
        schedule.said("small", 0)
        give()
    assert len(schedule.has("small")) == 4 * (32 + 8) / N  # whatever it says of itself


def test_the_order_is_what_was_lost_then_what_is_urgent_then_as_it_came():
    schedule = Schedule()
    for name in "ab":
        schedule.join(name, 2)
    for request in "123456":
        schedule.add(request, 2, 1, Rank.NEXT)
    assert schedule.assign({"a": 1}) == {"a": ["1", "2"]}
    schedule.add("7", 2, 1, Rank.URGENT)
    schedule.leave("a")
    schedule.done("4")
    order = []
    while schedule.queued:
        (requests,) = schedule.assign({"b": 1}).values()
        order += requests
        assert [schedule.done(request) for request in requests] == ["b"] * len(requests)
    assert order == ["1", "2", "7", "3", "5", "6"]


def test_a_request_that_failed_somewhere_is_for_others_while_there_are_any():
    schedule = Schedule()
    for name in "ab":
        schedule.join(name, 100)
    schedule.add("1", 2, 1, Rank.NEXT)
    schedule.assign({"a": 1})
    schedule.add("2", 2, 1, Rank.NEXT)
    schedule.assign({"b": 1})
    schedule.again("1", failed=True)
    assert schedule.assign({"a": 1, "b": 1}) == {"b": ["1"]}  # though a has nothing to do
    schedule.again("1", failed=True)
    assert schedule.assign({"a": 1, "b": 1}) == {"a": ["1"]}


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_every_request_is_in_one_place_and_where_it_may_be(data):
    """Against a model: a set of requests that wait, and one for each engine."""
    schedule, waiting, at, seqs = Schedule(), {}, {}, {}
    for step in range(data.draw(st.integers(1, 40))):
        names, requests = sorted(seqs), sorted({*waiting, *at})
        match data.draw(st.sampled_from(["join", "leave", "add", "done", "assign", "said"])):
            case "join":
                name = f"engine-{step}"
                seqs[name] = data.draw(st.integers(1, 8))
                schedule.join(name, seqs[name])
            case "leave" if names:
                name = data.draw(st.sampled_from(names))
                del seqs[name]
                lost = {r for r, (engine, _, _) in at.items() if engine == name}
                assert set(schedule.leave(name)) == lost
                waiting |= {r: at.pop(r)[1:] for r in lost}
            case "add":
                n, version = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
                schedule.add(str(step), n, version, data.draw(st.sampled_from(Rank)))
                waiting[str(step)] = n, version
            case "done" if requests:
                request = data.draw(st.sampled_from(requests))
                assert schedule.done(request) == at.pop(request, (None,))[0]
                waiting.pop(request, None)
            case "said" if names:
                schedule.said(data.draw(st.sampled_from(names)), data.draw(st.integers(0, 9)))
            case "assign":
                serving = {name: data.draw(st.integers(1, 3)) for name in names}
                for name, took in schedule.assign(serving).items():
                    for request in took:
                        n, version = waiting.pop(request)
                        assert serving[name] >= version
                        at[request] = name, n, version
                for name, version in serving.items():
                    load = sum(n for engine, n, _ in at.values() if engine == name)
                    limit = seqs[name] + -(-seqs[name] // 4)
                    assert load < 4 * limit + 4
                    able = any(version >= oldest for _, oldest in waiting.values())
                    assert load >= limit or not able  # nobody is idle while there is work for it
        assert schedule.queued == len(waiting)
        assert {r: schedule.at(r) for r in at} == {r: engine for r, (engine, _, _) in at.items()}
