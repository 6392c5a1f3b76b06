"""One real vLLM engine behind a real Ray actor, against transformers in float32."""

import asyncio
import dataclasses
import hashlib
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import xxhash

from tests.bridge.conftest import EOS, VOCAB, ascii_tokenizer, packed

pytest.importorskip("vllm")
pytest.importorskip("transformers")
ray = pytest.importorskip("ray")
psutil = pytest.importorskip("psutil")

from bridge.channels.object_store import ObjectStoreChannel  # noqa: E402
from bridge.channels.shuttle import ShuttleChannel  # noqa: E402
from bridge.engines.errors import (  # noqa: E402
    EngineDead,
    EngineError,
    RequestRefused,
    StaleVersion,
)
from bridge.engines.vllm import VllmEngine, actor_environment  # noqa: E402

PROMPT = [11, 3, 94, 27, 60]
TEXT = [int(t) for t in np.random.default_rng(0).integers(0, VOCAB, 200)]


class Driver:
    """Calls the engine, and gives each published version the next number."""

    def __init__(self, actor, channel, expected, pid):
        self.actor, self.channel, self.expected, self.pid = actor, channel, expected, pid
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

    def submit(self, **requests):
        """Each by its id, as changes to the usual request."""
        work = [
            self.request(**changes) | {"id": id, "straggler_s": changes.get("straggler_s")}
            for id, changes in requests.items()
        ]
        self.call("submit", work)

    def ends(self, *ids):
        """How these requests ended, by id. Others must not end meanwhile."""
        found = {}
        while set(found) != set(ids):
            for entry in self.call("poll", 60.0)["done"]:
                assert entry["id"] in ids and entry["id"] not in found
                found[entry["id"]] = entry
        return found

    def poll_until(self, holds):
        """The first poll of which `holds` is true; no request may end before it."""
        deadline = time.monotonic() + 60
        while True:
            report = self.call("poll", 0.05)
            assert not report["done"] and time.monotonic() < deadline, report
            if holds(report):
                return report


@pytest.fixture(scope="module")
def unloaded(ray_cluster, tiny, engine_settings, tmp_path_factory):
    """An engine as it starts, with weights of vLLM's own invention."""
    files = tiny.files() | ascii_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    settings = dataclasses.replace(engine_settings, tokenizer=True)
    actor = (
        ray.remote(VllmEngine)
        .options(num_cpus=1, runtime_env={"env_vars": actor_environment(cpu=True)})
        .remote("engine-0", settings, files)
    )
    info = ray.get(actor.start.remote(), timeout=120)
    print(f"engine ready in {info['seconds']:.1f} s")
    assert info["version"] is None and info["max_num_seqs"] == settings.max_num_seqs
    driver = Driver(actor, ObjectStoreChannel(), tiny.expected(), info["pid"])
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


class Decoding:
    """vLLM's engine, as far as a commit asks it: a step takes 0.2 s and gives a token."""

    def __init__(self, counters):
        self.counters = counters

    async def pause_generation(self, mode, clear_cache):
        await asyncio.sleep(0.2)
        self.counters.record(None, SimpleNamespace(num_generation_tokens=1))
        self.paused = time.perf_counter()
        self.counters.record(None, SimpleNamespace(num_generation_tokens=0))

    async def finish_weight_update(self, weight_version):
        await asyncio.sleep(0.05)

    async def collective_rpc(self, name):
        return [{"version": 1, "digest": "1", "load_s": 0.05}]

    async def resume_generation(self):
        self.resumed = time.perf_counter()


@pytest.mark.parametrize("busy", [True, False])
def test_a_pause_begins_with_the_last_token_or_the_request(engine_settings, busy):
    counters_of = pytest.importorskip("bridge.engines.counters")
    engine = VllmEngine("engine", engine_settings, {})
    engine._counters = counters_of.Counters(None)
    engine._llm = llm = Decoding(engine._counters if busy else counters_of.Counters(None))
    engine._staged = 1
    began = time.perf_counter()
    pause_s = asyncio.run(engine.commit(1))["pause_s"]
    took = time.perf_counter() - began
    resumed = llm.resumed - llm.paused
    assert resumed <= pause_s <= took - 0.19 if busy else resumed + 0.19 <= pause_s <= took


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


def assert_same(completions, others):
    for one, other in zip(completions, others, strict=True):
        assert one["seed"] == other["seed"] and one["finish_reason"] == other["finish_reason"]
        for name in "tokens", "versions":
            np.testing.assert_array_equal(one[name], other[name])
        np.testing.assert_allclose(one["logprobs"], other["logprobs"], atol=1e-4)


def test_what_is_submitted_ends_as_what_is_generated(engine):
    requests = {f"r{i}": {"tokens": [1 + i, 2 + i], "n": 3, "seed": 10 * i} for i in range(6)}
    before = engine.call("poll", 0.0)
    engine.submit(**requests)
    ends = engine.ends(*requests)
    after = engine.call("poll", 0.0)
    found = [completion for end in ends.values() for completion in end["completions"]]
    assert after["tokens"] - before["tokens"] == sum(len(c["tokens"]) for c in found)
    for id, changes in requests.items():
        assert_same(ends[id]["completions"], engine.generate(**changes))


def test_a_request_that_cannot_be_served_says_why_and_the_others_are_served(engine):
    version = engine.version
    engine.submit(
        newer={"version": version + 1}, empty={"tokens": []}, good={}, nucleus={"top_p": 2.0}
    )
    ends = engine.ends("newer", "empty", "good", "nucleus")
    assert (
        f"version {version + 1}, and the engine acknowledged {version}" in ends["newer"]["failed"]
    )
    assert "must be a prompt" in ends["empty"]["refused"]
    assert "top_p" in ends["nucleus"]["refused"]
    assert_same(ends["good"]["completions"], engine.generate())


def test_a_request_ends_without_waiting_for_others_and_a_cancelled_one_does_not(engine):
    engine.submit(long={"n": 16, "max_new_tokens": 490}, short={"max_new_tokens": 1})
    assert "completions" in engine.ends("short")["short"]
    engine.call("cancel", ["long", "unknown"])
    engine.poll_until(lambda report: report["running"] == report["waiting"] == 0)
    engine.submit(last={"max_new_tokens": 1})
    engine.ends("last")


def test_stragglers_are_left_behind_and_what_is_there_is_unchanged(engine):
    group = {"n": 16, "max_new_tokens": 490, "stop_tokens": [EOS]}
    whole = {completion["seed"]: completion for completion in engine.generate(**group)}
    engine.submit(group=group | {"straggler_s": 0.0})
    there = engine.ends("group")["group"]["completions"]
    assert 8 <= len(there) < 16
    assert_same(there, [whole[completion["seed"]] for completion in there])
    engine.poll_until(lambda report: report["running"] == 0)


def test_progress_is_the_cores_own(engine):
    """An actor whose core hangs answers still, but says that nothing happens."""
    core = psutil.Process(engine.pid).children(recursive=True)
    engine.submit(long={"n": 32, "max_new_tokens": 490})
    started = engine.poll_until(lambda report: report["running"] == 32)["progress"]
    assert 0 < engine.poll_until(lambda report: report["progress"] > started)["kv_use"] < 1
    for process in core:
        process.suspend()
    try:
        reports = [engine.call("poll", 0.5)]
        while len(reports) < 2 or reports[-1]["progress"] > reports[-2]["progress"]:
            assert len(reports) < 60, reports
            reports.append(engine.call("poll", 0.5))
    finally:
        for process in core:
            process.resume()
    engine.poll_until(lambda report: report["progress"] > reports[-1]["progress"])
    assert engine.call("poll", 0.0)["idle_s"] == reports[0]["idle_s"]
    engine.call("cancel", ["long"])


def test_siblings_share_their_prompt_in_the_cache(engine):
    """The cache is empty after a publish, and has blocks of 128 tokens on CPU."""
    before = engine.call("poll", 0.0)
    engine.submit(group={"tokens": TEXT, "n": 8, "max_new_tokens": 1})
    engine.ends("group")
    after = engine.call("poll", 0.0)
    assert after["prompt_tokens"] - before["prompt_tokens"] == 8 * len(TEXT)
    assert after["prefix_hits"] - before["prefix_hits"] == 7 * 128


def test_seeded_prompts_that_do_not_fit_into_one_step_are_sampled(engine):
    """More prompt tokens at once than vLLM schedules in a step: on CPU it must not split one."""
    rng = np.random.default_rng(3)
    prompts = [[int(t) for t in rng.integers(0, VOCAB, 150)] for _ in range(30)]
    requests = {
        str(seed): {"tokens": tokens, "seed": seed, "max_new_tokens": 4}
        for seed, tokens in enumerate(prompts)
    }
    engine.submit(**requests)
    together = engine.ends(*requests)
    for id in list(requests)[::7]:
        assert_same(together[id]["completions"], engine.generate(**requests[id]))


def chosen(logprobs_TV, tokens):
    return logprobs_TV[np.arange(len(tokens)), tokens]


def normalized(logits_TV):
    logits_TV = logits_TV - logits_TV.max(-1, keepdims=True)
    return logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))


def shaped(logits_TV, history, temperature, top_k=VOCAB, top_p=1.0, min_p=0.0, penalty=1.0):
    """The log-probs that these options leave; `history` is what came before each row."""
    rows = []
    for row, seen in zip(logits_TV.astype(np.float64), history, strict=True):
        seen = sorted(set(seen))
        row[seen] = np.where(row[seen] > 0, row[seen] / penalty, row[seen] * penalty)
        row = row / temperature
        row[row < row.max() + np.log(max(min_p, 1e-30))] = -np.inf
        row[np.argsort(-row)[top_k:]] = -np.inf
        order = np.argsort(-row)
        ahead = np.cumsum(np.exp(normalized(row))[order])
        row[order[1:][ahead[:-1] >= top_p]] = -np.inf
        rows.append(normalized(row))
    return np.array(rows)


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 3},
        {"top_p": 0.5},
        {"min_p": 0.3},
        {"repetition_penalty": 1.7},
        {"top_k": 9, "top_p": 0.7, "min_p": 0.05, "repetition_penalty": 0.8},
    ],
    ids=lambda options: "+".join(options),
)
def test_logprobs_are_of_the_distribution_that_options_leave(engine, tiny, options):
    temperature = 0.8
    named = {"penalty" if name == "repetition_penalty" else name: v for name, v in options.items()}
    for rollout in engine.generate(n=4, temperature=temperature, **options):
        tokens = rollout["tokens"].tolist()
        text = [*PROMPT, *tokens]
        logits_TV = tiny.logits(text)[len(PROMPT) - 1 : -1]
        history = [text[: len(PROMPT) + t] for t in range(len(tokens))]
        expected = chosen(shaped(logits_TV, history, temperature, **named), tokens)
        np.testing.assert_allclose(rollout["logprobs"], expected, atol=1e-3)
        plain = chosen(normalized(logits_TV / temperature), tokens)
        assert np.abs(expected - plain).max() > 0.1


def test_a_stop_string_ends_a_completion_with_the_token_that_completes_it(engine):
    """Found across tokens, and what was sampled before stays as it was."""

    def text(tokens):
        return "".join(chr(token) for token in tokens if token != EOS)

    group = {"n": 4, "max_new_tokens": 200}
    whole = engine.generate(**group)
    stop = text(whole[0]["tokens"])[60:62]
    stopped = engine.generate(**group, stop_strings=[stop, "never sampled"])
    for rollout, full in zip(stopped, whole, strict=True):
        tokens = full["tokens"].tolist()
        ends = [t + 1 for t in range(len(tokens)) if stop in text(tokens[: t + 1])]
        length = ends[0] if ends else len(tokens)
        expected = {name: full[name][:length] for name in ("tokens", "logprobs", "versions")}
        reason = "stop" if ends else "length"
        assert_same([rollout], [full | expected | {"finish_reason": reason}])
    assert len(stopped[0]["tokens"]) < 200


def test_a_bad_word_is_not_sampled_and_its_probability_goes_to_the_others(engine, tiny):
    likeliest = tiny.logprobs(PROMPT)[-1, 33:127].argmax() + 33
    for rollout in engine.generate(n=4, bad_words=[chr(likeliest)]):
        tokens = rollout["tokens"].tolist()
        assert likeliest not in tokens
        logits_TV = tiny.logits([*PROMPT, *tokens])[len(PROMPT) - 1 : -1]
        logits_TV[:, likeliest] = -np.inf
        expected = chosen(normalized(logits_TV), tokens)
        np.testing.assert_allclose(rollout["logprobs"], expected, atol=1e-4)


def test_a_completion_matches_the_regex_and_ends_there(engine, tiny):
    """Each token's log-prob is among those that the expression allows at its place."""
    letters = list(range(ord("a"), ord("f") + 1))
    rollouts = engine.generate(n=8, regex="[a-f]{2,5}", max_new_tokens=20)
    for rollout in rollouts:
        *tokens, last = rollout["tokens"].tolist()
        assert re.fullmatch("[a-f]{2,5}", "".join(map(chr, tokens)))
        assert last == EOS and rollout["finish_reason"] == "stop"
        logits_TV = tiny.logits([*PROMPT, *tokens])[len(PROMPT) - 1 :]
        for place, row in enumerate(logits_TV):
            allowed = letters * (place < 5) + [EOS] * (place >= 2)
            row[np.setdiff1d(range(VOCAB), allowed)] = -np.inf
        expected = chosen(normalized(logits_TV), [*tokens, last])
        np.testing.assert_allclose(rollout["logprobs"], expected, atol=1e-4)
    assert len({len(rollout["tokens"]) for rollout in rollouts}) > 1


def test_a_completion_satisfies_the_json_schema(engine):
    schema = json.dumps({"enum": ["yes", "no", 42]})
    rollouts = engine.generate(n=8, json_schema=schema, max_new_tokens=20)
    answers = {"".join(map(chr, rollout["tokens"][:-1])) for rollout in rollouts}
    assert {json.loads(answer) for answer in answers} <= {"yes", "no", 42}
    assert {rollout["finish_reason"] for rollout in rollouts} == {"stop"}


def searched(model, beams, longest, stop):
    """All that a beam search of PROMPT ends with, the best first: worth, tokens."""
    live, ended = [(0.0, ())], []
    for _ in range(longest):
        after = [
            (total + row[token], (*tokens, int(token)))
            for total, tokens in live
            for row in [model.logprobs([*PROMPT, *tokens])[-1].astype(float)]
            for token in np.argsort(-row)[: 2 * beams]
        ]
        ended += [(total, tokens) for total, tokens in after if tokens[-1] in stop]
        live = sorted(((s, t) for s, t in after if t[-1] not in stop), reverse=True)[:beams]
    whole = [(s / (len(PROMPT) + len(t) - (t[-1] in stop)), t) for s, t in ended + live]
    return sorted(whole, reverse=True)


def test_a_beam_search_finds_what_one_over_transformers_finds(engine, tiny):
    stop = [36]  # makes the three best of three lengths
    search = {"temperature": 0.0, "n": 3, "beams": 4, "max_new_tokens": 12, "stop_tokens": stop}
    found = engine.generate(**search)
    expected = searched(tiny, 4, 12, stop)[:3]
    assert [tuple(c["tokens"].tolist()) for c in found] == [tokens for _, tokens in expected]
    for rank, completion in enumerate(found):
        logprobs = reference_logprobs(tiny, PROMPT, completion["tokens"], 1.0)
        np.testing.assert_allclose(completion["logprobs"], logprobs, atol=1e-4)
        assert set(completion["versions"].tolist()) == {engine.version}
        ends = completion["tokens"][-1] in stop
        assert completion["finish_reason"] == ("stop" if ends else "length")
        assert completion["seed"] == 5 + rank
    assert {c["finish_reason"] for c in found} == {"stop", "length"}
    assert_same(engine.generate(**search), found)


def test_a_wide_beam_search_finds_the_best_of_all_completions(engine, tiny):
    first = tiny.logprobs(PROMPT)[-1]
    ended, length = first[EOS] / len(PROMPT), len(PROMPT) + 2
    worth = {(EOS,): ended}
    for token in set(range(VOCAB)) - {EOS}:
        after = first[token] + tiny.logprobs([*PROMPT, token])[-1]
        worth |= {(token, last): after[last] / (length - (last == EOS)) for last in range(VOCAB)}
    search = {"temperature": 0.0, "beams": 64, "max_new_tokens": 2, "stop_tokens": [EOS]}
    (found,) = engine.generate(**search)
    assert tuple(found["tokens"].tolist()) == max(worth, key=worth.get)


def test_a_beam_search_that_meets_new_weights_begins_anew(engine, other):
    search = {"temperature": 0.0, "n": 2, "beams": 3, "max_new_tokens": 150}
    version = engine.stage(other)
    before = engine.call("poll", 0.0)["tokens"]
    engine.submit(search=search, cancelled=search | {"max_new_tokens": 490})
    engine.poll_until(lambda report: report["tokens"] > before + 12)
    engine.call("commit", version)
    found = engine.ends("search")["search"]["completions"]
    assert {int(v) for completion in found for v in completion["versions"]} == {version}
    engine.call("cancel", ["cancelled"])
    tokens = [engine.call("poll", 0.3)["tokens"]]
    while len(tokens) < 2 or tokens[-1] > tokens[-2]:
        tokens.append(engine.call("poll", 0.3)["tokens"])
    assert tokens[-1] < tokens[0] + 60  # it would be a thousand
    assert_same(found, engine.generate(**search))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"n": 5}, "as many as completions"),
        ({"beams": 65}, "64 at most"),
        ({"temperature": 1.0}, "draws nothing"),
        ({"repetition_penalty": 1.1}, "draws nothing"),
        ({"stop_strings": ["x"]}, "draws nothing"),
    ],
)
def test_a_beam_search_is_refused_what_it_does_not_go_with(engine, options, why):
    search = {"temperature": 0.0, "beams": 4} | options
    with pytest.raises(RequestRefused, match=why):
        engine.generate(**search)


def test_every_token_carries_its_version(engine):
    (rollout,) = engine.generate()
    assert rollout["versions"].dtype == np.int64
    assert rollout["versions"].tolist() == [engine.version] * len(rollout["tokens"])


def test_a_request_asks_for_a_version_or_a_newer_one(engine):
    (rollout,) = engine.generate(version=engine.version - 1)
    assert set(rollout["versions"].tolist()) == {engine.version}
    newer = engine.version + 1
    with pytest.raises(StaleVersion, match=f"version {newer}, .*{engine.version}"):
        engine.generate(version=newer)


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
        ({"min_p": -0.1}, "min_p"),
        ({"regex": "("}, "RequestRefused: engine-0: .*regex"),
        ({"json_schema": '{"type": 3}'}, "RequestRefused: engine-0: .*Grammar"),
        ({"regex": "a", "json_schema": "{}"}, "only use one kind"),
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
    work = {"version": staged}
    for method, arguments in [("score", [TEXT]), ("generate", [work]), ("poll", [60.0])]:
        with pytest.raises(EngineDead, match="engine-0 is not running"):
            engine.call(method, *arguments)
