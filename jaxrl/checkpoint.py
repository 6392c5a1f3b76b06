"""Atomic, verified, resumable state of a run.

    checkpoints/step_00000020/
        arrays/           every jax array of the run, written by Orbax
        host.json         everything else: data cursor, weight version, ...
        MANIFEST.json     sizes and digests of all files, the tree of arrays, library versions
        MANIFEST.sha256   of the manifest itself

Orbax restores a flipped bit without a word, and takes an empty directory for its latest step. So a
directory is believed only while it is whole (`durable.damage`), and it gets its name after all of
its bytes are on the disk: a killed run leaves a whole checkpoint, or a `tmp.*` directory.

Of several jax processes each writes and reads its own shards of the arrays, on a filesystem that
all of them see (`save_shards`, `restore`); the first does everything else.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxrl import durable
from jaxrl.types import UserError

SCHEMA = 1
ARRAYS, HOST = "arrays", "host.json"
_STEP = re.compile(r"step_(\d{8,})")


class CheckpointError(UserError):
    """A checkpoint that could not be written, or none that can be used. Names file and way out."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """`rejected`: newer checkpoints that were passed over, a line each: name, file, reason."""

    step: int
    arrays: Any
    host: dict[str, Any]
    rejected: list[str]


@dataclasses.dataclass(frozen=True)
class Stored:
    """A whole checkpoint, none of whose arrays has been read; `arrays` says what there is."""

    path: Path
    step: int
    libraries: dict[str, str]
    arrays: dict[str, tuple[str, tuple[int, ...]]]  # name -> dtype, shape
    host: dict[str, Any]


def save(
    root: Path,
    step: int,
    arrays: Any,
    host: Mapping[str, Any],
    keep: int,
    whole: set[str] | None = None,
) -> Path:
    """Writes the state after `step` and returns its directory, once every byte is on the disk.

    Of several processes this is the first one's part; the others call `save_shards` meanwhile.

    Args:
      root: the directory of this run's checkpoints, created if need be.
      arrays: a pytree of jax arrays, none of size zero.
      host: JSON-able values; numbers must be finite.
      keep: whole checkpoints that stay, this one included. Older ones, and damaged ones, go only
        after this one has been read back and found whole.
      whole: names of checkpoints that are not read again, because they were found whole before;
        those that are found now, this one too, are added.

    Raises:
      CheckpointError: the state was not written, and older checkpoints are as they were; or it
        was, and an old one could not be removed. The message says which.
    """
    assert step >= 0 and keep >= 1, (step, keep)
    host_json = json.dumps(dict(host), allow_nan=False, indent=1)
    leaves = _named_leaves(arrays)
    for name, leaf in leaves.items():
        assert leaf.size, f"{name}: is empty"
    final = root / _name(step)
    temporary = _temporary(root, step)
    try:
        durable.make_directory(root)
        damaged = _damaged_from(root, step)
        durable.remove(temporary)
        temporary.mkdir()
        _write(temporary, step, leaves, host_json)
        for path in damaged:
            durable.remove(path)
        os.rename(temporary, final)
        durable.sync_directory(root)
    except CheckpointError:
        raise
    except Exception as error:  # Orbax answers a full disk with ValueError, others with OSError
        with contextlib.suppress(OSError):
            durable.remove(temporary)
        raise CheckpointError(_explain_failed_save(root, step, leaves, error)) from error
    whole = set() if whole is None else whole
    whole.add(final.name)
    for path in _ended(root, keep, whole):
        try:
            durable.remove(path)
        except OSError as error:
            raise CheckpointError(
                f"{final} was saved, but {path}, which checkpoint.keep = {keep} ends, cannot be "
                f"removed: {error}"
            ) from error
    return final


def save_shards(root: Path, step: int, arrays: Any) -> None:
    """What every process but the first does of `save`: it writes its shards of the arrays.

    Raises:
      CheckpointError: they were not written.
    """
    try:
        _write_arrays(_temporary(root, step), _named_leaves(arrays))
    except Exception as error:
        raise CheckpointError(f"{root}: step {step} was not saved: {error}") from error


def restore_newest(root: Path, abstract: Any) -> Restored | None:
    """Reads the newest whole checkpoint under `root`, and clears what killed saves have left.

    Args:
      abstract: as for `restore`.

    Returns:
      None if there is no checkpoint at all.

    Raises:
      CheckpointError: as `find_newest` and `restore`.
    """
    path, rejected = find_newest(root)
    return None if path is None else restore(path, abstract, rejected)


def find_newest(root: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint under `root`, and a line for each that was passed over.

    Clears what killed saves have left. None: there is no checkpoint at all.

    Raises:
      CheckpointError: there are checkpoints and none is whole.
    """
    if not root.is_dir():
        return None, []
    for path in root.glob(f"{durable.TEMPORARY}*"):
        durable.remove(path)
    rejected = []
    for path in _steps(root):
        problem = _damage(path)
        if not problem:
            return path, rejected
        rejected.append(f"{path.name}: {problem}")
    if rejected:
        raise CheckpointError(
            f"{root}: no checkpoint is whole:\n"
            + "".join(f"  {line}\n" for line in rejected)
            + f"Bring back an intact copy, or remove {root}: --resume then starts from the first "
            "step"
        )
    return None, []


def restore(path: Path, abstract: Any, rejected: Sequence[str] = ()) -> Restored:
    """Reads the checkpoint `path`, which `find_newest` has found whole.

    Of several processes all call it, and each reads its own shards.

    Args:
      abstract: a pytree of jax.ShapeDtypeStruct with shardings: the arrays come back like that,
        on whatever mesh it names.

    Raises:
      CheckpointError: it holds other arrays than `abstract` asks for.
    """
    facts = durable.facts(path)
    if facts["schema"] != SCHEMA:
        raise CheckpointError(
            f"{path}: has schema {facts['schema']}, this program reads schema {SCHEMA}; "
            "continue the run with the program that wrote it"
        )
    leaves = _named_leaves(abstract)
    differences = _differences(facts["arrays"], _describe(leaves))
    if differences:
        raise CheckpointError(
            f"{path}: holds other arrays than this run needs:\n"
            + "".join(f"  {line}\n" for line in differences)
            + "Continue with the model and optimizer that it was written with"
        )
    try:
        with _quiet_orbax(), ocp.PyTreeCheckpointer() as checkpointer:
            restored = checkpointer.restore(
                path.absolute() / ARRAYS,
                item=leaves,
                restore_args=ocp.checkpoint_utils.construct_restore_args(leaves),
            )
    except Exception as error:
        raise CheckpointError(
            f"{path}: its bytes are intact, but Orbax cannot read them: {error}\n"
            f"Written with {facts['libraries']}; installed are {_library_versions()}"
        ) from error
    host = json.loads((path / HOST).read_bytes())
    tree = jax.tree.unflatten(jax.tree.structure(abstract), [restored[name] for name in leaves])
    return Restored(facts["step"], tree, host, list(rejected))


def save_alone(path: Path, arrays: Any, host: Mapping[str, Any], files: Mapping[str, Path]) -> None:
    """Writes a checkpoint that belongs to no run, as step 0; one that exists is replaced.

    Args:
      arrays, host: as for `save`.
      files: copied into it and sealed with it: relative name -> file.

    Raises:
      CheckpointError: nothing was written.
    """
    leaves = _named_leaves(arrays)
    host_json = json.dumps(dict(host), allow_nan=False, indent=1)
    try:
        with durable.replacing(path) as folder:
            for name, file in files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, folder / name)
            _write(folder, 0, leaves, host_json)
    except Exception as error:  # Orbax answers a full disk with ValueError, others with OSError
        raise CheckpointError(f"{path}: was not written: {error}") from error


def open_whole(path: Path) -> Stored:
    """The checkpoint in the directory `path`, every byte of it checked, no array read.

    Raises:
      CheckpointError: it is not whole, or not a checkpoint of this schema.
    """
    problem = _damage(path) if _STEP.fullmatch(path.name) else durable.damage(path)
    if problem:
        raise CheckpointError(f"{path}: is damaged: {problem}")
    try:
        facts = durable.facts(path)
        if facts["schema"] != SCHEMA:
            raise CheckpointError(
                f"{path}: has schema {facts['schema']}, this program reads schema {SCHEMA}"
            )
        arrays = {n: (x["dtype"], tuple(x["shape"])) for n, x in facts["arrays"].items()}
        host = json.loads((path / HOST).read_bytes())
        return Stored(path, facts["step"], facts["libraries"], arrays, host)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: is not a checkpoint: {error!r}") from None


def open_newest(root: Path) -> tuple[Stored, list[str]]:
    """The newest whole checkpoint under `root`, and a line for each damaged one passed over.

    Unlike `restore_newest` it removes nothing: the run that writes there may be alive.

    Raises:
      CheckpointError: there is none, or none is whole.
    """
    rejected = []
    for path in _steps(root):
        try:
            return open_whole(path), rejected
        except CheckpointError as error:
            rejected.append(str(error))
    raise CheckpointError("\n".join(rejected) or f"{root}: holds no checkpoint")


def read_arrays(stored: Stored, names: Iterable[str]) -> dict[str, np.ndarray]:
    """These arrays of a checkpoint, on the host; the others are not read."""
    wanted = list(names)
    unknown = [name for name in wanted if name not in stored.arrays]
    if unknown:  # for these Orbax gives back what it was given
        raise CheckpointError(f"{stored.path}: holds no {', '.join(unknown)}")
    as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in wanted}
    try:
        with _quiet_orbax(), ocp.PyTreeCheckpointer() as checkpointer:
            return checkpointer.restore(
                stored.path.absolute() / ARRAYS,
                args=ocp.args.PyTreeRestore(
                    item=dict.fromkeys(wanted, 0), restore_args=as_numpy, partial_restore=True
                ),
            )
    except Exception as error:
        raise CheckpointError(
            f"{stored.path}: Orbax cannot read {', '.join(wanted)}: {error}\n"
            f"Written with {stored.libraries}; installed are {_library_versions()}"
        ) from error


def _ended(root: Path, keep: int, whole: set[str]) -> list[Path]:
    """All but the newest `keep` whole checkpoints; none is read while there are no more than that.

    A damaged one must not take the place of a whole one, which would be removed for it.
    """
    found, stay = _steps(root), 0
    if len(found) <= keep:
        return []
    ended = []
    for path in found:
        if stay < keep and (path.name in whole or not _damage(path)):
            whole.add(path.name)
            stay += 1
        else:
            ended.append(path)
    return ended


def _damaged_from(root: Path, step: int) -> list[Path]:
    """Damaged checkpoints of `step` and later, which the new one replaces.

    A run goes on from its newest whole checkpoint, so a whole one at or above `step` was written
    by somebody else, and is never removed.
    """
    later = [path for path in _steps(root) if _number(path) >= step]
    for path in later:
        if not _damage(path):
            raise CheckpointError(
                f"{path} is a whole checkpoint already, so step {step} cannot be saved beside it; "
                f"continue from it with --resume, or remove it to train that part again"
            )
    return later


def _write(path: Path, step: int, leaves: dict[str, Any], host_json: str) -> None:
    """Fills the empty directory `path`."""
    _write_arrays(path, leaves)
    (path / HOST).write_text(host_json, encoding="utf-8")
    durable.seal(
        path,
        {
            "schema": SCHEMA,
            "step": step,
            "libraries": _library_versions(),
            "arrays": _describe(leaves),
        },
    )
    problem = durable.damage(path)
    if problem:
        raise OSError(f"what was written reads back differently: {problem}")


def _write_arrays(path: Path, leaves: dict[str, Any]) -> None:
    # The asynchronous checkpointers of Orbax go on creating files after a save has failed.
    with _quiet_orbax(), ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(path.absolute() / ARRAYS, leaves)


def _damage(path: Path) -> str | None:
    problem = durable.damage(path)
    if not problem and durable.facts(path)["step"] != _number(path):
        problem = f"{durable.MANIFEST}: is that of step {durable.facts(path)['step']}"
    return problem


def _differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Dtypes count too: Orbax converts without a word, and the run would not go on as it was."""
    lines = [f"{name}: is not in the checkpoint" for name in wanted if name not in saved]
    lines += [f"{name}: is in the checkpoint only" for name in saved if name not in wanted]
    lines += [
        f"{name}: is {_show(saved[name])} in the checkpoint, {_show(wanted[name])} here"
        for name in wanted
        if name in saved and saved[name] != wanted[name]
    ]
    return lines


def _show(leaf: Mapping[str, Any]) -> str:
    return f"{leaf['dtype']}{leaf['shape']}"


def _describe(leaves: Mapping[str, Any]) -> dict[str, Any]:
    return {n: {"dtype": str(x.dtype), "shape": list(x.shape)} for n, x in leaves.items()}


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by path. A flat dict, so that Orbax need not know the containers of optax and flax."""
    pairs = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
    named = dict(pairs)
    assert len(named) == len(pairs), "two leaves of the tree have the same path"
    return named


def _explain_failed_save(root: Path, step: int, leaves: Mapping[str, Any], error: Exception) -> str:
    needed = sum(leaf.nbytes for leaf in leaves.values())
    try:
        free = f"{shutil.disk_usage(root).free / 2**20:.1f} MiB are free there"
        newest = next((path.name for path in _steps(root)), "none")
    except OSError as unreadable:
        free, newest = f"its free space cannot be read ({unreadable})", "unknown"
    return (
        f"{root}: step {step} was not saved: {error}\n"
        f"Its arrays take {needed / 2**20:.1f} MiB; {free}. Newest checkpoint: {newest}. "
        "Once the cause is gone, continue with --resume"
    )


def _library_versions() -> dict[str, str]:
    return {n: importlib.metadata.version(n) for n in ("jax", "flax", "orbax-checkpoint")}


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Orbax logs each phase at INFO, and failures, which it also raises, with tracebacks."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _temporary(root: Path, step: int) -> Path:
    return root / f"{durable.TEMPORARY}{_name(step)}"


def _number(path: Path) -> int:
    match = _STEP.fullmatch(path.name)
    assert match, path
    return int(match[1])


def _steps(root: Path) -> list[Path]:
    """What is named like a checkpoint, whole or not, newest first."""
    return sorted((p for p in root.iterdir() if _STEP.fullmatch(p.name)), key=_number, reverse=True)
