"""--mesh of the tools."""

import argparse

from jaxrl.config import MeshSection


def parse_mesh(text: str) -> MeshSection:
    """data=2,fsdp=4: sizes by name, those left out are 1. Raises ArgumentTypeError."""
    given = {axis: size for axis, _, size in (part.partition("=") for part in text.split(","))}
    known = given.keys() <= MeshSection.model_fields.keys()
    if not known or not all(n.isdigit() and int(n) for n in given.values()):
        raise argparse.ArgumentTypeError(f"{text!r} is not like data=2,fsdp=2,tensor=2")
    return MeshSection(**{axis: int(size) for axis, size in given.items()})
