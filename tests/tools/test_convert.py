"""What was converted is what there was, and a conversion that fails leaves nothing.

Expected tensors come from transformers and safetensors, and from layouts written out by hand.
"""

import copy
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
from safetensors import safe_open

from jaxrl import checkpoint
from jaxrl.models.lora import fingerprint
from tests.reference_policy import family_model, make_reference, params_of, save_reference
from tools import convert

ROOT = Path(__file__).parents[2]
RANK, ALPHA = 3, 12.0


def run(capsys, *arguments, code: int = 0) -> str:
    """Output of the tool in this process: stdout, or stderr where it fails."""
    capsys.readouterr()
    assert convert.main([str(a) for a in arguments]) == code, capsys.readouterr()
    output = capsys.readouterr()
    if code:
        assert output.out == "" and output.err.count("\n") == 1 and "Traceback" not in output.err
        return output.err
    return output.out


def started(*arguments, code: int = 0) -> subprocess.CompletedProcess:
    """As a user starts it."""
    done = subprocess.run(
        [sys.executable, "-m", "tools.convert", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": ""},
        timeout=120,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def raw(directory: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], str]]:
    """name -> dtype, shape and SHA-256 of every tensor, read by the safetensors library."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118, not a dict
                tensor = reader.get_tensor(name)
                content = tensor.contiguous().view(torch.uint8).numpy().tobytes()
                digest = hashlib.sha256(content).hexdigest()
                found[name] = (tensor.dtype, tuple(tensor.shape), digest)
    return found


def values(directory: Path) -> dict[str, np.ndarray]:
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118, not a dict
                found[name] = reader.get_tensor(name).float().numpy()
    return found


def digest_line(output: str) -> str:
    return next(line for line in output.splitlines() if line.startswith("weight digest (SHA-256) "))


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def model():
    return make_reference()


@pytest.fixture(scope="module")
def source(model, tmp_path_factory) -> Path:
    folder = save_reference(model, tmp_path_factory.mktemp("source") / "model")
    (folder / "tokenizer.json").write_text('{"mine": 1}')
    return folder


def save_run(root: Path, path: Path, steps: dict[int, dict], **host) -> Path:
    """A run directory as training leaves it: parameters, moments, counters."""
    config = {"model": {"path": str(path), "ignore_config_fields": []}, **host.pop("config", {})}
    for step, params in steps.items():
        arrays = {
            "params": {name: _jax(node) for name, node in params.items()},
            "opt_state": ({"mu": {name: _jax(node) for name, node in params.items()}},),
            "step": jnp.int32(step),
        }
        facts = {"cursor": 8 * step, "version": step + 1, "config": config, **host}
        checkpoint.save(root / "checkpoints", step, arrays, facts, keep=9)
    return root


def _jax(node):
    if isinstance(node, dict):
        return {name: _jax(child) for name, child in node.items()}
    return jnp.asarray(node, jnp.float32)


@pytest.fixture(scope="module")
def trained_run(model, source, tmp_path_factory) -> Path:
    """Step 20 has the parameters of `model`, step 10 twice those."""
    params = params_of(model)
    twice = {name: _times(2.0, node) for name, node in params.items()}
    return save_run(tmp_path_factory.mktemp("runs") / "run", source, {10: twice, 20: params})


def _times(factor: float, node):
    if isinstance(node, dict):
        return {name: _times(factor, child) for name, child in node.items()}
    return factor * np.asarray(node)


# --- there and back ---


@pytest.mark.parametrize(
    "family, dtype",
    [
        ("llama", "float32"),
        ("llama_biases_linear_tied", "bfloat16"),
        ("phi3_half_rotary_window", "float32"),
        ("phi3_half_rotary_window", "bfloat16"),
        ("qwen3_moe", "float32"),
        ("gpt_oss", "bfloat16"),
    ],
)
def test_there_and_back_is_the_same_bits(family, dtype, tmp_path, capsys):
    model = copy.deepcopy(family_model(family)).to(getattr(torch, dtype))
    source = save_reference(model, tmp_path / "source")
    first = run(capsys, "hf2jax", source, tmp_path / "jax")
    run(capsys, "jax2hf", tmp_path / "jax", tmp_path / "back", "--dtype", dtype)
    assert raw(tmp_path / "back") == raw(source) and len(raw(source)) > 10
    assert "float32" in first  # whatever the source has


def test_as_a_user_starts_it(source, tmp_path):
    there = started("hf2jax", source, tmp_path / "new" / "jax").stdout
    shutil.copytree(tmp_path / "new" / "jax", tmp_path / "elsewhere")
    back = started("jax2hf", tmp_path / "elsewhere", tmp_path / "hf", "--dtype", "float32").stdout
    assert raw(tmp_path / "hf") == raw(source)
    nbytes = sum(value.nbytes for value in values(source).values())
    for output in (there, back):
        assert f"{len(raw(source))} tensors, {nbytes} bytes, float32" in output
        assert "GB/s" in output
    lines = sorted(
        f"{name} float32 {','.join(map(str, shape))} {digest}\n"
        for name, (_, shape, digest) in raw(source).items()
    )
    expected = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert digest_line(there) == digest_line(back) == f"weight digest (SHA-256) {expected}"
    assert (tmp_path / "hf" / "tokenizer.json").read_text() == '{"mine": 1}'
    assert {p.name for p in tmp_path.iterdir()} == {"new", "elsewhere", "hf"}
    assert {p.name for p in (tmp_path / "new").iterdir()} == {"jax"}


def test_plain_orbax_reads_what_hf2jax_wrote(model, source, tmp_path, capsys):
    run(capsys, "hf2jax", source, tmp_path / "jax")
    found = ocp.PyTreeCheckpointer().restore(tmp_path / "jax" / "arrays")
    params = params_of(model)
    np.testing.assert_array_equal(found["params/embed"], params["embed"])
    for name, leaf in params["layers"]["attention"].items():
        np.testing.assert_array_equal(found[f"params/layers/attention/{name}"], leaf)
    assert len(found) == 14
    assert {p.name for p in (tmp_path / "jax" / "model").iterdir()} >= {
        "config.json",
        "tokenizer.json",
    }


def test_a_bfloat16_checkpoint_has_bfloat16_arrays(source, tmp_path, capsys):
    output = run(capsys, "hf2jax", source, tmp_path / "jax", "--dtype", "bfloat16")
    found = ocp.PyTreeCheckpointer().restore(tmp_path / "jax" / "arrays")
    assert {leaf.dtype for leaf in found.values()} == {jnp.dtype("bfloat16")}
    back = run(capsys, "jax2hf", tmp_path / "jax", tmp_path / "back")
    assert digest_line(output) == digest_line(back)
    with safe_open(source / "model.safetensors", framework="pt") as reader:
        for name, (_, _, digest) in raw(tmp_path / "back").items():
            rounded = reader.get_tensor(name).bfloat16().contiguous().view(torch.uint8)
            assert hashlib.sha256(rounded.numpy().tobytes()).hexdigest() == digest


# --- runs ---


@pytest.mark.parametrize("inside", ["", "checkpoints", "checkpoints/step_00000020"])
def test_a_run_becomes_the_model_it_trained(trained_run, source, inside, tmp_path, capsys):
    target = tmp_path / "hf"
    assert "(step 20)" in run(capsys, "jax2hf", trained_run / inside, target, "--dtype", "float32")
    assert raw(target) == raw(source)


def test_an_earlier_step_can_be_asked_for(trained_run, source, tmp_path, capsys):
    run(capsys, "jax2hf", trained_run, tmp_path / "hf", "--dtype", "float32", "--step", 10)
    expected = values(source)
    for name, value in values(tmp_path / "hf").items():
        np.testing.assert_array_equal(value, 2 * expected[name], err_msg=name)
    error = run(capsys, "jax2hf", trained_run, tmp_path / "x", "--step", 11, code=2)
    assert "no step_00000011, only step_00000010, step_00000020" in error


def test_only_parameters_are_read(trained_run, tmp_path, capsys, monkeypatch):
    asked = []
    read = checkpoint.read_arrays

    def watched(stored, names):
        asked.append(list(names))
        return read(stored, names)

    monkeypatch.setattr(checkpoint, "read_arrays", watched)
    run(capsys, "jax2hf", trained_run, tmp_path / "hf")
    names = [name for names in asked for name in names]
    assert len(names) == len(set(names)) == 14
    assert all(name.startswith("params/") for name in names)
    assert max(map(len, asked)) == 1  # and one leaf at a time


def test_a_damaged_newest_checkpoint_is_named_and_passed_over(trained_run, tmp_path, capsys):
    copied = tmp_path / "run"
    shutil.copytree(trained_run, copied)
    flip(copied / "checkpoints" / "step_00000020")
    assert convert.main(["jax2hf", str(copied), str(tmp_path / "hf")]) == 0
    output = capsys.readouterr()
    assert "(step 10)" in output.out
    assert "passed over" in output.err and "step_00000020" in output.err


def flip(folder: Path) -> str:
    """Flips one bit of the largest array file; returns its name."""
    file = max((folder / "arrays").rglob("d/*"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    return str(file.relative_to(folder))


def test_a_damaged_checkpoint_is_refused_before_anything_is_written(trained_run, tmp_path):
    shutil.copytree(trained_run / "checkpoints" / "step_00000020", tmp_path / "step_00000020")
    name = flip(tmp_path / "step_00000020")
    before = everything(tmp_path)
    done = started("jax2hf", tmp_path / "step_00000020", tmp_path / "a" / "hf", code=2)
    assert done.stdout == "" and done.stderr.count("\n") == 1
    assert f"step_00000020: is damaged: {name}: has SHA-256" in done.stderr
    assert everything(tmp_path) == before


def test_a_model_that_moved_can_be_pointed_to(model, source, tmp_path, capsys):
    root = save_run(tmp_path / "run", tmp_path / "gone", {1: params_of(model)})
    error = run(capsys, "jax2hf", root, tmp_path / "hf", code=2)
    assert str(tmp_path / "gone") in error and "--model DIR" in error
    run(capsys, "jax2hf", root, tmp_path / "hf", "--model", source, "--dtype", "float32")
    assert raw(tmp_path / "hf") == raw(source)


def test_another_model_is_refused_with_the_arrays_that_do_not_fit(trained_run, tmp_path, capsys):
    other = save_reference(make_reference(num_hidden_layers=1), tmp_path / "other")
    error = run(capsys, "jax2hf", trained_run, tmp_path / "hf", "--model", other, code=2)
    assert "params/layers/attention/query: has shape [2, 4, 16, 32], the model has [1, " in error
    assert not (tmp_path / "hf").exists()


# --- adapters ---


def adapters(seed: int = 0) -> dict:
    """Of q_proj and down_proj of `make_reference`, as the trainer lays them out."""
    rng = np.random.default_rng(seed)
    shapes = {
        "attention": {"q_proj_lora_a": (2, RANK, 32), "query_lora_b": (2, 4, 16, RANK)},
        "mlp": {"down_proj_lora_a": (2, RANK, 48), "down_lora_b": (2, 32, RANK)},
    }
    return {
        "layers": {
            block: {name: rng.normal(size=shape).astype(np.float32) for name, shape in of.items()}
            for block, of in shapes.items()
        }
    }


LORA = {"lora": {"rank": RANK, "alpha": ALPHA, "targets": ["q_proj", "down_proj"]}}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """In bfloat16, as the trainer holds frozen weights."""
    return save_reference(make_reference().bfloat16(), tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def adapted_run(base, tmp_path_factory) -> Path:
    rounded = make_reference().bfloat16()
    checksum = int(fingerprint(_jax(params_of(rounded))))
    root = tmp_path_factory.mktemp("runs") / "lora"
    facts = {"config": LORA, "frozen_fingerprint": checksum}
    return save_run(root, base, {4: adapters()}, **facts)


def test_merged_is_base_plus_scaled_product(adapted_run, base, tmp_path, capsys):
    run(capsys, "jax2hf", adapted_run, tmp_path / "hf", "--dtype", "float32")
    expected, found = values(base), values(tmp_path / "hf")
    layers = adapters()["layers"]
    for i in range(2):
        for name, block, a, b in (
            ("self_attn.q_proj", "attention", "q_proj_lora_a", "query_lora_b"),
            ("mlp.down_proj", "mlp", "down_proj_lora_a", "down_lora_b"),
        ):
            lora_a, lora_b = layers[block][a][i], layers[block][b][i].reshape(-1, RANK)
            expected[f"model.layers.{i}.{name}.weight"] += ALPHA / RANK * lora_b @ lora_a
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-5, err_msg=name)


def test_an_adapter_directory_has_the_names_of_peft(adapted_run, base, tmp_path, capsys):
    target = tmp_path / "adapter"
    run(capsys, "jax2hf", adapted_run, target, "--lora", "adapter", "--dtype", "float32")
    layers = adapters()["layers"]
    expected = {}
    for i in range(2):
        for module, block, a, b in (
            ("self_attn.q_proj", "attention", "q_proj_lora_a", "query_lora_b"),
            ("mlp.down_proj", "mlp", "down_proj_lora_a", "down_lora_b"),
        ):
            prefix = f"base_model.model.model.layers.{i}.{module}"
            expected[f"{prefix}.lora_A.weight"] = layers[block][a][i]
            expected[f"{prefix}.lora_B.weight"] = layers[block][b][i].reshape(-1, RANK)
    found = values(target)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    config = json.loads((target / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (RANK, ALPHA)
    assert config["base_model_name_or_path"] == str(base)
    assert config["target_modules"] == ["down_proj", "q_proj"]


def test_adapters_that_are_not_there_are_a_mistake(trained_run, tmp_path, capsys):
    error = run(capsys, "jax2hf", trained_run, tmp_path / "x", "--lora", "adapter", code=2)
    assert "has no adapters" in error and not (tmp_path / "x").exists()


def test_adapters_are_not_merged_into_other_weights(adapted_run, tmp_path, capsys):
    other = save_reference(make_reference(seed=5).bfloat16(), tmp_path / "other")
    error = run(capsys, "jax2hf", adapted_run, tmp_path / "hf", "--model", other, code=2)
    assert "were trained beside" in error
    assert everything(tmp_path) == {"other", *(f"other/{n}" for n in everything(other))}


# --- targets ---


def test_an_existing_target_is_replaced_only_when_asked(source, trained_run, tmp_path, capsys):
    target = tmp_path / "hf"
    run(capsys, "jax2hf", trained_run, target)
    before = raw(target)
    assert "exists already" in run(capsys, "jax2hf", trained_run, target, code=2)
    assert raw(target) == before
    run(capsys, "jax2hf", trained_run, target, "--dtype", "float32", "--force")
    assert raw(target) == raw(source)
    run(capsys, "hf2jax", source, tmp_path / "jax")
    assert "exists already" in run(capsys, "hf2jax", source, tmp_path / "jax", code=2)
    run(capsys, "hf2jax", source, tmp_path / "jax", "--force")
    assert {p.name for p in tmp_path.iterdir()} == {"hf", "jax"}


def test_what_is_not_ours_is_never_replaced(source, trained_run, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("ten years")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    for name in ("mine", "file", "link"):
        error = run(capsys, "jax2hf", trained_run, tmp_path / name, "--force", code=2)
        assert "is not replaced, even with --force" in error
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "ten years"
    for target in (source, source.parent, trained_run / "checkpoints/step_00000020/hf"):
        error = run(capsys, "jax2hf", trained_run, target, "--force", code=2)
        assert "name another" in error
    assert "name another" in run(capsys, "hf2jax", source, source, "--force", code=2)
    assert checkpoint.open_whole(trained_run / "checkpoints" / "step_00000020").step == 20


@pytest.mark.parametrize("force", [False, True])
def test_a_conversion_that_fails_half_way_leaves_what_was(
    trained_run, tmp_path, capsys, monkeypatch, force
):
    target = tmp_path / "new" / "hf"
    if force:
        run(capsys, "jax2hf", trained_run, target)
    before = everything(tmp_path)
    export, calls = convert.export_group, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        return export(*arguments)

    monkeypatch.setattr(convert, "export_group", failing)
    error = run(capsys, "jax2hf", trained_run, target, "--force", code=2)
    assert "No space left on device" in error and len(calls) == 4
    assert everything(tmp_path) == before


def test_a_value_that_float16_cannot_hold_is_refused(model, source, tmp_path, capsys):
    params = params_of(model)
    run_dir = save_run(tmp_path / "run", source, {1: params})
    run(capsys, "jax2hf", run_dir, tmp_path / "fits", "--dtype", "float16")
    assert {dtype for dtype, _, _ in raw(tmp_path / "fits").values()} == {torch.float16}
    params["layers"]["mlp"]["down"] = params["layers"]["mlp"]["down"].copy()
    params["layers"]["mlp"]["down"][1, 2, 3] = -7e4
    run_dir = save_run(tmp_path / "large", source, {1: params})
    error = run(capsys, "jax2hf", run_dir, tmp_path / "hf", "--dtype", "float16", code=2)
    assert "model.layers.1.mlp.down_proj.weight: does not fit in float16" in error
    assert {p.name for p in tmp_path.iterdir()} == {"run", "fits", "large"}


# --- mistakes ---


def test_mistakes_are_one_line(source, tmp_path, capsys):
    assert "there is no such" in run(capsys, "hf2jax", tmp_path / "no", tmp_path / "x", code=2)
    assert "there is no such" in run(capsys, "jax2hf", tmp_path / "no", tmp_path / "x", code=2)
    assert "holds no checkpoint" in run(capsys, "jax2hf", source, tmp_path / "x", code=2)
    broken = tmp_path / "broken"
    shutil.copytree(source, broken)
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    assert "model.safetensors" in run(capsys, "hf2jax", broken, tmp_path / "x", code=2)
    config = json.loads((source / "config.json").read_text())
    config.pop("layer_types")
    (broken / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3, "new": 1}))
    assert "new = 1" in run(capsys, "hf2jax", broken, tmp_path / "x", code=2)
    shutil.copyfile(source / "model.safetensors", file)
    error = run(capsys, "hf2jax", broken, tmp_path / "x", "--ignore-config-field", "new", code=2)
    assert "model.layers.2.self_attn.q_proj.weight: missing" in error
    assert everything(tmp_path) == {"broken", *(f"broken/{n}" for n in everything(broken))}


def test_a_field_that_was_ignored_there_is_ignored_on_the_way_back(source, tmp_path, capsys):
    shutil.copytree(source, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps(config | {"new": 1}))
    run(capsys, "hf2jax", tmp_path / "source", tmp_path / "jax", "--ignore-config-field", "new")
    run(capsys, "jax2hf", tmp_path / "jax", tmp_path / "hf", "--dtype", "float32")
    assert raw(tmp_path / "hf") == raw(source)
