"""Says before a run whether it fits its devices, and how fast a step can be at most.

    python -m tools.plan --config FILE --topology v5e:4x4 [--section.key VALUE ...]
    python -m tools.plan --config FILE --topology v5p --chips 64    the usual slice of 64 chips
    python -m tools.plan --config FILE                              the devices that are here

The real update and export are compiled for the target, ahead of time, from shapes alone: a TPU
slice needs no TPU, only libtpu (the extra `plan`), and no weights are read. docs/plan.md says what
each line means.

Exit codes: 0 it fits; 1 it does not; 2 a mistake in the input.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxrl.settings import ConfigError, load, overrides
from jaxrl.types import UserError
from tools.options import check_file
from tools.plan.topology import choose, open_target, set_environment


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        options, rest = parse(arguments)
        c = load(options.config, list(overrides(rest)))
        name = choose(options.topology, options.chips, c)
        if options.json is not None:
            check_file("--json", options.json)
        set_environment(name, c)
        from tools.plan.plan import make_plan

        target = open_target(name, c)
        plan = make_plan(c, target, options)
        print(plan.text, flush=True)
        if options.json is not None:
            options.json.write_text(json.dumps(plan.record, indent=2, allow_nan=False) + "\n")
        return 0 if plan.fits else 1
    except UserError as error:
        print(f"tools.plan: {error}", file=sys.stderr)
        return 2


def parse(arguments: Sequence[str] | None) -> tuple[Any, list[str]]:
    """The options, and what is left: overrides of the configuration."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.plan",
        description="Says before a run whether it fits its devices, and how fast it can be",
        epilog="--section.key VALUE overrides the configuration, as for jaxrl.train",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", type=Path, metavar="FILE", help="the YAML file of the run")
    add("--topology", metavar="KIND:SHAPE", help="v5e:4x4, v5p:2x2x4, v6e, tpu7x, ... or cpu")
    add("--chips", type=_positive, metavar="N", help="the usual slice of so many chips (of v5e)")
    add("--link-gbps", type=_rate, metavar="X", help="gigabits a second from trainer to engines")
    add("--engine-tokens-per-s", type=_rate, metavar="X", help="that one engine samples")
    add("--json", type=Path, metavar="FILE", help="write the numbers there as well")
    add("--no-advice", action="store_true", help="compile nothing more where it does not fit")
    options, rest = parser.parse_known_args(arguments)
    if options.config is None:
        raise ConfigError("--config FILE is required")
    return options, rest


def _positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


if __name__ == "__main__":
    sys.exit(main())
