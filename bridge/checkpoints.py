"""Hugging Face directories <-> sharded parameters. The trainer half: jax.

Bit-exact both ways: bfloat16 and float16 fit in the trainer's float32, and come back as they were.
Neither way is the model ever whole on the host: a tensor is read, cut up and placed while the next
one is being read.
"""

import itertools
import json
import os
import re
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path as FilePath
from typing import Any

from bridge.names import HfTensor, hf_tensors
from bridge.placing import Place, read_ahead, zeros
from bridge.safetensors_files import (
    DTYPES,
    INDEX,
    SINGLE,
    DamageError,
    Scan,
    StoredTensor,
    check_digest,
    scan,
    shards,
    write_file,
)
from bridge.wire import HostTensor
from jaxrl import durable
from jaxrl.models.params import ParamSpec, Path, leaf_at, tree_of
from jaxrl.types import UserError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
# Constants that old writers saved with the weights; the model computes them.
_CONSTANTS = re.compile(r"\.rotary_emb\.inv_freq$")


def load_params(
    model_dir: FilePath, specs: dict[Path, ParamSpec], shardings: Any, dtype: str = "float32"
) -> Any:
    """Reads the weights of `model_dir` into `dtype` parameters that lie as `shardings` says.

    Every header is checked before the first weight is placed. Each process reads the rows that its
    own devices hold, and the whole of a tensor that has a digest to be checked. Beyond the
    parameters, host and devices need room for a few chunks of 8 MiB.

    Args:
      specs: every leaf, by path.
      shardings: the same tree, of NamedSharding.
      dtype: "float32" or "bfloat16", of every parameter; the tensors in the files may have others.

    Raises:
      UserError: a file is missing or damaged, or the tensors are not exactly those of `specs`.
        Everything that is wrong is in one message, and no device array is left behind.
    """
    wanted = hf_tensors(specs)
    found = scan(model_dir)
    _refuse(model_dir, found.problems + _misfits(found, wanted))
    places = {path: Place(spec, leaf_at(shardings, path), dtype) for path, spec in specs.items()}
    stored = sorted((found.tensors[name] for name in wanted), key=lambda t: (t.file, t.offset))
    chunks = [
        chunk
        for tensor in stored
        for piece in wanted[tensor.name].pieces
        for chunk in places[piece.path].chunks(tensor, piece)
    ]
    leaves = zeros(places)
    verifier = ThreadPoolExecutor(1)
    try:
        verified = [verifier.submit(_damage, tensor) for tensor in stored if tensor.sha256]
        for chunk, rows in read_ahead(chunks):
            leaf = leaves.pop(chunk.piece.path)
            leaves[chunk.piece.path] = places[chunk.piece.path].put(leaf, chunk, rows)
        _refuse(model_dir, [damage for result in verified if (damage := result.result())])
        return tree_of({path: places[path].finish(leaves.pop(path)) for path in specs})
    except DamageError as problem:
        raise UserError(f"{model_dir}: {problem}") from None
    finally:
        verifier.shutdown(cancel_futures=True)
        leaves.clear()  # the traceback of an error keeps this frame


def save_model(
    tensors: Iterable[HostTensor],
    source: FilePath,
    target: FilePath,
    *,
    max_shard_bytes: int = 5 << 30,
) -> None:
    """Writes a Hugging Face directory: `tensors`, beside the configuration files of `source`.

    One shard of tensors is held at a time. `target` appears whole or not at all; one that exists is
    replaced, and may be `source`.

    Raises:
      RunError: it cannot be written; what was there before is as it was.
    """
    with durable.replacing(target) as folder:
        dtype = _write_weights(tensors, folder, max_shard_bytes)
        config = json.loads((source / "config.json").read_text())
        config.pop("torch_dtype", None)
        text = json.dumps({**config, "dtype": dtype}, indent=2) + "\n"
        durable.write_file(folder / "config.json", text)
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                _copy(source / name, folder / name)


def _write_weights(tensors: Iterable[HostTensor], folder: FilePath, max_shard_bytes: int) -> str:
    """Writes one file, or several and their index. Returns the dtype of the first tensor."""
    lists: list[list[str]] = []
    dtype, total = "", 0
    for shard in shards(iter(tensors), max_shard_bytes):
        write_file(folder / f"{durable.TEMPORARY}{len(lists)}", shard)
        lists.append([tensor.name for tensor in shard])
        total += sum(tensor.data.nbytes for tensor in shard)
        dtype = dtype or shard[0].dtype
    names = list(itertools.chain.from_iterable(lists))
    if not names or len(set(names)) != len(names):
        raise ValueError(f"{len(names)} tensors of {len(set(names))} names make no checkpoint")
    files = [f"model-{i + 1:05d}-of-{len(lists):05d}.safetensors" for i in range(len(lists))]
    if len(lists) == 1:
        files = [SINGLE]
    else:
        weight_map = {n: file for file, shard in zip(files, lists, strict=True) for n in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        durable.write_file(folder / INDEX, json.dumps(index, indent=2) + "\n")
    for i, file in enumerate(files):
        (folder / f"{durable.TEMPORARY}{i}").rename(folder / file)
    return dtype


def _copy(source: FilePath, target: FilePath) -> None:
    shutil.copyfile(source, target)
    with target.open("rb") as stream:
        os.fsync(stream.fileno())


def _misfits(found: Scan, wanted: dict[str, HfTensor]) -> list[str]:
    """What keeps the tensors in the files from being those of the model."""
    problems = []
    for name, tensor in found.tensors.items():
        if name not in wanted:
            # Some checkpoints with tied embeddings carry the head a second time.
            if name != "lm_head.weight" and not _CONSTANTS.search(name):
                problems.append(f"{tensor.where}: not a tensor of this model")
            continue
        if tensor.dtype not in DTYPES.values():
            kind = "float64" if tensor.dtype == "F64" else f"{tensor.dtype}, quantised or integer"
            problems.append(f"{tensor.where}: dtype {kind}; convert it to one of {_names()}")
        if tensor.shape != wanted[name].shape:
            shape = wanted[name].shape
            problems.append(f"{tensor.where}: shape {tensor.shape}, expected {shape}")
    if found.complete:
        problems += [f"{name}: missing" for name in wanted if name not in found.named]
    return problems


def _names() -> str:
    return ", ".join(DTYPES.values())


def _refuse(model_dir: FilePath, problems: list[str], most: int = 20) -> None:
    if problems:
        more = [f"... and {len(problems) - most} more"] if len(problems) > most else []
        lines = "\n  ".join(problems[:most] + more)
        raise UserError(f"{model_dir}: these weights cannot be loaded:\n  {lines}")


def _damage(tensor: StoredTensor) -> str | None:
    """What is wrong with the bytes of a tensor that has a digest."""
    try:
        check_digest(tensor)
    except DamageError as problem:
        return str(problem)
    return None
