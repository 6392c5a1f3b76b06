"""Supervised fine-tuning: what is learned, and whole runs started as a user starts them."""

import contextlib
import copy
import io
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from jaxrl import sft
from jaxrl.config import MeshSection, SftConfig
from jaxrl.mesh import batch_sharding, make_mesh, param_shardings
from jaxrl.models.config import load_config
from jaxrl.models.decoder import Policy
from jaxrl.models.params import param_specs
from jaxrl.objectives.objective import make_objective
from jaxrl.sft import pack_examples
from jaxrl.types import Example
from jaxrl.update import make_gradient, make_nll
from tests.reference_policy import VOCAB, make_reference, params_of, save_reference

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "configs" / "tiny_policy"
LENGTHS = [(5, 3), (9, 1), (2, 11), (30, 2), (4, 4)]  # of prompts and completions, in tokens
LAYOUTS = {  # sections of the configuration
    "packed": {},
    "microbatches": {"update": {"max_tokens_per_microbatch": 32}},
    "mesh": {"mesh": {"data": 2, "tensor": 2}, "update": {"max_tokens_per_microbatch": 64}},
}


def make_config(**sections) -> SftConfig:
    own = {"data": {"source": "jsonl", "path": "x", "max_prompt_tokens": 16}}
    required = {"run": {"name": "x", "steps": 20}, "model": {"path": "x"}}
    return SftConfig.model_validate(required | own | sections)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Examples, the directory of a model, the mean negative log-likelihood and its gradient, of
    float64 torch with one example a row."""
    rng, model = np.random.default_rng(0), make_reference()

    def draw(count: int) -> tuple[int, ...]:
        return tuple(rng.integers(1, VOCAB, count).tolist())

    examples = [Example(i, "", draw(p), {}, draw(c)) for i, (p, c) in enumerate(LENGTHS)]
    exact = copy.deepcopy(model).double()
    total = sum(nll_of(exact, example.tokens, example.completion) for example in examples)
    loss = total / sum(len(example.completion) for example in examples)
    loss.backward()
    gradient = copy.deepcopy(model).double()
    gradient.load_state_dict({name: weight.grad for name, weight in exact.named_parameters()})
    folder = save_reference(model, tmp_path_factory.mktemp("model"))
    return examples, folder, model, loss.item(), params_of(gradient)


def nll_of(model, prompt, completion):
    logits_TV = model(torch.tensor([[*prompt, *completion]])).logits[0]
    logs_CV = torch.log_softmax(logits_TV[len(prompt) - 1 : -1], -1)
    return -logs_CV[range(len(completion)), list(completion)].sum()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradient_are_those_of_each_completion_alone(case, layout):
    examples, folder, model, expected, expected_gradient = case
    c = make_config(**LAYOUTS[layout])
    mesh, config = make_mesh(c.mesh), load_config(folder)
    shardings = param_shardings(param_specs(config), mesh)
    params = jax.tree.map(jax.device_put, params_of(model), shardings)
    policy = Policy(config, np.dtype("float32"), mesh=mesh)
    batch = pack_examples(examples, c, key_cost=0.0)
    assert batch.tokens_BT.shape[0] < len(examples) or c.mesh != MeshSection()

    on_mesh = jax.tree.map(lambda x: jax.device_put(x, batch_sharding(mesh, x.ndim)), batch)
    objective = make_objective(c.sft)
    gradient = jax.jit(make_gradient(policy, objective, c.update, 1.0, mesh))
    found, scores = gradient(params, {}, on_mesh)
    loss, metrics = objective(jax.tree.map(np.asarray, scores), batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert metrics == {}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
        found,
        expected_gradient,
    )
    tokens = sum(completion for _, completion in LENGTHS)
    assert batch.loss_mask_BC.sum() == tokens
    nll = make_nll(policy, c.update, mesh)
    np.testing.assert_allclose(nll(params, batch) / tokens, expected, rtol=1e-5)


def test_what_is_not_trained_on_reaches_neither_loss_nor_gradient():
    batch = pack_examples([Example(0, "", (1, 2), {}, (3, 4))], make_config(), 0.0)
    logprobs_BC = np.full(batch.targets_BC.shape, -np.inf, np.float32)
    logprobs_BC[0, :2] = -1.5, -0.5
    objective = make_objective(make_config().sft)
    (loss, _), gradient_BC = jax.value_and_grad(
        lambda logprobs_BC: objective((logprobs_BC, logprobs_BC), batch), has_aux=True
    )(logprobs_BC)
    assert loss == 1.0
    expected_BC = np.zeros_like(logprobs_BC)
    expected_BC[0, :2] = -0.5
    np.testing.assert_array_equal(gradient_BC, expected_BC)


# --- whole runs ---

HELD_OUT, ROWS = 12, 40


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Sums as the tiny policy knows them, right, under either key; every seventh is too long."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rng = np.random.default_rng(0)
    rows = []
    for i in range(HELD_OUT + ROWS):
        a, b, c = rng.integers(1, 10, 3).tolist()
        key = "answer" if i % 2 else "completion"
        text = str(a + b + c) if i < HELD_OUT or i % 7 else "1 2 3 4 5 6 7 8 9"
        rows.append({"prompt": f"{a} + {b} + {c}", key: text})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(data: Path, folder: Path, *arguments: str) -> list[str]:
    question = "State the final answer to the following arithmetic problem: {prompt} ="
    return [
        *("--config", str(ROOT / "configs" / "arithmetic_sft.yaml"), f"--run.dir={folder}"),
        *("--run.name=run", "--data.source=jsonl", f"--data.path={data}", "--data.task=null"),
        *("--data.prompt_template", question, f"--data.held_out={HELD_OUT}"),
        *("--sft.sequences_per_step=16", "--optimizer.warmup_steps=1", "--eval.every_steps=2"),
        *("--checkpoint.every_steps=2", "--sft.export_dtype=float32"),
        *("--log.samples_per_step=16", *arguments),
    ]


def tune(*arguments) -> str:
    """A whole run; what it printed."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.chdir(ROOT):
        code = sft.main(command(*arguments))
    assert code == 0, shown.getvalue()
    return shown.getvalue()


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def mean_nll(model, texts: list[tuple[str, str]]) -> float:
    """In nats per token, of completions behind their prompts."""
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    total, count = 0.0, 0
    for texts_of_one in texts:
        prompt, completion = (tokenizer.encode(text).ids for text in texts_of_one)
        with torch.no_grad():
            total += nll_of(model, prompt, completion).item()
        count += len(completion)
    return total / count


def held_out_nll(model, data: Path) -> float:
    rows = [json.loads(line) for line in data.read_text().splitlines()[:HELD_OUT]]
    question = "State the final answer to the following arithmetic problem: "
    return mean_nll(
        model,
        [
            (
                f"{question}{row['prompt']} =",
                f" {row.get('completion', row.get('answer'))}<|endoftext|>",
            )
            for row in rows
        ],
    )


def samples_of(run: Path, step: int) -> list[tuple[str, str]]:
    lines = (run / "samples" / f"step_{step:08d}.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    return [(sample["prompt"], sample["completions"][0]["text"]) for sample in samples]


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    return tune(data, folder, "--run.steps=6"), folder / "run"


def test_a_run_learns_and_exports_what_it_measured(data, finished):
    shown, run = finished
    lines = metrics(run)
    assert [line["step"] for line in lines] == list(range(7))
    evaluated = {line["step"]: line["eval/nll"] for line in lines if "eval/nll" in line}
    assert list(evaluated) == [0, 2, 4, 6]
    for step, path in ((0, MODEL), (6, run / "export")):
        model = AutoModelForCausalLM.from_pretrained(path).float().eval()
        np.testing.assert_allclose(evaluated[step], held_out_nll(model, data), rtol=1e-4)
    assert lines[-1]["loss"] < lines[1]["loss"] and evaluated[6] < 0.7 * evaluated[0]
    assert lines[-1]["data/skipped_too_long"] > 0 and 2 < lines[-1]["data/epochs"] < 3.5
    start = AutoModelForCausalLM.from_pretrained(MODEL).float().eval()
    samples = samples_of(run, 1)
    assert len(samples) == 16 and samples != samples_of(run, 2)
    np.testing.assert_allclose(lines[1]["loss"], mean_nll(start, samples), rtol=1e-4)
    for text in ("held-out loss", "jaxrl.sft", str(run / "export")):
        assert text in shown


def test_a_resumed_run_ends_with_bitwise_the_same_policy(data, finished, tmp_path):
    _, run = finished
    tune(data, tmp_path, "--run.steps=4")
    tune(data, tmp_path, "--run.steps=6", "--resume")
    whole, resumed = (
        load_file(r / "export" / "model.safetensors") for r in (run, tmp_path / "run")
    )
    assert whole.keys() == resumed.keys()
    for name in whole:
        np.testing.assert_array_equal(resumed[name], whole[name], err_msg=name)
    keys = ("step", "loss", "grad_norm", "data/cursor", "eval/nll")
    expected, found = (
        [[line.get(key) for key in keys] for line in metrics(r)] for r in (run, tmp_path / "run")
    )
    assert expected == found


def test_adapters_are_what_a_run_with_them_trains(data, tmp_path):
    tune(data, tmp_path, "--run.steps=4", "--lora.rank=4", "--optimizer.learning_rate=3e-3")
    last = metrics(tmp_path / "run")[-1]
    base = AutoModelForCausalLM.from_pretrained(MODEL).float().eval()
    before = held_out_nll(base, data)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    np.testing.assert_allclose(last["eval/nll"], held_out_nll(adapted, data), rtol=1e-4)
    assert last["eval/nll"] < 0.8 * before
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export").float().eval()
    np.testing.assert_allclose(held_out_nll(merged, data), last["eval/nll"], rtol=2e-2)


BAD_INPUT = {  # arguments, what is said
    "a row": (["--data.path={bad}"], "line 2: needs the texts 'prompt' and 'completion' or"),
    "a key of GRPO's": (["--rollout.group_size=4"], "rollout: unknown key"),
    "a misspelt key": (["--sft.sequences_per_steps=4"], "mean 'sft.sequences_per_step'?"),
    "a template": (["--data.completion_template=x"], "must contain {completion}"),
    "lengths": (
        ["--data.max_completion_tokens=4096"],
        "data.max_prompt_tokens and data.max_completion_tokens are 4136 tokens",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_clear_message(case, data, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "1 + 1", "completion": "2"}\n{"prompt": "1 + 2", "answer": 3}\n')
    arguments, expected = BAD_INPUT[case]
    extra = [argument.replace("{bad}", str(bad)) for argument in arguments]
    with contextlib.chdir(ROOT):
        assert sft.main(command(data, tmp_path, *extra)) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and expected in shown, shown
    assert not (tmp_path / "run").exists()


def test_the_command_prints_a_configuration_that_can_be_run(data, tmp_path):
    def dry_run(*arguments: str) -> str:
        line = [sys.executable, "-m", "jaxrl.sft", *arguments, "--dry-run"]
        return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, check=True).stdout

    shown = dry_run(*command(data, tmp_path))
    printed, plan = shown.split("\n\n", 1)
    again = tmp_path / "again.yaml"
    again.write_text(printed)
    assert dry_run("--config", str(again)) == shown
    assert "40 steps" in plan and "16 prompts with their completions" in plan
