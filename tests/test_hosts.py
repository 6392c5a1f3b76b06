"""Runs of two processes with four simulated devices each, and of one with eight."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes  # noqa: F401 - NumPy learns of bfloat16, which safetensors names
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxrl import sft, train
from jaxrl.hosts import HostsError, Line, join
from jaxrl.settings import load

ROOT = Path(__file__).parent.parent
SMALL = [
    *("--config", str(ROOT / "configs" / "arithmetic_inprocess.yaml"), "--run.name=run"),
    *("--rollout.prompts_per_step=8", "--rollout.group_size=4", "--data.held_out=8"),
    *("--optimizer.warmup_steps=2", "--update.share_prompts=false", "--checkpoint.every_steps=3"),
    # Policies that stand still are scored by all processes, too.
    *("--algorithm.updates_per_batch=2", "--algorithm.kl_coefficient=0.1"),
    # Each minibatch is split over them; the reference is of step 2 where a run is resumed from 3.
    *("--algorithm.minibatches=2", "--algorithm.reference_every=2"),
]
STEPS = 4
TRAIN = ("jaxrl.train", *SMALL)
FINE_TUNE = (
    *("jaxrl.sft", "--config", str(ROOT / "configs" / "arithmetic_sft.yaml"), "--run.name=run"),
    *("--sft.sequences_per_step=16", "--data.held_out=20", "--optimizer.warmup_steps=1"),
)
SPLIT = ("--mesh.fsdp=4", "--mesh.tensor=2")  # of the parameters, and over both processes
# The compiler takes a third of the time without its optimizations.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


@contextlib.contextmanager
def started(
    arguments: list[str], command: tuple[str, ...] = TRAIN, **environment: str
) -> Iterator[subprocess.Popen]:
    process = subprocess.Popen(
        [sys.executable, "-m", *command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count=4 {QUICK}",
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            **environment,
        },
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


@contextlib.contextmanager
def pair(
    *arguments: str, each: dict[int, list[str]] | None = None, command: tuple[str, ...] = TRAIN
) -> Iterator[list]:
    """Two processes of one run; `each` has arguments of their own."""
    port = free_port()
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                started(
                    [
                        *arguments,
                        f"--hosts.coordinator=127.0.0.1:{port}",
                        "--hosts.processes=2",
                        f"--hosts.process_id={i}",
                        *(each or {}).get(i, []),
                    ],
                    command=command,
                )
            )
            for i in range(2)
        ]


def free_port() -> int:
    """One whose successor is free too."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        return one.getsockname()[1] - 2


def ended(processes: list[subprocess.Popen], *codes: int) -> list[str]:
    """What each wrote to stderr, once they have ended with these codes."""
    shown = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == list(codes), shown
    return [error for _, error in shown]


def together(*arguments: str) -> None:
    with pair(*SPLIT, *arguments) as processes:
        ended(processes, 0, 0)


def alone(*arguments: str, program=train, common: tuple[str, ...] = TRAIN[1:]) -> None:
    """In this process, which has eight devices too."""
    with contextlib.chdir(ROOT):
        assert program.main([*common, *arguments]) == 0


def lines(run: Path) -> list[dict]:
    file = run / "metrics.jsonl"
    return [json.loads(x) for x in file.read_text().splitlines()] if file.exists() else []


def wait_for_step(processes: list[subprocess.Popen], run: Path, step: int) -> None:
    deadline = time.monotonic() + 200
    while not (reported := lines(run)) or reported[-1]["step"] < step:
        assert time.monotonic() < deadline and all(p.poll() is None for p in processes)
        time.sleep(0.05)


def exported(run: Path) -> dict[str, np.ndarray]:
    return load_file(run / "export" / "model.safetensors")


def assert_same_policy(left: Path, right: Path) -> None:
    ours, theirs = exported(left), exported(right)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        np.testing.assert_allclose(tensor, theirs[name], rtol=0, atol=1e-6, err_msg=name)


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    alone(*SPLIT, f"--run.dir={folder}", f"--run.steps={STEPS}")
    return folder / "run"


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    together(f"--run.dir={folder}", f"--run.steps={STEPS}")
    return folder / "run"


def test_two_processes_fine_tune_as_one_does(tmp_path):
    arguments = [*SPLIT, f"--run.dir={tmp_path}", "--run.steps=2"]
    with pair(*arguments, command=FINE_TUNE) as processes:
        ended(processes, 0, 0)
    alone(*arguments, "--run.name=one", program=sft, common=FINE_TUNE[1:])
    for ours, theirs in zip(lines(tmp_path / "run"), lines(tmp_path / "one"), strict=True):
        assert ours.keys() == theirs.keys() and ours.get("loss") != 0.0
        for key in ("loss", "grad_norm", "eval/nll"):
            np.testing.assert_allclose(ours.get(key, 0), theirs.get(key, 0), rtol=1e-4)


def test_two_processes_train_what_one_trains(one, two):
    assert_same_policy(one, two)
    start = load_file(ROOT / "configs" / "tiny_policy" / "model.safetensors")
    assert any(np.abs(start[name] - x).max() > 1e-4 for name, x in exported(two).items())
    for ours, theirs in zip(lines(two), lines(one), strict=True):
        for key in ("reward/mean", "eval/accuracy", "tokens/trained", "data/cursor"):
            assert ours.get(key) == theirs.get(key), (ours["step"], key)
        if ours["step"]:
            np.testing.assert_allclose(ours["grad_norm"], theirs["grad_norm"], rtol=1e-4)


def test_a_checkpoint_of_two_processes_is_sealed_and_goes_on_in_one(one, two, tmp_path):
    shutil.copytree(two, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / f"step_{STEPS:08d}"
    listed = json.loads((newest / "MANIFEST.json").read_text())["files"]
    assert any("process_1" in name for name in listed)  # its shards are in the seal
    shutil.rmtree(newest)
    alone(f"--run.dir={tmp_path}", f"--run.steps={STEPS}", "--mesh.fsdp=1", "--resume")
    assert_same_policy(one, tmp_path / "run")


def test_a_checkpoint_of_one_process_goes_on_in_two(one, tmp_path):
    shutil.copytree(one, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{STEPS:08d}")
    together(f"--run.dir={tmp_path}", f"--run.steps={STEPS}", "--resume")
    assert_same_policy(one, tmp_path / "run")


def test_a_signal_to_any_process_ends_all_after_the_step_with_a_checkpoint(tmp_path):
    with pair(*SPLIT, f"--run.dir={tmp_path}", "--run.steps=500") as processes:
        wait_for_step(processes, tmp_path / "run", 1)
        processes[1].send_signal(signal.SIGTERM)
        ended(processes, 128 + signal.SIGTERM, 128 + signal.SIGTERM)
    last = lines(tmp_path / "run")[-1]["step"]
    assert last < 500
    assert (tmp_path / "run" / "checkpoints" / f"step_{last:08d}" / "MANIFEST.sha256").exists()


@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_process_is_killed_the_others_end_and_say_so(victim, tmp_path):
    with pair(*SPLIT, f"--run.dir={tmp_path}", "--run.steps=500") as processes:
        wait_for_step(processes, tmp_path / "run", 0)
        processes[victim].send_signal(signal.SIGKILL)
        other = processes[1 - victim]
        shown = other.communicate(timeout=60)[1]
    # When the first one goes, jax's own service goes with it, and jax may abort this process first.
    assert other.returncode in ((1, -signal.SIGABRT) if victim == 0 else (1,))
    assert shown.count(f"error: process {victim} ") == 1 and "is gone" in shown
    assert "Traceback" not in shown and shown.count("--resume") == 1


BAD_INPUT = {
    "mesh too small": ({}, ["--mesh.fsdp=4"], "must use all of them"),
    "other configuration": ({1: ["--run.seed=3"]}, [], "run.seed = 3, at the first 0"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_what_the_processes_cannot_do_together_each_of_them_says(case, tmp_path):
    each, common, expected = BAD_INPUT[case]
    with pair(f"--run.dir={tmp_path}", "--run.steps=5", *common, each=each) as processes:
        for process in processes:
            shown = process.communicate(timeout=100)[1]
            assert process.returncode in (1, 2)
            assert expected in shown and "Traceback" not in shown, shown
            assert shown.count("error: ") == 1, shown


@pytest.fixture
def complaint(monkeypatch):
    """complaint(address): of the second process of two, if it is not said otherwise, that cannot
    come together with the others there."""

    def came_together(*_, **__):
        raise AssertionError("they came together")

    monkeypatch.setattr("jax.distributed.initialize", came_together)  # it would end this process

    def complaint(address: str, **others: float) -> str:
        hosts = {"coordinator": address, "processes": 2, "process_id": 1, "timeout_s": 1} | others
        given = [(f"hosts.{key}", str(value)) for key, value in hosts.items()]
        config = load(ROOT / "configs" / "arithmetic_inprocess.yaml", given)
        with pytest.raises(HostsError) as error, join(config, report=lambda error: 1):
            pass
        return str(error.value)

    return complaint


APART = {
    "other count": ([2, 3], 30, r"hosts\.processes = 3, the first with 2"),
    "one is missing": ([3, 3], 4, r"1 of 3 processes did not come .*: process 2;"),
}


@pytest.mark.parametrize("case", APART)
def test_when_they_do_not_come_together_each_of_them_says_why(case, complaint):
    counts, timeout_s, expected = APART[case]
    address = f"127.0.0.1:{free_port()}"
    with ThreadPoolExecutor() as threads:
        said = [
            threads.submit(complaint, address, process_id=i, processes=count, timeout_s=timeout_s)
            for i, count in enumerate(counts)
        ]
    for one in said:
        assert re.search(expected, one.result())


@pytest.fixture
def taken() -> Iterator[socket.socket]:
    """A socket whose port nobody else can have. Until it listens, connections are refused."""
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        yield own


def test_a_first_process_that_is_not_there_is_named_with_its_address(taken, complaint):
    address = f"127.0.0.1:{taken.getsockname()[1]}"
    said = complaint(address)
    assert f"process 0 at {address} did not answer within 1 s" in said
    assert "hosts.process_id = 0" in said


def test_a_first_process_that_says_nothing_did_not_turn_anybody_away(taken, complaint):
    taken.listen()  # the kernel accepts, and nobody reads
    address = f"127.0.0.1:{taken.getsockname()[1]}"
    said = complaint(address)
    assert f"process 0 at {address} took the connection and said nothing for 2 s" in said
    assert "hosts.coordinator" in said and "turned" not in said


def test_a_first_process_that_hangs_up_turned_this_one_away(taken, complaint):
    taken.listen()
    hang_up = threading.Thread(target=lambda: taken.accept()[0].close())
    hang_up.start()
    address = f"127.0.0.1:{taken.getsockname()[1]}"
    assert f"process 0 at {address} turned this process away" in complaint(address)
    hang_up.join()


@contextlib.contextmanager
def connected() -> Iterator[tuple[socket.socket, Line]]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    with near, far:
        yield near, Line(far, silence_s=4.0)


def test_a_message_arrives_as_it_was_sent():
    rng = np.random.default_rng(0)
    arrays = [
        rng.normal(size=(700, 300)).astype(np.float32),
        np.asfortranarray(rng.integers(0, 9, (3, 4), dtype=np.int32)),
        rng.normal(size=(8, 6))[::2, 1:],
    ]
    with connected() as (near, line):
        sender = threading.Thread(
            target=Line(near, silence_s=4.0).send, args=("name", [1, "ü", [None]], arrays)
        )
        sender.start()
        message = line.receive()
        sender.join()
    assert (message.name, message.args) == ("name", [1, "ü", [None]])
    for sent, came in zip(arrays, message.arrays, strict=True):
        assert came.dtype == sent.dtype
        np.testing.assert_array_equal(came, sent)


@pytest.mark.parametrize(
    "sent", [b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\2{}", b"\0\0\0\3[1]", b"\0\0", b""]
)
def test_what_is_not_a_message_is_refused(sent):
    with connected() as (near, line):
        near.sendall(sent)
        near.close()
        with pytest.raises(OSError):
            line.receive()


def test_processes_share_the_publishing_to_a_live_engine(tmp_path):
    """Each ships its buckets, whole and as differences; the engine proves every version."""
    pytest.importorskip("vllm")
    with pair(
        *SPLIT,
        f"--config={ROOT / 'configs' / 'arithmetic.yaml'}",
        *(f"--run.dir={tmp_path}", "--run.name=run", "--run.steps=2", "--eval.every_steps=0"),
        *("--publish.channel=shuttle", "--publish.encoding=delta", "--publish.bucket_mib=1"),
        *("--publish.compare=mesh", "--publish.dtype=bfloat16", "--optimizer.learning_rate=1e-5"),
    ) as processes:
        ended(processes, 0, 0)
    steps = lines(tmp_path / "run")[1:]
    assert [line["publish/delta"] for line in steps] == [1, 1]
    for line in steps:
        assert 0 < line["publish/bytes"] < line["publish/device_bytes"] < 1_064_704 / 2
    newest = tmp_path / "run" / "weights" / f"v{steps[-1]['weights/version']:08d}"
    assert json.loads((newest / "manifest.json").read_text())["base"] is not None


def test_what_processes_ship_is_balanced():
    from bridge.export import Exporter
    from jaxrl.models.config import load_config
    from jaxrl.models.params import param_specs

    specs = param_specs(load_config(ROOT / "configs" / "tiny_policy"))
    for processes in (1, 2, 3):  # a bucket has room for all of it
        exporter = Exporter(specs, "bfloat16", processes=processes)
        owners, loads = exporter.owners(processes), [0] * processes
        for owner, group in zip(owners, exporter.plan, strict=True):
            loads[owner] += group.nbytes
        assert sum(loads) == exporter.nbytes
        most = max(group.nbytes for group in exporter.plan)
        assert max(loads) - min(loads) <= most
        if processes == 2:  # for three, one tensor is more
            assert 8 * most <= exporter.nbytes
