"""An engine serves a version only after it has proved that it holds it."""

import dataclasses
import re
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from bridge.channels import Channel, ChannelError, Ticket, fetch
from bridge.channels.shuttle import ShuttleChannel
from bridge.encoding import Encoder
from bridge.publisher import Publisher, PublishError
from bridge.receive import Receiver
from bridge.transaction import EngineFailed, EngineLost, State, Transaction
from bridge.wire import HostTensor, verify
from jaxrl.types import RunError

PROBE = (5, 6, 7)
TOLERANCE = 1e-3
TIMEOUT_S = 60.0
PASSED = ["stage", "commit", "score", "admit"]


@dataclasses.dataclass
class FakeEngine:
    """A state machine: empty -> staged -> serving. Each fault is one thing that goes wrong."""

    fault: str = ""
    error: float = 0.0
    staged: tuple | None = None
    weights: np.ndarray | None = None
    holds: int | None = None
    wrong: dict = dataclasses.field(default_factory=dict)  # that an examination finds
    unchecked: list = dataclasses.field(default_factory=list)
    before: Callable = lambda method: None  # called ahead of each thing that is asked

    def stage(self, channel, ticket):
        self.before("stage")
        if self.fault == "stage":
            raise EngineFailed("disk full")
        if self.fault == "fetch" and "/first/" in ticket.address:
            raise EngineFailed("no route to the trainer")
        if self.fault == "first fetch":
            self.fault = ""
            raise EngineFailed("the connection was reset")
        if self.fault == "hung":
            raise EngineLost("did not finish before its deadline: stage")
        self.staged = channel.read(ticket)

    def commit(self, version):
        if self.staged is None:
            raise EngineFailed(f"nothing is staged for version {version}")
        if self.fault == "commit":
            raise EngineLost("out of memory")
        (staged, digest, weights), self.staged = self.staged, None
        self.weights, self.holds = weights, staged
        return {
            "version": staged - 1 if self.fault == "version" else staged,
            "digest": "0" * 64 if self.fault == "digest" else digest,
        }

    def score(self, tokens):
        if self.fault == "score":
            raise EngineFailed("vLLM scored another token")
        logprobs = model(self.weights, tokens)
        logprobs[-1] += self.error  # one wrong token is enough
        return logprobs[:-1] if self.fault == "short" else logprobs

    def admit(self):
        if self.fault == "gone":
            raise EngineLost("it died since")

    def examine(self):
        version = self.holds - 1 if self.fault == "examined" else self.holds
        return {"version": version, "wrong": self.wrong, "unchecked": self.unchecked}


class FakeChannel(Channel):
    """Versions in memory."""

    def __init__(self):
        super().__init__(keep_versions=1)
        self.versions, self.puts, self.aborted = {}, 0, 0
        self.full_at = None  # bucket that there is no room for

    def begin(self, version, buckets, nbytes):
        if version in self.versions:
            raise ChannelError(f"version {version} exists")
        return FakeShipment(self, version, buckets)

    def close(self):
        pass

    def read(self, ticket):
        manifest, data = self.versions[ticket.version]
        verify(manifest, data)
        return manifest.version, manifest.digest, data[0].view(np.float32)


class FakeShipment:
    def __init__(self, channel, version, count):
        self.channel, self.version, self.count = channel, version, count
        self.buckets = {}
        self.aborted = False

    def put(self, entries, data):
        (index,) = {entry.bucket for entry in entries}
        if index == self.channel.full_at:
            raise ChannelError("no space")
        self.channel.puts += 1
        self.buckets[index] = [array.copy() for array in data]

    def finish(self, manifest):
        assert sorted(self.buckets) == list(range(self.count))
        data = [array for index in sorted(self.buckets) for array in self.buckets[index]]
        self.channel.versions[self.version] = (manifest, data)
        return Ticket("fake", self.version, manifest.digest, "memory")

    def abort(self):
        self.channel.aborted += self.version not in self.channel.versions


class FakeFleet:
    """Engines by name, and a record of what each was asked, in order."""

    replaced = quarantined = 0

    def __init__(self, channel, **engines):
        self.channel, self.engines = channel, engines
        self.asked, self.serving, self.expected = {name: [] for name in engines}, {}, []
        self.ended, self.starting = {}, []  # name -> why; lists of (name, engine), ready in turn

    def members(self):
        return [name for name in self.engines if name not in self.ended]

    def wait_members(self):
        joined = self.starting.pop(0) if self.starting else []
        return [self.join(name, engine) for name, engine in joined]

    def join(self, name, engine):
        self.asked[name], self.engines[name] = [], engine
        return name

    def holds(self, name):
        return self.engines[name].holds

    def _ask(self, name, method, *args):
        self.asked[name].append(method)
        try:
            return getattr(self.engines[name], method)(*args)
        except EngineLost as lost:
            self.quarantine(name, str(lost))
            raise

    def stage(self, name, ticket, fetch_s, timeout_s, expected=None):
        assert 0 < 2 * fetch_s < timeout_s <= TIMEOUT_S
        self.expected.append(expected)
        return self._ask(name, "stage", self.channel, ticket)

    def commit(self, name, version, timeout_s):
        assert 0 < timeout_s <= TIMEOUT_S
        self.serving.pop(name, None)
        return self._ask(name, "commit", version)

    def score(self, name, tokens, timeout_s):
        assert list(tokens) == list(PROBE) and 0 < timeout_s <= TIMEOUT_S
        return self._ask(name, "score", tokens)

    def examine(self, name, timeout_s):
        assert 0 < timeout_s <= TIMEOUT_S
        return self._ask(name, "examine")

    def quarantine(self, name, why):
        self.ended[name] = why
        self.serving.pop(name, None)

    def admit(self, name, version):
        assert name not in self.ended and self.engines[name].holds == version
        self._ask(name, "admit")
        self.serving[name] = version

    def withdraw(self, name):
        assert name not in self.ended
        self.asked[name].append("withdraw")
        self.serving.pop(name, None)


def model(weights, tokens):
    """Stands for the policy: log-probs that depend on the weights."""
    return np.array([0.0, *(-weights[t % len(weights)] for t in tokens[1:])], np.float32)


class Export:
    """Weights by name, each a group of its own; counts the groups that were taken."""

    def __init__(self, names=("w",)):
        self.plan, self.nbytes, self.taken = names, 16 * len(names), 0
        self.device_bytes = 16 * len(names)

    def groups(self, params):
        for name in self.plan:
            self.taken += 1
            data = params.view(np.uint8).reshape(-1).copy()
            yield [HostTensor(name, "float32", params.shape, data)]

    def groups_since(self, kept, params):
        return self.groups(params)


def make(channel=None, examine_every=0, fallback=None, **engines):
    """(publisher, fleet, warnings)."""
    channel = channel or FakeChannel()
    fleet = FakeFleet(channel, **engines)
    warnings = []
    publisher = Publisher(
        Export(),
        channel,
        fleet,
        model,
        probe=PROBE,
        probe_tolerance=TOLERANCE,
        timeout_s=TIMEOUT_S,
        examine_every=examine_every,
        fallback=fallback,
        warn=warnings.append,
    )
    return publisher, fleet, warnings


def params(seed=0):
    return np.random.default_rng(seed).uniform(0.5, 2.0, 4).astype(np.float32)


# What is wrong with an engine -> what the report says of it, how it ends, and in which state.
FAULTS = {
    "stage": (FakeEngine("stage"), "disk full; again: disk full", "aborted", "announced"),
    "hung": (FakeEngine("hung"), "deadline: stage", "lost", "announced"),
    "commit": (FakeEngine("commit"), "out of memory", "lost", "fetched"),
    "version": (
        FakeEngine("version"),
        "acknowledged version 6 .* published was 7",
        "quarantined",
        "applied",
    ),
    "digest": (FakeEngine("digest"), "with digest 0000", "quarantined", "applied"),
    "score": (FakeEngine("score"), "scored another token", "aborted", "applied"),
    "gone": (FakeEngine("gone"), "it died since", "lost", "acknowledged"),
    "short": (FakeEngine("short"), "no log-prob for each token", "quarantined", "applied"),
} | {
    str(error): (
        FakeEngine(error=error * TOLERANCE),
        rf"differ from the trainer's by {said} nats",
        "quarantined",
        "applied",
    )
    for error, said in [(2, r"0\.002"), (-2, r"0\.002"), (np.nan, "nan"), (-np.inf, "inf")]
}


def faulty(name):
    engine, said, *_ = FAULTS[name]
    return dataclasses.replace(engine), said


@pytest.mark.parametrize("errors", [(0.5, 0.1), (0.1, 0.5)])
def test_engines_that_prove_the_version_serve_it(errors):
    a, b = (FakeEngine(error=error * TOLERANCE) for error in errors)
    publisher, fleet, warnings = make(a=a, b=b)
    report = publisher.publish(params(), 7)
    assert fleet.asked == {name: PASSED for name in "ab"}
    assert fleet.serving == {"a": 7, "b": 7} and not warnings
    assert (report.version, report.engines, report.bytes) == (7, 2, 16)
    assert report.digest == fleet.channel.versions[7][0].digest
    assert report.probe_max_abs_dlogp == pytest.approx(0.5 * TOLERANCE, rel=1e-3)
    np.testing.assert_array_equal(fleet.engines["a"].weights, params())
    states = ["announced", "fetched", "applied", "acknowledged", "admitted"]
    for outcome in report.outcomes.values():
        assert (outcome.state, outcome.failed_in) == ("admitted", None)
        assert list(outcome.seconds) == states and outcome.digest == report.digest


@pytest.mark.parametrize("fault", FAULTS)
def test_an_engine_that_fails_is_left_out_and_named_and_the_other_serves(fault):
    engine, said = faulty(fault)
    publisher, fleet, warnings = make(good=FakeEngine(error=1e-5), bad=engine)
    report = publisher.publish(params(), 7)
    assert fleet.serving == {"good": 7}
    assert (report.engines, report.version) == (1, 7)
    assert report.probe_max_abs_dlogp == pytest.approx(1e-5, rel=0.05)  # of those that serve
    assert len(warnings) == 1 and re.search(f"version 7.* bad: .*{said}", warnings[0])
    assert "good" not in warnings[0]
    *_, state, failed_in = FAULTS[fault]
    outcome = report.outcomes["bad"]
    assert (outcome.state, outcome.failed_in) == (state, failed_in)
    assert f"({state} when {failed_in})" in warnings[0] and re.search(said, outcome.why)
    assert ("bad" in fleet.ended) == (state != "aborted") == ("withdraw" not in fleet.asked["bad"])


@pytest.mark.parametrize("fault", FAULTS)
def test_when_every_engine_fails_nothing_serves_and_each_is_named(fault):
    one, said = faulty(fault)
    other, _ = faulty(fault)
    publisher, fleet, warnings = make(one=one, other=other)
    with pytest.raises(PublishError) as error:
        publisher.publish(params(), 7)
    assert re.search(f"version 7: .*one: .*{said}.*; other: .*{said}", str(error.value))
    assert not fleet.serving and not warnings
    assert isinstance(error.value, RunError)


def test_engines_that_fail_in_different_ways_are_all_named():
    engines = {f"engine-{fault}": faulty(fault)[0] for fault in FAULTS}
    publisher, fleet, _ = make(**engines)
    with pytest.raises(PublishError) as error:
        publisher.publish(params(), 7)
    for fault, (_, said, *_) in FAULTS.items():
        assert re.search(f"engine-{re.escape(fault)}: [^(]*{said}", str(error.value))
    assert not fleet.serving


def test_an_engine_is_admitted_while_a_slower_one_still_fetches():
    admitted, seen = threading.Event(), []

    class Fast(FakeEngine):
        def admit(self):
            admitted.set()

    publisher, fleet, _ = make(slow=FakeEngine(before=lambda _: seen.append(admitted.wait(20))))
    fleet.join("fast", Fast())
    publisher.publish(params(), 7)
    assert seen == [True] and fleet.serving == {"fast": 7, "slow": 7}


def test_begin_needs_the_trainer_and_the_rest_is_in_the_background():
    go_on, scored = threading.Event(), []
    publisher, fleet, _ = make(a=FakeEngine(before=lambda _: go_on.wait(20)))
    score, publisher._score = publisher._score, lambda *asked: scored.append(1) or score(*asked)
    mine = params()
    wait = publisher.begin(mine, 7)
    assert scored and not fleet.serving
    mine[:] = -1.0
    go_on.set()
    assert wait().version == wait().version == 7
    np.testing.assert_array_equal(fleet.engines["a"].weights, params())
    assert fleet.serving == {"a": 7}


def test_nobody_waits_in_begin_for_engines_that_start():
    go_on = threading.Event()
    publisher, fleet, _ = make()
    fleet.starting = [[("a", FakeEngine("commit"))], [("b", FakeEngine())]]
    fleet.wait_members, join = lambda: go_on.wait(20) and join(), fleet.wait_members
    wait = publisher.begin(params(), 7)
    go_on.set()
    assert wait().engines == 1 and fleet.serving == {"b": 7}
    fleet.engines["b"].fault = "commit"
    wait = publisher.begin(params(), 8)
    with pytest.raises(PublishError, match="b: out of memory"):
        wait()


@pytest.mark.parametrize("fault", ["", "stage"])
def test_what_goes_wrong_in_the_trainer_meanwhile_ends_the_publish(fault):
    publisher, fleet, _ = make(a=FakeEngine(fault))
    publisher._score = lambda params, tokens: 1 / 0
    with pytest.raises(ZeroDivisionError):
        publisher.publish(params(), 7)
    assert not fleet.serving


def test_one_failed_fetch_is_tried_again():
    publisher, fleet, warnings = make(a=FakeEngine("first fetch"))
    assert publisher.publish(params(), 7).engines == 1 and not warnings
    assert fleet.asked["a"] == ["stage", *PASSED]


class Files(ShuttleChannel):
    """Whoever cannot use the first one is told by the directory's name."""

    def read(self, ticket):
        found = Receiver().receive(ticket, 1.0)
        return found.manifest.version, found.digest, found.data[0].view(np.float32)


def make_with_fallback(root, **engines):
    return make(Files(root / "first"), fallback=Files(root / "second"), **engines)


def test_who_cannot_use_the_channel_gets_the_same_version_through_the_fallback(tmp_path):
    engines = {"good": FakeEngine(), "one": FakeEngine("fetch"), "two": FakeEngine("fetch")}
    publisher, fleet, warnings = make_with_fallback(tmp_path, **engines)
    publisher._encoder = Encoder("delta")
    for version in (7, 8):
        report = publisher.publish(params(version), version)
        assert report.engines == 3 and not warnings
        assert fleet.asked["one"] == ["stage", *PASSED]
        fleet.asked["one"].clear()
        assert {outcome.digest for outcome in report.outcomes.values()} == {report.digest}
        np.testing.assert_array_equal(fleet.engines["two"].weights, params(version))
    assert report.base == 7  # and is whole in the fallback, which may lack what came before
    ticket = Ticket("shuttle", 8, report.digest, str(tmp_path / "second" / "v00000008"))
    assert fetch(ticket, 1.0)[0].base is None


def test_the_fallback_is_not_used_while_everybody_can_do_without(tmp_path):
    publisher, *_ = make_with_fallback(tmp_path, good=FakeEngine(), bad=FakeEngine("commit"))
    publisher.publish(params(), 7)
    assert not (tmp_path / "second").exists()


def test_a_fallback_that_fails_too_is_told_with_the_first_cause(tmp_path):
    publisher, fleet, warnings = make_with_fallback(
        tmp_path, good=FakeEngine(), bad=FakeEngine("fetch")
    )
    (tmp_path / "second").write_text("in the way")
    publisher.publish(params(), 7)
    assert fleet.serving == {"good": 7}
    assert re.search("no route to the trainer; through publish.fallback: .*second", warnings[0])


def test_what_a_model_holds_is_examined_in_every_nth_version_and_in_an_engines_first():
    publisher, fleet, _ = make(examine_every=3, a=FakeEngine())
    for version in range(1, 6):
        if version == 3:
            fleet.join("b", FakeEngine())
        publisher.publish(params(), version)
    examined = [(name, asked.count("examine")) for name, asked in fleet.asked.items()]
    assert examined == [("a", 2), ("b", 2)]  # 1 and 4; 3, which is its first, and 4
    assert fleet.serving == {"a": 5, "b": 5}


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        (
            FakeEngine(wrong={"norm.weight": "one row", "q": "swapped"}),
            "norm.weight: one row; q: s",
        ),
        (FakeEngine("examined"), "examined was version 6, published was 7"),
    ],
)
def test_an_engine_whose_model_holds_something_else_is_quarantined(engine, said):
    publisher, fleet, warnings = make(examine_every=1, good=FakeEngine(), bad=engine)
    report = publisher.publish(params(), 7)
    assert fleet.serving == {"good": 7} and report.outcomes["bad"].state == "quarantined"
    assert said in fleet.ended["bad"] and said in warnings[0]


def test_tensors_that_cannot_be_examined_are_told_once():
    publisher, fleet, warnings = make(examine_every=1, a=FakeEngine(unchecked=["x", "y"]))
    publisher.publish(params(), 1)
    publisher.publish(params(), 2)
    assert fleet.serving == {"a": 2}
    assert len(warnings) == 1 and "2 tensors cannot be examined" in warnings[0]
    assert "x, y" in warnings[0]


def test_when_nobody_is_left_the_publish_waits_for_those_that_start():
    publisher, fleet, warnings = make(a=FakeEngine("commit"))
    fleet.starting = [[("b", FakeEngine("digest"))], [("c", FakeEngine())]]
    report = publisher.publish(params(), 7)
    assert fleet.serving == {"c": 7} and report.engines == 1
    assert [outcome.state for outcome in report.outcomes.values()] == [
        "lost",
        "quarantined",
        "admitted",
    ]
    assert "a: out of memory" in warnings[0] and "b: " in warnings[0]


def test_who_serves_does_not_wait_for_those_that_start():
    publisher, fleet, _ = make(a=FakeEngine(), b=FakeEngine("commit"))
    fleet.starting = [[("c", FakeEngine())]]
    publisher.publish(params(), 7)
    assert fleet.serving == {"a": 7} and fleet.starting


def test_an_engine_left_with_old_weights_is_found_by_the_probe():
    """It acknowledges the right version and digest, and serves something else."""

    class Stubborn(FakeEngine):
        def commit(self, version):
            kept = self.weights
            answer = super().commit(version)
            self.weights = self.weights if kept is None else kept
            return answer

    publisher, fleet, warnings = make(good=FakeEngine(), bad=Stubborn())
    publisher.publish(params(0), 0)
    assert fleet.serving == {"good": 0, "bad": 0}
    publisher.publish(params(1), 1)
    assert fleet.serving == {"good": 1} and "bad: its log-probs" in warnings[0]
    assert "bad" in fleet.ended


def test_an_engine_that_failed_once_may_serve_the_next_version():
    publisher, fleet, _ = make(good=FakeEngine(), bad=FakeEngine("stage"))
    publisher.publish(params(0), 0)
    assert fleet.serving == {"good": 0}
    fleet.engines["bad"].fault = ""
    publisher.publish(params(1), 1)
    assert fleet.serving == {"good": 1, "bad": 1}


def test_a_channel_that_cannot_carry_the_version_asks_nothing_of_the_engines():
    publisher, fleet, _ = make(a=FakeEngine())
    publisher.publish(params(), 3)
    fleet.asked["a"].clear()
    with pytest.raises(ChannelError, match="version 3 exists"):
        publisher.publish(params(), 3)
    assert not fleet.asked["a"] and fleet.serving == {"a": 3}


def test_what_was_published_does_not_change_when_the_parameters_do():
    publisher, fleet, _ = make(a=FakeEngine())
    mine = params()
    publisher.publish(mine, 0)
    mine[:] = -1.0
    np.testing.assert_array_equal(fleet.engines["a"].weights, params())
    verify(*fleet.channel.versions[0])


EXPECTED = [("w", "float32", (4,))]


def test_every_engine_loads_the_frozen_weights_ahead_of_its_first_version():
    publisher, fleet, warnings = make(a=FakeEngine())
    loaded = []
    fleet.stage, stage = lambda *asked: loaded.append(asked[:2]) or stage(*asked), fleet.stage
    publisher.publish_frozen(Export(), params(), EXPECTED, 3)
    assert not fleet.asked["a"] and not fleet.serving
    publisher.publish(params(1), 4)
    fleet.join("b", FakeEngine())
    publisher.publish(params(2), 5)
    steps = [(name, ticket.version) for name, ticket in loaded]
    assert [v for name, v in steps if name == "a"] == [3, 4, 5]
    assert [v for name, v in steps if name == "b"] == [3, 5]
    assert fleet.expected.count(EXPECTED) == 2 and fleet.expected.count(None) == 3
    assert fleet.serving == {"a": 5, "b": 5} and not warnings
    np.testing.assert_array_equal(fleet.engines["b"].weights, params(2))


@pytest.mark.parametrize("fault", ["stage", "commit", "digest"])
def test_an_engine_that_does_not_get_the_frozen_weights_is_named(fault):
    engine, said = faulty(fault)
    publisher, fleet, warnings = make(good=FakeEngine(), bad=engine)
    publisher.publish_frozen(Export(), params(), EXPECTED, 7)
    publisher.publish(params(), 8)
    assert len(warnings) == 1 and "bad: " in warnings[0] and re.search(said, warnings[0])
    assert "when staged" in warnings[0] and fleet.serving == {"good": 8}


def test_an_engine_that_comes_late_is_brought_the_version_of_then_and_what_is_beneath_it():
    publisher, fleet, warnings = make(examine_every=9, a=FakeEngine())
    publisher.publish_frozen(Export(), params(), EXPECTED, 3)
    fleet.join("b", FakeEngine())
    publisher.welcome("b")
    assert not fleet.asked["b"]  # there is nothing yet
    publisher.publish(params(1), 4)
    publisher.publish(params(2), 5)
    for name in fleet.engines:
        fleet.asked[name].clear()
        publisher.welcome(name)
    assert fleet.asked == {"a": [], "b": []}  # they have it
    fleet.join("c", FakeEngine())
    publisher.welcome("c")
    assert fleet.asked["c"] == ["stage", "commit", *PASSED[:-1], "examine", "admit"]
    np.testing.assert_array_equal(fleet.engines["c"].weights, params(2))
    assert fleet.serving == {"a": 5, "b": 5, "c": 5} and not warnings


@pytest.mark.parametrize("fault", FAULTS)
def test_a_late_engine_that_fails_is_named_and_not_admitted(fault):
    publisher, fleet, warnings = make(good=FakeEngine())
    publisher.publish(params(), 7)
    engine, said = faulty(fault)
    fleet.join("bad", engine)
    for _ in range(2):
        publisher.welcome("bad")
    assert fleet.serving == {"good": 7} and len(warnings) == 1
    assert re.search(f"version 7: .*bad: .*{said}", warnings[0])


def test_a_late_engine_is_not_held_up_by_a_publish_and_counts_where_that_finds_nobody_else():
    come, go_on = threading.Event(), threading.Event()

    def wait(method):
        come.set()
        go_on.wait(20)

    publisher, fleet, warnings = make(a=FakeEngine("commit", before=wait))
    report = publisher.begin(params(), 7)
    assert come.wait(20)
    fleet.join("b", FakeEngine())
    publisher.welcome("b")
    assert fleet.serving == {"b": 7}
    go_on.set()
    assert report().outcomes["b"].state == "admitted" and fleet.asked["b"] == PASSED
    assert len(warnings) == 1 and "a: out of memory" in warnings[0]


def test_an_engine_that_comes_while_a_version_is_shipped_is_offered_that_one():
    publisher, fleet, _ = make(a=FakeEngine())
    publisher.publish(params(), 7)

    class Late(Export):
        def groups(self, params):
            publisher.welcome(fleet.join("b", FakeEngine()))
            return super().groups(params)

    publisher._export = Late()
    assert publisher.publish(params(), 8).outcomes.keys() == {"a", "b"}
    assert fleet.asked["b"] == PASSED and fleet.serving == {"a": 8, "b": 8}


@pytest.mark.parametrize("what", ["slow", "late", "starting"])
def test_the_next_version_is_shipped_when_nobody_fetches_the_last_any_more(tmp_path, what):
    """The channel keeps one: what is still fetched would be dropped."""
    fetching, go_on, shipped = threading.Event(), threading.Event(), threading.Event()

    def wait(method):
        fetching.set()
        go_on.wait(20)

    publisher, fleet, warnings = make(Files(tmp_path, keep_versions=1), a=FakeEngine())
    if what == "slow":
        fleet.join("b", FakeEngine(before=wait))
    if what == "starting":
        fleet.engines.pop("a")
        fleet.starting = [[("a", FakeEngine()), ("b", FakeEngine())]]
        fleet.wait_members, join = lambda: wait("") or join(), fleet.wait_members
    report = publisher.begin(params(), 7)
    if what == "late":
        report()
        fleet.join("b", FakeEngine(before=wait))
        threading.Thread(target=publisher.welcome, args=("b",), daemon=True).start()
    assert fetching.wait(20)
    reports = []

    def next_version():
        then = publisher.begin(params(1), 8)
        shipped.set()
        reports.append(then())

    publishing = threading.Thread(target=next_version, daemon=True)
    publishing.start()
    assert not shipped.wait(0.3)
    go_on.set()
    publishing.join(20)
    assert not warnings and fleet.asked["b"] == 2 * PASSED
    assert fleet.serving == {"a": 8, "b": 8} and reports[0].engines == 2


NAMES = tuple("abcdefghij")


def test_every_group_is_a_bucket_in_the_order_of_the_export():
    publisher, fleet, _ = make(a=FakeEngine())
    publisher.publish_frozen(Export(NAMES), params(), EXPECTED, 0)
    manifest, data = fleet.channel.versions[0]
    assert [(entry.name, entry.bucket) for entry in manifest.tensors] == [
        (name, index) for index, name in enumerate(NAMES)
    ]
    verify(manifest, data)


@pytest.mark.parametrize("encoding", ["full", "delta"])
def test_a_manifest_says_whether_the_next_version_may_be_a_difference_from_it(encoding):
    _, fleet, _ = make(a=FakeEngine())
    about = {"probe": PROBE, "probe_tolerance": TOLERANCE, "timeout_s": TIMEOUT_S}
    about["encoder"] = Encoder(encoding)
    Publisher(Export(), fleet.channel, fleet, model, **about, warn=print).publish(params(), 3)
    manifest, _ = fleet.channel.versions[3]
    assert manifest.keep == (encoding == "delta")


@pytest.mark.parametrize("full_at", [0, 4, len(NAMES) - 1])
def test_a_bucket_that_cannot_be_put_ends_the_publish_and_the_export_is_still_taken(full_at):
    """Of several processes all must take every group, or the mesh would wait for one of them."""
    publisher, fleet, _ = make(a=FakeEngine())
    fleet.channel.full_at, export = full_at, Export(NAMES)
    with pytest.raises(ChannelError, match="no space"):
        publisher.publish_frozen(export, params(), EXPECTED, 0)
    assert export.taken == len(NAMES) and fleet.channel.puts <= full_at + 3
    assert fleet.channel.aborted == 1
    fleet.channel.full_at = None
    publisher.publish_frozen(export, params(), EXPECTED, 1)
    verify(*fleet.channel.versions[1])


def test_frozen_weights_outlive_the_versions_that_come_after_them(tmp_path):
    """In the fallback too, for an engine that joins late and cannot use the channel."""
    publisher, fleet, warnings = make_with_fallback(tmp_path, a=FakeEngine("fetch"))
    publisher.publish_frozen(Export(), params(), EXPECTED, 1)
    for version in range(2, 7):
        publisher.publish(params(version), version)
    fleet.join("b", FakeEngine("fetch"))
    fleet.join("c", FakeEngine())
    assert publisher.publish(params(7), 7).engines == 3 and not warnings
    assert fleet.asked["c"] == ["stage", "commit", *PASSED]


def test_no_state_can_be_left_out_and_what_has_ended_stays_so():
    transaction = Transaction("a", TIMEOUT_S)
    for state in (State.FETCHED, State.ACKNOWLEDGED, State.ADMITTED):
        with pytest.raises(ValueError, match=f"{state} cannot follow staged"):
            transaction.advance(state)
    transaction.advance(State.ANNOUNCED)
    transaction.fail(State.LOST, "died")
    for state in State:
        with pytest.raises(ValueError, match="cannot follow lost"):
            transaction.advance(state)


def test_a_late_engine_that_could_not_have_a_version_is_offered_it_again(monkeypatch):
    """It may be the only one, and then no other version comes."""
    monkeypatch.setattr("bridge.publisher._AGAIN_S", (0.05, 0.05))
    publisher, fleet, warnings = make(a=FakeEngine())
    publisher.publish(params(), 7)
    late = FakeEngine("stage")
    publisher.welcome(fleet.join("late", late))
    assert fleet.serving == {"a": 7} and len(warnings) == 1
    late.fault = ""
    end = time.monotonic() + 20
    while fleet.serving != {"a": 7, "late": 7} and time.monotonic() < end:
        time.sleep(0.01)
    assert fleet.serving == {"a": 7, "late": 7}
    publisher.welcome(fleet.join("other", FakeEngine("stage")))
    assert set(publisher.publish(params(1), 8).outcomes) == {"a", "late", "other"}
    asked = list(fleet.asked["other"])
    time.sleep(0.5)
    assert fleet.asked["other"] == asked  # version 7 is not offered beside version 8


@pytest.mark.parametrize("fault", ["score", "examine"])
def test_an_engine_is_examined_until_it_was_admitted_once(fault):
    class Late(FakeEngine):
        def examine(self):
            if self.fault == "examine":
                raise EngineFailed("its model was not examined within 9 s")
            return super().examine()

    bad = Late(fault, wrong={"w": "row 1 is not what was sent"})
    publisher, fleet, _ = make(examine_every=9, good=FakeEngine(), bad=bad)
    publisher.publish(params(), 7)
    bad.fault = ""
    assert publisher.publish(params(1), 8).outcomes["bad"].state == "quarantined"
    assert fleet.serving == {"good": 8} and fleet.asked["good"].count("examine") == 1


def test_a_trainer_that_scores_late_costs_no_engine_its_time(monkeypatch):
    monkeypatch.setattr(f"{__name__}.TIMEOUT_S", 1.0)
    publisher, fleet, warnings = make(examine_every=1, a=FakeEngine())

    def score(*arguments):
        time.sleep(1.5)  # as the first time, when it is compiled
        return model(*arguments)

    publisher._score = score
    assert publisher.publish(params(), 7).engines == 1 and not warnings
    assert fleet.serving == {"a": 7}


def test_a_fallback_that_could_not_take_a_version_is_tried_again(tmp_path):
    """The frozen weights are brought to every new engine of a run through it."""
    publisher, fleet, warnings = make_with_fallback(tmp_path, good=FakeEngine())
    publisher.publish_frozen(Export(), params(), EXPECTED, 3)
    publisher.publish(params(), 4)
    (tmp_path / "second").write_text("in the way")
    publisher.welcome(fleet.join("first", FakeEngine("fetch")))
    assert len(warnings) == 1 and "File exists" in warnings[0]
    (tmp_path / "second").unlink()
    publisher.welcome(fleet.join("other", FakeEngine("fetch")))
    assert fleet.serving == {"good": 4, "other": 4}, warnings


def test_what_hands_out_versions_is_asked_to_do_so_before_a_second_fetch():
    publisher, fleet, warnings = make(a=FakeEngine("stage"))

    def refresh():
        fleet.engines["a"].fault = ""

    publisher._channel.refresh = refresh
    assert publisher.publish(params(), 7).engines == 1 and not warnings
