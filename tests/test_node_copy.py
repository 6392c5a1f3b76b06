"""One copy of a version for all the processes of a node; with real processes, locks and signals."""

import errno
import fcntl
import gc
import hashlib
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest

from bridge import delta, node_copy, receive, wire
from bridge.channels import ChannelError, Ticket
from bridge.receive import Receiver
from tests.test_receive import Trainer, arrived, harm_payload

ANSWER_S = 60.0
DEADLINE_S = 40.0
PATIENCE = 0.005  # of that: nobody waits long for who is slow on purpose


@pytest.fixture(autouse=True)
def shm(monkeypatch):
    """A place of its own in shared memory, for the copies of one test."""
    base = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=base if base.is_dir() else None) as folder:
        monkeypatch.setattr(node_copy, "ROOTS", (Path(folder),))
        monkeypatch.setattr(receive, "PATIENCE", PATIENCE)
        yield Path(folder)
        gc.collect()  # whatever a failed test still holds leaves before the folder does


def copies(shm: Path) -> list[Path]:
    return [path for path in sorted(shm.iterdir()) if path.suffix != node_copy.USERS]


def version_in(path: Path) -> str:
    """What the header says: a number, or nothing if the copy is torn."""
    return path.read_bytes()[:64].split(b"\0")[0].decode().partition(" ")[0]


def digests(tensors: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in tensors.items()}


def follow(pipe, shm: str, patience: float) -> None:
    """A process that receives what it is told to, and answers with the digests of the tensors."""
    node_copy.ROOTS, receive.PATIENCE = (Path(shm),), patience
    most = 0

    def prove(manifest, data):
        nonlocal most
        found = wire.verify(manifest, data)
        most = max(most, memory_kib("/proc/self/status", "RssAnon"))
        return found

    receiver = Receiver(prove)
    while True:
        what, *args = pipe.recv()
        answer: object = None
        if what == "receive":
            answer = digests(arrived(receiver, Ticket.from_json(args[0]), DEADLINE_S))
        elif what == "release":
            receiver.release()
        elif what == "close":
            receiver.close()
        elif what == "stop at":
            stop_at(args[0])
        elif what == "weigh":
            anonymous = memory_kib("/proc/self/status", "RssAnon")
            answer = (memory_kib("/proc/self/smaps_rollup", "Pss"), anonymous, most)
        elif what == "end":
            return
        pipe.send(answer)


def memory_kib(file: str, field: str) -> int:
    lines = Path(file).read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])


def stop_at(count: int) -> None:
    """This process stops for good when it is about to patch its `count`-th tensor from now."""
    apply, calls = delta.apply, 0

    def stopping(payload, array):
        nonlocal calls
        calls += 1
        if calls == count:
            array[:5] = 7  # in the middle of a tensor
            os.kill(os.getpid(), signal.SIGSTOP)
        apply(payload, array)

    delta.apply = stopping


class Follower:
    def __init__(self, shm: Path, patience: float):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=follow, args=(theirs, str(shm), patience), daemon=True
        )
        self.process.start()
        theirs.close()

    def tell(self, *what) -> None:
        self.pipe.send(what)

    def answer(self):
        assert self.pipe.poll(ANSWER_S), "no answer"
        return self.pipe.recv()

    def ask(self, *what):
        self.tell(*what)
        return self.answer()

    def wait_until_stopped(self) -> None:
        end = time.monotonic() + ANSWER_S
        status = Path(f"/proc/{self.process.pid}/stat")
        while status.read_text().rpartition(")")[2].split()[0] != "T":
            assert time.monotonic() < end, "did not stop"
            time.sleep(0.01)

    def kill(self) -> None:
        self.process.kill()
        self.process.join(ANSWER_S)


@pytest.fixture
def followers(shm):
    started: list[Follower] = []

    def start(count: int, patience: float = PATIENCE) -> list[Follower]:
        started.extend(Follower(shm, patience) for _ in range(count))
        return started[-count:]

    yield start
    for follower in started:
        follower.kill()


def test_twenty_versions_reach_four_processes_whoever_comes_skips_or_lags(tmp_path, shm, followers):
    rng = np.random.default_rng(1)
    trainer, four = Trainer(tmp_path, anchor_every=6, keep=30), followers(4)
    sent = []
    for _ in range(20):
        sent.append((trainer.publish().to_json(), digests(trainer.bytes())))
        coming = [follower for follower in four if rng.random() < 0.8]
        asked = []
        for follower in coming:
            ticket, expected = sent[-1] if rng.random() < 0.8 else sent[rng.integers(len(sent))]
            follower.tell("receive", ticket)
            asked.append((follower, expected))
        for follower, expected in asked:
            assert follower.answer() == expected
        for follower in coming:
            if rng.random() < 0.9:
                follower.ask("release")
        assert len(copies(shm)) <= 1
    ticket, expected = sent[-1]
    for follower in four:
        follower.tell("receive", ticket)
    assert [follower.answer() for follower in four] == [expected] * 4
    assert version_in(*copies(shm)) == "20"
    assert arrived(Receiver(shared=False), Ticket.from_json(ticket)) == trainer.bytes()


def test_four_processes_need_the_memory_of_one_copy(tmp_path, shm, followers):
    model = 64 << 20
    shapes = {name: ((model // 8 // 4,), np.float32) for name in "abcdefgh"}
    trainer, four = Trainer(tmp_path, shapes=shapes), followers(4, patience=1.0)
    before = [follower.ask("weigh") for follower in four]
    for version in (1, 2, 3):
        ticket, expected = trainer.publish(share=1e-3).to_json(), digests(trainer.bytes())
        for follower in four:
            follower.tell("receive", ticket)
        assert [follower.answer() for follower in four] == [expected] * 4
        assert version_in(*copies(shm)) == str(version)
        for follower in four:
            follower.ask("release")
    after = [follower.ask("weigh") for follower in four]
    grown = [now[0] - then[0] for now, then in zip(after, before, strict=True)]
    assert sum(grown) << 10 < 1.5 * model
    (copy,) = copies(shm)
    assert model <= copy.stat().st_blocks * 512 < 1.1 * model
    at_once = [now[2] - then[1] for now, then in zip(after, before, strict=True)]
    assert max(at_once) << 10 < 0.5 * model  # nor is there another copy while it is patched


def test_who_is_killed_while_patching_leaves_a_copy_that_is_known_to_be_torn(
    tmp_path, shm, followers
):
    trainer, (killed, other, late) = Trainer(tmp_path), followers(3)
    ticket = trainer.publish().to_json()
    for follower in (killed, other):
        assert follower.ask("receive", ticket) == digests(trainer.bytes())
        follower.ask("release")
    (copy,) = copies(shm)
    assert version_in(copy) == "1"
    killed.ask("stop at", 2)
    ticket = trainer.publish().to_json()
    killed.tell("receive", ticket)
    killed.wait_until_stopped()
    assert version_in(copy) == ""
    assert other.ask("receive", ticket) == digests(trainer.bytes())  # on its own, meanwhile
    assert version_in(copy) == ""
    killed.kill()
    assert late.ask("receive", ticket) == digests(trainer.bytes())
    assert version_in(copy) == "2"
    late.ask("release")
    ticket = trainer.publish().to_json()
    assert other.ask("receive", ticket) == late.ask("receive", ticket) == digests(trainer.bytes())
    assert version_in(copy) == "3" and copies(shm) == [copy]


def test_nothing_is_left_when_the_last_process_ends_however_it_ends(tmp_path, shm, followers):
    first, second = Trainer(tmp_path / "a"), Trainer(tmp_path / "b")
    closes, ends, killed = followers(3)
    ticket = first.publish().to_json()
    for follower in (closes, ends, killed):
        follower.ask("receive", ticket)
    closes.ask("close")
    assert len(list(shm.iterdir())) == 2
    ends.tell("end")
    ends.process.join(ANSWER_S)
    assert len(list(shm.iterdir())) == 2
    killed.kill()
    left = set(shm.iterdir())
    receiver = Receiver()
    assert arrived(receiver, second.publish()) == second.bytes()
    assert len(left) == len(list(shm.iterdir())) == 2 and not left & set(shm.iterdir())
    receiver.close()
    assert not list(shm.iterdir())


def test_the_last_process_to_end_on_its_own_removes_the_copy(tmp_path, shm, followers):
    (follower,) = followers(1)
    follower.ask("receive", Trainer(tmp_path).publish().to_json())
    assert len(list(shm.iterdir())) == 2
    follower.tell("end")
    follower.process.join(ANSWER_S)
    assert not list(shm.iterdir())


def test_who_comes_while_the_last_leaves_begins_anew(tmp_path, shm, monkeypatch):
    flock, left = fcntl.flock, []

    def late(descriptor, how):
        if how == fcntl.LOCK_SH | fcntl.LOCK_NB and not left:
            left.extend(shm.iterdir())  # what the last removes, opened here but not yet locked
            for path in left:
                path.unlink()
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    trainer, receiver = Trainer(tmp_path), Receiver()
    assert arrived(receiver, trainer.publish()) == trainer.bytes()
    assert left and len(list(shm.iterdir())) == 2


def test_streams_have_copies_of_their_own(tmp_path, shm):
    trainers = [Trainer(tmp_path / name) for name in "ab"]
    trainers[1].step()
    receivers = [Receiver(), Receiver()]
    for _ in range(3):
        for trainer, receiver in zip(trainers, receivers, strict=True):
            assert arrived(receiver, trainer.publish()) == trainer.bytes()
        assert [version_in(path) for path in copies(shm)] == [str(trainer.version)] * 2
    receivers[0].close()
    assert len(copies(shm)) == 1
    for trainer, receiver in zip(trainers, receivers, strict=True):
        assert arrived(receiver, trainer.publish()) == trainer.bytes()
    assert len(copies(shm)) == 2


def test_what_is_read_stays_and_who_cannot_wait_makes_a_copy_of_his_own(tmp_path, shm, caplog):
    trainer = Trainer(tmp_path)
    slow, fast, newer, other = (Receiver() for _ in range(4))
    before, first = own_copies(), trainer.publish()
    arrived(fast, first)
    read = slow.receive(first, DEADLINE_S)
    sent = [data.tobytes() for data in read.data]
    assert not caplog.records
    second = trainer.publish()
    for ticket in (second, trainer.publish()):
        found = fast.receive(ticket, DEADLINE_S)
        assert wire.verify(found.manifest, found.data) == ticket.digest
        assert [data.tobytes() for data in read.data] == sent
        assert version_in(*copies(shm)) == "1" and own_copies() == before + 1
    (note,) = caplog.records
    assert "version 2" in note.message and "copy of its own" in note.message
    assert newer.receive(second, DEADLINE_S).nbytes < 0.15 * len(b"".join(sent))  # not all of it
    slow.release()
    assert [data.tobytes() for data in slow.reread(DEADLINE_S).data] == sent
    slow.release()
    ticket = trainer.publish()
    assert arrived(other, ticket) == trainer.bytes()
    assert version_in(*copies(shm)) == "4"
    with pytest.raises(ChannelError, match="version 1 is not held any more"):
        slow.reread(DEADLINE_S)
    assert arrived(fast, ticket) == trainer.bytes()
    newer.close()
    del found
    assert own_copies() == before  # they share again
    other.release()
    assert arrived(slow, trainer.publish()) == trainer.bytes()  # `fast` still reads version 4
    assert version_in(*copies(shm)) == "4"


def own_copies() -> int:
    return Path("/proc/self/maps").read_text().count("/dev/zero (deleted)")


def test_who_waits_for_the_bytes_of_a_version_keeps_nobody(tmp_path, shm, monkeypatch):
    monkeypatch.setattr(receive, "PATIENCE", 0.5)
    trainer, waits, other = Trainer(tmp_path), Receiver(), Receiver()
    arrived(waits, trainer.publish())
    second, sent = trainer.publish(), trainer.bytes()
    third = trainer.publish()
    hidden = Path(third.address).rename(tmp_path / "hidden")
    thread = threading.Thread(target=waits.receive, args=(third, DEADLINE_S))
    thread.start()
    assert arrived(other, second, DEADLINE_S) == sent
    assert version_in(*copies(shm)) == "2"
    other.release()
    hidden.rename(third.address)
    thread.join(ANSWER_S)
    assert version_in(*copies(shm)) == "3"


def test_who_fails_leaves_the_copy_to_others(tmp_path, shm):
    trainer, fails, other = Trainer(tmp_path), Receiver(), Receiver()
    arrived(fails, trainer.publish())
    ticket = trainer.publish()
    harm_payload(Path(ticket.address))
    with pytest.raises((delta.DeltaError, wire.WireError), match="version 2"):
        fails.receive(ticket, DEADLINE_S)
    assert version_in(*copies(shm)) == ""
    trainer.encoder.failed()
    assert arrived(other, trainer.publish()) == trainer.bytes()
    assert version_in(*copies(shm)) == "3"


def test_who_is_late_does_not_take_the_copy_back(tmp_path, shm):
    trainer, late, ahead = Trainer(tmp_path), Receiver(), Receiver()
    first, sent = trainer.publish(), trainer.bytes()
    assert arrived(ahead, trainer.publish()) == trainer.bytes()
    ahead.release()
    assert arrived(late, first) == sent
    assert version_in(*copies(shm)) == "2"
    assert arrived(late, trainer.publish()) == trainer.bytes()
    assert version_in(*copies(shm)) == "3"


def test_arrays_outlive_the_receiver_they_came_from(tmp_path, shm):
    trainer, other = Trainer(tmp_path), Receiver()
    found = Receiver().receive(trainer.publish(), DEADLINE_S)
    sent = [data.tobytes() for data in found.data]
    gc.collect()
    arrived(other, trainer.publish())
    assert arrived(other, trainer.publish()) == trainer.bytes()
    assert [data.tobytes() for data in found.data] == sent


def test_a_fetch_that_hangs_while_it_writes_keeps_nobody(tmp_path, shm):
    """An engine's late prefetch: a thread whose receiver nobody waits for any more."""
    trainer, writing, goes_on = Trainer(tmp_path), threading.Event(), threading.Event()

    def prove(manifest, data):
        writing.set()
        assert goes_on.wait(ANSWER_S)
        return wire.verify(manifest, data)

    ticket = trainer.publish()
    thread = threading.Thread(target=Receiver(prove).receive, args=(ticket, DEADLINE_S))
    thread.start()
    assert writing.wait(ANSWER_S)
    receiver = Receiver()
    assert arrived(receiver, ticket) == trainer.bytes()
    assert arrived(receiver, trainer.publish()) == trainer.bytes()
    assert version_in(*copies(shm)) == ""
    goes_on.set()
    thread.join(ANSWER_S)
    gc.collect()
    assert arrived(receiver, trainer.publish()) == trainer.bytes()
    assert version_in(*copies(shm)) == "3"


def test_a_copy_that_is_not_what_it_says_is_not_taken(tmp_path, shm):
    trainer, first, second = Trainer(tmp_path), Receiver(), Receiver()
    ticket = trainer.publish()
    arrived(first, ticket)
    (copy,) = copies(shm)
    harm(copy)
    assert arrived(second, ticket) == trainer.bytes()
    first.release()
    assert arrived(second, trainer.publish()) == trainer.bytes()
    assert version_in(copy) == "2"
    assert arrived(first, Ticket.from_json(trainer.publish().to_json())) == trainer.bytes()


def harm(copy: Path) -> None:
    with copy.open("r+b") as file:
        file.seek(-17, os.SEEK_END)
        (byte,) = file.read(1)
        file.seek(-17, os.SEEK_END)
        file.write(bytes([byte ^ 4]))


def test_readers_cannot_write(tmp_path):
    found = Receiver().receive(Trainer(tmp_path).publish(), DEADLINE_S)
    assert not any(data.flags.writeable for data in found.data)
    with pytest.raises(ValueError, match="WRITEABLE"):
        found.data[0].flags.writeable = True


def full(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("known_before", [True, False])
def test_where_there_is_no_room_a_process_has_a_copy_of_its_own(
    tmp_path, shm, monkeypatch, caplog, known_before
):
    trainer, receiver = Trainer(tmp_path), Receiver()
    with monkeypatch.context() as patched:
        if known_before:
            usage = shutil.disk_usage(shm)._replace(free=5000)
            patched.setattr(shutil, "disk_usage", lambda path: usage)
        else:  # another took it since
            patched.setattr(os, "posix_fallocate", full)
        for _ in range(2):
            assert arrived(receiver, trainer.publish()) == trainer.bytes()
            assert not list(shm.iterdir())
    (note,) = caplog.records
    why = "bytes are needed, 5000 are free" if known_before else "No space left"
    assert f"{shm}: " in note.message and why in note.message
    assert arrived(receiver, trainer.publish()) == trainer.bytes()
    assert version_in(*copies(shm)) == "3"


def test_where_shared_memory_is_small_or_missing_the_next_place_is_taken(
    tmp_path, shm, monkeypatch
):
    trainer = Trainer(tmp_path / "versions")
    second = tmp_path / "tmp"
    second.mkdir()
    monkeypatch.setattr(node_copy, "ROOTS", (tmp_path / "missing", shm, second))
    real = shutil.disk_usage
    small = real(shm)._replace(free=5000)
    monkeypatch.setattr(shutil, "disk_usage", lambda at: small if at == shm else real(at))
    receivers = [Receiver(), Receiver()]
    ticket = trainer.publish()
    arrived(receivers[0], ticket)
    monkeypatch.setattr(shutil, "disk_usage", real)  # who comes later finds room in both
    arrived(receivers[1], ticket)
    assert not list(shm.iterdir()) and version_in(*copies(second)) == "1"


def test_a_file_that_another_could_write_or_read_is_refused(tmp_path, shm, caplog):
    trainer, receiver = Trainer(tmp_path), Receiver()
    arrived(receiver, trainer.publish())
    (copy,) = copies(shm)
    assert [path.stat().st_mode & 0o777 for path in shm.iterdir()] == [0o600] * 2
    copy.chmod(0o644)
    other = Receiver()
    assert arrived(other, trainer.publish()) == trainer.bytes()
    assert "this user alone" in caplog.text
    receiver.close()
    aside = tmp_path / "aside"
    aside.write_bytes(b"")
    aside.chmod(0o600)
    copy.symlink_to(aside)
    assert arrived(Receiver(), trainer.publish()) == trainer.bytes()
    assert aside.read_bytes() == b""


def test_a_whole_version_that_is_no_base_is_the_channels_and_is_let_go(tmp_path, shm):
    trainer, receiver = Trainer(tmp_path, "full"), Receiver()
    found = receiver.receive(trainer.publish(), DEADLINE_S)
    sent = [data.tobytes() for data in found.data]
    data = weakref.ref(found.data[0])
    del found
    gc.collect()
    assert data() is None and not list(shm.iterdir())
    assert [data.tobytes() for data in receiver.reread(DEADLINE_S).data] == sent
