"""No process survives its driver: real processes, killed as the kernel kills."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

ray = pytest.importorskip("ray")
psutil = pytest.importorskip("psutil")
pytest.importorskip("setproctitle")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="there is a guard on Linux only")

# A process that takes a title, as vLLM's do, and has a child.
CORE = """
import setproctitle, subprocess, time
setproctitle.setproctitle("Core::" + 200 * "-")
subprocess.Popen(["sleep", "600"])
time.sleep(600)
"""
# Two engines, one of them not the fleet's, and a process that may stay; ends when it is told to.
DRIVER = """
import asyncio, json, os, signal, subprocess, sys, threading, time
from pathlib import Path

import psutil, ray
from bridge import fleet as fleet_module
from bridge.engines.vllm import EngineSettings
from bridge.guard import guarded

folder, core = Path(sys.argv[1]), sys.argv[2]


def say(name, pids):
    (folder / f"{name}.partial").write_text(json.dumps(pids))
    (folder / f"{name}.partial").rename(folder / f"{name}.json")


class Engine:
    def __init__(self, name, settings, model):
        self.name = name

    async def acknowledged(self):
        return None

    async def start(self):
        with guarded():
            subprocess.Popen([sys.executable, "-c", core])
        while len(below := psutil.Process().children(recursive=True)) < 2:
            await asyncio.sleep(0.05)
        if os.fork() == 0:  # which has all that this process has open
            time.sleep(600)
        say(self.name, [os.getpid(), *(process.pid for process in below)])
        await asyncio.sleep(600)

    async def shutdown(self):
        pass


fleet_module.actor_environment = lambda cpu: {}
told = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: told.set())  # which Ray must leave alone
settings = fleet_module.FleetSettings()
fleet = fleet_module.Fleet(settings, EngineSettings(), {}, [], engine_class=Engine)
fleet.start()
other = ray.remote(Engine).options(num_cpus=0).remote("other", None, None)
other.start.remote()
with guarded():
    say("core", [subprocess.Popen([sys.executable, "-c", core]).pid])
say("bystander", [subprocess.Popen(["env", "-u", "TEST_TOKEN", "sleep", "600"]).pid])
told.wait(120)
fleet.close()
"""


def within(seconds, what):
    """What it finds, once that is not nothing."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.05)
    return found


def of_this_test(token):
    """The processes that have it in their environment."""
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            if token.encode() in environment.read_bytes():
                found.append(psutil.Process(int(environment.parent.name)))
        except (OSError, psutil.NoSuchProcess):
            continue
    return found


def alive(processes):
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("end", ["killed", "closed"])
def test_nothing_is_left_of_a_driver_or_an_engine_and_nobody_else_is_harmed(tmp_path, end):
    token = uuid.uuid4().hex
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path), CORE],
        env={**os.environ, "TEST_TOKEN": token},
    )
    bystander = []
    try:
        files = within(60, lambda: len(found := sorted(tmp_path.glob("*.json"))) == 4 and found)
        said = [[psutil.Process(pid) for pid in json.loads(file.read_text())] for file in files]
        bystander, own, (actor, *below), (_, *others) = said
        assert len(below) == len(others) == 2
        if end == "killed":
            actor.kill()
            within(20, lambda: not alive(below))
            assert len(alive([*own, *others])) == 3 and driver.poll() is None
            os.kill(driver.pid, signal.SIGKILL)
        else:
            driver.terminate()
        within(30, lambda: not alive([*own, *below, *others, *of_this_test(token)]))
        assert driver.wait(10) == (-signal.SIGKILL if end == "killed" else 0)
        assert alive(bystander)
    finally:
        for process in [*bystander, *of_this_test(token)]:
            process.kill()
