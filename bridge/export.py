"""Parameters on a mesh -> host buffers under Hugging Face names. The trainer half: jax."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from bridge.names import hf_tensors, to_hf
from bridge.wire import HostTensor
from jaxrl.mesh import replicated
from jaxrl.models.params import ParamSpec, Path, leaf_at

Exporter = Callable[[Any], list[HostTensor]]


def make_exporter(specs: dict[Path, ParamSpec], dtype: str) -> Exporter:
    """Returns export(params) -> tensors in `dtype`, one for each Hugging Face name.

    `params` may have more leaves than `specs`; they stay. Layout and cast run on the device, in one
    program whose size does not grow with depth: a stacked leaf stays stacked, and its layers are
    rows of one host buffer. The result shares no memory with `params`, which the next update may
    consume.

    Of several processes all call it. Each leaf in turn is gathered, in `dtype`; the first process
    gets the tensors, the others an empty list.
    """
    tensors, to_wire = hf_tensors(specs), make_to_wire(specs, dtype)

    def gather(leaves: dict[Path, jax.Array]) -> dict[Path, np.ndarray]:
        if jax.process_count() == 1:
            return jax.device_get(to_wire(leaves))
        arrays = {}
        for path, leaf in leaves.items():  # one at a time: every device gets the whole of it
            whole = replicated(to_wire({path: leaf})[path])
            if jax.process_index() == 0:
                arrays[path] = np.asarray(whole)
        return arrays

    def export(params: Any) -> list[HostTensor]:
        wanted = gather({path: leaf_at(params, path) for path in specs})
        if not wanted:
            return []
        arrays = {path: np.ascontiguousarray(x) for path, x in wanted.items()}
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
        return {path: to_hf(specs[path], leaf).astype(dtype) for path, leaf in leaves.items()}

    return jax.jit(to_wire)
