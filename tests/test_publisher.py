"""An engine serves a version only after it has proved that it holds it."""

import dataclasses
import re

import numpy as np
import pytest

from bridge.channels import Channel, ChannelError, Ticket
from bridge.encoding import Encoder
from bridge.publisher import Publisher, PublishError
from bridge.wire import HostTensor, verify
from jaxrl.types import RunError

PROBE = (5, 6, 7)
TOLERANCE = 1e-3


class Failure(Exception):
    """What a fleet returns for an engine that failed."""


@dataclasses.dataclass
class FakeEngine:
    """A state machine: empty -> staged -> serving. Each fault is one thing that goes wrong."""

    fault: str = ""
    error: float = 0.0
    staged: tuple | None = None
    weights: np.ndarray | None = None

    def stage(self, channel, ticket):
        if self.fault == "stage":
            raise Failure("disk full")
        self.staged = channel.read(ticket)

    def commit(self, version):
        if self.staged is None:
            raise Failure(f"nothing is staged for version {version}")
        if self.fault == "commit":
            raise Failure("out of memory")
        (staged, digest, weights), self.staged = self.staged, None
        self.weights = weights
        return {
            "version": staged - 1 if self.fault == "version" else staged,
            "digest": "0" * 64 if self.fault == "digest" else digest,
        }

    def score(self, tokens):
        if self.fault == "score":
            raise Failure("died while scoring")
        if self.weights is None:
            raise Failure("has no weights yet")
        logprobs = model(self.weights, tokens)
        logprobs[-1] += self.error  # one wrong token is enough
        return logprobs[:-1] if self.fault == "short" else logprobs


class FakeChannel(Channel):
    """Versions in memory."""

    def __init__(self):
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
    """Engines by name, and a record of what was asked of them, in order."""

    def __init__(self, channel, **engines):
        self.channel, self.engines = channel, engines
        self.asked, self.serving, self.expected = [], {}, []
        self.silent = set()  # engines that are gone when the probe is sent

    def _ask(self, name, call):
        self.asked.append(name)
        outcomes = {}
        for engine_name, engine in self.engines.items():
            if name == "score" and engine_name in self.silent:
                continue
            try:
                outcomes[engine_name] = call(engine)
            except Failure as failure:
                outcomes[engine_name] = failure
        return outcomes

    def stage(self, ticket, expected=None):
        self.expected.append(expected)
        return self._ask("stage", lambda engine: engine.stage(self.channel, ticket))

    def commit(self, version):
        return self._ask("commit", lambda engine: engine.commit(version))

    def score(self, tokens):
        assert list(tokens) == list(PROBE)
        return self._ask("score", lambda engine: engine.score(tokens))

    def admit(self, names, version):
        self.asked.append("admit")
        self.serving = dict.fromkeys(names, version)


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


def make(**engines):
    """(publisher, fleet, warnings)."""
    channel = FakeChannel()
    fleet = FakeFleet(channel, **engines)
    warnings = []
    publisher = Publisher(
        Export(),
        channel,
        fleet,
        model,
        probe=PROBE,
        probe_tolerance=TOLERANCE,
        warn=warnings.append,
    )
    return publisher, fleet, warnings


def params(seed=0):
    return np.random.default_rng(seed).uniform(0.5, 2.0, 4).astype(np.float32)


# What is wrong with an engine -> what the report says of it.
FAULTS = {
    "stage": (FakeEngine("stage"), "disk full"),
    "commit": (FakeEngine("commit"), "out of memory"),
    "version": (FakeEngine("version"), "acknowledged version 6 .* published was 7"),
    "digest": (FakeEngine("digest"), "with digest 0000"),
    "score": (FakeEngine("score"), "died while scoring"),
    "short": (FakeEngine("short"), "no log-prob for each token"),
    "difference": (FakeEngine(error=2 * TOLERANCE), r"differ from the trainer's by 0\.002 nats"),
    "negative": (FakeEngine(error=-2 * TOLERANCE), r"differ from the trainer's by 0\.002 nats"),
    "nan": (FakeEngine(error=np.nan), "differ from the trainer's by nan nats"),
    "inf": (FakeEngine(error=-np.inf), "differ from the trainer's by inf nats"),
}


def faulty(name):
    engine, said = FAULTS[name]
    return dataclasses.replace(engine), said


@pytest.mark.parametrize("errors", [(0.5, 0.1), (0.1, 0.5)])
def test_engines_that_prove_the_version_serve_it(errors):
    a, b = (FakeEngine(error=error * TOLERANCE) for error in errors)
    publisher, fleet, warnings = make(a=a, b=b)
    report = publisher.publish(params(), 7)
    assert fleet.asked == ["stage", "commit", "score", "admit"]
    assert fleet.serving == {"a": 7, "b": 7} and not warnings
    assert (report.version, report.engines, report.bytes) == (7, 2, 16)
    assert report.digest == fleet.channel.versions[7][0].digest
    assert report.probe_max_abs_dlogp == pytest.approx(0.5 * TOLERANCE, rel=1e-3)
    np.testing.assert_array_equal(fleet.engines["a"].weights, params())


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


@pytest.mark.parametrize("fault", FAULTS)
def test_when_every_engine_fails_nothing_serves_and_each_is_named(fault):
    one, said = faulty(fault)
    other, _ = faulty(fault)
    publisher, fleet, warnings = make(one=one, other=other)
    with pytest.raises(PublishError) as error:
        publisher.publish(params(), 7)
    assert re.search(f"version 7: .*one: .*{said}.*; other: .*{said}", str(error.value))
    assert "admit" not in fleet.asked and not fleet.serving and not warnings
    assert isinstance(error.value, RunError)


def test_engines_that_fail_in_different_ways_are_all_named():
    engines = {fault: faulty(fault)[0] for fault in FAULTS}
    publisher, fleet, _ = make(**engines)
    with pytest.raises(PublishError) as error:
        publisher.publish(params(), 7)
    for fault, (_, said) in FAULTS.items():
        assert re.search(f"{fault}: [^;]*{said}", str(error.value))
    assert not fleet.serving


def test_an_engine_that_is_gone_when_the_probe_is_sent_does_not_serve():
    publisher, fleet, warnings = make(good=FakeEngine(), gone=FakeEngine())
    fleet.silent = {"gone"}
    publisher.publish(params(), 7)
    assert fleet.serving == {"good": 7} and "gone: " in warnings[0]


def test_the_first_thing_that_went_wrong_is_what_is_said():
    """An engine that could not stage cannot commit either; the cause is the former."""
    publisher, _, warnings = make(good=FakeEngine(), bad=FakeEngine("stage"))
    publisher.publish(params(), 7)
    assert "bad: disk full" in warnings[0] and "nothing is staged" not in warnings[0]


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
    fleet.asked.clear()
    with pytest.raises(ChannelError, match="version 3 exists"):
        publisher.publish(params(), 3)
    assert not fleet.asked and fleet.serving == {"a": 3}


def test_what_was_published_does_not_change_when_the_parameters_do():
    publisher, fleet, _ = make(a=FakeEngine())
    mine = params()
    publisher.publish(mine, 0)
    mine[:] = -1.0
    np.testing.assert_array_equal(fleet.engines["a"].weights, params())
    verify(*fleet.channel.versions[0])


EXPECTED = [("w", "float32", (4,))]


def test_frozen_weights_are_carried_and_loaded_and_nobody_is_admitted_yet():
    publisher, fleet, warnings = make(a=FakeEngine(), b=FakeEngine())
    publisher.publish_frozen(Export(), params(), EXPECTED, 3)
    assert fleet.asked == ["stage", "commit"] and fleet.expected == [EXPECTED]
    assert not fleet.serving and not warnings
    np.testing.assert_array_equal(fleet.engines["b"].weights, params())
    publisher.publish(params(1), 4)
    assert fleet.expected == [EXPECTED, None]  # a version holds what every version does
    assert fleet.serving == {"a": 4, "b": 4}


@pytest.mark.parametrize("fault", ["stage", "commit", "version", "digest"])
def test_an_engine_that_does_not_get_the_frozen_weights_is_named(fault):
    engine, said = faulty(fault)
    publisher, _, warnings = make(good=FakeEngine(), bad=engine)
    publisher.publish_frozen(Export(), params(), EXPECTED, 7)
    assert len(warnings) == 1 and "bad: " in warnings[0] and re.search(said, warnings[0])
    alone, _ = faulty(fault)
    publisher, *_ = make(bad=alone)
    with pytest.raises(PublishError, match=said):
        publisher.publish_frozen(Export(), params(), EXPECTED, 7)


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
    about = {"probe": PROBE, "probe_tolerance": TOLERANCE, "encoder": Encoder(encoding)}
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
    assert not fleet.asked and fleet.channel.aborted == 1
    fleet.channel.full_at = None
    publisher.publish_frozen(export, params(), EXPECTED, 1)
    assert fleet.asked == ["stage", "commit"]
