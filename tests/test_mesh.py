"""The table of axes decides how every parameter lies on the mesh."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxrl.config import MeshSection
from jaxrl.mesh import RULES, batch_sharding, kept_whole, make_mesh, param_shardings, row_shards
from jaxrl.models.config import DecoderConfig, LoraConfig, MoeConfig
from jaxrl.models.params import lora_specs, param_specs
from jaxrl.models.rope import Rope
from jaxrl.types import UserError

CONFIG = DecoderConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rope=Rope((1.0,) * 8),
    norm_eps=1e-6,
    tied_embeddings=False,
    max_positions=64,
    eos_token_ids=(),
    qk_norm="head",
)


def shard_shapes(config, **axes):
    """'layers/mlp/up' -> shape of one device's part."""
    specs = param_specs(config)
    shardings = param_shardings(specs, make_mesh(MeshSection(**axes)))
    flat, _ = jax.tree_util.tree_flatten_with_path(shardings)
    return {
        "/".join(key.key for key in path): sharding.shard_shape(
            specs[tuple(key.key for key in path)].shape
        )
        for path, sharding in flat
    }


def test_every_parameter_is_split_over_fsdp_and_tensor_only():
    assert shard_shapes(CONFIG, data=2, fsdp=2, tensor=2) == {
        "embed": (32, 16),
        "layers/attention_norm/scale": (3, 16),
        "layers/attention/query": (3, 2, 16, 16),
        "layers/attention/key": (3, 1, 16, 16),
        "layers/attention/value": (3, 1, 16, 16),
        "layers/attention/output": (3, 16, 2, 16),
        "layers/attention/query_norm": (3, 16),
        "layers/attention/key_norm": (3, 16),
        "layers/mlp_norm/scale": (3, 16),
        "layers/mlp/gate": (3, 24, 16),
        "layers/mlp/up": (3, 24, 16),
        "layers/mlp/down": (3, 16, 24),
        "final_norm/scale": (16,),
        "lm_head": (32, 16),
    }


def test_on_one_device_nothing_is_split():
    specs = param_specs(CONFIG)
    assert shard_shapes(CONFIG) == {"/".join(path): spec.shape for path, spec in specs.items()}


@pytest.mark.parametrize(
    ("axes", "part"),
    [
        ({"data": 8}, 1),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 2),
        ({"tensor": 8}, 8),
        ({}, 8),
        ({"fsdp": 2, "expert": 4}, 1),
    ],
)
def test_rows_of_a_batch_are_split_over_all_but_tensor(axes, part):
    mesh = make_mesh(MeshSection(**axes))
    assert row_shards(mesh) == MeshSection(**axes).row_shards == 8 // part
    assert MeshSection(**axes).devices == mesh.size
    for shape in ((8,), (8, 5), (8, 5, 3)):
        assert batch_sharding(mesh, len(shape)).shard_shape(shape) == (part, *shape[1:])


def test_a_mesh_takes_the_first_devices_in_order():
    mesh = make_mesh(MeshSection(data=2, tensor=2))
    assert mesh.axis_names == ("data", "fsdp", "expert", "tensor")
    assert mesh.devices.shape == (2, 1, 1, 2)
    assert set(mesh.devices.ravel()) == set(jax.devices()[:4])
    x = jax.device_put(np.arange(8), jax.NamedSharding(mesh, P("data")))
    assert np.array_equal(jax.jit(lambda x: x + 1)(x), np.arange(1, 9))


def test_too_few_devices_is_an_error_that_says_how_many_there_are():
    with pytest.raises(
        UserError, match=r"2 \* 3 \* 1 \* 2 = 12 devices, and jax sees 8 \(cpu\); JAX_"
    ):
        make_mesh(MeshSection(data=2, fsdp=3, tensor=2))


def test_dimensions_that_cannot_be_split_are_kept_whole_and_said():
    odd = dataclasses.replace(CONFIG, vocab_size=63, num_kv_heads=1, hidden_size=31)
    assert shard_shapes(odd, fsdp=2, tensor=2) == {
        "embed": (63, 31),
        "layers/attention_norm/scale": (3, 31),
        "layers/attention/query": (3, 2, 16, 31),
        "layers/attention/key": (3, 1, 16, 31),
        "layers/attention/value": (3, 1, 16, 31),
        "layers/attention/output": (3, 31, 2, 16),
        "layers/attention/query_norm": (3, 16),
        "layers/attention/key_norm": (3, 16),
        "layers/mlp_norm/scale": (3, 31),
        "layers/mlp/gate": (3, 24, 31),
        "layers/mlp/up": (3, 24, 31),
        "layers/mlp/down": (3, 31, 24),
        "final_norm/scale": (31,),
        "lm_head": (63, 31),
    }
    mesh = make_mesh(MeshSection(fsdp=2, tensor=2))
    assert kept_whole(param_specs(odd), mesh) == [
        "embed = 31 is not a multiple of mesh.fsdp, and is kept whole",
        "kv_heads = 1 is not a multiple of mesh.tensor, and is kept whole",
        "vocab = 63 is not a multiple of mesh.tensor, and is kept whole",
    ]


@pytest.mark.parametrize("axes", [{}, {"data": 2}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_nothing_is_said_where_everything_is_split(axes):
    assert kept_whole(param_specs(CONFIG), make_mesh(MeshSection(**axes))) == []


def test_every_expert_is_split_as_an_mlp_is():
    moe = MoeConfig(6, 2, 24, True, "qwen3")
    shapes = shard_shapes(dataclasses.replace(CONFIG, moe=moe), data=2, fsdp=2, tensor=2)
    experts = {path: shape for path, shape in shapes.items() if path.startswith("layers/moe/")}
    assert experts == {
        "layers/moe/router": (3, 6, 16),
        "layers/moe/gate": (3, 6, 16, 12),
        "layers/moe/up": (3, 6, 16, 12),
        "layers/moe/down": (3, 6, 12, 16),
    }


def test_experts_are_split_over_their_axis_and_all_else_over_fsdp_and_expert():
    moe = MoeConfig(6, 2, 24, True, "qwen3")
    config = dataclasses.replace(CONFIG, moe=moe)
    shapes = shard_shapes(config, fsdp=2, expert=2, tensor=2)
    assert shapes["layers/moe/router"] == (3, 6, 8)
    assert shapes["layers/moe/gate"] == shapes["layers/moe/up"] == (3, 3, 16, 12)
    assert shapes["layers/moe/down"] == (3, 3, 12, 16)
    assert shapes["embed"] == (32, 8)
    assert shapes["layers/attention/output"] == (3, 8, 2, 16)
    assert shapes["final_norm/scale"] == (8,)


def test_what_two_axes_do_not_divide_is_split_over_the_first_alone():
    config = dataclasses.replace(CONFIG, hidden_size=30)
    axes = {"fsdp": 2, "expert": 2}
    assert shard_shapes(config, **axes)["embed"] == (64, 15)
    assert kept_whole(param_specs(config), make_mesh(MeshSection(**axes))) == [
        "embed = 30 is not a multiple of mesh.fsdp * mesh.expert, and is split over mesh.fsdp alone"
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"tied_embeddings": True},
        {"tied_embeddings": False},
        {"qkv_bias": True, "output_bias": True, "mlp_bias": True, "fused_projections": True},
        {"qk_norm": "all", "norm_placement": "post"},
        {"norm_placement": "both", "attention_sinks": True},
        {"moe": MoeConfig(6, 2, 24, True, "mixtral")},
        {"moe": MoeConfig(6, 2, 24, True, "gpt_oss")},
    ],
)
def test_every_axis_of_every_parameter_has_a_rule_and_a_size(changes):
    config = dataclasses.replace(CONFIG, **changes)
    targets = ("o_proj",) if config.moe else ("o_proj", "down_proj")
    specs = param_specs(config) | lora_specs(config, LoraConfig(4, 8.0, targets))
    for path, spec in specs.items():
        assert len(spec.axes) == len(spec.shape), path
        assert set(spec.axes) <= RULES.keys(), path
