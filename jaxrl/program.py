"""What running has in common, whatever is trained: a command line -> an exit code.

Exit codes: 0 done; 1 the run could not go on; 2 a mistake in the configuration, a file or the
command line; 128 + n ended by signal n, after a checkpoint if a step was under way.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from jaxrl.config import RunConfig
from jaxrl.cpu import divide_cpu
from jaxrl.interrupt import EndedAtOnce, Interrupt
from jaxrl.settings import C, Command, describe, parse_command_line, to_yaml
from jaxrl.types import RunError, UserError

if TYPE_CHECKING:  # jax starts only when the configuration is known to be good
    from jaxrl.hosts import Hosts
    from jaxrl.report import Summary
    from jaxrl.rundir import RunDir
    from jaxrl.update import TrainState


def start(arguments: list[str], kind: type[C], go: Callable[[Command[C], Hosts], int]) -> int:
    """A command line -> its exit code. The first process does `go`, the others `follow`."""
    run_dir = None
    try:
        command = parse_command_line(arguments, kind)
        run_dir = command.config.run_dir
        if command.dry_run:
            print(to_yaml(command.config) + "\n" + describe(command.config))
            return 0
        divide_cpu_for(command.config)
        from jaxrl.hosts import join
        from jaxrl.led import follow

        with join(command.config, partial(report_error, run_dir=run_dir)) as hosts:
            code = go(command, hosts) if hosts.first else follow(command.config, hosts)
            hosts.end(code)
        return code
    except (RunError, KeyboardInterrupt) as error:
        return report_error(error, run_dir)


def divide_cpu_for(c: RunConfig) -> None:
    """As many devices as this process has of the mesh, where jax was told to use the CPU.

    Not where jax finds nothing else: that an accelerator is missing must not pass unnoticed.
    """
    if os.environ.get("JAX_PLATFORMS") == "cpu" and c.hosts.coordinator != "auto":
        divide_cpu(max(1, c.mesh.devices // (c.hosts.processes or 1)))


def report_error(error: BaseException, run_dir: Path | None) -> int:
    """Says what ended the run, and returns the exit code. No `run_dir`: it was not known yet."""
    match error:
        case UserError():
            print(f"error: {error}", file=sys.stderr)
            return 2
        case RunError():
            print(f"error: {error}\n{_how_to_go_on(run_dir)}", file=sys.stderr)
            return 1
        case KeyboardInterrupt():
            print(f"ended at once; {_how_to_go_on(run_dir)}", file=sys.stderr)
            number = error.signal if isinstance(error, EndedAtOnce) else signal.SIGINT
            return 128 + number
    traceback.print_exception(error)
    return 1


def _how_to_go_on(run_dir: Path | None) -> str:
    if run_dir is None or not (run_dir / "config.yaml").exists():
        return "nothing was written yet; start it again as it was"
    if any((run_dir / "checkpoints").glob("step_*")):
        return "to go on from the newest checkpoint, add --resume"
    return "no checkpoint was written yet; --resume starts from the first step"


def refuse_to_go_on_skipping(c: RunConfig, state: TrainState, step: int) -> None:
    skipped = int(state.skipped_in_a_row)
    if skipped >= c.optimizer.max_skipped_updates:
        raise RunError(
            f"step {step}: the loss or gradient was not finite in {skipped} updates in a row "
            "(optimizer.max_skipped_updates); parameters are as they were before them. Lower "
            "optimizer.learning_rate, or look at samples/ for what was trained on"
        )


def summarize(command: Command, run_dir: RunDir, interrupt: Interrupt, finished: bool) -> Summary:
    """How the run ended, where its outputs are, and the command that goes on with it."""
    from jaxrl.report import Summary

    arguments = [*command.arguments, "--resume"]
    outputs = {
        "metrics": run_dir.metrics_file,
        "samples": run_dir.samples,
        "TensorBoard": run_dir.tensorboard,
        "checkpoints": run_dir.checkpoints,
    }
    if finished:
        outputs["policy, as a Hugging Face directory"] = run_dir.export
        if command.config.lora.rank:
            outputs["adapters, as a PEFT directory"] = run_dir.adapter
        arguments.append(f"--run.steps={2 * command.config.run.steps}")
    ended = "finished" if finished else f"ended by {signal.Signals(interrupt.signal).name}"
    python = Path(sys.executable)
    if python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    return Summary(
        ended, outputs, shlex.join([str(python), "-m", command.config.program, *arguments])
    )
