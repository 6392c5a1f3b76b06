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
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxrl.config import MeshSection
from jaxrl.cpu import divide_cpu
from jaxrl.types import UserError
from tools.mesh_option import parse_mesh
from tools.verify.case import Options, prepare, start
from tools.verify.checks import run
from tools.verify.report import Report, clean_stdout


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
            report = Report(out, str(options.model_dir), case.weights, as_json=options.json)
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


def set_environment(options: Options) -> None:
    """What libraries read when they are first imported; what the user has set stays."""
    if os.environ.get("JAX_PLATFORMS", "") in ("", "cpu"):
        divide_cpu((options.mesh or MeshSection(data=2, fsdp=2, tensor=2)).devices)
    for name, value in {
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",  # accelerators would round float32 products
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # an engine may share the device
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        os.environ.setdefault(name, value)


def _positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
