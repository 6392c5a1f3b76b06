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
from bridge.encoding import Encoder
from bridge.publisher import Publisher, PublishError
from bridge.receive import Receiver
from bridge.wire import HostTensor

ROUNDS, KEEP, ANCHOR_EVERY = 1000, 2, 4
NAMES = ("a", "b", "c")
SIZE = 64
PLACES = [
    *["begin", "put", "finish", "export", "die while shipping"],
    *[
        "stage",
        "lost file",
        "flipped bit",
        "harmed base",
        "commit",
        "wrong digest",
        "wrong weights",
    ],
    *["late", "none"],
]


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
            if self.fault == "lost file":
                os.remove(f"{ticket.address}/manifest.json")
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
        self.dead, self.fault, self.held = False, "", []

    def stage(self, ticket):
        self.staged = None
        if self.fault == "stage":
            raise Fault("out of memory while staging")
        if self.fault == "late":
            raise Fault("did not finish before its deadline")  # and is not asked again this time
        for array in self.held if self.fault == "harmed base" else []:
            if array.flags.writeable:
                array[5] ^= 1
        found = self.receiver.receive(Ticket.from_json(ticket.to_json()), 0.0)
        self.held = found.data
        names = [entry.name for entry in found.manifest.tensors]
        weights = {n: d.tobytes() for n, d in zip(names, found.data, strict=True)}
        self.staged = (found.manifest.version, found.digest, weights)

    def commit(self, version):
        if self.staged is None or self.staged[0] != version:
            raise Fault(f"version {version} is not staged")
        if self.fault == "commit":
            self.dead, self.serving = True, None  # half loaded: it must not serve again
            raise Fault("the load failed half way")
        self.serving, self.staged = self.staged, None
        if self.fault == "wrong weights":
            version, digest, weights = self.serving
            self.serving = (version, digest, weights | {"a": bytes(2 * SIZE)})
        digest = "0" * 64 if self.fault == "wrong digest" else self.serving[1]
        return {"version": version, "digest": digest}

    def score(self, tokens):
        if self.serving is None:
            raise Fault("has no weights")
        return scores({n: np.frombuffer(b, np.uint16) for n, b in self.serving[2].items()}, tokens)


def scores(weights, tokens):
    whole = sum(int(w.astype(np.int64) @ np.arange(1, SIZE + 1)) for w in weights.values())
    return np.array([whole % 10_007] * len(tokens), np.float32)


class Fleet:
    def __init__(self, count):
        self.engines = {f"engine-{i}": Engine() for i in range(count)}
        self.admitted, self.version = [], None

    def _ask(self, method, *args):
        outcomes = {}
        for name, engine in self.engines.items():
            if not engine.dead:
                try:
                    outcomes[name] = getattr(engine, method)(*args)
                except Exception as error:
                    outcomes[name] = error
        return outcomes

    def stage(self, ticket, expected=None):
        return self._ask("stage", ticket)

    def commit(self, version):
        self.admitted = []
        return self._ask("commit", version)

    def score(self, tokens):
        return self._ask("score", tokens)

    def admit(self, names, version):
        self.admitted, self.version = list(names), version


@pytest.fixture
def unhurried(monkeypatch):
    """What is durable does not matter here, and to wait for the disk is slow."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.mark.parametrize("encoding", ["full", "delta"])
def test_a_thousand_faults_leave_no_engine_torn_and_nothing_behind(tmp_path, encoding, unhurried):
    rng = np.random.default_rng(0)
    trainer, channel, fleet = Trainer(rng), Channel(tmp_path, KEEP), Fleet(3)
    encoder = Encoder(encoding, ANCHOR_EVERY)
    publisher = Publisher(
        trainer,
        channel,
        fleet,
        scores,
        probe=(1, 2, 3),
        probe_tolerance=0.5,
        encoder=encoder,
        warn=lambda text: None,
    )
    published, outcomes = {}, dict.fromkeys(PLACES, 0)
    for version in range(1, ROUNDS + 1):
        trainer.step()
        place = PLACES[rng.integers(len(PLACES))]
        faulty = fleet.engines[f"engine-{rng.integers(3)}"]
        trainer.fault = channel.fault = faulty.fault = place
        published[version] = {name: w.tobytes() for name, w in trainer.weights.items()}
        before = list(fleet.admitted), fleet.version
        with contextlib.suppress(ChannelError, PublishError, Fault):
            publisher.publish(trainer.weights, version)
            outcomes[place] += 1
        trainer.fault = channel.fault = faulty.fault = ""

        if fleet.version != version and place in ("begin", "put", "finish", "export"):
            assert (fleet.admitted, fleet.version) == before  # they serve on
        for name in fleet.admitted:
            served, _, weights = fleet.engines[name].serving
            assert served == fleet.version and weights == published[served], (version, place, name)
        alone = "lost file", "flipped bit", "begin", "put", "finish", "export"
        if place not in (*alone, "die while shipping"):
            assert fleet.version == version and len(fleet.admitted) >= 2, place
        for name, engine in fleet.engines.items():
            if engine.dead:  # replaced, and gets the next version as whoever joins late does
                fleet.engines[name] = Engine()

        if place == "none":
            assert len(fleet.admitted) == 3
        there = [path.name for path in tmp_path.iterdir()]
        if place not in ("die while shipping", "begin"):  # these cannot clear away what is left
            assert not any(name.startswith(".partial-") for name in there)
        # The newest, what it needs, and the chain before it.
        assert len(there) <= (2 * (ANCHOR_EVERY + 1) + 1 if encoding == "delta" else KEEP + 1)
    assert outcomes["none"] > 30 and outcomes["harmed base"] > 30
    assert not any(outcomes[place] for place in ("begin", "put", "finish", "export"))
