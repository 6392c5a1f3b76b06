"""The fleet against engines that fail: real ones that are killed, scripted ones that misbehave."""

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from jaxrl.types import EnginesGone, Prompt, Request, Sampling
from tests.bridge.conftest import packed

ray = pytest.importorskip("ray")
psutil = pytest.importorskip("psutil")

from bridge import fleet as fleet_module  # noqa: E402
from bridge.channels import ChannelError, Ticket  # noqa: E402
from bridge.channels.object_store import ObjectStoreChannel  # noqa: E402
from bridge.channels.shuttle import ShuttleChannel  # noqa: E402
from bridge.encoding import Encoder  # noqa: E402
from bridge.engines.vllm import EngineDead, EngineError, RequestRefused  # noqa: E402
from bridge.fleet import Fleet, FleetError, FleetSettings  # noqa: E402
from bridge.publisher import Publisher  # noqa: E402
from bridge.receive import Receiver  # noqa: E402
from bridge.transaction import EngineFailed, EngineLost  # noqa: E402
from bridge.wire import HostTensor  # noqa: E402

SAMPLING = Sampling(n=2, max_new_tokens=8, temperature=1.0, stop_tokens=())
TICKET = Ticket("shuttle", 1, "0" * 64, "/nowhere")


def prompts(count):
    return [Prompt(100 + i, "", (i % 50 + 1, 2, 3), {}) for i in range(count)]


class ScriptedEngine:
    """An engine of a few lines. `script` says what each one does: {name: {method: deed}}."""

    def __init__(self, name, settings, model):
        self.name, self.script = name, json.loads(model["script"]).get(name, {})
        self.version, self.sampling, self.done = 1, {}, []
        self.progress = self.tokens = self.polls = 0
        self.news = asyncio.Event()

    async def _act(self, method):
        match self.script.get(method):
            case "hang":
                await asyncio.sleep(1000)
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "refuse":
                raise RequestRefused(f"{self.name}: too long")
            case "error":
                raise EngineError(f"{self.name}: torn")
            case "dead":
                raise EngineDead(f"{self.name}: core gone")
            case "slow":
                await asyncio.sleep(3)
            case "until commit":
                before = self.version
                while self.version == before:
                    await asyncio.sleep(0.01)

    async def acknowledged(self):
        return self.version

    async def start(self):
        await self._act("start")
        return {"name": self.name, "version": self.version, "pid": os.getpid(), "max_num_seqs": 8}

    async def stage(self, ticket, expected, deadline_s):
        await self._act("stage")

    async def commit(self, version):
        await self._act("commit")
        self.version = version
        return {"version": version}

    async def submit(self, requests):
        for request in requests:
            self.sampling[request["id"]] = asyncio.ensure_future(self._sample(request))

    async def _sample(self, request):
        try:
            await self._act("generate")
            n, seed = request["n"], request["seed"]
            outcome = {"completions": [self._rollout(request, seed + i) for i in range(n)]}
            self.tokens += 3 * n
        except RequestRefused as error:
            outcome = {"refused": str(error)}
        except EngineError as error:
            outcome = {"failed": str(error)}
        self.done.append({"id": request["id"]} | outcome)
        del self.sampling[request["id"]]
        self.news.set()

    async def poll(self, wait_s):
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.news.wait(), wait_s)
        if self.news.is_set():  # before there is work, an engine may be up ahead of the others
            await self._act("poll")
        self.news.clear()
        self.polls += 1
        self.progress += self.script.get("generate") != "hang"
        done, self.done = self.done, []
        return {
            "done": done,
            "progress": self.progress,
            "running": 2 * len(self.sampling),
            "waiting": 0,
            "tokens": self.tokens,
            "idle_s": 0.0,
            "kv_use": 0.25,
            "prompt_tokens": 4 * self.polls,
            "prefix_hits": self.polls,
        }

    async def cancel(self, ids):
        for name in ids:
            if task := self.sampling.pop(name, None):
                task.cancel()

    def _rollout(self, request, seed):
        """Says in its tokens who sampled it, and for whom."""
        tokens = np.array(
            [int(self.name.split("-")[1].split(".")[0]), request["tokens"][0], seed], np.int32
        )
        return {
            "tokens": tokens,
            "logprobs": np.zeros(3, np.float32),
            "versions": np.full(3, self.version, np.int64),
            "finish_reason": "length",
            "seed": seed,
        }

    async def shutdown(self):
        pass


@pytest.fixture
def warnings():
    return []


@pytest.fixture
def pids():
    return []


@pytest.fixture
def made():
    """The fleets of a test."""
    return []


@pytest.fixture
def hurry(monkeypatch):
    """hurry(): from now on fleets' watches run five times as fast, which is as fast as they can."""

    class Fast:
        monotonic = staticmethod(lambda: 5 * time.monotonic())

    return lambda: monkeypatch.setattr(fleet_module, "time", Fast)


@pytest.fixture
def scripted(ray_cluster, monkeypatch, warnings, pids, made):
    """make(engines, script, **settings): a fleet of scripted engines, up and serving; `meanwhile`
    is called with it before it is waited for, as a trainer compiles then."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests
    monkeypatch.setattr(fleet_module, "actor_environment", lambda cpu: {})

    def make(
        engines,
        script,
        engine=ScriptedEngine,
        serving=1,
        servers=(),
        meanwhile=lambda fleet: None,
        **settings,
    ):
        settings = {"min_engines": engines, "max_engines": engines, "max_restarts": 0} | settings
        model = {"script": json.dumps(script).encode()}
        settings = FleetSettings(**settings)
        fleet = Fleet(settings, None, model, [], warnings.append, engine, servers)
        made.append(fleet)
        fleet.start()
        meanwhile(fleet)
        pids[:] = [info["pid"] for info in fleet.wait_ready()]
        for name in fleet.members() if serving is not None else []:
            fleet.admit(name, serving)
        return fleet

    yield make
    for fleet in made:
        fleet.close()
    for pid in pids:  # none may stay frozen
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def wait_until(true, within_s=60.0):
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline, "it never was so"
        time.sleep(0.02)


def bring(fleet, version):
    """What a publisher does, to all that are up."""
    for name in fleet.members():
        fleet.commit(name, version, 20.0)
        fleet.admit(name, version)


def assert_each_came_back_once(groups, count, n=2):
    assert [group.prompt.id for group in groups] == [100 + i for i in range(count)]
    for index, group in enumerate(groups):
        assert [r.seed for r in group.rollouts] == [1000 * index + i for i in range(n)]


def submit(fleet, count, urgent=False):
    asked = enumerate(prompts(count))
    return fleet.submit([Request(prompt, SAMPLING, 1000 * i) for i, prompt in asked], urgent)


def results(futures):
    return [future.result(60) for future in futures]


def generate(fleet, count):
    return fleet.generate(prompts(count), SAMPLING, [1000 * i for i in range(count)])


def samplers(groups):
    """The slots of the engines."""
    return {int(r.tokens[0]) for group in groups for r in group.rollouts}


def test_groups_come_back_in_order_and_the_work_is_shared(scripted):
    fleet = scripted(2, {})
    groups = generate(fleet, 10)
    assert_each_came_back_once(groups, 10)
    engines = [{int(r.tokens[0]) for r in group.rollouts} for group in groups]
    assert all(len(engine) == 1 for engine in engines)  # siblings together
    assert samplers(groups) == {0, 1}
    assert [group.engine for group in groups] == [f"engine-{min(e)}" for e in engines]
    assert [int(group.rollouts[0].tokens[1]) for group in groups] == list(range(1, 11))
    assert generate(fleet, 0) == []
    wait_until(lambda: fleet.status()["fleet/tokens"] == 60)
    status = fleet.status()
    assert status["fleet/ready"] == 2 and status["fleet/dead"] == 0
    assert status["fleet/kv_use"] == 0.25 and status["fleet/queued"] == 0
    wait_until(lambda: fleet.status()["fleet/prefix_hit_rate"] == 0.25)


@pytest.mark.parametrize("deed", ["die", "late", "dead", "frozen", "stuck"])
def test_what_a_failing_engine_had_goes_to_the_others(scripted, pids, deed):
    does = {"late": "hang", "frozen": "hang", "stuck": "hang"}.get(deed, deed)
    script = {"engine-1": {"poll" if deed == "dead" else "generate": does}}
    limits = {"request_timeout_s": 1.0} if deed == "late" else {"silence_s": 2.0, "suspect_s": 0.8}
    fleet = scripted(2, script, **limits)
    futures = submit(fleet, 6)
    if deed == "frozen":
        os.kill(pids[1], signal.SIGSTOP)
        wait_until(lambda: fleet.status()["fleet/suspect"] or fleet.failures)
    groups = results(futures)
    assert_each_came_back_once(groups, 6)
    assert samplers(groups) == {0}
    assert fleet.serving == fleet.alive == ["engine-0"]
    said = {"die": "died", "late": "deadline", "dead": "core gone", "frozen": "not answered"}
    why = fleet.failures["engine-1"]
    assert said.get(deed, "no progress") in why and "sampling 3 prompts" in why
    assert fleet.status()["fleet/requeued"] == 3
    assert_gone([psutil.Process(pid) for pid in pids[1:] if psutil.pid_exists(pid)])


def test_when_none_is_left_the_error_says_why(scripted):
    script = {"engine-0": {"generate": "die"}, "engine-1": {"poll": "dead"}}
    fleet = scripted(2, script, serving=None)
    futures = submit(fleet, 4)
    for name in ("engine-0", "engine-1"):
        with contextlib.suppress(EngineLost):  # it is gone already
            fleet.admit(name, 1)
    why = r"no engine is left.*engine-0 died.*core gone.*logs/"
    for future in [*futures, *submit(fleet, 1)]:
        with pytest.raises(EnginesGone, match=why):
            future.result(60)


def test_a_request_at_fault_costs_no_engine(scripted):
    script = {"engine-0": {"generate": "error"}, "engine-1": {"generate": "refuse"}}
    fleet = scripted(2, script, max_restarts=1)
    with pytest.raises(FleetError, match="engine-1: too long"):
        generate(fleet, 4)
    fleet.withdraw("engine-1")
    with pytest.raises(FleetError, match=r"prompt 100: .* 3 times.*engine-0: torn.*engine-0: torn"):
        generate(fleet, 1)
    assert fleet.alive == ["engine-0", "engine-1"]
    fleet.remove("engine-1")
    assert fleet.alive == ["engine-0"] and fleet.replaced == 0


def test_a_silent_engine_gets_no_requests_until_it_answers(scripted, pids):
    fleet = scripted(2, {}, suspect_s=0.8)
    os.kill(pids[1], signal.SIGSTOP)
    wait_until(lambda: fleet.status()["fleet/suspect"] == 1)
    assert fleet.serving == ["engine-0"]
    assert samplers(generate(fleet, 12)) == {0}
    os.kill(pids[1], signal.SIGCONT)
    wait_until(lambda: fleet.serving == ["engine-0", "engine-1"])
    assert samplers(generate(fleet, 12)) == {0, 1} and fleet.failures == {}


def test_a_killed_engine_loses_nothing_of_a_flood(scripted, pids):
    fleet = scripted(3, {}, max_restarts=1)
    futures = submit(fleet, 200)
    futures[20].result(60)
    os.kill(pids[2], signal.SIGKILL)
    assert_each_came_back_once(results(futures), 200)
    assert fleet.wait_members() == ["engine-2.1"] and fleet.failures.keys() == {"engine-2"}


def test_what_unproven_weights_sampled_is_withheld(scripted):
    script = {"engine-0": {"generate": "until commit"}}
    fleet = scripted(2, script, max_restarts=1)
    fleet.withdraw("engine-1")
    kept, again = submit(fleet, 1), fleet.submit([Request(prompts(1)[0], SAMPLING, 0)])
    wait_until(lambda: fleet.status()["fleet/running"] == 4)
    fleet.commit("engine-0", 2, 20.0)
    wait_until(lambda: fleet.status()["fleet/tokens"] == 12)  # in the answer that had them
    assert not kept[0].done() and not again[0].done()
    fleet.admit("engine-0", 2)
    assert {int(v) for r in kept[0].result(20).rollouts for v in r.versions} == {2}
    assert samplers([again[0].result(20)]) == {0}
    more = submit(fleet, 1)
    wait_until(lambda: fleet.status()["fleet/running"] == 2)
    fleet.commit("engine-0", 3, 20.0)
    wait_until(lambda: fleet.status()["fleet/tokens"] == 18)
    fleet.commit("engine-1", 2, 20.0)
    fleet.admit("engine-1", 2)
    assert not more[0].done()
    fleet.quarantine("engine-0", "its weights are not what was sent")
    assert_each_came_back_once(results(more), 1)
    assert more[0].result().engine == "engine-1" and fleet.status()["fleet/requeued"] == 1


def test_only_the_engine_that_loads_gets_no_requests(scripted):
    fleet = scripted(2, {})
    fleet.commit("engine-1", 2, 20.0)
    assert fleet.serving == ["engine-0"] and samplers(generate(fleet, 12)) == {0}
    assert fleet.status()["fleet/loading"] == 1
    fleet.admit("engine-1", 2)
    assert samplers(generate(fleet, 12)) == {0, 1}
    fleet.withdraw("engine-0")
    groups = generate(fleet, 12)
    assert samplers(groups) == {1}
    assert {int(v) for group in groups for r in group.rollouts for v in r.versions} == {2}
    fleet.admit("engine-0", 1)  # and yet no request that came later is sampled by older weights
    assert samplers(generate(fleet, 12)) == {1}


def test_what_nobody_waits_for_is_not_sampled(scripted):
    fleet = scripted(1, {"engine-0": {"generate": "until commit"}})
    under_way, queued = submit(fleet, 10), submit(fleet, 10)
    wait_until(lambda: fleet.status()["fleet/running"] >= 8)
    assert fleet.status()["fleet/queued"] >= 10
    for future in under_way + queued[1:]:
        assert future.cancel()
    urgent = submit(fleet, 1, urgent=True)
    wait_until(lambda: fleet.status()["fleet/running"] == 4)  # those two are all there is
    bring(fleet, 2)
    results(urgent + queued[:1])
    wait_until(lambda: fleet.status()["fleet/running"] == 0)
    assert fleet.status()["fleet/tokens"] == 12


def test_requests_wait_for_engines_and_not_for_ever(scripted, hurry):
    fleet = scripted(1, {"engine-0": {"generate": "die"}}, max_restarts=1, start_timeout_s=8.0)
    told = []
    fleet.newcomers = lambda name: (told.append(name), fleet.admit(name, 1))
    assert_each_came_back_once(results(submit(fleet, 3)), 3)  # by the one in its place
    assert told == ["engine-0.1"] and fleet.serving == ["engine-0.1"]
    fleet.withdraw("engine-0.1")
    hurry()
    with pytest.raises(EnginesGone, match=r"for 8 s no engine was admitted: engine-0 died"):
        submit(fleet, 1)[0].result(60)


def test_a_fleet_too_small_for_too_long_is_gone(scripted, hurry):
    script = {"engine-1": {"commit": "die"}}
    fleet = scripted(2, script, keep_engines=2, start_timeout_s=8.0)
    lose(fleet, "engine-1")
    fleet.commit("engine-0", 2, 20.0)  # and nobody admits it
    hurry()
    with pytest.raises(EnginesGone, match=r"1 engines were up, fewer than 2: engine-1 died"):
        submit(fleet, 1)[0].result(60)
    fleet.add()
    assert fleet.wait_members() == ["engine-2"]
    bring(fleet, 2)
    assert_each_came_back_once(generate(fleet, 2), 2)


def test_an_engine_without_room_is_waited_for_and_not_late(scripted, made):
    """One that Ray has no CPUs for beside the first."""
    room = ray.cluster_resources()["CPU"] * 0.6
    fleet = scripted(1, {}, max_engines=2, cpus_per_engine=room)
    assert fleet.status()["fleet/starting"] == 1 and fleet.alive == ["engine-0", "engine-1"]
    assert_each_came_back_once(generate(fleet, 4), 4)
    fleet.close()
    with pytest.raises(
        FleetError, match=r"engine-1 has no process after 8 s.* CPUs and 0 GPUs"
    ) as late:
        scripted(2, {}, cpus_per_engine=room, start_timeout_s=8.0)
    assert "lower vllm.engines, or set vllm.gpus_per_engine" in str(late.value)
    fleet = made[-1]
    time.sleep(1)  # nobody ended it for that
    assert fleet.failures == {}
    fleet.remove("engine-0")
    assert fleet.wait_members() == ["engine-1"] and fleet.wait_members() == []


def test_an_engine_that_refuses_a_version_serves_on(scripted):
    fleet = scripted(2, {"engine-1": {"stage": "error"}})
    fleet.stage("engine-0", TICKET, 5.0, 20.0)
    with pytest.raises(EngineFailed, match="engine-1: torn") as refusal:
        fleet.stage("engine-1", TICKET, 5.0, 20.0)
    assert not isinstance(refusal.value, EngineLost)
    assert fleet.alive == fleet.serving == fleet.members() == ["engine-0", "engine-1"]


def test_an_engine_without_the_version_cannot_be_admitted(scripted):
    fleet = scripted(2, {"engine-1": {"commit": "error"}})
    with pytest.raises(EngineFailed):
        fleet.commit("engine-1", 2, 20.0)
    assert fleet.commit("engine-0", 2, 20.0) == {"version": 2}
    assert (fleet.holds("engine-0"), fleet.holds("engine-1")) == (2, 1)
    with pytest.raises(FleetError, match="engine-1 cannot be admitted at weight version 2"):
        fleet.admit("engine-1", 2)
    with pytest.raises(FleetError, match=r"engine-7 is not one of .*engine-0"):
        fleet.admit("engine-7", 2)
    fleet.admit("engine-0", 2)
    assert samplers(generate(fleet, 4)) == {0}


@pytest.mark.parametrize("deed", ["hang", "die", "dead"])
def test_an_engine_lost_in_an_update_is_out(scripted, pids, deed):
    fleet = scripted(2, {"engine-1": {"commit": deed}})
    with pytest.raises(EngineLost, match="commit"):
        fleet.commit("engine-1", 2, 2.0)
    assert fleet.alive == ["engine-0"] and "commit" in fleet.failures["engine-1"]
    assert psutil.pid_exists(pids[0])
    assert_gone([psutil.Process(pid) for pid in pids[1:] if psutil.pid_exists(pid)])


def test_an_engine_that_is_asked_does_not_keep_another_from_answering(scripted):
    fleet = scripted(2, {"engine-0": {"commit": "slow"}})
    done = []

    def commit(name):
        fleet.commit(name, 2, 20.0)
        done.append(name)

    threads = [threading.Thread(target=commit, args=(name,)) for name in ("engine-0", "engine-1")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert done == ["engine-1", "engine-0"]


def lose(fleet, name):
    with pytest.raises(EngineLost):
        fleet.commit(name, 2, 20.0)


def test_a_lost_engine_is_replaced_as_often_as_it_may_be(scripted, warnings):
    dies = {"commit": "die"}
    script = {name: dies for name in ("engine-1", "engine-1.1", "engine-1.2")}
    fleet = scripted(2, script, max_restarts=2)
    lose(fleet, "engine-1")
    assert fleet.alive == ["engine-0", "engine-1.1"]
    # Of a commit, or of whatever else was asked of it: who finds out first says it.
    assert "engine-1 died: " in warnings[0] and "engine-1.1 starts in its" in warnings[0]
    assert fleet.wait_members() == ["engine-1.1"]
    assert fleet.members() == ["engine-0", "engine-1.1"] and fleet.serving == ["engine-0"]
    lose(fleet, "engine-1.1")
    assert fleet.wait_members() == ["engine-1.2"]
    lose(fleet, "engine-1.2")
    assert "not replaced: vllm.max_restarts = 2" in warnings[2] and fleet.alive == ["engine-0"]
    assert fleet.wait_members() == [] and fleet.replaced == 2


def test_an_engine_that_is_lost_while_the_trainer_compiles_is_replaced(scripted, warnings):
    script = {"engine-1": {"commit": "die"}, "engine-3": {"start": "error"}}

    def meanwhile(fleet):
        wait_until(lambda: fleet.status()["fleet/loading"] == 3 and "engine-3" in fleet.failures)
        lose(fleet, "engine-1")
        fleet.remove("engine-2")
        assert fleet.alive == ["engine-0"] and not warnings

    fleet = scripted(1, script, max_engines=4, max_restarts=1, meanwhile=meanwhile)
    assert fleet.alive == ["engine-0", "engine-1.1"] and fleet.serving == ["engine-0"]
    assert len(warnings) == 2
    assert "engine-1 died: " in warnings[0] and "engine-1.1 starts in its" in warnings[0]
    assert "engine-3: torn; not replaced: it never started" in warnings[1]
    assert fleet.wait_members() == ["engine-1.1"]
    fleet.wait_ready()  # it is all said and done
    assert len(warnings) == 2 and fleet.alive == ["engine-0", "engine-1.1"]


@pytest.mark.parametrize("deed", ["hang", "error"])
def test_a_replacement_that_does_not_start_is_replaced_too(scripted, hurry, deed):
    script = {"engine-0": {"commit": "dead"}, "engine-0.1": {"start": deed}}
    fleet = scripted(1, script, max_restarts=2, start_timeout_s=15.0)
    lose(fleet, "engine-0")
    hurry()
    joined = fleet.wait_members() or fleet.wait_members()  # the first wait is as long as a start
    assert joined == ["engine-0.2"] and fleet.failures.keys() == {"engine-0", "engine-0.1"}


def test_a_second_quarantine_in_one_place_is_final(scripted, warnings):
    fleet = scripted(2, {"engine-0.1": {"commit": "die"}}, max_restarts=9)
    for _ in range(2):  # several threads may find out about it
        fleet.quarantine("engine-1", "its model.norm.weight is not what was sent")
    assert fleet.alive == ["engine-0", "engine-1.1"] and len(warnings) == 1
    assert fleet.serving == ["engine-0"] and "norm" in fleet.failures["engine-1"]
    with pytest.raises(EngineLost, match="norm"):
        fleet.admit("engine-1", 1)
    assert fleet.wait_members() == ["engine-1.1"]
    fleet.quarantine("engine-1.1", "nor its successor's")
    assert fleet.alive == ["engine-0"] and "not replaced" in warnings[1]
    fleet.quarantine("engine-0", "another place is another matter")
    assert fleet.alive == ["engine-0.1"] and fleet.quarantined == 3
    assert fleet.wait_members() == ["engine-0.1"]
    lose(fleet, "engine-0.1")
    assert fleet.alive == ["engine-0.2"]  # it died, and held nothing wrong


@pytest.mark.parametrize(
    ("deed", "reason"),
    [("die", "died"), ("hang", "deadline"), ("dead", "core gone"), ("error", "torn")],
)
def test_an_engine_that_does_not_start_is_named(scripted, hurry, warnings, deed, reason):
    hurry()
    with pytest.raises(FleetError, match=f"engine-1.*{reason}") as failure:
        timeout_s = 15.0 if deed == "hang" else 60.0
        scripted(2, {"engine-1": {"start": deed}}, start_timeout_s=timeout_s, max_restarts=3)
    assert "engine-0" not in str(failure.value) and not warnings  # nothing is tried again
    assert ("raise vllm.start_timeout_s (15)" in str(failure.value)) == (deed == "hang")


class FetchingEngine(ScriptedEngine):
    """Really fetches, in a process of its own; with "elsewhere" it looks for the wrong shelf."""

    def __init__(self, name, settings, model):
        super().__init__(name, settings, model)
        self.version, self.receiver, self.found = None, Receiver(), None

    async def stage(self, ticket_json, expected, deadline_s):
        await self._act("stage")
        ticket = Ticket.from_json(ticket_json)
        if self.script.get("stage") == "elsewhere" and ticket.channel == "object_store":
            address = json.loads(ticket.address) | {"shelf": "another"}
            ticket = dataclasses.replace(ticket, address=json.dumps(address))
        try:
            self.found = self.receiver.receive(ticket, deadline_s)
        except ChannelError as error:
            raise EngineError(f"{self.name}: {error}") from error

    async def commit(self, version):
        return await super().commit(version) | {"digest": self.found.digest}

    async def score(self, tokens):
        return self.found.data[0].view(np.float32)[np.array(tokens)]


class Export:
    plan, nbytes, device_bytes = ("a", "b"), 2 * 64 * 4, 0

    def groups(self, params):
        for name in self.plan:
            yield [HostTensor(name, "float32", params.shape, params.view(np.uint8).copy())]

    def groups_since(self, kept, params):
        return self.groups(params)


def test_engines_that_cannot_use_the_object_store_or_die_cost_a_run_no_version(
    scripted, warnings, tmp_path
):
    script = {"engine-1": {"stage": "elsewhere"}, "engine-2": {"commit": "die"}}
    fleet = scripted(3, script, max_restarts=1, engine=FetchingEngine, serving=None)
    channel = ObjectStoreChannel(keep_versions=1)
    publisher = Publisher(
        Export(),
        channel,
        fleet,
        lambda params, tokens: params[np.array(tokens)],
        probe=(1, 2, 3),
        probe_tolerance=0.0,
        fallback=ShuttleChannel(tmp_path),
        encoder=Encoder("delta"),
        warn=warnings.append,
    )
    params = np.random.default_rng(0).normal(size=64).astype(np.float32)
    states = []
    for version in (1, 2, 3):
        params[version] += 1
        report = publisher.publish(params, version)
        assert {o.digest for o in report.outcomes.values() if o.digest} == {report.digest}
        states.append({name: outcome.state for name, outcome in report.outcomes.items()})
        if version == 1:
            assert fleet.wait_members() == ["engine-2.1"]
    channel.close()
    lost = {"engine-0": "admitted", "engine-1": "admitted", "engine-2": "lost"}
    assert states[0] == lost and report.base == 2
    assert states[1] == states[2] == dict.fromkeys(fleet.serving, "admitted")
    assert fleet.serving == ["engine-0", "engine-1", "engine-2.1"] and report.replaced == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v00000002", "v00000003"]


def descendants(pid):
    return psutil.Process(pid).children(recursive=True)


def assert_gone(processes, within_s=10.0):
    _, alive = psutil.wait_procs(processes, timeout=within_s)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE], alive


@pytest.fixture(scope="module")
def real(ray_cluster, tiny, engine_settings):
    """Two vLLM engines that serve `tiny` as version 3, and what they say of themselves."""
    pytest.importorskip("vllm")
    settings = FleetSettings(min_engines=2, max_engines=2, max_restarts=0)
    fleet = Fleet(settings, engine_settings, tiny.files(), tiny.expected())
    fleet.start()
    infos = fleet.wait_ready()
    channel = ObjectStoreChannel()
    ticket = channel.publish(*packed(tiny, 3))
    for name in fleet.alive:
        fleet.stage(name, ticket, 20.0, 60.0)
        assert fleet.commit(name, 3, 60.0)["digest"] == ticket.digest
        fleet.admit(name, 3)
    yield fleet, infos
    children = [
        child for i in infos if psutil.pid_exists(i["pid"]) for child in descendants(i["pid"])
    ]
    fleet.close()
    channel.close()
    assert_gone(children)


def test_a_killed_engine_costs_no_group_and_leaves_no_process(real, tiny):
    fleet, infos = real
    sampling = Sampling(n=4, max_new_tokens=400, temperature=1.0, stop_tokens=())
    questions = prompts(16)
    victim = infos[0]["pid"]
    children = descendants(victim)
    assert children  # vLLM's engine core
    threading.Timer(0.7, os.kill, (victim, signal.SIGKILL)).start()
    groups = fleet.generate(questions, sampling, [1000 * i for i in range(16)])
    assert fleet.failures.keys() == {"engine-0"}
    assert fleet.failures["engine-0"].startswith("engine-0 died: sampling 8 prompts. ")
    assert_each_came_back_once(groups, 16, n=4)
    for group in groups:
        for rollout in group.rollouts:
            assert set(rollout.versions.tolist()) == {3} and len(rollout.tokens) == 400
    # What the survivor took over is what it was asked, and not some other prompt's.
    tokens = [*groups[0].prompt.tokens, *groups[0].rollouts[0].tokens.tolist()]
    rows = tiny.logprobs(tokens)[len(groups[0].prompt.tokens) - 1 : -1]
    expected = rows[np.arange(400), groups[0].rollouts[0].tokens]
    np.testing.assert_allclose(groups[0].rollouts[0].logprobs, expected, atol=1e-3)
    assert_gone(children)


def test_an_engine_whose_core_is_killed_is_found_out(real):
    fleet, infos = real
    for child in descendants(infos[1]["pid"]):
        child.kill()
    with pytest.raises(EnginesGone, match=r"no engine is left.*engine-0 died.*engine-1 failed"):
        fleet.generate(prompts(2), SAMPLING, [0, 1])
    assert fleet.alive == fleet.members() == fleet.wait_members() == []


def test_a_model_that_vllm_refuses_is_one_clear_sentence(ray_cluster, tiny, engine_settings):
    pytest.importorskip("vllm")
    config = json.loads(tiny.files()["config.json"]) | {"architectures": ["NoSuchModel"]}
    files = {"config.json": json.dumps(config).encode()}
    fleet = Fleet(FleetSettings(), engine_settings, files, [])
    fleet.start()
    try:
        with pytest.raises(FleetError, match=r"engine-0 .*could not start.*NoSuchModel") as refusal:
            fleet.wait_ready()
    finally:
        fleet.close()
    assert "\n" not in str(refusal.value)


@pytest.fixture
def asked(monkeypatch):
    """The addresses that Ray is asked to join; it is not, and it is as if there were none yet."""
    asked = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda address, **_: asked.append(address))
    return asked


def test_a_ray_cluster_that_is_not_there_is_named_before_ray_tries_it(asked, tiny):
    with socket.create_server(("127.0.0.1", 0)) as server:
        there = f"127.0.0.1:{server.getsockname()[1]}"
        for address in (there, "auto", "ray://nobody.invalid:10001"):
            connect(tiny, address)
    assert asked == [there, "auto", "ray://nobody.invalid:10001"]
    for address in (there, "no..host:6379"):  # nobody listens there now; it is no name
        with pytest.raises(FleetError, match=r"^no Ray cluster at .*is vllm.ray_address") as error:
            connect(tiny, address)
        assert address in str(error.value) and "\n" not in str(error.value)
    assert len(asked) == 3


def connect(tiny, address):
    settings = FleetSettings(max_engines=0, ray_address=address)
    Fleet(settings, None, tiny.files(), [])._connect()


@pytest.mark.parametrize("servers, there, enough", [(0, 0, False), (0, 2, True), (2, 0, True)])
def test_a_machine_with_too_few_gpus_is_refused_at_once(
    asked, monkeypatch, tiny, servers, there, enough
):
    """Of engines: {min: 2, max: 8}, servers included, the least must have theirs."""
    ended = []
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": there} if there else {})
    monkeypatch.setattr(ray, "shutdown", lambda: ended.append(True))
    settings = FleetSettings(min_engines=2, max_engines=8, gpus_per_engine=1)
    fleet = Fleet(settings, None, tiny.files(), [], servers=["http://a:1", "http://b:2"][:servers])
    if enough:
        fleet._connect()
    else:
        with pytest.raises(FleetError, match=r"has 0 GPUs, and 2 engine\(s\) of 1 need 2; set "):
            fleet._connect()
    assert asked == ["local"] and ended == [True] * (not enough)


class ScriptedServer(ScriptedEngine):
    def __init__(self, name, settings, model):
        super().__init__(name, settings, model)
        self.url = settings

    async def start(self):
        cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 0)
        return await super().start() | {"url": self.url, "cpus": cpus}


def test_servers_are_the_first_engines_and_take_no_cpu(scripted, monkeypatch):
    monkeypatch.setattr("bridge.engines.http.HttpEngine", ScriptedServer)
    fleet = scripted(3, {}, servers=["http://a:1", "http://b:2"])
    infos = {info["name"]: info for info in fleet.wait_ready()}
    assert [infos[f"engine-{i}"].get("url") for i in range(3)] == ["http://a:1", "http://b:2", None]
    assert [infos[f"engine-{i}"].get("cpus") for i in range(2)] == [0, 0]
    assert {group.engine for group in generate(fleet, 12)} == set(infos)


@pytest.fixture
def add_node(ray_cluster, tmp_path):
    """add_node(cpus): one more node for the cluster, on this machine. Returns before it has joined;
    what is called returns its raylet, once there is one."""
    started = []

    def add(cpus):
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block"]
        command += [f"--address={ray.get_runtime_context().gcs_address}", f"--num-cpus={cpus}"]
        command += [f"--object-store-memory={80 << 20}"]
        log = (tmp_path / f"node-{len(started)}.log").open("w")
        started.append(subprocess.Popen(command, stdout=log, stderr=log))
        keeper = psutil.Process(started[-1].pid)
        return lambda: next(child for child in keeper.children() if child.name() == "raylet")

    yield add
    for process in started:
        process.terminate()
        process.wait(30)
    wait_until(lambda: sum(node["Alive"] for node in ray.nodes()) == 1)  # no engine is put there


def test_a_node_that_joins_serves_and_what_it_had_when_it_died_is_for_the_next(
    add_node, scripted, warnings
):
    """Ray takes seconds to find out: it puts the engine that replaces the first on the dead node,
    which is none of the replacements that there may be."""
    cpus = 2 * int(ray.cluster_resources()["CPU"])  # more than there are
    raylet = add_node(cpus)
    hangs = {"engine-0": {"generate": "hang"}}
    fleet = scripted(1, hangs, cpus_per_engine=cpus, max_restarts=1)
    fleet.newcomers = lambda name: fleet.admit(name, 1)
    futures = submit(fleet, 3)
    wait_until(lambda: fleet.status()["fleet/running"] == 6)
    raylet().kill()
    wait_until(lambda: fleet.failures)
    assert fleet.failures["engine-0"].startswith("engine-0 died: sampling 3 prompts")
    add_node(cpus)
    assert_each_came_back_once(results(futures), 3)
    assert fleet.alive == fleet.serving and len(fleet.alive) == 1, warnings
