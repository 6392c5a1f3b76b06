"""Parameters on a mesh -> host buffers under Hugging Face names. The trainer half: jax."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from bridge.names import hf_tensors, to_hf
from bridge.wire import HostTensor
from jaxrl.models.params import ParamSpec, Path, leaf_at

Exporter = Callable[[Any], list[HostTensor]]


def make_exporter(specs: dict[Path, ParamSpec], dtype: str) -> Exporter:
    """Returns export(params) -> tensors in `dtype`, one for each Hugging Face name.

    `params` may have more leaves than `specs`; they stay. Layout and cast run on the device, in one
    program whose size does not grow with depth: a stacked leaf stays stacked, and its layers are
    rows of one host buffer. The result shares no memory with `params`, which the next update may
    consume.
    """
    tensors, to_wire = hf_tensors(specs), make_to_wire(specs, dtype)

    def export(params: Any) -> list[HostTensor]:
        leaves = {path: leaf_at(params, path) for path in specs}
        arrays = {p: np.ascontiguousarray(x) for p, x in jax.device_get(to_wire(leaves)).items()}
        exported = []
        for name, tensor in tensors.items():
            parts = [arrays[piece.path][piece.index] for piece in tensor.pieces]
            whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
            data = whole.reshape(-1).view(np.uint8)
            exported.append(HostTensor(name, dtype, tensor.shape, data))
        return exported

    return export


def make_to_wire(specs: dict[Path, ParamSpec], dtype: str) -> Any:
    """The device's part of an export, jitted: leaves by path -> the same in Hugging Face layout."""

    def to_wire(leaves: dict[Path, jax.Array]) -> dict[Path, jax.Array]:
        return {path: to_hf(spec, leaves[path]).astype(dtype) for path, spec in specs.items()}

    return jax.jit(to_wire)
