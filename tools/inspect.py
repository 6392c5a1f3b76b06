"""What is in a directory of weights, and whether two hold the same.

    python -m tools.inspect PATH [--tensors] [--sha256] [--json]
    python -m tools.inspect PATH --diff OTHER [--json]

PATH may be a Hugging Face directory, one safetensors file, a PEFT directory, a version that the
shuttle published or the directory of such versions (the newest), one checkpoint, or a run or its
`checkpoints` (the newest whole one). Checkpoints and published versions carry digests and are
checked against them; a Hugging Face directory is, where it has digests and the bytes are read.

--tensors lists every tensor with its SHA-256; --sha256 adds a digest to each line of the folded
tree, and that of everything. Of tensors under Hugging Face names that is the weight digest which
tools.convert prints: equal digests mean equal weights. It is made of SHA-256; the digest in a
published version's manifest is made of XXH3, and is another number for the same weights.

--diff compares by name, shape, dtype and content. A checkpoint beside something else is first laid
out under Hugging Face names, in the dtypes of the other; two checkpoints are compared array by
array. Exit codes: 0 done (equal), 1 different, 2 a mistake in the input, or damage.

Only what concerns checkpoints loads jax.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from bridge.channels import ChannelError, Ticket, shuttle
from bridge.delta import DeltaError
from bridge.names import hf_tensors
from bridge.receive import Receiver
from bridge.safetensors_files import DamageError, StoredTensor, read_header, read_into, scan
from bridge.wire import HostTensor, Manifest, TensorEntry, WireError, digest_of_lines
from jaxrl.models.config import load_config
from jaxrl.models.params import param_specs
from jaxrl.types import RunError, UserError
from tools.convert import find_checkpoint, is_checkpoint, one_line

if TYPE_CHECKING:  # a Hugging Face directory is inspected without jax
    from jaxrl.checkpoint import Stored

_CHUNK = 1 << 21  # elements read at a time
_VERSION = re.compile(r"v[0-9]{8,18}")
_ADAPTER = "adapter_model.safetensors"
_LABELS = {"digest": "version's digest (XXH3)"}  # of facts, beside the one of --sha256
_SIZES = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "tie_word_embeddings",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Something with a name whose bytes can be read in parts: `read(start, stop)`, in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    read: Callable[[int, int], np.ndarray]
    promised: str | None = None  # SHA-256 that its writer left
    where: str = ""  # file and name, for messages

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Inventory:
    """All the tensors of one place. `stored`: only of a checkpoint."""

    kind: str
    path: Path
    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    architecture: dict[str, Any]
    stored: Stored | None = None


def main(arguments: list[str] | None = None) -> int:
    # Looking needs no accelerator, and must not take the memory of one that is at work.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    try:
        if options.diff is not None:
            difference = compare(*_on_common_ground(open_any(options.path), open_any(options.diff)))
            print(_as_json(difference) if options.json else show_difference(difference))
            return 0 if difference.equal else 1
        report = describe(open_any(options.path), options.tensors, options.sha256)
        print(_as_json(report) if options.json else show(report))
        return 0
    except (RunError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2


# --- opening ---


def open_any(path: Path) -> Inventory:
    """Finds out what `path` is.

    Raises:
      UserError: nothing that is known here, or something damaged, file and tensor named.
    """
    if path.is_file():
        return open_file(path)
    if not path.is_dir():
        raise UserError(f"{path}: there is no such file or directory")
    if (path / "manifest.json").is_file():
        return open_published(path)
    if (path / "adapter_config.json").is_file() or (path / _ADAPTER).is_file():
        return open_peft(path)
    if is_checkpoint(path) or (path / "checkpoints").is_dir() or any(path.glob("step_*")):
        return open_checkpoint(path)
    if any(path.glob("*.safetensors*")) or (path / "config.json").is_file():
        return open_hugging_face(path)
    versions = sorted(p for p in path.iterdir() if _VERSION.fullmatch(p.name))
    if versions:
        return open_published(versions[-1])
    raise UserError(
        f"{path}: is not a Hugging Face or PEFT directory, a published version, a checkpoint or "
        "a run"
    )


def open_file(path: Path) -> Inventory:
    return Inventory("safetensors file", path, _read_file(path), {}, {})


def open_peft(path: Path) -> Inventory:
    raw = _read_json(path / "adapter_config.json")
    names = ("base_model_name_or_path", "r", "lora_alpha", "target_modules")
    facts = {name: raw.get(name) for name in names}
    return Inventory("PEFT adapters", path, _read_file(path / _ADAPTER), facts, {})


def open_hugging_face(path: Path) -> Inventory:
    tensors, files = _scan(path)
    facts: dict[str, Any] = {"files": files}
    with_digest = sum(tensor.promised is not None for tensor in tensors.values())
    if with_digest:
        facts["digests"] = f"{with_digest} of {len(tensors)} tensors carry one"
    architecture = {}
    if (path / "config.json").is_file():
        architecture = _architecture(path)
        facts["trains here"] = _fit(path, tensors)
    return Inventory("Hugging Face directory", path, tensors, facts, architecture)


def open_published(path: Path) -> Inventory:
    """A version as `bridge.channels.shuttle` writes it, every byte checked."""
    file = path / "manifest.json"
    try:
        manifest = Manifest.from_json(file.read_text(encoding="utf-8"))
    except (WireError, ValueError) as error:
        raise UserError(f"{file}: damaged: {error}") from None
    tensors, files = _scan(path)
    facts = {
        "version": manifest.version,
        "digest": manifest.digest,
        "buckets": len(manifest.bucket_bytes),
        "files": files,
        "verified": "every tensor has the XXH3 that the manifest promises",
    }
    if manifest.base is not None:
        facts["travelled as"] = (
            f"{manifest.nbytes} bytes, what changed since version {manifest.base.version}"
        )
        return Inventory("published version", path, _patched(path, manifest), facts, {})
    entries = {entry.name: entry for entry in manifest.tensors}
    for name in sorted(entries.keys() ^ tensors.keys()):
        raise UserError(f"{path}: {name}: damaged: is not both in manifest.json and in the files")
    promised = {}
    for name, entry in entries.items():
        tensor = tensors[name]
        if (tensor.dtype, tensor.shape) != (entry.dtype, entry.shape):
            raise UserError(f"{tensor.where}: damaged: is not the tensor that manifest.json lists")
        if (found := _digest_by(xxhash.xxh3_128(), tensor)) != entry.xxh3:
            raise UserError(
                f"{tensor.where}: damaged: has XXH3 {found[:16]}…, was published with "
                f"{entry.xxh3[:16]}…"
            )
        promised[name] = tensor
    return Inventory("published version", path, promised, facts, {})


def _patched(path: Path, manifest: Manifest) -> dict[str, Tensor]:
    """The tensors of a version that lies there as deltas, made as an engine makes them."""
    where = str(shuttle.full_path(path))
    ticket = Ticket(shuttle.NAME, manifest.version, manifest.digest, where)
    try:
        received = Receiver(shared=False).receive(ticket, deadline_s=0.0)
    except (ChannelError, DeltaError, WireError) as error:
        raise UserError(f"{path}: damaged, or a version it needs is: {error}") from None

    def of(entry: TensorEntry, data: np.ndarray) -> Tensor:
        about = (entry.name, entry.dtype, entry.shape, entry.size)
        return Tensor(*about, lambda start, stop: data[start:stop], None, f"{path}: {entry.name}")

    pairs = zip(received.manifest.tensors, received.data, strict=True)
    return {entry.name: of(entry, data) for entry, data in pairs}


def open_checkpoint(path: Path) -> Inventory:
    stored, rejected = find_checkpoint(path)
    facts: dict[str, Any] = {"step": stored.step, "libraries": stored.libraries}
    facts["verified"] = "every file has the SHA-256 that MANIFEST.json promises"
    if rejected:
        facts["passed over"] = [one_line(line) for line in rejected]
    names = ("version", "cursor", "data_fingerprint", "frozen_fingerprint", "source")
    labels = {"version": "weight version", "cursor": "data cursor"}
    host = {**stored.host, **stored.host.get("ledger", {})}
    facts |= {labels.get(n, n): host[n] for n in names if n in host}
    config = stored.host.get("config") or {}
    if config:
        facts["model.path"] = config["model"]["path"]
    if (config.get("lora") or {}).get("rank"):
        facts["lora"] = config["lora"]
    places = [stored.path / "model", *([Path(config["model"]["path"])] if config else [])]
    known = [place for place in places if (place / "config.json").is_file()]
    architecture = _architecture(known[0]) if known else {}
    tensors = _arrays_of(stored)
    return Inventory("JAX checkpoint", stored.path, tensors, facts, architecture, stored)


def _arrays_of(stored: Stored) -> dict[str, Tensor]:
    from jaxrl import checkpoint

    @functools.lru_cache(maxsize=1)  # a tensor is read in parts, and Orbax reads it whole
    def whole(name: str) -> np.ndarray:
        array = checkpoint.read_arrays(stored, [name])[name]
        return np.ascontiguousarray(array).reshape(-1).view(np.uint8)

    def tensor(name: str, dtype: str, shape: tuple[int, ...]) -> Tensor:
        nbytes = math.prod(shape) * _item_bytes(dtype)
        where = f"{stored.path}: {name}"
        return Tensor(name, dtype, shape, nbytes, lambda a, b: whole(name)[a:b], None, where)

    return {name: tensor(name, *about) for name, about in stored.arrays.items()}


def _item_bytes(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


def _scan(directory: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of all files, and the files' names. Raises UserError."""
    found = scan(directory)
    if found.problems:
        raise UserError(f"{directory}: " + "\n".join(found.problems))
    files = sorted({tensor.file.name for tensor in found.tensors.values()})
    return {name: _of_file(tensor) for name, tensor in found.tensors.items()}, files


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        return {name: _of_file(tensor) for name, tensor in read_header(path).items()}
    except DamageError as error:
        raise UserError(f"{path}: damaged: {error}") from None


def _of_file(stored: StoredTensor) -> Tensor:
    where = f"{stored.file}: {stored.name}"

    def read(start: int, stop: int) -> np.ndarray:
        memory = np.empty(stop - start, np.uint8)
        try:
            read_into(stored, start, memory)
        except DamageError as error:
            raise UserError(f"{where}: damaged: {error}") from None
        return memory

    about = (stored.name, stored.dtype, stored.shape, stored.nbytes)
    return Tensor(*about, read, stored.sha256, where)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: damaged: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: damaged: not a JSON object")
    return raw


def _architecture(directory: Path) -> dict[str, Any]:
    raw = _read_json(directory / "config.json")
    name = (raw.get("architectures") or ["unknown"])[0]
    return {"architecture": name} | {key: raw[key] for key in _SIZES if key in raw}


def _fit(directory: Path, tensors: dict[str, Tensor]) -> str:
    """Whether the trainer would take it, from names and shapes."""
    try:
        wanted = hf_tensors(param_specs(load_config(directory)))
    except UserError as error:
        return f"no: {one_line(error)}"
    problems = [f"{name} is missing" for name in wanted if name not in tensors]
    problems += [
        f"{name} has shape {list(tensors[name].shape)}, not {list(wanted[name].shape)}"
        for name in wanted
        if name in tensors and tensors[name].shape != wanted[name].shape
    ]
    more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
    return f"no: {'; '.join(problems[:3])}{more}" if problems else "yes"


# --- one place ---


@dataclasses.dataclass(frozen=True)
class Line:
    """One tensor, or `count` of them whose names differ in numbers only."""

    name: str
    dtype: str
    shape: list[int]
    bytes: int
    count: int = 1
    sha256: str | None = None  # of several: of their names, dtypes, shapes and digests


@dataclasses.dataclass(frozen=True)
class Report:
    kind: str
    path: str
    facts: dict[str, Any]
    architecture: dict[str, Any]
    tensors: int
    parameters: int  # elements
    bytes: int
    dtypes: dict[str, int]  # how many tensors have it
    parts: dict[str, int]  # of a checkpoint: bytes of params, opt_state, ...
    digest: str | None
    tree: list[Line]


def describe(found: Inventory, tensors: bool, digests: bool) -> Report:
    """Args: `tensors` lists each one with its digest, `digests` adds them to the folded tree."""
    every = list(found.tensors.values())
    hashes = {tensor.name: sha256(tensor) for tensor in every} if tensors or digests else {}
    parts: Counter[str] = Counter()
    if found.stored is not None:
        for tensor in every:
            parts[tensor.name.split("/")[0]] += tensor.nbytes
    return Report(
        kind=found.kind,
        path=str(found.path),
        facts=found.facts,
        architecture=found.architecture,
        tensors=len(every),
        parameters=sum(t.elements for t in every if not parts or t.name.startswith("params/")),
        bytes=sum(tensor.nbytes for tensor in every),
        dtypes=dict(Counter(tensor.dtype for tensor in every)),
        parts=dict(parts),
        digest=_digest(every, hashes) if hashes else None,
        tree=[_line(t, hashes) for t in every] if tensors else fold(every, hashes),
    )


def sha256(tensor: Tensor) -> str:
    """Raises UserError if its writer promised another."""
    return _kept(tensor, _digest_by(hashlib.sha256(), tensor))


def _digest_by(digest: Any, tensor: Tensor) -> str:
    step = _CHUNK * 4
    for start in range(0, tensor.nbytes, step):
        digest.update(tensor.read(start, min(start + step, tensor.nbytes)).data)
    return digest.hexdigest()


def _kept(tensor: Tensor, found: str) -> str:
    if tensor.promised not in (None, found):
        raise UserError(
            f"{tensor.where}: damaged: has SHA-256 {found[:16]}…, was written with "
            f"{str(tensor.promised)[:16]}…"
        )
    return found


def fold(tensors: Iterable[Tensor], hashes: dict[str, str]) -> list[Line]:
    """Tensors whose names differ in numbers only, and that are alike, in one line."""
    alike: dict[tuple, list[Tensor]] = {}
    for tensor in tensors:
        pattern = re.sub(r"(?<![^./])\d+(?![^./])", "{}", tensor.name)
        alike.setdefault((pattern, tensor.dtype, tensor.shape), []).append(tensor)
    return [_folded(pattern, same, hashes) for (pattern, *_), same in alike.items()]


def _folded(pattern: str, same: list[Tensor], hashes: dict[str, str]) -> Line:
    if len(same) == 1:
        return _line(same[0], hashes)
    numbers = [re.findall(r"(?<![^./])\d+(?![^./])", tensor.name) for tensor in same]
    spans = [_span(sorted({int(n) for n in column})) for column in zip(*numbers, strict=True)]
    one, nbytes = same[0], sum(tensor.nbytes for tensor in same)
    digest = _digest(same, hashes) if hashes else None
    name = pattern.format(*spans)
    return Line(name, one.dtype, list(one.shape), nbytes, len(same), digest)


def _span(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    if numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{{{numbers[0]}..{numbers[-1]}}}"
    return f"{{{','.join(map(str, numbers))}}}"


def _line(tensor: Tensor, hashes: dict[str, str]) -> Line:
    shape = list(tensor.shape)
    return Line(tensor.name, tensor.dtype, shape, tensor.nbytes, sha256=hashes.get(tensor.name))


def _digest(tensors: Iterable[Tensor], hashes: dict[str, str]) -> str:
    return digest_of_lines((t.name, t.dtype, t.shape, hashes[t.name]) for t in tensors)


# --- two places ---


@dataclasses.dataclass(frozen=True)
class Changed:
    """A tensor that is not the same in both.

    `elements` differ, the largest of the differences is `max_difference` in float32; None: not a
    finite number, or not of a dtype that has numbers here.
    """

    name: str
    elements: int
    of: int
    max_difference: float | None
    sha256: tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Difference:
    a: str
    b: str
    note: str
    only_in_a: list[str]
    only_in_b: list[str]
    shapes: list[tuple[str, list[int], list[int]]]
    dtypes: list[tuple[str, str, str]]
    changed: list[Changed]
    same: int  # tensors

    @property
    def equal(self) -> bool:
        return not (self.only_in_a or self.only_in_b or self.shapes or self.dtypes or self.changed)


def compare(a: Inventory, b: Inventory, note: str = "") -> Difference:
    """By name. What differs in dtype is compared in value too; what differs in shape is not."""
    shapes, dtypes, changed, same = [], [], [], 0
    # In the order of a checkpoint: its tensors share leaves, which are read once that way.
    order = b.tensors if b.kind == "JAX checkpoint" else a.tensors
    for name in (name for name in order if name in a.tensors and name in b.tensors):
        left, right = a.tensors[name], b.tensors[name]
        if left.shape != right.shape:
            shapes.append((name, list(left.shape), list(right.shape)))
            continue
        if left.dtype != right.dtype:
            dtypes.append((name, left.dtype, right.dtype))
        change = compare_tensor(left, right)
        if change is not None:
            changed.append(change)
        same += change is None and left.dtype == right.dtype
    return Difference(
        str(a.path),
        str(b.path),
        note,
        [name for name in a.tensors if name not in b.tensors],
        [name for name in b.tensors if name not in a.tensors],
        shapes,
        dtypes,
        changed,
        same,
    )


def compare_tensor(left: Tensor, right: Tensor) -> Changed | None:
    """One pass over both; None if they are the same bits, or values where dtypes differ."""
    digests = hashlib.sha256(), hashlib.sha256()
    count, largest = 0, 0.0
    for a, b in _chunks(left, right):
        digests[0].update(a.data)
        digests[1].update(b.data)
        if left.dtype == right.dtype and np.array_equal(a, b):
            continue
        differ, difference = _differences(a, b, left, right)
        count += differ
        largest = max(largest, difference) if differ else largest
    found = _kept(left, digests[0].hexdigest()), _kept(right, digests[1].hexdigest())
    if not count:
        return None
    shown = largest if math.isfinite(largest) else None
    return Changed(left.name, count, left.elements, shown, found)


def _chunks(left: Tensor, right: Tensor) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The same elements of both, as bytes."""
    sizes = [tensor.nbytes / max(tensor.elements, 1) for tensor in (left, right)]
    for start in range(0, left.elements, _CHUNK):
        stop = min(start + _CHUNK, left.elements)
        a, b = [(int(start * size), int(stop * size)) for size in sizes]
        yield left.read(*a), right.read(*b)


def _differences(a: np.ndarray, b: np.ndarray, left: Tensor, right: Tensor) -> tuple[int, float]:
    """How many elements differ, and by how much at most; not finite where that is no number."""
    x, y = _values(a, left.dtype), _values(b, right.dtype)
    if left.dtype == right.dtype:  # bits count: 0 and -0 are two contents
        width = max(left.nbytes // max(left.elements, 1), 1)
        differ = (a.reshape(-1, width) != b.reshape(-1, width)).any(axis=1)
    elif x is None or y is None:
        return left.elements, math.inf
    else:
        differ = (x != y) & ~(np.isnan(x) & np.isnan(y))
    if x is None or y is None:
        return int(differ.sum()), math.inf
    if not differ.any():
        return 0, 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        largest = np.abs(x[differ] - y[differ]).max()
    return int(differ.sum()), float(largest) if np.isfinite(largest) else math.inf


def _values(data: np.ndarray, dtype: str) -> np.ndarray | None:
    """Bytes as float32; None if they are no floats. Without ml_dtypes, which comes with jax."""
    if dtype == "bfloat16":  # the upper half of a float32
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if dtype in ("float32", "float16"):
        return data.view(dtype).astype(np.float32)
    return None


def _on_common_ground(a: Inventory, b: Inventory) -> tuple[Inventory, Inventory, str]:
    """Both with names of one kind, and what was done for that."""
    if a.stored is not None and b.stored is not None:
        return _both_params(a, b)
    if a.stored is not None:
        return under_hf_names(a, b), b, "A is shown under Hugging Face names, in the dtypes of B"
    if b.stored is not None:
        return a, under_hf_names(b, a), "B is shown under Hugging Face names, in the dtypes of A"
    return a, b, ""


def _both_params(a: Inventory, b: Inventory) -> tuple[Inventory, Inventory, str]:
    """Two checkpoints as they are, or their parameters if one has nothing else."""

    def only_params(found: Inventory) -> dict[str, Tensor]:
        return {n: tensor for n, tensor in found.tensors.items() if n.startswith("params/")}

    if all(len(only_params(found)) < len(found.tensors) for found in (a, b)):
        return a, b, "array by array, optimizer state included"
    a = dataclasses.replace(a, tensors=only_params(a))
    return a, dataclasses.replace(b, tensors=only_params(b)), "array by array, parameters only"


def under_hf_names(found: Inventory, other: Inventory) -> Inventory:
    """A checkpoint as the Hugging Face tensors that it would be exported to, in `other`'s dtypes.

    One with adapters is compared with a PEFT directory as adapters, and else merged.
    """
    from tools.convert import export_group, groups, policy_of, weights_of

    assert found.stored is not None
    policy = policy_of(found.stored)
    weights = weights_of(found.stored, policy, merged=other.kind != "PEFT adapters")

    @functools.lru_cache(maxsize=2)  # parts whose tensors are read one after the other
    def exported(part: int, dtype: str) -> dict[str, HostTensor]:
        return {t.name: t for t in export_group(weights, parts[part], dtype)}

    def tensor(name: str, shape: tuple[int, ...], part: int) -> Tensor:
        twin = other.tensors.get(name)
        dtype = twin.dtype if twin and twin.dtype in ("float32", "bfloat16", "float16") else None
        dtype = dtype or "float32"
        nbytes = math.prod(shape) * _item_bytes(dtype)
        where = f"{found.path}: {name}"

        def read(start: int, stop: int) -> np.ndarray:
            return exported(part, dtype)[name].data[start:stop]

        return Tensor(name, dtype, shape, nbytes, read, None, where)

    parts = groups(weights.specs)
    tensors = {
        name: tensor(name, about.shape, i)
        for i, part in enumerate(parts)
        for name, about in hf_tensors(part).items()
    }
    return dataclasses.replace(found, tensors=tensors)


# --- output ---


def show(report: Report) -> str:
    lines = [f"{report.path}: {report.kind}"]
    totals = {
        "tensors": report.tensors,
        "parameters": f"{report.parameters:,}",
        "bytes": f"{report.bytes:,}",
        "dtypes": ", ".join(f"{dtype} x{count}" for dtype, count in report.dtypes.items()),
    }
    if report.parts:
        totals["bytes of"] = ", ".join(f"{k} {v:,}" for k, v in report.parts.items())
    if report.digest:
        label = "array digest" if report.parts else "weight digest"
        totals[f"{label} (SHA-256)"] = report.digest
    facts = {_LABELS.get(key, key): value for key, value in report.facts.items()}
    for title, values in (("", totals), ("", facts), ("config", report.architecture)):
        lines += [f"\n{title}"] if title and values else []
        lines += [f"  {key:24} {_plain(value)}" for key, value in values.items()]
    return "\n".join([*lines, "", *_table(report.tree)])


def _table(tree: list[Line]) -> Iterator[str]:
    names = max((len(line.name) for line in tree), default=0)
    shapes = max((len(str(line.shape)) for line in tree), default=0)
    for line in tree:
        text = f"{line.name:{names}}  {line.dtype:8}  {line.shape!s:{shapes}}  {line.bytes:>13,}"
        text += f"  x{line.count}" if line.count > 1 else ""
        yield text + (f"  {line.sha256}" if line.sha256 else "")


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def show_difference(d: Difference, most: int = 40) -> str:
    sections = [
        (f"only in A ({len(d.only_in_a)})", d.only_in_a),
        (f"only in B ({len(d.only_in_b)})", d.only_in_b),
        (f"other shape ({len(d.shapes)})", [f"{n}: {a} in A, {b} in B" for n, a, b in d.shapes]),
        (f"other dtype ({len(d.dtypes)})", [f"{n}: {a} in A, {b} in B" for n, a, b in d.dtypes]),
        (f"other content ({len(d.changed)})", [_show_change(change) for change in d.changed]),
    ]
    lines = [f"A {d.a}", f"B {d.b}", *([d.note] if d.note else [])]
    for title, entries in sections:
        lines += [title] if entries else []
        lines += [f"  {entry}" for entry in entries[:most]]
        lines += [f"  … and {len(entries) - most} more"] if len(entries) > most else []
    lines.append(f"{'equal' if d.equal else 'different'}: {d.same} tensors are the same")
    return "\n".join(lines)


def _show_change(change: Changed) -> str:
    largest = change.max_difference
    by = "by what is no finite number" if largest is None else f"by at most {largest:.6g}"
    return f"{change.name}: {change.elements} of {change.of} elements, {by}"


def _as_json(value: Report | Difference) -> str:
    fields = dataclasses.asdict(value)
    if isinstance(value, Difference):
        fields["equal"] = value.equal
    return json.dumps(fields, indent=1, allow_nan=False)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.inspect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("path", type=Path)
    parser.add_argument("--diff", type=Path, metavar="OTHER")
    parser.add_argument("--tensors", action="store_true")
    parser.add_argument("--sha256", action="store_true")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
