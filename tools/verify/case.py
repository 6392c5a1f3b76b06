"""The model in question: its files, its weights, and the tokens it is asked about."""

import contextlib
import dataclasses
import functools
import importlib.util
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxrl.config import MeshSection
from jaxrl.models.config import DecoderConfig, load_config
from jaxrl.models.params import ParamSpec, param_specs
from jaxrl.models.params import Path as LeafPath
from jaxrl.types import UserError
from tools.verify.engine import HOW_TO_INSTALL, Engine, Published
from tools.verify.made_up import make_weights, write_config
from tools.verify.ours import load_on
from tools.verify.reference import FileTensor, Reference, file_digests, file_tensors
from tools.verify.report import first_line, progress

SHORTEST_ROW, LONGEST_WINDOW = 64, 1024  # tokens
TEXT_TOKENS = 256
TEXT = """\
The quick brown fox jumps over the lazy dog; 3.14159 * 2 = 6.28318, and 7 / 8 = 0.875. In 1905
a clerk in Zürich asked: "What would I see if I rode on a beam of light?"

def fibonacci(n: int) -> int:
    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)  # 0, 1, 1, 2, 3, 5, 8, 13

Привет, мир! 你好,世界。 こんにちは 🙂 naïve café, coöperate; {"key": [1, 2.5e-3, null]}
"""


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


class Skip(Exception):
    """A check that cannot be made here, and why."""


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
    def files(self) -> dict[str, FileTensor]:
        return file_tensors(self.directory)

    @functools.cached_property
    def digests(self) -> dict[str, str]:
        return file_digests(self.files)

    @functools.cached_property
    def params(self) -> Any:
        """Ours, float32, on one device."""
        return load_on(self.directory, self.specs, MeshSection())

    @functools.cached_property
    def reference(self) -> Reference:
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
    def engine(self) -> Engine:
        return Engine(self.directory, self.config, self.specs, lambda: self.prompts)

    @functools.cached_property
    def published(self) -> tuple[Published, Published]:
        return self.engine.publish(self.params, self.options.seed)

    def random(self) -> np.random.Generator:
        return np.random.default_rng(self.options.seed)

    def forget_reference(self) -> None:
        """It is as large as our own parameters, and the mesh has copies of those."""
        self.__dict__.pop("reference", None)

    def close(self) -> None:
        if "engine" in self.__dict__:
            self.engine.close()


def prepare(options: Options, scratch: Path) -> Case:
    """The case; its weights are made up in `scratch` if that is asked for.

    Raises:
      UserError: there is no such model, a library is missing, or memory is too small.
    """
    check_input(options)
    case = Case(options, options.model_dir, "weights of its files")
    if options.random_weights:
        kept = write_config(options.model_dir, scratch, options.layers)
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


def parameters(specs: dict[LeafPath, ParamSpec]) -> int:
    return sum(math.prod(spec.shape) for spec in specs.values())


def row_tokens(c: DecoderConfig) -> int:
    """Long enough to leave the window, unless that is very long."""
    window = c.sliding_window or 0
    length = SHORTEST_ROW if window > LONGEST_WINDOW else max(SHORTEST_ROW, window + 32)
    return min(length, c.max_positions)
