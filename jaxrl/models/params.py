"""The parameters as data: one table, from which everything about them is derived.

Initialisation, shardings, checkpoint structure, loading and export all read `param_specs`, and so
cannot disagree. No jax, no torch: `bridge.names` reads the table in either half.

A leaf that every layer has is stacked: its first axis is `layers`, and the decoder scans over it.
Logical axes (`mesh.RULES` maps them to mesh axes):

    layers   vocab   embed (hidden size)   heads   kv_heads   head_dim   mlp   experts
    choices (the outputs of a router, one for each expert)   rank (of LoRA)
"""

import dataclasses
from typing import Any, Literal

from jaxrl.models.config import DecoderConfig, LoraConfig
from jaxrl.types import UserError

Path = tuple[str, ...]
Init = Literal["normal", "ones", "zeros", "lora_a"]


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One leaf of the parameter tree.

    `hf_name` is the Hugging Face tensor that it fills; `{layer}` and `{expert}` stand where a
    stacked leaf has one tensor for each index of its leading `stack` axes. `inputs` says how the
    axes behind those make a torch Linear's [out, in] matrix: the last so many are its inputs; 0
    makes the vector [out] of a bias; None leaves the layout as it is. `inputs_first`: they are the
    first so many instead, and the matrix is transposed. `row` is the first row of the Hugging Face
    tensor that the leaf fills, where several leaves share one (a fused projection); together they
    must tile it.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: Init
    hf_name: str
    inputs: int | None = None
    row: int = 0
    inputs_first: bool = False

    @property
    def first_output(self) -> int:
        """The axis along which the rows of the Hugging Face matrix are counted."""
        return self.stack + ((self.inputs or 0) if self.inputs_first else 0)

    @property
    def stack(self) -> int:
        """Leading axes along which every index is a Hugging Face tensor of its own."""
        return ("{layer}" in self.hf_name) + ("{expert}" in self.hf_name)

    @property
    def module(self) -> str:
        """Last part of the Hugging Face module's name: q_proj, down_proj, ..."""
        return self.hf_name.split(".")[-2]


def param_specs(c: DecoderConfig) -> dict[Path, ParamSpec]:
    """Every leaf of the decoder, by its path in the parameter tree."""
    table = _Table(c)
    table.add("embed", "vocab embed", "model.embed_tokens.weight")
    table.attention()
    table.norms()
    if c.moe is None:
        table.mlp()
    else:
        table.experts()
    table.norm("final_norm/scale", "embed", "model.norm.weight")
    if not c.tied_embeddings:
        table.add("lm_head", "vocab embed", "lm_head.weight", inputs=1)
    return table.specs


def trained_specs(c: DecoderConfig, lora: LoraConfig | None) -> dict[Path, ParamSpec]:
    """What trains: every leaf, or those of the adapters beside them."""
    return param_specs(c) if lora is None else lora_specs(c, lora)


def lora_specs(c: DecoderConfig, lora: LoraConfig) -> dict[Path, ParamSpec]:
    """The adapter leaves: for each target W [out, in] a pair A [rank, in] and B [out, rank].

    W + alpha / rank * B A (Hu et al. 2021, arXiv:2106.09685). B starts as zeros, so that training
    starts from the model as it is. Names are those of PEFT.

    Raises:
      UserError: a target that no layer has, or whose weights are stacked over experts.
    """
    specs: dict[Path, ParamSpec] = {}
    linear = {
        path: spec
        for path, spec in param_specs(c).items()
        if spec.inputs and "layers" in spec.axes and not {"experts", "choices"} & set(spec.axes)
    }
    known = {spec.module for spec in linear.values()}
    targets = known if lora.targets == ("all-linear",) else set(lora.targets)
    unknown = sorted(targets - known)
    if unknown:
        raise UserError(
            f"lora.targets: {', '.join(unknown)} is not a linear layer that can be adapted here; "
            f"this model has {', '.join(sorted(known))}"
        )
    for path, spec in linear.items():
        if spec.module not in targets:
            continue
        assert spec.inputs
        name = "base_model.model." + spec.hf_name.removesuffix(".weight")
        into, layers, rank = len(spec.shape) - spec.inputs, spec.shape[0], lora.rank
        # The parts of a fused projection share one A, and their B tile one matrix.
        specs[(*path[:-1], f"{spec.module}_lora_a")] = ParamSpec(
            (layers, rank, *spec.shape[into:]),
            ("layers", "rank", *spec.axes[into:]),
            "lora_a",
            f"{name}.lora_A.weight",
            spec.inputs,
        )
        specs[(*path[:-1], f"{path[-1]}_lora_b")] = ParamSpec(
            (*spec.shape[:into], rank),
            (*spec.axes[:into], "rank"),
            "zeros",
            f"{name}.lora_B.weight",
            1,
            spec.row,
        )
    return specs


def tree_of(leaves: dict[Path, Any]) -> Any:
    """A nested dict from a flat one keyed by path."""
    tree: dict[str, Any] = {}
    for (*parents, name), leaf in leaves.items():
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def leaf_at(tree: Any, path: Path) -> Any:
    """The leaf that stands at `path` of a nested dict: what `tree_of` put there."""
    for name in path:
        tree = tree[name]
    return tree


class _Table:
    """`param_specs` in the making."""

    def __init__(self, c: DecoderConfig) -> None:
        self.c, self.specs = c, {}
        self.sizes = {
            "layers": c.num_layers,
            "vocab": c.vocab_size,
            "embed": c.hidden_size,
            "heads": c.num_heads,
            "kv_heads": c.num_kv_heads,
            "head_dim": c.head_dim,
            "mlp": c.moe.intermediate_size if c.moe else c.intermediate_size,
            "experts": c.moe.num_experts if c.moe else 0,
            "choices": c.moe.num_experts if c.moe else 0,
        }

    def add(
        self,
        path: str,
        axes: str,
        hf_name: str,
        inputs: int | None = None,
        init: Init = "normal",
        row: int = 0,
        inputs_first: bool = False,
    ) -> None:
        names = tuple(axes.split())
        if names[0] == "layers":
            path, hf_name = f"layers/{path}", f"model.layers.{{layer}}.{hf_name}"
        shape = tuple(2 * self.sizes["mlp"] if n == "2mlp" else self.sizes[n] for n in names)
        names = tuple(name.removeprefix("2") for name in names)
        self.specs[tuple(path.split("/"))] = ParamSpec(
            shape, names, init, hf_name, inputs, row, inputs_first
        )

    def norm(self, path: str, axes: str, hf_name: str, inputs: int | None = None) -> None:
        # Gemma scales by 1 + w.
        self.add(path, axes, hf_name, inputs, "zeros" if self.c.norm_offset else "ones")

    def linear(self, path: str, axes: str, module: str, inputs: int, bias: bool, row: int = 0):
        self.add(path, axes, f"{module}.weight", inputs, row=row)
        if bias:
            outputs = " ".join(axes.split()[:-inputs])
            self.add(f"{path}_bias", outputs, f"{module}.bias", 0, "zeros", row)

    def attention(self) -> None:
        c, row = self.c, 0
        for name, heads in (("query", "heads"), ("key", "kv_heads"), ("value", "kv_heads")):
            module = "qkv_proj" if c.fused_projections else f"{name[0]}_proj"
            self.linear(
                f"attention/{name}",
                f"layers {heads} head_dim embed",
                f"self_attn.{module}",
                1,
                c.qkv_bias,
                row,
            )
            row += self.sizes[heads] * c.head_dim if c.fused_projections else 0
        self.linear(
            "attention/output", "layers embed heads head_dim", "self_attn.o_proj", 2, c.output_bias
        )
        if c.qk_norm == "head":
            self.norm("attention/query_norm", "layers head_dim", "self_attn.q_norm.weight")
            self.norm("attention/key_norm", "layers head_dim", "self_attn.k_norm.weight")
        elif c.qk_norm == "all":
            self.norm("attention/query_norm", "layers heads head_dim", "self_attn.q_norm.weight", 0)
            self.norm(
                "attention/key_norm", "layers kv_heads head_dim", "self_attn.k_norm.weight", 0
            )
        if c.attention_sinks:
            self.add("attention/sinks", "layers heads", "self_attn.sinks")

    def norms(self) -> None:
        names = {
            "pre": ("input_layernorm", None, "post_attention_layernorm", None),
            "post": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
            "both": (
                "input_layernorm",
                "post_attention_layernorm",
                "pre_feedforward_layernorm",
                "post_feedforward_layernorm",
            ),
        }[self.c.norm_placement]
        places = ("attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm")
        for place, name in zip(places, names, strict=True):
            if name:
                self.norm(f"{place}/scale", "layers embed", f"{name}.weight")

    def mlp(self) -> None:
        c, row = self.c, 0
        for name in ("gate", "up"):
            module = "gate_up_proj" if c.fused_projections else f"{name}_proj"
            self.linear(f"mlp/{name}", "layers mlp embed", f"mlp.{module}", 1, c.mlp_bias, row)
            row += c.intermediate_size if c.fused_projections else 0
        self.linear("mlp/down", "layers embed mlp", "mlp.down_proj", 1, c.mlp_bias)

    def experts(self) -> None:
        assert self.c.moe
        if self.c.moe.layout == "gpt_oss":
            # Matrices are [in, out] there, stacked over experts, gate and up interleaved.
            self.linear("moe/router", "layers choices embed", "mlp.router", 1, True)
            for name, hf in (("gate_up", "gate_up_proj"), ("down", "down_proj")):
                into, out = ("embed", "2mlp") if name == "gate_up" else ("mlp", "embed")
                where = f"mlp.experts.{hf}"
                self.add(f"moe/{name}", f"layers experts {into} {out}", where)
                self.add(f"moe/{name}_bias", f"layers experts {out}", f"{where}_bias", init="zeros")
            return
        block, names = {
            "qwen3": ("mlp", ("gate_proj", "up_proj", "down_proj")),
            "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
        }[self.c.moe.layout]
        self.add("moe/router", "layers choices embed", f"{block}.gate.weight", 1)
        for name, hf in zip(("gate", "up", "down"), names, strict=True):
            axes = "mlp embed" if name == "down" else "embed mlp"
            where = f"{block}.experts.{{expert}}.{hf}.weight"
            # Kernels for grouped products want [in, out].
            self.add(f"moe/{name}", f"layers experts {axes}", where, 1, inputs_first=True)
