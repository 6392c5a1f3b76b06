"""References of the policy's tests: tiny random models of the transformers library.

A Qwen3 with its parameter tree written out by hand, and at least one of every family.
"""

import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

os.environ.setdefault("TQDM_DISABLE", "1")
VOCAB = 64
STOP = 7


def make_reference(seed: int = 0, **changes) -> Qwen3ForCausalLM:
    """Float32. Weights wide enough that every part of the model shows in the logits; head_dim is
    not hidden_size / heads, and no norm has scale 1."""
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "eos_token_id": STOP,
        "initializer_range": 0.3,
        "attn_implementation": "eager",
    }
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(Qwen3Config(**(settings | changes))).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    return model


def save_reference(model: Qwen3ForCausalLM, directory: Path, **options) -> Path:
    model.save_pretrained(directory, **options)
    return directory


def logits_of(model: Any, tokens_BT: np.ndarray) -> np.ndarray:
    """[B, T, V], in the dtype of the model."""
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens_BT), dtype=torch.long)).logits.numpy()


def params_of(model: Qwen3ForCausalLM) -> dict:
    """The model's weights as the trainer's parameter tree of float32 numpy arrays, written out by
    hand: nothing here is read from the table of the code under test."""
    c = model.config
    D, H = c.hidden_size, c.head_dim
    state = {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}

    def stack(name, layout=lambda x: x):
        rows = [
            layout(state[f"model.layers.{i}.{name}.weight"]) for i in range(c.num_hidden_layers)
        ]
        return np.ascontiguousarray(np.stack(rows))

    params = {
        "embed": state["model.embed_tokens.weight"],
        "layers": {
            "attention_norm": {"scale": stack("input_layernorm")},
            "attention": {
                "query": stack("self_attn.q_proj", lambda x: x.reshape(-1, H, D)),
                "key": stack("self_attn.k_proj", lambda x: x.reshape(-1, H, D)),
                "value": stack("self_attn.v_proj", lambda x: x.reshape(-1, H, D)),
                "output": stack("self_attn.o_proj", lambda x: x.reshape(D, -1, H)),
                "query_norm": stack("self_attn.q_norm"),
                "key_norm": stack("self_attn.k_norm"),
            },
            "mlp_norm": {"scale": stack("post_attention_layernorm")},
            "mlp": {name: stack(f"mlp.{name}_proj") for name in ("gate", "up", "down")},
        },
        "final_norm": {"scale": state["model.norm.weight"]},
    }
    if not c.tie_word_embeddings:
        params["lm_head"] = state["lm_head.weight"]
    return params


# --- one of every family ---

FAMILY_VOCAB = 99  # no mesh divides it
_SIZES = {
    "vocab_size": FAMILY_VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "dtype": "float32",
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
_LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0 + i / 10 for i in range(6)],
    "long_factor": [2.0] * 6,
    "original_max_position_embeddings": 128,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_parameters": _LLAMA3, "num_hidden_layers": 2}),
    "llama_biases_linear_tied": (
        "Llama",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": _LINEAR,
            "num_key_value_heads": 1,
        },
    ),
    "mistral_window": ("Mistral", {"sliding_window": 16, "head_dim": 32, "num_hidden_layers": 3}),
    "qwen2_windows_from_layer_1": (
        "Qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 12,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2_yarn_one_kv_head": ("Qwen2", {"rope_parameters": _YARN, "num_key_value_heads": 1}),
    "qwen3_biases": ("Qwen3", {"head_dim": 32, "attention_bias": True, "num_hidden_layers": 2}),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 32,
            "sliding_window": 16,
            "query_pre_attn_scalar": 40,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 8.0,
        },
    ),
    "gemma3": (
        "Gemma3Text",
        {
            "head_dim": 32,
            "sliding_window": 16,
            "query_pre_attn_scalar": 40,
            "sliding_window_pattern": 3,
            "num_key_value_heads": 1,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
        },
    ),
    "gemma3_untied": (
        "Gemma3Text",
        {
            "head_dim": 8,
            "sliding_window": 20,
            "sliding_window_pattern": 2,
            "num_hidden_layers": 3,
            "tie_word_embeddings": False,
            "final_logit_softcapping": 6.0,
            "attention_bias": True,
        },
    ),
    "olmo2": ("Olmo2", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "phi3_half_rotary_window": (
        "Phi3",
        {
            "sliding_window": 20,
            "num_hidden_layers": 2,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
    "phi3_longrope_tied": (
        "Phi3",
        {
            "original_max_position_embeddings": 128,
            "tie_word_embeddings": True,
            "num_key_value_heads": 4,
            "rope_parameters": _LONG,
        },
    ),
    "granite": (
        "Granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.2,
            "logits_scaling": 2.5,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "head_dim": 32,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "norm_topk_prob": True,
            "num_hidden_layers": 3,
        },
    ),
    "qwen3_moe_not_normalized": (
        "Qwen3Moe",
        {
            "head_dim": 16,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "norm_topk_prob": False,
            "tie_word_embeddings": True,
            "num_key_value_heads": 1,
            "num_hidden_layers": 2,
        },
    ),
    "mixtral_window": (
        "Mixtral",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 24,
            "num_hidden_layers": 2,
            "head_dim": 16,
        },
    ),
    "gpt_oss": (
        "GptOss",
        {
            "head_dim": 32,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 16,
            "rope_parameters": _YARN
            | {
                "rope_theta": 150_000.0,
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 64,
            },
        },
    ),
}


@functools.cache
def family_model(name: str) -> Any:
    """Float32, the same object for every test: not to be changed.

    Every part shows in the logits: weights are wide, and no bias, norm or sink is what it is where
    it does nothing.
    """
    family, changes = FAMILIES[name]
    config = getattr(transformers, f"{family}Config")(**(_SIZES | changes))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if "bias" in path or "sinks" in path:
                weight.uniform_(-0.5, 0.5)
            elif "norm" in path:  # Gemma's scale is 1 + w
                weight.uniform_(0.5, 1.5).sub_(float(family.startswith("Gemma")))
            elif "router" in path or path.endswith("gate.weight"):
                weight.normal_(0.0, 0.3)
            elif family == "GptOss" and "gate_up_proj" in path:  # so that its limits are reached
                weight.normal_(0.0, 0.8)
    return model
