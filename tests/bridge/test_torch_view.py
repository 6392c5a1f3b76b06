"""What arrived as torch tensors: the same bits, the same memory."""

import warnings

import ml_dtypes
import numpy as np
import pytest

from bridge import wire

torch = pytest.importorskip("torch")
torch_view = pytest.importorskip("bridge.torch_view")

ARRAYS = {
    "float32": np.arange(6, dtype=np.float32).reshape(2, 3) - 2.5,
    "bfloat16": np.linspace(-3, 3, 5).astype(ml_dtypes.bfloat16),
    "float16": np.linspace(-3, 3, 4).astype(np.float16).reshape(1, 4),
    "scalar": np.array(2.5, np.float32),
    "empty": np.zeros((0, 4), ml_dtypes.bfloat16),
}


def bucketed(bucket_bytes=16):
    tensors = [
        wire.HostTensor(name, str(a.dtype), a.shape, np.frombuffer(a.tobytes(), np.uint8))
        for name, a in ARRAYS.items()
    ]
    manifest, buckets = wire.pack(1, tensors, bucket_bytes)
    data = [array for bucket in buckets for array in bucket]
    for array in data:
        array.flags.writeable = False  # as every channel delivers them
    return manifest, data


def test_tensors_have_the_values_dtypes_and_shapes_that_were_packed():
    found = dict(torch_view.tensors(*bucketed()))
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert str(found[name].dtype) == f"torch.{array.dtype}", name
        assert tuple(found[name].shape) == array.shape, name
        expected = torch.tensor(array.astype(np.float32))
        assert torch.equal(found[name].float(), expected), name


def test_nothing_is_copied():
    manifest, data = bucketed()
    found = dict(torch_view.tensors(manifest, data))
    for entry, array in zip(manifest.tensors, data, strict=True):
        if entry.nbytes:
            assert found[entry.name].data_ptr() == array.ctypes.data, entry.name


def test_the_bytes_of_a_tensor_are_those_of_the_array():
    for name, tensor in torch_view.tensors(*bucketed()):
        assert torch_view.tensor_bytes(tensor).tobytes() == ARRAYS[name].tobytes(), name


def test_only_the_warning_about_read_only_arrays_is_silenced():
    torch.set_warn_always(True)  # this one is otherwise given once in a process
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        list(torch_view.tensors(*bucketed()))
        warnings.warn("mine", stacklevel=1)
    torch.set_warn_always(False)
    assert [str(warning.message) for warning in seen] == ["mine"]
