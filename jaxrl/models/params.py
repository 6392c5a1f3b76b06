"""The parameters as data: one table, from which everything about them is derived.

Initialisation, shardings, checkpoint structure, loading and export all read `param_specs`, and so
cannot disagree. Standard library only: `bridge.names` reads the table where there is no jax.

A leaf that every layer has is stacked: its first axis is `layers`, and the decoder scans over it.
Logical axes (`mesh.RULES` maps them to mesh axes):

    layers   vocab   embed (hidden size)   heads   kv_heads   head_dim   mlp
"""

import dataclasses
from typing import Literal

from jaxrl.models.config import DecoderConfig

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One leaf of the parameter tree; always float32 in the trainer.

    `hf_name` is its Hugging Face name; `{layer}` stands where a stacked leaf has one tensor for
    each layer. `hf_matrix` says how our axes (without `layers`) make the [out, in] matrix of a
    torch Linear: the number of leading axes that are inputs. None: the layouts are the same.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: Literal["normal", "ones"]
    hf_name: str
    hf_matrix: int | None = None

    @property
    def stacked(self) -> bool:
        return self.axes[0] == "layers"


def param_specs(c: DecoderConfig) -> dict[Path, ParamSpec]:
    """Every leaf of the decoder, by its path in the parameter tree."""
    D, F, V, L = c.hidden_size, c.intermediate_size, c.vocab_size, c.num_layers
    N, K, H = c.num_heads, c.num_kv_heads, c.head_dim
    block = {
        ("attention_norm", "scale"): ((D,), ("embed",), "ones", "input_layernorm", None),
        ("attention", "query"): (
            (D, N, H),
            ("embed", "heads", "head_dim"),
            "normal",
            "self_attn.q_proj",
            1,
        ),
        ("attention", "key"): (
            (D, K, H),
            ("embed", "kv_heads", "head_dim"),
            "normal",
            "self_attn.k_proj",
            1,
        ),
        ("attention", "value"): (
            (D, K, H),
            ("embed", "kv_heads", "head_dim"),
            "normal",
            "self_attn.v_proj",
            1,
        ),
        ("attention", "output"): (
            (N, H, D),
            ("heads", "head_dim", "embed"),
            "normal",
            "self_attn.o_proj",
            2,
        ),
        ("attention", "query_norm"): ((H,), ("head_dim",), "ones", "self_attn.q_norm", None),
        ("attention", "key_norm"): ((H,), ("head_dim",), "ones", "self_attn.k_norm", None),
        ("mlp_norm", "scale"): ((D,), ("embed",), "ones", "post_attention_layernorm", None),
        ("mlp", "gate"): ((D, F), ("embed", "mlp"), "normal", "mlp.gate_proj", 1),
        ("mlp", "up"): ((D, F), ("embed", "mlp"), "normal", "mlp.up_proj", 1),
        ("mlp", "down"): ((F, D), ("mlp", "embed"), "normal", "mlp.down_proj", 1),
    }
    specs: dict[Path, ParamSpec] = {
        ("embed",): ParamSpec((V, D), ("vocab", "embed"), "normal", "model.embed_tokens.weight")
    }
    for path, (shape, axes, init, name, hf_matrix) in block.items():
        specs["layers", *path] = ParamSpec(
            (L, *shape), ("layers", *axes), init, f"model.layers.{{layer}}.{name}.weight", hf_matrix
        )
    specs["final_norm", "scale"] = ParamSpec((D,), ("embed",), "ones", "model.norm.weight")
    if not c.tied_embeddings:
        specs["lm_head",] = ParamSpec((D, V), ("embed", "vocab"), "normal", "lm_head.weight", 1)
    return specs
