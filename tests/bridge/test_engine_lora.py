"""Adapters on a real engine, against transformers with the same adapter merged by hand in torch."""

import copy
import dataclasses
import itertools

import numpy as np
import pytest

from bridge.channels.shuttle import ShuttleChannel
from bridge.engines.vllm import EngineDead, EngineError, EngineSettings
from tests.bridge.conftest import VOCAB, TinyModel, packed
from tests.bridge.forked_engine import ForkedEngines
from tests.bridge.test_engine_families import assert_serves, make, publish

pytest.importorskip("vllm")
pytest.importorskip("transformers")

RANK, ALPHA = 6, 10  # no rank that vLLM has, and a scale that is no power of two
TEXT = [int(t) for t in np.random.default_rng(0).integers(0, VOCAB, 200)]  # more than a cache block
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
TARGETS = {
    "qwen3": ["q_proj", "v_proj", "down_proj"],  # parts of what vLLM fuses
    "llama3": ATTENTION + MLP,
    "gemma2": ATTENTION + MLP,
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
}


class Adapter(TinyModel):
    """Random, and large enough to see; `model` has it merged."""

    def __init__(self, base, targets, seed):
        import torch

        generator = torch.Generator().manual_seed(seed)
        self.tensors = {}
        super().__init__(base.directory, copy.deepcopy(base.model))
        for name, module in self.model.named_modules():
            if name.split(".")[-1] in targets:
                rows, columns = module.weight.shape
                a = 0.1 * torch.randn(RANK, columns, generator=generator)
                b = 0.1 * torch.randn(rows, RANK, generator=generator)
                module.weight.data += ALPHA / RANK * b @ a
                self.tensors[f"base_model.model.{name}.lora_A.weight"] = a
                self.tensors[f"base_model.model.{name}.lora_B.weight"] = b

    def state(self):
        return self.tensors


def settings_for(targets):
    peft = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": targets,
        "bias": "none",
    }
    return EngineSettings(
        dtype="float32",
        max_model_len=512,
        max_num_seqs=8,
        kv_cache_bytes=64 << 20,
        enforce_eager=True,
        lora=peft,
    )


@pytest.fixture(scope="module")
def engines():
    engines = ForkedEngines()
    yield engines
    engines.close()


@pytest.fixture
def channel(tmp_path):
    return ShuttleChannel(tmp_path / "channel")


@pytest.fixture
def base(tmp_path):
    return make("qwen3", 0, tmp_path / "model")


def request(version, **changes):
    return {
        "tokens": TEXT[:5],
        "n": 1,
        "max_new_tokens": 8,
        "temperature": 1.0,
        "stop_tokens": [],
        "seed": 5,
        "version": version,
    } | changes


def stage(engine, channel, model, version):
    """Stages a version that is not committed."""
    ticket = channel.publish(*packed(model, version))
    engine.call("stage", ticket.to_json(), model.expected(), 20.0)


@pytest.mark.parametrize("family", TARGETS)
def test_adapters_take_each_others_place_on_frozen_weights(engines, channel, tmp_path, family):
    """The same prompt each time, so that a cached prefix of the version before would show."""
    targets = TARGETS[family]
    base = make(family, 0, tmp_path / "model")
    versions = [base, *(Adapter(base, targets, seed) for seed in (1, 2, 3))]
    scores = [version.scores(TEXT) for version in versions]
    assert min(np.abs(a - b).max() for a, b in itertools.pairwise(scores)) > 1
    with engines.engine(settings_for(targets), base.files()) as engine:
        for number, version in enumerate(versions, start=1):
            loaded = publish(engine, channel, version, number)
            assert loaded["version"] == number and loaded["tensors"] == len(version.state())
            assert_serves(engine, version, number, TEXT)


def test_what_cannot_be_loaded_is_refused_and_what_serves_stays(engines, channel, base):
    targets = TARGETS["qwen3"]
    adapter, other = Adapter(base, targets, 1), Adapter(base, targets, 2)
    misplaced = Adapter(base, targets, 3)
    name = "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"
    misplaced.tensors[name] = next(iter(misplaced.tensors.values()))
    with engines.engine(settings_for(targets), base.files()) as engine:
        with pytest.raises(EngineError, match="version 1 is an adapter, and there are no weights"):
            publish(engine, channel, adapter, 1)
        publish(engine, channel, base, 2)
        with pytest.raises(EngineError, match=rf"1 tensors have no place in the model: {name}$"):
            publish(engine, channel, misplaced, 3)
        assert_serves(engine, base, 2)
        publish(engine, channel, adapter, 4)
        with pytest.raises(EngineError, match=r"version 5 has the model's weights, .*frozen"):
            publish(engine, channel, base, 5)
        stage(engine, channel, other, 6)
        engine.call("abort_update")
        assert_serves(engine, adapter, 4)
        stage(engine, channel, adapter, 7)
        publish(engine, channel, other, 8)
        assert_serves(engine, other, 8)


def test_a_rollout_across_adapters_is_labelled_token_by_token(engines, channel, base):
    """From the weights alone to the first adapter, where a batch could have been mixed."""
    adapter = Adapter(base, TARGETS["qwen3"], 1)
    with engines.engine(settings_for(TARGETS["qwen3"]), base.files()) as engine:
        publish(engine, channel, base, 1)
        stage(engine, channel, adapter, 2)
        during = ("generate", request(1, n=4, max_new_tokens=400))
        rollouts, loaded = engine.call_during(0.4, during, "commit", 2)
    assert loaded["version"] == 2
    for rollout in rollouts:
        tokens, versions = rollout["tokens"].tolist(), rollout["versions"]
        switch = int((versions == 1).sum())
        assert versions.tolist() == [1] * switch + [2] * (400 - switch)
        rows = [model.logprobs([*TEXT[:5], *tokens])[4:-1] for model in (base, adapter)]
        labelled = zip(versions, tokens, strict=True)
        expected = [rows[v - 1][t][token] for t, (v, token) in enumerate(labelled)]
        np.testing.assert_allclose(rollout["logprobs"], expected, atol=1e-3)
    assert any(0 < (rollout["versions"] == 1).sum() < 400 for rollout in rollouts)


def test_an_engine_without_adapters_refuses_one(engines, channel, base):
    settings = dataclasses.replace(settings_for([]), lora=None)
    with engines.engine(settings, base.files()) as engine:
        publish(engine, channel, base, 1)
        with pytest.raises(EngineError, match=r"takes none; set EngineSettings\.lora"):
            publish(engine, channel, Adapter(base, ["q_proj"], 1), 2)
        assert_serves(engine, base, 1)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen3", {"r": 513}, "rank 513: vLLM takes at most 512"),
        ("qwen3", {"use_dora": True}, "DoRA"),
        ("qwen3-moe", {}, "no adapters for a mixture of experts"),
    ],
)
def test_adapters_that_vllm_does_not_have_are_refused_at_the_start(
    engines, tmp_path, family, changes, message
):
    base = make(family, 0, tmp_path / "model")
    settings = settings_for(["q_proj"])
    settings = dataclasses.replace(settings, lora=settings.lora | changes)
    with pytest.raises(EngineDead, match=message), engines.engine(settings, base.files()):
        pass
