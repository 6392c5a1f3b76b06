"""Compares runs that differ in some keys, each under several seeds.

    python -m tools.sweep FILE [--out DIR] [--only NAME ...]

FILE is YAML:

    config: configs/arithmetic.yaml       # what all runs have in common, as for jaxrl.train
    set: { run.steps: 60 }                # overrides for all of them; may be left out
    seeds: [0, 1]                         # a run for each; default: [0]
    target: 0.9                           # the held-out accuracy whose first step is told; 0.9
    deadline_s: 3600                      # for one run, in seconds; 3600
    runs:                                 # NAME: overrides, which win over `set`
      default: {}
      dapo: { algorithm.preset: dapo }

Each run is a process of jaxrl.train, one after the other, since all have this machine. Nothing
starts before all are checked. DIR, by default runs/ and the name of FILE, gets a run directory
NAME-seedS and what the run printed, NAME-seedS.log, and at the end table.md and table.json. Started
again, a sweep passes over the runs that are finished and goes on with the others; with --only,
those named are all that it runs and tells of.

Exit codes: 0 all finished; 1 some failed, and their rows say why; 2 a mistake in the input;
128 + n ended by signal n.
"""

import argparse
import contextlib
import json
import shlex
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field, ValidationError

from bridge.guard import guarded
from jaxrl import durable
from jaxrl.config import Config, Section
from jaxrl.rundir import RunDirError, accept_changes
from jaxrl.settings import ConfigError, load, read_yaml, to_yaml
from jaxrl.types import UserError
from tools.options import check_directory

GRACE_S = 120.0  # for a run that is told to end: its step, and a checkpoint
OWN_KEYS = ("run.name", "run.dir", "run.seed")
HEADER = ("run", "accuracy at the end", "steps to {:.4g} %", "reward", "lag, mean / max", "seconds")


class Sweep(Section):
    """A file of this tool."""

    config: str
    set: dict[str, Any] = Field({})
    seeds: list[int] = Field([0], min_length=1)
    target: float = Field(0.9, gt=0.0, le=1.0)
    deadline_s: float = Field(3600.0, gt=0.0)
    runs: dict[str, dict[str, Any]] = Field(min_length=1)


class Run(NamedTuple):
    name: str
    seed: int
    arguments: list[str]  # of jaxrl.train
    config: Config

    @property
    def directory(self) -> Path:
        return self.config.run_dir


class Result(NamedTuple):
    """Of one run; None: there is nothing to tell."""

    seed: int
    accuracy: float | None = None  # held-out, of the last evaluation
    steps_to_target: int | None = None  # the first evaluation that reached it
    reward: float | None = None  # mean of the last step
    lag_mean: float | None = None  # versions, over the steps
    lag_max: float | None = None
    seconds: float | None = None  # of its steps, evaluations included, without the start
    error: str | None = None  # that it ended with


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.sweep",
        description="Compares runs that differ in some keys, each under several seeds",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="the YAML file of the sweep")
    add("--out", type=Path, metavar="DIR", help="outputs; default: runs/ and the name of FILE")
    add("--only", nargs="+", metavar="NAME", help="of the runs in FILE")
    options = parser.parse_args(arguments)
    out = options.out or Path("runs") / options.file.stem
    try:
        sweep = read(options.file)
        runs = plan(options.file, sweep, out, options.only)
        check_directory("--out", out)
        finished = {run.directory for run in runs if is_finished(run)}
    except UserError as error:
        print(f"tools.sweep: {error}", file=sys.stderr)
        return 2
    results: dict[str, list[Result]] = {}
    with signals_exit():
        for i, run in enumerate(runs, start=1):
            print(f"[{i}/{len(runs)}] {run.directory}", flush=True)
            error = None if run.directory in finished else execute(run, sweep.deadline_s)
            result = measured(run.seed, read_metrics(run), sweep.target)._replace(error=error)
            results.setdefault(run.name, []).append(result)
    table = format_table(results, sweep.target)
    durable.write_file(out / "table.md", table)
    durable.write_file(out / "table.json", json.dumps(record(sweep, results), indent=2) + "\n")
    print(f"\n{table}")
    return int(any(result.error for of_name in results.values() for result in of_name))


def read(file: Path) -> Sweep:
    """Raises ConfigError, which names the line or the key."""
    try:
        sweep = Sweep.model_validate(read_yaml(file))
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ConfigError(f"{file}: {'; '.join(problems)}") from None
    given = {"set": sweep.set, **{f"runs.{name}": own for name, own in sweep.runs.items()}}
    for where, keys in given.items():
        for key in keys:
            if key in OWN_KEYS:
                raise ConfigError(f"{file}: {where}: {key} is the sweep's own; take it out")
            if key.count(".") != 1:
                raise ConfigError(f"{file}: {where}: {key}: expected SECTION.KEY: value")
    return sweep


def plan(file: Path, sweep: Sweep, out: Path, only: Sequence[str] | None) -> list[Run]:
    """The runs in the order of the file, seeds together.

    Raises:
      ConfigError: with every problem of their configurations.
    """
    if unknown := sorted({*(only or ())} - sweep.runs.keys()):
        raise ConfigError(
            f"--only {' '.join(unknown)}: not in {file}, which has {', '.join(sweep.runs)}"
        )
    runs: list[Run] = []
    problems: dict[str, dict[str, None]] = {}  # with the names of the runs that have them, in order
    for name, own in sweep.runs.items():
        for seed in dict.fromkeys(sweep.seeds) if only is None or name in only else ():
            given = {
                "run.name": f"{name}-seed{seed}",
                "run.dir": str(out),
                "run.seed": seed,
                **sweep.set,
                **own,
            }
            overrides = {key: as_text(value) for key, value in given.items()}
            try:
                config = load(Path(sweep.config), list(overrides.items()))
            except ConfigError as error:
                problems.setdefault(str(error), {})[name] = None
                continue
            flags = [f"--{key}={text}" for key, text in overrides.items()]
            runs.append(Run(name, seed, ["--config", sweep.config, *flags], config))
    if problems:
        lines = [f"{file}: runs {', '.join(names)}: {text}" for text, names in problems.items()]
        raise ConfigError("\n".join(lines))
    return runs


def as_text(value: Any) -> str:
    """As on a command line."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def is_finished(run: Run) -> bool:
    """Whether nothing of it is left to do.

    Raises:
      UserError: its directory holds another run.
    """
    saved = run.directory / "config.yaml"
    if not saved.exists():
        return False
    try:
        changes = accept_changes(saved, to_yaml(run.config))
    except RunDirError as error:
        raise UserError(f"{error}. Or choose another --out") from None
    steps = run.config.run.steps
    # The last step evaluates; without that it ended with a failure of the engines.
    ended = any(line["step"] >= steps and "eval/accuracy" in line for line in read_metrics(run))
    other = [line for line in changes if not line.startswith("run.dir:")]
    if ended and other:
        raise UserError(
            f"{run.directory}: finished with another configuration ({', '.join(other)}); choose "
            f"another --out, or remove {run.directory}"
        )
    return ended


@contextlib.contextmanager
def signals_exit() -> Iterator[None]:
    """SIGINT and SIGTERM raise SystemExit, so that what is under way is ended."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {n: signal.signal(n, lambda number, _: sys.exit(128 + number)) for n in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def execute(run: Run, deadline_s: float) -> str | None:
    """Starts the run, or goes on with it, and waits; returns why it failed, None if it did not."""
    resume = ["--resume"] if (run.directory / "config.yaml").exists() else []
    command = [sys.executable, "-m", "jaxrl.train", *run.arguments, *resume]
    log = run.directory.with_name(f"{run.directory.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as stream:
        stream.write(f"$ {shlex.join(command)}\n".encode())
        stream.flush()
        start = stream.tell()
        # A Ctrl-C in the terminal is for the sweep, which then ends the run.
        with guarded():
            process = subprocess.Popen(
                command, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            code = process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            return f"not finished after deadline_s = {deadline_s:g}; start the sweep again to go on"
        finally:
            end(process)
    with log.open("rb") as stream:
        stream.seek(start)
        return why(code, stream.read().decode(errors="replace")) if code else None


def end(process: subprocess.Popen) -> None:
    """Of a run that goes on still: after its step, with a checkpoint; or else at once."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(GRACE_S)


def why(code: int, printed: str) -> str:
    """The first line of what a run ended with."""
    lines = [line for line in printed.splitlines() if line.strip()]
    for line in lines:
        if line.startswith("error: "):
            return line.removeprefix("error: ")
    if any(line.startswith("Traceback") for line in lines):
        return lines[-1]
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def read_metrics(run: Run) -> list[dict[str, Any]]:
    """One for each step, from step 0 on; [] if it has not come so far."""
    try:
        text = (run.directory / "metrics.jsonl").read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    # What stands behind the last newline is half a line, of a run that was killed.
    return [json.loads(line) for line in text.split("\n")[:-1]]


def measured(seed: int, lines: Sequence[Mapping[str, Any]], target: float) -> Result:
    """`lines` of metrics.jsonl, in order."""

    def values(name: str) -> list[float]:
        return [line[name] for line in lines if line.get(name) is not None]

    reached = [line["step"] for line in lines if (line.get("eval/accuracy") or 0.0) >= target]
    return Result(
        seed=seed,
        accuracy=(values("eval/accuracy") or [None])[-1],
        steps_to_target=(reached or [None])[0],
        reward=(values("reward/mean") or [None])[-1],
        lag_mean=over(statistics.fmean, values("lag/mean")),
        lag_max=over(max, values("lag/max")),
        seconds=over(sum, values("time/step_s")),
    )


def over(function: Callable[[list[float]], float], values: Iterable[float | None]) -> float | None:
    """Of those that are known; None if none is."""
    known = [value for value in values if value is not None]
    return function(known) if known else None


def summary(results: Sequence[Result]) -> dict[str, float | None]:
    """Of a run, over its seeds."""

    def mean(name: str) -> float | None:
        return over(statistics.fmean, (getattr(result, name) for result in results))

    accuracies = [result.accuracy for result in results]
    return {
        "accuracy": mean("accuracy"),
        "accuracy_min": over(min, accuracies),
        "accuracy_max": over(max, accuracies),
        "steps_to_target": mean("steps_to_target"),
        "reward": mean("reward"),
        "lag_mean": mean("lag_mean"),
        "lag_max": over(max, (result.lag_max for result in results)),
        "seconds": mean("seconds"),
    }


def record(sweep: Sweep, results: Mapping[str, Sequence[Result]]) -> dict[str, Any]:
    """The table as numbers, and those of each seed."""
    rows = {
        name: {
            "overrides": sweep.runs[name],
            **summary(of_name),
            "seeds": [result._asdict() for result in of_name],
        }
        for name, of_name in results.items()
    }
    return {"config": sweep.config, "set": sweep.set, "target": sweep.target, "runs": rows}


def format_table(results: Mapping[str, Sequence[Result]], target: float) -> str:
    """Markdown."""
    header = [title.format(100 * target) for title in HEADER]
    rows = [header, ["---"] * len(header)]
    rows += [[name, *cells(of_name)] for name, of_name in results.items()]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def cells(results: Sequence[Result]) -> list[str]:
    failed = [f"seed {result.seed}: {result.error}" for result in results if result.error]
    if failed:
        return ["failed, " + "; ".join(failed).replace("|", "\\|"), *[""] * (len(HEADER) - 2)]
    of = summary(results)
    accuracy = shown(of["accuracy"], "{:.1%}")
    if len(results) > 1 and of["accuracy"] is not None:
        accuracy += f" ({of['accuracy_min']:.1%} to {of['accuracy_max']:.1%})"
    never = sum(result.steps_to_target is None for result in results)
    steps = shown(of["steps_to_target"], "{:g}")
    if 0 < never < len(results):
        steps += f", {never} of {len(results)} never"
    lag = f"{shown(of['lag_mean'], '{:.2f}')} / {shown(of['lag_max'], '{:g}')}"
    return [accuracy, steps, shown(of["reward"], "{:.3f}"), lag, shown(of["seconds"], "{:.0f}")]


def shown(value: float | None, template: str) -> str:
    return "-" if value is None else template.format(value)


if __name__ == "__main__":
    sys.exit(main())
