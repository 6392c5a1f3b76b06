"""What the devices find changed is what changed: beside the host's own comparison, bit for bit."""

import dataclasses
import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from bridge.channels import ChannelError, Ticket
from bridge.channels.shuttle import ShuttleChannel
from bridge.encoding import Encoder, Shadow
from bridge.export import Exporter
from bridge.publisher import OwnCarrier
from bridge.receive import Receiver
from bridge.wire import Base, HostTensor, manifest_of, xxh3
from jaxrl.config import MeshSection
from jaxrl.mesh import make_mesh, param_shardings
from jaxrl.models.config import DecoderConfig, LoraConfig, MoeConfig
from jaxrl.models.params import ParamSpec, lora_specs, param_specs, tree_of
from jaxrl.models.rope import Rope
from tests.test_hosts import QUICK, free_port

ROOT = Path(__file__).parent.parent
SMALL = DecoderConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rope=Rope(tuple(0.5**i for i in range(8))),
    norm_eps=1e-6,
    tied_embeddings=True,
    max_positions=64,
    eos_token_ids=(7,),
    qk_norm="head",
)
# One key/value head for two devices, an odd vocabulary, width and number of layers a bucket, and
# projections of one Hugging Face tensor, whose rows lie on the devices in another way than a
# leaf's.
FUSED_AND_ODD = dataclasses.replace(
    SMALL,
    vocab_size=101,
    intermediate_size=75,
    num_kv_heads=1,
    qk_norm=None,
    fused_projections=True,
    tied_embeddings=False,
)
EXPERTS = dataclasses.replace(SMALL, moe=MoeConfig(4, 2, 24, True, "qwen3"))
MODELS = {
    "tied": (param_specs(SMALL), {"fsdp": 4, "tensor": 2}),
    "fused and odd": (param_specs(FUSED_AND_ODD), {"fsdp": 2, "tensor": 4}),
    "experts": (param_specs(EXPERTS), {"data": 2, "expert": 2, "tensor": 2}),
    "adapters": (lora_specs(SMALL, LoraConfig(8, 16.0, ("all-linear",))), {"data": 8}),
}


class Weights:
    """Parameters of a table on a mesh, which move a little at every step."""

    def __init__(self, specs, mesh_axes, seed=0):
        self.specs, self.rng = specs, np.random.default_rng(seed)
        self.mesh = make_mesh(MeshSection(**mesh_axes))
        self.leaves = {
            path: self.rng.normal(size=spec.shape).astype(np.float32)
            for path, spec in specs.items()
        }

    def step(self, share=0.01):
        for path, leaf in self.leaves.items():
            some = self.rng.random(leaf.shape) < share
            self.leaves[path] = np.where(some, leaf * np.float32(1.02), leaf)

    def params(self):
        def placed(leaf, sharding):
            return jax.make_array_from_callback(leaf.shape, sharding, leaf.__getitem__)

        return jax.tree.map(placed, tree_of(self.leaves), param_shardings(self.specs, self.mesh))


class Trainer:
    """Ships versions of its own, compared here or there."""

    def __init__(self, root, specs, compare_on, dtype="bfloat16", bucket_bytes=1 << 16):
        self.export = Exporter(specs, dtype, bucket_bytes, compare_on)
        self.channel = ShuttleChannel(root, keep_versions=2)
        self.encoder, self.carrier = Encoder("delta", anchor_every=8), OwnCarrier()

    def publish(self, params, version, fault=False) -> Ticket:
        export, base = self.export, self.encoder.base()
        shipment = self.channel.begin(version, len(export.plan), export.nbytes)
        if fault:
            shipment.put = full
        try:
            shipped = self.carrier.ship(export, params, shipment, base, self.encoder.deltas)
        except ChannelError:
            self.encoder.failed()
            self.carrier.settle(None)
            raise
        finally:
            if fault:
                shipment.abort()
        self.manifest = manifest_of(version, shipped, base)
        ticket = shipment.finish(self.manifest)
        self.encoder.shipped(self.manifest)
        self.carrier.settle(Base(version, self.manifest.digest))
        return ticket


def full(entries, data):
    raise ChannelError("no space")


def bytes_of(tensors) -> dict[str, bytes]:
    return {tensor.name: tensor.data.tobytes() for tensor in tensors}


def arrived(receiver: Receiver, ticket: Ticket) -> dict[str, bytes]:
    found = receiver.receive(ticket, 5.0)
    names = [entry.name for entry in found.manifest.tensors]
    return {name: data.tobytes() for name, data in zip(names, found.data, strict=True)}


def files(ticket: Ticket) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(ticket.address).iterdir()}


@pytest.mark.parametrize("model", MODELS)
def test_twenty_versions_are_those_that_left_and_travel_as_if_the_host_had_compared(
    model, tmp_path
):
    specs, mesh = MODELS[model]
    dtype = "float32" if model == "adapters" else "bfloat16"
    weights, receiver = Weights(specs, mesh), Receiver()
    ours = Trainer(tmp_path / "ours", specs, "mesh", dtype)
    theirs = Trainer(tmp_path / "theirs", specs, "host", dtype)
    assert len(ours.export.plan) > 1
    whole = Exporter(specs, dtype)
    bases = []
    for version in range(1, 21):
        weights.step()
        for leaf in weights.leaves.values():  # bits count, not numbers
            leaf.flat[:3] = [np.nan, 0.0 if version % 2 else -0.0, version]
        params = weights.params()
        if version in (5, 6):
            for trainer in (ours, theirs):
                with pytest.raises(ChannelError, match="no space"):
                    trainer.publish(params, version, fault=True)
            continue
        ticket = ours.publish(params, version)
        assert files(ticket) == files(theirs.publish(params, version))
        assert arrived(receiver, ticket) == bytes_of(whole(params))
        bases.append(ours.manifest.base and ours.manifest.base.version)
    assert bases == [None, 1, 2, 3, None, *range(7, 15), None, *range(16, 20)]


def test_only_what_changed_leaves_the_devices(tmp_path):
    specs = param_specs(dataclasses.replace(SMALL, hidden_size=256, intermediate_size=512))
    weights = Weights(specs, {"fsdp": 4, "tensor": 2})
    trainer = Trainer(tmp_path, specs, "mesh", bucket_bytes=1 << 21)
    devices, share = [], [0.0, 0.01, 0.0, 1.0]
    for version, some in enumerate(share):
        weights.step(some)
        trainer.publish(weights.params(), version)
        devices.append(trainer.carrier.device_bytes / trainer.export.nbytes)
    assert devices[0] == 1.0
    assert 0.005 < devices[1] < 0.08
    assert devices[2] < 0.001
    assert 1.0 < devices[3] < 1.001  # and how much changed
    assert trainer.manifest.base is not None


def test_on_cpu_auto_compares_on_the_host(tmp_path):
    specs, mesh = MODELS["tied"]
    trainer, weights = Trainer(tmp_path, specs, "auto"), Weights(specs, mesh)
    for version in range(2):
        trainer.publish(weights.params(), version)
        assert trainer.carrier.device_bytes == trainer.export.nbytes


def test_differences_are_taken_in_the_memory_of_the_version_before():
    shadow, one, two = Shadow(), Base(1, "1"), Base(2, "2")
    before = np.arange(4096, dtype=np.uint8)
    now, devices = before.copy(), before.copy()
    devices.flags.writeable = False
    now[4:6] = 77
    held = before
    for version, base, data in [(one, None, before), (two, one, now), (None, two, devices)]:
        shadow.begin(base, keep=True)
        (tensor,), payloads = shadow.encoded([HostTensor("w", "bfloat16", (2048,), data)])
        assert tensor.data.tobytes() == data.tobytes()
        assert np.shares_memory(tensor.data, held) and bool(payloads) == (base is not None)
        shadow.settle(version)
    shadow.begin(one, keep=True)
    shadow.encoded([HostTensor("w", "bfloat16", (2048,), devices)])
    shadow.settle(one)
    shadow.begin(one, keep=True)  # what the devices gave cannot be written to
    (tensor,), _ = shadow.encoded([HostTensor("w", "bfloat16", (2048,), now)])
    assert tensor.data.tobytes() == now.tobytes() != devices.tobytes()


def test_what_is_kept_serves_the_version_after_it_alone_and_is_not_kept_for_another():
    class Bits:
        """Stands for what the devices hold."""

    def publish(shadow, base, settled):
        bits, said = Bits(), []
        shadow.begin(base, keep=True)
        said.append(shadow.exchange(0, bits) is not None)
        said.append(bool(shadow.encoded([HostTensor("w", "float32", (900,), data)])[1]))
        shadow.settle(settled)
        kept = weakref.ref(bits)
        del bits
        gc.collect()
        return [*said, kept() is not None]

    data, shadow, one, two = np.zeros(3600, np.uint8), Shadow(), Base(1, "1"), Base(2, "2")
    assert publish(shadow, None, one) == [False, False, True]
    assert publish(shadow, one, two) == [True, True, True]
    assert publish(shadow, one, two) == [False, False, True]  # it holds 2
    assert publish(shadow, two, None) == [True, True, False]  # and that failed
    assert publish(shadow, two, two) == [False, False, True]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("compare_on", ["mesh", "host"])
def test_a_snapshot_outlives_the_parameters(compare_on, dtype, tmp_path):
    """An update that consumes them is dispatched before the first group is taken."""
    specs, mesh = MODELS["tied"]
    trainer, weights = Trainer(tmp_path, specs, compare_on, dtype), Weights(specs, mesh)
    update = jax.jit(lambda tree: jax.tree.map(lambda x: x * 1.01 - 1, tree), donate_argnums=0)
    receiver, params = Receiver(), weights.params()
    for version in range(3):
        expected = bytes_of(Exporter(specs, dtype)(params))
        snapshot = trainer.export.snapshot(params)
        params, consumed = update(params), params
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(consumed))
        jax.block_until_ready(params)
        assert arrived(receiver, trainer.publish(snapshot, version)) == expected


def shares_of_versions(compare_on, processes=1) -> tuple[list[dict[str, list]], list[int]]:
    """What this process ships of each version, as [digest, digest of the difference] by name; and
    the bytes that it takes from the devices."""
    specs, mesh = MODELS["fused and odd"]
    weights, shadow = Weights(specs, mesh), Shadow()
    export = Exporter(specs, "bfloat16", 1 << 15, compare_on)
    owners, versions, nbytes = export.owners(processes), [], []
    for version, share in enumerate([0.0, 0.01, 1.0, 0.01]):
        weights.step(share)
        params = weights.params()
        base = Base(version - 1, "") if version else None
        shadow.begin(base, keep=True)
        source = export.snapshot(params) if version == 3 else params
        shipped: dict[str, list] = {}
        for group in export.groups_since(shadow, source, owners):
            tensors, payloads = shadow.encoded(group)
            for tensor in tensors:
                payload = payloads.get(tensor.name)
                about = [xxh3(tensor.data), None if payload is None else xxh3(payload)]
                shipped[tensor.name] = about
        shadow.settle(Base(version, ""))
        versions.append(shipped)
        nbytes.append(export.device_bytes)
        whole = [tensor for group in export.groups(params, owners) for tensor in group]
        assert {t.name: xxh3(t.data) for t in whole} == {n: d for n, (d, _) in shipped.items()}
    return versions, nbytes


def process_of_two(index: str, port: str) -> None:
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(index))
    print(json.dumps(shares_of_versions("mesh", processes=2)))


def test_two_processes_ship_what_one_would():
    code = (
        "import sys; from tests.test_compare import process_of_two; process_of_two(*sys.argv[1:])"
    )
    flags = "--xla_force_host_platform_device_count=4 " + QUICK
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(index), port],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)},
        )
        for index in range(2)
    ]
    try:
        shown = [process.communicate(timeout=90) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], shown
    (one, one_bytes), (other, other_bytes) = (json.loads(out.splitlines()[-1]) for out, _ in shown)
    expected, whole = shares_of_versions("host")
    for ours, theirs, alone in zip(one, other, expected, strict=True):
        assert ours and theirs and not ours.keys() & theirs.keys()
        assert ours | theirs == alone
    taken = [a + b for a, b in zip(one_bytes, other_bytes, strict=True)]
    assert taken[0] == whole[0] < taken[2]
    assert max(taken[1], taken[3]) < 0.2 * whole[0]


@pytest.mark.parametrize("mesh", [{"data": 2}, {"data": 4, "fsdp": 2}], ids=str)
def test_memory_of_which_the_host_still_looks_at_one_devices_part_is_not_used_again(
    mesh, tmp_path, monkeypatch
):
    """The runtime gives the parts of the other devices away; to offer those again ends the process.
    The host keeps a version that differences are taken from, as it came."""
    monkeypatch.setattr("bridge.export._WORTH_BYTES", 1)
    name = "model.layers.{layer}.mlp.down_proj.weight"
    spec = ParamSpec((6, 32, 64), ("layers", "embed", "mlp"), "normal", name, 1)
    specs = {("layers", "down"): spec}
    trainer, weights = Trainer(tmp_path, specs, "host", bucket_bytes=1 << 13), Weights(specs, mesh)
    receiver = Receiver()
    for version in range(4):
        params = weights.params()
        whole = bytes_of(trainer.export(params))
        assert arrived(receiver, trainer.publish(params, version)) == whole
        leaf = weights.leaves["layers", "down"].astype(ml_dtypes.bfloat16)
        assert whole == {name.format(layer=i): leaf[i].tobytes() for i in range(6)}
        weights.step()
