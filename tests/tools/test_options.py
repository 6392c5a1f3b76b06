"""What options of the tools want is asked before any work begins."""

import sys
from pathlib import Path

import pytest

import tools.bench.__main__ as bench
import tools.make_tiny_policy as make_tiny_policy
import tools.plan.__main__ as plan
import tools.sweep as sweep
from tools.options import check_directory, check_file

ROOT = Path(__file__).parents[2]
# The module, what it is called with, and where its work begins.
TOOLS = {
    "bench": (bench, "train --json", "tools.bench.work.bench"),
    "plan": (plan, "--config configs/arithmetic.yaml --json", "tools.plan.plan.make_plan"),
    "sweep": (sweep, "configs/sweeps/presets.yaml --only grpo --out", "tools.sweep.execute"),
    "make_tiny_policy": (make_tiny_policy, "--out", "tools.make_tiny_policy.train_tokenizer"),
}
PATHS = {"--json": ["missing/file.json", "."], "--out": ["file", "file/below"]}


def work(*_args, **_kwargs):
    pytest.fail("the work began")


@pytest.mark.parametrize(
    "tool, path",
    [(tool, path) for tool, (_, line, _) in TOOLS.items() for path in PATHS[line.split()[-1]]],
)
def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    tool, path, tmp_path, capsys, monkeypatch
):
    module, line, begin = TOOLS[tool]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(begin, work)
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(sys, "argv", [tool, *line.split(), str(tmp_path / path)])
    assert module.main() == 2
    (said,) = capsys.readouterr().err.splitlines()
    option = line.split()[-1]
    assert said.startswith(f"tools.{tool}: {option} {tmp_path / path}: cannot be written: ")
    assert said.endswith(f"with {option}")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_what_is_there_already_stays_as_it_is(tmp_path):
    (tmp_path / "old.json").write_text("{}")
    check_file("--json", tmp_path / "old.json")
    check_directory("--out", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["old.json"]
    assert (tmp_path / "old.json").read_text() == "{}"
    check_directory("--out", tmp_path / "new" / "one")
    assert list((tmp_path / "new" / "one").iterdir()) == []


@pytest.mark.parametrize("what", ["delta", "publish", "load", "convert"])
@pytest.mark.parametrize("gigabytes", ["0", "-1", "nan", "inf"])
def test_a_benchmark_measures_no_other_size_than_it_is_told(what, gigabytes, capsys, monkeypatch):
    begin = f"tools.bench.{'parts' if what == 'convert' else what}.bench_{what}"
    monkeypatch.setattr(begin, work)
    monkeypatch.setattr(sys, "argv", ["x", what, f"--gigabytes={gigabytes}"])
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert ended.value.code == 2
    assert f"--gigabytes: {gigabytes} is not above 0" in capsys.readouterr().err


def test_a_size_above_0_is_the_one_that_is_measured(monkeypatch):
    measured = []
    monkeypatch.setattr("tools.bench.delta.bench_delta", measured.append)
    for given in (["--gigabytes=0.25"], []):
        monkeypatch.setattr(sys, "argv", ["x", "delta", *given])
        assert bench.main() == 0
    assert measured == [125_000_000, 250_000_000]  # elements of two bytes; 0.5 GB by default


@pytest.mark.parametrize("steps", ["0", "-1"])
def test_the_tiny_policy_wants_at_least_a_step(steps, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tools.make_tiny_policy.train_tokenizer", work)
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["x", "--out", str(out), "--steps", steps])
    with pytest.raises(SystemExit) as ended:
        make_tiny_policy.main()
    assert ended.value.code == 2
    assert f"--steps: {steps} is not at least 1" in capsys.readouterr().err
    assert not out.exists()
