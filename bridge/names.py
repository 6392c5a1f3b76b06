"""Our parameter tree <-> Hugging Face names and layouts. No jax, no torch.

The rules are the rows of `jaxrl.models.params.param_specs`; here is what they mean. The layout
functions use only methods that NumPy and jax arrays share, so that one rule serves loading (on the
host), export (on the device, jitted) and tests.
"""

import math
from typing import Any

from jaxrl.models.params import ParamSpec, Path


def hf_tensors(specs: dict[Path, ParamSpec]) -> dict[str, tuple[Path, int | None]]:
    """Every Hugging Face tensor: name -> (path of our leaf, layer or None). Total, no overlap."""
    tensors: dict[str, tuple[Path, int | None]] = {}
    for path, spec in specs.items():
        for layer in range(spec.shape[0]) if spec.stacked else (None,):
            name = spec.hf_name.format(layer=layer)
            if name in tensors:
                raise ValueError(f"{name} belongs to both {tensors[name][0]} and {path}")
            tensors[name] = (path, layer)
    return tensors


def expected_tensors(
    specs: dict[Path, ParamSpec], dtype: str
) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of everything that a publish carries: what a complete version holds."""
    return [
        (spec.hf_name.format(layer=layer), dtype, hf_shape(spec))
        for spec in specs.values()
        for layer in range(spec.shape[0] if spec.stacked else 1)
    ]


def hf_shape(spec: ParamSpec) -> tuple[int, ...]:
    """Shape of one Hugging Face tensor of this leaf (of one layer, when stacked)."""
    shape = spec.shape[1:] if spec.stacked else spec.shape
    if spec.hf_matrix is None:
        return shape
    inputs, outputs = shape[: spec.hf_matrix], shape[spec.hf_matrix :]
    return (math.prod(outputs), math.prod(inputs))


def to_hf(spec: ParamSpec, leaf: Any) -> Any:
    """Our leaf in Hugging Face layout; a stacked leaf keeps its leading `layers` axis."""
    if spec.hf_matrix is None:
        return leaf
    lead = spec.shape[:1] if spec.stacked else ()
    outputs, inputs = hf_shape(spec)
    return leaf.reshape(*lead, inputs, outputs).swapaxes(-1, -2)


def from_hf(spec: ParamSpec, tensor: Any) -> Any:
    """The inverse of `to_hf`, for one Hugging Face tensor (of one layer, when stacked)."""
    shape = spec.shape[1:] if spec.stacked else spec.shape
    if spec.hf_matrix is None:
        return tensor
    return tensor.swapaxes(-1, -2).reshape(shape)
