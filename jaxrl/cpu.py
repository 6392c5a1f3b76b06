"""A CPU as several devices, for a mesh on a machine without accelerators."""

import os


def divide_cpu(devices: int) -> None:
    """Makes jax show the CPU of this host as so many devices, unless XLA_FLAGS says how many.

    Must come before jax is first used; of no effect on accelerators. Each device runs its own part
    of a program, in a thread of its own: what XLA's CPU backend does on one core only, small
    products above all, then keeps as many busy.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "host_platform_device_count" not in flags:
        count = f"--xla_force_host_platform_device_count={devices}"
        os.environ["XLA_FLAGS"] = f"{flags} {count}".strip()
