"""The directory of one run: who may use it, where its outputs lie, and which version is next.

runs/NAME/  config.yaml  metrics.jsonl  checkpoints/  samples/  tensorboard/  export/
            ledger.jsonl  weight_version  .lock
"""

import contextlib
import fcntl
import fnmatch
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from jaxrl import durable
from jaxrl.types import UserError

# Keys that a resumed run may change: they steer where and how fast it runs, how long, and what it
# leaves behind. All others decide what is learned, and changing one makes another run.
MAY_CHANGE = (
    "run.name",
    "run.dir",
    "run.steps",
    "model.remat",
    "update.*",
    "mesh.*",
    "hosts.*",
    "vllm.*",
    "publish.*",
    "eval.*",
    "checkpoint.*",
    "log.*",
    "alarm.*",
    "rollout.timeout_s",
    "sft.export_dtype",
    "optimizer.max_skipped_updates",
    "optimizer.offload",
)
_OWN_FILES = {".lock", "tmp.config.yaml"}  # what a start that was killed at once can leave


class RunDirError(UserError):
    """A run directory that cannot be used as asked. Names the directory and the way out."""


class RunDir:
    """The paths of a run, held under its lock until `close` (or the end of `with`)."""

    def __init__(self, path: Path, lock: int, changes: list[str]) -> None:
        self.path = path
        self.changes = changes  # "key: old -> new" for each key this resume changes
        self._lock = lock

    @property
    def holder(self) -> str:
        """Who has the lock."""
        return _holder(self.path)

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def ledger_file(self) -> Path:
        return self.path / "ledger.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def export(self) -> Path:
        return self.path / "export"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def weights(self) -> Path:
        return self.path / "weights"

    @property
    def weight_version_file(self) -> Path:
        return self.path / "weight_version"

    def close(self) -> None:
        """Gives the lock back. The file stays: removing it would let two processes hold it."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> "RunDir":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_run(run_dir: Path, config_yaml: str, resume: bool) -> RunDir:
    """Creates the directory of a new run, or opens that of an old one, for this process alone.

    Args:
      config_yaml: the resolved configuration, every key of it; kept as config.yaml.
      resume: whether the directory must hold a run (True) or must not (False).

    Raises:
      RunDirError: the directory is in use, holds a run although it must not or none although it
        must, or the configuration would make the resumed run another one.
    """
    saved = run_dir / "config.yaml"
    if resume and not saved.is_file():
        raise RunDirError(
            f"{run_dir}: there is no run to resume (no config.yaml); start it without --resume, or "
            "name another one with --run.name and --run.dir"
        )
    with contextlib.ExitStack() as undo:
        lock = _lock(run_dir)
        undo.callback(os.close, lock)
        changes = accept_changes(saved, config_yaml) if resume else _refuse_used(run_dir)
        try:
            durable.write_file(saved, config_yaml)
            for name in ("checkpoints", "samples", "tensorboard"):
                durable.make_directory(run_dir / name)
        except OSError as error:
            raise RunDirError(f"{run_dir}: cannot be written: {error}") from error
        undo.pop_all()
    return RunDir(run_dir, lock, changes)


class VersionCounter:
    """Weight versions that are never handed out twice, also across kills and resumes.

    The mark is on the disk before the version is used, so a kill can only skip a number. The first
    version is 1; 0 names the weights that engines load by themselves.
    """

    def __init__(self, path: Path, floor: int = 0) -> None:
        """`floor`: a version known to be used from elsewhere, such as a checkpoint."""
        self._path = path
        self.last = max(floor, _read_mark(path))

    def next(self) -> int:
        durable.write_file(self._path, f"{self.last + 1}\n")
        self.last += 1
        return self.last


def _read_mark(path: Path) -> int:
    try:
        text = path.read_text(encoding="ascii")
    except FileNotFoundError:
        return 0
    except (OSError, ValueError) as error:
        raise RunDirError(f"{path}: cannot be read: {error}") from None
    if not (text.strip().isascii() and text.strip().isdigit()):
        raise RunDirError(
            f"{path}: expected the last weight version, found {text[:40]!r}; write a number there "
            "that is above every version the run has used"
        )
    return int(text)


def check_shared(run_dir: Path, holder: str) -> None:
    """Raises RunDirError unless `run_dir` is, seen from this process, the one that `holder` has."""
    if _holder(run_dir) != holder:
        raise RunDirError(
            f"{run_dir}: is not the run directory of the first process ({holder}), seen from "
            f"{socket.gethostname()}; let run.dir be on a filesystem that all hosts share"
        )


def _holder(run_dir: Path) -> str:
    with contextlib.suppress(OSError):
        return (run_dir / ".lock").read_text(errors="replace").strip()
    return ""


def _lock(run_dir: Path) -> int:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        # Not inherited by programs started from here: they must not keep a dead run's lock.
        lock = os.open(run_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RunDirError(f"{run_dir}: cannot be used as a run directory: {error}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(lock, 200, 0).decode(errors="replace").strip()
        os.close(lock)
        if not isinstance(error, BlockingIOError):
            raise RunDirError(f"{run_dir}/.lock: cannot be locked: {error}") from error
        raise RunDirError(
            f"{run_dir}: is in use by {holder or 'another process'}; wait for it or stop it, or "
            "choose another --run.name"
        ) from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return lock


def _refuse_used(run_dir: Path) -> list[str]:
    """A start that failed before its first step has left nothing to lose, and is started anew."""
    found = sorted(set(os.listdir(run_dir)) - _OWN_FILES)
    began = (run_dir / "metrics.jsonl").exists() or any((run_dir / "checkpoints").glob("*"))
    if "config.yaml" in found and not began:
        return []
    if "config.yaml" in found:
        raise RunDirError(
            f"{run_dir}: holds a run already; continue it with --resume, choose another "
            f"--run.name, or remove {run_dir}"
        )
    if found:
        raise RunDirError(
            f"{run_dir}: holds files that are not of a run ({', '.join(found[:3])}"
            f"{', …' if len(found) > 3 else ''}); choose another --run.name, or remove {run_dir}"
        )
    return []


def accept_changes(saved: Path, config_yaml: str) -> list[str]:
    """The differences to the saved configuration, "key: old -> new"; raises RunDirError for those
    that make it another run."""
    try:
        old = dict(_flatten(yaml.safe_load(saved.read_text(encoding="utf-8"))))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RunDirError(
            f"{saved}: cannot be read: {error}\nIt is the configuration the run was started with; "
            "put it back to resume the run"
        ) from None
    new = dict(_flatten(yaml.safe_load(config_yaml)))
    accepted, refused = [], []
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key, _NOT_SET), new.get(key, _NOT_SET)
        if before != after or type(before) is not type(after):
            allowed = any(fnmatch.fnmatchcase(key, pattern) for pattern in MAY_CHANGE)
            line = f"{key}: {_show(before)} -> {_show(after)}"
            (accepted if allowed else refused).append(line)
    if refused:
        raise RunDirError(
            f"{saved.parent}: cannot be resumed with a configuration that makes it another run:\n"
            + "".join(f"  {line}\n" for line in refused)
            + "Set these back, or start a run of its own with another --run.name. Only these keys "
            f"may change: {', '.join(MAY_CHANGE)}"
        )
    return accepted


_NOT_SET = object()


def _show(value: Any) -> str:
    return "(not set)" if value is _NOT_SET else repr(value)


def _flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values; an empty section or mapping is a value."""
    if isinstance(tree, Mapping) and (tree or not prefix):
        for key, value in tree.items():
            yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    elif prefix:
        yield prefix, tree
    else:
        raise ValueError(f"expected sections with keys, found {tree!r}")
