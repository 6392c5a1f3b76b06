"""Whole runs with adapters."""

import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from jaxrl.train import main

ROOT = Path(__file__).parent.parent
RANK = 4
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SMALL = (
    *("--config", "configs/arithmetic_lora.yaml", "--lora.rank", str(RANK), "--run.name=run"),
    *("--rollout.prompts_per_step=8", "--rollout.group_size=4", "--data.held_out=16"),
    *("--optimizer.warmup_steps=1", "--checkpoint.every_steps=1", "--log.tensorboard=false"),
    "--algorithm.kl_coefficient=0.02",
)


def train(folder, *arguments, code=0) -> tuple[str, str]:
    """A run with the in-process engine, in this process; what it wrote to stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), chdir(ROOT):
        ended = main([*SMALL, f"--run.dir={folder}", "--rollout.engine=inprocess", *arguments])
    shown = out.getvalue(), err.getvalue()
    assert ended == code, shown
    return shown


def adapters_of(run: Path) -> dict[str, np.ndarray]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Three steps beside a bfloat16 copy of the demo's policy, at a path that tests may change."""
    folder = tmp_path_factory.mktemp("lora")
    model = folder / "model"
    shutil.copytree(ROOT / "configs" / "tiny_policy", model)
    shown, _ = train(folder, f"--model.path={model}", "--run.steps=3")
    return shown, folder / "run", model


def test_a_run_leaves_a_peft_directory_and_the_merged_policy(finished):
    shown, run, model = finished
    adapters, base = adapters_of(run), load_file(model / "model.safetensors")
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == sorted(MODULES)
    assert (config["r"], config["lora_alpha"]) == (RANK, 32.0)
    merged = load_file(run / "export" / "model.safetensors")
    assert merged.keys() == base.keys()
    moved = 0
    for name, weight in base.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        expected = weight.astype(np.float32)
        if f"{prefix}.lora_A.weight" in adapters:
            into, out = (adapters[f"{prefix}.lora_{side}.weight"] for side in "AB")
            assert into.shape == (RANK, weight.shape[1]) and out.shape == (weight.shape[0], RANK)
            expected = expected + 32.0 / RANK * (out @ into)
            moved += bool(np.abs(out).max())
        np.testing.assert_allclose(
            merged[name].astype(np.float32), expected, rtol=2**-8, atol=1e-6, err_msg=name
        )
    assert moved == len(MODULES) * 2  # of both layers
    assert str(run / "adapter") in shown and str(run / "export") in shown


def test_the_distance_from_the_weights_beneath_starts_at_none_and_grows(finished):
    _, run, _ = finished
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first, *later = [line["kl/reference"] for line in lines[1:]]
    assert abs(first) < 1e-6 < 1e-4 < later[0] < later[1], (first, later)


def test_checkpoints_hold_adapters_and_their_moments_and_nothing_else(finished):
    _, run, model = finished
    base = sum(x.size for x in load_file(model / "model.safetensors").values())
    trained = sum(x.size for x in adapters_of(run).values())
    with ocp.PyTreeCheckpointer() as checkpointer:
        arrays = checkpointer.restore((run / "checkpoints" / "step_00000003" / "arrays").absolute())
    sizes = [np.size(x) for x in arrays.values()]
    assert 3 * trained <= sum(sizes) <= 3 * trained + 10 < base


def test_a_resumed_run_ends_with_bitwise_the_same_adapters(finished, tmp_path):
    _, run, model = finished
    train(tmp_path, f"--model.path={model}", "--run.steps=2")
    train(tmp_path, f"--model.path={model}", "--run.steps=3", "--resume")
    resumed, whole = adapters_of(tmp_path / "run"), adapters_of(run)
    assert resumed.keys() == whole.keys()
    for name in whole:
        np.testing.assert_array_equal(resumed[name], whole[name], err_msg=name)


def test_adapters_are_not_resumed_beside_other_weights(finished, tmp_path):
    *_, model = finished
    other = tmp_path / "model"
    shutil.copytree(model, other)
    train(tmp_path, f"--model.path={other}", "--run.steps=1")
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    _, said = train(tmp_path, f"--model.path={other}", "--run.steps=2", "--resume", code=2)
    assert "model.path" in said and "adapters" in said


def test_a_target_that_no_layer_has_is_refused_before_anything_starts(tmp_path):
    _, said = train(tmp_path, '--lora.targets=["q_proj","qkv_proj"]', code=2)
    assert "qkv_proj" in said and "k_proj" in said
    assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_vllm_serves_the_adapters_that_were_trained(tmp_path):
    arguments = [f"--run.dir={tmp_path}", "--run.steps=3", "--publish.channel=shuttle"]
    done = subprocess.run(
        [sys.executable, "-m", "jaxrl.train", *SMALL, "--rollout.engine=vllm", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)},
        timeout=400,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, f"{done.stdout}\n{done.stderr}"
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    wire = sum(x.nbytes for x in adapters_of(run).values())
    for line in lines[1:]:
        assert line["publish/bytes"] == wire
        assert line["publish/probe_max_abs_dlogp"] <= 1e-4
        assert line["mismatch/max_abs_dlogp"] <= 1e-4  # of every sampled token
    # The frozen weights took a number of their own, ahead of the first adapters.
    assert [line["weights/version"] for line in lines] == [2, 3, 4, 5]


PLAIN_VLLM = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
base, adapter, tokens = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
llm = LLM(
    model=base, dtype="float32", enforce_eager=True, skip_tokenizer_init=True, enable_lora=True,
    max_lora_rank=8, max_model_len=64, kv_cache_memory_bytes=64 << 20,
    enable_chunked_prefill=False,
)
sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
request = LoRARequest("trained", 1, adapter)
prompts = [{"prompt_token_ids": tokens}]
# Without its bar: where bars are switched off, vLLM divides by the time that its own shows.
(output,) = llm.generate(prompts, sampling, lora_request=request, use_tqdm=False)
print(json.dumps([next(iter(x.values())).logprob for x in output.prompt_logprobs[1:]]))
"""


def test_vllm_alone_opens_the_peft_directory_and_means_what_peft_does_by_it(finished):
    _, run, model = finished
    tokens = [5, 9, 100, 3, 3, 64, 1, 200, 17, 40]
    quiet = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    quiet |= {"TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    done = subprocess.run(
        [sys.executable, "-c", PLAIN_VLLM, str(model), str(run / "adapter"), json.dumps(tokens)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1", **quiet},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    served = np.array(json.loads(done.stdout.splitlines()[-1]))

    base = AutoModelForCausalLM.from_pretrained(model).float().eval()
    plain = logprobs_of(base, tokens)
    adapted = logprobs_of(peft.PeftModel.from_pretrained(base, run / "adapter").eval(), tokens)
    np.testing.assert_allclose(served, adapted, atol=1e-4)
    assert np.abs(adapted - plain).max() > 1e-3


def logprobs_of(model, tokens: list[int]) -> np.ndarray:
    with torch.no_grad():
        logs = torch.log_softmax(model(torch.tensor([tokens])).logits[0], -1)
    return np.array([logs[i, token].item() for i, token in enumerate(tokens[1:])])
