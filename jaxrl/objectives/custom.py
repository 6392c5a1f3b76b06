"""Functions of the user's own, named in the configuration as MODULE:FUNCTION."""

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from jaxrl.config import AlgorithmSection
from jaxrl.types import UserError

# What each is called with, and returns.
SIGNATURES = {
    "advantage": ("rewards_PG", "tokens_PG"),
    "loss": ("tokens", "algorithm"),
}


def is_custom(name: str) -> bool:
    return ":" in name


def load(key: str, name: str) -> Callable[..., Any]:
    """The function that `algorithm.<key>` names; see `load_function`."""
    return load_function(f"algorithm.{key}", name, SIGNATURES[key])


def load_function(key: str, name: str, parameters: Sequence[str]) -> Callable[..., Any]:
    """The function that the dotted `key` names.

    Raises:
      UserError: it cannot be imported, or cannot be called with so many arguments.
    """
    where = f"{key} = {name}"
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UserError(
            f"{where}: {module_name} cannot be imported ({error!r}); it must lie in the directory "
            "that the run is started in, or be installed"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"{where}: {module_name} has no function {function_name}")
    try:
        inspect.signature(function).bind(*parameters)
    except TypeError as error:
        raise UserError(
            f"{where}: it is called as {function_name}({', '.join(parameters)}), and takes "
            f"{function_name}{inspect.signature(function)}: {error}"
        ) from None
    return function


def load_all(c: AlgorithmSection) -> None:
    """Loads what the section names, so that a mistake there is found before anything starts."""
    for key in SIGNATURES:
        if is_custom(getattr(c, key)):
            load(key, getattr(c, key))
