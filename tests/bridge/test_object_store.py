"""The object store where something is in the way, and from other processes of a real cluster."""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from bridge import channels
from bridge.channels import ChannelError
from tests.bridge.test_channels import assert_same, mail, pack, unpack, weights

ray = pytest.importorskip("ray")


@pytest.fixture
def ticket(ray_cluster):
    from bridge.channels.object_store import ObjectStoreChannel

    channel = ObjectStoreChannel()
    yield mail(channel.publish(*pack(1, version=1)))
    channel.close()


@pytest.fixture
def failing(monkeypatch):
    """Makes the next calls of `ray.get` fail; returns the timeouts that it was called with."""

    def fail(*errors):
        real, waiting, timeouts = ray.get, list(errors), []

        def get(refs, timeout=None):
            timeouts.append(timeout)
            if waiting:
                raise waiting.pop(0)
            return real(refs, timeout=timeout)

        monkeypatch.setattr(ray, "get", get)
        return timeouts

    return fail


LATE = ray.exceptions.GetTimeoutError("late")
LOST = ray.exceptions.ObjectLostError("00" * 28, None, "")


@pytest.mark.parametrize("first", [LATE, LOST, ConnectionError("reset")])
def test_what_fails_once_or_twice_is_tried_again(ticket, failing, first):
    timeouts = failing(first, LOST)
    assert_same(unpack(*channels.fetch(ticket, 30.0)), weights(1))
    assert (
        timeouts[0] <= 10.0 < max(timeouts)
    )  # seconds: the first has a share, the last what is left


def test_what_fails_every_time_says_how_often_it_was_tried(ticket, failing):
    failing(LATE, LATE, LATE)
    with pytest.raises(ChannelError, match=r"version 1 did not arrive .* 3 attempts"):
        channels.fetch(ticket, 30.0)


def test_no_attempt_is_made_after_the_deadline(ticket, failing):
    timeouts = failing(LOST, LOST)
    with pytest.raises(ChannelError, match=r"version 1 cannot be had .* 1 attempt;"):
        channels.fetch(ticket, 0.1)
    assert len(timeouts) == 1 and timeouts[0] <= 0.1


def test_a_trainer_that_is_gone_is_not_asked_again(ray_cluster):
    from bridge.channels.object_store import ObjectStoreChannel

    channel = ObjectStoreChannel()
    left = mail(channel.publish(*pack(1, version=1)))
    channel.close()
    with pytest.raises(ChannelError, match=r"version 1 cannot be had .* 1 attempt; .* gone"):
        channels.fetch(left, 30.0)


def kill_the_shelf(ticket):
    name = json.loads(ticket.address)["shelf"]
    shelf = ray.get_actor(name, namespace=name)
    os.kill(ray.get(shelf.__ray_call__.remote(lambda shelf: os.getpid())), signal.SIGKILL)


def test_a_shelf_that_was_killed_is_there_again_with_what_was_on_it(ray_cluster, caplog):
    """Between two versions, and again while one is shipped. What was dropped stays dropped."""
    from bridge.channels.object_store import ObjectStoreChannel

    channel = ObjectStoreChannel(keep_versions=2)
    tickets = [mail(channel.publish(*pack(seed, version=seed))) for seed in (1, 2, 3)]
    kill_the_shelf(tickets[-1])
    with pytest.raises(ChannelError, match=r"version 3 .*(cannot be had|holds versions \[\])"):
        channels.fetch(tickets[-1], 5.0)
    manifest, buckets = pack(4, version=4)
    shipment = channel.begin(4, len(buckets), manifest.nbytes)
    assert_same(unpack(*channels.fetch(tickets[2], 30.0)), weights(3))
    for index, data in enumerate(buckets):
        shipment.put([e for e in manifest.tensors if e.bucket == index], data)
    kill_the_shelf(tickets[-1])
    tickets.append(mail(shipment.finish(manifest)))
    for kept in (3, 4):
        assert_same(unpack(*channels.fetch(tickets[kept - 1], 30.0)), weights(kept))
    for dropped in (1, 2):
        with pytest.raises(ChannelError, match=r"holds versions \[3, 4\]"):
            channels.fetch(tickets[dropped - 1], 5.0)
    assert caplog.text.count("set up again") == 2
    channel.close()


def test_a_shelf_that_was_killed_while_a_version_is_fetched_is_given_it_back(ray_cluster):
    from bridge.channels.object_store import ObjectStoreChannel

    channel = ObjectStoreChannel()
    channel.refresh()  # there is nothing yet
    ticket = mail(channel.publish(*pack(1, version=1)))
    kill_the_shelf(ticket)
    with pytest.raises(ChannelError, match=r"version 1 .*(cannot be had|gets them back from)"):
        channels.fetch(ticket, 5.0)
    channel.refresh()
    assert_same(unpack(*channels.fetch(ticket, 30.0)), weights(1))
    channel.close()


def test_an_aborted_version_leaves_nothing(ray_cluster):
    """Nor what another process put for it."""
    from bridge.channels.object_store import ObjectStoreChannel

    channel = ObjectStoreChannel()
    manifest, buckets = pack(1, version=1)
    shipment = channel.begin(1, len(buckets), manifest.nbytes)
    for index, some in enumerate((shipment, channels.join(shipment.invitation()))):
        some.put([e for e in manifest.tensors if e.bucket == index], buckets[index])
    shipment.abort()
    ticket = mail(channel.publish(*pack(2, version=2)))
    assert_same(unpack(*channels.fetch(ticket, 30.0)), weights(2))
    shelf = json.loads(ticket.address)["shelf"]
    assert ray.get(ray.get_actor(shelf, namespace=shelf).coming.remote(1)) == {}
    with pytest.raises(ChannelError, match=r"version 1 is not in .* holds versions \[2\]"):
        channels.fetch(channels.Ticket("object_store", 1, manifest.digest, ticket.address), 5.0)
    channel.close()


PUBLISHES = """
    import sys

    import ray

    from bridge.channels.object_store import ObjectStoreChannel
    from tests.bridge.test_channels import pack

    ray.init(address=sys.argv[1], log_to_driver=False, logging_level="error")
    manifest, buckets = pack(1, version=1)
    channel = ObjectStoreChannel()
    shipment = channel.begin(1, len(buckets), manifest.nbytes)
    print(shipment.invitation(), flush=True)
    for index, data in list(enumerate(buckets))[::2]:
        shipment.put([e for e in manifest.tensors if e.bucket == index], data)
    sys.stdin.readline()
    print(shipment.finish(manifest).to_json(), flush=True)
    sys.stdin.readline()
"""
PUTS = """
    import sys

    from bridge import channels
    from tests.bridge.test_channels import pack

    shipment = channels.join(sys.stdin.readline())
    manifest, buckets = pack(1, version=1)
    for index, data in list(enumerate(buckets))[1::2]:
        shipment.put([e for e in manifest.tensors if e.bucket == index], data)
    print("put", flush=True)
    sys.stdin.readline()
"""
READS = """
    import sys

    from bridge import channels, wire

    manifest, data = channels.fetch(channels.Ticket.from_json(sys.stdin.readline()), 60.0)
    assert wire.verify(manifest, data) == manifest.digest
    ranges = []
    for line in open("/proc/self/maps"):
        span, *_, path = line.split()
        if "plasma" in line:
            ranges.append([int(end, 16) for end in span.split("-")])
    inside = [
        any(start <= array.ctypes.data < stop for start, stop in ranges)
        for array in data
        if array.nbytes
    ]
    print(len(inside), all(inside), flush=True)
"""


PUBLISHES_AFAR = """
    import os
    import signal
    import sys
    import time

    import ray

    from bridge import channels, wire
    from bridge.channels.object_store import ObjectStoreChannel
    from tests.bridge.test_channels import pack

    class Engine:
        def facts(self):
            return ray.get_runtime_context().get_node_id(), os.getppid()

        def fetch(self, ticket):
            manifest, data = channels.fetch(channels.Ticket.from_json(ticket), 30.0)
            return wire.verify(manifest, data)

    said, sys.stdout = sys.stdout, sys.stderr  # where Ray says who was killed

    def say(what):
        print(what, file=said, flush=True)

    def is_there(refs):
        found = ray.experimental.get_object_locations(refs)
        return all(node in found[ref]["node_ids"] for ref in refs)

    ray.init(address=sys.argv[1], log_to_driver=False, logging_level="error")
    engine = ray.remote(Engine).options(resources={"far": 1}, num_cpus=0).remote()
    node, raylet = ray.get(engine.facts.remote(), timeout=60)
    channel = ObjectStoreChannel()
    for version in range(1, 7):
        manifest, buckets = pack(version, version=version)
        shipment = channel.begin(version, len(buckets), manifest.nbytes)
        other = channels.join(shipment.invitation()) if version == 2 else shipment
        for index, data in enumerate(buckets):
            part = [e for e in manifest.tensors if e.bucket == index]
            (shipment, other)[index % 2].put(part, data)
        if version in (2, 4):
            refs = [*shipment._refs.values(), *channel.coming(version).values()]
            end = time.monotonic() + 60
            while not is_there(refs) and time.monotonic() < end:
                time.sleep(0.02)
            if version == 2:
                say(len(shipment._refs) < len(buckets))
            say(len(set(refs)) == len(buckets) and is_there(refs))
        ticket = shipment.finish(manifest)
        if version < 5:
            say(ray.get(engine.fetch.remote(ticket.to_json())) == ticket.digest)
        if version == 2:
            relays = channel._shelf.__ray_call__.remote(lambda shelf: [*shelf._relays.values()])
            ((relay, _),) = ray.get(relays)
            relay.__ray_call__.remote(lambda relay: os.kill(os.getpid(), signal.SIGKILL))
            time.sleep(0.5)
        if version == 4:
            os.kill(raylet, signal.SIGKILL)
    say(not ray.get(channel._shelf.begin.remote())[1])
"""


class Process:
    """Another Python process that runs `code`, spoken to by lines."""

    def __init__(self, code, environment, *arguments):
        command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, env=environment, bufsize=1
        )

    def says(self) -> str:
        ready, _, _ = select.select([self.process.stdout], [], [], 90)
        assert ready, "nothing in 90 s"
        return self.process.stdout.readline().strip()

    def hears(self, line: str) -> None:
        self.process.stdin.write(f"{line}\n")

    def end(self) -> None:
        self.process.terminate()
        self.process.wait()


@contextlib.contextmanager
def ray_node(log, environment, *arguments):
    """A Ray node, as `ray start` on the command line makes it; `log`: where it writes."""
    command = [str(Path(sys.executable).with_name("ray")), "start", "--block", *arguments]
    command += [f"--object-store-memory={128 << 20}", "--node-ip-address=127.0.0.1"]
    with log.open("w") as file:
        node = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + 90
        while "Ray runtime started" not in log.read_text():
            assert node.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield
    finally:
        node.terminate()
        try:
            node.wait(3.0)
        except subprocess.TimeoutExpired:  # it waits for 14 s if its raylet is gone
            node.kill()
            node.wait()


@pytest.fixture
def cluster(tmp_path_factory):
    """(address, environment, directory for logs) of a Ray of its own."""
    environment = dict(os.environ)
    if Path("~/.ray/auth_token").expanduser().exists():  # Ray asks for it where there is one
        environment["RAY_AUTH_MODE"] = "token"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    scratch = tmp_path_factory.mktemp("r")
    head = ["--head", f"--port={port}", f"--temp-dir={scratch}", "--num-cpus=4"]
    logs = tmp_path_factory.mktemp("logs")
    with ray_node(logs / "head", environment, *head, "--include-dashboard=false"):
        yield f"127.0.0.1:{port}", environment, logs


def test_two_processes_put_and_a_third_maps_what_they_put(cluster):
    address, environment, _ = cluster
    publisher = Process(PUBLISHES, environment, address)
    other, reader = Process(PUTS, environment), Process(READS, environment)
    try:
        other.hears(publisher.says())
        assert other.says() == "put"
        publisher.hears("finish")
        ticket = publisher.says()
        assert json.loads(ticket)["version"] == 1
        reader.hears(ticket)
        assert reader.says() == "5 True"  # tensors, all of them in the store's own memory
    finally:
        for process in (reader, other, publisher):
            process.end()


def test_buckets_are_on_another_node_before_their_version_is_whole(cluster):
    """Where the one before was fetched, whoever put them. Versions get there without, too: the
    relay is killed after version 2, and the node after version 4."""
    address, environment, logs = cluster
    far = [f"--address={address}", "--num-cpus=1", '--resources={"far": 1}']
    with ray_node(logs / "far", environment, *far):
        publisher = Process(PUBLISHES_AFAR, environment, address)
        try:
            for what in (
                "version 1 was fetched",
                "another process put some of version 2",
                "all of version 2 is there before it is finished",
                "version 2 was fetched",
                "version 3 was fetched",
                "all of version 4 is there before it is finished",
                "version 4 was fetched",
                "nobody took the version before",
            ):
                assert publisher.says() == "True", what
        finally:
            publisher.end()
