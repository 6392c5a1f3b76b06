"""A CPU that is divided into the devices of a mesh."""

import os
import subprocess
import sys

import pytest

from jaxrl.config import SftConfig
from jaxrl.program import divide_cpu_for

FLAG = "--xla_force_host_platform_device_count="


@pytest.mark.parametrize(
    ("platform", "flags", "hosts", "expected"),
    [
        ("cpu", "", {}, f"{FLAG}6"),
        ("cpu", "--xla_dump_to=x", {}, f"--xla_dump_to=x {FLAG}6"),
        ("cpu", f"{FLAG}2", {}, f"{FLAG}2"),  # who sets it knows better
        ("cpu", "", {"coordinator": "h:80", "processes": 2, "process_id": 0}, f"{FLAG}3"),
        ("cpu", "", {"coordinator": "auto"}, ""),
        ("", "", {}, ""),  # an accelerator may be missing
        ("tpu", "", {}, ""),
    ],
)
def test_a_run_told_to_use_the_cpu_gets_the_devices_of_its_mesh(
    monkeypatch, platform, flags, hosts, expected
):
    monkeypatch.setenv("JAX_PLATFORMS", platform)
    monkeypatch.setenv("XLA_FLAGS", flags)
    config = {
        "run": {"name": "x", "steps": 1},
        "model": {"path": "x"},
        "data": {"source": "jsonl", "path": "x"},
        "mesh": {"data": 3, "fsdp": 2},
        "hosts": hosts,
    }
    divide_cpu_for(SftConfig.model_validate(config))
    assert os.environ["XLA_FLAGS"] == expected


def test_jax_shows_so_many():
    code = "from jaxrl.cpu import divide_cpu; divide_cpu(3); import jax; print(jax.device_count())"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "3\n", done.stderr
