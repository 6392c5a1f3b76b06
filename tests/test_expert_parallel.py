"""Experts split over devices are the experts of one device, wherever tokens go."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bridge.checkpoints import load_params, save_model
from bridge.export import Exporter
from jaxrl.config import MeshSection
from jaxrl.learner import check_mesh
from jaxrl.mesh import batch_sharding, make_mesh, param_shardings
from jaxrl.models.config import DecoderConfig, MoeConfig
from jaxrl.models.decoder import Policy
from jaxrl.models.params import param_specs, tree_of
from jaxrl.models.rope import Rope
from jaxrl.sampler import InProcessEngine
from jaxrl.types import Prompt, Sampling, UserError

CONFIG = DecoderConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rope=Rope(tuple(0.5**i for i in range(8))),
    norm_eps=1e-6,
    tied_embeddings=False,
    max_positions=64,
    eos_token_ids=(7,),
    qk_norm="head",
)
EXPERTS = {  # Mixtral's are Qwen3's under other names
    "qwen3": MoeConfig(8, 3, 24, True, "qwen3"),
    # 25 is odd: `tensor` splits the 50 columns of gate and up, and not the 25 rows of down.
    "gpt_oss": MoeConfig(4, 2, 25, True, "gpt_oss"),
    "gpt_oss_even": MoeConfig(4, 2, 24, True, "gpt_oss"),
}
MESHES = [{"expert": 2}, {"expert": 2, "fsdp": 2, "tensor": 2}]
TOKENS_BT = np.random.default_rng(0).integers(0, 64, (8, 12)).astype(np.int32)


def make_policy(layout: str, seed: int = 1):
    """A policy for one device, its parameters (no bias is zero) and their table."""
    moe = EXPERTS[layout]
    config = dataclasses.replace(CONFIG, moe=moe, attention_sinks=moe.layout == "gpt_oss")
    specs = param_specs(config)
    rng = np.random.default_rng(seed)
    spread = {"normal": (0.0, 0.15), "zeros": (0.0, 0.1), "ones": (1.0, 0.1)}
    params = {
        path: jnp.asarray(rng.normal(*spread[spec.init], spec.shape), jnp.float32)
        for path, spec in specs.items()
    }
    return Policy(config, jnp.float32), tree_of(params), specs


def logits_and_gradient(policy, params, tokens_BT):
    def loss(params):
        logits_BTV = policy.logits(params, tokens_BT)
        return (logits_BTV**2).mean(), logits_BTV

    gradient, logits_BTV = jax.jit(jax.grad(loss, has_aux=True))(params)
    return {"logits": logits_BTV} | gradient


def assert_close(found, expected):
    """To 1e-5 of the range of each array."""
    jax.tree.map(
        lambda f, e: np.testing.assert_allclose(f, e, rtol=0, atol=1e-5 * np.abs(e).max()),
        found,
        expected,
    )


def check_on_meshes(policy, params, specs, meshes, tokens_BT=TOKENS_BT):
    expected = logits_and_gradient(policy, params, tokens_BT)
    for axes in meshes:
        mesh = make_mesh(MeshSection(**axes))
        placed = jax.device_put(params, param_shardings(specs, mesh))
        if len(tokens_BT) % MeshSection(**axes).row_shards == 0:
            tokens_BT = jax.device_put(tokens_BT, batch_sharding(mesh, 2))
        found = logits_and_gradient(policy._replace(mesh=mesh), placed, tokens_BT)
        assert_close(found, expected)


@pytest.mark.parametrize(
    ("layout", "meshes"), [("qwen3", MESHES), ("gpt_oss", MESHES), ("gpt_oss_even", MESHES[1:])]
)
def test_logits_and_gradients_are_those_of_one_device(layout, meshes):
    check_on_meshes(*make_policy(layout), meshes)


def test_without_the_axis_each_device_runs_its_own_rows():
    check_on_meshes(*make_policy("gpt_oss_even"), [{"data": 2, "fsdp": 2, "tensor": 2}])


def test_no_token_is_dropped_where_all_choose_the_same_experts():
    policy, params, specs = make_policy("qwen3")
    router = params["layers"]["moe"]["router"]
    params["layers"]["moe"]["router"] = jnp.zeros_like(router)  # all equal: the first three
    check_on_meshes(policy, params, specs, MESHES[:1])
    gradient = logits_and_gradient(policy, params, TOKENS_BT)["layers"]["moe"]["down"]
    norms_LE = np.sqrt((np.asarray(gradient) ** 2).sum((2, 3)))
    assert (norms_LE[:, :3] > 0).all() and (norms_LE[:, 3:] == 0).all()


def test_rows_that_no_axis_divides_are_everyone_s():
    check_on_meshes(*make_policy("qwen3"), MESHES[1:], TOKENS_BT[:3])


def test_the_sampler_draws_the_same_tokens():
    policy, params, specs = make_policy("qwen3")
    mesh = make_mesh(MeshSection(**MESHES[1]))
    prompts = [Prompt(i, "", tuple(TOKENS_BT[i, : 3 + i].tolist()), {}) for i in range(3)]
    drawn = []
    for on, weights in (
        (None, params),
        (mesh, jax.device_put(params, param_shardings(specs, mesh))),
    ):
        engine = InProcessEngine(policy._replace(mesh=on))
        engine.publish(weights, 1)
        drawn.append(engine.generate(prompts, Sampling(2, 5, 1.0, (7,)), [1, 2, 3]))
    for one, many in zip(*drawn, strict=True):
        for a, b in zip(one.rollouts, many.rollouts, strict=True):
            np.testing.assert_array_equal(a.tokens, b.tokens)
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


@pytest.mark.parametrize("layout", ["qwen3", "gpt_oss_even"])
def test_split_experts_are_loaded_and_exported_bit_for_bit(layout, tmp_path):
    _, params, specs = make_policy(layout)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text("{}")
    export = Exporter(specs, "float32")
    save_model(export(params), tmp_path / "source", tmp_path / "model")
    shardings = param_shardings(specs, make_mesh(MeshSection(**MESHES[1])))
    loaded = load_params(tmp_path / "model", specs, shardings)
    down = loaded["layers"]["moe"]["down"]
    assert down.addressable_shards[0].data.shape[1] == down.shape[1] // 2
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    for ours, theirs in zip(export(loaded), export(params), strict=True):
        assert ours.name == theirs.name
        np.testing.assert_array_equal(ours.data, theirs.data)


def mesh_refusal(decoder: DecoderConfig, **axes) -> str | None:
    config = SimpleNamespace(mesh=MeshSection(**axes), model=SimpleNamespace(path="some/model"))
    try:
        check_mesh(config, decoder)  # pyright: ignore[reportArgumentType]
    except UserError as error:
        return str(error)


def test_an_axis_that_the_model_cannot_use_is_refused_with_a_way_out():
    dense, moe = CONFIG, dataclasses.replace(CONFIG, moe=EXPERTS["qwen3"])
    assert mesh_refusal(dense) is None
    assert mesh_refusal(dense, expert=4, fsdp=2) == (
        "mesh.expert = 4: some/model has no experts to split; set it to 1, and make mesh.fsdp = 8 "
        "to use the same devices"
    )
    assert mesh_refusal(moe) is mesh_refusal(moe, expert=8) is mesh_refusal(moe, expert=2) is None
    assert mesh_refusal(moe, expert=6) == (
        "mesh.expert = 6 does not divide the 8 experts of some/model; the next that does is 4. "
        "mesh.fsdp takes any number of devices"
    )
    assert "does not divide the 8 experts" in str(mesh_refusal(moe, expert=16))
