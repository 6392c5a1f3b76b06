"""One real vLLM engine behind a real Ray actor, against transformers in float32."""

import asyncio
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import xxhash

from tests.bridge.conftest import VOCAB, packed

pytest.importorskip("vllm")
pytest.importorskip("transformers")
ray = pytest.importorskip("ray")

from bridge.channels.object_store import ObjectStoreChannel  # noqa: E402
from bridge.channels.shuttle import ShuttleChannel  # noqa: E402
from bridge.engines.vllm import (  # noqa: E402
    EngineDead,
    EngineError,
    RequestRefused,
    StaleVersion,
    VllmEngine,
    actor_environment,
)

PROMPT = [11, 3, 94, 27, 60]
TEXT = [int(t) for t in np.random.default_rng(0).integers(0, VOCAB, 200)]


class Driver:
    """Calls the engine, and gives each published version the next number."""

    def __init__(self, actor, channel, expected):
        self.actor, self.channel, self.expected = actor, channel, expected
        self.version = 0

    def call(self, method, *args):
        return ray.get(getattr(self.actor, method).remote(*args), timeout=120)

    def stage(self, model, channel=None, **spoilt):
        self.version += 1
        manifest, buckets = packed(model, self.version, **spoilt)
        ticket = (channel or self.channel).publish(manifest, buckets)
        self.call("stage", ticket.to_json(), self.expected, 20.0)
        return self.version

    def publish(self, model, channel=None):
        return self.call("commit", self.stage(model, channel))

    def request(self, **changes):
        return {
            "tokens": PROMPT,
            "n": 1,
            "max_new_tokens": 24,
            "temperature": 1.0,
            "stop_tokens": [],
            "seed": 5,
            "version": self.call("acknowledged"),
        } | changes

    def generate(self, **changes):
        return self.call("generate", self.request(**changes))


@pytest.fixture(scope="module")
def unloaded(ray_cluster, tiny, engine_settings, tmp_path_factory):
    """An engine as it starts, with weights of vLLM's own invention."""
    actor = (
        ray.remote(VllmEngine)
        .options(num_cpus=1, runtime_env={"env_vars": actor_environment(cpu=True)})
        .remote("engine-0", engine_settings, tiny.files())
    )
    info = ray.get(actor.start.remote(), timeout=120)
    print(f"engine ready in {info['seconds']:.1f} s")
    assert info["version"] is None
    driver = Driver(actor, ObjectStoreChannel(), tiny.expected())
    # Nothing may be sampled before the first publish.
    with pytest.raises(StaleVersion, match="acknowledged None"):
        driver.generate(version=0)
    with pytest.raises(EngineError, match="no weights"):
        driver.call("score", TEXT)
    yield driver
    ray.get(actor.shutdown.remote(), timeout=30)
    ray.kill(actor)


@pytest.fixture
def engine(unloaded, tiny):
    """The engine with `tiny` loaded, however the test before left it."""
    unloaded.publish(tiny)
    return unloaded


def reference_logprobs(model, prompt, tokens, temperature):
    rows = model.logprobs([*prompt, *tokens.tolist()], temperature)[len(prompt) - 1 :]
    return np.array([row[token] for row, token in zip(rows, tokens, strict=False)], np.float32)


def test_scores_are_those_of_transformers(engine, tiny):
    scores = engine.call("score", TEXT)
    assert scores.dtype == np.float32 and scores[0] == 0.0
    np.testing.assert_allclose(scores, tiny.scores(TEXT), atol=1e-4)


@pytest.mark.parametrize("kind", ["object_store", "shuttle"])
def test_a_published_version_is_what_serves(engine, other, tmp_path, kind):
    """The tied head included, which vLLM alone would leave behind."""
    shuttle = ShuttleChannel(tmp_path) if kind == "shuttle" else None
    acknowledged = engine.publish(other, shuttle)
    np.testing.assert_allclose(engine.call("score", TEXT), other.scores(TEXT), atol=1e-4)
    assert acknowledged["version"] == engine.version
    assert 0 < acknowledged["load_s"] <= acknowledged["pause_s"]


def test_the_acknowledgement_carries_the_digest_of_the_weights(engine, other):
    lines = sorted(
        f"{name} float32 {','.join(map(str, tensor.shape))} "
        f"{xxhash.xxh3_128(tensor.numpy().tobytes()).hexdigest()}\n"
        for name, tensor in other.state().items()
    )
    expected = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert engine.publish(other)["digest"] == expected


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.3])
def test_logprobs_are_of_the_sampling_distribution(engine, tiny, temperature):
    for rollout in engine.generate(n=4, temperature=temperature):
        expected = reference_logprobs(tiny, PROMPT, rollout["tokens"], temperature)
        np.testing.assert_allclose(rollout["logprobs"], expected, atol=1e-4)
        assert rollout["logprobs"].dtype == np.float32 and rollout["tokens"].dtype == np.int32


def test_samples_follow_the_distribution(engine, tiny):
    """Ten thousand first tokens: the engine truncates nothing and scales nothing."""
    count = 10_000
    first = engine.generate(n=count, max_new_tokens=1, temperature=1.3)
    found = np.bincount([r["tokens"][0] for r in first], minlength=VOCAB) / count
    expected = np.exp(tiny.logprobs(PROMPT, 1.3)[-1])
    spread = np.sqrt(expected * (1 - expected) / count)
    assert (np.abs(found - expected) < 5 * spread + 1 / count).all()


def test_the_stop_token_is_kept_with_its_logprob(engine, tiny):
    stop = list(range(0, VOCAB, 5))
    rollouts = engine.generate(n=8, stop_tokens=stop, max_new_tokens=200)
    assert {r["finish_reason"] for r in rollouts} == {"stop"}
    for rollout in rollouts:
        *before, last = rollout["tokens"].tolist()
        assert last in stop and not set(before) & set(stop)
        expected = reference_logprobs(tiny, PROMPT, rollout["tokens"], 1.0)
        np.testing.assert_allclose(rollout["logprobs"], expected, atol=1e-4)


def test_only_the_requests_own_stop_tokens_stop_it(engine):
    """The model's files say that token 7 ends a sequence; the request does not."""
    rollouts = engine.generate(n=8, max_new_tokens=300)
    assert any(7 in rollout["tokens"][:-1] for rollout in rollouts)
    assert {r["finish_reason"] for r in rollouts} == {"length"}
    assert {len(rollout["tokens"]) for rollout in rollouts} == {300}


def test_a_seed_gives_the_same_tokens_again(engine):
    first, again = engine.generate(n=3, seed=40), engine.generate(n=3, seed=40)
    assert [r["tokens"].tolist() for r in first] == [r["tokens"].tolist() for r in again]


def test_siblings_differ_and_name_the_seed_that_made_them(engine):
    siblings = engine.generate(n=4, seed=40)
    assert [r["seed"] for r in siblings] == [40, 41, 42, 43]
    assert len({tuple(r["tokens"].tolist()) for r in siblings}) == 4
    for sibling in siblings:
        (alone,) = engine.generate(n=1, seed=sibling["seed"])
        assert alone["tokens"].tolist() == sibling["tokens"].tolist()


def test_temperature_zero_takes_the_likeliest_token(engine, tiny):
    rollouts = engine.generate(n=3, temperature=0.0)
    tokens = rollouts[0]["tokens"]
    rows = tiny.logprobs([*PROMPT, *tokens.tolist()])[len(PROMPT) - 1 : -1]
    assert rows.argmax(-1).tolist() == tokens.tolist()
    np.testing.assert_allclose(rollouts[0]["logprobs"], rows.max(-1), atol=1e-4)
    assert [r["tokens"].tolist() for r in rollouts] == [tokens.tolist()] * 3


def test_many_requests_come_back_in_their_order(engine, tiny):
    prompts = [[1 + i, 2 + i] for i in range(6)]
    requests = [engine.request(tokens=prompt, n=2, seed=10) for prompt in prompts]
    found = engine.call("generate_many", requests)
    for prompt, rollouts in zip(prompts, found, strict=True):
        for rollout in rollouts:
            expected = reference_logprobs(tiny, prompt, rollout["tokens"], 1.0)
            np.testing.assert_allclose(rollout["logprobs"], expected, atol=1e-4)


def test_seeded_prompts_that_do_not_fit_into_one_step_are_sampled(engine):
    """More prompt tokens at once than vLLM schedules in a step: on CPU it must not split one."""
    rng = np.random.default_rng(3)
    prompts = [[int(t) for t in rng.integers(0, VOCAB, 150)] for _ in range(30)]
    requests = [
        engine.request(tokens=tokens, seed=seed, max_new_tokens=4)
        for seed, tokens in enumerate(prompts)
    ]
    together = engine.call("generate_many", requests)
    for request, (completion,) in list(zip(requests, together, strict=True))[::7]:
        (alone,) = engine.call("generate", request)
        np.testing.assert_array_equal(completion["tokens"], alone["tokens"])


def test_every_token_carries_its_version(engine):
    (rollout,) = engine.generate()
    assert rollout["versions"].dtype == np.int64
    assert rollout["versions"].tolist() == [engine.version] * len(rollout["tokens"])


def test_a_request_for_another_version_is_refused(engine):
    for version in (engine.version - 1, engine.version + 1):
        with pytest.raises(StaleVersion, match=f"version {version}, .*{engine.version}"):
            engine.generate(version=version)


def test_a_rollout_across_an_update_is_labelled_token_by_token(engine, tiny, other):
    """Tokens after the switch are the new weights' own, given everything before them."""
    old = engine.version
    new = engine.stage(other)
    request = engine.request(n=4, max_new_tokens=400)
    under_way = engine.actor.generate.remote(request)
    asyncio.run(asyncio.sleep(0.4))
    engine.call("commit", new)
    rollouts = ray.get(under_way, timeout=60)
    for rollout in rollouts:
        versions = rollout["versions"]
        switch = int((versions == old).sum())
        assert versions.tolist() == [old] * switch + [new] * (400 - switch)
        expected = np.where(
            versions == old,
            reference_logprobs(tiny, PROMPT, rollout["tokens"], 1.0),
            reference_logprobs(other, PROMPT, rollout["tokens"], 1.0),
        )
        np.testing.assert_allclose(rollout["logprobs"], expected, atol=1e-3)
    assert any(0 < (r["versions"] == old).sum() < 400 for r in rollouts)


def test_prefixes_cached_under_old_weights_are_not_used(engine, other):
    engine.generate(tokens=TEXT, max_new_tokens=1)
    engine.publish(other)
    (rollout,) = engine.generate(tokens=TEXT, max_new_tokens=4)
    expected = reference_logprobs(other, TEXT, rollout["tokens"], 1.0)
    np.testing.assert_allclose(rollout["logprobs"], expected, atol=1e-4)


def assert_serves_unchanged_then_updates(engine, version, before, other):
    np.testing.assert_array_equal(engine.call("score", TEXT), before)
    (rollout,) = engine.generate(version=version)
    assert set(rollout["versions"].tolist()) == {version}
    engine.publish(other)
    np.testing.assert_allclose(engine.call("score", TEXT), other.scores(TEXT), atol=1e-4)


def test_flipped_bits_are_refused_and_nothing_changes(engine, other, tmp_path):
    version, before = engine.version, engine.call("score", TEXT)
    engine.version += 1
    ticket = ShuttleChannel(tmp_path).publish(*packed(other, engine.version))
    index = json.loads(Path(ticket.address, "model.safetensors.index.json").read_text())
    name = "model.norm.weight"
    manifest = json.loads(Path(ticket.address, "manifest.json").read_text())
    entry = next(e for e in manifest["tensors"] if e["name"] == name)
    with open(f"{ticket.address}/{index['weight_map'][name]}", "r+b") as file:
        header = int.from_bytes(file.read(8), "little")
        file.seek(8 + header + entry["offset"])
        file.write(b"\x01\x02\x03")
    with pytest.raises(EngineError, match=rf"version {engine.version}: 1 tensors.*: {name}$"):
        engine.call("stage", ticket.to_json(), engine.expected, 20.0)
    assert_serves_unchanged_then_updates(engine, version, before, other)


def test_everything_wrong_with_a_version_is_named_at_once(engine, other):
    version, before = engine.version, engine.call("score", TEXT)
    missing = ["model.norm.weight", "model.layers.1.self_attn.k_proj.weight"]
    with pytest.raises(EngineError) as refusal:
        engine.stage(other, leave_out=missing, reshape=["model.embed_tokens.weight"])
    for name in [*missing, "model.embed_tokens.weight is", "2 tensors are missing"]:
        assert name in str(refusal.value)
    assert "q_proj" not in str(refusal.value)
    assert_serves_unchanged_then_updates(engine, version, before, other)


def test_a_tensor_that_the_model_does_not_have_is_refused(engine, other):
    expected, engine.expected = engine.expected, engine.expected[1:]
    try:
        with pytest.raises(EngineError, match=rf"1 tensors are not the model's: {expected[0][0]}$"):
            engine.stage(other)
    finally:
        engine.expected = expected


def test_a_version_that_never_arrives_is_refused_in_time(engine, other, tmp_path):
    version, before = engine.version, engine.call("score", TEXT)
    ticket = ShuttleChannel(tmp_path).publish(*packed(other, 90))
    gone = ticket.to_json().replace("v00000090", "v00000091").replace("90,", "91,")
    with pytest.raises(EngineError, match=r"version 91: .*v00000091.*within 0.5 s"):
        engine.call("stage", gone, engine.expected, 0.5)
    assert_serves_unchanged_then_updates(engine, version, before, other)


def test_an_aborted_update_leaves_the_old_version(engine, other):
    version, before = engine.version, engine.call("score", TEXT)
    staged = engine.stage(other)
    engine.call("abort_update")
    with pytest.raises(EngineError, match=f"{staged} cannot be committed, nothing is staged"):
        engine.call("commit", staged)
    assert_serves_unchanged_then_updates(engine, version, before, other)


def test_a_version_staged_and_never_committed_is_replaced_by_the_next(engine, tiny, other):
    engine.stage(tiny)
    engine.publish(other)
    np.testing.assert_allclose(engine.call("score", TEXT), other.scores(TEXT), atol=1e-4)


def test_only_the_staged_version_can_be_committed(engine, other):
    staged = engine.stage(other)
    with pytest.raises(EngineError, match=f"{staged + 1} cannot.*version {staged} is staged"):
        engine.call("commit", staged + 1)
    assert engine.call("commit", staged)["version"] == staged


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": []}, "must be a prompt"),
        ({"tokens": [1] * 500, "max_new_tokens": 13}, "max_model_len = 512"),
        ({"tokens": [VOCAB]}, "vocabulary"),
        ({"temperature": 0.001}, "temperature 0.001"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"seed": -1}, "seed -1"),
        ({"n": 0}, "n 0"),
    ],
)
def test_requests_that_no_engine_could_serve_are_refused(engine, changes, message):
    with pytest.raises(RequestRefused, match=message):
        engine.generate(**changes)


def test_a_load_that_fails_half_way_ends_the_engine(engine, tiny):
    """Last in this file, because nothing can be asked of the engine afterwards.

    Trainer and manifest agree that a version has no final norm; only the model knows better.
    """
    norm = "model.norm.weight"
    engine.expected = [entry for entry in engine.expected if entry[0] != norm]
    staged = engine.stage(tiny, leave_out=[norm])
    with pytest.raises(EngineDead, match=f"loading version {staged} failed.*{norm}"):
        engine.call("commit", staged)
    for method, arguments in [("score", [TEXT]), ("generate", [{"version": staged}])]:
        with pytest.raises(EngineDead, match="engine-0 is not running"):
            engine.call(method, *arguments)
