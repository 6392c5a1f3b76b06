"""No process survives its driver: what a process has marked is ended when it dies, however it dies.

A process that is killed ends nothing itself. So it has a guard, a small process in a session of its
own, which waits for its death, gives what is left behind a moment to go by itself, and kills the
rest. It knows them by a marker in the environment that they were started with, and they handed on
to whatever they started; nothing else is touched. On Linux only: elsewhere there is no guard.

The guard is this file, run by itself: the standard library alone.
"""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

_VARIABLE = "JAXRL_GUARD"  # of the environment; has the marker
_GRACE_S = 2.0  # to go by themselves
_GIVE_UP_S = 30.0
_LOOK_S = 0.1
_START_S = 30.0


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Whatever is started meanwhile, and all that is started from there, does not survive this
    process.

    Raises:
      OSError, subprocess.SubprocessError: the guard could not be started.
    """
    if sys.platform != "linux":
        yield
        return
    # vLLM's processes give themselves a title, which would otherwise be written over the marker.
    marked = {_VARIABLE: _marker(os.getpid()), "SPT_NOENV": "1"}
    before = {name: os.environ.get(name) for name in marked}
    os.environ.update(marked)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@functools.cache
def _marker(pid: int) -> str:
    """Of this process, which has one guard until it ends; a fork of it needs another."""
    marker = uuid.uuid4().hex
    end, held = os.pipe()
    # Open for as long as this process lives, and in no other.
    os.register_at_fork(after_in_child=os.fdopen(held, "wb").close)
    try:
        subprocess.run(
            [sys.executable, "-I", "-S", __file__, marker],
            stdin=end,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={name: value for name, value in os.environ.items() if name != _VARIABLE},
            cwd="/",
            start_new_session=True,  # a Ctrl-C in the terminal is not for the guard
            timeout=_START_S,
            check=True,
        )
    finally:
        os.close(end)
    return marker


def _guard(marker: str) -> None:
    if os.fork():  # Ray ends the children of an actor with it, and this must outlive both
        return
    os.read(sys.stdin.fileno(), 1)  # nothing is ever written: it returns when nobody could
    died = time.monotonic()
    while (left := _marked(marker)) and time.monotonic() < died + _GIVE_UP_S:
        if time.monotonic() > died + _GRACE_S:
            for pid in left:
                with contextlib.suppress(OSError):  # gone meanwhile
                    os.kill(pid, signal.SIGKILL)
        time.sleep(_LOOK_S)


def _marked(marker: str) -> list[int]:
    """The living processes that were started with `marker`; a zombie has no environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone meanwhile, or another user's
            if marker.encode() in (process / "environ").read_bytes():
                found.append(int(process.name))
    return found


if __name__ == "__main__":
    _guard(sys.argv[1])
