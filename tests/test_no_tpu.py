"""libtpu is installed to compile with; a run on a machine without a TPU must not hear of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxrl.no_tpu import expect_no_tpu

NAMES = {"TPU_HOST_BOUNDS", "TPU_WORKER_HOSTNAMES", "ALLOW_MULTIPLE_LIBTPU_LOAD"}


@pytest.fixture
def clean(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def pci(directory: Path, vendor: str) -> Path:
    (directory / "0000:00:04.0").mkdir(parents=True)
    (directory / "0000:00:04.0" / "vendor").write_text(vendor + "\n")
    return directory


def set_by(path: Path) -> set[str]:
    before = dict(os.environ)
    expect_no_tpu(path)
    after = dict(os.environ)
    for name in after.keys() - before.keys():
        del os.environ[name]
    return after.keys() - before.keys()


def test_a_machine_with_a_tpu_is_left_alone(clean, tmp_path):
    assert set_by(pci(tmp_path / "tpu", "0x1ae0")) == set()
    assert set_by(pci(tmp_path / "gpu", "0x10de")) == NAMES
    assert set_by(tmp_path / "none") == NAMES


def test_what_the_user_has_set_stays(clean, monkeypatch, tmp_path):
    monkeypatch.setenv("TPU_HOST_BOUNDS", "2,2,1")
    assert set_by(tmp_path) == NAMES - {"TPU_HOST_BOUNDS"}
    assert os.environ["TPU_HOST_BOUNDS"] == "2,2,1"


def test_jax_starts_without_a_word_and_in_two_processes_at_once():
    pytest.importorskip("libtpu")
    code = "import jaxrl, jax; print(jax.devices()[0].platform); input()"
    environment = {k: v for k, v in os.environ.items() if k not in NAMES | {"JAX_PLATFORMS"}}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=Path(__file__).parents[1],
        )
        for _ in range(2)
    ]
    assert all(p.stdout and p.stdout.readline() for p in processes)  # both are up
    for process in processes:
        _, said = process.communicate("\n", timeout=120)
        assert process.returncode == 0, said
        assert "TPU" not in said and "libtpu" not in said
