"""What a Hugging Face `config.json` says about a policy, checked. Standard library only."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from jaxrl.types import UserError

SUPPORTED = ("Qwen3ForCausalLM",)

# Fields that would change the mathematics, with the only values the decoder computes.
_ONLY = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "use_sliding_window": (False, None),
    "rope_scaling": (None,),
    "quantization_config": (None,),
}

_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer: pre-norm, rotary positions, grouped-query attention, SwiGLU."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    norm_eps: float
    tied_embeddings: bool
    max_positions: int
    eos_token_ids: tuple[int, ...]


def load_config(model_dir: Path) -> DecoderConfig:
    """Reads `config.json` (and `generation_config.json`, for the end-of-sequence ids).

    Raises:
      UserError: the directory or file is missing or malformed, or asks for mathematics that the
        decoder does not have; every such field is named.
    """
    raw = _read_json(model_dir / "config.json")
    problems = []
    architecture = (raw.get("architectures") or ["none"])[0]
    if architecture not in SUPPORTED:
        problems.append(f"architecture {architecture} is not one of {', '.join(SUPPORTED)}")
    for field, allowed in _ONLY.items():
        if field in raw and raw[field] not in allowed:
            problems.append(f"{field} = {raw[field]!r} is not supported, only {allowed[0]!r}")
    rope = raw.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        problems.append(f"rope_type = {rope['rope_type']!r} is not supported, only 'default'")
    if any(kind != "full_attention" for kind in raw.get("layer_types") or ()):
        problems.append("layer_types other than full_attention are not supported")
    problems += [f"{field} is missing" for field in _REQUIRED if raw.get(field) is None]
    if problems:
        raise UserError(f"{model_dir / 'config.json'}: " + "; ".join(problems))

    generation = model_dir / "generation_config.json"
    eos = _read_json(generation).get("eos_token_id") if generation.is_file() else None
    eos = raw.get("eos_token_id") if eos is None else eos
    return DecoderConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=raw["num_attention_heads"],
        num_kv_heads=raw["num_key_value_heads"],
        head_dim=raw["head_dim"],
        rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 10_000.0),
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        max_positions=raw.get("max_position_embeddings", 32768),
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
    )


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
