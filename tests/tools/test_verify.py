"""tools.verify as a user runs it, and what its checks say of a conversion that is wrong."""

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import ml_dtypes  # noqa: F401 (with it NumPy knows bfloat16)
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrl.config import MeshSection
from jaxrl.models.config import load_config
from jaxrl.types import Group, Prompt, Rollout
from tools.mesh_option import parse_mesh
from tools.verify import case as cases
from tools.verify import checks
from tools.verify.__main__ import main, parse, set_environment
from tools.verify.case import Case, Options
from tools.verify.compare import first_difference
from tools.verify.engine import Published
from tools.verify.made_up import make_weights, with_fewer_layers
from tools.verify.ours import perturbed
from tools.verify.report import clean_stdout

pytest.importorskip("torch")
pytest.importorskip("transformers")

ROOT = Path(__file__).parent.parent.parent
DEMO = ROOT / "configs" / "tiny_policy"
NAMES = [name for name, _, _ in checks.CHECKS]
WITHOUT_ENGINE = NAMES[:-2]
MOE = {  # a published config.json of 48 layers, made small
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def tool(*arguments, folder):
    """Runs the tool in a process of its own, its temporary files under `folder`."""
    unset = ("XLA_FLAGS", "JAX_PLATFORMS")  # as a user has it, and not as these tests do
    environment = {name: text for name, text in os.environ.items() if name not in unset}
    return subprocess.run(
        [sys.executable, "-m", "tools.verify", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment | {"TMPDIR": str(folder)},
        timeout=300,
    )


def statuses(stdout):
    lines = [line for line in stdout.splitlines()[2:-1] if not line.startswith(" ")]
    return {line[:22].rstrip(): line[23:31].rstrip() for line in lines}


def make_gemma(folder):
    """Windows on some layers, two rotary embeddings, norms of 1 + w, soft caps, tied."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=120,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        max_position_embeddings=512,
        initializer_range=0.15,
    )
    model = Gemma3ForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(-0.5, 0.5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def case():
    """The demo's policy; what a test breaks of it is broken for that test alone."""
    return Case(Options(model_dir=DEMO, tokens=6), DEMO, "weights of its files")


def changed(monkeypatch, change):
    """From here on the loader gets something wrong: `change` is given the stacked layers."""
    from bridge import checkpoints

    load = checkpoints.load_params

    def load_wrongly(*args, **kwargs):
        params = load(*args, **kwargs)
        change(params["layers"])
        return params

    monkeypatch.setattr(checkpoints, "load_params", load_wrongly)


def swap_heads(layers):
    query = layers["attention"]["query"]
    layers["attention"]["query"] = query.at[1, :, :2].set(query[1, :, 1::-1])


def test_the_demo_passes_every_check_with_a_real_engine():
    engine = ["--engine", "vllm"] if importlib.util.find_spec("vllm") else []
    names = NAMES if engine else WITHOUT_ENGINE
    done = tool(
        DEMO, *engine, "--tokens", "4", folder=tempfile.gettempdir()
    )  # Ray wants a short path
    assert done.returncode == 0, done.stdout + done.stderr
    assert statuses(done.stdout) == dict.fromkeys(names, "pass")
    lines = done.stdout.splitlines()
    assert lines[0].endswith("tiny_policy: weights of its files")
    assert lines[-1] == f"{len(names)} pass"
    assert len(lines) == 2 + len(names) + 2, "something else was printed"
    kept = "vocab = 313 is not a multiple of mesh.tensor, and is kept whole"
    assert lines[2 + len(WITHOUT_ENGINE)].endswith(kept)
    assert "Traceback" not in done.stderr
    if not engine:
        pytest.skip("there is no vllm; every other check passed")


def test_json_is_one_object_with_the_numbers(tmp_path, monkeypatch, capfd):
    model, scratch = make_gemma(tmp_path / "gemma"), tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    code = main([str(model), "--json", "--mesh", "fsdp=2,tensor=2", "--tokens", "4"])
    out, err = capfd.readouterr()
    assert code == 0, out + err
    report = json.loads(out)
    found = {check["name"]: check for check in report["checks"]}
    assert report["ok"] and list(found) == WITHOUT_ENGINE
    skipped = {name for name, check in found.items() if check["status"] == "skipped"}
    assert skipped == {"logits, text"} and "tokenizer.json" in found["logits, text"]["measured"]
    raw = load_file(model / "model.safetensors")
    assert found["config"]["values"]["parameters"] == sum(x.size for x in raw.values())
    assert found["tensors"]["values"]["tensors"] == len(raw)
    assert found["tensors"]["values"]["bytes"] == sum(x.nbytes for x in raw.values())
    assert found["round trip"]["values"] == {"equal": len(raw), "different": []}
    logits = found["logits, random tokens"]["values"]
    assert logits["positions"] == 2 * 64 and logits["agree"] == 2 * 64
    assert 0 < logits["ratio"] < 1e-5 and logits["range"] > 1
    assert found["logits, bfloat16"]["values"]["ratio"] > 1e-4
    assert found["greedy tokens"]["values"]["equal"] == 12
    assert found["mesh"]["values"]["mesh"] == "data=1,fsdp=2,expert=1,tensor=2"
    assert "kv_heads = 1" in found["mesh"]["values"]["kept_whole"][0]
    assert not list(scratch.glob("jaxrl-verify*")), "something was left behind"


def test_made_up_weights_need_only_a_config(tmp_path, monkeypatch, capfd):
    model = tmp_path / "moe"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(MOE))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = main([str(model), "--random-weights", "--layers", "2", "--tokens", "4"])
    out, err = capfd.readouterr()
    assert code == 0, out + err
    assert out.startswith(f"{model}: weights are made up, seed 0; 2 of 48 layers\n")
    passed = dict.fromkeys(WITHOUT_ENGINE, "pass") | {"logits, text": "skipped"}
    assert statuses(out) == passed
    # Embedding, head, final norm; q k v o and their norms, two norms, router; three an expert.
    assert f"{3 + 2 * (6 + 2 + 1 + 3 * 4)} tensors" in out
    assert [path.name for path in tmp_path.iterdir()] == ["moe"], "something was left behind"
    assert [path.name for path in model.iterdir()] == ["config.json"]


def test_a_wrong_conversion_fails_and_says_where(monkeypatch, capfd):
    changed(monkeypatch, swap_heads)
    assert main([str(DEMO), "--tokens", "6"]) == 1
    out, _ = capfd.readouterr()
    found = statuses(out)
    assert found["tensors"] == "pass" and found["logits, random tokens"] == "FAIL"
    assert found["round trip"] == found["logits, text"] == found["greedy tokens"] == "FAIL"
    assert found["mesh"] == "FAIL"  # what it exports is wrong as well
    assert "- model.layers.1.self_attn.q_proj.weight: other bytes" in out
    assert "model.layers.0" not in out


def test_wrong_mathematics_fails_though_every_byte_is_right(monkeypatch, case):
    right = load_config(DEMO)
    monkeypatch.setattr(cases, "load_config", lambda *_: dataclasses.replace(right, norm_eps=1e-3))
    assert checks.check_round_trip("round trip", case).status == "pass"
    assert checks.check_random_logits("logits", case).status == "FAIL"
    assert checks.check_text_logits("logits", case).status == "FAIL"


def test_the_last_bit_of_one_weight_shows(monkeypatch, case):
    def nudge(layers):
        scale = layers["mlp_norm"]["scale"]
        layers["mlp_norm"]["scale"] = scale.at[0, 3].set(scale[0, 3] * (1 + 2**-7))

    changed(monkeypatch, nudge)
    check = checks.check_round_trip("round trip", case)
    assert check.status == "FAIL"
    assert check.values["different"] == ["model.layers.0.post_attention_layernorm.weight"]


def test_a_missing_tensor_is_named_and_what_needs_it_is_skipped(tmp_path, capfd):
    shutil.copytree(DEMO, tmp_path / "model")
    file, name = tmp_path / "model" / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file)
    assert main([str(tmp_path / "model")]) == 1
    out, err = capfd.readouterr()
    found = statuses(out)
    assert name in out and found.pop("tensors") == "FAIL" and found.pop("config") == "pass"
    assert "Traceback" not in err
    assert {found[check] for check in WITHOUT_ENGINE[2:]} == {"skipped"}


def test_a_head_that_is_not_the_tied_embedding_is_not_passed_over(tmp_path):
    shutil.copytree(DEMO, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    for factor, status in ((1, "pass"), (2, "FAIL")):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * factor
        save_file(tensors, file)
        model = tmp_path / "model"
        check = checks.check_tensors("tensors", Case(Options(model_dir=model), model, ""))
        assert check.status == status
        assert "lm_head.weight" in f"{check.measured} {check.details}"


def test_an_unknown_field_is_this_tools_to_ignore(tmp_path, capfd):
    shutil.copytree(DEMO, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"novelty": 3}))
    assert main([str(tmp_path / "model")]) == 1
    out, _ = capfd.readouterr()
    assert "novelty = 3" in out and "--ignore-field" in out and "model.ignore" not in out
    options = Options(model_dir=path.parent, ignore=("novelty",))
    assert Case(options, path.parent, "").config == load_config(DEMO)


def huge(folder):
    (folder / "config.json").write_text(json.dumps(MOE | {"vocab_size": 10**11}))
    return ["--random-weights"]


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (lambda folder: shutil.rmtree(folder) or [], "no such directory"),
        (lambda folder: [], "no config.json"),
        (lambda folder: shutil.copy(DEMO / "config.json", folder) and [], "--random-weights"),
        (lambda folder: shutil.copytree(DEMO, folder, dirs_exist_ok=True) and ["--layers", "1"],
         "--layers needs --random-weights"),
        (lambda folder: shutil.copytree(DEMO, folder, dirs_exist_ok=True)
         and ["--mesh", "data=16,tensor=2"], "= 32 devices, and jax sees 8"),
        (huge, "keep fewer layers: --layers N"),
    ],
    ids=["nothing", "no-config", "no-weights", "layers", "mesh", "too-large"],
)  # fmt: skip
def test_a_mistake_is_one_line(prepare, says, tmp_path, capfd):
    folder = tmp_path / "model"
    folder.mkdir()
    assert main([str(folder), *prepare(folder)]) == 2
    out, err = capfd.readouterr()
    assert not out and says in err
    assert len([line for line in err.splitlines() if not line.startswith("...")]) == 1


@pytest.mark.parametrize("text", ["fsdp", "fsdp=0", "rows=2", "fsdp=2;tensor=2", "fsdp=-1"])
def test_a_mesh_that_is_not_one(text, capfd):
    with pytest.raises(SystemExit) as ended:
        parse([str(DEMO), "--mesh", text])
    assert ended.value.code == 2 and text in capfd.readouterr().err


def test_a_mesh_is_sizes_by_name():
    assert parse_mesh("tensor=4,fsdp=2") == MeshSection(data=1, fsdp=2, tensor=4)


def test_simulated_devices_are_for_those_who_set_nothing(monkeypatch):
    flag = "--xla_force_host_platform_device_count="
    options = Options(model_dir=DEMO, mesh=MeshSection(data=1, fsdp=3, tensor=2))
    for flags, platform, expected in [
        ("", "", f"{flag}6"),
        ("--xla_dump_to=x", "cpu", f"--xla_dump_to=x {flag}6"),
        ("", "cuda", ""),
        (f"{flag}2", "", f"{flag}2"),
    ]:
        monkeypatch.setenv("XLA_FLAGS", flags)
        monkeypatch.setenv("JAX_PLATFORMS", platform)
        set_environment(options)
        assert os.environ["XLA_FLAGS"] == expected


def test_fewer_layers_keep_one_of_each_kind():
    kinds = ["sliding"] * 5 + ["full"]
    raw = {"num_hidden_layers": 6, "mlp_only_layers": [1, 4], "eos_token_id": [1] * 6}
    small = with_fewer_layers(raw, 2, kinds)
    assert small == {
        "num_hidden_layers": 2,
        "mlp_only_layers": [1],
        "eos_token_id": [1] * 6,
        "layer_types": ["sliding", "full"],
    }
    assert with_fewer_layers(raw, 1, kinds)["layer_types"] == ["sliding"]
    assert "layer_types" not in with_fewer_layers(raw, 2, ["full"] * 6)


def test_made_up_weights_leave_nothing_as_it_began(tmp_path):
    config = json.dumps(MOE | {"num_hidden_layers": 1})
    (tmp_path / "config.json").write_text(config)
    make_weights(tmp_path, seed=0)
    assert (tmp_path / "config.json").read_text() == config, "not as its owner spells it"
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        assert tensor.dtype.name == "bfloat16"
        spread = tensor.astype(np.float32).std()
        assert (
            spread > 0.2
            if tensor.ndim == 1
            else spread == pytest.approx(tensor.shape[-1] ** -0.5, rel=0.3)
        ), name


LOGITS = np.array([[0.0, 3.0, 1.0], [2.0, 1.9995, 0.0], [0.0, 0.0, 5.0]], np.float32)
LOGPROBS = np.log(np.exp(LOGITS.max(-1)) / np.exp(LOGITS).sum(-1))


@pytest.mark.parametrize(
    ("ours", "equal", "bad"),
    [([1, 0, 2], 3, False), ([1, 1, 0], 1, False), ([1, 2, 2], 1, True), ([1, 0], 0, True)],
    ids=["equal", "near-tie", "another", "shorter"],
)
def test_greedy_tokens_may_differ_at_a_near_tie_alone(ours, equal, bad):
    theirs = LOGITS.argmax(-1)
    found = first_difference(np.array(ours), LOGPROBS[: len(ours)], theirs, LOGITS)
    assert (found.equal, found.bad) == (equal, bad)
    assert found.logprobs < 1e-6
    assert ("near-tie" in found.words) == (equal == 1 and not bad)


def test_greedy_logprobs_count_where_the_tokens_are_equal():
    theirs = LOGITS.argmax(-1)
    wrong = LOGPROBS + np.array([0, 0, 0.25])
    assert first_difference(theirs, wrong, theirs, LOGITS).logprobs == pytest.approx(0.25)


def test_another_greedy_token_fails(monkeypatch, case):
    right = checks.our_greedy(case.config, case.params, case.prompts, case.options.tokens)
    rollout = right[0].rollouts[0]
    tokens = rollout.tokens.copy()
    tokens[3] = (tokens[3] + 1) % 300
    wrong = Group(Prompt(0, "", (1,), {}), (dataclasses.replace(rollout, tokens=tokens),))
    assert isinstance(wrong.rollouts[0], Rollout)
    monkeypatch.setattr(checks, "our_greedy", lambda *_: [wrong, *right[1:]])
    check = checks.check_greedy("greedy tokens", case)
    assert check.status == "FAIL" and check.values["equal"] == 3 + 6 + 6
    assert check.details[0].startswith("prompt 0: token 3 is")


def test_a_difference_that_is_not_a_number_fails(monkeypatch, case):
    import jax.numpy as jnp

    def spoil(layers):
        layers["mlp"]["down"] = layers["mlp"]["down"].at[0, 0, 0].set(jnp.nan)

    changed(monkeypatch, spoil)
    for check in (checks.check_random_logits, checks.check_bfloat16):
        result = checks.attempt("logits", check, case)
        assert result.status == "FAIL"
        json.dumps(result.record(), allow_nan=False)


def test_a_mesh_that_computes_or_exports_something_else_fails(monkeypatch, case):
    _ = case.params  # on one device, and right
    changed(monkeypatch, swap_heads)
    with monkeypatch.context() as patch:
        patch.setattr(checks, "differing", lambda *_: [])
        computes = checks.check_mesh("mesh", case)
    monkeypatch.setattr(checks, "our_logits", lambda *_: np.eye(2, dtype=np.float32))
    exports = checks.check_mesh("mesh", case)
    assert computes.status == exports.status == "FAIL"
    assert computes.values["ratio"] > 1e-3 and exports.values["ratio"] == 0
    assert exports.values["different"] == ["model.layers.1.self_attn.q_proj.weight"]


def engine_says(case, *published):
    """A case whose engine has done its work."""
    case.engine.version, case.__dict__["published"] = "0", published
    return checks.check_engine_digest("d", case), checks.check_engine_logprobs("l", case)


def test_what_an_engine_says_is_held_against_what_was_sent(case):
    old, new = np.zeros(4, np.float32), np.full(4, 0.5, np.float32)
    first = Published(1, "a", "a", old, old + 1e-6)
    served = Published(2, "b", "b", new, new)
    for second, expected in [
        (served, ("pass", "pass")),
        (dataclasses.replace(served, said="a"), ("FAIL", "pass")),
        (dataclasses.replace(served, theirs=old), ("pass", "FAIL")),  # a tensor not updated
        (dataclasses.replace(served, theirs=new * np.nan), ("pass", "FAIL")),
        (dataclasses.replace(served, ours=old, theirs=old), ("pass", "FAIL")),  # proves nothing
    ]:
        assert tuple(check.status for check in engine_says(case, first, second)) == expected
    case.close()


def test_every_tensor_is_perturbed():
    import jax
    import jax.numpy as jnp

    params = {"norm": jnp.ones(8), "bias": jnp.zeros(8), "matrix": jnp.arange(8.0).reshape(2, 4)}
    after = perturbed(params, 0)
    ratios = jax.tree.map(lambda now, before: np.unique(now / before).size, after, params)
    assert ratios["matrix"] == ratios["norm"] == 8, "a factor, which a norm behind it undoes"
    for name, now in after.items():
        assert bool((params[name] != now).all()) and now.dtype == np.float32


def test_an_engine_that_cannot_start_is_one_line(monkeypatch, case):
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        case.engine.start()
    check = checks.attempt("engine digest", checks.check_engine_digest, case)
    case.close()
    assert check.status == "FAIL" and "not installed; pip install" in check.measured
    assert not check.details


def test_what_others_print_stays_off_stdout(capfd):
    with clean_stdout() as out:
        print("python's")
        os.write(1, b"a library's\n")
        print("ours", file=out)
    print("after")
    printed, other = capfd.readouterr()
    assert printed == "ours\nafter\n" and "python's" in other and "a library's" in other
