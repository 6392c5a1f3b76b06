"""Files and directories that are either wholly there or not at all, also after a power cut.

A *sealed* directory carries a manifest of everything in it:

    MANIFEST.json     facts of the writer, and the size and SHA-256 of each other file
    MANIFEST.sha256   of MANIFEST.json, in the format of `sha256sum -c`

It is whole while no byte differs, no file is missing and none was added.
"""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jaxrl.types import RunError

MANIFEST, MANIFEST_DIGEST = "MANIFEST.json", "MANIFEST.sha256"
TEMPORARY = "tmp."  # what a name starts with until its bytes are complete, and once they are not


def write_file(path: Path, text: str) -> None:
    """Replaces `path`; a reader, or a restart, sees the old text or the new one, never a part.

    Half a surrogate pair, which UTF-8 cannot hold, is written as its JSON escape.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    with temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
    sync_directory(path.parent)


def seal(path: Path, facts: Mapping[str, Any]) -> None:
    """Writes the manifest of the directory `path` and flushes all of it to the disk."""
    files = dict(_files(path))
    digests = _digests(files)
    sizes = {name: file.stat().st_size for name, file in files.items()}
    listed = {name: {"bytes": sizes[name], "sha256": digests[name]} for name in files}
    text = json.dumps({**facts, "files": listed}, indent=1).encode()
    (path / MANIFEST).write_bytes(text)
    (path / MANIFEST_DIGEST).write_bytes(_digest_line(text))
    _sync_tree(path)


def facts(path: Path) -> dict[str, Any]:
    """The manifest of a directory that `damage` has found whole."""
    return json.loads((path / MANIFEST).read_bytes())


def damage(path: Path) -> str | None:
    """What is wrong with a sealed directory, file and reason; None if it is whole."""
    try:
        return _damage(path)
    except OSError as error:  # a bad sector is damage like any other
        where = os.path.relpath(error.filename, path) if error.filename else "a file"
        return f"{where}: {error.strerror or error}"


def _damage(path: Path) -> str | None:
    text = (path / MANIFEST).read_bytes()
    if (path / MANIFEST_DIGEST).read_bytes() != _digest_line(text):
        return f"{MANIFEST}: does not match {MANIFEST_DIGEST}"
    listed = json.loads(text)["files"]
    found = dict(_files(path))
    for name in listed:
        if name not in found:
            return f"{name}: is missing"
    for name in found.keys() - {MANIFEST, MANIFEST_DIGEST}:
        if name not in listed:
            return f"{name}: is not in the manifest"
        if found[name].is_symlink() or not found[name].is_file():
            return f"{name}: is not a regular file"
        size, promised = found[name].stat().st_size, listed[name]["bytes"]
        if size != promised:
            return f"{name}: has {size} bytes, was written with {promised}"
    for name, digest in _digests({name: found[name] for name in listed}).items():
        promised = listed[name]["sha256"]
        if digest != promised:
            return f"{name}: has SHA-256 {digest[:16]}…, was written with {promised[:16]}…"
    return None


def remove(path: Path) -> None:
    """Removes a file or directory; killed half-way, it leaves a temporary name behind."""
    if not os.path.lexists(path):
        return
    if not path.name.startswith(TEMPORARY):
        doomed = _unused(path)
        os.rename(path, doomed)
        path = doomed
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yields an empty directory to fill, which then takes the place of `target` if there is one.

    Raises:
      RunError: it could not be written. After this and any other error, what was there before is
        there, and nothing else.
    """
    new = target.with_name(f"{TEMPORARY}{target.name}")
    missing = [folder for folder in target.parents if not folder.exists()]
    try:
        remove(new)
        make_directory(new)
        yield new
        sync_directory(new)
        _replace(target, new)
    except OSError as error:
        raise RunError(
            f"{target}: could not be written: {error.strerror or error}; make room or name another "
            "directory, nothing was replaced"
        ) from error
    finally:
        remove(new)
        for folder in missing:
            with contextlib.suppress(OSError):  # it is not empty: all went well
                folder.rmdir()


def _replace(target: Path, new: Path) -> None:
    old = _unused(target)
    if os.path.lexists(target):
        target.rename(old)
    try:
        new.rename(target)
    except OSError:
        if os.path.lexists(old):
            old.rename(target)
        raise
    sync_directory(target.parent)
    with contextlib.suppress(OSError):  # the new one is there, whatever becomes of the old one
        remove(old)


def _unused(target: Path) -> Path:
    """A temporary name for what is to be removed. What could not be removed earlier keeps its."""
    old = target.with_name(f"{TEMPORARY}removed.{target.name}")
    for number in itertools.count(2):
        with contextlib.suppress(OSError):
            remove(old)
            break
        old = old.with_name(f"{TEMPORARY}removed.{number}.{target.name}")
    return old


def make_directory(path: Path) -> None:
    if not path.is_dir():
        path.mkdir(parents=True, exist_ok=True)
        sync_directory(path.parent)


def try_directory(path: Path) -> None:
    """Makes `path` if it is not there. Raises OSError unless a file can be made in it."""
    path.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=path).close()


def sync_directory(path: Path) -> None:
    """Makes the names in `path` survive a power cut; their contents need a sync of their own."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(path: Path) -> None:
    for folder, _, names in os.walk(path, topdown=False, onerror=_raise):
        for name in names:
            descriptor = os.open(os.path.join(folder, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
                if sys.platform == "linux":
                    # Out of the page cache: whoever reads back now reads the disk.
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
        sync_directory(Path(folder))


def _files(path: Path) -> Iterator[tuple[str, Path]]:
    """Everything below `path` that is not a directory, by its relative name."""
    for folder, folders, names in os.walk(path, onerror=_raise):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in [*names, *links]:
            file = Path(folder, name)
            yield file.relative_to(path).as_posix(), file


def _raise(error: OSError) -> None:
    raise error


def _digests(files: Mapping[str, Path]) -> dict[str, str]:
    with ThreadPoolExecutor() as pool:  # hashlib releases the interpreter lock
        return dict(zip(files, pool.map(_digest, files.values()), strict=True))


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _digest_line(text: bytes) -> bytes:
    return f"{hashlib.sha256(text).hexdigest()}  {MANIFEST}\n".encode()
