"""A version in memory, brought up to date in place: one copy for all the processes of a node.

The copy is a file in shared memory, and every process that follows the same stream of versions maps
it. Its header says which version it holds; a copy that is being written holds none. There are two
locks, both the kernel's (`flock`), so that a process that is killed holds neither:

- On the file: whoever reads the tensors shares it; whoever writes them has it alone, and takes the
  version out of the header before the first byte and puts the new one in after the proof. So what a
  killed writer leaves is seen to be torn, and the next writer makes it anew. Nobody waits for this
  lock while holding it, and every wait ends: who cannot have the copy in time makes one for itself.
  The version only grows, so that no two processes undo each other's work.
- On the file beside it, `.users`: shared by every process for as long as it uses the copy. Whoever
  finds that nobody else does removes both: the last to leave, or, where all were killed, the next
  process that opens any copy here.

A mapping keeps its file's lock: arrays that outlive the copy they came from stay as they are.
NumPy and the standard library only.
"""

import contextlib
import fcntl
import hashlib
import mmap
import os
import shutil
import stat
import tempfile
import time
import weakref
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from bridge.wire import Base, Manifest

ROOTS = (Path("/dev/shm"), Path(tempfile.gettempdir()))  # the first with room is taken
USERS = ".users"
_HEADER = 4096  # bytes; the version as "number digest", NUL-padded; the first byte is written last
_ALIGN = 64  # bytes: tensors start on a cache line
_POLL_S = 0.005
_REMOVAL_S = 1.0  # more than a process needs to remove two files

Lock = Literal["read", "write"]
Layout = tuple[tuple[str, str, tuple[int, ...], int], ...]  # (name, dtype, shape, bytes), by name


class Copy:
    """The tensors of one version, in memory of this process alone."""

    def __init__(self, manifest: Manifest) -> None:
        """With room for the tensors of `manifest`, and holding no version.

        Raises:
          OSError: there is none.
        """
        self.layout = layout_of(manifest)
        self._memory = mmap.mmap(-1, _size(self.layout))

    @property
    def held(self) -> Base | None:
        """The version that lies here; None: none that is whole. Final only under a lock."""
        text = self._memory[:_HEADER].partition(b"\0")[0].decode("ascii", "replace")
        number, _, digest = text.partition(" ")
        return Base(int(number), digest) if number.isdecimal() else None

    def lock(self, wanted: Base, until: float) -> Lock | None:
        """Read: `wanted` lies here, and stays while the lock is held. Write: it does not, and
        nobody reads. None: neither was to be had before `until` (time.monotonic)."""
        return "read" if self.held == wanted else "write"

    def unlock(self) -> None:
        """The tensors are not read or written any more."""

    def tensors(self) -> dict[str, np.ndarray]:
        """The bytes of each tensor, uint8: views, to be read under the lock."""
        return dict(_views(self.layout, self._memory))

    @contextlib.contextmanager
    def writing(self, version: Base) -> Iterator[dict[str, np.ndarray]]:
        """The bytes of each tensor, to be made those of `version`, under the lock for writing. What
        is left by an exception is no version."""
        self._writable[0] = 0
        yield dict(_views(self.layout, self._writable))
        header = f"{version.version} {version.digest}".encode().ljust(_HEADER, b"\0")
        self._writable[1:_HEADER] = header[1:]
        self._writable[0] = header[0]

    def fill(self, other: "Copy") -> None:
        """Makes this what `other`, of the same layout, is; the caller has a lock on both."""
        held = other.held
        if held is not None:
            with self.writing(held) as ours:
                for name, theirs in other.tensors().items():
                    np.copyto(ours[name], theirs)

    @cached_property
    def _writable(self) -> mmap.mmap:
        return self._memory


class NodeCopy(Copy):
    """The copy of all processes of this node that follow one stream of versions."""

    def __init__(self, stream: str, manifest: Manifest) -> None:
        """
        Args:
          stream: what identifies the stream; versions of another layout have another copy.

        Raises:
          OSError: no place has room for it, or lets this process in: with the reason of each.
        """
        self.layout = layout_of(manifest)
        self.stream = stream
        digest = hashlib.sha256(repr((stream, self.layout)).encode()).hexdigest()
        name = f"{_prefix()}{digest[:32]}"
        reasons = []
        for root in sorted(ROOTS, key=lambda root: not (root / name).exists()):
            try:
                self._open(root / name)
                return
            except OSError as error:
                reasons.append(f"{root}: {error.strerror or error}")
        raise OSError("; ".join(reasons))

    def lock(self, wanted: Base, until: float) -> Lock | None:
        """See `Copy.lock`. Also None, and at once, if a later version lies here."""
        while True:
            held = self.held
            if held == wanted:
                if self._flock(fcntl.LOCK_SH):
                    if self.held == wanted:
                        return "read"
                    self.unlock()
            elif held is not None and held.version > wanted.version:
                self.unlock()
                return None
            elif self._flock(fcntl.LOCK_EX) and self.held == held:
                return "write"
            if time.monotonic() >= until:
                self.unlock()
                return None
            time.sleep(_POLL_S)

    def unlock(self) -> None:
        if self.close.alive:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    @cached_property
    def _writable(self) -> mmap.mmap:
        # Apart from the memory that is read, so that no reader can write by mistake; kept, because
        # to map pages anew costs more than to patch them.
        return mmap.mmap(self._file, 0)

    def _open(self, path: Path) -> None:
        _sweep(path.parent)
        users = _enter(path)
        try:
            self._file = _opened(path)
        except OSError:
            _leave(path, users)
            raise
        self.close = weakref.finalize(self, _leave, path, users, self._file)  # also at exit
        try:
            _allocate(self._file, path, _size(self.layout))
            self._memory = mmap.mmap(self._file, 0, access=mmap.ACCESS_READ)
        except OSError:
            self.close()
            raise

    def _flock(self, how: int) -> bool:
        """Whether the lock is had; if not, none is."""
        return _flock(self._file, how)


def layout_of(manifest: Manifest) -> Layout:
    """What two versions must have in common for one to be made of the other in place."""
    return tuple(sorted((t.name, t.dtype, t.shape, t.size) for t in manifest.tensors))


def _places(layout: Layout) -> Iterator[tuple[str, int, int]]:
    """(name, start, end) of each tensor, bytes."""
    end = _HEADER
    for name, _, _, size in layout:
        start = -(-end // _ALIGN) * _ALIGN
        end = start + size
        yield name, start, end


def _size(layout: Layout) -> int:
    return max((end for _, _, end in _places(layout)), default=_HEADER)


def _views(layout: Layout, memory: mmap.mmap) -> Iterator[tuple[str, np.ndarray]]:
    whole = np.frombuffer(memory, np.uint8)
    for name, start, end in _places(layout):
        yield name, whole[start:end]


def _prefix() -> str:
    return f"jaxrl-{os.geteuid()}-"


def _enter(path: Path) -> int:
    """Joins the users of the copy at `path`; returns the descriptor that says so."""
    name = path.with_name(path.name + USERS)
    end = time.monotonic() + _REMOVAL_S
    while True:
        users = _opened(name)
        if _flock(users, fcntl.LOCK_SH) and _is_at(users, name):
            return users
        os.close(users)
        if time.monotonic() >= end:
            raise TimeoutError(f"{name} is being removed by a process that does not go on")
        time.sleep(_POLL_S)


def _leave(path: Path, users: int, *others: int) -> None:
    """Leaves the users of the copy at `path`, and removes it if there are no others."""
    name = path.with_name(path.name + USERS)
    if _flock(users, fcntl.LOCK_EX) and _is_at(users, name):
        path.unlink(missing_ok=True)
        name.unlink(missing_ok=True)
    for descriptor in (users, *others):
        os.close(descriptor)


def _sweep(root: Path) -> None:
    """Removes the copies in `root` whose users were all killed."""
    for name in root.glob(f"{_prefix()}*{USERS}"):
        with contextlib.suppress(OSError):
            _leave(name.with_suffix(""), _opened(name))


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _opened(path: Path) -> int:
    """Raises OSError unless it is, or becomes, a file of this user's that no other can read."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    found = os.fstat(descriptor)
    if found.st_uid != os.geteuid() or found.st_mode & 0o077 or not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise PermissionError(f"{path} is not a file that this user alone can read and write")
    return descriptor


def _allocate(descriptor: int, path: Path, size: int) -> None:
    """Gives the file all its bytes now: where there was no room a write would end the process."""
    need = size - 512 * os.fstat(descriptor).st_blocks
    free = shutil.disk_usage(path.parent).free
    if need > free:
        raise OSError(f"{need} bytes are needed, {free} are free")
    os.posix_fallocate(descriptor, 0, size)


def _flock(descriptor: int, how: int) -> bool:
    """Whether the lock could be had at once."""
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
