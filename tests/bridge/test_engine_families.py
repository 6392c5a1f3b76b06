"""Every architecture through the bridge: dummy weights, then two versions, against transformers.

What can go wrong is vLLM's part of the way: it reloads each family's layers by other code, and a
reload that leaves a tensor behind is silent. So the tensors are those of a saved checkpoint, by the
names that it has on the disk, and the reference is transformers alone.
"""

import dataclasses

import numpy as np
import pytest

from tests.bridge.conftest import VOCAB, TinyModel, packed

pytest.importorskip("vllm")
pytest.importorskip("transformers")

from bridge.channels.shuttle import ShuttleChannel
from bridge.engines.vllm import EngineDead, EngineSettings
from tests.bridge.forked_engine import ForkedEngines

WINDOW = 16
TEXT = [int(t) for t in np.random.default_rng(0).integers(0, VOCAB, 60)]  # longer than a window

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # the least that vLLM's CPU attention has
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # wide, so that a tensor left behind costs whole nats
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 7,
    "pad_token_id": None,
}
NO_HEAD_DIM = {"hidden_size": 128}  # families that divide it by the heads
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ALTERNATING = ["sliding_attention", "full_attention"] * 2

FAMILIES = {
    "llama3": ("Llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-sliding": ("Mistral", {"sliding_window": WINDOW}),
    "qwen2": ("Qwen2", NO_HEAD_DIM | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {}),
    "gemma2": (
        "Gemma2",
        {
            "tie_word_embeddings": True,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 8.0,
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            "tie_word_embeddings": True,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 24,
            "layer_types": ALTERNATING,
        },
    ),
    "olmo2": ("Olmo2", NO_HEAD_DIM),
    "phi3": ("Phi3", NO_HEAD_DIM | {"sliding_window": WINDOW}),
    "granite": (
        "Granite",
        NO_HEAD_DIM
        | {
            "tie_word_embeddings": True,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.1,
            "residual_multiplier": 0.4,
            "logits_scaling": 2.0,
        },
    ),
    "qwen3-moe": (
        "Qwen3Moe",
        {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,  # not a multiple of 32: vLLM's CPU kernel pads it
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt-oss": (
        "GptOss",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": WINDOW,
            "layer_types": ALTERNATING,
        },
    ),
}


class OnDisk(TinyModel):
    """Its tensors are those of the saved checkpoint: experts, for one, are fused only in memory."""

    def state(self):
        from safetensors.torch import load_file

        return load_file(self.directory / "model.safetensors")


def make(family, seed, directory):
    import torch
    import transformers

    name, changes = FAMILIES[family]
    text = "Text" if name == "Gemma3" else ""
    config = getattr(transformers, f"{name}{text}Config")(**COMMON | changes)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config).float().eval()
    model.set_attn_implementation("eager")  # the only one with softcaps and sinks
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms, biases and sinks start as constants.
            if parameter.dim() == 1 or name.endswith("bias"):
                parameter += 0.5 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    return OnDisk(directory, model)


@pytest.fixture(scope="module")
def engines():
    engines = ForkedEngines()
    yield engines
    engines.close()


@pytest.fixture
def settings():
    return EngineSettings(
        dtype="float32",
        max_model_len=256,
        max_num_seqs=4,
        kv_cache_bytes=64 << 20,
        enforce_eager=True,
    )


def publish(engine, channel, model, version):
    ticket = channel.publish(*packed(model, version))
    engine.call("stage", ticket.to_json(), model.expected(), 20.0)
    return engine.call("commit", version)


def assert_serves(engine, model, version, text=TEXT):
    np.testing.assert_allclose(engine.call("score", text), model.scores(text), atol=1e-4)
    request = {
        "tokens": text,
        "n": 1,
        "max_new_tokens": 12,
        "temperature": 0.0,
        "stop_tokens": [],
        "seed": 1,
        "version": version,
    }
    (rollout,) = engine.call("generate", request)
    tokens = rollout["tokens"].tolist()
    rows = model.logprobs([*text, *tokens])[len(text) - 1 : -1]
    assert rows.argmax(-1).tolist() == tokens
    np.testing.assert_allclose(rollout["logprobs"], rows.max(-1), atol=1e-4)
    assert set(rollout["versions"].tolist()) == {version}


@pytest.mark.parametrize("family", FAMILIES)
def test_two_versions_are_served_as_transformers_has_them(engines, settings, tmp_path, family):
    models = [make(family, seed, tmp_path / f"model-{seed}") for seed in (0, 1)]
    assert np.abs(models[0].scores(TEXT) - models[1].scores(TEXT)).max() > 1
    channel = ShuttleChannel(tmp_path / "channel")
    with engines.engine(settings, models[0].files()) as engine:
        for version, model in enumerate(models, start=1):
            publish(engine, channel, model, version)
            assert_serves(engine, model, version)
        report = engine.call("examine", 60.0)
        assert not report["wrong"] and not report["unchecked"]


def test_an_engine_says_that_its_core_died(engines, settings, tmp_path):
    """What it had taken on is not reported any more, but for what ended before.

    It has no tokenizer, so that options about text end at once.
    """
    model = make("qwen3", 0, tmp_path / "model")
    settings = dataclasses.replace(settings, load_format="auto")
    work = {"tokens": TEXT, "n": 4, "max_new_tokens": 50, "temperature": 1.0, "stop_tokens": []}
    work |= {"seed": 1, "version": 0, "straggler_s": None}
    with engines.engine(settings, str(model.directory)) as engine:
        text = work | {"id": "text", "stop_strings": ["x"], "bad_words": ["y"]}
        engine.call("submit", [work | {"id": "long"}, text])
        (ended,) = engine.call("poll", 60.0)["done"]
        assert ended["id"] == "text"
        assert "stop_strings, bad_words: " in ended["refused"]
        assert "EngineSettings.tokenizer" in ended["refused"]
        engine.kill_core()
        with pytest.raises(EngineDead, match="forked-engine: "):
            engine.call("poll", 60.0)
        with pytest.raises(EngineDead, match="forked-engine: "):
            engine.call("submit", [work | {"id": "later"}])


def test_a_loader_may_write_to_the_biases_that_it_is_given(engines, settings, tmp_path):
    """gpt-oss's does in every rank but the first, and what arrived can only be read."""
    model = make("gpt-oss", 0, tmp_path / "model")
    channel = ShuttleChannel(tmp_path / "channel")
    settings = dataclasses.replace(settings, tensor_parallel=2)
    with engines.engine(settings, model.files()) as engine:
        publish(engine, channel, model, 1)
        assert_serves(engine, model, 1)
