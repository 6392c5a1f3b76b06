"""What the options of several tools have in common."""

import argparse
from pathlib import Path

from jaxrl.durable import try_directory
from jaxrl.types import UserError


def count(text: str) -> int:
    """Of an option that wants a whole number of at least 1. Raises ArgumentTypeError."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def check_file(option: str, path: Path) -> None:
    """Makes `path` if it is not there, and leaves what it holds: work that takes long shall not
    find out at its end that it has nowhere to write.

    Raises:
      UserError: it cannot be written.
    """
    try:
        with path.open("ab"):
            pass
    except OSError as error:
        raise _refusal(option, path, error, "file") from None


def check_directory(option: str, path: Path) -> None:
    """Makes `path` if it is not there; see `check_file`.

    Raises:
      UserError: no file can be made in it.
    """
    try:
        try_directory(path)
    except OSError as error:
        raise _refusal(option, path, error, "directory") from None


def _refusal(option: str, path: Path, error: OSError, kind: str) -> UserError:
    return UserError(
        f"{option} {path}: cannot be written: {error.strerror}; name another {kind} with {option}"
    )
