"""What a run says while it runs: metrics.jsonl, TensorBoard events, samples, lines on the console.

metrics.jsonl has exactly one line for each step, also when the run was killed and resumed.
"""

import contextlib
import json
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from jaxrl import durable
from jaxrl.report import (
    COLUMNS,
    Columns,
    History,
    Summary,
    format_closing,
    format_header,
    format_step,
    seconds_left,
)
from jaxrl.types import Group, UserError

_HEADER_EVERY = 20  # lines
_RECENT_STEPS = 20  # steps that the time left is estimated from


class LogError(UserError):
    """An output of the run that cannot be written."""


class RunLog:
    """Everything a run reports, one call of `step` for each step, with growing step numbers."""

    def __init__(
        self,
        run_dir: Path,
        *,
        steps_total: int,
        resume_step: int,
        tensorboard: bool,
        columns: Columns = COLUMNS,
        console: IO[str] | None = None,
        tell: Callable[[Mapping[str, float]], object] | None = None,
    ) -> None:
        """Args:
        resume_step: the last step that counts, -1 in a new run. What a killed process has
          reported about later steps is removed, since those are trained again.
        columns: of the console.
        console: default: the standard output.
        tell: who else is to have the numbers of a step.
        """
        self._columns = columns
        self._run_dir, self._steps_total = run_dir, steps_total
        self._console, self._tell = console or sys.stdout, tell
        self._step_seconds: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._last_time: float | None = None
        self._lines = 0
        self.history = History()
        with _writing(run_dir / "metrics.jsonl"):
            for line in drop_later_steps(run_dir / "metrics.jsonl", resume_step):
                self.history.add(line["step"], line)
            self._file = (run_dir / "metrics.jsonl").open("a", encoding="utf-8")
            _drop_later_samples(run_dir / "samples", resume_step)
        self._events = _event_writer(run_dir / "tensorboard", resume_step) if tensorboard else None

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Reports one step: to the file, to TensorBoard, and in one line on the console.

        Args:
          metrics: numbers, also as scalar arrays; those that are not finite become null.
        """
        if self.history.step is not None and step <= self.history.step:
            raise ValueError(f"step {step} after step {self.history.step}: one line for each step")
        numbers = {name: _plain(value) for name, value in metrics.items()}
        with _writing(self._run_dir / "metrics.jsonl"):
            self._file.write(format_json_line(step, time.time(), numbers))
            self._file.flush()
        self._write_events(step, numbers)
        if self._tell is not None:
            self._tell(numbers)
        self.history.add(step, numbers)
        now = time.monotonic()
        if self._last_time is not None:
            self._step_seconds.append(now - self._last_time)
        self._last_time = now
        if self._lines % _HEADER_EVERY == 0:
            self._print(format_header(self._steps_total, self._columns))
        self._lines += 1
        left = seconds_left(self._step_seconds, self._steps_total - step)
        shown = {**numbers, **self._last_evaluation()}
        self._print(format_step(step, self._steps_total, shown, left, self._columns))

    def samples(
        self,
        step: int,
        groups: Sequence[Group],
        rewards_PG: np.ndarray,
        texts: Sequence[Sequence[str]],
    ) -> None:
        """Writes samples/step_00000012.jsonl: a line for each prompt, with all its completions.

        Args:
          rewards_PG: NaN where the reward is unknown; null in the file.
          texts: the decoded completions, as `groups` holds them.
        """
        lines = [
            json.dumps(sample_record(step, group, rewards, row), ensure_ascii=False)
            for group, rewards, row in zip(groups, rewards_PG, texts, strict=True)
        ]
        path = self._run_dir / "samples" / f"step_{step:08d}.jsonl"
        with _writing(path):
            path.parent.mkdir(exist_ok=True)
            durable.write_file(path, "".join(f"{line}\n" for line in lines))

    def closing(self, summary: Summary) -> None:
        """Prints what was reached, where the outputs are, and the command that goes on."""
        self._print(format_closing(summary, self.history, self._steps_total))

    def close(self) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()
            self._events = None

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _last_evaluation(self) -> dict[str, float]:
        return {k: v for k, v in self.history.latest.items() if k.startswith("eval/")}

    def _write_events(self, step: int, numbers: Mapping[str, float]) -> None:
        if self._events is not None:
            for name, value in numbers.items():
                if math.isfinite(value):
                    self._events.add_scalar(name, value, step)

    def _print(self, text: str) -> None:
        print(text, file=self._console, flush=True)


def format_json_line(step: int, time_s: float, metrics: Mapping[str, float]) -> str:
    """One line of metrics.jsonl; `time` is in seconds since 1970."""
    numbers = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    return json.dumps({"step": step, "time": round(time_s, 3), **numbers}, allow_nan=False) + "\n"


def sample_record(
    step: int, group: Group, rewards_G: np.ndarray, texts: Sequence[str]
) -> dict[str, Any]:
    """One prompt and its completions, as a reader of samples/ finds them."""
    return {
        "step": step,
        "prompt_id": group.prompt.id,
        "prompt": group.prompt.text,
        "completions": [
            {
                "text": text,
                "reward": float(reward) if math.isfinite(reward) else None,
                "tokens": len(rollout.tokens),
                "versions": count_versions(rollout.versions),
                "finish_reason": rollout.finish_reason,
            }
            for rollout, reward, text in zip(
                group.rollouts, rewards_G[: len(texts)], texts, strict=True
            )
        ],
    }


def count_versions(versions: np.ndarray) -> list[list[int]]:
    """[[version, tokens in a row], ...], in the order they were sampled."""
    runs: list[list[int]] = []
    for version in versions.tolist():
        if runs and runs[-1][0] == version:
            runs[-1][1] += 1
        else:
            runs.append([version, 1])
    return runs


def drop_later_steps(path: Path, resume_step: int) -> list[dict[str, Any]]:
    """Rewrites metrics.jsonl without steps after `resume_step`; returns the lines that stay.

    Lines that are not a step are dropped too: a process killed while it wrote leaves a torn one.
    """
    if not path.exists():
        return []
    kept, records = [], []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with contextlib.suppress(ValueError, TypeError, KeyError):
            record = json.loads(line)
            if record["step"] <= resume_step:
                kept.append(line)
                records.append(record)
    durable.write_file(path, "".join(f"{line}\n" for line in kept))
    return records


def _drop_later_samples(folder: Path, resume_step: int) -> None:
    for path in folder.glob("step_*.jsonl"):
        number = path.stem.removeprefix("step_")
        if number.isdigit() and int(number) > resume_step:
            path.unlink()


def _plain(value: Any) -> float:
    return value if isinstance(value, int) else float(value)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LogError(
            f"{path}: cannot be written: {error}; put that right, then continue with --resume"
        ) from error


def _event_writer(folder: Path, resume_step: int) -> Any:
    """A tensorboardX SummaryWriter; TensorBoard hides what a killed process wrote after
    `resume_step`.

    tensorboardX imports torch where it finds it; the trainer must not load it, so it looks absent
    meanwhile.
    """
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hidden:
            del sys.modules["torch"]
    return SummaryWriter(
        str(folder),
        purge_step=resume_step + 1,
        flush_secs=5,
        filename_suffix=f".{time.time_ns()}",  # the rest of the name repeats within a second
    )
