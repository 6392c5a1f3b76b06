"""One line for each step, valid JSON whatever the numbers, and text that a reader understands."""

import io
import json
import math
import os
import resource
import struct
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import report
from jaxrl.metrics import LogError, RunLog
from jaxrl.types import Group, Prompt, Rollout

ROOT = Path(__file__).parents[1]


def strict(line: str) -> dict:
    """RFC 8259: Python would also accept NaN and Infinity."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(line, parse_constant=refuse)


def lines(run_dir: Path) -> list[dict]:
    content = (run_dir / "metrics.jsonl").read_text()
    assert content == "" or content.endswith("\n")
    return [strict(line) for line in content.split("\n")[:-1]]


def log(run_dir: Path, resume_step: int = -1, **options) -> RunLog:
    defaults = {"steps_total": 30, "tensorboard": False, "console": io.StringIO()}
    return RunLog(run_dir, resume_step=resume_step, **(defaults | options))


def test_each_step_is_one_line_with_step_and_time(tmp_path):
    with log(tmp_path) as run:
        run.step(0, {"eval/accuracy": 0.25})
        run.step(1, {"loss": jnp.float32(0.5), "reward/mean": np.float64(0.1), "tokens": 2**40})
        records = lines(tmp_path)  # flushed, the file is still open
    assert [r["step"] for r in records] == [0, 1]
    assert all(1.7e9 < r["time"] < 1e10 for r in records)
    assert records[1]["loss"] == 0.5 and records[1]["reward/mean"] == 0.1
    assert records[1]["tokens"] == 2**40
    assert list(records[1])[:2] == ["step", "time"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, jnp.float32("nan")])
def test_numbers_that_json_lacks_become_null(tmp_path, value):
    with log(tmp_path) as run:
        run.step(1, {"loss": value, "reward/mean": value, "eval/accuracy": value})
    (record,) = lines(tmp_path)
    assert (record["loss"], record["reward/mean"], record["eval/accuracy"]) == (None, None, None)


def test_a_step_cannot_be_logged_twice(tmp_path):
    with log(tmp_path) as run:
        run.step(2, {})
        for step in (2, 1):
            with pytest.raises(ValueError, match=f"step {step} after step 2"):
                run.step(step, {})
    with log(tmp_path, resume_step=2) as run, pytest.raises(ValueError, match="step 2 after"):
        run.step(2, {})
    assert [r["step"] for r in lines(tmp_path)] == [2]


@pytest.mark.parametrize("torn", ["", '{"step": 6, "ti', '{"step": 3, "ti', "\x00\x00\x00", "5"])
def test_resuming_drops_later_steps_and_a_torn_line(tmp_path, torn):
    with log(tmp_path) as run:
        for step in range(1, 6):
            run.step(step, {"reward/mean": step / 10})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    with log(tmp_path, resume_step=3) as run:
        assert [r["step"] for r in lines(tmp_path)] == [1, 2, 3]
        run.step(4, {"reward/mean": 0.9})
        assert run.history.first["reward/mean"] == 0.1
    assert [(r["step"], r["reward/mean"]) for r in lines(tmp_path)] == [
        (1, 0.1),
        (2, 0.2),
        (3, 0.3),
        (4, 0.9),
    ]


def test_resuming_from_nothing_drops_everything(tmp_path):
    with log(tmp_path) as run:
        run.step(0, {"eval/accuracy": 0.5})
        run.step(1, {})
    with log(tmp_path, resume_step=-1) as run:
        assert lines(tmp_path) == []
        run.step(0, {})


def test_resuming_drops_samples_of_later_steps(tmp_path):
    (tmp_path / "samples").mkdir()
    for name in ("step_00000003.jsonl", "step_00000004.jsonl", "step_mine.jsonl"):
        (tmp_path / "samples" / name).write_text("{}\n")
    log(tmp_path, resume_step=3).close()
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == [
        "step_00000003.jsonl",
        "step_mine.jsonl",
    ]


def test_the_console_line_is_aligned_with_its_header_which_returns_every_20_lines(tmp_path):
    console = io.StringIO()
    told = []
    with log(tmp_path, console=console, steps_total=1000, tell=told.append) as run:
        for step in range(1, 46):
            run.step(
                step,
                {"reward/mean": 0.5, "time/publish_s": 1.25, "time/update_s": 12.0}
                | ({"eval/accuracy": 0.375} if step == 2 else {}),
            )
    printed = console.getvalue().splitlines()
    headers = [i for i, line in enumerate(printed) if "reward" in line]
    assert headers == [0, 21, 42]
    assert len(printed) == 45 + 3
    assert len(told) == 45 and told[1]["eval/accuracy"] == 0.375
    assert len({len(line) for line in printed}) == 1
    assert "\x1b" not in console.getvalue()

    def cell(line: str, column: str) -> str:
        """What stands in the columns of the header's words."""
        end = printed[0].index(column) + len(column)
        return line[:end].split()[-1]

    assert cell(printed[1], "accuracy") == "-"
    assert cell(printed[10], "accuracy") == "37.5%"  # of the last evaluation
    assert "10/1000" in printed[10]
    assert cell(printed[10], "reward") == "0.500"
    assert cell(printed[10], "sync s") == "1.25"
    assert cell(printed[10], "update s") == "12.00"
    assert cell(printed[10], "rollout tok/s") == "-"


def test_redirected_output_shows_at_once(tmp_path):
    """A child that does not end: what it printed must be in the pipe all the same."""
    code = (
        "import sys, time; from pathlib import Path; from jaxrl.metrics import RunLog\n"
        "log = RunLog(Path(sys.argv[1]), steps_total=3, resume_step=-1, tensorboard=False)\n"
        "log.step(1, {'reward/mean': 0.5}); time.sleep(30)"
    )
    start = time.monotonic()
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
    )
    try:
        assert "reward" in child.stdout.readline()
        assert "1/3" in child.stdout.readline()
        assert time.monotonic() - start < 20, "its output came only when it ended"
    finally:
        child.kill()
        child.wait()


def test_time_left_comes_from_the_median_step():
    assert report.seconds_left([], 10) is None
    assert report.seconds_left([10.0, 10.0, 500.0], 6) == 60.0
    assert report.seconds_left([500.0], 6) is None  # the first step compiles
    assert report.seconds_left([500.0, 10.0], 6) == 60.0
    assert report.seconds_left([10.0, 10.0], -1) == 0.0


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0s"),
        (0.6, "1s"),
        (59.4, "59s"),
        (59.6, "1m 00s"),
        (200, "3m 20s"),
        (3599.7, "1h 00m"),
        (3720, "1h 02m"),
        (2 * 86400 + 3 * 3600 + 59, "2d 03h"),
    ],
)
def test_durations_read_like_a_clock(seconds, text):
    assert report.format_duration(seconds) == text


def group(prompt_id: int, versions: list[list[int]]) -> Group:
    rollouts = tuple(
        Rollout(
            tokens=np.arange(len(v), dtype=np.int32),
            logprobs=np.zeros(len(v), np.float32),
            versions=np.array(v, np.int64),
            finish_reason="stop" if len(v) < 3 else "length",
            seed=1,
        )
        for v in versions
    )
    return Group(Prompt(prompt_id, f"what is {prompt_id}?", (1, 2), {}), rollouts)


def test_samples_tell_text_reward_versions_and_why_it_ended(tmp_path):
    groups = [group(7, [[3, 3, 4, 3], [5]]), group(8, [[], [6, 6]]), group(9, [[6]])]
    rewards = np.array([[1.0, np.nan], [0.0, 0.5], [0.25, np.nan]], np.float32)
    texts = [["a\u2028\n'\"", "ü"], ["", "\ud800 torn"], ["of two, one is left"]]
    with log(tmp_path) as run:
        run.samples(12, groups, rewards, texts)
    content = (tmp_path / "samples" / "step_00000012.jsonl").read_text(encoding="utf-8")
    records = [strict(line) for line in content.split("\n")[:-1]]
    assert "ü" in content  # readable, not escaped
    assert records[:2] == [
        {
            "step": 12,
            "prompt_id": 7,
            "prompt": "what is 7?",
            "completions": [
                {
                    "text": "a\u2028\n'\"",
                    "reward": 1.0,
                    "tokens": 4,
                    "versions": [[3, 2], [4, 1], [3, 1]],
                    "finish_reason": "length",
                },
                {
                    "text": "ü",
                    "reward": None,
                    "tokens": 1,
                    "versions": [[5, 1]],
                    "finish_reason": "stop",
                },
            ],
        },
        {
            "step": 12,
            "prompt_id": 8,
            "prompt": "what is 8?",
            "completions": [
                {
                    "text": "",
                    "reward": 0.0,
                    "tokens": 0,
                    "versions": [],
                    "finish_reason": "stop",
                },
                {
                    "text": "\ud800 torn",
                    "reward": 0.5,
                    "tokens": 2,
                    "versions": [[6, 2]],
                    "finish_reason": "stop",
                },
            ],
        },
    ]
    assert [(c["text"], c["reward"]) for c in records[2]["completions"]] == [(texts[2][0], 0.25)]


def test_the_closing_lines_say_what_was_reached_where_it_lies_and_how_to_go_on(tmp_path):
    console = io.StringIO()
    with log(tmp_path, console=console) as run:
        run.step(0, {"eval/accuracy": 0.25})
        run.step(1, {"reward/mean": 0.1})
        run.step(2, {"reward/mean": 0.75, "eval/accuracy": 0.5})
        run.closing(
            report.Summary(
                ended="stopped by SIGTERM",
                outputs={"checkpoint": Path("runs/a/checkpoints/step_00000002")},
                command="python -m jaxrl.train --config a.yaml --resume",
            )
        )
    end = console.getvalue().split("\n\n")[-1].splitlines()
    assert end == [
        "stopped by SIGTERM: 2 of 30 steps",
        "  reward: 0.100 -> 0.750",
        "  held-out accuracy: 25.0% -> 50.0%",
        "  checkpoint: runs/a/checkpoints/step_00000002",
        "  to go on: python -m jaxrl.train --config a.yaml --resume",
    ]


def test_a_log_that_cannot_be_written_is_an_error_that_names_it(tmp_path):
    with pytest.raises(LogError, match=r"metrics\.jsonl: cannot be written: .*--resume"):
        log(tmp_path / "nowhere")
    run = log(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(LogError, match=r"metrics\.jsonl: cannot be written: .*File too large"):
            for step in range(100):
                run.step(step, {f"group/{i}": 0.5 for i in range(5000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    # The line that did not fit is torn; resuming removes it.
    assert not (tmp_path / "metrics.jsonl").read_text().endswith("\n")
    with log(tmp_path, resume_step=step - 1) as resumed:
        assert [r["step"] for r in lines(tmp_path)] == list(range(step))
        resumed.step(step, {})


def events(folder: Path) -> list[tuple[int, str, float]]:
    """(step, tag, value) of every scalar, read from the TFRecord framing by hand."""
    from tensorboardX.proto import event_pb2

    found = []
    for file in sorted(folder.glob("events.*")):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            if event.HasField("session_log"):
                found.append((event.step, "(start)", 0.0))
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
    return found


def test_tensorboard_has_the_finite_numbers_and_hides_a_killed_part(tmp_path):
    with log(tmp_path, tensorboard=True) as run:
        run.step(1, {"loss": 0.5, "bad": math.nan})
        run.step(2, {"loss": 0.25})
    with log(tmp_path, tensorboard=True, resume_step=1) as run:
        run.step(2, {"loss": 0.75})
    assert events(tmp_path / "tensorboard") == [
        (0, "(start)", 0.0),
        (1, "loss", 0.5),
        (2, "loss", 0.25),
        (2, "(start)", 0.0),
        (2, "loss", 0.75),
    ]


def test_tensorboard_does_not_load_torch(tmp_path):
    code = (
        "import sys; from pathlib import Path; from jaxrl.metrics import RunLog\n"
        "log = RunLog(Path(sys.argv[1]), steps_total=3, resume_step=-1, tensorboard=True)\n"
        "log.step(1, {'loss': 0.5}); log.close()\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=ROOT)
    assert (1, "loss", 0.5) in events(tmp_path / "tensorboard")
