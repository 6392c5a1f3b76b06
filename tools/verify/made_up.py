"""A model of random weights, for a config.json whose weights are not at hand."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrl.types import UserError
from tools.verify.reference import FILE_DTYPES, quiet_transformers
from tools.verify.report import first_line


def write_config(source: Path, scratch: Path, layers: int | None) -> str:
    """Copies all but the weights to `scratch`, with the first layers; says how many were kept."""
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, scratch / name)
    path = scratch / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        total = int(raw["num_hidden_layers"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{source}/config.json cannot be read: {error!r}") from None
    kept = min(layers or total, total)
    if kept < total:
        path.write_text(json.dumps(with_fewer_layers(raw, kept, layer_kinds(scratch))))
    return f"{kept} of {total} layers"


def layer_kinds(directory: Path) -> list[str]:
    """What transformers takes each layer for; most families do not write it in config.json."""
    from transformers import AutoConfig

    try:
        return list(getattr(AutoConfig.from_pretrained(directory), "layer_types", None) or [])
    except Exception as error:  # whatever it dislikes, config.json is what we are checking
        raise UserError(f"transformers cannot read this config.json: {first_line(error)}") from None


def with_fewer_layers(raw: Mapping[str, Any], layers: int, kinds: Sequence[str]) -> dict[str, Any]:
    """config.json with its first layers; of each kind of layer one is kept where there is room."""
    kept = list(kinds[:layers])
    place = layers
    for kind in dict.fromkeys(kinds):
        if kind not in kept and place > 1:
            place -= 1
            kept[place] = kind
    small = {**raw, "num_hidden_layers": layers}
    if kinds and (len(set(kinds)) > 1 or "layer_types" in raw):
        small["layer_types"] = kept
    if "mlp_only_layers" in raw:
        small["mlp_only_layers"] = [i for i in raw["mlp_only_layers"] or [] if i < layers]
    return small


def make_weights(directory: Path, seed: int) -> None:
    """Saves random weights for `directory`/config.json as transformers does, in its dtype.

    Nothing may be left at a value that hides a mistake: norms and biases are moved away from 1
    and 0, and matrices are wide enough that every part of a layer counts.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    quiet_transformers()
    raw = (directory / "config.json").read_bytes()
    fields = json.loads(raw)
    dtype = fields.get("dtype") or fields.get("torch_dtype")
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(directory), dtype=torch.float32
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1 or name.endswith("bias"):
                weight += torch.empty_like(weight).uniform_(-0.5, 0.5)
            else:
                weight.normal_(0.0, weight.shape[-1] ** -0.5)
    if dtype in FILE_DTYPES.values():
        model = model.to(getattr(torch, dtype))
    model.save_pretrained(directory)
    # transformers has spelt config.json its own way; what is to be checked is the user's.
    (directory / "config.json").write_bytes(raw)
