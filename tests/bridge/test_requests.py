"""Every request is answered once, by weights that were proven, whatever becomes of engines."""

from concurrent.futures import Future

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.requests import Requests
from bridge.roster import Engine, EngineState, FleetError
from jaxrl.types import Prompt, Request, Sampling
from tests.bridge.test_roster import engine

SAMPLING = Sampling(n=2, max_new_tokens=8, temperature=1.0, stop_tokens=(7,), bad_words=("x",))


def request(number=0, **options):
    return Request(Prompt(100 + number, "", (1, 2, 3), {}), SAMPLING, 1000 * number, **options)


def completions(message, versions=(1, 1), n=None, logprobs=None):
    return [
        {
            "tokens": np.array([5] * len(versions), np.int32),
            "logprobs": np.zeros(len(versions) if logprobs is None else logprobs, np.float32),
            "versions": np.array(versions, np.int64),
            "finish_reason": "stop",
            "seed": message["seed"] + i,
        }
        for i in range(message["n"] if n is None else n)
    ]


def sent(requests, one: Engine, *asked: Request):
    """The futures, and the messages to the one engine."""
    requests.schedule.join(one.name, 100)
    futures = [requests.add(each, 1, urgent=False)[1] for each in asked]
    messages = requests.assign({one.name: 1}, deadline=10.0)
    return futures, messages.get(one.name, [])


def outcomes(requests) -> dict[Future, object]:
    return dict(requests.take_settled())


def test_a_message_holds_all_that_an_engine_is_asked():
    requests = Requests()
    _, messages = sent(requests, engine(), request(4, straggler_s=3.0), request(4))
    assert messages[0]["id"] != messages[1]["id"]
    assert messages[0] == {
        "id": messages[0]["id"],
        "tokens": [1, 2, 3],
        "seed": 4000,
        "version": 1,
        "straggler_s": 3.0,
        "n": 2,
        "max_new_tokens": 8,
        "temperature": 1.0,
        "stop_tokens": [7],
        "stop_strings": [],
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "bad_words": ["x"],
        "regex": None,
        "json_schema": None,
        "beams": 1,
    }


def test_a_beam_search_takes_the_room_of_its_beams():
    sampling = Sampling(n=1, max_new_tokens=8, temperature=0.0, stop_tokens=(), beams=100)
    searches = [Request(Prompt(i, "", (1,), {}), sampling, 0) for i in range(3)]
    _, messages = sent(Requests(), engine(), *searches)
    assert len(messages) == 2  # an engine that computes 100 sequences is given some in advance


@pytest.mark.parametrize(
    ("spoilt", "said"), [({"n": 1}, "1 of 2 completions"), ({"logprobs": 3}, r"\{2, 3\}")]
)
def test_a_result_that_is_not_whole_is_no_group(spoilt, said):
    requests, one = Requests(), engine()
    (future,), (message,) = sent(requests, one, request())
    requests.came_back(one, {"id": message["id"], "completions": completions(message, **spoilt)})
    error = outcomes(requests)[future]
    assert isinstance(error, FleetError) and "prompt 100" in str(error)
    with pytest.raises(FleetError, match=said):
        raise error


def test_stragglers_may_be_missing_where_they_may_be_left_behind():
    sampling = Sampling(n=6, max_new_tokens=8, temperature=1.0, stop_tokens=())
    ask = Request(Prompt(1, "", (1,), {}), sampling, 0, straggler_s=1.0)
    for n, whole in ((2, False), (3, True), (6, True), (7, False)):
        requests, one = Requests(), engine()
        (future,), (message,) = sent(requests, one, ask)
        reply = {"id": message["id"], "completions": completions(message, n=n)}
        requests.came_back(one, reply)
        assert isinstance(outcomes(requests)[future], FleetError) != whole


def test_a_request_that_three_failed_at_is_given_up():
    requests, one = Requests(), engine()
    (future,), (message,) = sent(requests, one, request())
    for attempt in range(3):
        requests.came_back(one, {"id": message["id"], "failed": f"reason {attempt}"})
        assert bool(requests.assign({"a": 1}, 10.0)) == (attempt < 2)
    error = str(outcomes(requests)[future])
    assert all(f"a: reason {attempt}" in error for attempt in range(3)) and "prompt 100" in error


def test_what_an_engine_has_for_too_long_is_told():
    requests, one = Requests(), engine()
    _, (message,) = sent(requests, one, request())
    requests.add(request(1), 1, urgent=False)  # nobody has it, so nobody is late with it
    assert not requests.overdue(10.0)
    assert requests.overdue(10.1) == {"a": [message["id"]]}


def test_all_are_given_up_each_with_its_own_error():
    requests, one = Requests(), engine()
    futures, (message, _) = sent(requests, one, request(), request(1))
    requests.drop(message["id"])
    futures.append(requests.add(request(2), 1, urgent=False)[1])
    at = requests.give_up(lambda: FleetError("gone"))
    assert [len(ids) for ids in at.values()] == [1] and at.keys() == {"a"}
    settled = outcomes(requests)
    assert settled.keys() == set(futures[1:]) and len(set(map(id, settled.values()))) == 2
    assert requests.schedule.queued == 0


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_each_is_answered_once_and_by_proven_weights(data):
    """Two engines that load versions, prove them or not, die and come back under other names."""
    requests, engines, under_way, asked, told = Requests(), {}, {}, {}, {}

    def start(name):
        engines[name] = engine(name, version=1)
        requests.schedule.join(name, 2)

    def answer(message, one):
        versions = sorted({one.admitted_at, one.version})
        reply = {"id": message["id"], "completions": completions(message, versions)}
        del under_way[message["id"]]
        requests.came_back(one, reply)
        requests.came_back(one, reply)  # once is enough

    def admit(name):
        engines[name].admit(engines[name].version)
        proven[name].add(engines[name].version)
        requests.decide(engines[name])

    def step(event, number):
        name = data.draw(st.sampled_from(sorted(engines)))
        one = engines[name]
        match event:
            case "ask":
                _, future = requests.add(request(number), 1, urgent=False)
                asked[future] = 100 + number
            case "answer" if of_one := [m for m, e in under_way.values() if e is one]:
                answer(data.draw(st.sampled_from(of_one)), one)
            case "commit":
                one.begins_commit(number + 2)
                one.ends_commit(number + 2, 0.0)
            case "admit":
                admit(name)
            case "withdraw":
                one.withdraw()
                requests.decide(one)
            case "end":
                one.advance(EngineState.DEAD)
                requests.engine_ended(one)
                del engines[name]
                for request_id in [i for i, (_, e) in under_way.items() if e is one]:
                    del under_way[request_id]
                start(f"{name}'")
                proven[f"{name}'"] = {1}
        go_on()

    def go_on():
        serving = {e.name: e.version for e in engines.values() if e.state == "ready"}
        for name, messages in requests.assign(serving, 10.0).items():
            under_way.update({m["id"]: (m, engines[name]) for m in messages})
        for future, outcome in requests.take_settled():
            assert future not in told
            told[future] = outcome
            versions = {int(v) for r in outcome.rollouts for v in r.versions}
            assert outcome.prompt.id == asked[future] and versions <= proven[outcome.engine]
            seed = 1000 * (asked[future] - 100)
            assert [r.seed for r in outcome.rollouts] == [seed, seed + 1]

    proven = {"a": {1}, "b": {1}}
    start("a")
    start("b")
    events = ["ask", "ask", "answer", "answer", "commit", "admit", "withdraw", "end"]
    for number in range(data.draw(st.integers(1, 30))):
        step(data.draw(st.sampled_from(events)), number)
    for name in engines:
        admit(name)
    go_on()
    while under_way:
        for message, one in list(under_way.values()):
            answer(message, one)
        go_on()
    assert told.keys() == asked.keys()  # nothing is lost
