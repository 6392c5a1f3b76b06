"""What every engine does, asked of each that can run here.

`vllm_server` is a real `vllm serve` on CPU. `sglang_server` is a stand-in that answers as SGLang's
API is documented (tests/bridge/sglang_server.py): SGLang itself was not run.
"""

import copy
import os
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.bridge.conftest import VOCAB

pytest.importorskip("transformers")
pytest.importorskip("aiohttp")

from bridge.engines.errors import EngineError
from bridge.engines.http import HttpEngine, ServerSettings
from bridge.engines.vllm import actor_environment
from tests.bridge.engine_driver import PROMPT, WAIT_S, Actor, Driver, Here
from tests.bridge.sglang_server import FakeSglang


@pytest.fixture(scope="module")
def vllm_server(tiny, tmp_path_factory):
    """The URL of a vLLM server, started as docs/engines.md says, with weights of its own making."""
    pytest.importorskip("vllm")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry"]
    command += ["--model", str(tiny.directory), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--weight-transfer-config", '{"backend": "jaxrl_bridge"}', "--enable-scale-out"]
    command += ["--worker-extension-cls", "bridge.engines.weight_transfer.BridgeWorker"]
    command += ["--logprobs-mode", "processed_logprobs", "--no-enable-chunked-prefill"]
    command += ["--max-num-batched-tokens", "2048", "--skip-tokenizer-init"]
    command += ["--load-format", "dummy", "--dtype", "float32", "--max-model-len", "512"]
    command += ["--max-num-seqs", "32", "--kv-cache-memory-bytes", str(64 << 20), "--enforce-eager"]
    environment = os.environ | actor_environment(cpu=True) | {"VLLM_SERVER_DEV_MODE": "1"}
    log = tmp_path_factory.mktemp("vllm-server") / "log"
    with log.open("w") as output:
        server = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    yield f"http://127.0.0.1:{port}"
    server.terminate()
    try:
        server.wait(60)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait(60)
    print(log.read_text()[-4000:])


@pytest.fixture(scope="module")
def sglang_server(tiny):
    server = FakeSglang(copy.deepcopy(tiny.model)).start()
    yield server.url
    server.stop()


@pytest.fixture(scope="module", params=["vllm", "vllm_server", "sglang_server"])
def unloaded(request, tiny, engine_settings, tmp_path_factory):
    """An engine as it starts. Nothing may be sampled before the first version."""
    if request.param == "vllm":
        ray = request.getfixturevalue("ray_cluster")
        host = Actor(ray, "engine-0", engine_settings, tiny.files())
    else:
        settings = ServerSettings(url=request.getfixturevalue(request.param), wait_s=WAIT_S)
        host = Here(HttpEngine("engine-0", settings, tiny.files()))
    driver = Driver(request.param, host, tmp_path_factory.mktemp("shuttle"), tiny.expected())
    info = driver.call("start")
    assert info["version"] is None and info["max_num_seqs"] >= 8
    assert driver.call("poll", 0.0)["done"] == []
    (done,) = driver.ended(driver.submit(version=0))
    assert "acknowledged None" in done["failed"]
    with pytest.raises(EngineError, match="no weights"):
        driver.call("score", PROMPT)
    yield driver
    host.close()


@pytest.fixture
def engine(unloaded, tiny):
    """The engine with `tiny` loaded, however the test before left it."""
    unloaded.publish(tiny)
    return unloaded


def test_completions_come_back_once_with_log_probs_and_versions(engine):
    completions = engine.sampled(n=3, temperature=0.7)
    assert [c["seed"] for c in completions] == [5, 6, 7]
    assert len({tuple(c["tokens"].tolist()) for c in completions}) == 3
    for completion in completions:
        assert completion["finish_reason"] == "length" and len(completion["tokens"]) == 24
        assert set(completion["versions"].tolist()) == {engine.version}
        engine.check(completion, temperature=0.7)
    assert engine.call("poll", 0.0)["done"] == []


def test_a_completion_is_a_function_of_its_seed(engine):
    siblings = engine.sampled(n=2)
    (alone,) = engine.sampled(seed=6)
    np.testing.assert_array_equal(siblings[1]["tokens"], alone["tokens"])
    assert siblings[0]["tokens"].tolist() != alone["tokens"].tolist()


def test_greedy_siblings_are_the_most_likely_tokens(engine, tiny):
    first, second = engine.sampled(n=2, temperature=0.0)
    np.testing.assert_array_equal(first["tokens"], second["tokens"])
    rows = tiny.logprobs([*PROMPT, *first["tokens"].tolist()])[len(PROMPT) - 1 : -1]
    np.testing.assert_array_equal(first["tokens"], rows.argmax(-1))
    engine.check(first)


def test_a_stop_token_ends_a_completion_and_is_its_last(engine):
    (free,) = engine.sampled()
    stop = int(free["tokens"][9])
    end = free["tokens"].tolist().index(stop) + 1
    (stopped,) = engine.sampled(stop_tokens=[stop])
    assert stopped["finish_reason"] == "stop"
    np.testing.assert_array_equal(stopped["tokens"], free["tokens"][:end])


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"max_new_tokens": 600}, "max_model_len"),
        ({"tokens": []}, "prompt"),
        ({"tokens": [VOCAB]}, "vocabulary"),
        ({"temperature": 0.001}, "temperature"),
        ({"n": 0}, "at least 1"),
        ({"stop_strings": ["x"]}, "tokenizer"),
        ({"top_p": 2.0}, "top_p"),
    ],
)
def test_what_no_engine_would_serve_is_refused(engine, changes, why):
    (done,) = engine.ended(engine.submit(**changes))
    assert why in done["refused"]


def test_a_request_for_weights_that_are_not_here_is_for_another_engine(engine):
    (done,) = engine.ended(engine.submit(version=engine.version + 1))
    assert str(engine.version + 1) in done["failed"]


def test_scores_are_those_of_the_weights(engine, other):
    text = [int(t) for t in np.random.default_rng(0).integers(0, VOCAB, 60)]
    loaded, ticket = engine.publish(other)
    assert (loaded["version"], loaded["digest"]) == (ticket.version, ticket.digest)
    scores = engine.call("score", text)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, other.scores(text), atol=1e-4)


def test_a_request_that_meets_a_commit_has_the_right_version_at_each_token(engine, other):
    version, _ = engine.stage(other)
    # Of SGLang's versions only whole completions are known; our stand-in is slow.
    spans = engine.kind != "sglang_server"
    key = engine.submit(n=2, max_new_tokens=480 if spans else 120)
    while engine.call("poll", 0.1)["running"] < 2:
        pass
    engine.call("commit", version)
    (done,) = engine.ended(key)
    for completion in done["completions"]:
        expected = {version - 1, version} if spans else {version}
        assert set(completion["versions"].tolist()) == expected
        engine.check(completion)


def test_a_version_that_is_refused_leaves_the_old_one_serving(engine, tiny):
    serving = engine.version
    with pytest.raises(EngineError, match=r"model\.norm\.weight"):
        engine.stage(tiny, leave_out=["model.norm.weight"])
    with pytest.raises(EngineError, match="nothing is staged"):
        engine.call("commit", engine.version)
    assert engine.call("acknowledged") == serving
    (completion,) = engine.sampled()
    engine.check(completion)


def test_a_version_that_was_never_committed_makes_way_for_the_next(engine, tiny, other):
    engine.stage(tiny)
    engine.publish(other)
    dropped, _ = engine.stage(tiny)
    engine.call("abort_update")
    with pytest.raises(EngineError, match="nothing is staged"):
        engine.call("commit", dropped)
    np.testing.assert_allclose(engine.call("score", PROMPT), other.scores(PROMPT), atol=1e-4)


def test_an_examination_finds_nothing_wrong_and_says_what_it_could_not_see(engine):
    found = engine.call("examine", 60.0)
    assert (found["version"], found["wrong"]) == (engine.version, {})
    seen = found["exact"] + found["probed"]
    assert seen + len(found["unchecked"]) == len(engine.expected)
    assert (seen == 0) == (engine.kind == "sglang_server")


def test_what_is_cancelled_does_not_come_back(engine):
    long = engine.submit(n=2, max_new_tokens=500)
    engine.call("cancel", [long, "unknown"])
    assert len(engine.sampled()) == 1  # `ended` admits no other
    end = time.monotonic() + WAIT_S
    while engine.call("poll", 0.3)["running"]:
        assert time.monotonic() < end


def test_counts_grow_with_what_is_sampled(engine):
    before = engine.call("poll", 0.0)
    engine.sampled(n=4)
    end = time.monotonic() + WAIT_S
    while (after := engine.call("poll", 0.3))["tokens"] < before["tokens"] + 4 * 24:
        assert time.monotonic() < end
    assert after["progress"] > before["progress"]
    assert after["idle_s"] > before["idle_s"] >= 0
