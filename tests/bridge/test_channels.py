"""One contract for every channel, and what each must survive."""

import dataclasses
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import xxhash

from bridge import channels, wire
from bridge.channels import ChannelError, Ticket
from bridge.channels.cloud import CloudChannel
from bridge.channels.shuttle import ShuttleChannel

CHANNELS = ["object_store", "shuttle", "memory", "s3"]
DEADLINE_S = 5.0


@pytest.fixture(params=CHANNELS)
def channel(request, tmp_path):
    if request.param == "shuttle":
        yield ShuttleChannel(tmp_path / "shuttle", keep_versions=2)
        return
    if request.param == "memory":
        yield CloudChannel(f"memory:/{tmp_path}", keep_versions=2)
        return
    if request.param == "s3":
        yield CloudChannel(request.getfixturevalue("s3_url"), keep_versions=2)
        return
    request.getfixturevalue("ray_cluster")
    from bridge.channels.object_store import ObjectStoreChannel

    channel = ObjectStoreChannel(keep_versions=2)
    yield channel
    channel.close()


@pytest.fixture
def shuttle(tmp_path):
    return ShuttleChannel(tmp_path / "shuttle", keep_versions=2)


def weights(seed: int) -> dict[str, np.ndarray]:
    """Every shape and dtype that has been awkward."""
    rng = np.random.default_rng(seed)
    return {
        "embed.weight": rng.normal(size=(16, 5)).astype(ml_dtypes.bfloat16),
        "odd": rng.normal(size=(3,)).astype(np.float16),
        "matrix": rng.normal(size=(7, 9)).astype(np.float32),
        "scale": np.array(float(seed), np.float32),
        "nothing": np.zeros((0, 4), np.float32),
        "wide": rng.normal(size=(64, 8)).astype(np.float32),
    }


def pack(seed: int, version: int, bucket_bytes: int = 300):
    return wire.pack(
        version,
        [
            wire.HostTensor(name, str(a.dtype), a.shape, np.frombuffer(a.tobytes(), np.uint8))
            for name, a in weights(seed).items()
        ],
        bucket_bytes,
    )


def unpack(manifest, data) -> dict[str, np.ndarray]:
    """Read by NumPy alone, from the manifest's own words."""
    return {
        e.name: np.frombuffer(array.tobytes(), np.dtype(e.dtype)).reshape(e.shape)
        for e, array in zip(manifest.tensors, data, strict=True)
    }


def mail(ticket: Ticket) -> Ticket:
    """The ticket as it crosses between processes: text, with no live reference in it."""
    return Ticket.from_json(ticket.to_json())


def assert_same(arrived: dict[str, np.ndarray], sent: dict[str, np.ndarray]) -> None:
    assert arrived.keys() == sent.keys()
    for name, array in sent.items():
        assert (arrived[name].dtype, arrived[name].shape) == (array.dtype, array.shape), name
        assert arrived[name].tobytes() == array.tobytes(), name


def test_what_arrives_is_what_left(channel):
    manifest, buckets = pack(3, version=7)
    assert len(buckets) > 2
    found, arrived = channels.fetch(mail(channel.publish(manifest, buckets)), DEADLINE_S)
    assert found == manifest
    assert_same(unpack(found, arrived), weights(3))
    assert not any(bucket.flags.writeable for bucket in arrived)


def test_tensors_may_lie_beside_each_other_in_memory_or_not(channel):
    memory = np.random.default_rng(0).integers(0, 256, 64, np.uint8)
    places = {"a": (0, 16), "b": (16, 24), "none": (24, 24), "c": (28, 40), "d": (40, 44)}
    places |= {"before": (24, 28), "twice": (16, 24)}
    sent = [
        wire.HostTensor(name, "float32", ((end - start) // 4,), memory[start:end])
        for name, (start, end) in places.items()
    ]
    ticket = mail(channel.publish(*wire.pack(1, sent, 1 << 20)))
    manifest, arrived = channels.fetch(ticket, DEADLINE_S)
    assert [entry.name for entry in manifest.tensors] == list(places)
    for (start, end), array in zip(places.values(), arrived, strict=True):
        assert array.tobytes() == memory[start:end].tobytes()


def test_each_kept_ticket_fetches_its_own_version(channel):
    older, newer = (mail(channel.publish(*pack(v, version=v))) for v in (1, 2))
    assert_same(unpack(*channels.fetch(older, DEADLINE_S)), weights(1))
    assert_same(unpack(*channels.fetch(newer, DEADLINE_S)), weights(2))


def test_a_dropped_version_is_an_error_that_names_it(channel):
    dropped, *_ = [mail(channel.publish(*pack(v, version=v))) for v in (1, 2, 3)]
    with pytest.raises(ChannelError, match=r"version 1\b"):
        channels.fetch(dropped, 0.3)


def test_a_fetched_version_outlives_its_being_dropped(channel):
    manifest, buckets = channels.fetch(mail(channel.publish(*pack(1, version=1))), DEADLINE_S)
    for version in (2, 3, 4):
        channel.publish(*pack(version, version=version))
    assert_same(unpack(manifest, buckets), weights(1))


def test_a_pinned_version_stays(channel):
    channel.pin(1)
    pinned, other, *_ = [mail(channel.publish(*pack(v, version=v))) for v in (1, 2, 3, 4)]
    assert_same(unpack(*channels.fetch(pinned, DEADLINE_S)), weights(1))
    with pytest.raises(ChannelError, match=r"version 2\b"):
        channels.fetch(other, 0.3)


def test_a_version_is_published_once(channel):
    ticket = mail(channel.publish(*pack(1, version=1)))
    with pytest.raises(ChannelError, match=r"version 1 (exists|cannot be published)"):
        channel.publish(*pack(2, version=1))
    assert_same(unpack(*channels.fetch(ticket, DEADLINE_S)), weights(1))


def test_a_ticket_for_another_digest_is_refused(channel):
    ticket = mail(channel.publish(*pack(1, version=1)))
    forged = Ticket(ticket.channel, ticket.version, "0" * 64, ticket.address)
    with pytest.raises(ChannelError, match="announced"):
        channels.fetch(forged, DEADLINE_S)


def test_an_unknown_channel_is_refused():
    with pytest.raises(ChannelError, match="pigeon"):
        channels.fetch(Ticket("pigeon", 1, "0" * 64, ""), DEADLINE_S)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"channel":"shuttle","version":"1","digest":"","address":""}', "[" * 10**5],
    ids=len,
)
def test_what_is_not_a_ticket_is_refused(text):
    with pytest.raises(ChannelError, match="not a weight ticket"):
        Ticket.from_json(text)


def test_the_object_store_lets_dropped_versions_go(ray_cluster):
    """Eight versions, of which four fit: leaked ones would make Ray spill."""
    from ray._private.internal_api import memory_summary

    from bridge.channels.object_store import ObjectStoreChannel

    store = int(ray_cluster.cluster_resources()["object_store_memory"])
    channel = ObjectStoreChannel(keep_versions=2)
    data = np.zeros(int(store * 0.24), np.uint8)
    for version in range(1, 9):
        data[:8] = version
        tensor = wire.HostTensor("w", "float32", (data.nbytes // 4,), data[: data.nbytes // 4 * 4])
        ticket = mail(channel.publish(*wire.pack(version, [tensor], 1)))
        _, (bucket,) = channels.fetch(ticket, DEADLINE_S)
        assert bucket[0] == version
        del bucket
    channel.close()
    cluster = ray_cluster.get_runtime_context().gcs_address
    assert "Spilled" not in memory_summary(cluster, stats_only=True)


def test_the_object_store_refuses_what_it_cannot_hold(ray_cluster):
    from bridge.channels.object_store import ObjectStoreChannel

    manifest, _ = pack(1, version=1)
    need = 10**15
    huge = wire.Manifest(1, manifest.tensors, (need,), manifest.digest)
    store = int(ray_cluster.cluster_resources()["object_store_memory"])
    fills = wire.Manifest(1, manifest.tensors, (int(store * 0.81 / 3),), manifest.digest)
    channel = ObjectStoreChannel(keep_versions=2)
    with pytest.raises(ChannelError, match="80% before it spills"):
        channel.publish(fills, [])
    with pytest.raises(ChannelError, match=rf"{3 * need} bytes.*object_store_memory"):
        channel.publish(huge, [])
    channel.pin(1)
    channel.publish(*pack(1, version=1))
    with pytest.raises(ChannelError, match=rf"need {3 * need + manifest.nbytes} bytes"):
        channel.begin(2, 1, need)
    channel.close()


def read_json(ticket: Ticket, name: str) -> dict:
    return json.loads(Path(ticket.address, name).read_text())


def test_safetensors_reads_a_shuttle_file(shuttle):
    from safetensors import safe_open

    ticket = shuttle.publish(*pack(4, version=12))
    index = read_json(ticket, "model.safetensors.index.json")
    assert os.path.basename(ticket.address) == "v00000012"
    found = {}
    for name, file in index["weight_map"].items():
        with safe_open(f"{ticket.address}/{file}", framework="np") as opened:
            assert name in opened.keys()  # noqa: SIM118
            # NumPy has no bfloat16 of its own: torch reads that one.
            if name != "embed.weight":
                found[name] = opened.get_tensor(name)
    expected = weights(4)
    with safe_open(
        f"{ticket.address}/{index['weight_map']['embed.weight']}", framework="pt"
    ) as opened:
        embed = opened.get_tensor("embed.weight")
    assert embed.float().numpy().tolist() == expected.pop("embed.weight").astype(float).tolist()
    assert_same(found, expected)


def test_mapped_buckets_start_on_a_cache_line(shuttle):
    manifest, data = channels.fetch(shuttle.publish(*pack(1, version=1)), DEADLINE_S)
    starts = [
        array.ctypes.data % 64
        for entry, array in zip(manifest.tensors, data, strict=True)
        if entry.offset == 0 and entry.nbytes
    ]
    assert len(starts) > 2 and not any(starts)


def flip_a_bit(path):
    with open(path, "r+b") as file:
        file.seek(-3, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 16]))


def truncate(path):
    os.truncate(path, os.path.getsize(path) - 1)


def empty(path):
    os.truncate(path, 0)


def rename_a_tensor(path):
    content = Path(path).read_bytes()
    Path(path).write_bytes(content.replace(b'"wide"', b'"woad"'))


def lie_about_the_header(path):
    with open(path, "r+b") as file:
        file.write((1 << 40).to_bytes(8, "little"))


@pytest.mark.parametrize("damage", [truncate, empty, rename_a_tensor, lie_about_the_header])
def test_a_damaged_file_is_refused_by_fetch(shuttle, damage):
    ticket = mail(shuttle.publish(*pack(1, version=1)))
    wide = read_json(ticket, "model.safetensors.index.json")
    damage(f"{ticket.address}/{wide['weight_map']['wide']}")
    with pytest.raises(ChannelError, match=r"version 1\b.*model-"):
        channels.fetch(ticket, DEADLINE_S)


def test_a_flipped_bit_is_refused_by_the_digest(shuttle):
    """`fetch` maps and does not read; whoever loads the bytes verifies them."""
    ticket = mail(shuttle.publish(*pack(1, version=1)))
    wide = read_json(ticket, "model.safetensors.index.json")
    flip_a_bit(f"{ticket.address}/{wide['weight_map']['wide']}")
    with pytest.raises(wire.WireError, match="'wide'"):
        wire.verify(*channels.fetch(ticket, DEADLINE_S))


def test_another_versions_manifest_is_refused(shuttle):
    first, second = (mail(shuttle.publish(*pack(v, version=v))) for v in (1, 2))
    shutil.copy(f"{second.address}/manifest.json", f"{first.address}/manifest.json")
    with pytest.raises(ChannelError, match="version 1"):
        channels.fetch(first, DEADLINE_S)


def test_a_manifest_that_is_not_one_is_refused(shuttle):
    ticket = mail(shuttle.publish(*pack(1, version=1)))
    Path(ticket.address, "manifest.json").write_text("{}")
    with pytest.raises(ChannelError, match=r"version 1.*manifest"):
        channels.fetch(ticket, DEADLINE_S)


@pytest.mark.parametrize(
    "address", ["v00000001", "/etc/v00000002", "{root}/../shuttle/v00000001", "{root}/v1", "/"]
)
def test_a_ticket_cannot_point_elsewhere(shuttle, tmp_path, address):
    ticket = shuttle.publish(*pack(1, version=1))
    elsewhere = address.format(root=tmp_path / "shuttle")
    with pytest.raises(ChannelError, match="not an absolute path"):
        channels.fetch(Ticket("shuttle", 1, ticket.digest, elsewhere), 0.1)


def test_a_reader_waits_for_a_directory_that_shows_late(shuttle, tmp_path):
    ticket = shuttle.publish(*pack(1, version=1))
    hidden = tmp_path / "hidden"
    os.rename(ticket.address, hidden)
    mover = subprocess.Popen(["sh", "-c", f"sleep 0.5; mv {hidden} {ticket.address}"])
    assert_same(unpack(*channels.fetch(ticket, DEADLINE_S)), weights(1))
    mover.wait()


KILLED_WRITER = """
    import os, signal
    from pathlib import Path
    from bridge.channels import shuttle
    from tests.bridge.test_channels import pack

    synced = 0
    real = os.fsync
    def fsync(descriptor):
        global synced
        synced += 1
        if synced == {after}:
            os.kill(os.getpid(), signal.SIGKILL)
        real(descriptor)
    os.fsync = fsync
    shuttle.ShuttleChannel(Path({root!r})).publish(*pack(2, version=2))
"""


@pytest.mark.parametrize("after", [1, 3])
def test_a_killed_writer_leaves_nothing(shuttle, tmp_path, after):
    shuttle.publish(*pack(1, version=1))
    root = tmp_path / "shuttle"
    code = textwrap.dedent(KILLED_WRITER.format(after=after, root=str(root)))
    done = subprocess.run([sys.executable, "-c", code], cwd=os.getcwd())
    assert done.returncode == -signal.SIGKILL
    assert len(os.listdir(root)) == 2  # the leftover was there
    assert sorted(path.name for path in root.glob("v*")) == ["v00000001"]
    ticket = mail(shuttle.publish(*pack(2, version=2)))
    assert sorted(os.listdir(root)) == ["v00000001", "v00000002"]
    assert_same(unpack(*channels.fetch(ticket, DEADLINE_S)), weights(2))


def test_a_full_disk_is_an_error_with_numbers_and_nothing_is_visible(shuttle, tmp_path):
    shuttle.publish(*pack(1, version=1))
    manifest, buckets = pack(2, version=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, hard))  # the disk is full after 600 bytes
    try:
        with pytest.raises(ChannelError, match=rf"version 2 .*{manifest.nbytes} bytes.* free"):
            shuttle.publish(manifest, buckets)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path / "shuttle") == ["v00000001"]


def test_only_the_newest_versions_stay_on_disk(shuttle, tmp_path):
    for version in (9, 10, 100000000, 100000001):
        shuttle.publish(*pack(1, version=version))
    assert sorted(os.listdir(tmp_path / "shuttle")) == ["v100000000", "v100000001"]


def test_the_manifest_on_disk_carries_the_digest_of_every_tensor(shuttle):
    ticket = shuttle.publish(*pack(5, version=1))
    listed = read_json(ticket, "manifest.json")["tensors"]
    digests = {entry["name"]: entry["xxh3"] for entry in listed}
    assert digests == {
        name: xxhash.xxh3_128(array.tobytes()).hexdigest() for name, array in weights(5).items()
    }


def test_what_one_process_cannot_put_leaves_the_buckets_of_the_others(shuttle):
    manifest, buckets = pack(1, version=1)
    shipment = shuttle.begin(1, len(buckets), manifest.nbytes)
    other = channels.join(shipment.invitation())
    inside = [[e for e in manifest.tensors if e.bucket == i] for i in range(len(buckets))]
    shipment.put(inside[0], buckets[0])
    with pytest.raises(ChannelError, match="version 1 could not be written"):
        other.put(inside[0], buckets[0])  # its file is there already
    for entries, data in zip(inside[1:], buckets[1:], strict=True):
        other.put(entries, data)
    assert_same(unpack(*channels.fetch(shipment.finish(manifest), DEADLINE_S)), weights(1))


def another(channel):
    """The same place, opened by another run."""
    return type(channel)(channel._root, 2)


@pytest.fixture(params=["shuttle", "cloud"])
def place(request, tmp_path):
    """A channel whose versions outlive it."""
    if request.param == "shuttle":
        return ShuttleChannel(tmp_path, keep_versions=2)
    return CloudChannel(request.getfixturevalue("s3_url"), keep_versions=2)


def test_a_place_where_another_run_has_later_versions_is_refused_and_left_alone(place):
    tickets = [place.publish(*pack(version, version=version)) for version in (41, 42)]
    with pytest.raises(ChannelError, match=r"version 1 cannot .* holds version 42 of another run"):
        another(place).publish(*pack(1, version=1))
    for version, ticket in zip((41, 42), tickets, strict=True):
        assert_same(unpack(*channels.fetch(ticket, 30.0)), weights(version))
    ticket = another(place).publish(*pack(43, version=43))  # as a run that is resumed
    assert_same(unpack(*channels.fetch(ticket, 30.0)), weights(43))


def test_a_fallback_takes_versions_in_any_order(place):
    """The frozen weights may be asked for after later versions were."""
    place.pin(1)
    later, first = place.publish(*pack(5, version=5)), place.publish(*pack(1, version=1))
    for version, ticket in ((5, later), (1, first)):
        assert_same(unpack(*channels.fetch(ticket, 30.0)), weights(version))


def test_two_versions_published_at_the_same_time_both_arrive(place):
    place.pin(1)
    with ThreadPoolExecutor(2) as both:
        tickets = list(both.map(lambda n: place.publish(*pack(n, version=n)), (1, 2)))
    for version, ticket in zip((1, 2), tickets, strict=True):
        assert_same(unpack(*channels.fetch(ticket, 30.0)), weights(version))


def test_a_directory_may_be_named_by_way_of_its_parent(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    ticket = ShuttleChannel(Path("../weights")).publish(*pack(1, version=1))
    assert ticket.address == str(tmp_path / "weights" / "v00000001")
    assert_same(unpack(*channels.fetch(mail(ticket), 5.0)), weights(1))


def test_what_cannot_be_removed_does_not_stop_the_next_versions(shuttle, monkeypatch):
    """As a file on NFS that an engine on the same host has mapped."""
    shuttle.publish(*pack(1, version=1))
    real = os.unlink

    def unlink(path, *args, **kwargs):
        if "v00000001" in os.fspath(path) or str(path).endswith(".safetensors"):
            raise OSError(errno.EBUSY, "Device or resource busy")
        real(path, *args, **kwargs)

    monkeypatch.setattr(os, "unlink", unlink)
    tickets = [shuttle.publish(*pack(version, version=version)) for version in (2, 3, 4, 5)]
    assert list(shuttle._root.glob(".partial-*")), "something could not be removed"
    assert_same(unpack(*channels.fetch(tickets[-1], 5.0)), weights(5))


def test_a_manifest_alone_is_proven_too(channel):
    manifest, buckets = pack(1, version=1)
    ticket = mail(channel.publish(manifest, buckets))
    assert channels.fetch_manifest(ticket, 30.0) == manifest
    with pytest.raises(ChannelError, match="version 1, digest 0000"):
        channels.fetch_manifest(dataclasses.replace(ticket, digest="0" * 64), 30.0)


def test_a_manifest_that_is_no_text_is_refused(shuttle):
    ticket = shuttle.publish(*pack(1, version=1))
    path = Path(ticket.address) / "manifest.json"
    path.write_bytes(b"\xff" + path.read_bytes()[1:])
    with pytest.raises(ChannelError, match=r"weight version 1: .*utf-8"):
        channels.fetch(ticket, 5.0)


def test_a_place_is_checked_ahead_of_the_first_version(place, tmp_path):
    place.check(new_run=True)
    tickets = [place.publish(*pack(version, version=version)) for version in (1, 2)]
    for version, ticket in enumerate(tickets, 1):
        assert_same(unpack(*channels.fetch(ticket, 30.0)), weights(version))
    another(place).check(new_run=False)
    with pytest.raises(ChannelError, match=r"holds version 2 of another run; give each run"):
        another(place).check(new_run=True)


def test_a_place_that_cannot_be_written_to_is_one_clear_error(tmp_path, s3_url):
    (tmp_path / "file").touch()
    with pytest.raises(ChannelError, match=r"published at .*/file/w: Not a directory"):
        ShuttleChannel(tmp_path / "file" / "w").check(new_run=True)
    with pytest.raises(ChannelError, match="published at /proc: "):  # there, and takes no file
        ShuttleChannel(Path("/proc")).check(new_run=True)
    with pytest.raises(ChannelError, match=r"published at s3://no-.*is there such a bucket"):
        CloudChannel(s3_url.replace("://", "://no-")).check(new_run=True)
    with pytest.raises(ChannelError, match=r"s4://b/run: Protocol not known: s4; s3://BUCKET/RUN"):
        CloudChannel("s4://b/run").check(new_run=True)
