"""Hugging Face directories <-> sharded parameters. The trainer half: jax.

Bit-exact both ways: bfloat16 and float16 fit in the trainer's float32, and come back as they were.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path as FilePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from bridge.names import from_hf, hf_shape, hf_tensors
from bridge.wire import HostTensor
from jaxrl.models.decoder import tree_of
from jaxrl.models.params import ParamSpec, Path
from jaxrl.types import UserError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


def load_params(model_dir: FilePath, specs: dict[Path, ParamSpec], shardings: Any) -> Any:
    """Reads the weights of `model_dir` into float32 parameters that lie as `shardings` says.

    Raises:
      UserError: a file is missing or damaged, or the tensors are not exactly those of `specs`;
        every missing, unknown and wrongly shaped tensor is named.
    """
    files = _weight_files(model_dir)
    tensors = hf_tensors(specs)
    if "lm_head.weight" not in tensors:
        # Some checkpoints with tied embeddings carry the head a second time.
        files.pop("lm_head.weight", None)
    problems = [f"{name}: missing" for name in tensors if name not in files]
    problems += [f"{name}: not a tensor of this model" for name in files if name not in tensors]
    readers = {}
    try:
        for file in set(files.values()):
            readers[file] = safe_open(file, framework="numpy")
        for name in sorted(tensors.keys() & files.keys()):
            path, _ = tensors[name]
            found = tuple(readers[files[name]].get_slice(name).get_shape())
            if found != hf_shape(specs[path]):
                problems.append(f"{name}: shape {found}, expected {hf_shape(specs[path])}")
        if problems:
            raise UserError(f"{model_dir}: weights do not fit config.json:\n  " + _list(problems))

        leaves = {}
        for path, spec in specs.items():
            layers = range(spec.shape[0]) if spec.stacked else [None]
            host = np.empty(spec.shape, np.float32)
            for layer in layers:
                name = spec.hf_name.format(layer=layer)
                tensor = readers[files[name]].get_tensor(name)
                host[... if layer is None else layer] = from_hf(spec, tensor)
            leaves[path] = host
    except SafetensorError as error:
        raise UserError(f"{model_dir}: damaged weights: {error}") from None
    return jax.tree.map(jax.device_put, tree_of(leaves), shardings)


def save_model(tensors: Iterable[HostTensor], source: FilePath, target: FilePath) -> None:
    """Writes a Hugging Face directory: `tensors`, beside the configuration files of `source`.

    `target` appears whole or not at all; one that exists is replaced.
    """
    tensors = list(tensors)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = tensors[0].dtype
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, partial / name)
    save_file(
        {t.name: t.data.view(jnp.dtype(t.dtype)).reshape(t.shape) for t in tensors},
        partial / "model.safetensors",
        {"format": "pt"},
    )
    (partial / "model.safetensors").chmod(0o644)  # the library writes it for its user alone
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def _weight_files(model_dir: FilePath) -> dict[str, FilePath]:
    """Tensor name -> file, from the index or from the single file."""
    index = model_dir / "model.safetensors.index.json"
    single = model_dir / "model.safetensors"
    try:
        if index.is_file():
            weight_map = json.loads(index.read_text())["weight_map"]
            for file in set(weight_map.values()):
                if FilePath(file).name != file or not (model_dir / file).is_file():
                    raise UserError(f"{index}: {file!r} is not a file in {model_dir}")
            return {name: model_dir / file for name, file in weight_map.items()}
        if not single.is_file():
            raise UserError(f"{model_dir}: there is no model.safetensors and no index of shards")
        with safe_open(single, framework="numpy") as reader:
            return dict.fromkeys(reader.keys(), single)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{model_dir}: damaged weights: {error}") from None


def _list(problems: list[str], most: int = 20) -> str:
    more = [f"... and {len(problems) - most} more"] if len(problems) > most else []
    return "\n  ".join(problems[:most] + more)
