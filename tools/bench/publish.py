"""A publish without engines: parameters on the device -> staged and verified in workers."""

import functools
import itertools
import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from bridge.channels import Channel
from bridge.channels.shuttle import ShuttleChannel
from bridge.encoding import Encoder, Encoding, Shadow
from bridge.export import Exporter
from bridge.publisher import ship
from bridge.wire import Base, HostTensor, Manifest, entries, manifest_of
from jaxrl.models.config import DecoderConfig, load_config
from jaxrl.models.decoder import init_params
from jaxrl.models.params import ParamSpec, param_specs, tree_of
from jaxrl.models.params import Path as ParamPath
from jaxrl.types import RunError

Groups = Iterator[list[HostTensor]]

DTYPE = "bfloat16"
_SAMPLE_S = 0.01
_NODE_S = 60.0  # for a second node to start, or to end
_FAR = "far"  # its resource
_COPIED_BLOCK = 1 << 29  # bytes
_ALONE_BYTES = 20 << 26
_WARM_UP = 6  # versions, until every place that the channel keeps one in was written to
_DEMO = Path(__file__).parents[2] / "configs" / "tiny_policy"
_QWEN3 = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 32768,
    "max_position_embeddings": 4096,
}


class Worker:
    """What stages a version in vLLM's process, without the engine. A Ray actor."""

    def __init__(self) -> None:
        self._receiver: Any = None

    def ready(self) -> int:
        from bridge.engines import weight_transfer  # noqa: F401

        return os.getpid()

    def map(self, ticket: str, deadline_s: float) -> None:
        """Fetches a version, and does not look at it."""
        from bridge import channels

        self._mapped = channels.fetch(channels.Ticket.from_json(ticket), deadline_s)

    def memory(self) -> int:
        """Bytes that this process shares with no other."""
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))

    def stage(self, ticket: str, deadline_s: float) -> str:
        """Fetches a version and hashes it; returns its digest."""
        from bridge.channels import Ticket
        from bridge.engines.weight_transfer import prove, stage
        from bridge.receive import Receiver

        self._receiver = self._receiver or Receiver(prove)
        self._staged = stage(self._receiver, Ticket.from_json(ticket), deadline_s)
        self._receiver.release()  # as an engine does once it has loaded
        return self._staged.digest


def make_model(folder: Path, gigabytes: float) -> DecoderConfig:
    """Writes a config.json: Qwen3-0.6B's layers, as many as make so many GB of bfloat16."""
    settings = json.loads((_DEMO / "config.json").read_text()) | _QWEN3
    file = folder / "config.json"
    file.write_text(json.dumps(settings))
    specs = param_specs(load_config(folder))
    layer = sum(_size(spec) for path, spec in specs.items() if path[0] == "layers")
    rest = sum(_size(spec) for path, spec in specs.items() if path[0] != "layers")
    layers = max(1, round((gigabytes * 1e9 / 2 - rest) / layer))
    file.write_text(json.dumps(settings | {"num_hidden_layers": layers}))
    return load_config(folder)


def _size(spec: Any) -> int:
    return int(np.prod(spec.shape))


def bench_publish(
    gigabytes: float,
    workers: int,
    held: str,
    bucket_bytes: int,
    channels: Sequence[str],
    repeat: int = 5,
    far: bool = False,
    device_gbs: float | None = None,
) -> None:
    """Prints seconds and GB/s by phase, for each channel, beside a plain copy of the bytes.

    Args:
      held: the dtype of the parameters.
      far: workers are on a Ray node of their own, on this machine; what they fetch goes through the
        loopback device.
      device_gbs: GB/s; groups come no faster than that, as from devices with memory of their own.
    """
    with tempfile.TemporaryDirectory(prefix="jaxrl-bench-") as folder:
        specs = param_specs(make_model(Path(folder), gigabytes))
    params, exporter = Trained(specs, held), Exporter(specs, DTYPE, bucket_bytes)
    nbytes = exporter.nbytes
    print(
        f"{nbytes / 1e9:.2f} GB of {DTYPE} from {held} in {len(exporter.plan)} buckets, "
        f"{workers} workers"
    )
    copy = plain_copy(nbytes)
    pairs = [
        (timed(copy), timed(lambda: _drain(exporter.groups(params.now)))) for _ in range(repeat + 1)
    ]
    copies, exports = zip(*pairs[1:], strict=True)
    line("export alone", exports, nbytes, copies)
    for name in channels:
        with _cluster(nbytes, workers, far) as actors, _channel(name) as channel:
            _channel_alone(name, exporter, params.now, channel, actors[0], repeat)
        for encoding in ("full", "delta"):
            with _cluster(nbytes, workers, far) as actors, _channel(name) as channel:
                _publishes(
                    name,
                    encoding,
                    exporter,
                    params,
                    channel,
                    actors,
                    repeat,
                    copy,
                    device_gbs,
                )


class Trained:
    """Random parameters, of which each update changes 1 % by as little as bfloat16 can tell.

    All is done a leaf at a time, since it takes a few times the leaf's memory.
    """

    def __init__(self, specs: dict[ParamPath, ParamSpec], dtype: str = "float32") -> None:
        def start(path: ParamPath) -> jax.Array:
            (leaf,) = jax.tree.leaves(init_params({path: specs[path]}, jax.random.key(0)))
            return leaf.astype(dtype)

        started = jax.jit(start, static_argnums=0)
        self.now = tree_of({path: jax.block_until_ready(started(path)) for path in specs})
        self._updates = 0

    def update(self) -> None:
        self._updates += 1
        leaves, tree = jax.tree.flatten(self.now)
        self.now = None
        for i, leaf in enumerate(leaves):
            seed = np.uint32(len(leaves) * self._updates + i)
            leaves[i] = jax.block_until_ready(_moved(leaf, seed))
        self.now = jax.tree.unflatten(tree, leaves)


@functools.partial(jax.jit, donate_argnums=0)
def _moved(x: jax.Array, seed: jax.Array) -> jax.Array:
    # MurmurHash3's finalizer of each element's number: jax.random takes twenty times as long.
    bits = jax.lax.iota(jnp.uint32, x.size) ^ (seed * np.uint32(0x9E3779B9))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * np.uint32(factor)
    moves = (bits ^ (bits >> 16)) < np.uint32(0.01 * 2**32)
    return jnp.where(moves.reshape(x.shape), x * (1 + 2**-7), x)


def _publishes(
    name: str,
    encoding: Encoding,
    exporter: Exporter,
    params: Trained,
    channel: Channel,
    actors: list[Any],
    repeat: int,
    copy: Callable[[], Any],
    device_gbs: float | None,
) -> None:
    encoder, shadow = Encoder(encoding, anchor_every=1 << 30), Shadow()
    seconds: dict[str, list[float]] = {"ship": [], "stage": [], "whole": []}
    shares, copies, before, grown = [], [], _memory(actors), {}
    held = _private()
    for version in range(repeat + _WARM_UP):
        params.update()
        copies.append(timed(copy))  # beside each version: the machine's speed drifts
        groups = _paced(exporter.groups(params.now), device_gbs)
        with _peak(grown, held):
            start = time.perf_counter()
            manifest, ticket = send(groups, exporter, channel, encoder, shadow, version)
            sent = time.perf_counter()
            _stage(actors, ticket, manifest.digest)
            end = time.perf_counter()
        shares.append(manifest.nbytes / exporter.nbytes)
        took = (sent - start, end - sent, end - start)
        for phase, taken in zip(seconds, took, strict=True):
            seconds[phase].append(taken)
    on_wire = f", {shares[-1]:.2%} of the bytes" * (encoding == "delta")
    for phase, taken in seconds.items():
        label = f"{name}, {encoding}: {phase}{on_wire}"
        line(label, taken[_WARM_UP:], exporter.nbytes, copies[_WARM_UP:])
    grown |= {what: now - before[what] for what, now in _memory(actors).items()}
    shown = (f"{what} {nbytes / exporter.nbytes:+.2f}" for what, nbytes in grown.items())
    print(f"{name}, {encoding}: grown by, in versions: {', '.join(shown)}")


def _channel_alone(
    name: str,
    exporter: Exporter,
    state: Any,
    channel: Channel,
    actor: Any,
    repeat: int,
) -> None:
    """What was exported and hashed before, until one worker has it.

    The first buckets stand for all: beside the versions there is no room for a large one.
    """
    import ray

    buckets = max(1, _ALONE_BYTES // max(group.nbytes for group in exporter.plan))
    some = itertools.islice(exporter.groups(state), buckets)
    parts = [entries(i, group) for i, group in enumerate(some)]
    found = [entry for bucket, _ in parts for entry in bucket]
    nbytes = sum(entry.nbytes for entry in found)
    copy = plain_copy(nbytes)
    seconds, copies = [], []
    for version in range(repeat + _WARM_UP):
        copies.append(timed(copy))
        manifest = manifest_of(version, found)
        start = time.perf_counter()
        shipment = channel.begin(version, len(parts), nbytes)
        with ThreadPoolExecutor(2) as writers:  # as `ship` does
            list(writers.map(shipment.put, *zip(*parts, strict=True)))
        ticket = shipment.finish(manifest)
        ray.get(actor.map.remote(ticket.to_json(), 60.0), timeout=120)
        seconds.append(time.perf_counter() - start)
    line(f"{name}, the channel alone", seconds[_WARM_UP:], nbytes, copies[_WARM_UP:])


def _memory(actors: list[Any]) -> dict[str, int]:
    """Bytes: private ones of all workers, and shared memory in use."""
    import ray

    return {
        "private to the workers": sum(ray.get([a.memory.remote() for a in actors], timeout=60)),
        "shared by the node": shutil.disk_usage("/dev/shm").used,
    }


def _private() -> int:
    """Bytes of this process that are no file's and shared with nobody."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@contextmanager
def _peak(of: dict[str, int], held: int) -> Iterator[None]:
    """Notes by how much this process's private memory exceeded `held` at most meanwhile, bytes."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_SAMPLE_S):
            of["trainer"] = max(of.get("trainer", 0), _private() - held)

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    yield
    done.set()
    watching.join()


def _stage(actors: list[Any], ticket: str, digest: str) -> None:
    import ray

    found = ray.get([actor.stage.remote(ticket, 60.0) for actor in actors], timeout=120)
    if set(found) != {digest}:
        raise RunError(f"published {digest}, and the workers found {found}")


def send(
    groups: Groups,
    exporter: Exporter,
    channel: Channel,
    encoder: Encoder,
    shadow: Shadow,
    version: int,
) -> tuple[Manifest, str]:
    shipment = channel.begin(version, len(exporter.plan), exporter.nbytes)
    base = encoder.base()
    shadow.begin(base, encoder.deltas)
    shipped = ship(groups, shipment, shadow)
    manifest = manifest_of(version, shipped, base, keep=encoder.deltas)
    ticket = shipment.finish(manifest)
    encoder.shipped(manifest)
    shadow.settle(Base(version, manifest.digest))
    return manifest, ticket.to_json()


@contextmanager
def _cluster(nbytes: int, workers: int, far: bool) -> Iterator[list[Any]]:
    """A Ray of its own: memory that its store has ever touched it never gives back."""
    import ray

    store = 3 * nbytes + (1 << 28)  # more than 80 % in use, and Ray spills
    ray.init(
        address="local",
        num_cpus=workers + 1,
        object_store_memory=store,
        _memory=1 << 30,  # or Ray refuses a store this large beside the parameters
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    from bridge.engines.vllm import actor_environment

    with _far_node(store) if far else nullcontext():
        options = {"runtime_env": {"env_vars": actor_environment(cpu=True)}}
        options |= {"resources": {_FAR: 1e-3}, "num_cpus": 0} if far else {}
        actor = ray.remote(Worker).options(**options)
        actors = [cast(Any, actor).remote() for _ in range(workers)]
        ray.get([each.ready.remote() for each in actors], timeout=300)
        yield actors
    ray.shutdown()


@contextmanager
def _far_node(store: int) -> Iterator[None]:
    """A second Ray node on this machine."""
    import ray

    command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--num-cpus=1"]
    command += [f"--address={ray.get_runtime_context().gcs_address}", f"--memory={1 << 30}"]
    command += [f"--object-store-memory={store}", f"--resources={json.dumps({_FAR: 1})}"]
    quiet = subprocess.DEVNULL
    node = subprocess.Popen(command, stdout=quiet, stderr=quiet)
    try:
        end = time.monotonic() + _NODE_S
        while _FAR not in ray.cluster_resources():
            if node.poll() is not None or time.monotonic() > end:
                raise RunError(
                    f"`{' '.join(command)}` made no second Ray node, and has ended or taken more "
                    f"than {_NODE_S:g} s; what it prints without --block says why"
                )
            time.sleep(0.1)
        yield
    finally:
        node.terminate()
        node.wait(_NODE_S)


@contextmanager
def _channel(name: str) -> Iterator[Channel]:
    from bridge.channels.object_store import ObjectStoreChannel

    with tempfile.TemporaryDirectory(prefix="jaxrl-bench-") as folder:
        keep = 1  # the last, beside the one that is put
        shuttle = name == "shuttle"
        channel = ShuttleChannel(Path(folder), keep) if shuttle else ObjectStoreChannel(keep)
        yield channel
        channel.close()


def plain_copy(nbytes: int) -> Callable[[], Any]:
    """Copies so many bytes, a block at a time of those that fit beside them."""
    block = min(nbytes, _COPIED_BLOCK)
    source, target = np.ones(block, np.uint8), np.ones(block, np.uint8)

    def copy() -> None:
        for start in range(0, nbytes, block):
            np.copyto(target[: nbytes - start], source[: nbytes - start])

    return copy


def _paced(groups: Groups, gbs: float | None) -> Groups:
    start, nbytes = time.perf_counter(), 0
    for group in groups:
        nbytes += sum(tensor.data.nbytes for tensor in group)
        if gbs is not None:
            time.sleep(max(0.0, start + nbytes / gbs / 1e9 - time.perf_counter()))
        yield group


def _drain(groups: Groups) -> None:
    for _ in groups:
        pass


def timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def line(label: str, seconds: Sequence[float], nbytes: int, copies: Sequence[float]) -> None:
    """`copies`: seconds of a plain copy of the same bytes, measured in between."""
    median, copy = statistics.median(seconds), statistics.median(copies)
    rate = f"{nbytes / median / 1e9:6.2f} GB/s"
    print(f"{label:58s} {median:7.3f} s  {rate}  {copy / median:5.2f} of a copy ({copy:.3f} s)")
