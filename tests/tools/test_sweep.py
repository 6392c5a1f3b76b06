"""A sweep runs what it should, once, also when it is killed; its table is what the runs wrote."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from jaxrl.objectives.choices import PRESETS
from tools import sweep

ROOT = Path(__file__).parents[2]
NEEDS_A_TEACHER = {"distill"}
STEPS = 30
COMMON = {  # a second, through every part
    "run.steps": STEPS,
    "rollout.prompts_per_step": 8,
    "rollout.group_size": 4,
    "data.held_out": 16,
    "optimizer.warmup_steps": 2,
    "eval.every_steps": 3,
    "log.samples_per_step": 2,
}
FILE = {
    "config": "configs/arithmetic_inprocess.yaml",
    "set": COMMON,
    "seeds": [0],
    "target": 0.3,
    "runs": {
        "rloo": {"algorithm.preset": "rloo", "log.samples_per_step": 0},
        "lost": {"model.path": "no|where"},
    },
}


def command(file: Path, out: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "tools.sweep", str(file), "--out", str(out), *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}


def command_lines() -> Iterator[str]:
    """Of all processes."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # gone meanwhile
            yield file.read_text(errors="replace")


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def table(text: str) -> dict[str, list[str]]:
    """Cells of each row, by its first."""
    rows = [
        [cell.strip() for cell in line.replace("\\|", "!").strip("|").split("|")]
        for line in text.splitlines()
    ]
    return {name: cells for name, *cells in rows}


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    """A sweep that is ended in the middle of a run, and started again; its DIR."""
    folder = tmp_path_factory.mktemp("sweep")
    file, out = folder / "file.yaml", folder / "out"
    file.write_text(yaml.safe_dump(FILE, sort_keys=False))
    run = out / "rloo-seed0"
    with subprocess.Popen(command(file, out), cwd=ROOT, env=environment()) as process:
        deadline = time.monotonic() + 240
        while not (run / "metrics.jsonl").exists() or len(metrics(run)) < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        process.wait(240)
    assert process.returncode == 128 + signal.SIGTERM
    assert 2 <= metrics(run)[-1]["step"] < STEPS
    again = subprocess.run(
        command(file, out), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=400
    )
    return again, out


def test_a_run_that_was_cut_short_goes_on(swept):
    again, out = swept
    run = out / "rloo-seed0"
    assert "resumed after step" in (out / "rloo-seed0.log").read_text(), again.stderr
    assert [line["step"] for line in metrics(run)] == list(range(STEPS + 1))
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["run"] == {"name": run.name, "dir": str(out), "steps": STEPS, "seed": 0}
    assert saved["algorithm"]["preset"] == "rloo" and saved["log"]["samples_per_step"] == 0


def test_a_run_that_fails_is_a_row_that_says_why(swept):
    again, out = swept
    assert again.returncode == 1
    text = (out / "table.md").read_text()
    assert text in again.stdout
    rows = table(text)
    assert rows["lost"][0].startswith("failed, seed 0: model.path = no!where")
    assert rows["rloo"][0] == f"{100 * metrics(out / 'rloo-seed0')[-1]['eval/accuracy']:.1f}%"


def test_the_table_is_what_finished_runs_wrote_and_none_is_run_again(swept, tmp_path, capsys):
    """Beside the real run another seed, a copy of it with other numbers."""
    out = tmp_path / "out"
    one, other = out / "rloo-seed0", out / "rloo-seed1"
    shutil.copytree(swept[1] / one.name, one)
    shutil.copytree(one, other)
    config = yaml.safe_load((one / "config.yaml").read_text())
    config["run"] |= {"name": other.name, "seed": 1}
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    real = metrics(one)
    made_up = [dict(line) for line in real]
    for line in made_up[1:]:
        line |= {"lag/max": line["step"] % 5, "lag/mean": line["step"] % 5 / 2}
    for line in made_up[::3]:
        line["eval/accuracy"] /= 2
    made_up[-1]["reward/mean"] = 0.875
    (other / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in made_up))
    target = max(line["eval/accuracy"] for line in real[::3])  # the other never gets there
    file = tmp_path / "file.yaml"
    file.write_text(yaml.safe_dump({**FILE, "seeds": [0, 1], "target": target}))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}

    assert sweep.main([str(file), "--out", str(out), "--only", "rloo"]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert {path.name for path in out.iterdir()} == {
        *(one.name, other.name),
        *("table.md", "table.json"),
    }
    accuracies = [100 * lines[-1]["eval/accuracy"] for lines in (real, made_up)]
    reached = min(line["step"] for line in real[::3] if line["eval/accuracy"] == target)
    seconds = sum(x["time/step_s"] for x in real[1:])
    text = (out / "table.md").read_text()
    assert text in capsys.readouterr().out
    assert table(text).keys() == {"run", "---", "rloo"}
    assert table(text)["run"][1] == f"steps to {100 * target:.4g} %"
    assert table(text)["rloo"] == [
        f"{sum(accuracies) / 2:.1f}% ({accuracies[1]:.1f}% to {accuracies[0]:.1f}%)",
        f"{reached}, 1 of 2 never",
        f"{(real[-1]['reward/mean'] + 0.875) / 2:.3f}",
        "0.50 / 4",  # 0 of the real one; the mean of 1, 2, 3, 4, 0, ... halves
        f"{seconds:.0f}",
    ]
    record = json.loads((out / "table.json").read_text())["runs"]["rloo"]
    assert record["overrides"] == FILE["runs"]["rloo"]
    assert [of_seed["steps_to_target"] for of_seed in record["seeds"]] == [reached, None]
    assert [of_seed["accuracy"] for of_seed in record["seeds"]] == [
        lines[-1]["eval/accuracy"] for lines in (real, made_up)
    ]


def test_a_run_that_is_late_is_ended_and_says_so(tmp_path, capsys):
    file, out = tmp_path / "file.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump({**FILE, "deadline_s": 0.1}))
    assert sweep.main([str(file), "--out", str(out), "--only", "rloo"]) == 1
    assert "deadline_s = 0.1" in table((out / "table.md").read_text())["rloo"][0]
    assert not [line for line in command_lines() if f"--run.dir={out}" in line]


def test_another_configuration_in_the_same_directory_is_refused(swept, tmp_path, capsys):
    _, out = swept
    for key, value in {"optimizer.learning_rate": 1e-3, "eval.every_steps": 5}.items():
        file = tmp_path / "file.yaml"
        file.write_text(yaml.safe_dump({**FILE, "set": {**COMMON, key: value}}))
        assert sweep.main([str(file), "--out", str(out), "--only", "rloo"]) == 2
        message = capsys.readouterr().err
        assert key in message and "--out" in message


BROKEN = {
    "no file": (None, "no such file"),
    "yaml": ("config: [\n", "line 2"),
    "unknown key": ({"runz": {}}, "runz"),
    "no runs": ({"runs": {}}, "runs"),
    "seed": ({"seeds": [-1]}, "run.seed = -1"),
    "target": ({"target": 90}, "target"),
    "base": ({"config": "nowhere.yaml"}, "nowhere.yaml: there is no such file"),
    "typo": ({"runs": {"a": {}, "b": {"algorithm.preset": "gppo"}}}, "runs b: "),
    "own key": ({"runs": {"a": {"run.seed": 3}}}, "runs.a: run.seed"),
    "number": ({"set": {"optimizer.learning_rate": "1e-4x"}}, "'1e-4x': expected number"),
    "day": (  # written out, since YAML's own writer would quote it
        yaml.safe_dump(FILE).replace("seeds:\n- 0", "seeds: [2026-13-45]"),
        "seeds.0: Input should be a valid integer",
    ),
    "section": ({"set": {"rollout": {"mode": "overlap"}}}, "set: rollout"),
    "contradiction": ({"runs": {"a": {"rollout.mode": "overlap"}}}, "rollout.engine = inprocess"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_mistake_is_named_before_anything_starts(case, tmp_path, capsys):
    given, expected = BROKEN[case]
    file, out = tmp_path / "file.yaml", tmp_path / "out"
    if given is not None:
        text = given if isinstance(given, str) else yaml.safe_dump({**FILE, **given})
        file.write_text(text)
    assert sweep.main([str(file), "--out", str(out)]) == 2
    captured = capsys.readouterr()
    assert expected in captured.err and "file.yaml" in captured.err
    assert captured.out == "" and not out.exists()


def test_only_names_runs_of_the_file(tmp_path, capsys):
    file = tmp_path / "file.yaml"
    file.write_text(yaml.safe_dump(FILE))
    assert sweep.main([str(file), "--only", "plan"]) == 2
    assert "plan" in capsys.readouterr().err


@pytest.mark.parametrize("file", sorted((ROOT / "configs/sweeps").iterdir()), ids=lambda f: f.name)
def test_shipped_sweeps_are_sound(file, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = sweep.read(file)
    runs = sweep.plan(file, found, tmp_path, None)
    assert len(runs) == len(found.runs) * len(found.seeds)
    if file.name == "presets.yaml":
        presets = {run.config.algorithm.preset for run in runs}
        assert presets == {None, *PRESETS} - NEEDS_A_TEACHER
