"""Who gets work: shared out by load, gated by version, held back while weights change."""

import threading
import time

import pytest

from bridge.roster import Engine, FleetError, Roster
from jaxrl.types import EnginesGone


@pytest.fixture
def roster():
    roster = Roster()
    for slot, name in enumerate("abc"):
        roster.add(Engine(name, actor=None, started=None, slot=slot))
        roster.acknowledge(name, 1)
    roster.admit("abc", 1)
    return roster


def test_work_goes_to_whoever_has_least(roster):
    version, shares = roster.assign([4] * 7, timeout_s=1)
    assert version == 1
    assert sorted(len(share) for share in shares.values()) == [2, 2, 3]
    assert sorted(index for share in shares.values() for index in share) == list(range(7))
    busy = max(shares, key=lambda name: len(shares[name]))
    _, more = roster.assign([4, 4], timeout_s=1)
    assert busy not in more


def test_released_work_no_longer_counts(roster):
    roster.assign([10, 1, 1], timeout_s=1)
    (busy,) = {"a", "b", "c"} - roster.assign([1, 1], timeout_s=1)[1].keys()
    roster.release(busy, 10)
    assert list(roster.assign([1], timeout_s=1)[1]) == [busy]


@pytest.mark.parametrize("state", ["failed", "quarantined"])
def test_an_engine_that_ended_gets_nothing(roster, state):
    roster.end("b", "b died", state)
    assert roster.alive == roster.serving == ["a", "c"]
    assert roster.assign([1] * 4, timeout_s=1)[1].keys() == {"a", "c"}
    with pytest.raises(FleetError, match=rf"b cannot be admitted .* {state} .* b died"):
        roster.admit("ab", 1)
    assert roster.failures == {"b": "b died"} and roster.ready == ["a", "c"]
    assert roster.quarantined == (state == "quarantined")


def test_whoever_asks_waits_for_one_that_starts_in_the_place_of_the_last(roster):
    roster.suspend()
    roster.add(Engine("d", actor=None, started=None))
    for name in "abc":
        roster.end(name, f"{name} died")
    assert roster.alive == ["d"] and roster.ready == []
    with pytest.raises(FleetError, match="none was admitted within"):
        roster.assign([1], timeout_s=0.05)
    roster.acknowledge("d", 2)
    roster.admit("d", 2)
    assert roster.assign([1], timeout_s=1) == (2, {"d": [0]})


@pytest.mark.parametrize("version", [0, 2])
def test_only_engines_with_exactly_the_version_are_admitted(roster, version):
    with pytest.raises(FleetError, match=f"weight version {version}: .*acknowledged 1"):
        roster.admit("a", version)
    assert roster.assign([1], timeout_s=1)[0] == 1 and roster.serving == ["a", "b", "c"]


def test_an_engine_that_is_not_there_cannot_be_admitted(roster):
    with pytest.raises(FleetError, match="d is not one of"):
        roster.admit("ad", 1)


def test_those_who_ask_during_an_update_wait_and_get_the_new_version(roster):
    roster.suspend()
    found = []
    asker = threading.Thread(target=lambda: found.append(roster.assign([1], timeout_s=10)))
    asker.start()
    time.sleep(0.1)
    assert not found
    roster.acknowledge("b", 2)
    roster.admit("b", 2)
    asker.join(5)
    assert found == [(2, {"b": [0]})]


def test_an_update_that_is_never_admitted_ends_the_wait(roster):
    roster.suspend()
    with pytest.raises(FleetError, match=r"none was admitted within 0.1 s"):
        roster.assign([1], timeout_s=0.1)


def test_when_the_last_engine_fails_nobody_waits(roster):
    roster.suspend()
    started = time.monotonic()
    threading.Timer(0.1, lambda: [roster.end(name, f"{name} died") for name in "abc"]).start()
    with pytest.raises(EnginesGone, match=r"no engine is left .* a died; b died; c died.*logs/"):
        roster.assign([1], timeout_s=30)
    assert time.monotonic() - started < 5
