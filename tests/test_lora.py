"""Adapters are PEFT's: the same function, the same training, files that it loads."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, Phi3Config, Phi3ForCausalLM

from bridge.checkpoints import load_params
from bridge.export import Exporter
from bridge.names import hf_tensors
from bridge.peft import adapter_config, save_adapter
from jaxrl.config import MeshSection, UpdateSection
from jaxrl.mesh import make_mesh, param_shardings, row_shards
from jaxrl.models.config import LoraConfig, load_config
from jaxrl.models.decoder import Policy, init_params
from jaxrl.models.lora import fingerprint, merged_params, with_adapters
from jaxrl.models.params import lora_specs, param_specs
from jaxrl.packing import pack
from jaxrl.update import init_state, make_optimizer, make_update
from tests.reference_policy import VOCAB, make_reference, save_reference
from tests.test_update import ALGORITHM, OPTIMIZER, TEMPERATURE, TorchUpdate, make_batch

RANK, ALPHA = 3, 7.5
TOKENS_BT = np.random.default_rng(0).integers(0, VOCAB, (2, 24))
MESHES = {"one_device": MeshSection(), "mesh": MeshSection(data=2, fsdp=2, tensor=2)}


def phi3(seed: int):
    torch.manual_seed(seed)
    config = Phi3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=7,
        initializer_range=0.3,
        attn_implementation="eager",
    )
    return Phi3ForCausalLM(config).float().eval()


BASES = {
    "qwen3": (make_reference, ("q_proj", "v_proj", "o_proj", "down_proj")),
    "phi3": (phi3, ("qkv_proj", "o_proj", "gate_up_proj")),
}


class Adapted:
    """The same base and the same random adapters, in torch with PEFT and in our trees."""

    def __init__(self, kind: str, folder):
        make, targets = BASES[kind]
        base = make(seed=5)
        with torch.no_grad():  # a frozen base is kept in bfloat16: let both have the same
            for weight in base.parameters():
                weight.copy_(weight.bfloat16().float())
        self.directory = save_reference(base, folder / kind)
        self.config = load_config(self.directory)
        self.lora = LoraConfig(RANK, ALPHA, targets)
        self.specs, self.trained = param_specs(self.config), lora_specs(self.config, self.lora)
        settings = peft.LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            target_modules=list(targets),
            lora_dropout=0.0,
            task_type="CAUSAL_LM",
        )
        self.model = peft.get_peft_model(base, settings)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                if "lora_" in name:
                    weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
        self.policy = Policy(self.config, jnp.float32, lora_scale=self.lora.scale)

    def torch_adapters(self) -> dict[str, np.ndarray]:
        """By the names that PEFT saves them under."""
        return {
            name.replace(".default", ""): weight.detach().float().numpy()
            for name, weight in self.model.named_parameters()
            if "lora_" in name
        }

    def adapters(self, mesh=None):
        """Ours, put together by hand."""
        tree = jax.eval_shape(lambda: init_params(self.trained, jax.random.key(0)))
        named = self.torch_adapters()
        assert named.keys() == hf_tensors(self.trained).keys()
        leaves, structure = jax.tree.flatten_with_path(tree)
        filled = [self._leaf([k.key for k in path], leaf.shape, named) for path, leaf in leaves]
        tree = jax.tree.unflatten(structure, [jnp.asarray(x) for x in filled])
        mesh = mesh or make_mesh(MeshSection())
        return jax.tree.map(jax.device_put, tree, param_shardings(self.trained, mesh))

    def _leaf(self, path, shape, named) -> np.ndarray:
        """By hand: which PEFT matrix, which of its rows."""
        _, block, leaf = path
        block = "self_attn" if block == "attention" else "mlp"
        c, H = self.config, self.config.head_dim
        fused = {
            "query": ("qkv_proj", 0, c.num_heads * H),
            "key": ("qkv_proj", c.num_heads * H, c.num_kv_heads * H),
            "value": ("qkv_proj", (c.num_heads + c.num_kv_heads) * H, c.num_kv_heads * H),
            "gate": ("gate_up_proj", 0, c.intermediate_size),
            "up": ("gate_up_proj", c.intermediate_size, c.intermediate_size),
        }
        own = {"query": "q_proj", "value": "v_proj", "output": "o_proj", "down": "down_proj"}
        rows = []
        for layer in range(c.num_layers):
            where = f"base_model.model.model.layers.{layer}.{block}."
            if leaf.endswith("_lora_a"):
                matrix = named[f"{where}{leaf.removesuffix('_lora_a')}.lora_A.weight"]
            else:
                part = leaf.removesuffix("_lora_b")
                if part in fused and c.fused_projections:
                    module, start, size = fused[part]
                    matrix = named[f"{where}{module}.lora_B.weight"][start : start + size]
                else:
                    matrix = named[f"{where}{own[part]}.lora_B.weight"]
            rows.append(matrix.reshape(shape[1:]))
        return np.stack(rows)

    def frozen(self, mesh=None):
        shardings = param_shardings(self.specs, mesh or make_mesh(MeshSection()))
        return load_params(self.directory, self.specs, shardings, "bfloat16")

    def torch_logits(self) -> np.ndarray:
        with torch.no_grad():
            return self.model(torch.tensor(TOKENS_BT)).logits.float().numpy()


@pytest.fixture(params=BASES)
def adapted(request, tmp_path):
    return Adapted(request.param, tmp_path)


def test_logits_with_adapters_are_those_of_peft(adapted):
    params = with_adapters(adapted.frozen(), adapted.adapters())
    ours, theirs = adapted.policy.logits(params, TOKENS_BT), adapted.torch_logits()
    np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.ptp(theirs))
    without = adapted.policy.logits(adapted.frozen(), TOKENS_BT)
    assert np.abs(without - theirs).max() > 0.1 * np.ptp(theirs)


def test_fresh_adapters_change_nothing(adapted):
    fresh = init_params(adapted.trained, jax.random.key(3))
    with_fresh = adapted.policy.logits(with_adapters(adapted.frozen(), fresh), TOKENS_BT)
    np.testing.assert_array_equal(with_fresh, adapted.policy.logits(adapted.frozen(), TOKENS_BT))
    into = [leaf for p, leaf in jax.tree.leaves_with_path(fresh) if "lora_a" in str(p)]
    assert into and all(np.ptp(leaf) > 0 for leaf in into)


def test_merged_weights_give_the_same_logits(adapted):
    params = with_adapters(adapted.frozen(), adapted.adapters())
    merged = merged_params(adapted.specs, adapted.lora, params)
    assert jax.tree.structure(merged) == jax.tree.structure(adapted.frozen())
    theirs = adapted.torch_logits()
    logits = Policy(adapted.config, jnp.float32).logits(merged, TOKENS_BT)
    np.testing.assert_allclose(logits, theirs, atol=2e-5 * np.ptp(theirs))


def test_accelerators_merge_without_rounding_as_a_cpu_does(adapted):
    """Asked of the program, because a CPU has one precision only."""
    params = with_adapters(adapted.frozen(), adapted.adapters())
    made = jax.make_jaxpr(lambda p: merged_params(adapted.specs, adapted.lora, p))(params)
    asked = [eqn.params["precision"] for eqn in made.eqns if eqn.primitive.name == "dot_general"]
    assert asked and set(asked) == {(jax.lax.Precision.HIGHEST,) * 2}


@pytest.mark.parametrize("mesh", MESHES)
def test_training_moves_the_adapters_as_torch_and_peft_do_and_nothing_else(mesh, tmp_path):
    adapted = Adapted("qwen3", tmp_path)
    devices = make_mesh(MESHES[mesh])
    frozen, optimizer = adapted.frozen(devices), make_optimizer(OPTIMIZER)
    before = jax.tree.map(np.array, frozen)
    state = init_state(adapted.adapters(devices), optimizer, devices)
    c = UpdateSection()
    update = make_update(
        adapted.policy, optimizer, ALGORITHM, c, TEMPERATURE, devices, state, frozen
    )
    trained = sum(np.prod(spec.shape) for spec in adapted.trained.values())
    assert sum(x.size for x in jax.tree.leaves(state.params)) == trained
    assert sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim) == 2 * trained

    reference = TorchUpdate(adapted.model)
    for seed in range(4):
        sampled = make_batch(adapted.model, seed)
        expected = reference(sampled)
        state, metrics = update(state, [pack(*sampled, c, row_shards(devices))])
        for name in ("loss", "grad_norm", "update_norm", "entropy"):
            np.testing.assert_allclose(metrics[name], expected[name], rtol=2e-4, err_msg=name)
        adapted.model.double()
    exported = {t.name: t for t in Exporter(adapted.trained, "float32")(state.params)}
    for name, weight in adapted.torch_adapters().items():
        ours = exported[name].data.view(np.float32).reshape(exported[name].shape)
        np.testing.assert_allclose(ours, weight, atol=3e-5, err_msg=name)
    jax.tree.map(np.testing.assert_array_equal, frozen, before)


def test_peft_loads_what_is_exported_on_top_of_the_base(adapted, tmp_path):
    adapters = adapted.adapters()
    settings = adapter_config(adapted.lora, adapted.trained, str(adapted.directory))
    save_adapter(Exporter(adapted.trained, "float32")(adapters), settings, tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(adapted.directory, attn_implementation="eager")
    loaded = peft.PeftModel.from_pretrained(base.float().eval(), tmp_path / "out")
    with torch.no_grad():
        logits = loaded(torch.tensor(TOKENS_BT)).logits.numpy()
    theirs = adapted.torch_logits()
    np.testing.assert_allclose(logits, theirs, atol=1e-6 * np.ptp(theirs))
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == RANK


def test_the_fingerprint_of_the_base_is_of_its_bits_and_not_of_its_mesh(tmp_path):
    adapted = Adapted("qwen3", tmp_path)
    frozen = adapted.frozen()
    mark = int(fingerprint(frozen))
    assert mark == int(fingerprint(adapted.frozen(make_mesh(MESHES["mesh"]))))
    embed = frozen["embed"]
    swapped = embed.at[0].set(embed[1]).at[1].set(embed[0])
    flipped = embed.at[3, 4].multiply(1.01)
    for other in (swapped, flipped):
        assert int(fingerprint({**frozen, "embed": other})) != mark
