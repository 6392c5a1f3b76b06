"""A run whose engines are killed and stopped at random, with real Ray and real vLLM. Takes long:

    FAULTS=100 python -m pytest -m slow tests/test_run_faults.py -s

FAULTS (20 unless it is set) processes of the engines get SIGKILL or SIGSTOP, one after the other.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(4 * 3600)]

ROOT = Path(__file__).parent.parent
FAULTS = int(os.environ.get("FAULTS", "20"))
STEP_DEADLINE_S, PROMPTS, GROUP, MAX_LAG = 300, 16, 8, 2
SILENCE_S = 5


def marked(marker: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("JAXRL_TEST_RUN") == marker and process.cmdline():
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def engine_processes(marker: str) -> list[psutil.Process]:
    """The actors, and vLLM's own processes behind them."""
    found = []
    for process in marked(marker):
        try:
            title = " ".join(process.cmdline()) + process.name()
        except psutil.Error:
            continue
        if "ray::VllmEngine" in title or "EngineCore" in title:
            found.append(process)
    return found


def metrics_of(run: Path) -> list[dict]:
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture(scope="module")
def survived(tmp_path_factory):
    """(the run's directory, its exit code, its output, the faults, who was left)."""
    folder = tmp_path_factory.mktemp("faults")
    marker, log = str(folder), folder / "output.txt"
    options = {
        "run.name": "faults",
        "run.dir": str(folder),
        "run.steps": "1000000",
        "rollout.mode": "continuous",
        "rollout.max_lag": str(MAX_LAG),
        "rollout.prompts_per_step": str(PROMPTS),
        "rollout.group_size": str(GROUP),
        "vllm.engines": "2",
        "vllm.silence_s": str(SILENCE_S),
        "vllm.max_restarts": str(4 * FAULTS),
        "vllm.start_timeout_s": "300",
        "vllm.max_num_seqs": "32",
        "eval.every_steps": "0",
        "log.tensorboard": "false",
        "checkpoint.every_steps": "50",
    }
    arguments = [word for key, value in options.items() for word in (f"--{key}", value)]
    with log.open("w") as output:
        run = subprocess.Popen(
            [
                *(sys.executable, "-m", "jaxrl.train", "--config", "configs/arithmetic.yaml"),
                *arguments,
            ],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, "XLA_FLAGS": "", "JAXRL_TEST_RUN": marker},
            start_new_session=True,
        )
    faults: list[tuple[float, str, str]] = []
    directory, chance = folder / "faults", random.Random(0)
    try:
        steps, hit, since = 0, 0, time.monotonic()
        while len(faults) < FAULTS:
            assert run.poll() is None, f"the run ended after {len(faults)} faults: {tail(log)}"
            done = len(metrics_of(directory))
            if done > steps:
                steps, since = done, time.monotonic()
            stuck = time.monotonic() - since
            assert stuck < STEP_DEADLINE_S, f"no step in {stuck:.0f} s: {tail(log)}"
            victims = engine_processes(marker)
            # Most faults meet a run that goes on again, some one that has not yet.
            if victims and steps > 2 and (steps > hit or chance.random() < 0.05):
                victim = chance.choice(victims)
                deed = chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP])
                hit = steps
                try:
                    faults.append((time.monotonic(), victim.name(), deed.name))
                    victim.send_signal(deed)
                except psutil.Error:
                    faults.pop()
            time.sleep(chance.uniform(0.5, 5.0))
        # And it goes on: some more steps with nothing done to it.
        goal, until = len(metrics_of(directory)) + 10, time.monotonic() + STEP_DEADLINE_S
        while len(metrics_of(directory)) < goal:
            assert run.poll() is None and time.monotonic() < until, tail(log)
            time.sleep(0.5)
        run.send_signal(signal.SIGTERM)
        code = run.wait(timeout=120)
        end = time.monotonic() + 20
        while marked(marker) and time.monotonic() < end:
            time.sleep(0.2)
        left = [" ".join(process.cmdline()) for process in marked(marker)]
    finally:
        for process in [*marked(marker)]:
            process.kill()
    print(f"\n{Counter(what for _, _, what in faults)} in {len(metrics_of(directory))} steps")
    print(Counter(name for _, name, _ in faults))
    return directory, code, tail(log), faults, left


def tail(log: Path) -> str:
    return "\n".join(log.read_text().splitlines()[-40:])


def test_the_run_outlives_every_engine(survived):
    directory, code, output, faults, left = survived
    assert code == 128 + signal.SIGTERM, output
    assert len(faults) == FAULTS
    last = metrics_of(directory)[-1]
    assert last["fleet/replaced"] >= FAULTS / 3  # several faults may meet the same engine
    assert not left


def test_no_sample_is_lost_or_trained_twice(survived):
    directory, *_ = survived
    asked: dict[str, int] = {}
    trained: Counter = Counter()
    dropped: Counter = Counter()
    for text in (directory / "ledger.jsonl").read_text().splitlines():
        line = json.loads(text)
        match line["what"]:
            case "dispatched":
                assert not asked.keys() & line["samples"].keys()
                asked |= line["samples"]
            case "trained":
                trained.update(line["samples"])
            case "dropped":
                dropped.update(line["samples"])
    settled = trained + dropped
    assert all(settled[prompt] == GROUP for prompt in trained | dropped)
    order = [int(prompt) for prompt in asked]
    # None is passed over but those that are held out, some 5 % of all.
    assert order == sorted(order) and len(order) > 0.9 * (order[-1] + 1)
    assert not dropped
    open_ = asked.keys() - settled.keys()
    assert len(open_) <= (MAX_LAG + 1) * PROMPTS
    steps = metrics_of(directory)
    assert sum(trained.values()) == PROMPTS * GROUP * max(step["step"] for step in steps)


def test_nothing_stale_or_unproven_is_trained(survived):
    directory, *_ = survived
    steps = [line for line in metrics_of(directory) if line["step"] > 0]
    assert max(line["lag/max"] for line in steps) <= MAX_LAG
    # Every sampled token, against the trainer's own log-prob of it under weights at most so old.
    assert max(line["publish/probe_max_abs_dlogp"] for line in steps) <= 1e-4
