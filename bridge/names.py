"""Our parameter tree <-> Hugging Face names and layouts. No jax, no torch.

The rules are the rows of `jaxrl.models.params.param_specs`; here is what they mean. Every step has
its inverse: a tensor is cut into pieces by rows, a piece is one index of a leaf's stacked axes, and
its [out, in] matrix is our axes flattened, and transposed where the inputs come first. The layout
functions use only methods that NumPy and jax arrays share, so that one rule serves loading, export
and tests.
"""

import dataclasses
import math
from typing import Any

from jaxrl.models.params import ParamSpec, Path


@dataclasses.dataclass(frozen=True)
class Piece:
    """Rows `start` to `stop` of a Hugging Face tensor: leaf `path` at `index` of its stack."""

    path: Path
    index: tuple[int, ...]  # (), (layer,) or (layer, expert)
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class HfTensor:
    """A Hugging Face tensor, as the pieces that tile its first axis in order."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


def hf_tensors(specs: dict[Path, ParamSpec]) -> dict[str, HfTensor]:
    """Every Hugging Face tensor of the model by name; every index of every leaf is in one piece.

    Raises:
      ValueError: the table is wrong: two leaves claim the same rows, or rows are left out.
    """
    pieces: dict[str, list[Piece]] = {}
    for path, spec in specs.items():
        rows = hf_shape(spec)[0]
        for index in _indices(spec.shape[: spec.stack]):
            name = hf_name(spec, index)
            pieces.setdefault(name, []).append(Piece(path, index, spec.row, spec.row + rows))
    tensors = {}
    for name, parts in pieces.items():
        parts.sort(key=lambda piece: piece.start)
        ends = [0, *(piece.stop for piece in parts)]
        if [piece.start for piece in parts] != ends[:-1]:
            raise ValueError(f"{name}: {parts} do not tile its rows")
        shapes = {hf_shape(specs[piece.path])[1:] for piece in parts}
        if len(shapes) != 1:
            raise ValueError(f"{name}: the rows of {parts} differ in shape")
        tensors[name] = HfTensor((ends[-1], *shapes.pop()), tuple(parts))
    return tensors


def expected_tensors(
    specs: dict[Path, ParamSpec], dtype: str
) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of everything that a publish carries: what a complete version holds."""
    return [(name, dtype, tensor.shape) for name, tensor in hf_tensors(specs).items()]


def hf_name(spec: ParamSpec, index: tuple[int, ...]) -> str:
    """Name of the Hugging Face tensor at `index` of the leaf's stack."""
    return spec.hf_name.format(**dict(zip(("layer", "expert"), index, strict=False)))


def hf_shape(spec: ParamSpec) -> tuple[int, ...]:
    """Shape of one piece: of this leaf, at one index of its stack, in Hugging Face layout."""
    shape = spec.shape[spec.stack :]
    if spec.inputs is None:
        return shape
    outputs, inputs = _split(spec, shape)
    return (math.prod(outputs), math.prod(inputs)) if inputs else (math.prod(outputs),)


def hf_axes(spec: ParamSpec) -> tuple[str, ...]:
    """Logical axis along which each dimension of a piece may be split as our leaf is.

    Of axes that one dimension flattens it is the first: splitting that one splits the dimension.
    """
    axes = spec.axes[spec.stack :]
    if spec.inputs is None:
        return axes
    outputs, inputs = _split(spec, axes)
    return (outputs[0], inputs[0]) if inputs else (outputs[0],)


def to_hf(spec: ParamSpec, leaf: Any) -> Any:
    """Our leaf in Hugging Face layout; a stacked leaf keeps its leading stacked axes."""
    if spec.inputs is None:
        return leaf
    lead, shape = spec.shape[: spec.stack], hf_shape(spec)
    if spec.inputs_first:
        return leaf.reshape(*lead, *shape[::-1]).swapaxes(-1, -2)
    return leaf.reshape(*lead, *shape)


def from_hf(spec: ParamSpec, piece: Any) -> Any:
    """The inverse of `to_hf`, for one piece (one index of the stack)."""
    if spec.inputs is None:
        return piece
    matrix = piece.swapaxes(-1, -2) if spec.inputs_first else piece
    return matrix.reshape(spec.shape[spec.stack :])


def _split(spec: ParamSpec, axes: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What stands for the axes behind the stack -> the outputs' and the inputs' part of it."""
    inputs = spec.inputs or 0
    if spec.inputs_first:
        return axes[inputs:], axes[:inputs]
    return axes[: len(axes) - inputs], axes[len(axes) - inputs :]


def _indices(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    indices: list[tuple[int, ...]] = [()]
    for size in shape:
        indices = [(*index, i) for index in indices for i in range(size)]
    return indices
