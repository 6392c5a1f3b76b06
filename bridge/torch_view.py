"""What arrived, as torch tensors, without a copy."""

import warnings
from collections.abc import Sequence

import numpy as np
import torch

from bridge.wire import Manifest

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def tensors(manifest: Manifest, data: Sequence[np.ndarray]) -> list[tuple[str, torch.Tensor]]:
    """(name, tensor) in the manifest's order; `data` has the bytes of each. A tensor is a view and
    must not be written.

    A write would reach shared memory or a mapped file: at best a crash, at worst another worker's
    weights.
    """
    with warnings.catch_warnings():
        # torch has no read-only tensors and warns about every mapped array; we only ever read.
        warnings.filterwarnings("ignore", message=".*not writable.*", category=UserWarning)
        flat = [torch.from_numpy(np.asarray(array)) for array in data]
    return [
        (entry.name, one.view(_DTYPES[entry.dtype]).view(entry.shape))
        for entry, one in zip(manifest.tensors, flat, strict=True)
    ]


def tensor_bytes(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of a contiguous CPU tensor, uint8 [nbytes], a view."""
    return tensor.reshape(-1).view(torch.uint8).numpy()
