"""The shuttle in an object storage: what faults of the storage do to a version, and what not.

Most of it over fsspec's own files and memory. Servers that speak S3 (moto) and Google's storage
(gcp-storage-emulator), and the real clients, where they are installed.
"""

import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem

from bridge import channels, wire
from bridge.channels import ChannelError, Ticket, cloud
from bridge.channels.cloud import CloudChannel, open_shuttle
from bridge.channels.shuttle import ShuttleChannel
from tests.bridge.test_channels import DEADLINE_S, assert_same, pack, unpack, weights


@pytest.fixture(autouse=True)
def directories_are_made(monkeypatch):
    """A bucket needs no directories: files are to be like that, here and in child processes."""
    monkeypatch.setitem(fsspec.config.conf, "file", {"auto_mkdir": True})
    monkeypatch.setenv("FSSPEC_FILE_AUTO_MKDIR", "true")


@pytest.fixture
def root(tmp_path):
    return tmp_path / "run"


class Faulty(LocalFileSystem):
    """Files under faulty:///path, and a fault to meet."""

    protocol = "faulty"
    fault = None  # called with (name of the operation, path, start, end) before each

    def _meet(self, operation, path, start=None, end=None):
        return self.fault(operation, path, start, end) if self.fault else None

    def cat_file(self, path, start=None, end=None, **kwargs):
        return self._meet("read", path, start, end) or super().cat_file(path, start, end)

    def ls(self, path, detail=False, **kwargs):
        self._meet("list", path)
        return super().ls(path, detail, **kwargs)

    def rm_file(self, path):
        self._meet("remove", path)
        super().rm_file(path)

    def rm(self, path, recursive=False, maxdepth=None):
        self._meet("remove", path)
        super().rm(path, recursive, maxdepth)


@pytest.fixture
def faulty(root, monkeypatch):
    """A channel over `Faulty`; requests are small, and tried again at once."""
    fsspec.register_implementation("faulty", Faulty, clobber=True)
    monkeypatch.setitem(fsspec.config.conf, "faulty", {"auto_mkdir": True})
    monkeypatch.setattr(Faulty, "fault", None)
    monkeypatch.setattr(cloud, "_RANGE", 64)
    monkeypatch.setattr(cloud, "_PAUSES_S", (0.001, 0.001))
    monkeypatch.setattr(cloud, "_POLL_S", 0.001)
    return CloudChannel(f"faulty://{root}")


def meet(fault):
    Faulty.fault = staticmethod(fault)


def bucket_of(ticket, root, tensor="wide") -> Path:
    directory = root / Path(ticket.address).name
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    return directory / index["weight_map"][tensor]


def test_a_path_is_a_directory_and_a_url_an_object_storage(root):
    assert isinstance(open_shuttle(str(root), 2), ShuttleChannel)
    ticket = open_shuttle(f"file://{root}", 2).publish(*pack(1, version=1))
    assert (ticket.channel, ticket.address) == ("cloud", f"file://{root}/v00000001")
    in_directory = Path(ShuttleChannel(root.parent / "other").publish(*pack(1, version=1)).address)
    for path in in_directory.iterdir():
        assert path.read_bytes() == (root / "v00000001" / path.name).read_bytes()
    assert len(list(in_directory.iterdir())) == len(list((root / "v00000001").iterdir())) > 4


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    ticket = Ticket("cloud", 1, "0" * 64, "gs://bucket/run/v00000001")
    for attempt in (
        lambda: CloudChannel("gs://bucket/run").begin(1, 1, 1),
        lambda: channels.fetch(ticket, DEADLINE_S),
    ):
        with pytest.raises(ChannelError, match=r"version 1: .*gs://bucket.*gcsfs.*\[gcs\]"):
            attempt()


@pytest.mark.parametrize(
    "address",
    ["/run/v00000001", "file:///run/v00000002", "file:///run/../v00000001", "a::b://c/v00000001"],
)
def test_a_ticket_cannot_point_elsewhere(address):
    with pytest.raises(ChannelError, match="not a URL that ends in v00000001"):
        channels.fetch(Ticket("cloud", 1, "0" * 64, address), 0.1)


def test_a_version_without_a_manifest_is_invisible_and_goes_with_the_next(root):
    channel = CloudChannel(f"file://{root}")
    manifest, buckets = pack(1, version=1)
    for version in (1, 2):  # two publishers that were killed
        killed = channel.begin(version, len(buckets), manifest.nbytes)
        killed.put([e for e in manifest.tensors if e.bucket == 0], buckets[0])
    ticket = Ticket("cloud", 1, manifest.digest, f"file://{root}/v00000001")
    with pytest.raises(ChannelError, match=r"version 1: .*v00000001 was not there"):
        channels.fetch(ticket, 0.2)
    assert channel.publish(manifest, buckets) == ticket
    assert [path.name for path in root.iterdir()] == ["v00000001"]
    assert_same(unpack(*channels.fetch(ticket, DEADLINE_S)), weights(1))


def test_an_aborted_shipment_leaves_nothing(root):
    channel = CloudChannel(f"file://{root}")
    manifest, buckets = pack(1, version=1)
    shipment = channel.begin(1, len(buckets), manifest.nbytes)
    shipment.put([e for e in manifest.tensors if e.bucket == 1], buckets[1])
    with pytest.raises(ChannelError, match="version 1 lacks model-00001-of-"):
        shipment.finish(manifest)
    shipment.abort()
    assert list(root.iterdir()) == []


def longer(path):
    path.write_bytes(path.read_bytes() + b"\0")


def shorter(path):
    path.write_bytes(path.read_bytes()[:-1])


def other_tensor(path):
    path.write_bytes(path.read_bytes().replace(b'"wide"', b'"woad"'))


@pytest.mark.parametrize("damage", [longer, shorter, other_tensor])
def test_a_damaged_object_is_named(root, damage):
    ticket = CloudChannel(f"file://{root}").publish(*pack(1, version=1))
    path = bucket_of(ticket, root)
    damage(path)
    with pytest.raises(ChannelError, match=rf"version 1: .*{path.name} has"):
        channels.fetch(ticket, DEADLINE_S)


def test_requests_that_fail_or_end_early_are_taken_up_where_they_stopped(faulty):
    ticket = faulty.publish(*pack(1, version=1))
    chance, lock, got = random.Random(0), threading.Lock(), []

    def fault(operation, path, start, end):
        with lock:
            fate = chance.random()
        if fate < 0.4:
            raise ConnectionResetError("cut")
        if start is not None:
            stop = start + 1 + (end - start) // 2 if fate < 0.8 else end
            got.extend((path, at) for at in range(start, stop))
            return Path(path).read_bytes()[start:stop]

    meet(fault)
    assert_same(unpack(*channels.fetch(ticket, DEADLINE_S)), weights(1))
    assert len(got) == len(set(got)) > 1000  # no byte came twice


def test_a_storage_that_answers_with_errors_is_given_up_at_the_deadline(faulty):
    ticket = faulty.publish(*pack(1, version=1))

    def fault(operation, path, start, end):
        if start is not None:
            raise ConnectionResetError("cut by the peer")

    meet(fault)
    with pytest.raises(ChannelError, match=r"version 1: .* within 0.3 s.*cut by the peer"):
        channels.fetch(ticket, 0.3)


def test_a_storage_that_hangs_is_given_up_at_the_deadline(faulty):
    ticket = faulty.publish(*pack(1, version=1))
    over = threading.Event()
    meet(lambda *_: over.wait(60) and None)
    try:
        with pytest.raises(ChannelError, match=r"version 1: .*not read, within 0.3 s"):
            channels.fetch(ticket, 0.3)
        assert not over.is_set()
    finally:
        over.set()


def test_credentials_that_are_refused_are_an_error_at_once(faulty):
    ticket = faulty.publish(*pack(1, version=1))

    def fault(operation, path, start, end):
        raise PermissionError("403 Forbidden")

    meet(fault)
    with pytest.raises(ChannelError, match=r"version 1: .*credentials.*403 Forbidden"):
        channels.fetch(ticket, 600.0)


@pytest.mark.parametrize("when", ["read", "list"])
def test_a_version_that_is_dropped_while_it_is_read_is_an_error_at_once(faulty, root, when):
    ticket = faulty.publish(*pack(1, version=1))

    def fault(operation, path, start, end):
        if operation == when and not path.endswith("manifest.json"):
            shutil.rmtree(root / "v00000001", ignore_errors=True)

    meet(fault)
    with pytest.raises(ChannelError, match=r"version 1: .*model-.* dropped"):
        channels.fetch(ticket, 600.0)


def test_an_empty_answer_is_an_error_that_names_the_object(faulty, root):
    ticket = faulty.publish(*pack(1, version=1))
    name = bucket_of(ticket, root).name

    def fault(operation, path, start, end):
        if start and path.endswith(name):
            bucket_of(ticket, root).write_bytes(b"")

    meet(fault)
    with pytest.raises(ChannelError, match=rf"version 1: .*{name} gave 0 bytes"):
        channels.fetch(ticket, DEADLINE_S)


@pytest.mark.parametrize("what, stay", [("", [1, 2, 3, 4]), ("v00000001", [1, 3, 4])])
def test_what_cannot_be_removed_does_not_spoil_a_publish(faulty, root, what, stay):
    def fault(operation, path, start, end):
        if operation == "remove" and what in path:
            raise PermissionError("no")

    meet(fault)
    first, *_ = [faulty.publish(*pack(v, version=v)) for v in (1, 2, 3, 4)]
    assert_same(unpack(*channels.fetch(first, DEADLINE_S)), weights(1))
    assert sorted(path.name for path in root.iterdir()) == [f"v{v:08d}" for v in stay]
    meet(None)
    faulty.publish(*pack(5, version=5))
    assert sorted(path.name for path in root.iterdir()) == ["v00000004", "v00000005"]


def test_the_manifest_goes_first(faulty, root):
    gone = []

    def fault(operation, path, start, end):
        if operation == "remove" and "v00000001" in path:
            gone.append((Path(path).name, (root / "v00000001" / "manifest.json").exists()))

    for version in (1, 2):
        faulty.publish(*pack(version, version=version))
    meet(fault)
    faulty.publish(*pack(3, version=3))
    assert gone[:2] == [("manifest.json", True), ("v00000001", False)]


def test_what_a_version_is_based_on_stays(root):
    channel = CloudChannel(f"file://{root}", keep_versions=1)
    base = None
    for version in (1, 2, 3, 4):
        base = None if version == 4 else base
        manifest, buckets = pack(version, version=version)
        manifest = wire.manifest_of(version, manifest.tensors, base)
        channel.publish(manifest, buckets)
        base = wire.Base(version, manifest.digest)
        if version == 3:
            assert len(list(root.iterdir())) == 3
    assert [path.name for path in root.iterdir()] == ["v00000004"]


PUTS = """
    import sys
    from bridge import channels
    from tests.bridge.test_channels import pack

    shipment = channels.join(sys.argv[1])
    manifest, buckets = pack(1, version=1)
    for index, data in list(enumerate(buckets))[1::2]:
        shipment.put([e for e in manifest.tensors if e.bucket == index], data)
"""
READS = """
    import sys
    from bridge import channels, wire

    print(wire.verify(*channels.fetch(channels.Ticket.from_json(sys.argv[1]), 60.0)))
"""


def elsewhere(code: str, argument: str, **environment: str) -> str:
    """What another process prints."""
    command = [sys.executable, "-c", textwrap.dedent(code), argument]
    env = os.environ | environment
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(params=["s3", "gs"])
def bucket(request):
    return request.getfixturevalue(f"{request.param}_url")


@pytest.fixture(params=["file", "s3", "gs"])
def url(request, root):
    kind = request.param
    return f"file://{root}" if kind == "file" else request.getfixturevalue(f"{kind}_url")


def test_two_processes_put_and_a_third_reads(url):
    manifest, buckets = pack(1, version=1)
    shipment = CloudChannel(url).begin(1, len(buckets), manifest.nbytes)
    for index, data in list(enumerate(buckets))[::2]:
        shipment.put([e for e in manifest.tensors if e.bucket == index], data)
    elsewhere(PUTS, shipment.invitation())
    assert elsewhere(READS, shipment.finish(manifest).to_json()) == manifest.digest


PUBLISHES = """
    import sys
    from bridge.channels.cloud import CloudChannel
    from tests.bridge.test_channels import pack

    CloudChannel(sys.argv[1]).publish(*pack(2, version=2))
"""


def test_what_another_process_published_is_not_rewritten(bucket):
    channel = CloudChannel(bucket)
    channel.publish(*pack(1, version=1))
    elsewhere(PUBLISHES, bucket)
    with pytest.raises(ChannelError, match="version 2 exists"):
        channel.begin(2, 1, 1)


def test_a_process_that_sees_another_storage_says_so(root):
    shipment = CloudChannel(f"file://{root}").begin(1, 1, 1)
    shutil.rmtree(root)
    with pytest.raises(ChannelError, match=r"version 1: .*does not see.*endpoint"):
        channels.join(shipment.invitation())


def test_a_bucket_that_is_missing_is_one_clear_error(bucket):
    nowhere = bucket.replace("://", "://no-")
    with pytest.raises(ChannelError, match=rf"version 1 .*{nowhere}.*is there such a bucket"):
        CloudChannel(nowhere).begin(1, 1, 1)
    ticket = Ticket("cloud", 1, "0" * 64, f"{nowhere}/v00000001")
    said = "bucket" if bucket.startswith("s3") else nowhere.split("/")[2]  # by the client
    with pytest.raises(ChannelError, match=rf"version 1: {nowhere}.* within 2 s.*{said}"):
        channels.fetch(ticket, 2.0)


def test_old_versions_go(bucket):
    channel = CloudChannel(bucket, keep_versions=2)
    tickets = [channel.publish(*pack(version, version=version)) for version in (1, 2, 3)]
    for version in (2, 3):
        assert_same(unpack(*channels.fetch(tickets[version - 1], DEADLINE_S)), weights(version))
    with pytest.raises(ChannelError, match=r"version 1: .*dropped"):
        channels.fetch(tickets[0], 1.0)


class CuttingProxy:
    """Forwards TCP to `port`, and cuts connections after some of the answer has passed."""

    def __init__(self, port: int, seed: int):
        self.cuts, self._upstream, self._chance = 0, port, random.Random(seed)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self):
        self._listener.close()

    def _accept(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._upstream))
            patience = self._chance.choice([1 << 10, 1 << 20, 1 << 26])
            for source, sink, most in ((client, server, 1 << 40), (server, client, patience)):
                threading.Thread(
                    target=self._forward, args=(source, sink, most), daemon=True
                ).start()

    def _forward(self, source, sink, most):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                most -= len(data)
                if most < 0:
                    self.cuts += 1
                    break
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def test_a_fetch_outlives_connections_that_are_cut(s3_url):
    """Large enough to be uploaded in parts, and read in ranges."""
    data = np.random.default_rng(0).integers(0, 255, 110 << 20, np.uint8)
    tensor = wire.HostTensor("w", "float32", (data.nbytes // 4,), data)
    manifest, buckets = wire.pack(1, [tensor], 1)
    ticket = CloudChannel(s3_url).publish(manifest, buckets)
    proxy = CuttingProxy(int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2]), seed=1)
    endpoint = f"http://127.0.0.1:{proxy.port}"
    assert elsewhere(READS, ticket.to_json(), AWS_ENDPOINT_URL=endpoint) == manifest.digest
    assert proxy.cuts > 2
    proxy.close()


@pytest.mark.parametrize("name", ["lr=[1]", "a*", "a?b", "a#b"])
def test_a_url_that_is_a_pattern_is_refused(s3_url, name):
    """Where they remove whole directories, storages' clients remove all that match."""
    with pytest.raises(ChannelError, match=r"version 1: .* cannot be used"):
        CloudChannel(f"{s3_url}/{name}").publish(*pack(1, version=1))


def test_a_name_may_hold_dots(s3_url):
    ticket = CloudChannel(f"{s3_url}/run..2").publish(*pack(1, version=1))
    assert_same(unpack(*channels.fetch(ticket, 30.0)), weights(1))
