"""Hugging Face directories <-> JAX checkpoints.

    python -m tools.convert hf2jax SRC DST [--dtype float32|bfloat16]
    python -m tools.convert jax2hf CKPT DST [--dtype bfloat16|float32|float16] [--step N]
                                            [--lora merged|adapter] [--model DIR]

hf2jax makes one sealed checkpoint (`jaxrl/checkpoint.py`) of parameters only, with the small files
of SRC in `model/`: the way back needs nothing else. Plain Orbax reads `DST/arrays`.

jax2hf takes such a directory, one checkpoint of a run, its `checkpoints` directory, or the run
itself (the newest whole checkpoint, or --step). Every byte is checked against its digest first;
then only parameters are read, a few leaves at a time. Of a run with adapters it writes the merged
weights, or with `--lora adapter` a PEFT directory. --model says where model.path of the run is now.

DST must not exist, or, with --force, be something that this tool writes. The weight digest that is
printed is that of tools.inspect --sha256: equal digests mean equal weights. It is made of SHA-256;
the digest in a published version's manifest is made of XXH3, and is another number. Exit codes: 0
done, 2 a mistake in the input, and then nothing was written.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bridge.wire import HostTensor, digest_of_lines, sha256
from jaxrl import durable
from jaxrl.model_dir import find_model
from jaxrl.models.config import DecoderConfig, LoraConfig, load_config
from jaxrl.models.params import ParamSpec, leaf_at, param_specs, trained_specs, tree_of
from jaxrl.models.params import Path as Leaf
from jaxrl.types import RunError, UserError

if TYPE_CHECKING:  # a mistake in the input is answered without jax
    from jaxrl.checkpoint import Stored

MODEL = "model"  # the Hugging Face files inside a checkpoint that hf2jax made
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def main(arguments: list[str] | None = None) -> int:
    # A conversion needs no accelerator, and must not take the memory of one that is at work.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    try:
        print(options.run(options))
        return 0
    except (RunError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130


def hf2jax(options: argparse.Namespace) -> str:
    source, target = options.src, options.dst
    ignore = options.ignore_config_field
    specs = param_specs(load_config(source, ignore))
    _check_target(target, options.force, {source})
    from bridge.checkpoints import TOKENIZER_FILES, load_params
    from jaxrl import checkpoint

    start = time.perf_counter()
    params = load_params(source, specs, _on_one_device(specs), options.dtype)
    small = [n for n in ("config.json", *TOKENIZER_FILES) if (source / n).is_file()]
    host = {"source": str(source.resolve()), "ignore_config_fields": ignore}
    files = {f"{MODEL}/{name}": source / name for name in small}
    checkpoint.save_alone(target, {"params": params}, host, files)
    seconds = time.perf_counter() - start
    written = Tally()
    weights = Weights(specs, lambda paths: {path: leaf_at(params, path) for path in paths})
    for _ in written.through(export_stream(weights, options.dtype)):
        pass  # hashed under the names and in the layout that every other tool sees
    return written.report(target, seconds)


def jax2hf(options: argparse.Namespace) -> str:
    stored, rejected = find_checkpoint(options.ckpt, options.step)
    for line in rejected:
        print(f"passed over: {one_line(line)}", file=sys.stderr)
    policy = policy_of(stored, options.model)
    if options.lora == "adapter" and policy.lora is None:
        raise UserError(f"{stored.path}: has no adapters; leave --lora adapter away")
    _check_target(options.dst, options.force, {stored.path, policy.model_dir})
    from bridge.checkpoints import save_model
    from bridge.peft import adapter_config, save_adapter

    start, written = time.perf_counter(), Tally()
    weights = weights_of(stored, policy, merged=options.lora == "merged")
    dtype = options.dtype or ("float32" if options.lora == "adapter" else "bfloat16")
    tensors = written.through(export_stream(weights, dtype))
    if policy.lora is not None and options.lora == "adapter":
        settings = adapter_config(policy.lora, weights.specs, policy.base)
        save_adapter(tensors, settings, options.dst)
    else:
        save_model(tensors, policy.model_dir, options.dst)
    return written.report(options.dst, time.perf_counter() - start, stored.step)


# --- what is in a checkpoint ---


@dataclasses.dataclass(frozen=True)
class PolicyFacts:
    """What a checkpoint's parameters are parameters of."""

    model_dir: Path  # config.json, the tokenizer and, beside adapters, the frozen weights
    base: str  # model.path as the run has it
    decoder: DecoderConfig
    lora: LoraConfig | None

    @property
    def trained(self) -> dict[Leaf, ParamSpec]:
        return trained_specs(self.decoder, self.lora)


@dataclasses.dataclass(frozen=True)
class Weights:
    """Leaves that are read when they are needed: `read(paths)` gives some of `specs`."""

    specs: dict[Leaf, ParamSpec]
    read: Callable[[Collection[Leaf]], dict[Leaf, Any]]


def find_checkpoint(path: Path, step: int | None = None) -> tuple[Stored, list[str]]:
    """The checkpoint that `path` means, and a line for each damaged one that was passed over.

    Raises:
      UserError: there is none, or it is damaged.
    """
    if not path.is_dir():
        raise UserError(f"{path}: there is no such directory")
    from jaxrl import checkpoint

    if is_checkpoint(path):
        stored = checkpoint.open_whole(path)
        if step not in (None, stored.step):
            raise UserError(f"{path}: is the checkpoint of step {stored.step}, not of step {step}")
        return stored, []
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if step is None:
        return checkpoint.open_newest(root)
    one = root / f"step_{step:08d}"
    if not one.is_dir():
        there = ", ".join(sorted(p.name for p in root.glob("step_*"))) or "no checkpoint"
        raise UserError(f"{root}: there is no {one.name}, only {there}")
    return checkpoint.open_whole(one), []


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is one checkpoint, be it damaged, and not a directory of them."""
    return (path / durable.MANIFEST).exists() or (path / "arrays").is_dir()


def policy_of(stored: Stored, model: Path | None = None) -> PolicyFacts:
    """Reads the architecture: of `model`, of the checkpoint's own files, or of model.path.

    Raises:
      UserError: it is not where the run had it, or the parameters are not those it describes.
    """
    config = stored.host.get("config") or {}
    section = config.get("model", {})
    own = stored.path / MODEL
    base = str(section.get("path", own))
    if model is not None:
        model_dir, base = model, str(model)
    elif own.is_dir():
        model_dir = own
    elif section:
        try:
            model_dir = find_model(base)
        except UserError as error:
            raise UserError(f"{error}; say with --model DIR where it is now") from None
    else:
        raise UserError(f"{stored.path}: does not say what model it is of; use --model DIR")
    ignore = section.get("ignore_config_fields", stored.host.get("ignore_config_fields", ()))
    lora = config.get("lora") or {}
    adapters = None
    if lora.get("rank"):
        adapters = LoraConfig(lora["rank"], lora["alpha"], tuple(lora["targets"]))
    policy = PolicyFacts(model_dir, base, load_config(model_dir, ignore), adapters)
    _check_fit(stored, policy)
    return policy


def weights_of(stored: Stored, policy: PolicyFacts, merged: bool = True) -> Weights:
    """The checkpoint's parameters; with adapters and `merged`, base and adapters made one.

    Raises:
      UserError: the base weights are not those that the adapters were trained beside.
    """
    from jaxrl import checkpoint

    def read(paths: Collection[Leaf]) -> dict[Leaf, np.ndarray]:
        arrays = checkpoint.read_arrays(stored, [_array_name(path) for path in paths])
        return {path: arrays[_array_name(path)] for path in paths}

    trained = Weights(policy.trained, read)
    if policy.lora is None or not merged:
        return trained
    return _merged(stored, policy, policy.lora, trained)


def _merged(stored: Stored, policy: PolicyFacts, lora: LoraConfig, adapters: Weights) -> Weights:
    from bridge.checkpoints import load_params
    from jaxrl.learner import FROZEN_DTYPE
    from jaxrl.models.lora import fingerprint, merged_params, with_adapters

    specs = param_specs(policy.decoder)
    # As the run held them: in another dtype they would be other weights than it trained beside.
    frozen = load_params(policy.model_dir, specs, _on_one_device(specs), FROZEN_DTYPE)
    expected = stored.host.get("frozen_fingerprint")
    if expected is not None and expected != int(fingerprint(frozen)):
        raise UserError(
            f"{policy.model_dir}: its weights are not those that the adapters in {stored.path} "
            "were trained beside"
        )
    whole = with_adapters(frozen, tree_of(adapters.read(adapters.specs)))

    def read(paths: Collection[Leaf]) -> dict[Leaf, Any]:
        some = {path: specs[path] for path in paths}
        merged = merged_params(some, lora, whole)
        return {path: leaf_at(merged, path) for path in some}

    return Weights(specs, read)


def _check_fit(stored: Stored, policy: PolicyFacts) -> None:
    wanted = {_array_name(path): spec.shape for path, spec in policy.trained.items()}
    found = {n: shape for n, (_, shape) in stored.arrays.items() if n.startswith("params/")}
    problems = [f"{name}: is not in the checkpoint" for name in wanted if name not in found]
    problems += [f"{name}: is not of this model" for name in found if name not in wanted]
    problems += [
        f"{name}: has shape {list(found[name])}, the model has {list(wanted[name])}"
        for name in wanted
        if name in found and found[name] != wanted[name]
    ]
    if problems:
        more = f"\nand {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(
            f"{stored.path}: its parameters are not those of {policy.model_dir}/config.json:\n"
            + "\n".join(problems[:5])
            + more
        )


# --- from leaves to tensors ---


def groups(specs: dict[Leaf, ParamSpec]) -> list[dict[Leaf, ParamSpec]]:
    """The leaves in parts that share no Hugging Face tensor: each can be exported by itself."""
    parts: dict[str, dict[Leaf, ParamSpec]] = {}
    for path, spec in specs.items():
        parts.setdefault(spec.hf_name, {})[path] = spec
    return list(parts.values())


def export_group(weights: Weights, part: dict[Leaf, ParamSpec], dtype: str) -> list[HostTensor]:
    """The Hugging Face tensors of one of `groups`.

    Raises:
      UserError: a value is too large for `dtype`.
    """
    from bridge.export import Exporter

    tensors = Exporter(part, dtype)(tree_of(weights.read(part)))
    for tensor in tensors if dtype == "float16" else []:
        # bfloat16 reaches as far as float32; float16 ends at 65504, and would say infinity.
        if np.isinf(tensor.data.view(np.float16)).any():
            raise UserError(f"{tensor.name}: does not fit in float16; use bfloat16 or float32")
    return tensors


def export_stream(weights: Weights, dtype: str) -> Iterator[HostTensor]:
    """Every Hugging Face tensor, with no more leaves in memory than share one tensor."""
    for part in groups(weights.specs):
        yield from export_group(weights, part, dtype)


class Tally:
    """Counts and hashes tensors on their way."""

    def __init__(self) -> None:
        self.nbytes = 0
        self.lines: list[tuple[str, str, tuple[int, ...], str]] = []  # see `digest_of_lines`

    def through(self, tensors: Iterable[HostTensor]) -> Iterator[HostTensor]:
        for t in tensors:
            self.nbytes += t.data.nbytes
            self.lines.append((t.name, t.dtype, t.shape, sha256(t.data)))
            yield t

    def report(self, target: Path, seconds: float, step: int | None = None) -> str:
        dtypes = ", ".join(sorted({dtype for _, dtype, _, _ in self.lines}))
        of = "" if step is None else f" (step {step})"
        return (
            f"{target}: {len(self.lines)} tensors, {self.nbytes} bytes, {dtypes}{of}\n"
            f"{seconds:.1f} s, {self.nbytes / 1e9 / seconds:.3g} GB/s\n"
            f"weight digest (SHA-256) {digest_of_lines(self.lines)}"
        )


# --- the target ---


def _check_target(target: Path, force: bool, inputs: set[Path]) -> None:
    """Refuses a target that exists, or would take one of `inputs` with it."""
    place = target.resolve()
    for source in inputs:
        used = source.resolve()
        if used.is_relative_to(place) or (is_checkpoint(used) and place.is_relative_to(used)):
            raise UserError(f"{target}: holds, or lies in, {source}, which is read; name another")
    if not os.path.lexists(target):
        return
    if not force:
        raise UserError(f"{target}: exists already; name another, or replace it with --force")
    foreign = _foreign_files(target)
    if foreign:
        raise UserError(
            f"{target}: is not replaced, even with --force: this tool never writes "
            f"{', '.join(foreign[:3])}"
        )


def _foreign_files(target: Path) -> list[str]:
    """What in `target` no conversion could have left there."""
    from bridge.checkpoints import TOKENIZER_FILES
    from bridge.safetensors_files import INDEX

    if target.is_symlink() or not target.is_dir():
        return [target.name]
    names = {path.name for path in target.iterdir()}
    own = {durable.MANIFEST, durable.MANIFEST_DIGEST, "arrays", "host.json", MODEL}
    if {durable.MANIFEST, MODEL} <= names:
        return sorted(names - own)
    ours = {"config.json", INDEX, *TOKENIZER_FILES, *_ADAPTER_FILES}
    return sorted(n for n in names - ours if not (target / n).match("model*.safetensors"))


# --- small things ---


def one_line(error: object) -> str:
    """A message of several lines as one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return "; ".join(lines).replace(":; ", ": ")


def _array_name(path: Leaf) -> str:
    return "/".join(("params", *path))


def _on_one_device(specs: dict[Leaf, ParamSpec]) -> Any:
    from jaxrl.config import MeshSection
    from jaxrl.mesh import make_mesh, param_shardings

    return param_shardings(specs, make_mesh(MeshSection()))


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True)

    there = commands.add_parser("hf2jax", help="a Hugging Face directory to a JAX checkpoint")
    there.set_defaults(run=hf2jax)
    there.add_argument("src", type=Path, help="a Hugging Face directory")
    there.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    there.add_argument(
        "--ignore-config-field",
        action="append",
        default=[],
        metavar="NAME",
        help="as model.ignore_config_fields of a run: a field that changes nothing in the model",
    )

    back = commands.add_parser("jax2hf", help="a JAX checkpoint to a Hugging Face directory")
    back.set_defaults(run=jax2hf)
    back.add_argument("ckpt", type=Path, help="a checkpoint, or the directory of a run")
    back.add_argument(
        "--dtype",
        choices=["bfloat16", "float32", "float16"],
        help="default: bfloat16, and float32 for an adapter, as a run writes them",
    )
    back.add_argument("--step", type=int, metavar="N", help="default: the newest whole one")
    back.add_argument("--lora", choices=["merged", "adapter"], default="merged")
    back.add_argument("--model", type=Path, metavar="DIR", help="where model.path is now")

    for command in (there, back):
        command.add_argument("dst", type=Path, help="the directory to write")
        command.add_argument("--force", action="store_true", help="replace an older conversion")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
