"""Servers that are slow, gone, wrongly started or given what they cannot load."""

import copy
import dataclasses
import pickle
import threading
import time

import pytest

from tests.bridge.conftest import packed

pytest.importorskip("transformers")
pytest.importorskip("aiohttp")

from aiohttp import web

from bridge.channels import Ticket
from bridge.channels.shuttle import ShuttleChannel
from bridge.engines.errors import EngineDead, EngineError, RequestRefused
from bridge.engines.http import HttpEngine, ServerSettings
from bridge.engines.servers import ErrorAnswer
from bridge.fleet import Fleet, FleetSettings
from bridge.wire import Base
from jaxrl.types import Prompt, Request, Sampling
from tests.bridge.engine_driver import Driver, Here
from tests.bridge.sglang_server import FakeSglang, Http


@pytest.fixture
def server(tiny):
    server = FakeSglang(copy.deepcopy(tiny.model)).start()
    yield server
    server.stop()


def engine_at(url, tiny):
    return Here(HttpEngine("engine-0", ServerSettings(url=url, wait_s=0.3), tiny.files()))


@pytest.fixture
def engine(server, tiny, tmp_path):
    host = engine_at(server.url, tiny)
    driver = Driver("sglang_server", host, tmp_path / "shuttle", tiny.expected())
    driver.call("start")
    driver.publish(tiny)
    yield driver
    host.close()


def test_stragglers_are_left_behind_once_half_of_their_group_is_there(engine, server):
    server.held = {7, 8}
    completions = engine.sampled(n=4, straggler_s=0.1)
    assert [c["seed"] for c in completions] == [5, 6]
    while server.running:  # until they are aborted
        engine.call("poll", 0.01)


def test_cancelling_aborts_at_the_server_and_leaves_the_engine_idle(engine, server):
    server.held = {5, 6}
    key = engine.submit(n=2)
    while len(server.running) < 2:
        engine.call("poll", 0.01)
    idle_s = engine.call("poll", 0.0)["idle_s"]
    assert engine.call("poll", 0.05)["idle_s"] == idle_s
    engine.call("cancel", [key])
    while server.running:
        engine.call("poll", 0.01)
    after = engine.call("poll", 0.05)
    assert after["done"] == [] and after["idle_s"] > idle_s


def test_what_a_commit_aborts_is_sampled_again_once_it_is_over(engine, server, other):
    server.held = {5}
    key = engine.submit()
    while not server.running:
        engine.call("poll", 0.01)
    engine.publish(other)
    assert server.met_pause == 0
    server.held = set()
    (done,) = engine.ended(key)
    (completion,) = done["completions"]
    assert set(completion["versions"].tolist()) == {engine.version}
    engine.check(completion)


def test_a_beam_search_is_for_other_engines(engine):
    (done,) = engine.ended(engine.submit(beams=2, temperature=0.0))
    assert "is a server" in done["refused"] and "vllm.engines" in done["refused"]


def test_a_server_that_is_gone_is_a_dead_engine(engine, server):
    server.held = {5}
    engine.submit()
    server.stop()
    with pytest.raises(EngineDead, match=server.url):
        for _ in range(100):
            engine.call("poll", 0.1)
    server.start()  # for the fixture to stop


def test_what_fails_at_a_server_that_is_gone_is_not_held_against_the_request(engine, server):
    """It would be asked again of the same engine, which fails it in no time."""
    engine.call("poll", 0.5)  # and what the server counted is new
    server.stop()
    engine.submit()
    with pytest.raises(EngineDead, match=server.url):
        engine.call("poll", 5.0)
    server.start()


def test_what_fails_at_a_server_that_is_going_is_not_held_against_it(engine, server, monkeypatch):
    """As vLLM's is for a tenth of a second, when its engine core has died."""
    monkeypatch.setattr("bridge.engines.http._DYING_S", 2.0)
    server.broken = "EngineCore encountered an issue"
    engine.submit()
    threading.Timer(0.1, server.die).start()
    with pytest.raises(EngineDead, match=server.url):
        engine.call("poll", 5.0)
    server.start()


def test_a_request_that_fails_at_a_server_that_goes_on_is_reported(engine, server):
    server.broken = "out of luck"
    (done,) = engine.ended(engine.submit())
    assert "500: out of luck" in done["failed"]
    server.broken = None
    assert len(engine.sampled()) == 1


def test_a_server_that_is_killed_is_taken_back_when_it_answers(ray_cluster, server, tiny, tmp_path):
    """It is the only one, and dies just after it was asked what it counted."""
    ticket = ShuttleChannel(tmp_path).publish(*packed(tiny, 1))
    warnings, held = [], {10, 20, 30}
    settings = FleetSettings(max_restarts=1)
    servers = [ServerSettings(url=server.url)]
    files, expected = tiny.files(), tiny.expected()
    fleet = Fleet(settings, None, files, expected, warnings.append, servers=servers)

    def bring(name):
        fleet.stage(name, ticket, 20.0, 60.0)
        fleet.commit(name, 1, 60.0)
        fleet.admit(name, 1)

    fleet.newcomers = bring
    try:
        fleet.start()
        fleet.wait_ready()
        bring("engine-0")
        server.held = held
        sampling = Sampling(n=1, max_new_tokens=8, temperature=1.0, stop_tokens=())
        prompts = [Prompt(i, "", (1, 2, 3), {}) for i in range(3)]
        futures = fleet.submit(
            [Request(prompt, sampling, seed) for prompt, seed in zip(prompts, held, strict=True)]
        )
        while len(server.running) < len(held):
            time.sleep(0.01)
        counted = server.counted
        while server.counted == counted:
            time.sleep(0.005)
        time.sleep(0.03)  # until the answer is there
        server.die()
        server.held = set()
        while not any(future.done() for future in futures) and not fleet.failures:
            time.sleep(0.01)
        server.start()
        assert {future.result(60).engine for future in futures} == {"engine-0.1"}
        assert warnings == [f"{fleet.failures['engine-0']}; engine-0.1 starts in its place"]
        assert server.url in warnings[0]
    finally:
        fleet.close()


def test_nobody_there_is_said_with_the_address(server, tiny):
    url = server.url
    server.stop()
    host = engine_at(url, tiny)
    with pytest.raises(EngineDead, match=rf"engine-0 .*GET {url}/v1/models"):
        host.call("start")
    host.close()
    server.start()


def test_what_sglang_was_not_started_with_is_named(server, tiny):
    server.info |= {"enable_deterministic_inference": False, "max_running_requests": None}
    host = engine_at(server.url, tiny)
    with pytest.raises(EngineDead, match="deterministic-inference, --max-running-requests N;"):
        host.call("start")
    host.close()


def test_what_vllm_was_not_started_with_is_named(tiny):
    """By a server that has none of it, and by one without the development mode."""
    config = {
        "model_config": {"logprobs_mode": "raw_logprobs", "skip_tokenizer_init": True},
        "parallel_config": {"worker_extension_cls": "", "data_parallel_size": 2},
        "scheduler_config": {"enable_chunked_prefill": True, "max_num_seqs": 8},
        "weight_transfer_config": None,
        "device_config": {"device": "cpu"},
    }
    answers = {
        "/v1/models": {"data": [{"owned_by": "vllm", "max_model_len": 512}]},
        "/version": {"version": "0.32.0"},
        "/server_info": {"vllm_config": config},
    }

    async def answer(request):
        return web.json_response(answers[request.path])

    lacks = []
    for paths in (answers, ["/v1/models", "/version"]):
        server = Http(dict.fromkeys(paths, answer), {}).start()
        host = engine_at(server.url, tiny)
        with pytest.raises(EngineDead) as error:
            host.call("start")
        lacks.append(str(error.value))
        host.close()
        server.stop()
    for flag in (
        '--weight-transfer-config \'{"backend": "jaxrl_bridge"}\'',
        "--worker-extension-cls bridge.engines.weight_transfer.BridgeWorker",
        "--logprobs-mode processed_logprobs",
        "--enable-scale-out",
        "--data-parallel-size 1",
        "--no-enable-chunked-prefill",
    ):
        assert flag in lacks[0]
    assert "VLLM_SERVER_DEV_MODE=1" in lacks[1]


def test_another_kind_of_server_is_refused(tiny):
    async def models(request):
        return web.json_response({"data": [{"owned_by": "somebody", "max_model_len": 1}]})

    server = Http({"/v1/models": models}, {}).start()
    host = engine_at(server.url, tiny)
    with pytest.raises(EngineDead, match=r"somebody.*can be used"):
        host.call("start")
    host.close()
    server.stop()


def test_a_difference_is_not_what_sglang_can_load(engine, tiny):
    manifest, buckets = packed(tiny, 2)
    manifest = dataclasses.replace(manifest, base=Base(1, "of the first"))
    ticket = engine.channel.publish(manifest, buckets)
    with pytest.raises(EngineError, match=r"publish\.encoding: full"):
        engine.call("stage", ticket.to_json(), engine.expected, 5.0)


def test_a_version_that_is_elsewhere_or_torn_is_refused(engine, tiny, tmp_path):
    elsewhere = Ticket("object_store", 9, "digest", "somewhere").to_json()
    with pytest.raises(EngineError, match=r"publish\.channel: shuttle"):
        engine.call("stage", elsewhere, engine.expected, 5.0)
    manifest, buckets = packed(tiny, 9)
    ticket = ShuttleChannel(tmp_path / "torn").publish(manifest, buckets)
    first = sorted((tmp_path / "torn" / "v00000009").glob("*.safetensors"))[0]
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)
    with pytest.raises(EngineError, match=r"version 9, tensor .*XXH3"):
        engine.call("stage", ticket.to_json(), engine.expected, 5.0)
    assert len(engine.sampled()) == 1


def test_a_server_that_somebody_else_updates_is_found_out(engine, server):
    server.version = "77"
    (done,) = engine.ended(engine.submit())
    assert "weight version 77 sampled" in done["failed"]


def test_an_adapter_is_refused(engine):
    expected = [["base_model.model.layers.0.q_proj.lora_A.weight", "float32", [8, 64]]]
    ticket = Ticket("shuttle", 9, "digest", "/somewhere/v00000009").to_json()
    with pytest.raises(EngineError, match="adapter"):
        engine.call("stage", ticket, expected, 5.0)


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ({"load_error": "no space left"}, "no space left"),
        ({"loads_as": "1"}, "version 2, and has 1"),
    ],
)
def test_a_load_that_fails_ends_the_engine_and_leaves_the_server_paused(
    engine, server, other, fault, why
):
    version, _ = engine.stage(other)
    vars(server).update(fault)
    with pytest.raises(EngineDead, match=why):
        engine.call("commit", version)
    assert server.paused.is_set()
    with pytest.raises(EngineDead, match="not running"):
        engine.call("poll", 0.0)


def test_it_is_an_actor_like_the_others(ray_cluster, server, tiny, tmp_path):
    ray = ray_cluster
    settings = ServerSettings(url=server.url)
    actor = ray.remote(HttpEngine).options(num_cpus=0).remote("engine-0", settings, tiny.files())
    assert ray.get(actor.start.remote(), timeout=120)["max_num_seqs"] == 8
    ticket = ShuttleChannel(tmp_path).publish(*packed(tiny, 1))
    ray.get(actor.stage.remote(ticket.to_json(), tiny.expected(), 20.0), timeout=60)
    ray.get(actor.commit.remote(1), timeout=60)
    request = {"tokens": [1, 2], "n": 1, "max_new_tokens": 2, "temperature": 1.0, "seed": 1}
    request |= {"stop_tokens": [], "version": 1}
    (completion,) = ray.get(actor.generate.remote(request), timeout=60)
    assert completion["versions"].tolist() == [1, 1]
    with pytest.raises(RequestRefused):
        ray.get(actor.generate.remote(request | {"n": 0}), timeout=60)
    ray.kill(actor)


def test_an_answer_that_is_an_error_survives_a_pickle():
    error = pickle.loads(pickle.dumps(ErrorAnswer("why", 400)))
    assert (str(error), error.status) == ("why", 400)
