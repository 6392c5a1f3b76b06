"""Every kind of directory is recognised, counted and compared; what is damaged is named.

Files are made by safetensors, transformers and, where they are of this project, by its writers.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bridge.channels.shuttle import ShuttleChannel
from bridge.encoding import Encoder, Shadow
from bridge.publisher import ship
from bridge.wire import Base, HostTensor, Manifest, manifest_of, pack
from jaxrl import checkpoint
from tests.reference_policy import make_reference, params_of, save_reference
from tools import convert, inspect

ROOT = Path(__file__).parents[2]
# Of make_reference(), by hand: 64 x 32 embedding and head, the last norm, and of each layer q, k,
# v, o, two head norms, gate, up and down, two norms.
LAYER = 2 * 64 * 32 + 2 * 32 * 32 + 2 * 16 + 3 * 32 * 48 + 2 * 32
PARAMETERS = 2 * 64 * 32 + 32 + 2 * LAYER


def run(capsys, *arguments, code: int = 0) -> str:
    capsys.readouterr()
    assert inspect.main([str(a) for a in arguments]) == code, capsys.readouterr()
    output = capsys.readouterr()
    if code == 2:
        assert output.out == "" and output.err.count("\n") == 1
        return output.err
    assert output.err == ""
    return output.out


def report(capsys, *arguments, code: int = 0) -> dict:
    return json.loads(run(capsys, *arguments, "--json", code=code))


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return save_reference(make_reference(), tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def jax_directory(source, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("jax") / "jax"
    assert convert.main(["hf2jax", str(source), str(target)]) == 0
    return target


@pytest.fixture(scope="module")
def run_directory(source, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("run")
    for step in (1, 2):
        params = _jax(params_of(make_reference()))
        arrays = {"params": params, "opt_state": {"mu": params}, "step": jnp.int32(step)}
        config = {"model": {"path": str(source)}}
        host = {"cursor": 70 + step, "version": 40 + step, "config": config}
        checkpoint.save(root / "checkpoints", step, arrays, host, keep=2)
    return root


@pytest.fixture
def published(source, tmp_path) -> Path:
    tensors = [
        HostTensor(name, "float32", tuple(t.shape), t.numpy().reshape(-1).view(np.uint8))
        for name, t in load_file(source / "model.safetensors").items()
    ]
    manifest, buckets = pack(12, tensors, 60_000)
    return Path(ShuttleChannel(tmp_path / "weights").publish(manifest, buckets).address)


def _jax(node):
    if isinstance(node, dict):
        return {name: _jax(child) for name, child in node.items()}
    return jnp.asarray(node, jnp.float32)


def edited(source: Path, target: Path, **changes) -> Path:
    """A copy of a Hugging Face directory with tensors changed, added, or (None) removed."""
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    tensors |= {name.replace("__", "."): value for name, value in changes.items()}
    kept = {name: value.contiguous() for name, value in tensors.items() if value is not None}
    save_file(kept, target / "model.safetensors", {"format": "pt"})
    return target


def digest(tensor: torch.Tensor) -> str:
    content = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(content).hexdigest()


# --- one place ---


def test_a_hugging_face_directory(source, capsys):
    output = run(capsys, source)
    assert output.startswith(f"{source}: Hugging Face directory\n")
    assert f"{PARAMETERS:,}" in output and f"{4 * PARAMETERS:,}" in output
    assert "Qwen3ForCausalLM" in output and "trains here              yes" in output
    line = next(line for line in output.splitlines() if "q_proj" in line)
    assert line.split() == [
        "model.layers.{0..1}.self_attn.q_proj.weight",
        "float32",
        "[64,",
        "32]",
        "16,384",
        "x2",
    ]
    found = report(capsys, source)
    assert (found["tensors"], found["parameters"]) == (25, PARAMETERS)
    assert found["dtypes"] == {"float32": 25} and found["digest"] is None
    assert found["architecture"]["num_hidden_layers"] == 2


def test_shards_are_one_directory(source, tmp_path, capsys):
    sharded = save_reference(make_reference(), tmp_path / "model", max_shard_size="30KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    found = report(capsys, sharded, "--sha256")
    assert found["parameters"] == PARAMETERS
    assert found["digest"] == report(capsys, source, "--sha256")["digest"]
    assert run(capsys, source, "--diff", sharded).endswith("equal: 25 tensors are the same\n")


def test_every_tensor_with_its_digest(source, capsys):
    tensors = load_file(source / "model.safetensors")
    found = report(capsys, source, "--tensors")
    assert {line["name"]: line["sha256"] for line in found["tree"]} == {
        name: digest(tensor) for name, tensor in tensors.items()
    }
    lines = sorted(
        f"{name} float32 {','.join(map(str, tensor.shape))} {digest(tensor)}\n"
        for name, tensor in tensors.items()
    )
    assert found["digest"] == hashlib.sha256("".join(lines).encode()).hexdigest()
    queries = [line for line in lines if "q_proj" in line]
    folded = next(
        line for line in report(capsys, source, "--sha256")["tree"] if "q_proj" in line["name"]
    )
    assert folded["sha256"] == hashlib.sha256("".join(queries).encode()).hexdigest()


def test_folding_tells_gaps_and_unlike_layers_apart(tmp_path, capsys):
    tensors = {f"layers.{i}.w": torch.zeros(2, 3) for i in (0, 1, 2, 5)}
    tensors |= {"layers.3.w": torch.zeros(4, 3), "layers.4.w": torch.zeros(2, 3).half()}
    tensors |= {f"layers.0.experts.{i}.w2.weight": torch.zeros(1) for i in range(3)}
    save_file(tensors, tmp_path / "x.safetensors")
    tree = report(capsys, tmp_path / "x.safetensors")["tree"]
    assert {(line["name"], line["count"]) for line in tree} == {
        ("layers.{0,1,2,5}.w", 4),
        ("layers.3.w", 1),
        ("layers.4.w", 1),
        ("layers.0.experts.{0..2}.w2.weight", 3),
    }


def test_a_file_and_a_peft_directory(tmp_path, capsys):
    tensors = {
        f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{part}.weight": torch.ones(shape)
        for i in range(2)
        for part, shape in (("A", (3, 32)), ("B", (64, 3)))
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"r": 3, "lora_alpha": 12.0, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    found = report(capsys, tmp_path)
    assert found["kind"] == "PEFT adapters" and found["facts"]["r"] == 3
    assert found["parameters"] == 2 * (3 * 32 + 64 * 3)
    single = report(capsys, tmp_path / "adapter_model.safetensors")
    assert single["kind"] == "safetensors file" and single["tree"] == found["tree"]
    assert len(found["tree"]) == 2


def test_what_the_trainer_would_refuse_is_said(source, tmp_path, capsys):
    smaller = edited(source, tmp_path / "smaller", model__norm__weight=None)
    assert "no: model.norm.weight is missing" in run(capsys, smaller)
    config = json.loads((source / "config.json").read_text())
    (smaller / "config.json").write_text(json.dumps(config | {"architectures": ["Other"]}))
    assert "architecture Other is not one of" in run(capsys, smaller)


def test_a_published_version(published, source, capsys):
    for path in (published, published.parent):
        found = report(capsys, path)
        assert found["kind"] == "published version" and found["facts"]["version"] == 12
        assert found["facts"]["buckets"] > 1 and found["parameters"] == PARAMETERS
    hashed = report(capsys, published, "--sha256")
    assert hashed["digest"] == report(capsys, source, "--sha256")["digest"]
    # A version's own digest is made of other digests of the same bytes, and each says which.
    assert hashed["digest"] != hashed["facts"]["digest"]
    manifest = Manifest.from_json((published / "manifest.json").read_text())
    assert hashed["facts"]["digest"] == manifest.digest
    shown = {" ".join(line.split()) for line in run(capsys, published, "--sha256").splitlines()}
    assert f"weight digest (SHA-256) {hashed['digest']}" in shown
    assert f"version's digest (XXH3) {manifest.digest}" in shown
    assert report(capsys, published, "--diff", source)["equal"]


def test_a_version_that_travelled_as_a_difference(source, tmp_path, capsys):
    """It is shown whole, as an engine has it; with its base gone it cannot be."""
    channel = ShuttleChannel(tmp_path / "weights")
    encoder, shadow = Encoder("delta"), Shadow()
    arrays = {name: t.numpy().copy() for name, t in load_file(source / "model.safetensors").items()}
    for version in (12, 13):
        arrays["model.norm.weight"][3] += version - 12
        tensors = [
            HostTensor(name, "float32", a.shape, a.copy().reshape(-1).view(np.uint8))
            for name, a in arrays.items()
        ]
        shipment = channel.begin(version, 1, 1 << 20)
        base = encoder.base()
        shadow.begin(base, keep=True)
        manifest = manifest_of(version, ship([tensors], shipment, shadow), base)
        folder = Path(shipment.finish(manifest).address)
        encoder.shipped(manifest)
        shadow.settle(Base(version, manifest.digest))
    found = report(capsys, folder)
    assert found["parameters"] == PARAMETERS and found["bytes"] == 4 * PARAMETERS
    assert re.fullmatch(
        r"\d{3,4} bytes, what changed since version 12", found["facts"]["travelled as"]
    )
    (changed,) = report(capsys, folder, "--diff", source, code=1)["changed"]
    assert (changed["name"], changed["elements"]) == ("model.norm.weight", 1)
    shutil.rmtree(folder.with_name("v00000012"))
    assert "version 12: " in run(capsys, folder, code=2)


def test_a_run_its_checkpoints_and_one_checkpoint(run_directory, capsys):
    for inside in ("", "checkpoints", "checkpoints/step_00000002"):
        found = report(capsys, run_directory / inside)
        assert found["kind"] == "JAX checkpoint"
        assert found["path"].endswith("step_00000002")
        facts = found["facts"]
        assert (facts["step"], facts["data cursor"], facts["weight version"]) == (2, 72, 42)
        assert set(facts["libraries"]) == {"jax", "flax", "orbax-checkpoint"}
        assert "verified" in facts
        assert found["parameters"] == PARAMETERS
        assert found["parts"] == {
            "params": 4 * PARAMETERS,
            "opt_state": 4 * PARAMETERS,
            "step": 4,
        }
    lines = {line["name"]: line for line in report(capsys, run_directory, "--tensors")["tree"]}
    assert lines["params/layers/attention/query"]["shape"] == [2, 4, 16, 32]
    leaf = params_of(make_reference())["layers"]["attention"]["query"]
    expected = hashlib.sha256(np.ascontiguousarray(leaf).tobytes()).hexdigest()
    assert lines["params/layers/attention/query"]["sha256"] == expected
    assert lines["step"]["dtype"] == "int32"


def test_a_jax_directory(jax_directory, source, capsys):
    found = report(capsys, jax_directory)
    assert found["kind"] == "JAX checkpoint" and found["facts"]["source"] == str(source)
    assert found["architecture"]["hidden_size"] == 32


# --- two places ---


def test_a_checkpoint_is_compared_under_hugging_face_names(
    jax_directory, run_directory, source, published, tmp_path, capsys
):
    half = save_reference(make_reference().bfloat16(), tmp_path / "half")
    for other in (source, published, half, source / "model.safetensors"):
        assert report(capsys, jax_directory, "--diff", other)["equal"]
    assert report(capsys, source, "--diff", run_directory)["equal"]
    tensors = load_file(source / "model.safetensors")
    changed = tensors["model.layers.1.mlp.up_proj.weight"].clone()
    changed[3, 4] += 0.5
    changed[5, 6] -= 0.25
    other = edited(source, tmp_path / "other", **{"model.layers.1.mlp.up_proj.weight": changed})
    (difference,) = report(capsys, run_directory, "--diff", other, code=1)["changed"]
    assert difference["name"] == "model.layers.1.mlp.up_proj.weight"
    assert difference["elements"] == 2 and difference["of"] == 48 * 32
    assert difference["max_difference"] == pytest.approx(0.5, abs=1e-6)


def test_two_checkpoints_are_compared_array_by_array(jax_directory, run_directory, capsys):
    steps = [run_directory / "checkpoints" / f"step_0000000{i}" for i in (1, 2)]
    found = report(capsys, steps[0], "--diff", steps[1], code=1)
    assert [change["name"] for change in found["changed"]] == ["step"]
    assert found["same"] == 28
    found = report(capsys, jax_directory, "--diff", steps[0])
    assert found["equal"] and found["same"] == 14 and "parameters only" in found["note"]


def test_adapters_are_compared_with_adapters_and_else_merged(source, tmp_path, capsys):
    rng = np.random.default_rng(0)
    lora_a = rng.normal(size=(2, 3, 32)).astype(np.float32)
    lora_b = rng.normal(size=(2, 4, 16, 3)).astype(np.float32)
    tree = {"layers": {"attention": {"q_proj_lora_a": lora_a, "query_lora_b": lora_b}}}
    base = save_reference(make_reference().bfloat16(), tmp_path / "base")
    lora = {"rank": 3, "alpha": 6.0, "targets": ["q_proj"]}
    host = {"config": {"model": {"path": str(base)}, "lora": lora}}
    checkpoint.save(tmp_path / "run" / "checkpoints", 1, {"params": _jax(tree)}, host, keep=1)

    prefix = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    adapter = {prefix.format(i, "A"): torch.tensor(lora_a[i]) for i in range(2)}
    adapter |= {prefix.format(i, "B"): torch.tensor(lora_b[i].reshape(64, 3)) for i in range(2)}
    (tmp_path / "adapter").mkdir()
    save_file(adapter, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert report(capsys, tmp_path / "run", "--diff", tmp_path / "adapter")["equal"]
    found = report(capsys, tmp_path / "run", "--diff", base, code=1)
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)]
    assert sorted(change["name"] for change in found["changed"]) == names


def test_every_kind_of_difference_is_told(source, tmp_path, capsys):
    tensors = load_file(source / "model.safetensors")
    other = edited(
        source,
        tmp_path / "other",
        new__weight=torch.zeros(3),
        model__norm__weight=None,
        lm_head__weight=tensors["lm_head.weight"].reshape(32, 64),
        model__embed_tokens__weight=tensors["model.embed_tokens.weight"].bfloat16(),
        **{"model.layers.0.self_attn.q_norm.weight": torch.full((16,), float("nan"))},
        **{"model.layers.1.self_attn.q_norm.weight": torch.arange(16.0)},
    )
    found = report(capsys, source, "--diff", other, code=1)
    assert not found["equal"] and found["same"] == 25 - 5
    assert (found["only_in_a"], found["only_in_b"]) == (["model.norm.weight"], ["new.weight"])
    assert found["shapes"] == [["lm_head.weight", [64, 32], [32, 64]]]
    assert found["dtypes"] == [["model.embed_tokens.weight", "float32", "bfloat16"]]
    changed = {change["name"]: change for change in found["changed"]}
    embed = tensors["model.embed_tokens.weight"]
    rounding = (embed - embed.bfloat16().float()).abs()
    assert changed["model.embed_tokens.weight"]["elements"] == int((rounding > 0).sum())
    assert changed["model.embed_tokens.weight"]["max_difference"] == float(rounding.max())
    assert changed["model.layers.0.self_attn.q_norm.weight"]["max_difference"] is None
    norm = tensors["model.layers.1.self_attn.q_norm.weight"]
    change = changed["model.layers.1.self_attn.q_norm.weight"]
    assert change["max_difference"] == float((norm - torch.arange(16.0)).abs().max())
    assert change["sha256"] == [digest(norm), digest(torch.arange(16.0))]
    output = run(capsys, source, "--diff", other, code=1)
    for text in ("only in A (1)", "other shape (1)", "no finite number", "different: 20 tensors"):
        assert text in output


def test_bits_count_and_tensors_of_many_chunks_are_read_to_their_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(inspect, "_CHUNK", 7)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool):
        content = torch.arange(1, 41).to(dtype).reshape(5, 8)
        other = content.clone()
        other[4, 7] = 0
        save_file({"w": content, "zero": torch.zeros(3)}, tmp_path / "a.safetensors")
        save_file({"w": other, "zero": -torch.zeros(3)}, tmp_path / "b.safetensors")
        files = (tmp_path / "a.safetensors", tmp_path / "b.safetensors")
        changed = {
            c["name"]: c for c in report(capsys, files[0], "--diff", files[1], code=1)["changed"]
        }
        expected = 40.0 if dtype.is_floating_point else None
        assert (changed["w"]["elements"], changed["w"]["max_difference"]) == (1, expected)
        assert (changed["zero"]["elements"], changed["zero"]["max_difference"]) == (3, 0.0)
        assert changed["w"]["sha256"] == [digest(content), digest(other)]
        assert report(capsys, files[0], "--diff", files[0])["same"] == 2
        line = next(x for x in report(capsys, files[0], "--tensors")["tree"] if x["name"] == "w")
        assert line["sha256"] == digest(content)


# --- damage and mistakes ---


def flip_last(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_damage_is_named_with_its_file_and_tensor(source, published, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(source, broken)
    file = broken / "model.safetensors"
    header = int.from_bytes(file.read_bytes()[:8], "little")
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    assert "model.safetensors: damaged" in run(capsys, broken, code=2)
    assert "model.safetensors: damaged" in run(capsys, file, code=2)
    listing = json.loads(whole[8 : 8 + header])
    listing["model.norm.weight"]["shape"] = [31]
    text = json.dumps(listing, separators=(",", ":")).encode().ljust(header)
    file.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + header :])
    error = run(capsys, broken, code=2)
    assert "model.safetensors: damaged: model.norm.weight" in error

    shard = sorted(published.glob("model-*.safetensors"))[-1]
    flip_last(shard)
    error = run(capsys, published, code=2)
    assert str(shard) in error and "has XXH3" in error
    (published / "manifest.json").write_text("{}")
    assert "manifest.json: damaged" in run(capsys, published, code=2)


def test_a_digest_that_a_file_carries_is_checked_when_its_bytes_are_read(
    jax_directory, source, tmp_path, capsys
):
    target = tmp_path / "hf"
    assert convert.main(["jax2hf", str(jax_directory), str(target)]) == 0
    assert "25 of 25 tensors carry one" in run(capsys, target)
    run(capsys, target, "--sha256")
    flip_last(target / "model.safetensors")
    run(capsys, target)
    for arguments in (["--sha256"], ["--tensors"], ["--diff", source]):
        error = run(capsys, target, *arguments, code=2)
        assert "model.safetensors: lm_head.weight: damaged: has SHA-256" in error


def test_a_damaged_checkpoint_is_named(run_directory, tmp_path, capsys):
    root = tmp_path / "run"
    shutil.copytree(run_directory, root)
    (root / "checkpoints" / "step_00000002" / "host.json").unlink()
    error = run(capsys, root / "checkpoints" / "step_00000002", code=2)
    assert "step_00000002: is damaged: host.json: is missing" in error
    found = report(capsys, root)
    assert found["facts"]["step"] == 1
    assert "host.json: is missing" in found["facts"]["passed over"][0]
    (root / "checkpoints" / "step_00000001" / "MANIFEST.json").unlink()
    assert "MANIFEST.json" in run(capsys, root, code=2)


def test_mistakes(source, tmp_path, capsys):
    assert "there is no such" in run(capsys, tmp_path / "no", code=2)
    assert "there is no such" in run(capsys, source, "--diff", tmp_path / "no", code=2)
    assert "is not a Hugging Face" in run(capsys, tmp_path, code=2)
    (tmp_path / "x.safetensors").write_text("hello")
    assert "x.safetensors: damaged" in run(capsys, tmp_path / "x.safetensors", code=2)


# --- as a user starts it ---

WITHOUT_JAX = """
import sys
for name in ("jax", "jaxlib", "flax", "orbax", "optax", "ml_dtypes", "torch", "ray", "vllm"):
    sys.modules[name] = None  # importing it fails
from tools.inspect import main
source, published, adapter, half = sys.argv[1:]
for path in (source, published, adapter, half):
    for flags in ([], ["--tensors"], ["--sha256", "--json"]):
        assert main([path, *flags]) == 0
assert main([source, "--diff", published]) == 0
assert main([source, "--diff", half]) == 1
"""


def python(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": ""},
        timeout=120,
    )


def test_nothing_but_checkpoints_needs_jax_or_torch(source, published, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: torch.ones(3, 32)}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text('{"r": 3}')
    half = save_reference(make_reference().bfloat16(), tmp_path / "half")
    done = python("-c", WITHOUT_JAX, source, published, adapter, half)
    assert done.returncode == 0, done.stderr


def test_as_a_user_starts_it(source, run_directory, tmp_path):
    equal = python("-m", "tools.inspect", run_directory, "--diff", source)
    assert equal.returncode == 0 and equal.stdout.endswith("equal: 25 tensors are the same\n")
    other = edited(source, tmp_path / "other", model__norm__weight=torch.ones(32))
    different = python("-m", "tools.inspect", source, "--diff", other)
    assert different.returncode == 1 and "model.norm.weight: 32 of 32" in different.stdout
    missing = python("-m", "tools.inspect", tmp_path / "no")
    assert missing.returncode == 2 and missing.stderr.startswith("error: ")
    assert missing.stderr.count("\n") == 1
