"""One process owns a run directory, a resumed run is the same run, a version is used once."""

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import yaml

from jaxrl.rundir import RunDirError, VersionCounter, check_shared, open_run

ROOT = Path(__file__).parents[1]
CONFIG = {
    "run": {"name": "a", "dir": "runs", "steps": 20, "seed": 0},
    "model": {"path": "m"},
    "data": {"task": "t", "task_args": {"max": 3}},
    "rollout": {"group_size": 8, "timeout_s": 600.0},
    "optimizer": {"learning_rate": 1e-6, "max_skipped_updates": 3},
    "mesh": {"data": 1},
    "vllm": {"engines": 1},
    "publish": {"bucket_mib": 64},
    "eval": {"every_steps": 10},
    "checkpoint": {"keep": 2},
    "log": {"tensorboard": True},
}


def text(**changes) -> str:
    """CONFIG as YAML, with changes like run__steps=30."""
    tree = yaml.safe_load(yaml.safe_dump(CONFIG))
    for key, value in changes.items():
        section, leaf = key.split("__")
        tree[section][leaf] = value
    return yaml.safe_dump(tree)


def start(path: Path, config: str | None = None) -> None:
    open_run(path, config or text(), resume=False).close()


def test_a_new_run_has_its_directories_and_its_config(tmp_path):
    path = tmp_path / "runs" / "a"
    with open_run(path, text(), resume=False) as run:
        assert run.path == path and run.changes == []
        assert run.config_file.read_text() == text()
        assert run.checkpoints.is_dir() and run.samples.is_dir() and run.tensorboard.is_dir()
        assert {p.name for p in (run.export, run.weights, run.metrics_file)} == {
            "export",
            "weights",
            "metrics.jsonl",
        }
        assert {run.export.parent, run.weight_version_file.parent, run.metrics_file.parent} == {
            path
        }


def test_a_start_that_reached_no_step_is_started_anew(tmp_path):
    start(tmp_path / "a")
    with open_run(tmp_path / "a", text(run__steps=30), resume=False) as run:
        assert run.config_file.read_text() == text(run__steps=30)


@pytest.mark.parametrize("begun", ["metrics.jsonl", "checkpoints/step_00000002"])
def test_a_directory_that_holds_a_run_is_refused_with_three_ways_out(tmp_path, begun):
    start(tmp_path / "a")
    (tmp_path / "a" / begun).write_text("")
    with pytest.raises(RunDirError) as error:
        open_run(tmp_path / "a", text(run__steps=30), resume=False)
    for way_out in ("--resume", "--run.name", f"remove {tmp_path / 'a'}"):
        assert way_out in str(error.value)
    assert (tmp_path / "a" / "config.yaml").read_text() == text()


def test_a_directory_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunDirError, match=r"not of a run \(thesis.tex\)"):
        open_run(tmp_path, text(), resume=False)
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunDirError, match="cannot be used as a run directory"):
        open_run(tmp_path / "file", text(), resume=False)


def test_a_start_that_was_killed_at_once_leaves_no_run(tmp_path):
    (tmp_path / ".lock").write_text("pid 1 on a machine with a very long name" * 5)
    (tmp_path / "tmp.config.yaml").write_text("run: {na")
    start(tmp_path)
    (line,) = (tmp_path / ".lock").read_text().splitlines()
    assert line.startswith(f"pid {os.getpid()} on ") and "very long" not in line


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()])
def test_resume_without_a_run_is_refused_and_creates_nothing(tmp_path, make):
    path = tmp_path / "a"
    make(path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RunDirError, match="no run to resume"):
        open_run(path, text(), resume=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_refused_changes_are_listed_together_and_change_nothing(tmp_path):
    start(tmp_path / "a")
    new = yaml.safe_load(
        text(
            run__seed=1, rollout__group_size=4, run__steps=30, data__task_args={"max": 4, "min": 1}
        )
    )
    del new["model"]
    new["optimizer"]["learning_rate"] = 1e-5
    with pytest.raises(RunDirError) as error:
        open_run(tmp_path / "a", yaml.safe_dump(new), resume=True)
    lines = [line.strip() for line in str(error.value).splitlines()[1:-1]]
    assert sorted(lines) == [
        "data.task_args.max: 3 -> 4",
        "data.task_args.min: (not set) -> 1",
        "model.path: 'm' -> (not set)",
        "optimizer.learning_rate: 1e-06 -> 1e-05",
        "rollout.group_size: 8 -> 4",
        "run.seed: 0 -> 1",
    ]
    assert (tmp_path / "a" / "config.yaml").read_text() == text()
    open_run(tmp_path / "a", text(), resume=True).close()  # the lock was given back


ALLOWED = {
    "run__steps": 30,
    "run__name": "b",
    "rollout__timeout_s": 5.0,
    "optimizer__max_skipped_updates": 9,
    "mesh__data": 2,
    "vllm__engines": 4,
    "publish__bucket_mib": 1,
    "eval__every_steps": 0,
    "checkpoint__keep": 5,
    "log__tensorboard": False,
}


@pytest.mark.parametrize("key", ALLOWED)
def test_changes_that_keep_the_run_what_it_is_are_accepted_and_recorded(tmp_path, key):
    start(tmp_path / "a")
    new = text(**{key: ALLOWED[key]})
    with open_run(tmp_path / "a", new, resume=True) as run:
        section, leaf = key.split("__")
        assert run.changes == [f"{section}.{leaf}: {CONFIG[section][leaf]!r} -> {ALLOWED[key]!r}"]
        assert run.config_file.read_text() == new


def test_true_is_not_1(tmp_path):
    start(tmp_path / "a", text(run__seed=1))
    with pytest.raises(RunDirError, match=r"run\.seed: 1 -> True"):
        open_run(tmp_path / "a", text(run__seed=True), resume=True)


@pytest.mark.parametrize("content", ["run: [", "", "just text", "- a"])
def test_a_damaged_saved_config_is_an_error_that_names_it(tmp_path, content):
    start(tmp_path / "a")
    (tmp_path / "a" / "config.yaml").write_text(content)
    with pytest.raises(RunDirError, match=r"config\.yaml: cannot be read"):
        open_run(tmp_path / "a", text(), resume=True)


HOLDER = """
    import sys, time
    from pathlib import Path
    from jaxrl.rundir import open_run
    with open_run(Path(sys.argv[1]), sys.argv[2], resume=len(sys.argv) > 3):
        print("held", flush=True)
        time.sleep(60)
"""


def hold(path: Path, *more: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLDER), str(path), text(), *more],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_by_the_pid_of_the_first_until_that_is_killed(tmp_path):
    path = tmp_path / "a"
    holder = hold(path)
    try:
        for resume in (True, False):
            with pytest.raises(RunDirError, match=rf"in use by pid {holder.pid} on ") as error:
                open_run(path, text(), resume=resume)
            assert "--run.name" in str(error.value)
    finally:
        holder.kill()
        holder.wait()
    # The lock file of the killed process is still there, and no obstacle.
    assert f"pid {holder.pid}" in (path / ".lock").read_text()
    with open_run(path, text(), resume=True):
        assert f"pid {os.getpid()}" in (path / ".lock").read_text()


def test_a_program_started_from_a_run_does_not_keep_its_lock(tmp_path):
    run = open_run(tmp_path / "a", text(), resume=False)
    child = subprocess.Popen(["sleep", "30"], close_fds=False)
    try:
        run.close()
        open_run(tmp_path / "a", text(), resume=True).close()
    finally:
        child.kill()
        child.wait()


def test_versions_only_grow_also_across_processes(tmp_path):
    path = tmp_path / "weight_version"
    counter = VersionCounter(path)
    assert (counter.last, counter.next(), counter.next(), counter.last) == (0, 1, 2, 2)
    assert VersionCounter(path).next() == 3
    assert VersionCounter(path, floor=10).next() == 11
    assert VersionCounter(path, floor=10).next() == 12
    path.unlink()
    assert VersionCounter(path, floor=12).next() == 13


@pytest.mark.parametrize("content", ["", "x", "-1", "1.5", "³", "\udcff"])
def test_a_damaged_version_mark_is_an_error_that_names_it(tmp_path, content):
    path = tmp_path / "weight_version"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(RunDirError, match="weight_version"):
        VersionCounter(path)


COUNTER = """
    import os, sys
    from pathlib import Path
    from jaxrl.rundir import VersionCounter
    counter = VersionCounter(Path(sys.argv[1]))
    while True:
        os.write(1, f"{counter.next()}\\n".encode())
"""


def test_no_version_is_used_twice_over_twelve_kills(tmp_path):
    rng = random.Random(1)
    used: list[int] = []
    for _ in range(12):
        log = tmp_path / "log"
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-c", textwrap.dedent(COUNTER), str(tmp_path / "weight_version")],
                stdout=output,
                cwd=ROOT,
            )
        deadline = time.monotonic() + 30
        while not log.stat().st_size and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait()
        used += [int(line) for line in log.read_text().split()]
    assert len(used) > 24
    assert used == sorted(set(used))


def test_another_process_knows_whether_it_sees_the_same_directory(tmp_path):
    with open_run(tmp_path / "a", text(), resume=False) as run:
        assert str(os.getpid()) in run.holder
        check_shared(tmp_path / "a", run.holder)
        (tmp_path / "b").mkdir()
        for elsewhere in (tmp_path / "b", tmp_path / "c"):
            with pytest.raises(RunDirError, match="filesystem that all hosts share"):
                check_shared(elsewhere, run.holder)
        start(tmp_path / "d")  # a run of the same process on the same host, but over
        (tmp_path / "d" / ".lock").write_text("pid 1 on elsewhere\n")
        with pytest.raises(RunDirError, match=str(os.getpid())):
            check_shared(tmp_path / "d", run.holder)
