"""The reference of the policy's tests: a tiny random Qwen3 of the transformers library."""

import os
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

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


def logits_of(model: Qwen3ForCausalLM, tokens_BT: np.ndarray) -> np.ndarray:
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
                "query": stack("self_attn.q_proj", lambda x: x.T.reshape(D, -1, H)),
                "key": stack("self_attn.k_proj", lambda x: x.T.reshape(D, -1, H)),
                "value": stack("self_attn.v_proj", lambda x: x.T.reshape(D, -1, H)),
                "output": stack("self_attn.o_proj", lambda x: x.T.reshape(-1, H, D)),
                "query_norm": stack("self_attn.q_norm"),
                "key_norm": stack("self_attn.k_norm"),
            },
            "mlp_norm": {"scale": stack("post_attention_layernorm")},
            "mlp": {
                name: stack(f"mlp.{name}_proj", lambda x: x.T) for name in ("gate", "up", "down")
            },
        },
        "final_norm": {"scale": state["model.norm.weight"]},
    }
    if not c.tie_word_embeddings:
        params["lm_head"] = np.ascontiguousarray(state["lm_head.weight"].T)
    return params
