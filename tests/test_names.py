"""The tensors that travel are the parameters in another layout; none is lost, none is twice."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from bridge.names import expected_tensors, from_hf, hf_axes, hf_name, hf_shape, hf_tensors, to_hf
from jaxrl.models.config import DecoderConfig, LoraConfig, MoeConfig
from jaxrl.models.params import ParamSpec, lora_specs, param_specs
from jaxrl.models.rope import Rope
from jaxrl.types import UserError

PLAIN = DecoderConfig(
    vocab_size=11,
    hidden_size=10,
    intermediate_size=6,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rope=Rope((1.0,) * 4),
    norm_eps=1e-6,
    tied_embeddings=True,
    max_positions=64,
    eos_token_ids=(),
)
CONFIGS = {
    "plain": {},
    "untied_biases": {
        "tied_embeddings": False,
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
    },
    "one_layer_one_kv_head": {"num_layers": 1, "num_kv_heads": 1, "qk_norm": "head"},
    "norms_after": {"norm_placement": "post", "qk_norm": "all"},
    "norms_on_both_sides": {"norm_placement": "both", "norm_offset": True, "qk_norm": "head"},
    "fused": {"fused_projections": True, "num_kv_heads": 1},
    "fused_biases": {"fused_projections": True, "qkv_bias": True, "mlp_bias": True},
    "experts": {"moe": MoeConfig(5, 2, 7, True, "qwen3"), "qk_norm": "head"},
    "mixtral": {"moe": MoeConfig(2, 1, 6, True, "mixtral"), "num_layers": 1},
    "gpt_oss": {
        "moe": MoeConfig(5, 2, 7, True, "gpt_oss"),
        "attention_sinks": True,
        "qkv_bias": True,
        "output_bias": True,
    },
}
ALL_LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def config(name: str) -> DecoderConfig:
    return dataclasses.replace(PLAIN, **CONFIGS[name])


def tables() -> dict[str, dict]:
    """Every kind of table there is: of parameters, and of adapters."""
    found = {name: param_specs(config(name)) for name in CONFIGS}
    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    found["adapters"] = lora_specs(PLAIN, LoraConfig(3, 6.0, (*attention, "up_proj", "down_proj")))
    fused = ("qkv_proj", "o_proj", "gate_up_proj")
    found["fused_adapters"] = lora_specs(config("fused"), LoraConfig(3, 6.0, fused))
    found["adapters_beside_experts"] = lora_specs(config("experts"), LoraConfig(2, 2.0, attention))
    return found


TABLES = tables()
every_table = pytest.mark.parametrize("specs", TABLES.values(), ids=TABLES.keys())


def counting(shape: tuple[int, ...]) -> np.ndarray:
    """Every entry different."""
    return np.arange(math.prod(shape), dtype=np.float64).reshape(shape)


# --- nothing is lost, nothing is there twice ---


@every_table
def test_every_index_of_every_leaf_is_in_exactly_one_piece(specs):
    pieces = [piece for tensor in hf_tensors(specs).values() for piece in tensor.pieces]
    found = [(piece.path, piece.index) for piece in pieces]
    wanted = [
        (path, index)
        for path, spec in specs.items()
        for index in itertools.product(*map(range, spec.shape[: spec.hf_name.count("{")]))
    ]
    assert sorted(found) == sorted(wanted)
    assert len(set(found)) == len(found)


@every_table
def test_pieces_tile_their_tensors_row_by_row(specs):
    tensors = hf_tensors(specs)
    entries = 0
    for name, tensor in tensors.items():
        rows = [row for piece in tensor.pieces for row in range(piece.start, piece.stop)]
        assert rows == list(range(tensor.shape[0])), name
        for piece in tensor.pieces:
            spec = specs[piece.path]
            assert hf_shape(spec) == (piece.stop - piece.start, *tensor.shape[1:])
            assert hf_name(spec, piece.index) == name
            assert piece.start == spec.row
            assert "{" not in name
        entries += math.prod(tensor.shape)
    assert entries == sum(math.prod(spec.shape) for spec in specs.values())


@every_table
def test_what_receivers_expect_is_every_tensor_once_in_the_order_of_the_export(specs):
    expected = expected_tensors(specs, "bfloat16")
    assert [name for name, _, _ in expected] == list(hf_tensors(specs))
    assert {dtype for _, dtype, _ in expected} == {"bfloat16"}
    for name, _, shape in expected:
        assert shape == hf_tensors(specs)[name].shape


def test_parts_of_a_fused_projection_are_rows_in_the_order_of_the_checkpoint():
    tensors = hf_tensors(TABLES["fused_biases"])
    for kind in ("weight", "bias"):
        tail = (10,) if kind == "weight" else ()
        end = "" if kind == "weight" else "_bias"
        qkv = tensors[f"model.layers.2.self_attn.qkv_proj.{kind}"]
        assert qkv.shape == (32 + 16 + 16, *tail)
        assert [(p.path[-1], p.index, p.start, p.stop) for p in qkv.pieces] == [
            (f"query{end}", (2,), 0, 32),
            (f"key{end}", (2,), 32, 48),
            (f"value{end}", (2,), 48, 64),
        ]
        both = tensors[f"model.layers.0.mlp.gate_up_proj.{kind}"]
        assert both.shape == (12, *tail)
        assert [(p.path[-1], p.start, p.stop) for p in both.pieces] == [
            (f"gate{end}", 0, 6),
            (f"up{end}", 6, 12),
        ]


def test_every_expert_is_a_tensor_of_its_own():
    tensors = hf_tensors(TABLES["experts"])
    for layer, expert in itertools.product(range(3), range(5)):
        for name, leaf, shape in (
            ("gate_proj", "gate", (7, 10)),
            ("up_proj", "up", (7, 10)),
            ("down_proj", "down", (10, 7)),
        ):
            tensor = tensors[f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight"]
            (piece,) = tensor.pieces
            assert (piece.path, piece.index) == (("layers", "moe", leaf), (layer, expert))
            assert tensor.shape == shape
    assert tensors["model.layers.1.mlp.gate.weight"].shape == (5, 10)
    mixtral = hf_tensors(TABLES["mixtral"])
    where = "model.layers.0.block_sparse_moe"
    for name, leaf in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
        assert mixtral[f"{where}.experts.1.{name}.weight"].pieces[0].path[-1] == leaf
    oss = hf_tensors(TABLES["gpt_oss"])
    assert oss["model.layers.0.mlp.experts.gate_up_proj"].shape == (5, 10, 14)
    assert oss["model.layers.0.mlp.experts.gate_up_proj_bias"].shape == (5, 14)
    assert oss["model.layers.0.mlp.experts.down_proj"].shape == (5, 7, 10)
    assert oss["model.layers.0.mlp.router.bias"].shape == (5,)
    assert oss["model.layers.0.self_attn.sinks"].shape == (4,)


# --- tables that are wrong ---


def changed(specs: dict, leaf: str, **fields) -> dict:
    path = ("layers", "attention", leaf)
    return specs | {path: dataclasses.replace(specs[path], **fields)}


@pytest.mark.parametrize(
    ("leaf", "fields"),
    [
        ("key", {"row": 0}),  # the same rows twice
        ("key", {"row": 31}),  # one row twice
        ("value", {"row": 41}),  # a row left out between two
        ("query", {"row": 1}),  # the first row left out
        ("value", {"row": 32}),  # two leaves on one place, none on the next
    ],
)
def test_a_table_whose_rows_overlap_or_leave_a_gap_is_refused(leaf, fields):
    with pytest.raises(ValueError, match=r"qkv_proj\.weight: .* do not tile its rows"):
        hf_tensors(changed(TABLES["fused"], leaf, **fields))


def test_a_table_that_leaves_out_a_part_is_refused():
    specs = {p: s for p, s in TABLES["fused"].items() if p[-1] != "key"}
    with pytest.raises(ValueError, match="do not tile"):
        hf_tensors(specs)


def test_two_leaves_of_one_name_are_refused():
    specs = TABLES["plain"]
    name = specs[("layers", "mlp", "gate")].hf_name
    twice = specs | {
        ("layers", "mlp", "up"): dataclasses.replace(specs[("layers", "mlp", "up")], hf_name=name)
    }
    with pytest.raises(ValueError, match="do not tile"):
        hf_tensors(twice)


def test_parts_that_differ_in_width_are_refused():
    specs = TABLES["fused"]
    narrow = (*specs[("layers", "attention", "key")].shape[:3], 9)
    with pytest.raises(ValueError, match="differ in shape"):
        hf_tensors(changed(specs, "key", shape=narrow))


# --- the layouts ---


@every_table
def test_from_hf_undoes_to_hf_for_every_leaf_and_index(specs):
    for path, spec in specs.items():
        leaf = counting(spec.shape)
        whole = to_hf(spec, leaf)
        stack = spec.shape[: spec.hf_name.count("{")]
        assert whole.shape == (*stack, *hf_shape(spec)), path
        for index in itertools.product(*map(range, stack)):
            back = from_hf(spec, whole[index])
            np.testing.assert_array_equal(back, leaf[index], err_msg=str(path))


@every_table
def test_to_hf_undoes_from_hf(specs):
    """So that no two layouts of a checkpoint are read as the same leaf."""
    for path, spec in specs.items():
        piece = counting(hf_shape(spec))
        leaf = np.broadcast_to(
            from_hf(spec, piece), (*spec.shape[: spec.stack], *from_hf(spec, piece).shape)
        )
        assert leaf.shape == spec.shape, path
        whole = to_hf(spec, np.ascontiguousarray(leaf))
        for index in itertools.product(*map(range, spec.shape[: spec.stack])):
            np.testing.assert_array_equal(whole[index], piece, err_msg=str(path))


def test_matrices_are_output_by_input_with_heads_outermost():
    """By hand: entry by entry for what is more than a transposition."""
    specs = TABLES["untied_biases"]

    def both(*path):
        spec = specs[path]
        leaf = counting(spec.shape)
        return leaf, to_hf(spec, leaf)

    layers, heads, size, hidden = range(3), range(4), range(8), range(10)
    query, q_proj = both("layers", "attention", "query")
    output, o_proj = both("layers", "attention", "output")
    query_bias, q_bias = both("layers", "attention", "query_bias")
    for n, h, i, d in itertools.product(layers, heads, size, hidden):
        assert q_proj[n, h * 8 + i, d] == query[n, h, i, d]
        assert o_proj[n, d, h * 8 + i] == output[n, d, h, i]
        assert q_bias[n, h * 8 + i] == query_bias[n, h, i]
    gate, gate_proj = both("layers", "mlp", "gate")
    np.testing.assert_array_equal(gate_proj, gate)
    lm_head, head = both("lm_head")
    np.testing.assert_array_equal(head, lm_head)
    embed, table = both("embed")
    np.testing.assert_array_equal(table, embed)
    spec = TABLES["norms_after"][("layers", "attention", "key_norm")]
    norm = counting(spec.shape)
    np.testing.assert_array_equal(to_hf(spec, norm), norm.reshape(3, 16))


@every_table
def test_a_dimension_splits_along_the_axis_that_is_said_to_split_it(specs):
    """The first half of our leaf along that axis is the first half of the checkpoint's rows or
    columns: a device's part of one is a device's part of the other."""
    for path, spec in specs.items():
        axes = hf_axes(spec)
        assert len(axes) == len(hf_shape(spec)), path
        inner = spec.shape[spec.stack :]
        leaf = counting(spec.shape)
        whole = to_hf(spec, leaf)
        for dimension, axis in enumerate(axes):
            if axis is None:
                continue
            ours = spec.stack + spec.axes[spec.stack :].index(axis)
            if spec.shape[ours] % 2:
                continue
            half = spec.shape[ours] // 2
            part = leaf.take(range(half), axis=ours)
            shape = list(spec.shape)
            shape[ours] = half
            found = to_hf(dataclasses.replace(spec, shape=tuple(shape)), part)
            size = hf_shape(spec)[dimension] // 2
            expected = whole.take(range(size), axis=spec.stack + dimension)
            np.testing.assert_array_equal(found, expected, err_msg=f"{path} {axis} {inner}")


# --- adapters ---


def shapes_of(specs: dict) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in hf_tensors(specs).items()}


def test_adapters_have_the_names_and_shapes_of_peft():
    lora = LoraConfig(3, 6.0, ("q_proj", "v_proj", "o_proj", "down_proj"))
    expected = {}
    for i in range(3):
        layer = f"base_model.model.model.layers.{i}"
        expected |= {
            f"{layer}.self_attn.q_proj.lora_A.weight": (3, 10),
            f"{layer}.self_attn.q_proj.lora_B.weight": (32, 3),
            f"{layer}.self_attn.v_proj.lora_A.weight": (3, 10),
            f"{layer}.self_attn.v_proj.lora_B.weight": (16, 3),
            f"{layer}.self_attn.o_proj.lora_A.weight": (3, 32),
            f"{layer}.self_attn.o_proj.lora_B.weight": (10, 3),
            f"{layer}.mlp.down_proj.lora_A.weight": (3, 6),
            f"{layer}.mlp.down_proj.lora_B.weight": (10, 3),
        }
    assert shapes_of(lora_specs(PLAIN, lora)) == expected


def test_the_parts_of_a_fused_projection_share_one_adapter():
    lora = LoraConfig(3, 6.0, ("qkv_proj", "gate_up_proj"))
    specs = lora_specs(config("fused_biases"), lora)
    expected = {}
    for i in range(3):
        layer = f"base_model.model.model.layers.{i}"
        expected |= {
            f"{layer}.self_attn.qkv_proj.lora_A.weight": (3, 10),
            f"{layer}.self_attn.qkv_proj.lora_B.weight": (64, 3),
            f"{layer}.mlp.gate_up_proj.lora_A.weight": (3, 10),
            f"{layer}.mlp.gate_up_proj.lora_B.weight": (12, 3),
        }
    assert shapes_of(specs) == expected
    assert sum(path[-1] == "qkv_proj_lora_a" for path in specs) == 1
    pieces = hf_tensors(specs)["base_model.model.model.layers.1.self_attn.qkv_proj.lora_B.weight"]
    assert [(piece.path[-1], piece.start) for piece in pieces.pieces] == [
        ("query_lora_b", 0),
        ("key_lora_b", 32),
        ("value_lora_b", 48),
    ]


def test_an_adapter_is_split_as_the_matrix_that_it_adapts():
    specs = lora_specs(PLAIN, LoraConfig(3, 6.0, ("q_proj", "o_proj")))
    axes = {path[-1]: spec.axes for path, spec in specs.items()}
    assert axes == {
        "q_proj_lora_a": ("layers", "rank", "embed"),
        "query_lora_b": ("layers", "heads", "head_dim", "rank"),
        "o_proj_lora_a": ("layers", "rank", "heads", "head_dim"),
        "output_lora_b": ("layers", "embed", "rank"),
    }
    assert {spec.init for path, spec in specs.items() if path[-1].endswith("_a")} == {"lora_a"}
    assert {spec.init for path, spec in specs.items() if path[-1].endswith("_b")} == {"zeros"}
    assert LoraConfig(4, 6.0, ()).scale == 1.5


@pytest.mark.parametrize(
    ("table", "target", "known"),
    [
        ("plain", "qkv_proj", ALL_LINEAR),
        ("plain", "lm_head", ALL_LINEAR),
        ("plain", "embed_tokens", ALL_LINEAR),
        ("plain", "q_norm", ALL_LINEAR),
        ("fused", "q_proj", {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
        ("experts", "gate_proj", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("experts", "gate", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("mixtral", "w1", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("gpt_oss", "router", {"q_proj", "k_proj", "v_proj", "o_proj"}),
    ],
)
def test_a_target_that_cannot_be_adapted_is_refused_beside_those_that_can(table, target, known):
    with pytest.raises(UserError) as error:
        lora_specs(config(table), LoraConfig(3, 6.0, ("o_proj", target)))
    said, choices = str(error.value).split("; this model has ")
    assert target in said and "o_proj" not in said
    assert set(choices.split(", ")) == known


def test_a_spec_says_what_its_stack_and_module_are():
    spec = ParamSpec((2, 3, 4), ("layers", "experts", "mlp"), "ones", "a.{layer}.b.{expert}.c.w")
    assert (spec.stack, spec.module) == (2, "c")
    assert hf_name(spec, (1, 2)) == "a.1.b.2.c.w"
    flat = ParamSpec((4,), ("embed",), "ones", "model.norm.weight")
    assert (flat.stack, flat.module, hf_name(flat, ())) == (0, "norm", "model.norm.weight")
