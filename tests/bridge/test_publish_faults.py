"""Whatever fails, wherever: every engine serves one whole version, or none; the next publish works.

The publisher, the encoder, the receivers and both channels' files are the real ones; the engines
are what a fault is easily put into. Each publish has one fault at most, at a random place.
"""

import contextlib
import os

import numpy as np
import pytest

from bridge.channels import ChannelError, Ticket
from bridge.channels.shuttle import ShuttleChannel
from bridge.delta import DeltaError
from bridge.encoding import Encoder
from bridge.publisher import Publisher, PublishError
from bridge.receive import Receiver
from bridge.transaction import EngineFailed, EngineLost
from bridge.wire import HostTensor, WireError

ROUNDS, KEEP, ANCHOR_EVERY = 1000, 2, 4
NAMES = ("a", "b", "c")
SIZE = 64
PLACES = [
    *["begin", "put", "finish", "export", "die while shipping"],
    *[
        "stage",
        "torn manifest",
        "flipped bit",
        "harmed base",
        "commit",
        "wrong digest",
        "wrong weights",
    ],
    *["late", "no route", "no route for anybody", "hung", "score", "wrong tensor", "gone", "none"],
]

TRAINERS = ("begin", "put", "finish", "export", "die while shipping")  # no version comes of these
WITHOUT_VERSION = (*TRAINERS, "torn manifest", "flipped bit")
# How an engine ends for which something goes wrong.
ENDS = dict.fromkeys(["commit", "hung", "gone"], "lost") | dict.fromkeys(
    ["wrong digest", "wrong weights", "wrong tensor"], "quarantined"
)
ENDS |= dict.fromkeys(["stage", "late", "score"], "aborted")
# Whoever could not fetch asks for it. What is torn in the first channel cannot be sent again.
TO_THE_FALLBACK = ("stage", "late", "no route", "no route for anybody")


class Fault(Exception):
    """What was put in."""


class Trainer:
    def __init__(self, rng):
        self.rng, self.plan, self.nbytes = rng, NAMES, 2 * SIZE * len(NAMES)
        self.weights = {name: rng.integers(0, 1 << 14, SIZE).astype(np.uint16) for name in NAMES}
        self.fault, self.device_bytes = "", 0

    def step(self):
        for name in NAMES:
            some = self.rng.random(SIZE) < 0.05
            self.weights[name] = np.where(some, self.weights[name] + 1, self.weights[name]).astype(
                np.uint16
            )

    def groups(self, params):
        for name in self.plan:
            if self.fault == "export" and name == "b":
                raise Fault("the device is gone")
            yield [HostTensor(name, "bfloat16", (SIZE,), params[name].view(np.uint8).copy())]

    def groups_since(self, kept, params):
        return self.groups(params)


class Channel(ShuttleChannel):
    fault = ""

    def begin(self, version, buckets, nbytes):
        if self.fault == "begin":
            raise ChannelError("no room")
        shipment = super().begin(version, buckets, nbytes)
        put, finish = shipment.put, shipment.finish

        def faulty_put(entries, data):
            if self.fault == "put" and entries[0].name == "b":
                raise ChannelError("the disk is full")
            put(entries, data)

        def faulty_finish(manifest):
            if self.fault == "finish":
                raise ChannelError("the rename failed")
            ticket = finish(manifest)
            if self.fault == "torn manifest":
                os.truncate(f"{ticket.address}/manifest.json", 99)
            if self.fault == "flipped bit":
                file = f"{ticket.address}/model-00002-of-00003.safetensors"
                with open(file, "r+b") as opened:
                    opened.seek(-3, os.SEEK_END)
                    last = opened.read(1)[0]
                    opened.seek(-3, os.SEEK_END)
                    opened.write(bytes([last ^ 8]))
            return ticket

        shipment.put, shipment.finish = faulty_put, faulty_finish
        if self.fault == "die while shipping":  # what a killed process leaves: no abort
            shipment.abort = lambda: None
            shipment.put = lambda entries, data: (_ for _ in ()).throw(ChannelError("killed"))
        return shipment


class Engine:
    """Serves a version, or is dead. `staged` and `serving` are (version, digest, weights)."""

    def __init__(self):
        self.receiver, self.staged, self.serving = Receiver(), None, None
        self.fault, self.held = "", []

    def stage(self, ticket):
        self.staged = None
        if self.fault == "stage":
            raise EngineFailed("out of memory while staging")
        if self.fault == "hung":
            raise EngineLost("did not answer before its deadline")
        if self.fault == "late":
            raise EngineFailed("was not fetched within 1 s")
        if self.fault.startswith("no route") and "fallback" not in ticket.address:
            raise EngineFailed("cannot be had from the object store")
        for array in self.held if self.fault == "harmed base" else []:
            if array.flags.writeable:
                array[5] ^= 1
        try:
            found = self.receiver.receive(Ticket.from_json(ticket.to_json()), 0.0)
        except (ChannelError, DeltaError, WireError) as error:
            raise EngineFailed(str(error)) from error
        self.held = found.data
        names = [entry.name for entry in found.manifest.tensors]
        weights = {n: d.tobytes() for n, d in zip(names, found.data, strict=True)}
        self.staged = (found.manifest.version, found.digest, weights)

    def commit(self, version):
        if self.staged is None or self.staged[0] != version:
            raise EngineFailed(f"version {version} is not staged")
        if self.fault == "commit":
            raise EngineLost("the load failed half way")
        self.serving, self.staged = self.staged, None
        if self.fault == "wrong weights":
            version, digest, weights = self.serving
            self.serving = (version, digest, weights | {"a": bytes(2 * SIZE)})
        digest = "0" * 64 if self.fault == "wrong digest" else self.serving[1]
        return {"version": version, "digest": digest}

    def score(self, tokens):
        if self.fault == "score":
            raise EngineFailed("vLLM scored another token")
        return scores({n: np.frombuffer(b, np.uint16) for n, b in self.serving[2].items()}, tokens)

    def admit(self, version):
        if self.fault == "gone":
            raise EngineLost("it died since")
        assert self.serving[0] == version


def scores(weights, tokens):
    whole = sum(int(w.astype(np.int64) @ np.arange(1, SIZE + 1)) for w in weights.values())
    return np.array([whole % 10_007] * len(tokens), np.float32)


class Fleet:
    """Three engines. One that ends is replaced: late, by the next publish, or while it is waited
    for."""

    replaced = quarantined = 0

    def __init__(self, count):
        self.engines = {f"engine-{i}": Engine() for i in range(count)}
        self.admitted, self.ended = {}, []  # name -> version; names

    def members(self):
        self.wait_members()
        return list(self.engines)

    def wait_members(self):
        joined = [f"{name}+" for name in self.ended]
        self.engines |= {name: Engine() for name in joined}
        self.ended = []
        return joined

    def holds(self, name):
        serving = self.engines[name].serving
        return None if serving is None else serving[0]

    def _ask(self, name, method, *args):
        try:
            return getattr(self.engines[name], method)(*args)
        except EngineLost:
            self.quarantine(name, "")
            raise

    def stage(self, name, ticket, fetch_s, timeout_s, expected=None):
        return self._ask(name, "stage", ticket)

    def commit(self, name, version, timeout_s):
        self.withdraw(name)
        return self._ask(name, "commit", version)

    def score(self, name, tokens, timeout_s):
        return self._ask(name, "score", tokens)

    def examine(self, name, timeout_s):
        version, _, _ = self.engines[name].serving
        wrong = {"b": "is not"} if self.engines[name].fault == "wrong tensor" else {}
        return {"version": version, "wrong": wrong, "unchecked": []}

    def quarantine(self, name, why):
        self.withdraw(name)
        del self.engines[name]
        self.ended.append(name)

    def admit(self, name, version):
        self._ask(name, "admit", version)
        self.admitted[name] = version

    def withdraw(self, name):
        self.admitted.pop(name, None)


@pytest.fixture
def unhurried(monkeypatch):
    """What is durable does not matter here, and to wait for the disk is slow."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.mark.parametrize("encoding", ["full", "delta"])
def test_a_thousand_faults_leave_no_engine_torn_and_nothing_behind(tmp_path, encoding, unhurried):
    rng = np.random.default_rng(0)
    trainer, fleet = Trainer(rng), Fleet(3)
    root, spare = tmp_path / "channel", tmp_path / "fallback"
    root.mkdir()
    channel, fallback = Channel(root, KEEP), ShuttleChannel(spare, KEEP)
    publisher = Publisher(
        trainer,
        channel,
        fleet,
        scores,
        probe=(1, 2, 3),
        probe_tolerance=0.5,
        examine_every=1,
        fallback=fallback,
        encoder=Encoder(encoding, ANCHOR_EVERY),
        warn=lambda text: None,
    )
    published, outcomes = {}, dict.fromkeys(PLACES, 0)
    for version in range(1, ROUNDS + 1):
        trainer.step()
        place = PLACES[rng.integers(len(PLACES))]
        everybody = place == "no route for anybody"
        faulty = fleet.members() if everybody else [rng.choice(fleet.members())]
        for name in faulty:
            fleet.engines[name].fault = place
        trainer.fault = channel.fault = place
        published[version] = {name: w.tobytes() for name, w in trainer.weights.items()}
        before = dict(fleet.admitted)
        report = None
        with contextlib.suppress(ChannelError, PublishError, Fault):
            report = publisher.publish(trainer.weights, version)
            outcomes[place] += 1
        trainer.fault = channel.fault = ""
        for engine in fleet.engines.values():
            engine.fault = ""

        if place in TRAINERS:
            assert fleet.admitted == before  # they serve on
        assert (report is None) == (place in WITHOUT_VERSION), place
        if report is not None:
            assert [*fleet.admitted.values()] == [version] * report.engines
            ends = sorted(outcome.state for outcome in report.outcomes.values())
            assert ends == sorted(["admitted"] * 2 + [ENDS.get(place, "admitted")]), place
        for late in fleet.wait_members() if rng.random() < 0.5 else []:
            publisher.welcome(late)
            assert (late in fleet.admitted) == (report is not None), place
        for name, admitted in fleet.admitted.items():
            served, _, weights = fleet.engines[name].serving
            assert served == admitted and weights == published[served], (version, place, name)
        assert (spare / f"v{version:08d}").exists() == (place in TO_THE_FALLBACK), place

        there = [path.name for path in root.iterdir()]
        if place not in ("die while shipping", "begin"):  # these cannot clear away what is left
            assert not any(name.startswith(".partial-") for name in there)
        # The newest, what it needs, and the chain before it.
        assert len(there) <= (2 * (ANCHOR_EVERY + 1) + 1 if encoding == "delta" else KEEP + 1)
    assert min(outcomes[place] for place in PLACES if place not in WITHOUT_VERSION) > 20
