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
Init = Literal["normal", "ones"]


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One leaf of the parameter tree; always float32 in the trainer.

    `hf_name` is its Hugging Face name; `{layer}` stands where a stacked leaf has one tensor for
    each layer. `hf_matrix` says how our axes (without `layers`) make the [out, in] matrix of a
    torch Linear: the number of leading axes that are inputs. None: the layouts are the same.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: Init
    hf_name: str
    hf_matrix: int | None = None

    @property
    def stacked(self) -> bool:
        return self.axes[0] == "layers"


def param_specs(c: DecoderConfig) -> dict[Path, ParamSpec]:
    """Every leaf of the decoder, by its path in the parameter tree."""
    sizes = {
        "layers": c.num_layers,
        "vocab": c.vocab_size,
        "embed": c.hidden_size,
        "heads": c.num_heads,
        "kv_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "mlp": c.intermediate_size,
    }

    def leaf(
        hf_name: str, axes: str, inputs: int | None = None, init: Init = "normal"
    ) -> ParamSpec:
        names = tuple(axes.split())
        shape = tuple(sizes[name] for name in names)
        return ParamSpec(shape, names, init, f"{hf_name}.weight", inputs)

    def norm(hf_name: str, axes: str) -> ParamSpec:
        return leaf(hf_name, axes, init="ones")

    layer, attention = "model.layers.{layer}", "model.layers.{layer}.self_attn"
    specs: dict[Path, ParamSpec] = {
        ("embed",): leaf("model.embed_tokens", "vocab embed"),
        ("layers", "attention_norm", "scale"): norm(f"{layer}.input_layernorm", "layers embed"),
        ("layers", "attention", "query"): leaf(
            f"{attention}.q_proj", "layers embed heads head_dim", inputs=1
        ),
        ("layers", "attention", "key"): leaf(
            f"{attention}.k_proj", "layers embed kv_heads head_dim", inputs=1
        ),
        ("layers", "attention", "value"): leaf(
            f"{attention}.v_proj", "layers embed kv_heads head_dim", inputs=1
        ),
        ("layers", "attention", "output"): leaf(
            f"{attention}.o_proj", "layers heads head_dim embed", inputs=2
        ),
        ("layers", "attention", "query_norm"): norm(f"{attention}.q_norm", "layers head_dim"),
        ("layers", "attention", "key_norm"): norm(f"{attention}.k_norm", "layers head_dim"),
        ("layers", "mlp_norm", "scale"): norm(f"{layer}.post_attention_layernorm", "layers embed"),
        ("layers", "mlp", "gate"): leaf(f"{layer}.mlp.gate_proj", "layers embed mlp", inputs=1),
        ("layers", "mlp", "up"): leaf(f"{layer}.mlp.up_proj", "layers embed mlp", inputs=1),
        ("layers", "mlp", "down"): leaf(f"{layer}.mlp.down_proj", "layers mlp embed", inputs=1),
        ("final_norm", "scale"): norm("model.norm", "embed"),
    }
    if not c.tied_embeddings:
        specs["lm_head",] = leaf("lm_head", "embed vocab", inputs=1)
    return specs
