"""What a Hugging Face `config.json` says about a policy, checked. No jax, no torch.

One decoder covers every family: a family is a function from its `config.json` to a
`DecoderConfig`. A field that no family function reads is either known to change nothing
(`_HARMLESS`), or an error that names it: nothing that may change the mathematics is ignored.
"""

import dataclasses
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from jaxrl.models.rope import Rope, make_rope
from jaxrl.types import UserError

Size = Annotated[int, Field(gt=0, strict=True)]
Factor = Annotated[float, Field(gt=0.0, allow_inf_nan=False, strict=True)]
Flag = Annotated[bool, Field(strict=True)]


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """A mixture of experts in place of every layer's MLP.

    `normalize`: the weights of the chosen experts are scaled to sum to 1. `layout`: how the
    checkpoint names and stores the experts; "gpt_oss" also has their biases and its own activation.
    """

    num_experts: Size
    experts_per_token: Size
    intermediate_size: Size
    normalize: Flag
    layout: Literal["qwen3", "mixtral", "gpt_oss"]


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on the linear layers named by `targets` (q_proj, down_proj, ...).

    ("all-linear",): on all but the router, the experts, the embedding and the head.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer with rotary positions and grouped-query attention.

    What families differ in is data: `norm_placement` is before each sub-layer, after it (on its
    output), or both; `qk_norm` is per head or over all heads together; `sliding` says of each layer
    whether it sees only the last `sliding_window` tokens, with `sliding_rope` for positions.
    """

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_layers: Size
    num_heads: Size
    num_kv_heads: Size
    head_dim: Size
    rope: Rope
    norm_eps: Factor
    tied_embeddings: Flag
    max_positions: Size
    eos_token_ids: tuple[int, ...]
    activation: Literal["silu", "gelu_tanh"] = "silu"
    norm_placement: Literal["pre", "post", "both"] = "pre"
    norm_offset: Flag = False  # norms scale by 1 + w
    qk_norm: Literal["head", "all"] | None = None
    qkv_bias: Flag = False
    output_bias: Flag = False
    mlp_bias: Flag = False
    fused_projections: Flag = False  # in the checkpoint; here they are always apart
    attention_scale: Factor | None = None  # None: 1 / sqrt(head_dim)
    attention_softcap: Factor | None = None
    attention_sinks: Flag = False
    logit_softcap: Factor | None = None
    sliding_window: Size | None = None  # tokens, the present one included
    sliding: tuple[bool, ...] = ()  # of each layer; empty: none slides
    sliding_rope: Rope | None = None  # None: as `rope`
    embedding_multiplier: Factor = 1.0
    residual_multiplier: Factor = 1.0
    logit_divisor: Factor = 1.0
    moe: MoeConfig | None = None

    @property
    def key_cost(self) -> float:
        """FLOPs of attending to one key, in a layer, over those of a token's matrix products."""
        width = self.num_heads * self.head_dim
        mlp, active = (
            (self.moe.intermediate_size, self.moe.experts_per_token)
            if self.moe
            else (self.intermediate_size, 1)
        )
        projections = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim
        return 2 * width / (self.hidden_size * (projections + 3 * mlp * active))


def load_config(model_dir: Path, ignore: Collection[str] = ()) -> DecoderConfig:
    """Reads `config.json` (and `generation_config.json`, for the end-of-sequence ids).

    Args:
      ignore: fields that the caller knows to change nothing, beside those that we know.

    Raises:
      UserError: the directory or file is missing or malformed, or asks for mathematics that the
        decoder does not have; every such field is named.
    """
    path = model_dir / "config.json"
    raw = _read_json(path)
    fields = _Fields(raw)
    named = raw.get("architectures")
    architecture = str(named[0]) if isinstance(named, list) and named else "none"
    family = FAMILIES.get(architecture)
    if family is None:
        raise UserError(
            f"{path}: architecture {architecture} is not one of {', '.join(sorted(FAMILIES))}"
        )
    try:
        common = _common(fields, family)
        config = dataclasses.replace(common, **family.read(fields, common)) if common else None
        if config and not fields.was_read("layer_types"):
            _sliding(fields, config, None, [])
        if config:
            config = dataclasses.replace(config, eos_token_ids=_eos(model_dir, raw))
            fields.problems += _malformed(config)
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        fields.problems.append(f"malformed: {error}")
        config = None
    fields.problems += [
        f"{name} = {raw[name]!r} is not a field that is known here; if it does not change what the "
        "model computes, list it in model.ignore_config_fields"
        for name in fields.unread()
        if name not in ignore
    ]
    if fields.problems or config is None:
        raise UserError(f"{path}: " + "; ".join(fields.problems))

    return config


def _eos(model_dir: Path, raw: dict[str, Any]) -> tuple[int, ...]:
    """Of generation_config.json, which is what the engines go by, or else of config.json."""
    generation = model_dir / "generation_config.json"
    eos = _read_json(generation).get("eos_token_id") if generation.is_file() else None
    eos = raw.get("eos_token_id") if eos is None else eos
    return tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)


def _malformed(config: DecoderConfig) -> list[str]:
    """Values of the wrong type, sizes that are none, factors that are not finite."""
    try:
        _CHECK.validate_python(dataclasses.asdict(config))
    except ValidationError as error:
        return [
            f"{'.'.join(map(str, found['loc']))} = {found['input']!r}: {found['msg']}"
            for found in error.errors()
        ]
    moe = config.moe
    if moe and moe.experts_per_token > moe.num_experts:
        return [f"num_experts_per_tok = {moe.experts_per_token} of {moe.num_experts} experts"]
    return []


_CHECK = TypeAdapter(DecoderConfig)


class _Fields:
    """A config.json that remembers which of its fields were read, and what was wrong with them."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self.raw, self.problems = raw, []
        self._read: set[str] = set(_HARMLESS)

    def get(self, name: str, default: Any = None) -> Any:
        """The field; null is as good as missing."""
        self._read.add(name)
        value = self.raw.get(name)
        return default if value is None else value

    def need(self, name: str) -> Any:
        value = self.get(name)
        if value is None:
            self.problems.append(f"{name} is missing")
        return value

    def only(self, name: str, *allowed: Any) -> Any:
        """A field with one mathematics, or few; the first is the default."""
        value = self.get(name, allowed[0])
        if value not in allowed:
            some = " or ".join(repr(choice) for choice in allowed)
            self.problems.append(f"{name} = {value!r} is not supported, only {some}")
        return value

    def was_read(self, name: str) -> bool:
        return name in self._read

    def unread(self) -> list[str]:
        """Fields nobody read that say something: null, false and empty ones ask for nothing."""
        return sorted(name for name, value in self.raw.items() if name not in self._read and value)


# Fields that change nothing in a forward pass without dropout: names and versions, ids that only a
# tokenizer uses, training-time noise and losses, what a forward pass returns, how it is run.
# fmt: off
_HARMLESS = {
    "architectures", "model_type", "_name_or_path", "name_or_path", "transformers_version",
    "torch_dtype", "dtype", "use_cache", "initializer_range", "bos_token_id", "eos_token_id",
    "pad_token_id", "unk_token_id", "sep_token_id", "auto_map", "attention_dropout",
    "hidden_dropout", "resid_pdrop", "embd_pdrop", "dropout", "classifier_dropout",
    "router_aux_loss_coef", "output_router_logits", "router_jitter_noise", "input_jitter_noise",
    "output_attentions", "output_hidden_states", "return_dict", "task_specific_params",
    "tokenizer_class", "prefix", "id2label", "label2id", "problem_type", "finetuning_task",
    "cache_implementation", "pretraining_tp", "_attn_implementation", "attn_implementation",
    "_attn_implementation_autoset", "attn_implementation_autoset", "unsloth_version",
    "unsloth_fixed", "chunk_size_feed_forward", "max_length", "min_length", "temperature",
    "top_k", "top_p", "do_sample", "num_beams", "num_return_sequences", "repetition_penalty",
    "length_penalty", "initial_context_length",
}
# fmt: on


@dataclasses.dataclass(frozen=True)
class _Family:
    """How `config.json` is read: what it means, and what it means where it says nothing."""

    read: Callable[[_Fields, DecoderConfig], dict[str, Any]]
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    norm_eps: float = 1e-6
    tied_embeddings: bool = False
    rope_theta: float = 10_000.0
    rope: dict[str, Any] | None = None  # what transformers takes where nothing is said
    rope_by_layer_kind: bool = False  # `read` makes the rotary embeddings itself


def _common(f: _Fields, family: _Family) -> DecoderConfig | None:
    """What every family has; None when fields are missing."""
    heads, hidden = f.need("num_attention_heads"), f.need("hidden_size")
    sizes = [f.need(n) for n in ("vocab_size", "intermediate_size", "num_hidden_layers")]
    f.only("quantization_config", None)
    f.only("is_encoder_decoder", False)
    f.only("add_cross_attention", False)
    if f.problems:
        return None
    kv_heads = f.get("num_key_value_heads", heads)
    if heads % kv_heads:
        f.problems.append(
            f"num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}"
        )
    head_dim = f.get("head_dim", family.head_dim or hidden // heads)
    max_positions = f.get("max_position_embeddings", 32768)
    rope = Rope(())
    if not family.rope_by_layer_kind:
        rope = _rope(f, _rope_settings(f, family, max_positions), head_dim, max_positions)
    return DecoderConfig(
        vocab_size=sizes[0],
        hidden_size=hidden,
        intermediate_size=sizes[1],
        num_layers=sizes[2],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope=rope,
        norm_eps=float(f.get("rms_norm_eps", family.norm_eps)),
        tied_embeddings=f.get("tie_word_embeddings", family.tied_embeddings),
        max_positions=min(max_positions, rope.max_positions or max_positions),
        eos_token_ids=(),
    )


def _rope_settings(f: _Fields, family: _Family, max_positions: int) -> dict[str, Any]:
    """One dict from either spelling.

    Since transformers 5 everything stands in `rope_parameters`; before, `rope_theta` stood beside
    `rope_scaling`, whose kind was called `type` earlier still.
    """
    settings = {**f.get("rope_parameters", {}), **f.get("rope_scaling", {})}
    settings = settings or dict(family.rope or {})
    kind = settings.get("rope_type") or settings.get("type")
    settings["rope_type"] = "longrope" if kind == "su" else kind  # its name in the first Phi-3
    settings.setdefault("rope_theta", f.get("rope_theta", family.rope_theta))
    settings.setdefault("partial_rotary_factor", f.get("partial_rotary_factor"))
    length = f.get("original_max_position_embeddings", max_positions)
    if settings["rope_type"] in ("llama3", "yarn", "longrope"):
        settings.setdefault("original_max_position_embeddings", length)
    return settings


def _rope(f: _Fields, settings: dict[str, Any], head_dim: int, max_positions: int) -> Rope:
    try:
        return make_rope(settings, head_dim, max_positions)
    except ValueError as error:
        f.problems.append(f"rope: {error}")
        return Rope(())


def _sliding(f: _Fields, c: DecoderConfig, window: int | None, default: list[bool]) -> dict:
    """The layers that slide: as `layer_types` says, or else the family's pattern."""
    kinds = f.get("layer_types")
    if kinds is not None:
        bad = sorted(set(kinds) - {"full_attention", "sliding_attention"})
        if bad or len(kinds) != c.num_layers:
            f.problems.append(
                f"layer_types = {kinds!r}: {c.num_layers} of full_attention or sliding_attention "
                "are supported"
            )
        default = [kind == "sliding_attention" for kind in kinds]
    if window is None:
        if kinds is not None and any(default):
            f.problems.append("layer_types has sliding layers, and sliding_window is missing")
        return {}
    return {"sliding_window": window, "sliding": tuple(default)} if any(default) else {}


def _every_layer_slides(f: _Fields, c: DecoderConfig, default: int | None = None) -> dict:
    """Mistral's way: a window is for all layers."""
    window = _unless_null(f, "sliding_window", default)
    return _sliding(f, c, window, [True] * c.num_layers)


def _llama(f: _Fields, c: DecoderConfig) -> dict:
    f.only("hidden_act", "silu")
    bias = f.get("attention_bias", False)
    return {"qkv_bias": bias, "output_bias": bias, "mlp_bias": f.get("mlp_bias", False)}


def _mistral(f: _Fields, c: DecoderConfig) -> dict:
    f.only("hidden_act", "silu")
    return _every_layer_slides(f, c, default=4096)


def _qwen2(f: _Fields, c: DecoderConfig) -> dict:
    f.only("hidden_act", "silu")
    window, use = f.get("sliding_window"), f.get("use_sliding_window")
    window = window if use else None
    first = f.get("max_window_layers", 28)
    sliding = _sliding(f, c, window, [layer >= first for layer in range(c.num_layers)])
    return {"qkv_bias": True} | sliding


def _qwen3(f: _Fields, c: DecoderConfig) -> dict:
    bias = f.get("attention_bias", False)
    return _qwen2(f, c) | {"qkv_bias": bias, "output_bias": bias, "qk_norm": "head"}


def _qwen3_moe(f: _Fields, c: DecoderConfig) -> dict:
    f.only("hidden_act", "silu")
    f.only("use_sliding_window", False)  # vLLM's model has no windows
    f.get("sliding_window")
    f.get("max_window_layers")
    f.only("mlp_only_layers", [])
    f.only("decoder_sparse_step", 1)
    bias = f.get("attention_bias", False)
    moe = MoeConfig(
        num_experts=f.need("num_experts")
        if "num_experts" in f.raw
        else f.need("num_local_experts"),
        experts_per_token=f.need("num_experts_per_tok"),
        intermediate_size=f.need("moe_intermediate_size"),
        normalize=f.get("norm_topk_prob", False),
        layout="qwen3",
    )
    return {"qkv_bias": bias, "output_bias": bias, "qk_norm": "head", "moe": moe}


def _mixtral(f: _Fields, c: DecoderConfig) -> dict:
    f.only("hidden_act", "silu")
    moe = MoeConfig(
        num_experts=f.need("num_local_experts"),
        experts_per_token=f.get("num_experts_per_tok", 2),
        intermediate_size=c.intermediate_size,
        normalize=True,
        layout="mixtral",
    )
    return {"moe": moe} | _every_layer_slides(f, c)


def _gpt_oss(f: _Fields, c: DecoderConfig) -> dict:
    f.only("hidden_act", "silu")
    f.only("swiglu_limit", 7.0)
    f.only("swiglu_alpha", 1.702)
    bias = f.get("attention_bias", True)
    chosen = f.get("num_experts_per_tok", 4)
    f.only("experts_per_token", chosen)
    moe = MoeConfig(
        num_experts=f.need("num_local_experts"),
        experts_per_token=chosen,
        intermediate_size=c.intermediate_size,
        normalize=True,
        layout="gpt_oss",
    )
    every_other = [layer % 2 == 0 for layer in range(c.num_layers)]
    return {
        "qkv_bias": bias,
        "output_bias": bias,
        "attention_sinks": True,
        "moe": moe,
    } | _sliding(f, c, f.get("sliding_window", 128), every_other)


def _gemma(f: _Fields, c: DecoderConfig) -> dict:
    """What Gemma 2 and 3 share."""
    f.only("hidden_act", "gelu_pytorch_tanh")
    f.only("hidden_activation", "gelu_pytorch_tanh")
    f.only("use_bidirectional_attention", False)
    bias = f.get("attention_bias", False)
    return {
        "activation": "gelu_tanh",
        "norm_placement": "both",
        "norm_offset": True,
        "qkv_bias": bias,
        "output_bias": bias,
        "attention_scale": float(f.get("query_pre_attn_scalar", 256)) ** -0.5,
        "embedding_multiplier": c.hidden_size**0.5,
    }


def _gemma2(f: _Fields, c: DecoderConfig) -> dict:
    every_other = [layer % 2 == 0 for layer in range(c.num_layers)]
    return (
        _gemma(f, c)
        | {
            "attention_softcap": _unless_null(f, "attn_logit_softcapping", 50.0),
            "logit_softcap": _unless_null(f, "final_logit_softcapping", 30.0),
        }
        | _sliding(f, c, f.get("sliding_window", 4096), every_other)
    )


def _gemma3(f: _Fields, c: DecoderConfig) -> dict:
    f.only("attn_logit_softcapping", None)
    every = f.get("sliding_window_pattern", f.get("_sliding_window_pattern", 6))
    pattern = [(layer + 1) % every != 0 for layer in range(c.num_layers)]
    parameters, scaling = f.get("rope_parameters", {}), f.get("rope_scaling", {})
    theta, local_theta = f.get("rope_theta", 1e6), f.get("rope_local_base_freq", 1e4)
    full = {"rope_theta": theta} | scaling | (parameters.get("full_attention") or {})
    full.setdefault("rope_type", full.get("type"))
    local = {"rope_theta": local_theta} | (parameters.get("sliding_attention") or {})
    return (
        _gemma(f, c)
        | {
            "qk_norm": "head",
            "logit_softcap": _unless_null(f, "final_logit_softcapping", None),
            "rope": _rope(f, full, c.head_dim, c.max_positions),
            "sliding_rope": _rope(f, local, c.head_dim, c.max_positions),
        }
        | _sliding(f, c, f.get("sliding_window", 4096), pattern)
    )


def _unless_null(f: _Fields, name: str, default: Any) -> Any:
    """A field where null means none, and only a missing one means the default."""
    return f.get(name) if name in f.raw else default


def _olmo2(f: _Fields, c: DecoderConfig) -> dict:
    f.only("hidden_act", "silu")
    bias = f.get("attention_bias", False)
    return {
        "qkv_bias": bias,
        "output_bias": bias,
        "qk_norm": "all",
        "norm_placement": "post",
    }


def _phi3(f: _Fields, c: DecoderConfig) -> dict:
    f.only("hidden_act", "silu")
    f.only("full_attn_mod", 1)
    f.only("interpolate_factor", 1)
    return {"fused_projections": True} | _every_layer_slides(f, c)


def _granite(f: _Fields, c: DecoderConfig) -> dict:
    return _llama(f, c) | {
        "embedding_multiplier": float(f.get("embedding_multiplier", 1.0)),
        "residual_multiplier": float(f.get("residual_multiplier", 1.0)),
        "attention_scale": float(f.get("attention_multiplier", 1.0)),
        "logit_divisor": float(f.get("logits_scaling", 1.0)),
    }


FAMILIES = {
    "LlamaForCausalLM": _Family(_llama),
    "MistralForCausalLM": _Family(_mistral),
    "Qwen2ForCausalLM": _Family(_qwen2),
    "Qwen3ForCausalLM": _Family(_qwen3, head_dim=128),
    "Gemma2ForCausalLM": _Family(_gemma2, head_dim=256, tied_embeddings=True),
    "Gemma3ForCausalLM": _Family(
        _gemma3, head_dim=256, tied_embeddings=True, rope_by_layer_kind=True
    ),
    "Olmo2ForCausalLM": _Family(_olmo2, norm_eps=1e-5),
    "Phi3ForCausalLM": _Family(_phi3, norm_eps=1e-5),
    "GraniteForCausalLM": _Family(_granite),
    "Qwen3MoeForCausalLM": _Family(_qwen3_moe),
    "MixtralForCausalLM": _Family(_mixtral, norm_eps=1e-5, rope_theta=1e6),
    "GptOssForCausalLM": _Family(
        _gpt_oss,
        head_dim=64,
        norm_eps=1e-5,
        rope_theta=150_000.0,
        rope={
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    ),
}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError("it does not hold an object")
        return raw
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; is this a Hugging Face model?") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
