"""Eight simulated CPU devices in every test process, set before anything imports jax.

And a compiler in a hurry, because most of what the tests do is to compile small programs that run
once. Runs that a test starts as a user starts them unset XLA_FLAGS, and are compiled as a user's
are. What one process of a session has compiled is there for the others, and gone with the session.
"""

import os
import tempfile

DEVICES = "--xla_force_host_platform_device_count=8"
# The compiler takes a third of the time without its optimizations.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["VLLM_TARGET_DEVICE"] = "cpu"  # libtpu is installed, and vLLM would infer a TPU from it
flags = [DEVICES, QUICK] if os.environ["JAX_PLATFORMS"] == "cpu" else [DEVICES]
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags]).strip()

if "PYTEST_XDIST_WORKER" not in os.environ:  # a worker has what its session has
    compiled = tempfile.TemporaryDirectory(prefix="jaxrl-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
