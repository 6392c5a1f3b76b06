"""The policy is the model that its Hugging Face directory describes, read and written exactly."""

import dataclasses
import json
from typing import get_args

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3Config

from bridge.checkpoints import load_params, save_model
from bridge.export import Exporter
from bridge.names import expected_tensors
from jaxrl.config import MeshSection, ModelSection
from jaxrl.mesh import batch_sharding, make_mesh, param_shardings
from jaxrl.models.attention import Masked
from jaxrl.models.config import DecoderConfig, load_config
from jaxrl.models.decoder import REMAT, Policy, empty_cache, init_params
from jaxrl.models.params import param_specs, tree_of
from jaxrl.models.rope import Rope
from jaxrl.types import UserError
from tests.reference_policy import logits_of, make_reference, params_of, save_reference

ONE_DEVICE = MeshSection()
SPLIT = MeshSection(data=2, fsdp=2, tensor=2)
TOKENS_BT = np.random.default_rng(0).integers(0, 64, (2, 24)).astype(np.int32)


def load(directory, mesh: MeshSection | Mesh = ONE_DEVICE):
    """(policy, params) of a directory, in float32."""
    config = load_config(directory)
    specs = param_specs(config)
    mesh = mesh if isinstance(mesh, Mesh) else make_mesh(mesh)
    return Policy(config, jnp.float32), load_params(directory, specs, param_shardings(specs, mesh))


def run(policy, params, tokens_BT=TOKENS_BT):
    return np.asarray(jax.jit(policy.logits)(params, tokens_BT))


def raw_tensors(directory) -> dict[str, tuple]:
    """name -> (dtype, shape, bytes) of everything in the safetensors files, read by torch."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118, not a dict
                tensor = reader.get_tensor(name)
                content = tensor.contiguous().view(torch.uint8).numpy().tobytes()
                found[name] = (tensor.dtype, tuple(tensor.shape), content)
    return found


def rope_frequencies(theta: float, head_dim: int) -> tuple[float, ...]:
    """theta ** (-2 i / head_dim), in float64."""
    return tuple(theta ** -(np.arange(0, head_dim, 2) / head_dim))


def config_of(model):
    c = model.config
    return DecoderConfig(
        c.vocab_size,
        c.hidden_size,
        c.intermediate_size,
        c.num_hidden_layers,
        c.num_attention_heads,
        c.num_key_value_heads,
        c.head_dim,
        Rope(rope_frequencies(c.rope_parameters["rope_theta"], c.head_dim)),
        c.rms_norm_eps,
        c.tie_word_embeddings,
        c.max_position_embeddings,
        (c.eos_token_id,),
        qk_norm="head",
    )


@pytest.fixture(scope="module")
def reference():
    return make_reference()


@pytest.fixture
def directory(reference, tmp_path):
    return save_reference(reference, tmp_path / "model")


@pytest.fixture(scope="module")
def loaded(reference, tmp_path_factory):
    return load(save_reference(reference, tmp_path_factory.mktemp("loaded")))


def edit(directory, **fields):
    """Changes fields of config.json; None removes one."""
    path = directory / "config.json"
    config = {k: v for k, v in (json.loads(path.read_text()) | fields).items() if v is not None}
    path.write_text(json.dumps(config))


# --- the mathematics ---


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 4},
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 37.0, "rope_type": "default"}},
        {"rms_norm_eps": 0.1},
        {"num_hidden_layers": 1},
    ],
    ids=["untied", "tied", "kv1", "kv4", "theta_1e6", "theta_37", "norm_eps", "one_layer"],
)
def test_logits_equal_those_of_transformers(changes, tmp_path):
    model = make_reference(seed=1, **changes)
    policy, params = load(save_reference(model, tmp_path))
    expected_BTV = logits_of(model, TOKENS_BT)
    assert expected_BTV.std() > 1.0  # the comparison is not one of zeros
    np.testing.assert_allclose(run(policy, params), expected_BTV, atol=1e-4)


def test_an_old_config_with_rope_theta_at_its_top_is_read_the_same(directory, reference):
    edit(directory, rope_parameters=None, rope_theta=50.0)
    model = make_reference(rope_parameters={"rope_theta": 50.0, "rope_type": "default"})
    policy, params = load(directory)
    np.testing.assert_allclose(run(policy, params), logits_of(model, TOKENS_BT), atol=1e-4)


def test_later_tokens_have_no_influence_at_all(loaded):
    """The gradient of the logits at t is exactly zero at the embedding of every token after t."""
    policy, params = loaded
    tokens_1T = jnp.arange(10, dtype=jnp.int32)[None]  # all different: a row of `embed` for each

    @jax.jit
    def influence(embed, t):
        return jax.grad(lambda e: policy.logits(params | {"embed": e}, tokens_1T)[0, t].sum())(
            embed
        )

    for t in (0, 4, 8):
        influence_VD = np.abs(influence(params["embed"], t))
        assert influence_VD[: t + 1].max(axis=1).min() > 0
        assert influence_VD[t + 1 :].max() == 0.0


def test_padding_is_out_of_sight(loaded):
    policy, params = loaded
    padded_BT = np.concatenate([TOKENS_BT[:, :12], np.full((2, 12), 3, np.int32)], axis=1)
    np.testing.assert_allclose(
        run(policy, params, padded_BT)[:, :12], run(policy, params)[:, :12], atol=1e-5
    )


def test_decoding_with_a_cache_gives_the_logits_of_the_whole_row(loaded):
    """Rows that start at different places: positions and mask decide, not the cache's slots."""
    policy, params = loaded
    slots = 12
    lengths_B = np.array([5, 3], np.int32)
    cache = empty_cache(policy.config, 2, slots, jnp.float32)
    slots_S = np.arange(slots)
    apply = jax.jit(policy.apply)
    mask_BTS = (slots_S[None, None] <= np.arange(5)[None, :, None]) & (
        slots_S[None, None] < lengths_B[:, None, None]
    )
    positions_BT = np.broadcast_to(np.arange(5), (2, 5))
    prompts_BT = np.where(np.arange(5) < lengths_B[:, None], TOKENS_BT[:, :5], 0)
    _, cache = apply(params, prompts_BT, positions_BT, Masked(mask_BTS, None), cache, 0)
    whole_BTV = run(policy, params)
    for n in range(4):
        now_B = lengths_B + n
        token_B1 = np.take_along_axis(TOKENS_BT, now_B[:, None], axis=1)
        visible_BS = (slots_S < lengths_B[:, None]) | ((slots_S >= 5) & (slots_S <= 5 + n))
        logits_B1V, cache = apply(
            params, token_B1, now_B[:, None], Masked(visible_BS[:, None], None), cache, 5 + n
        )
        for b in range(2):
            np.testing.assert_allclose(logits_B1V[b, 0], whole_BTV[b, now_B[b]], atol=1e-5)


def test_a_mesh_of_data_fsdp_and_tensor_gives_the_same_logits(directory, loaded):
    mesh = make_mesh(SPLIT)
    policy, params = load(directory, mesh)
    query = params["layers"]["attention"]["query"]
    assert query.addressable_shards[0].data.shape == (2, 4 // 2, 16, 32 // 2)
    rows = jax.device_put(np.repeat(TOKENS_BT, 2, axis=0), NamedSharding(mesh, P(("data", "fsdp"))))
    expected_BTV = run(*loaded)
    rounding = 1e-5 * np.abs(expected_BTV).max()
    np.testing.assert_allclose(run(policy, params, rows)[::2], expected_BTV, atol=rounding)


def test_what_is_computed_again_in_the_backward_pass_gives_the_same_gradient(loaded):
    policy, params = loaded
    assert set(get_args(ModelSection.model_fields["remat"].annotation)) == {"auto", *REMAT}
    tokens_BT = np.tile(TOKENS_BT, (8, 4))

    def value_and_grad(remat):
        def loss(params):
            return (policy._replace(remat=remat).logits(params, tokens_BT) ** 2).mean()

        compiled = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
        memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
        assert memory is not None
        return compiled(params), memory.temp_size_in_bytes, cost["flops"]

    (kept, kept_grads), *kept_costs = value_and_grad("none")
    found = {"none": kept_costs}
    for remat in ("dots", "attention", "full"):
        (again, again_grads), *found[remat] = value_and_grad(remat)
        np.testing.assert_allclose(again, kept, rtol=1e-6)
        jax.tree.map(
            lambda a, k: np.testing.assert_allclose(a, k, rtol=1e-4, atol=1e-7),
            again_grads,
            kept_grads,
        )
    temporary, flops = ({remat: cost[i] for remat, cost in found.items()} for i in (0, 1))
    assert temporary["full"] < temporary["dots"] < temporary["none"]
    assert flops["full"] > flops["attention"] > flops["dots"] > flops["none"]


def test_each_device_of_a_mesh_computes_its_own_rows_and_no_others(loaded):
    """Weights are split by their embed axis: left alone, XLA splits hidden states by it too."""
    policy, params = loaded
    mesh = make_mesh(MeshSection(fsdp=4))
    shardings = param_shardings(param_specs(policy.config), mesh)
    tokens_BT = np.tile(TOKENS_BT, (4, 2))

    def flops(policy, params, tokens_BT):
        def loss(params, tokens_BT):
            return (policy.hidden_of_rows(params, tokens_BT) ** 2).mean()

        return jax.jit(jax.grad(loss)).lower(params, tokens_BT).compile().cost_analysis()["flops"]

    rows = jax.device_put(tokens_BT, batch_sharding(mesh, 2))
    of_four = flops(policy._replace(mesh=mesh), jax.device_put(params, shardings), rows)
    assert of_four < 1.1 * flops(policy, params, tokens_BT) / 4


def test_bfloat16_computation_gives_float32_logits_near_the_reference(loaded, reference):
    policy, params = loaded
    logits_BTV = run(Policy(policy.config, jnp.bfloat16), params)
    assert logits_BTV.dtype == np.float32
    assert np.any(logits_BTV.astype(jnp.bfloat16).astype(np.float32) != logits_BTV)
    expected_BTV = logits_of(reference, TOKENS_BT)
    error = np.abs(logits_BTV - expected_BTV).mean() / expected_BTV.std()
    assert 1e-4 < error < 0.05


def test_the_program_does_not_grow_with_depth(loaded):
    policy, _ = loaded
    tokens_BT = jax.ShapeDtypeStruct((2, 8), jnp.int32)

    def size(layers: int) -> int:
        config = policy.config.__class__(**(vars(policy.config) | {"num_layers": layers}))
        params = jax.eval_shape(lambda: init_params(param_specs(config), jax.random.key(0)))

        def loss(params, tokens_BT):
            return Policy(config, jnp.float32).logits(params, tokens_BT).sum()

        return len(jax.jit(jax.grad(loss)).lower(params, tokens_BT).as_text())

    assert abs(size(12) - size(2)) < 0.02 * size(2)


def test_random_parameters_have_the_structure_of_loaded_ones(loaded, reference):
    policy, params = loaded
    drawn = init_params(param_specs(policy.config), jax.random.key(0))
    shapes = jax.tree.map(lambda x: (x.shape, str(x.dtype)), drawn)
    assert shapes == jax.tree.map(lambda x: (x.shape, str(x.dtype)), params)
    assert shapes == jax.tree.map(lambda x: (x.shape, str(x.dtype)), params_of(reference))
    assert np.all(drawn["layers"]["mlp_norm"]["scale"] == 1.0)
    matrices = [leaf for leaf in jax.tree.leaves(drawn) if leaf.ndim > 2]
    assert len(matrices) == 7
    for leaf in matrices:
        assert np.std(leaf) == pytest.approx(0.02, rel=0.1)
    flat = {np.asarray(leaf).ravel()[:4].tobytes() for leaf in matrices}
    assert len(flat) == len(matrices)  # no two drawn with the same key


# --- reading and writing directories ---


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_loaded_parameters_are_the_weights_of_the_model(tied, tmp_path):
    model = make_reference(seed=2, tie_word_embeddings=tied)
    _, params = load(save_reference(model, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, params, params_of(model))


def test_a_directory_of_several_shards_is_read_through_its_index(reference, tmp_path):
    save_reference(reference, tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    _, params = load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, params, params_of(reference))


@pytest.mark.parametrize("mesh", [ONE_DEVICE, SPLIT], ids=["one_device", "mesh"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_was_read_is_written_back_bit_for_bit(dtype, tied, mesh, tmp_path):
    model = make_reference(seed=3, tie_word_embeddings=tied).to(getattr(torch, dtype))
    source = save_reference(model, tmp_path / "source")
    policy, params = load(source, mesh)
    export = Exporter(param_specs(policy.config), dtype)
    save_model(export(params), source, tmp_path / "target")
    before = raw_tensors(source)
    assert {str(kind) for kind, *_ in before.values()} == {f"torch.{dtype}"}
    assert raw_tensors(tmp_path / "target") == before


def test_transformers_opens_what_was_written(reference, loaded, directory, tmp_path):
    policy, params = loaded
    (directory / "tokenizer.json").write_text("{}")
    save_model(Exporter(param_specs(policy.config), "float32")(params), directory, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert model.dtype == torch.float32
    np.testing.assert_array_equal(logits_of(model, TOKENS_BT), logits_of(reference, TOKENS_BT))
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


def test_writing_over_a_directory_replaces_it_and_leaves_nothing_beside_it(
    loaded, directory, tmp_path
):
    policy, params = loaded
    target = tmp_path / "out"
    target.mkdir()
    (target / "old.txt").write_text("old")
    export = Exporter(param_specs(policy.config), "bfloat16")
    save_model(export(params), directory, target)
    assert not (target / "old.txt").exists()
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_a_tied_checkpoint_may_carry_its_head_a_second_time(tmp_path):
    model = make_reference(tie_word_embeddings=True)
    save_reference(model, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors")
    _, params = load(tmp_path)
    assert "lm_head" not in params


# --- the export ---


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_is_exactly_what_receivers_expect(dtype, tied):
    model = make_reference(seed=4, tie_word_embeddings=tied)
    config = config_of(model)
    tensors = Exporter(param_specs(config), dtype)(jax.tree.map(jnp.asarray, params_of(model)))
    found = [(t.name, t.dtype, t.shape) for t in tensors]
    assert found == expected_tensors(param_specs(config), dtype)
    state = {n: t for n, t in model.state_dict().items() if not (tied and n == "lm_head.weight")}
    assert {(name, shape) for name, _, shape in found} == {
        (name, tuple(tensor.shape)) for name, tensor in state.items()
    }
    for tensor in tensors:
        expected = state[tensor.name].to(getattr(torch, dtype)).contiguous()
        assert tensor.data.dtype == np.uint8 and tensor.data.flags.c_contiguous
        assert tensor.data.tobytes() == expected.view(torch.uint8).numpy().tobytes(), tensor.name


def test_an_export_survives_the_donation_of_the_parameters(reference):
    config = config_of(reference)
    params = jax.tree.map(jnp.array, params_of(reference))
    pointers = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params)}
    tensors = Exporter(param_specs(config), "float32")(params)
    before = {tensor.name: tensor.data.copy() for tensor in tensors}
    assert not pointers & {tensor.data.ctypes.data for tensor in tensors}
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    jax.block_until_ready(overwrite(params))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    for tensor in tensors:
        np.testing.assert_array_equal(tensor.data, before[tensor.name], err_msg=tensor.name)


def test_on_a_cpu_groups_are_made_in_the_memory_of_those_that_nobody_reads(directory):
    """A group in fresh memory takes several times as long. Whatever is read of one stays."""
    config = dataclasses.replace(load_config(directory), vocab_size=1 << 18)  # 64 wide
    specs = param_specs(config)
    exporter = Exporter(specs, "bfloat16")
    assert exporter.plan[0].nbytes >= 32 << 20

    def params(value):
        return jax.tree.map(lambda spec: jnp.full(spec.shape, value), tree_of(specs))

    def embedding(value):
        tensors = {tensor.name: tensor.data for tensor in exporter(params(value))}
        return tensors["model.embed_tokens.weight"].view(ml_dtypes.bfloat16)

    first, second = embedding(1.0), embedding(2.0)
    part, place = first[5000:5002], second.ctypes.data
    del first, second
    third = embedding(3.0)
    assert third.ctypes.data == place  # of the second
    fourth = embedding(4.0)
    found = [np.unique(values.astype(np.float32)) for values in (part, third, fourth)]
    assert found == [1.0, 3.0, 4.0]
    del third, fourth
    for value in (5.0, 6.0):  # exports that are given up on the way
        next(exporter.groups(params(value)))
    assert np.unique(embedding(7.0).astype(np.float32)) == 7.0


# --- what is refused ---


def test_config_fields_are_those_that_transformers_reads(directory, reference):
    config = load_config(directory)
    c = reference.config
    assert (config.num_kv_heads, config.head_dim, config.num_layers) == (2, 16, 2)
    assert config.norm_eps == c.rms_norm_eps
    assert config.rope.frequencies == pytest.approx(rope_frequencies(10_000.0, 16), rel=1e-6)
    assert config.rope.amplitude == 1.0 and config.rope.max_positions is None
    assert config.max_positions == 512 and not config.tied_embeddings


def test_fields_that_may_be_left_out_have_the_values_of_transformers(directory):
    theta = Qwen3Config().to_dict()["rope_parameters"]["rope_theta"]
    optional = {
        "rope_parameters": lambda c: (
            c.rope.frequencies,
            pytest.approx(rope_frequencies(theta, 16), rel=1e-6),
        ),
        "rms_norm_eps": lambda c: (c.norm_eps, Qwen3Config().rms_norm_eps),
        "tie_word_embeddings": lambda c: (c.tied_embeddings, Qwen3Config().tie_word_embeddings),
        "max_position_embeddings": lambda c: (
            c.max_positions,
            Qwen3Config().max_position_embeddings,
        ),
    }
    edit(directory, **dict.fromkeys(optional))
    for field, values in optional.items():
        ours, theirs = values(load_config(directory))
        assert ours == theirs, field


@pytest.mark.parametrize(
    ("generation", "expected"), [(None, (7,)), (9, (9,)), ([9, 3], (9, 3)), ("absent", (7,))]
)
def test_end_of_sequence_ids_come_from_the_generation_config_first(generation, expected, directory):
    path = directory / "generation_config.json"
    path.unlink()
    if generation != "absent":
        path.write_text(json.dumps({"eos_token_id": generation}))
    assert load_config(directory).eos_token_ids == expected


def test_every_unsupported_or_missing_field_of_the_config_is_named_at_once(directory):
    changes = {
        "quantization_config": {"bits": 4},
        "is_encoder_decoder": True,
        "intermediate_size": None,
        "vocab_size": None,
        "attention_temperature": 2.0,
    }
    edit(directory, **changes)
    with pytest.raises(UserError) as error:
        load_config(directory)
    for field in changes:
        assert field in str(error.value)
    assert str(directory / "config.json") in str(error.value)


def test_every_field_that_asks_for_other_mathematics_is_named_at_once(directory):
    changes = {
        "hidden_act": "gelu",
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        "layer_types": ["full_attention", "chunked_attention"],
        "attention_temperature": 2.0,
    }
    edit(directory, **changes)
    with pytest.raises(UserError) as error:
        load_config(directory)
    for said in ("hidden_act = 'gelu'", "rope_type = 'dynamic'", "chunked_attention"):
        assert said in str(error.value)
    assert "attention_temperature = 2.0" in str(error.value)


def test_an_architecture_that_is_not_known_is_named_beside_those_that_are(directory):
    edit(directory, architectures=["MambaForCausalLM"])
    with pytest.raises(UserError, match=r"MambaForCausalLM is not one of .*Qwen3ForCausalLM"):
        load_config(directory)


@pytest.mark.parametrize("content", [None, "{", "[]", "\ud800"])
def test_a_config_that_is_missing_or_malformed_is_an_error_that_names_the_file(content, directory):
    path = directory / "config.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match=r"config\.json"):
        load_config(directory)


def test_missing_unknown_and_wrongly_shaped_tensors_are_reported_together(directory):
    weights = load_file(directory / "model.safetensors")
    del weights["model.norm.weight"]
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
    weights["lm_head.weight"] = torch.zeros(64, 31)
    weights["model.layers.1.mlp.up_proj.weight"] = weights[
        "model.layers.1.mlp.up_proj.weight"
    ].T.contiguous()
    save_file(weights, directory / "model.safetensors")
    with pytest.raises(UserError) as error:
        load(directory)
    report = str(error.value)
    assert "model.norm.weight: missing" in report
    assert "model.layers.0.self_attn.q_proj.bias: not a tensor of this model" in report
    assert "lm_head.weight: shape (64, 31), expected (64, 32)" in report
    assert "model.layers.1.mlp.up_proj.weight: shape (32, 48), expected (48, 32)" in report


def test_a_layer_too_many_is_not_ignored(directory):
    edit(directory, num_hidden_layers=1, layer_types=["full_attention"])
    with pytest.raises(UserError, match=r"model\.layers\.1\..*: not a tensor of this model"):
        load(directory)


@pytest.mark.parametrize("bytes_left", [0, 4, 100, -1])
def test_a_truncated_file_is_an_error_and_not_a_model(bytes_left, directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:bytes_left])
    with pytest.raises(UserError, match="damaged"):
        load(directory)


def test_a_directory_without_weights_says_so(directory):
    (directory / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        load(directory)


def test_a_directory_that_does_not_exist_says_so(tmp_path):
    with pytest.raises(UserError, match="there is no such file"):
        load_config(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("../outside.safetensors", r"index\.json"),
        ("/etc/passwd", r"index\.json"),
        ("a/b.safetensors", r"index\.json"),
        ("..", r"\.\.: .*not a regular file"),
    ],
)
def test_an_index_that_points_out_of_its_directory_is_refused(file, said, directory):
    (directory / "model.safetensors").rename(directory.parent / "outside.safetensors")
    index = {"weight_map": dict.fromkeys(["model.norm.weight"], file)}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=said):
        load(directory)


def test_a_file_of_the_index_that_is_not_there_is_named(directory):
    (directory / "model.safetensors").rename(directory.parent / "outside.safetensors")
    index = {"weight_map": {"model.norm.weight": "gone.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"gone\.safetensors: .*No such file"):
        load(directory)


@pytest.mark.parametrize(
    "index", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"model.norm.weight": 5}}']
)
def test_an_index_that_is_malformed_is_refused(index, directory):
    (directory / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match="damaged"):
        load(directory)


def test_an_index_that_names_a_tensor_its_file_lacks_is_refused(directory):
    weights = load_file(directory / "model.safetensors")
    index = {"weight_map": dict.fromkeys(weights, "model.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    del weights["model.norm.weight"]
    save_file(weights, directory / "model.safetensors")
    with pytest.raises(UserError, match="damaged"):
        load(directory)
