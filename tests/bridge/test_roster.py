"""The states of an engine: who gets work, who is late, and whose results are to be believed."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.roster import NEXT, Engine, EngineState, FleetError, Roster

INFO = {"version": None, "max_num_seqs": 8}
LIMITS = {"suspect_s": 2.0, "silence_s": 60.0}


def said(progress):
    return {"progress": progress}


def engine(name="a", slot=0, version=1):
    """One that serves `version`."""
    made = Engine(name, slot)
    made.is_up(INFO, now=0.0)
    made.begins_commit(version)
    made.ends_commit(version, now=0.0)
    made.admit(version)
    return made


def test_an_engine_serves_once_it_has_proved_a_version():
    roster, new = Roster(), Engine("a")
    roster.add(new)
    assert roster.starting == [new] and not roster.up
    new.is_up(INFO, now=1.0)
    assert new.state == "loading" and roster.up == [new] and not new.serves
    with pytest.raises(FleetError, match=r"a cannot be admitted .* 1: it is loading .* None"):
        new.admit(1)
    new.begins_commit(1)
    new.ends_commit(1, now=2.0)
    assert roster.serving() == {} and not new.serves
    new.admit(1)
    assert roster.serving() == {"a": 1} and new.serves


@pytest.mark.parametrize("state", [EngineState.DEAD, EngineState.QUARANTINED])
def test_no_way_leads_back_from_the_end(state):
    roster, a, b = Roster(), engine("a"), engine("b", slot=1)
    for one in (a, b):
        roster.add(one)
    a.advance(state)
    a.reason = "a died"
    assert roster.serving() == {"b": 1} and roster.failures == {"a": "a died"}
    with pytest.raises(FleetError, match=rf"a cannot be admitted .* {state} .* a died"):
        a.admit(1)
    a.answered(said(9), now=5.0, busy=False)
    a.withdraw()
    a.ends_commit(2, now=6.0)
    assert a.state is state and a.trouble(1000.0, True, **LIMITS) == "" and not NEXT[state]
    roster.add(Engine("a.1", 0))
    assert (roster.replaced, roster.slots) == (1, 2)
    assert roster.quarantined == (state == "quarantined")


@pytest.mark.parametrize("version", [0, 2])
def test_only_the_version_that_was_acknowledged_is_admitted(version):
    one = engine(version=1)
    with pytest.raises(FleetError, match=f"weight version {version}: .*acknowledged 1"):
        one.admit(version)
    assert one.state == "ready" and one.admitted_at == 1


def test_silence_makes_suspect_and_then_ends():
    one = engine()
    one.answered(said(1), now=10.0, busy=True)
    assert one.trouble(12.0, True, **LIMITS) == "" and one.state == "ready"
    assert one.trouble(12.1, True, **LIMITS) == "" and one.state == "suspect"
    one.answered(said(2), now=13.0, busy=True)
    assert one.state == "ready" and one.trouble(14.9, True, **LIMITS) == ""
    assert one.trouble(73.0, True, **LIMITS) == ""
    assert "has not answered for 60 s" in one.trouble(73.1, True, **LIMITS)


def test_an_engine_that_answers_must_also_get_on_if_it_has_something_to_do():
    one = engine()
    for now in range(100):
        one.answered(said(5), now=float(now), busy=now < 30)
    assert one.trouble(100.0, False, **LIMITS) == ""
    for now in range(100, 200):
        one.answered(said(5 + (now < 130)), now=float(now), busy=True)
        if now == 160:
            assert one.trouble(160.0, True, **LIMITS) == ""
    assert "no progress for 60 s" in one.trouble(200.0, True, **LIMITS)


def test_while_weights_are_loaded_nobody_expects_an_answer():
    one = engine()
    one.answered(said(1), now=10.0, busy=True)
    one.begins_commit(2)
    assert one.trouble(500.0, True, **LIMITS) == "" and one.state == "loading"
    one.ends_commit(2, now=500.0)
    assert one.trouble(559.0, True, **LIMITS) == "" and one.state == "loading"
    assert "not answered" in one.trouble(561.0, True, **LIMITS)  # nobody asked it to be silent


def test_what_weights_sampled_is_believed_when_they_are_proven():
    one = engine(version=1)
    assert one.proves({1}) is True and one.proves({2}) is False and one.proves(set()) is True
    one.begins_commit(2)  # from here on it may sample with them
    assert one.proves({1, 2}) is None and one.proves({1}) is True
    one.ends_commit(2, now=1.0)
    one.withdraw()
    assert one.proves({1, 2}) is False and one.proves({1}) is True
    one.begins_commit(3)
    one.ends_commit(3, now=2.0)
    assert one.proves({2, 3}) is False  # 2 never will be
    one.admit(3)
    assert one.proves({1, 3}) is True and one.proves({2, 3}) is False


def test_the_oldest_version_served_is_that_of_the_slowest_that_will_serve():
    roster, a, b = Roster(), engine("a", 0, version=1), engine("b", 1, version=1)
    assert roster.oldest_served() is None
    for one in (a, b, Engine("c", 2)):
        roster.add(one)
    a.begins_commit(2)
    a.ends_commit(2, now=1.0)
    a.admit(2)
    b.begins_commit(2)
    assert roster.oldest_served() == 1 and b.serves
    b.withdraw()
    assert roster.oldest_served() == 2 and not b.serves


def test_requests_are_waited_for_while_engines_can_still_come():
    roster, a, b = Roster(least=2), engine("a", 0), engine("b", 1)
    for one in (a, b):
        roster.add(one)
    roster.looked_at(now=100.0)
    b.advance(EngineState.DEAD)
    roster.looked_at(now=101.0)
    assert roster.lacking_for(8.0, now=108.0) == ""
    assert roster.lacking_for(8.0, now=108.1) == "1 engines were up, fewer than 2"
    c = Engine("c", 1)
    roster.add(c)
    c.is_up(INFO, now=120.0)
    roster.looked_at(now=120.0)
    a.withdraw()
    assert roster.lacking_for(8.0, now=129.0) == "no engine was admitted"
    roster.add(Engine("d", 2))
    assert roster.lacking_for(8.0, now=129.0) == ""  # it may be


@given(st.lists(st.sampled_from(["up", "commit", "admit", "withdraw", "answer", "look", "end"])))
@settings(max_examples=100, deadline=None)
def test_only_an_admitted_engine_ever_gets_requests(events):
    """And what it then holds is what it was admitted at."""
    roster, one, now, admitted, version = Roster(), Engine("a"), 0.0, None, 0
    roster.add(one)
    for event in events:
        now += 1.5
        match event:
            case "up" if one.state == "starting":
                one.is_up(INFO, now)
            case "commit" if one.up:
                version += 1
                one.begins_commit(version)
                assert roster.serving() == {}
                one.ends_commit(version if version % 3 else None, now)
                admitted = None
            case "admit":
                try:
                    one.admit(version)
                    admitted = version
                except FleetError:
                    assert one.ended or one.version != version or not one.up
            case "withdraw":
                one.withdraw()
                admitted = None
            case "answer" if one.up:
                one.answered(said(now), now, busy=False)
            case "look":
                one.trouble(now, False, **LIMITS)
            case "end" if not one.ended:
                one.advance(EngineState.DEAD)
                admitted = None
        if one.state == "ready":
            assert roster.serving() == {"a": admitted} and admitted is not None
        else:
            assert roster.serving() == {}
