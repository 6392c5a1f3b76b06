"""What vLLM runs in each of its processes."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

psutil = pytest.importorskip("psutil")

PARENT = """
    import multiprocessing, time
    from bridge.engines import plugin

    def child(ready):
        plugin._die_with_parent()
        ready.send(multiprocessing.current_process().pid)
        time.sleep(100)

    if __name__ == "__main__":
        here, there = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        context.Process(target=child, args=(there,)).start()
        print(here.recv(), flush=True)
        time.sleep(100)
"""


def test_a_child_dies_with_a_parent_that_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(textwrap.dedent(PARENT))
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    command = [sys.executable, str(script)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    assert parent.wait(5) == -signal.SIGKILL
    _, alive = psutil.wait_procs([child], timeout=5)
    for survivor in alive:
        survivor.kill()
    assert not alive


def test_registering_twice_is_registering_once():
    pytest.importorskip("vllm")
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    from bridge.engines import plugin
    from bridge.engines.weight_transfer import BridgeWeightTransferEngine

    plugin.register()
    plugin.register()
    assert WeightTransferEngineFactory._registry[plugin.BACKEND]() is BridgeWeightTransferEngine
