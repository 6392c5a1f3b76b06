"""What an engine raises, to its driver too: nothing here needs more than Python."""


class EngineError(Exception):
    """The engine cannot do what it was asked; says which engine and why."""


class RequestRefused(EngineError):
    """The request is at fault, and every engine would refuse it."""


class StaleVersion(EngineError):
    """The request asks for newer weights than the engine acknowledged."""


class EngineDead(EngineError):
    """The engine cannot serve again."""


def require_staged(engine: str, staged: int | None, version: int) -> None:
    """Raises EngineError unless `version` is what was staged."""
    if staged != version:
        raise EngineError(
            f"{engine}: version {version} cannot be committed, "
            f"{'nothing' if staged is None else f'version {staged}'} is staged"
        )


def require_served(engine: str, acknowledged: int | None, version: int) -> None:
    """Raises StaleVersion unless the engine acknowledged `version`, or a newer one."""
    if acknowledged is None or version > acknowledged:
        raise StaleVersion(
            f"{engine}: the request is for weight version {version}, and the engine acknowledged "
            f"{acknowledged}"
        )
