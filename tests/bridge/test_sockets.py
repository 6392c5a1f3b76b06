"""The folder of an engine's sockets: of a real engine, and of processes that end as they may."""

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from bridge.engines.sockets import SocketFolder

# Has a folder with something in it, says its path, and waits.
OWNER = """
import sys
from bridge.engines.sockets import SocketFolder
folder = SocketFolder()
(folder.path / "left").touch()
print(folder.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def root(monkeypatch):
    """The temporary directory; pytest's own may be too long for a socket."""
    with tempfile.TemporaryDirectory(prefix="t") as root:
        monkeypatch.setenv("TMPDIR", root)
        monkeypatch.setattr(tempfile, "tempdir", root)
        yield Path(root)


def test_a_folder_lives_as_long_as_its_process(root):
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with owner:
        theirs = Path(owner.stdout.readline().strip())
        ours = SocketFolder()
        assert {*root.iterdir()} == {theirs, ours.path} and (theirs / "left").exists()
        owner.send_signal(signal.SIGKILL)
        owner.wait(10)
    assert theirs.exists()
    another = SocketFolder()
    assert {*root.iterdir()} == {ours.path, another.path}
    ours.close()
    another.close()
    assert not [*root.iterdir()]


def test_an_engine_leaves_no_socket(root, tiny, engine_settings):
    pytest.importorskip("vllm")
    from tests.bridge.forked_engine import ForkedEngines

    engines = ForkedEngines()
    for _ in range(2):  # the second has another folder
        with engines.engine(engine_settings, tiny.files()):
            found = [path for path in root.rglob("*") if path.is_socket()]
            (folder,) = {path.parent for path in found}
            assert folder.parent == root and folder.name.startswith("jaxrl-")
        assert not [path for path in root.rglob("*") if path.is_socket()]
        assert not [*root.glob("jaxrl-*")]
    engines.close()


def test_a_process_that_ends_removes_its_folder(root):
    subprocess.run([sys.executable, "-c", OWNER], stdin=subprocess.DEVNULL, check=True)
    assert not [*root.iterdir()]


def test_a_path_too_long_for_sockets_is_refused_and_nothing_is_left(root, monkeypatch):
    long = root / ("x" * 60)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with pytest.raises(OSError, match="too long for sockets"):
        SocketFolder()
    assert not [*long.iterdir()]
