"""Eight simulated CPU devices in every test process, set before anything imports jax."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["VLLM_TARGET_DEVICE"] = "cpu"  # libtpu is installed, and vLLM would infer a TPU from it
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()
