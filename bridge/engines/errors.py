"""What an engine raises, to its driver too: nothing here needs more than Python."""


class EngineError(Exception):
    """The engine cannot do what it was asked; says which engine and why."""


class RequestRefused(EngineError):
    """The request is at fault, and every engine would refuse it."""


class StaleVersion(EngineError):
    """The request asks for newer weights than the engine acknowledged."""


class EngineDead(EngineError):
    """The engine cannot serve again."""
