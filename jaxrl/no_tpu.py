"""libtpu on a machine without a TPU: there to compile for one (tools.plan), not to run on."""

import os
from pathlib import Path

PCI_DEVICES = Path("/sys/bus/pci/devices")
GOOGLE = "0x1ae0"  # PCI vendor; jax itself looks for TPUs by it


def expect_no_tpu(pci_devices: Path = PCI_DEVICES) -> None:
    """Where there is no TPU, answers in advance what libtpu would complain about not finding.

    jax loads libtpu wherever it is installed, and where it finds neither a TPU nor the metadata of
    a cloud machine it writes errors to stderr, ahead of the user's own output. With these it knows
    a host of its own, finds no chip there, and is quiet. It also takes a lock on the machine, as if
    for a chip, so that of two processes one would fail. What the user has set stays.
    """
    vendors = pci_devices.glob("*/vendor")
    if any(vendor.read_text().strip() == GOOGLE for vendor in vendors):
        return
    for name, value in {
        "TPU_HOST_BOUNDS": "1,1,1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(name, value)
