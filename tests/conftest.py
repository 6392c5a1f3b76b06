"""Eight simulated CPU devices in every test process, set before anything imports jax.

And a compiler in a hurry, because most of what the tests do is to compile small programs that run
once. Runs that a test starts as a user starts them unset XLA_FLAGS, and are compiled as a user's
are. What one process of a session has compiled is there for the others, and gone with the session.
"""

import gc
import os
import sys
import tempfile
from collections.abc import Iterator

import pytest

DEVICES = "--xla_force_host_platform_device_count=8"
# The compiler takes a third of the time without its optimizations.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["VLLM_TARGET_DEVICE"] = "cpu"  # libtpu is installed, and vLLM would infer a TPU from it
# XLA ends the process when simulated devices wait for each other for 40 s, as they may where
# something else has the cores.
PATIENT = "--xla_cpu_collective_call_terminate_timeout_seconds=300"
flags = [DEVICES, QUICK, PATIENT] if os.environ["JAX_PLATFORMS"] == "cpu" else [DEVICES]
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags]).strip()

if "PYTEST_XDIST_WORKER" not in os.environ:  # a worker has what its session has
    compiled = tempfile.TemporaryDirectory(prefix="jaxrl-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

# These take longest, and start first: left for the end, the last of them would run alone.
FIRST = (
    *("hosts", "publish", "fleet", "update", "demo", "packed_policy", "plan", "families"),
    *("lora_run", "verify", "train", "engine", "conformance", "expert_parallel", "sweep"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {f"test_{name}.py": rank for rank, name in enumerate(FIRST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(FIRST)))


def pytest_collection_finish() -> None:
    """What is loaded by now stays, and to trace a program makes so many objects that to look for
    garbage as often as Python does takes a twentieth of the time of such tests."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(scope="module", autouse=True)
def _programs_end_with_their_file() -> Iterator[None]:
    """Without this a process that runs half of the files grows to 5 GB."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
        gc.collect()
