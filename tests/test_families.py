"""One decoder is every family: what transformers computes, from the files that transformers writes.

The models are tiny, with real structure: windows shorter than the rows, both kinds of layers, heads
whose size is not hidden_size / heads, an odd vocabulary, and no norm, bias or sink that does
nothing. The real sizes are those of the configurations of published models, at the end.
"""

import copy
import dataclasses
import functools
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from bridge.checkpoints import load_params
from bridge.export import Exporter
from jaxrl.config import MeshSection
from jaxrl.mesh import kept_whole, make_mesh, param_shardings
from jaxrl.models.attention import Packed
from jaxrl.models.config import FAMILIES as ARCHITECTURES
from jaxrl.models.config import load_config
from jaxrl.models.decoder import Policy
from jaxrl.models.params import param_specs
from jaxrl.sampler import InProcessEngine
from jaxrl.types import Prompt, Sampling, UserError
from tests.reference_policy import FAMILIES, FAMILY_VOCAB, family_model, logits_of

TOKENS_BT = np.random.default_rng(0).integers(1, FAMILY_VOCAB, (2, 70)).astype(np.int32)
SPLIT = MeshSection(data=2, fsdp=2, tensor=2)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """directory(name) -> where the family's model was saved by transformers."""
    root = tmp_path_factory.mktemp("families")

    @functools.cache
    def save(name):
        family_model(name).save_pretrained(root / name)
        return root / name

    return save


@pytest.fixture(scope="module")
def load(directory):
    """load(name) -> (policy, params) on one device, float32."""

    @functools.cache
    def read(name, mesh=MeshSection()):  # noqa: B008, immutable
        config = load_config(directory(name))
        specs = param_specs(config)
        shardings = param_shardings(specs, make_mesh(mesh))
        return Policy(config, jnp.float32), load_params(directory(name), specs, shardings)

    return read


@pytest.fixture(scope="module")
def logits(load):
    """logits(name) -> ours of TOKENS_BT, on one device."""

    @functools.cache
    def run(name):
        policy, params = load(name)
        return np.asarray(jax.jit(policy.logits)(params, TOKENS_BT))

    return run


def raw_config(directory) -> dict:
    return json.loads((directory / "config.json").read_text())


def read(tmp_path, raw: dict, ignore=()):
    (tmp_path / "config.json").write_text(json.dumps(raw))
    return load_config(tmp_path, ignore)


# --- the mathematics ---


def test_every_family_is_among_the_references():
    names = {f"{family.removesuffix('Text')}ForCausalLM" for family, _ in FAMILIES.values()}
    assert names == ARCHITECTURES.keys()


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_those_of_transformers(name, logits):
    expected_BTV = logits_of(family_model(name), TOKENS_BT)
    assert expected_BTV.std() > 0.3  # the comparison is not one of zeros
    error = np.abs(logits(name) - expected_BTV).max()
    assert error < 2e-5 * np.ptp(expected_BTV)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_was_read_is_exported_under_the_same_names_bit_for_bit(name, directory, load):
    policy, params = load(name)
    exported = Exporter(param_specs(policy.config), "float32")(params)
    saved = load_file(directory(name) / "model.safetensors")
    assert len(exported) == len(saved)
    for tensor in exported:
        expected = saved[tensor.name]
        assert (tensor.dtype, tensor.shape) == ("float32", expected.shape), tensor.name
        assert tensor.data.tobytes() == expected.tobytes(), tensor.name


def test_a_model_in_bfloat16_stays_near_its_float32_self(load, logits):
    """Soft caps, multipliers and expert shares are rounded too."""
    for name in ("gemma3", "gpt_oss", "granite"):
        policy, params = load(name)
        found = jax.jit(Policy(policy.config, jnp.bfloat16).logits)(params, TOKENS_BT)
        assert found.dtype == np.float32
        error = np.abs(np.asarray(found) - logits(name)).mean() / logits(name).std()
        assert 1e-4 < error < 0.15, name


def test_bfloat16_tells_distant_positions_apart(load, logits):
    """Only distances count, so rows that start at 400 have the logits of rows that start at 0."""
    policy, params = load("llama")
    B, T = TOKENS_BT.shape
    apply = jax.jit(Policy(policy.config, jnp.bfloat16).apply)

    def error(positions_BT):
        found_BTV, _ = apply(
            params, TOKENS_BT, positions_BT, Packed(np.ones((B, T), int), None, positions_BT)
        )
        return np.abs(np.asarray(found_BTV) - logits("llama")).mean()

    near_BT = np.broadcast_to(np.arange(T), (B, T))
    assert 0 < error(near_BT + 400) < 1.5 * error(near_BT)


# --- on a mesh ---


def gradients(policy, params):
    """With the optimizations that other tests go without: their sums round less."""

    def loss(params):
        return (jax.nn.log_softmax(policy.logits(params, TOKENS_BT)) ** 2).mean()

    optimized = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
    return jax.jit(jax.grad(loss), compiler_options=optimized)(params)


def assert_relative(found, expected, tolerance):
    """Each leaf to `tolerance` of its own largest entry."""
    paths, _ = jax.tree_util.tree_flatten_with_path(expected)
    for (path, leaf), other in zip(paths, jax.tree.leaves(found), strict=True):
        leaf, other = np.asarray(leaf), np.asarray(other)
        largest = np.abs(leaf).max()
        assert largest > 0, path
        np.testing.assert_allclose(other, leaf, rtol=0, atol=tolerance * largest, err_msg=str(path))


@pytest.mark.parametrize(
    "name",
    ["qwen2_yarn_one_kv_head", "gemma3", "phi3_half_rotary_window", "qwen3_moe", "gpt_oss"],
)
def test_a_mesh_gives_the_logits_of_one_device(name, load, logits):
    policy, params = load(name, SPLIT)
    specs, mesh = param_specs(policy.config), make_mesh(SPLIT)
    whole = " ".join(kept_whole(specs, mesh))
    assert "vocab = 99" in whole
    assert ("kv_heads = 1 " in whole) == (policy.config.num_kv_heads == 1)
    query = params["layers"]["attention"]["query"]
    parts = {shard.data.shape for shard in query.addressable_shards}
    layers, _, size, _ = query.shape
    assert parts == {(layers, 4 // 2, size, 64 // 2)}  # it really is split
    found = np.asarray(jax.jit(policy.logits)(params, TOKENS_BT))
    np.testing.assert_allclose(found, logits(name), rtol=0, atol=1e-5 * np.ptp(logits(name)))


def test_a_mesh_gives_the_gradients_of_one_device(load):
    """Of biases and a tied head too; tests/test_packed_policy.py has experts and windows."""
    name = "llama_biases_linear_tied"
    one, many = gradients(*load(name)), gradients(*load(name, SPLIT))
    assert_relative(many, one, 1e-4)


@pytest.mark.parametrize("name", ["gemma3", "qwen3_moe", "gpt_oss"])
def test_gradients_are_those_of_torch(name, load, tmp_path):
    """The model of transformers with gradients for weights is saved, and so named as weights."""
    policy, params = load(name)
    exported = Exporter(param_specs(policy.config), "float32")(gradients(policy, params))
    model = copy.deepcopy(family_model(name))
    logs_BTV = torch.log_softmax(model(torch.tensor(TOKENS_BT).long()).logits, -1)
    (logs_BTV**2).mean().backward()
    with torch.no_grad():
        for weight in model.parameters():
            assert weight.grad is not None
            weight.copy_(weight.grad)
    model.save_pretrained(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    assert {tensor.name for tensor in exported} == expected.keys()
    for tensor in exported:
        gradient = expected[tensor.name]
        found = tensor.data.view(np.float32).reshape(tensor.shape)
        largest = np.abs(gradient).max()
        assert largest > 0, tensor.name
        np.testing.assert_allclose(
            found, gradient, rtol=0, atol=1e-4 * largest, err_msg=tensor.name
        )


# --- sampling ---


@pytest.mark.parametrize("name", ["gemma3", "qwen3_moe"])
def test_greedy_equals_generate_of_transformers_beyond_the_window(name, load):
    """Prompts of different lengths in one batch: slots of the cache are not positions."""
    policy, params = load(name)
    rng = np.random.default_rng(1)
    prompts = [
        Prompt(i, "", tuple(rng.integers(0, FAMILY_VOCAB, length).tolist()), {})
        for i, length in enumerate((23, 1, 9))
    ]
    engine, model = InProcessEngine(policy), family_model(name)
    engine.publish(params, 0)
    count = 24
    assert policy.config.sliding_window is None or policy.config.sliding_window < count
    groups = engine.generate(prompts, Sampling(1, count, 0.0, ()), [0] * len(prompts))
    for prompt, group in zip(prompts, groups, strict=True):
        (rollout,) = group.rollouts
        generated = model.generate(
            torch.tensor([prompt.tokens]),
            attention_mask=torch.ones(1, len(prompt.tokens), dtype=torch.long),
            do_sample=False,
            max_new_tokens=count,
            min_new_tokens=count,
            eos_token_id=None,
            pad_token_id=0,
        )
        start = len(prompt.tokens)
        assert rollout.tokens.tolist() == generated[0, start:].tolist()
        logs_TV = torch.log_softmax(torch.tensor(logits_of(model, generated))[0].double(), -1)
        expected = logs_TV[start - 1 : -1].gather(-1, generated[0, start:, None])[:, 0]
        np.testing.assert_allclose(rollout.logprobs, expected, atol=1e-4)


# --- how a configuration is spelled ---


def older(raw: dict) -> dict:
    """The same configuration in the spelling of transformers 4, without what need not be said."""
    raw = dict(raw)
    rope = raw.pop("rope_parameters")
    raw.pop("layer_types", None)
    raw["torch_dtype"] = raw.pop("dtype")
    if "full_attention" in rope:
        raw["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
        raw["sliding_window_pattern"] = raw.pop("_sliding_window_pattern")
    rope = dict(rope)
    raw["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        raw["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    kind = rope.pop("rope_type")
    if kind == "longrope":
        rope.pop("original_max_position_embeddings")  # beside it, with Phi-3
        rope["type"] = "su"
    elif kind in ("linear", "yarn"):
        rope["type"] = kind
    else:
        rope["rope_type"] = kind
    raw["rope_scaling"] = None if kind == "default" else rope
    if raw["num_key_value_heads"] == raw["num_attention_heads"]:
        del raw["num_key_value_heads"]
    computed = raw["hidden_size"] // raw["num_attention_heads"]
    if raw["model_type"] in ("llama", "mistral", "mixtral") and raw["head_dim"] == computed:
        del raw["head_dim"]
    if raw["tie_word_embeddings"] == raw["model_type"].startswith("gemma"):
        del raw["tie_word_embeddings"]
    if raw["model_type"] == "qwen3_moe":
        raw["num_experts"] = raw.pop("num_local_experts")
    return raw


@pytest.mark.parametrize("name", FAMILIES)
def test_the_older_spelling_of_a_config_says_the_same(name, directory, tmp_path):
    new = load_config(directory(name))
    assert read(tmp_path, older(raw_config(directory(name)))) == new


def test_the_older_spelling_leaves_out_what_it_should(directory):
    """So that the test above says something: between them the references leave out everything."""
    gone = {
        name: raw_config(directory(name)).keys() - older(raw_config(directory(name))).keys()
        for name in FAMILIES
    }
    assert set().union(*gone.values()) == {
        "rope_parameters",
        "layer_types",
        "dtype",
        "head_dim",
        "num_key_value_heads",
        "tie_word_embeddings",
        "_sliding_window_pattern",
        "num_local_experts",
    }


def test_layer_types_go_before_the_pattern_of_the_family(directory, tmp_path):
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    for name in ("gemma2", "gemma3", "gpt_oss", "qwen2_windows_from_layer_1"):
        config = read(tmp_path, raw_config(directory(name)) | {"layer_types": kinds})
        assert config.sliding == (False, True, True, False), name


def test_both_spellings_at_once_as_the_last_transformers_4_wrote_them(directory, tmp_path):
    raw = raw_config(directory("qwen3_moe"))
    both = raw | {"rope_theta": 10_000.0, "rope_scaling": None}
    assert read(tmp_path, both) == load_config(directory("qwen3_moe"))


_BARE = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_BARE_OF = {
    "Qwen3Moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "Mixtral": {"num_local_experts": 8},
    "GptOss": {"num_local_experts": 32},
    # Long contexts ask for what they need: without `use_sliding_window` nothing slides.
    "Qwen2": {"sliding_window": 8},
}


@pytest.mark.parametrize("family", sorted({family for family, _ in FAMILIES.values()}))
def test_fields_left_out_mean_what_they_mean_to_transformers(family, tmp_path):
    bare: dict[str, Any] = _BARE | _BARE_OF.get(family, {})
    full = getattr(transformers, f"{family}Config")(**bare).to_dict()
    bare["architectures"] = [f"{family.removesuffix('Text')}ForCausalLM"]
    full["architectures"] = bare["architectures"]
    ours, theirs = read(tmp_path, bare), read(tmp_path, full)
    assert dataclasses.asdict(ours) == dataclasses.asdict(theirs)


# --- what is refused ---


@pytest.mark.parametrize("name", FAMILIES)
def test_an_unknown_field_that_says_something_is_refused_by_name(name, directory, tmp_path):
    raw = raw_config(directory(name))
    with pytest.raises(UserError, match=r"attention_twist = 0\.5 .*model\.ignore_config_fields"):
        read(tmp_path, raw | {"attention_twist": 0.5})
    known = load_config(directory(name))
    assert read(tmp_path, raw | {"attention_twist": 0.5}, ignore=["attention_twist"]) == known
    for nothing in (None, False):
        assert read(tmp_path, raw | {"attention_twist": nothing}) == known


def test_several_problems_are_reported_together(directory, tmp_path):
    raw = raw_config(directory("gemma2")) | {
        "hidden_activation": "relu",
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4},
        "attention_twist": 0.5,
        "moe_twist": [1],
        "layer_types": ["full_attention"],
    }
    with pytest.raises(UserError) as error:
        read(tmp_path, raw)
    for said in (
        "config.json",
        "hidden_activation = 'relu'",
        "rope_type = 'dynamic'",
        "attention_twist = 0.5",
        "moe_twist = [1]",
        "layer_types = ['full_attention']",
    ):
        assert said in str(error.value)
    assert "\n" not in str(error.value).strip()


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("llama", "hidden_act", "gelu"),
        ("llama", "quantization_config", {"quant_method": "mxfp4"}),
        ("llama", "is_encoder_decoder", True),
        ("llama", "layer_types", ["sliding_attention", "full_attention"]),
        ("llama", "sliding_window", 16),
        ("qwen3_biases", "layer_types", ["chunked_attention", "full_attention"]),
        ("gemma2", "hidden_activation", "gelu"),
        ("gemma2", "use_bidirectional_attention", True),
        ("gemma3", "attn_logit_softcapping", 50.0),
        ("qwen3_moe", "use_sliding_window", True),
        ("qwen3_moe", "mlp_only_layers", [1]),
        ("qwen3_moe", "decoder_sparse_step", 2),
        ("qwen3_moe", "num_experts_per_tok", 9),
        ("phi3_longrope_tied", "full_attn_mod", 2),
        ("gpt_oss", "swiglu_limit", 5.0),
        ("gpt_oss", "swiglu_alpha", 1.0),
        ("gpt_oss", "experts_per_token", 3),
        ("phi3_longrope_tied", "hidden_act", "gelu"),
        ("olmo2", "clip_qkv", 8.0),
        ("mixtral_window", "num_experts", 4),
    ],
)
def test_a_field_that_changes_the_mathematics_and_is_not_supported_is_refused(
    name, field, value, directory, tmp_path
):
    with pytest.raises(UserError, match=field):
        read(tmp_path, raw_config(directory(name)) | {field: value})


@pytest.mark.parametrize(
    ("rope", "said"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "dynamic"),
        ({"rope_type": "linear"}, "needs factor"),
        ({"rope_type": "default", "factor": 2.0}, "does not read factor"),
        ({"rope_type": "llama3", "factor": 2.0}, "needs high_freq_factor"),
        ({"rope_type": "longrope", "short_factor": [1.0] * 3, "long_factor": [1.0] * 3}, "short_"),
        ({"rope_type": "yarn", "factor": 2.0, "mrope_section": [1]}, "mrope_section"),
    ],
)
def test_a_rope_that_is_not_understood_is_refused_by_name(rope, said, directory, tmp_path):
    raw = raw_config(directory("llama")) | {"rope_parameters": {"rope_theta": 1e4} | rope}
    with pytest.raises(UserError, match=said):
        read(tmp_path, raw)


STRANGE = ["x", "", -1, 0, 0.5, 1e300, None, True]
STRANGE += [[], [None], ["x"], {}, {"a": 1}, {"rope_type": []}]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_strange_value_is_an_error_that_names_the_file_and_never_another(
    name, directory, tmp_path
):
    raw = raw_config(directory(name))
    for field in raw:
        for value in STRANGE:
            strange = [raw | {field: value}]
            if field == "rope_parameters":
                strange += [raw | {field: raw[field] | {inner: value}} for inner in raw[field]]
            for changed in strange:
                try:
                    read(tmp_path, changed)
                except UserError as error:
                    assert "config.json" in str(error), (field, value)
                except Exception as error:
                    raise AssertionError(f"{field} = {value!r}") from error


@pytest.mark.parametrize(
    "field",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "sliding_window",
        "rms_norm_eps",
        "max_position_embeddings",
        "query_pre_attn_scalar",
        "final_logit_softcapping",
        "attn_logit_softcapping",
    ],
)
@pytest.mark.parametrize("value", ["x", [1], {}, -3])
def test_what_is_not_a_number_is_refused_where_one_must_stand(field, value, directory, tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        read(tmp_path, raw_config(directory("gemma2")) | {field: value})


# --- configurations of published models ---

HUB = {
    "Llama-3.2-1B": """{"architectures": ["LlamaForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": 128001, "head_dim": 64,
        "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": false,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16,
        "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling":
        {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "rope_theta": 500000.0,
        "tie_word_embeddings": true, "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0", "use_cache": true, "vocab_size": 128256}""",
    "Qwen2.5-7B": """{"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0,
        "bos_token_id": 151643, "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 3584,
        "initializer_range": 0.02, "intermediate_size": 18944, "max_position_embeddings": 131072,
        "max_window_layers": 28, "model_type": "qwen2", "num_attention_heads": 28,
        "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": false,
        "torch_dtype": "bfloat16", "transformers_version": "4.40.1", "use_cache": true,
        "use_mrope": false, "use_sliding_window": false, "vocab_size": 152064}""",
    "Qwen3-0.6B": """{"architectures": ["Qwen3ForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02,
        "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
        "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": null,
        "rope_theta": 1000000, "sliding_window": null, "tie_word_embeddings": true,
        "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": true,
        "use_sliding_window": false, "vocab_size": 151936}""",
    "gemma-2-2b": """{"architectures": ["Gemma2ForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "attn_logit_softcapping": 50.0, "bos_token_id": 2,
        "cache_implementation": "hybrid", "eos_token_id": 1, "final_logit_softcapping": 30.0,
        "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304, "initializer_range": 0.02,
        "intermediate_size": 9216, "max_position_embeddings": 8192, "model_type": "gemma2",
        "num_attention_heads": 8, "num_hidden_layers": 26, "num_key_value_heads": 4,
        "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0, "sliding_window": 4096, "torch_dtype": "float32",
        "transformers_version": "4.42.4", "use_cache": true, "vocab_size": 256000}""",
    "gemma-3-1b-it": """{"architectures": ["Gemma3ForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "attn_logit_softcapping": null, "bos_token_id": 2,
        "cache_implementation": "hybrid", "eos_token_id": [1, 106],
        "final_logit_softcapping": null, "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "initializer_range": 0.02,
        "intermediate_size": 6912, "max_position_embeddings": 32768, "model_type": "gemma3_text",
        "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
        "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000, "rope_scaling": null, "rope_theta": 1000000,
        "sliding_window": 512, "sliding_window_pattern": 6, "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0", "use_cache": true, "vocab_size": 262144}""",
    "Phi-3-mini-4k": """{"_name_or_path": "Phi-3-mini-4k-instruct",
        "architectures": ["Phi3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}, "bos_token_id": 1,
        "embd_pdrop": 0.0, "eos_token_id": 32000, "hidden_act": "silu", "hidden_size": 3072,
        "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 4096,
        "model_type": "phi3", "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 32, "original_max_position_embeddings": 4096,
        "pad_token_id": 32000, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_scaling": null,
        "rope_theta": 10000.0, "sliding_window": 2047, "tie_word_embeddings": false,
        "torch_dtype": "bfloat16", "transformers_version": "4.40.2", "use_cache": true,
        "vocab_size": 32064}""",
    "Phi-4-mini": """{"_name_or_path": "Phi-4-mini-instruct",
        "architectures": ["Phi3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
        "AutoTokenizer": "Xenova/gpt-4o"}, "bos_token_id": 199999, "embd_pdrop": 0.0,
        "eos_token_id": 199999, "full_attn_mod": 1, "hidden_act": "silu", "hidden_size": 3072,
        "initializer_range": 0.02, "intermediate_size": 8192, "interpolate_factor": 1,
        "lm_head_bias": false, "max_position_embeddings": 131072, "mlp_bias": false,
        "model_type": "phi3", "num_attention_heads": 24, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "original_max_position_embeddings": 4096,
        "pad_token_id": 199999, "partial_rotary_factor": 0.75, "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05, "rope_scaling": {"long_factor": [LONG_48], "short_factor":
        [SHORT_48], "type": "longrope"}, "rope_theta": 10000.0, "sliding_window": 262144,
        "tie_word_embeddings": true, "torch_dtype": "bfloat16", "transformers_version": "4.45.0",
        "use_cache": true, "vocab_size": 200064}""",
    "OLMo-2-1B": """{"architectures": ["Olmo2ForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "eos_token_id": 100257, "hidden_act": "silu",
        "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192,
        "max_position_embeddings": 4096, "model_type": "olmo2", "num_attention_heads": 16,
        "num_hidden_layers": 16, "num_key_value_heads": 16, "pad_token_id": 100277,
        "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 500000,
        "tie_word_embeddings": false, "torch_dtype": "float32",
        "transformers_version": "4.47.0", "use_cache": false, "vocab_size": 100352}""",
    "granite-3.1-2b": """{"architectures": ["GraniteForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.1, "attention_multiplier": 0.015625, "bos_token_id": 0,
        "embedding_multiplier": 12.0, "eos_token_id": 0, "hidden_act": "silu",
        "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192,
        "logits_scaling": 8.0, "max_position_embeddings": 131072, "mlp_bias": false,
        "model_type": "granite", "num_attention_heads": 32, "num_hidden_layers": 40,
        "num_key_value_heads": 8, "pad_token_id": 0, "residual_multiplier": 0.22,
        "rms_norm_eps": 1e-05, "rope_scaling": null, "rope_theta": 5000000.0,
        "tie_word_embeddings": true, "torch_dtype": "bfloat16",
        "transformers_version": "4.47.0", "use_cache": true, "vocab_size": 49155}""",
    "Mixtral-8x7B": """{"architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0,
        "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
        "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "output_router_logits": false, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02, "sliding_window": null, "tie_word_embeddings": false,
        "torch_dtype": "bfloat16", "transformers_version": "4.36.0.dev0", "use_cache": true,
        "vocab_size": 32000}""",
    "Qwen3-30B-A3B": """{"architectures": ["Qwen3MoeForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "bos_token_id": 151643, "decoder_sparse_step": 1,
        "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 40960,
        "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe",
        "moe_intermediate_size": 768, "norm_topk_prob": true, "num_attention_heads": 32,
        "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
        "num_key_value_heads": 4, "output_router_logits": false, "rms_norm_eps": 1e-06,
        "rope_scaling": null, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
        "sliding_window": null, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0", "use_cache": true, "use_sliding_window": false,
        "vocab_size": 151936}""",
    "gpt-oss-20b": """{"architectures": ["GptOssForCausalLM"], "attention_bias": true,
        "attention_dropout": 0.0, "eos_token_id": 200002, "experts_per_token": 4, "head_dim": 64,
        "hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096,
        "initializer_range": 0.02, "intermediate_size": 2880, "layer_types": [LAYERS_24],
        "max_position_embeddings": 131072, "model_type": "gpt_oss", "num_attention_heads": 64,
        "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8,
        "num_local_experts": 32, "output_router_logits": false, "pad_token_id": 199999,
        "quantization_config": {"modules_to_not_convert": ["model.layers.*.self_attn",
        "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"], "quant_method": "mxfp4"},
        "rms_norm_eps": 1e-05, "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0,
        "factor": 32.0, "original_max_position_embeddings": 4096, "rope_type": "yarn",
        "truncate": false}, "rope_theta": 150000, "router_aux_loss_coef": 0.9,
        "sliding_window": 128, "swiglu_limit": 7.0, "tie_word_embeddings": false,
        "transformers_version": "4.55.0.dev0", "use_cache": true, "vocab_size": 201088}""",
    "Mistral-7B-v0.3": """{"architectures": ["MistralForCausalLM"], "attention_dropout": 0.0,
        "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
        "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
        "sliding_window": null, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
        "transformers_version": "4.42.0.dev0", "use_cache": true, "vocab_size": 32768}""",
}
_LISTS = {  # what would fill pages above
    "LONG_48": [1 + i / 2 for i in range(48)],
    "SHORT_48": [1.0] * 48,
    "LAYERS_24": ["sliding_attention", "full_attention"] * 12,
}


def hub(model: str, *without: str) -> dict:
    text = HUB[model]
    for mark, values in _LISTS.items():
        text = text.replace(f"[{mark}]", json.dumps(values))
    return {name: value for name, value in json.loads(text).items() if name not in without}


def sixth(layers: int) -> tuple[bool, ...]:
    return tuple(layer % 6 != 5 for layer in range(layers))


@pytest.mark.parametrize(
    ("model", "without", "expected"),
    [
        (
            "Llama-3.2-1B",
            [],
            {"num_heads": 32, "num_kv_heads": 8, "head_dim": 64, "tied_embeddings": True},
        ),
        (
            "Qwen2.5-7B",
            [],
            {"num_kv_heads": 4, "head_dim": 128, "qkv_bias": True, "output_bias": False},
        ),
        (
            "Qwen3-0.6B",
            [],
            {"num_kv_heads": 8, "head_dim": 128, "qk_norm": "head", "qkv_bias": False},
        ),
        (
            "gemma-2-2b",
            [],
            {
                "head_dim": 256,
                "tied_embeddings": True,
                "sliding_window": 4096,
                "sliding": (True, False) * 13,
                "attention_scale": 1 / 16,
                "attention_softcap": 50.0,
                "logit_softcap": 30.0,
                "embedding_multiplier": 48.0,
            },
        ),
        (
            "gemma-3-1b-it",
            [],
            {
                "num_kv_heads": 1,
                "tied_embeddings": True,
                "sliding_window": 512,
                "sliding": sixth(26),
                "attention_softcap": None,
                "logit_softcap": None,
                "eos_token_ids": (1, 106),
            },
        ),
        (
            "Phi-3-mini-4k",
            [],
            {"head_dim": 96, "sliding_window": 2047, "sliding": (True,) * 32},
        ),
        (
            "Phi-4-mini",
            [],
            {
                "head_dim": 128,
                "num_kv_heads": 8,
                "max_positions": 4096,
                "tied_embeddings": True,
                "sliding_window": 262144,
                "sliding": (True,) * 32,
            },
        ),
        ("OLMo-2-1B", [], {"head_dim": 128, "norm_placement": "post", "qk_norm": "all"}),
        (
            "granite-3.1-2b",
            [],
            {
                "head_dim": 64,
                "attention_scale": 1 / 64,
                "embedding_multiplier": 12.0,
                "residual_multiplier": 0.22,
                "logit_divisor": 8.0,
            },
        ),
        ("Mixtral-8x7B", [], {"head_dim": 128, "num_kv_heads": 8}),
        ("Qwen3-30B-A3B", [], {"head_dim": 128, "num_kv_heads": 4, "intermediate_size": 6144}),
        (
            "gpt-oss-20b",
            ["quantization_config"],
            {
                "head_dim": 64,
                "num_kv_heads": 8,
                "sliding_window": 128,
                "sliding": (True, False) * 12,
                "attention_sinks": True,
                "qkv_bias": True,
            },
        ),
        ("Mistral-7B-v0.3", [], {"head_dim": 128, "num_kv_heads": 8}),
    ],
)
def test_configurations_of_published_models_are_read(model, without, expected, tmp_path):
    raw = hub(model, *without)
    config = read(tmp_path, raw)
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.num_layers == raw["num_hidden_layers"]
    assert config.vocab_size == raw["vocab_size"]
    assert config.norm_eps == raw["rms_norm_eps"]
    if "sliding" not in expected:
        assert (config.sliding_window, config.sliding) == (None, ())


@pytest.mark.parametrize(
    ("model", "experts"),
    [
        ("Mixtral-8x7B", (8, 2, 14336, True)),
        ("Qwen3-30B-A3B", (128, 8, 768, True)),
        ("gpt-oss-20b", (32, 4, 2880, True)),
    ],
)
def test_the_experts_of_published_models_are_read(model, experts, tmp_path):
    moe = read(tmp_path, hub(model, "quantization_config")).moe
    assert moe is not None
    found = (moe.num_experts, moe.experts_per_token, moe.intermediate_size, moe.normalize)
    assert found == experts


@pytest.mark.parametrize("model", HUB)
def test_rotary_frequencies_of_published_models_are_those_of_transformers(model, tmp_path):
    """To the last bit or two of float32: at position 100,000 that is already 0.01 radians."""
    raw = hub(model, "quantization_config")
    ours = read(tmp_path, raw)
    family = raw["architectures"][0].removesuffix("ForCausalLM")
    module = getattr(transformers.models, raw["model_type"].removesuffix("_text"))
    modeling = getattr(module, f"modeling_{raw['model_type'].removesuffix('_text')}")
    config = transformers.AutoConfig.for_model(**raw)
    theirs = getattr(modeling, f"{family}RotaryEmbedding")(config)
    pairs = [(ours.rope, theirs, "")]
    if family == "Gemma3":
        assert ours.sliding_rope is not None
        pairs = [(ours.rope, theirs, "full_attention_")]
        pairs += [(ours.sliding_rope, theirs, "sliding_attention_")]
    for rope, embedding, kind in pairs:
        frequencies = getattr(embedding, f"{kind}inv_freq").numpy()
        np.testing.assert_allclose(rope.frequencies, frequencies, rtol=5e-7)
        assert math.isclose(
            rope.amplitude, getattr(embedding, f"{kind}attention_scaling"), rel_tol=1e-6
        )


def test_a_quantized_model_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="quantization_config"):
        read(tmp_path, hub("gpt-oss-20b"))
