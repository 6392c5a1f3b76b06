"""The fleet against engines that fail: real ones that are killed, scripted ones that misbehave."""

import asyncio
import dataclasses
import json
import os
import signal
import sys
import threading
import time

import numpy as np
import pytest

from jaxrl.types import EnginesGone, Prompt, Sampling
from tests.bridge.conftest import packed

ray = pytest.importorskip("ray")
psutil = pytest.importorskip("psutil")

from bridge import fleet as fleet_module  # noqa: E402
from bridge.channels import ChannelError, Ticket  # noqa: E402
from bridge.channels.object_store import ObjectStoreChannel  # noqa: E402
from bridge.channels.shuttle import ShuttleChannel  # noqa: E402
from bridge.encoding import Encoder  # noqa: E402
from bridge.engines.vllm import EngineDead, EngineError, RequestRefused, StaleVersion  # noqa: E402
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
        self.version = 1

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
            case "stale":
                raise StaleVersion(f"{self.name}: stale")
            case "slow":
                await asyncio.sleep(3)
            case "stale once":
                del self.script[method]
                await asyncio.sleep(0.5)
                raise StaleVersion(f"{self.name}: stale")

    async def start(self):
        await self._act("start")
        return {"name": self.name, "version": self.version, "pid": os.getpid()}

    async def stage(self, ticket, expected, deadline_s):
        await self._act("stage")

    async def commit(self, version):
        await self._act("commit")
        self.version = version
        return {"version": version}

    async def generate_many(self, requests):
        await self._act("generate")
        return [[self._rollout(r, r["seed"] + i) for i in range(r["n"])] for r in requests]

    def _rollout(self, request, seed):
        """Says in its tokens who sampled it, and for whom."""
        tokens = np.array(
            [int(self.name.split("-")[1].split(".")[0]), request["tokens"][0], seed], np.int32
        )
        versions = np.full(3, request["version"], np.int64)
        return {
            "tokens": tokens,
            "logprobs": np.zeros(3, np.float32),
            "versions": versions,
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
def scripted(ray_cluster, engine_settings, monkeypatch, warnings, pids):
    """make(engines, script, **settings): a fleet of scripted engines, ready and serving."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests
    monkeypatch.setattr(fleet_module, "actor_environment", lambda cpu: {})
    fleets = []

    def make(engines, script, max_restarts=0, engine=ScriptedEngine, serving=1, **settings):
        monkeypatch.setattr(fleet_module, "VllmEngine", engine)
        model = {"script": json.dumps(script).encode()}
        settings = FleetSettings(engines=engines, max_restarts=max_restarts, **settings)
        fleet = Fleet(settings, engine_settings, model, [], warn=warnings.append)
        fleets.append(fleet)
        fleet.start()
        pids[:] = [info["pid"] for info in fleet.wait_ready()]
        if serving is not None:
            for name in fleet.alive:
                fleet.admit(name, serving)
        return fleet

    yield make
    for fleet in fleets:
        fleet.close()
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def assert_each_came_back_once(groups, count, n=2):
    assert [group.prompt.id for group in groups] == [100 + i for i in range(count)]
    for index, group in enumerate(groups):
        assert [r.seed for r in group.rollouts] == [1000 * index + i for i in range(n)]


def generate(fleet, count):
    return fleet.generate(prompts(count), SAMPLING, [1000 * i for i in range(count)])


def test_groups_come_back_in_order_and_the_work_is_shared(scripted):
    groups = generate(scripted(2, {}), 10)
    assert_each_came_back_once(groups, 10)
    engines = [{int(r.tokens[0]) for r in group.rollouts} for group in groups]
    assert all(len(engine) == 1 for engine in engines)  # siblings together
    assert sorted(engine.pop() for engine in engines) == [0] * 5 + [1] * 5
    assert [int(group.rollouts[0].tokens[1]) for group in groups] == list(range(1, 11))


def test_no_prompts_are_no_groups(scripted):
    assert generate(scripted(1, {}), 0) == []


@pytest.mark.parametrize("deed", ["die", "hang", "error", "dead", "stale"])
def test_what_a_failing_engine_had_goes_to_the_others(scripted, deed):
    fleet = scripted(2, {"engine-1": {"generate": deed}}, request_timeout_s=2.0)
    groups = generate(fleet, 6)
    assert_each_came_back_once(groups, 6)
    assert {int(r.tokens[0]) for group in groups for r in group.rollouts} == {0}
    assert fleet.serving == fleet.alive == ["engine-0"]
    assert "sampling 3 prompts" in fleet.failures["engine-1"]
    assert_each_came_back_once(generate(fleet, 6), 6)


def test_when_none_is_left_the_error_says_why(scripted):
    script = {"engine-0": {"generate": "die"}, "engine-1": {"generate": "dead"}}
    fleet = scripted(2, script)
    with pytest.raises(EnginesGone, match=r"no engine is left.*engine-0 died.*core gone.*logs/"):
        generate(fleet, 4)


def test_a_request_at_fault_costs_no_engine(scripted):
    fleet = scripted(2, {"engine-0": {"generate": "refuse"}})
    with pytest.raises(FleetError, match="engine-0: too long"):
        generate(fleet, 4)
    assert fleet.serving == ["engine-0", "engine-1"]


def test_a_request_that_crosses_an_update_is_sent_again(scripted):
    fleet = scripted(1, {"engine-0": {"generate": "stale once"}})
    found = []
    sampler = threading.Thread(target=lambda: found.extend(generate(fleet, 2)))
    sampler.start()
    time.sleep(0.2)
    assert fleet.commit("engine-0", 2, 20.0) == {"version": 2}
    fleet.admit("engine-0", 2)
    sampler.join(20)
    assert_each_came_back_once(found, 2)
    assert {int(v) for group in found for r in group.rollouts for v in r.versions} == {2}
    assert fleet.failures == {}


def test_an_engine_that_refuses_a_version_serves_on(scripted):
    fleet = scripted(2, {"engine-1": {"stage": "error"}})
    fleet.stage("engine-0", TICKET, 5.0, 20.0)
    with pytest.raises(EngineFailed, match="engine-1: torn") as refusal:
        fleet.stage("engine-1", TICKET, 5.0, 20.0)
    assert not isinstance(refusal.value, EngineLost)
    assert fleet.alive == fleet.serving == fleet.members() == ["engine-0", "engine-1"]


def test_an_engine_without_the_version_cannot_be_admitted(scripted):
    fleet = scripted(2, {"engine-1": {"commit": "error"}}, request_timeout_s=1.0)
    assert fleet.commit("engine-0", 2, 20.0) == {"version": 2}
    with pytest.raises(FleetError, match="none was admitted within 1 s"):
        generate(fleet, 1)
    with pytest.raises(EngineFailed):
        fleet.commit("engine-1", 2, 20.0)
    assert (fleet.holds("engine-0"), fleet.holds("engine-1")) == (2, 1)
    with pytest.raises(FleetError, match="engine-1 cannot be admitted at weight version 2"):
        fleet.admit("engine-1", 2)
    fleet.admit("engine-0", 2)
    assert {int(r.tokens[0]) for g in generate(fleet, 4) for r in g.rollouts} == {0}


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
    assert "engine-1 died: commit" in warnings[0] and "engine-1.1 starts in its" in warnings[0]
    assert fleet.wait_members() == ["engine-1.1"]
    assert fleet.members() == ["engine-0", "engine-1.1"] and fleet.serving == ["engine-0"]
    lose(fleet, "engine-1.1")
    assert fleet.wait_members() == ["engine-1.2"]
    lose(fleet, "engine-1.2")
    assert "not replaced: vllm.max_restarts = 2" in warnings[2] and fleet.alive == ["engine-0"]
    assert fleet.wait_members() == [] and fleet.replaced == 2


def test_an_engine_lost_while_it_samples_is_replaced_and_its_work_done(scripted):
    fleet = scripted(2, {"engine-1": {"generate": "die"}}, max_restarts=1)
    assert_each_came_back_once(generate(fleet, 6), 6)
    assert fleet.wait_members() == ["engine-1.1"] and fleet.serving == ["engine-0"]
    for name in fleet.members():
        fleet.commit(name, 2, 20.0)
        fleet.admit(name, 2)
    assert {int(r.tokens[0]) for g in generate(fleet, 6) for r in g.rollouts} == {0, 1}


@pytest.mark.parametrize("deed", ["hang", "error"])
def test_a_replacement_that_does_not_start_is_replaced_too(scripted, deed):
    script = {"engine-0": {"commit": "dead"}, "engine-0.1": {"start": deed}}
    fleet = scripted(1, script, max_restarts=2, start_timeout_s=8.0)
    lose(fleet, "engine-0")
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


def test_engines_are_added_while_others_serve(scripted):
    fleet = scripted(1, {})
    fleet.add(2)
    deadline = time.monotonic() + 60
    while len(fleet.members()) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert fleet.members() == ["engine-0", "engine-1", "engine-2"]
    assert fleet.serving == ["engine-0"]
    assert_each_came_back_once(generate(fleet, 4), 4)
    for name in fleet.members():
        fleet.admit(name, 1)
    assert {int(r.tokens[0]) for g in generate(fleet, 6) for r in g.rollouts} == {0, 1, 2}
    assert fleet.replaced == 0


@pytest.mark.parametrize(
    ("deed", "reason"),
    [("die", "died"), ("hang", "deadline"), ("dead", "core gone"), ("error", "torn")],
)
def test_an_engine_that_does_not_start_is_named(scripted, warnings, deed, reason):
    with pytest.raises(FleetError, match=f"engine-1.*{reason}") as failure:
        scripted(2, {"engine-1": {"start": deed}}, start_timeout_s=8.0, max_restarts=3)
    assert "engine-0" not in str(failure.value) and not warnings  # nothing is tried again


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
    settings = FleetSettings(engines=2, max_restarts=0)
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
    fleet = Fleet(FleetSettings(engines=1), engine_settings, files, [])
    fleet.start()
    try:
        with pytest.raises(FleetError, match=r"engine-0 .*could not start.*NoSuchModel") as refusal:
            fleet.wait_ready()
    finally:
        fleet.close()
    assert "\n" not in str(refusal.value)


def test_begin_returns_at_once_and_its_wait_gives_what_generate_gives(monkeypatch):
    fleet, go_on = Fleet(FleetSettings(), None, "", []), threading.Event()
    outcomes = iter([["group"], FleetError("no engine is left")])

    def generate(*asked):
        assert asked == ("prompts", "sampling", "seeds") and go_on.wait(20)
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(fleet, "generate", generate)
    wait = fleet.begin("prompts", "sampling", "seeds")
    go_on.set()
    assert wait() == ["group"]
    with pytest.raises(FleetError, match="no engine is left"):
        fleet.begin("prompts", "sampling", "seeds")()
