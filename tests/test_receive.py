"""However a version travelled, what arrives is the version; through real channels' files."""

import dataclasses
import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from bridge import channels
from bridge.channels import ChannelError, Ticket, live
from bridge.channels.shuttle import ShuttleChannel
from bridge.delta import DeltaError
from bridge.encoding import Encoder, Shadow
from bridge.publisher import ship
from bridge.receive import Receiver
from bridge.wire import Base, HostTensor, WireError, manifest_of, pack

DEADLINE_S = 2.0
SHAPES = {
    "norm": ((96,), np.float32),
    "w": ((64, 48), ml_dtypes.bfloat16),
    "scalar": ((), np.float32),
    "nothing": ((0, 3), ml_dtypes.bfloat16),
    "still": ((50,), ml_dtypes.bfloat16),
}


class Trainer:
    """Weights that move a little at every step, published one way or the other."""

    def __init__(self, root: Path, encoding="delta", anchor_every=16, keep=2, shapes=SHAPES):
        self.channel = ShuttleChannel(root, keep)
        self.encoder, self.shadow = Encoder(encoding, anchor_every), Shadow()
        self.rng = np.random.default_rng(0)
        self.weights = {
            name: self.rng.normal(size=shape).astype(dtype)
            for name, (shape, dtype) in shapes.items()
        }
        self.version = 0

    def step(self, share=0.02):
        for name, array in self.weights.items():
            if name != "still":
                flat = array.reshape(-1).copy()
                some = self.rng.random(flat.size) < share
                flat[some] = flat[some] * np.asarray(1.01, array.dtype)
                self.weights[name] = flat.reshape(array.shape)

    def publish(self, share=0.02) -> Ticket:
        self.step(share)
        self.version += 1
        base = self.encoder.base()
        self.shadow.begin(base, self.encoder.deltas)
        names = list(self.weights)
        groups = [tensors(self.weights, some) for some in (names[:2], names[2:3], names[3:])]
        shipment = self.channel.begin(self.version, len(groups), 10_000)
        self.manifest = manifest_of(
            self.version, ship(groups, shipment, self.shadow), base, keep=self.encoder.deltas
        )
        ticket = shipment.finish(self.manifest)
        self.encoder.shipped(self.manifest)
        self.shadow.settle(Base(self.version, self.manifest.digest))
        return Ticket.from_json(ticket.to_json())

    def bytes(self) -> dict[str, bytes]:
        return {name: array.tobytes() for name, array in self.weights.items()}


def tensors(weights, names) -> list[HostTensor]:
    return [
        HostTensor(
            name,
            str(weights[name].dtype),
            weights[name].shape,
            np.frombuffer(weights[name].tobytes(), np.uint8),
        )
        for name in names
    ]


def arrived(receiver: Receiver, ticket: Ticket, deadline_s=DEADLINE_S) -> dict[str, bytes]:
    found = receiver.receive(ticket, deadline_s)
    names = [entry.name for entry in found.manifest.tensors]
    return {name: data.tobytes() for name, data in zip(names, found.data, strict=True)}


@pytest.mark.parametrize("encoding", ["full", "delta"])
def test_fifty_versions_one_after_the_other_are_each_bit_for_bit_what_left(tmp_path, encoding):
    trainer, receiver = Trainer(tmp_path, encoding, anchor_every=20), Receiver()
    bases = []
    for _ in range(50):
        ticket = trainer.publish()
        assert arrived(receiver, ticket) == trainer.bytes()
        bases.append(trainer.manifest.base and trainer.manifest.base.version)
        whole, _ = pack(1, tensors(trainer.weights, SHAPES), 1 << 20)
        assert trainer.manifest.digest == whole.digest  # of the weights, however they travelled
    if encoding == "full":
        assert bases == [None] * 50
    else:
        assert [i for i, base in enumerate(bases) if base is None] == [0, 21, 42]
        assert bases[1:4] == [1, 2, 3]


def test_a_delta_is_small_and_says_so(tmp_path):
    trainer, receiver = Trainer(tmp_path), Receiver()
    full = receiver.receive(trainer.publish(), DEADLINE_S)
    assert full.nbytes == trainer.manifest.nbytes == sum(map(len, trainer.bytes().values()))
    small = receiver.receive(trainer.publish(), DEADLINE_S)
    assert small.nbytes == trainer.manifest.nbytes < 0.15 * full.nbytes
    encodings = {entry.name: entry.encoding for entry in trainer.manifest.tensors}
    assert encodings["w"] == "delta" and encodings["nothing"] == encodings["scalar"] == "raw"


def test_a_tensor_that_changed_all_over_travels_whole(tmp_path):
    trainer, receiver = Trainer(tmp_path), Receiver()
    arrived(receiver, trainer.publish())
    trainer.weights["norm"] = trainer.rng.normal(size=96).astype(np.float32) ** 3
    assert arrived(receiver, trainer.publish(share=0)) == trainer.bytes()
    encodings = {entry.name: entry.encoding for entry in trainer.manifest.tensors}
    assert encodings["norm"] == "raw" and encodings["w"] == "delta"


@pytest.mark.parametrize("missed", [1, 2, 7])
def test_whoever_missed_versions_or_is_new_catches_up(tmp_path, missed):
    trainer, late, new = Trainer(tmp_path), Receiver(), Receiver(shared=False)
    arrived(late, trainer.publish())
    arrived(late, trainer.publish())
    for _ in range(missed):
        ticket = trainer.publish()
    assert arrived(late, ticket) == trainer.bytes()
    found = new.receive(ticket, DEADLINE_S)
    assert {
        e.name: d.tobytes() for e, d in zip(found.manifest.tensors, found.data, strict=True)
    } == (trainer.bytes())
    assert found.nbytes > sum(map(len, trainer.bytes().values()))  # an anchor, and deltas
    ticket = trainer.publish()
    assert arrived(late, ticket) == arrived(new, ticket) == trainer.bytes()


def test_deltas_go_behind_a_new_anchor_at_once(tmp_path):
    """What is held is far behind: the chain ends at the anchor, and what is held is forgotten."""
    trainer, late = Trainer(tmp_path, anchor_every=2), Receiver()
    arrived(late, trainer.publish())
    for _ in range(4):
        ticket = trainer.publish()  # 4 is an anchor
    assert trainer.manifest.base.version == 4
    assert not (tmp_path / "v00000001").exists()
    assert arrived(late, ticket) == trainer.bytes()


def test_what_is_held_and_is_not_what_it_says_is_never_built_on(tmp_path):
    """Memory that was overwritten: found by the digest of the result, answered from the anchor."""
    trainer, receiver = Trainer(tmp_path), Receiver(shared=False)
    arrived(receiver, trainer.publish())
    held = receiver.receive(trainer.publish(), DEADLINE_S)
    (harmed,) = [d for e, d in zip(held.manifest.tensors, held.data, strict=True) if e.name == "w"]
    harmed[17] ^= 4
    assert arrived(receiver, trainer.publish()) == trainer.bytes()
    assert arrived(receiver, trainer.publish()) == trainer.bytes()


def harm_payload(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[0]
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("which", [1, 2, 3])
def test_a_damaged_version_in_the_chain_is_refused_and_the_next_whole_one_is_taken(tmp_path, which):
    trainer, receiver = Trainer(tmp_path, anchor_every=2), Receiver()
    for _ in range(3):
        ticket = trainer.publish()
    harm_payload(tmp_path / f"v{which:08d}")
    for _ in range(2):
        with pytest.raises((WireError, DeltaError), match="version"):
            receiver.receive(ticket, DEADLINE_S)
    ticket = trainer.publish()  # an anchor
    assert trainer.manifest.base is None
    assert arrived(receiver, ticket) == trainer.bytes()


def test_a_base_that_is_gone_is_said_with_its_version(tmp_path):
    trainer = Trainer(tmp_path)
    for _ in range(3):
        ticket = trainer.publish()
    shutil.rmtree(tmp_path / "v00000002")
    with pytest.raises(ChannelError, match=r"version 2: .*not there"):
        Receiver().receive(ticket, 0.2)


def test_a_base_with_another_digest_is_not_taken(tmp_path):
    trainer = Trainer(tmp_path)
    for _ in range(2):
        ticket = trainer.publish()
    file = tmp_path / "v00000002" / "manifest.json"
    raw = json.loads(file.read_text())
    raw["base"]["digest"] = "0" * 64
    file.write_text(json.dumps(raw))
    with pytest.raises(ChannelError, match="version 1, digest 0000"):
        Receiver().receive(ticket, DEADLINE_S)


def test_a_delta_on_a_version_of_other_tensors_is_refused(tmp_path):
    trainer = Trainer(tmp_path)
    trainer.publish()
    del trainer.weights["still"]
    with pytest.raises(WireError, match="version 1: has other tensors"):
        Receiver().receive(trainer.publish(), DEADLINE_S)


@pytest.mark.parametrize("encoding", ["full", "delta"])
@pytest.mark.parametrize("arrives", [0, 1, 383])
def test_a_tensor_that_arrives_in_part_is_named(tmp_path, monkeypatch, encoding, arrives):
    ticket, fetch = Trainer(tmp_path, encoding).publish(), channels.fetch

    def cut(*args):
        manifest, data = fetch(*args)
        return manifest, [d[:arrives] if len(d) == 384 else d for d in data]

    monkeypatch.setattr(channels, "fetch", cut)
    with pytest.raises(WireError, match=f"'norm': {arrives} bytes arrived, promised are 384"):
        Receiver().receive(ticket, DEADLINE_S)


def test_after_a_failure_the_next_version_is_whole(tmp_path):
    trainer, receiver = Trainer(tmp_path), Receiver()
    arrived(receiver, trainer.publish())
    trainer.encoder.failed()
    assert arrived(receiver, trainer.publish()) == trainer.bytes()
    assert trainer.manifest.base is None
    assert arrived(receiver, trainer.publish()) == trainer.bytes()
    assert trainer.manifest.base is not None


@pytest.mark.parametrize(
    ("nbytes", "seconds", "then"),
    [
        (10**9, 0.9, False),
        (10**10, 3.9, False),
        (10**10, 4.1, True),
        (10**9, 1.1, True),
        (2 * 10**6, 1.1, False),
    ],
)
def test_auto_turns_to_deltas_where_versions_arrive_slowly(tmp_path, nbytes, seconds, then):
    trainer, receiver = Trainer(tmp_path, "auto"), Receiver()
    for _ in range(2):
        assert arrived(receiver, trainer.publish()) == trainer.bytes()
        assert trainer.manifest.base is None
    trainer.encoder.measured(nbytes, seconds)
    arrived(receiver, trainer.publish())  # the first that is kept to take differences from
    assert trainer.manifest.base is None
    trainer.encoder.measured(1, 0.0)
    assert arrived(receiver, trainer.publish()) == trainer.bytes()
    assert (trainer.manifest.base is not None) == then


def test_what_versions_are_kept():
    alone = {version: None for version in (3, 4, 7)}
    assert live(alone, 1) == {7} and live(alone, 2) == {4, 7} and live(alone, 9) == {3, 4, 7}
    chain = {1: None, 2: 1, 3: 2, 5: None, 6: 5, 8: 6}
    assert live(chain, 1) == {5, 6, 8} == live(chain, 3)
    assert live(chain, 4) == {1, 2, 3, 5, 6, 8}
    assert live({4: 3}, 1) >= {4}  # its base was lost
    assert live(chain, 1, {3}) == {1, 2, 3, 5, 6, 8} and live(alone, 1, {3, 9}) == {3, 7}


@pytest.mark.parametrize("keep", [1, 2])
def test_old_versions_go_when_nothing_kept_is_based_on_them(tmp_path, keep):
    trainer = Trainer(tmp_path, anchor_every=2, keep=keep)
    seen = []
    for _ in range(6):
        trainer.publish()
        seen.append(sorted(int(path.name[1:]) for path in tmp_path.iterdir()))
    one = [[1], [1, 2], [1, 2, 3], [4], [4, 5], [4, 5, 6]]
    two = [[1], [1, 2], [1, 2, 3], [1, 2, 3, 4], [4, 5], [4, 5, 6]]
    assert seen == (one if keep == 1 else two)


def test_the_held_version_may_be_read_until_the_next_is_received(tmp_path):
    trainer, receiver = Trainer(tmp_path), Receiver()
    for _ in range(3):
        found = receiver.receive(trainer.publish(), DEADLINE_S)
        data = {
            e.name: d.tobytes() for e, d in zip(found.manifest.tensors, found.data, strict=True)
        }
        assert data == trainer.bytes()
        assert found.digest == trainer.manifest.digest


def test_a_delta_that_lies_about_its_base_is_refused_by_the_wire(tmp_path):
    trainer = Trainer(tmp_path)
    trainer.publish()
    trainer.publish()
    manifest = trainer.manifest
    for harmed in (
        dataclasses.replace(manifest, base=None),
        dataclasses.replace(manifest, base=dataclasses.replace(manifest.base, version=2)),
        dataclasses.replace(
            manifest,
            tensors=tuple(dataclasses.replace(e, encoding="zip") for e in manifest.tensors),
        ),
    ):
        with pytest.raises(WireError):
            type(manifest).from_json(harmed.to_json())
    assert type(manifest).from_json(manifest.to_json()) == manifest


def test_one_version_of_a_chain_is_open_at_a_time(tmp_path, monkeypatch):
    """Each mapped bucket is an open file of the process."""
    trainer, opened = Trainer(tmp_path, keep=12), []
    tickets = [trainer.publish() for _ in range(12)]
    real = channels.fetch

    def fetch(ticket, deadline_s):
        mapped = [line for line in Path("/proc/self/maps").read_text().splitlines()]
        opened.append(sum("/v0000" in line for line in mapped))
        return real(ticket, deadline_s)

    monkeypatch.setattr(channels, "fetch", fetch)
    assert arrived(Receiver(shared=False), tickets[-1]) == trainer.bytes()
    assert len(opened) == 12 and 0 < max(opened) <= 2 * 3  # buckets: the newest, and one more


def test_no_memory_for_a_copy_is_an_error_that_says_so(tmp_path, monkeypatch):
    ticket = Trainer(tmp_path).publish()

    def refuse(manifest):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("bridge.receive.Copy", refuse)
    with pytest.raises(ChannelError, match=r"version 1: there is no memory for its \d+ bytes"):
        Receiver(shared=False).receive(ticket, DEADLINE_S)
