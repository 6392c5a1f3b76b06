"""Parameters on a mesh -> host buffers under Hugging Face names. The trainer half: jax."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from bridge.names import hf_shape, to_hf
from bridge.wire import HostTensor
from jaxrl.models.params import ParamSpec, Path

Exporter = Callable[[Any], list[HostTensor]]


def make_exporter(specs: dict[Path, ParamSpec], dtype: str) -> Exporter:
    """Returns export(params) -> tensors in `dtype`, one for each Hugging Face name.

    Layout and cast run on the device, in one program whose size does not grow with depth: a
    stacked leaf stays stacked, and its layers are rows of one host buffer. The result shares no
    memory with `params`, which the next update may consume.
    """

    @jax.jit
    def to_wire(params: Any) -> dict[Path, jax.Array]:
        return {
            path: to_hf(spec, _leaf(params, path)).astype(dtype) for path, spec in specs.items()
        }

    def export(params: Any) -> list[HostTensor]:
        arrays = jax.device_get(to_wire(params))
        tensors = []
        for path, spec in specs.items():
            rows = np.ascontiguousarray(arrays[path])
            layers = rows if spec.stacked else rows[None]
            tensors += [
                HostTensor(
                    spec.hf_name.format(layer=layer),
                    dtype,
                    hf_shape(spec),
                    row.reshape(-1).view(np.uint8),
                )
                for layer, row in enumerate(layers)
            ]
        return tensors

    return export


def _leaf(tree: Any, path: Path) -> Any:
    for name in path:
        tree = tree[name]
    return tree
