"""The demo as `make demo` runs it, cut short: real Ray, real vLLM, real weights on the bridge."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxrl.report import COLUMNS
from tests.test_hosts import started

ROOT = Path(__file__).parent.parent
STEPS = 20


def survivors(marker: str) -> list[str]:
    """Processes that carry `marker` in their environment."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                environment = (process / "environ").read_bytes()
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if marker.encode() in environment and command:
                found.append(f"{process.name} {command}")
    return found


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    marker = f"JAXRL_TEST_RUN={folder}"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "jaxrl.train", "--config", "configs/arithmetic.yaml"),
            *("--run.dir", str(folder), "--run.steps", str(STEPS), "--eval.every_steps", "10"),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": "", "JAXRL_TEST_RUN": str(folder)},
        timeout=500,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    lines = (folder / "arithmetic" / "metrics.jsonl").read_text().splitlines()
    return done, folder / "arithmetic", [json.loads(line) for line in lines], marker


def test_twenty_steps_of_the_demo_improve_reward_and_accuracy(demo):
    _, _, lines, _ = demo
    rewards = [line["reward/mean"] for line in lines[1:]]
    assert len(rewards) == STEPS
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.05
    assert lines[0]["eval/accuracy"] <= 0.5
    assert lines[-1]["eval/accuracy"] > lines[0]["eval/accuracy"]


def test_what_vllm_served_is_what_the_trainer_trained(demo):
    _, run, lines, _ = demo
    exported = sum(t.nbytes for t in load_file(run / "export" / "model.safetensors").values())
    for line in lines[1:]:
        assert line["publish/engines"] == 1
        assert line["publish/bytes"] == exported
        assert line["publish/probe_max_abs_dlogp"] <= 1e-4
        assert line["mismatch/mean_abs_dlogp"] <= 1e-4  # every sampled token, against its update
        assert line["lag/max"] == 0
    versions = [line["weights/version"] for line in lines]
    assert versions == list(range(versions[0], versions[0] + STEPS + 1))
    for step, before in zip(range(1, STEPS + 1), versions, strict=False):
        for text in (run / "samples" / f"step_{step:08d}.jsonl").read_text().splitlines():
            for completion in json.loads(text)["completions"]:
                assert completion["versions"] == [[before, completion["tokens"]]]


def test_a_person_sees_progress_and_where_everything_is(demo):
    done, run, lines, _ = demo
    for column in ("step", *COLUMNS, "time left"):
        assert column in done.stdout
    for metric, _ in COLUMNS.values():
        assert lines[-1].get(metric) is not None, metric
    assert re.search(rf"{STEPS}/{STEPS} +0\.\d{{3}} +\d+\.\d%", done.stdout)
    assert "held-out accuracy" in done.stdout
    assert str(run / "export") in done.stdout and "--resume" in done.stdout
    assert "Traceback" not in done.stderr


def test_no_process_outlives_the_run(demo):
    *_, marker = demo
    assert survivors(marker) == []


def test_one_signal_ends_a_run_whose_engines_do_not_start(tmp_path):
    """The server answers nothing, which the run waits for."""
    silent = socket.create_server(("127.0.0.1", 0))
    arguments = [
        *("--run.dir", str(tmp_path), "--publish.channel", "shuttle", "--vllm.engines", "0"),
        *("--vllm.servers", f"[http://127.0.0.1:{silent.getsockname()[1]}]"),
    ]
    command = ("jaxrl.train", "--config", "configs/arithmetic.yaml")
    environment = {"XLA_FLAGS": "", "JAXRL_TEST_RUN": str(tmp_path)}
    with silent, started(arguments, command, **environment) as process:
        deadline = time.monotonic() + 300
        while not (tmp_path / "arithmetic" / "ledger.jsonl").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(2)
        process.send_signal(signal.SIGTERM)
        shown = process.communicate(timeout=100)[1]
    assert process.returncode == 128 + signal.SIGTERM, shown
    assert "ended at once; no checkpoint was written yet" in shown and "Traceback" not in shown
    assert not survivors(f"JAXRL_TEST_RUN={tmp_path}")
