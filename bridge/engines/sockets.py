"""A folder for the sockets of one engine: vLLM leaves them where they are, in the temporary
directory unless it is told otherwise.

The folder is locked (`flock`, the kernel's) for as long as its process lives. So what the engine of
a killed process left is known by its lock, and the next engine on the machine removes it.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
import weakref
from pathlib import Path

_LONGEST = 107  # bytes of a socket's path
_NAME = 37  # bytes of what vLLM appends: a slash and a UUID
_RANDOM = 8  # characters that mkdtemp appends


class SocketFolder:
    """`path` is there, and locked, until `close` or the end of this process."""

    def __init__(self) -> None:
        """Removes what is left of the folders of others, too.

        Raises:
          OSError: there can be none, or its path would be too long for sockets.
        """
        root = tempfile.gettempdir()
        length = len(os.fsencode(os.path.join(root, _prefix()))) + _RANDOM + _NAME
        if length > _LONGEST:
            raise OSError(f"{root} is too long for sockets")
        _sweep(Path(root))
        self.path, held = _locked_folder(root)
        self.close = weakref.finalize(self, _remove, self.path, held)  # also at exit


def _prefix() -> str:
    return f"jaxrl-{os.geteuid()}-vllm-"


def _locked_folder(root: str) -> tuple[Path, int]:
    """A new one, and the descriptor that holds its lock."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=_prefix(), dir=root))
        try:
            held = _lock(path)
        except (BlockingIOError, FileNotFoundError):  # another engine's sweep was faster
            continue
        except OSError:  # a file system without locks
            path.rmdir()
            raise
        if path.exists():
            return path, held
        os.close(held)


def _lock(path: Path) -> int:
    """Raises BlockingIOError if another process has it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _remove(path: Path, held: int) -> None:
    shutil.rmtree(path, ignore_errors=True)
    os.close(held)


def _sweep(root: Path) -> None:
    """Removes the folders in `root` whose processes have ended."""
    for path in root.glob(f"{_prefix()}*"):
        with contextlib.suppress(OSError):
            _remove(path, _lock(path))
