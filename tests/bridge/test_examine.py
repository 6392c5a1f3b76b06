"""What an examination finds in real engines whose loader was made to go wrong."""

import dataclasses
import functools
import time
from types import SimpleNamespace

import numpy as np
import pytest

from tests.bridge.conftest import make_tiny

pytest.importorskip("vllm")
pytest.importorskip("transformers")

import torch

from bridge.channels.shuttle import ShuttleChannel
from bridge.engines.vllm import EngineError, EngineSettings
from bridge.wire import HostTensor, pack
from tests.bridge.forked_engine import ForkedEngines
from tests.bridge.test_engine_families import make, publish
from tests.bridge.test_engine_lora import Adapter, request, settings_for, stage

SELF_ATTN = "model.layers.{}.self_attn.{}_proj.weight"
MLP = "model.layers.{}.mlp.{}_proj.weight"
EXPERT = "model.layers.{}.mlp.experts.{}.{}_proj.weight"


def trade(first, second):
    def spoil(tensors):
        return tensors | {first: tensors[second], second: tensors[first]}

    return spoil


def change(name, edit):
    def spoil(tensors):
        tensor = tensors[name].clone()
        changed = edit(tensor)
        return tensors | {name: tensor if changed is None else changed}

    return spoil


def scale_row(tensor):
    tensor[37] *= 1.01


def scale_last(tensor):
    tensor[-1] *= 1.01


def one_ulp(tensor):
    """In bfloat16, which float32 engines have too."""
    tensor[5] = torch.nextafter(tensor[5].bfloat16(), torch.tensor(99.0).bfloat16())


def trade_columns(tensor):
    tensor[:, [3, 60]] = tensor[:, [60, 3]]


NORM = "model.layers.1.post_attention_layernorm.weight"
SPOILT = {  # what the loader does -> (how, the tensors that are wrong then)
    "nothing wrong": (dict, []),
    "k for v": (
        trade(SELF_ATTN.format(0, "k"), SELF_ATTN.format(0, "v")),
        [SELF_ATTN.format(0, "k"), SELF_ATTN.format(0, "v")],
    ),
    "gate of another layer": (
        trade(MLP.format(0, "gate"), MLP.format(1, "gate")),
        [MLP.format(0, "gate"), MLP.format(1, "gate")],
    ),
    "rows in another order": (
        change(SELF_ATTN.format(1, "o"), lambda tensor: tensor.flip(0)),
        [SELF_ATTN.format(1, "o")],
    ),
    "two columns traded": (
        change(SELF_ATTN.format(1, "q"), trade_columns),
        [SELF_ATTN.format(1, "q")],
    ),
    "a row scaled": (change(MLP.format(0, "down"), scale_row), [MLP.format(0, "down")]),
    "one element of a norm": (change(NORM, one_ulp), [NORM]),
    "an embedding": (
        change("model.embed_tokens.weight", scale_last),
        ["model.embed_tokens.weight"],
    ),
    "half of q": (
        change(SELF_ATTN.format(0, "q"), lambda tensor: tensor.roll(64, 0)),
        [SELF_ATTN.format(0, "q")],
    ),
    "another expert": (
        trade(EXPERT.format(0, 3, "down"), EXPERT.format(0, 5, "down")),
        [EXPERT.format(0, 3, "down"), EXPERT.format(0, 5, "down")],
    ),
    "gate for up": (
        trade(EXPERT.format(2, 3, "gate"), EXPERT.format(2, 3, "up")),
        [EXPERT.format(2, 3, "gate"), EXPERT.format(2, 3, "up")],
    ),
    "a row of an expert": (
        change(EXPERT.format(2, 7, "up"), scale_row),
        [EXPERT.format(2, 7, "up")],
    ),
    "an adapter's b": (
        change(
            "base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight",
            lambda tensor: tensor.flip(0),
        ),
        ["base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight"],
    ),
    "an adapter's a": (
        change("base_model.model.model.layers.1.mlp.down_proj.lora_A.weight", one_ulp),
        ["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"],
    ),
}
DENSE = [*SPOILT][:9]
MOE = ["nothing wrong", "another expert", "gate for up", "a row of an expert"]
ADAPTER = ["nothing wrong", "an adapter's b", "an adapter's a"]


def spoil_loaders(order):
    """Has the loaders of this process, and of its children, do what the file `order` says."""
    from bridge.engines import weight_transfer

    load, repack = weight_transfer._load, weight_transfer._repack_tied_embeddings
    from_lora_tensors = weight_transfer.LoRAModel.from_lora_tensors
    first = {}

    def spoilt(tensors):
        first.setdefault(len(tensors), {name: tensor.clone() for name, tensor in tensors.items()})
        what = order.read_text()
        if what == "everything left behind":
            return first[len(tensors)]
        return SPOILT[what][0](tensors) if what in SPOILT else tensors

    def spoilt_load(model, tensors, direct):
        return load(model, list(spoilt(dict(tensors)).items()), direct)

    def spoilt_repack(model):
        if order.read_text() != "the old head":
            repack(model)

    def spoilt_adapter(number, tensors, *rest, **named):
        return from_lora_tensors(number, spoilt(tensors), *rest, **named)

    weight_transfer._load = spoilt_load
    weight_transfer._repack_tied_embeddings = spoilt_repack
    weight_transfer.LoRAModel.from_lora_tensors = spoilt_adapter


@pytest.fixture(scope="module")
def order(tmp_path_factory):
    path = tmp_path_factory.mktemp("examine") / "order"
    path.write_text("nothing wrong")
    return path


@pytest.fixture(scope="module")
def engines(order):
    engines = ForkedEngines(before=functools.partial(spoil_loaders, order))
    yield engines
    engines.close()


@pytest.fixture
def published(order, tmp_path):
    """Publishes a version by a loader that does as it is told; returns the examination."""
    channel = ShuttleChannel(tmp_path / "channel")
    versions = iter(range(1, 100))

    def published(engine, model, what):
        order.write_text(what)
        version = next(versions)
        publish(engine, channel, model, version)
        report = engine.call("examine", 60.0)
        assert report["version"] == version and report["unchecked"] == []
        assert report["exact"] + report["probed"] + len(report["wrong"]) == len(model.state())
        return report

    return published


@pytest.fixture
def settings():
    return EngineSettings(
        dtype="float32",
        max_model_len=512,
        max_num_seqs=4,
        kv_cache_bytes=64 << 20,
        enforce_eager=True,
    )


def assert_named(published, engine, model, spoilt):
    for what in spoilt:
        assert sorted(published(engine, model, what)["wrong"]) == sorted(SPOILT[what][1]), what


def test_what_a_loader_did_wrong_is_named(engines, settings, published, tiny, other):
    """A tied head included, which has its own copy of the embedding on CPU."""
    with engines.engine(settings, tiny.files()) as engine:
        with pytest.raises(EngineError, match="no weight version is held"):
            engine.call("examine", 60.0)
        assert_named(published, engine, tiny, DENSE)
        reasons = published(engine, tiny, "a row scaled")["wrong"]
        assert reasons[MLP.format(0, "down")].startswith("rows 37 are not what was sent (as packed")
        assert list(published(engine, other, "the old head")["wrong"]) == [
            "model.embed_tokens.weight"
        ]
        left = published(engine, other, "everything left behind")["wrong"]
        # All norms of the two are ones.
        assert left.keys() == {name for name in other.state() if "norm" not in name}


def test_each_rank_examines_its_own_part(engines, settings, published, tmp_path):
    """One head of keys and values, which both ranks hold, and an engine that rounds."""
    model, other = (
        make_tiny(tmp_path / f"model-{seed}", seed, tied=False, kv_heads=1) for seed in (0, 1)
    )
    settings = dataclasses.replace(settings, dtype="bfloat16", tensor_parallel=2)
    with engines.engine(settings, model.files()) as engine:
        assert_named(published, engine, model, DENSE)
        reasons = published(engine, model, "an embedding")["wrong"]
        assert reasons == {
            "model.embed_tokens.weight": "worker 1: rows 127 are not what was sent",
        }
        left = published(engine, other, "everything left behind")["wrong"]
        assert left.keys() == {name for name in other.state() if "norm" not in name}


def test_experts_are_told_apart(engines, settings, published, tmp_path):
    model = make("qwen3-moe", 0, tmp_path / "model")
    settings = dataclasses.replace(settings, dtype="bfloat16")
    with engines.engine(settings, model.files()) as engine:
        assert_named(published, engine, model, MOE)
        reasons = published(engine, model, "a row of an expert")["wrong"]
        assert reasons == {EXPERT.format(2, 7, "up"): "expert 7, rows 37 are not what was sent"}


def test_adapters_and_the_weights_beneath_them(engines, published, tmp_path):
    base = make("qwen3", 0, tmp_path / "model")
    targets = ["q_proj", "v_proj", "down_proj"]
    with engines.engine(settings_for(targets), base.files()) as engine:
        assert_named(published, engine, base, ["nothing wrong"])
        assert_named(published, engine, Adapter(base, targets, 1), ADAPTER)


def test_an_examination_during_a_rollout_and_one_that_is_late(
    engines, settings, published, order, tiny, other, tmp_path
):
    with engines.engine(settings, tiny.files()) as engine:
        assert_named(published, engine, tiny, ["nothing wrong"])
        during = ("generate", request(1, n=4, max_new_tokens=400))
        rollouts, report = engine.call_during(0.2, during, "examine", 60.0)
        assert report["version"] == 1 and not report["wrong"]
        assert {len(rollout["tokens"]) for rollout in rollouts} == {400}
        with pytest.raises(EngineError, match=r"version 1 was not examined within 0 s"):
            engine.call("examine", 0.0)
        stage(engine, ShuttleChannel(tmp_path / "other"), other, 2)
        with pytest.raises(EngineError, match="version 2 is staged beside the model"):
            engine.call("examine", 60.0)
        engine.call("abort_update")
        with pytest.raises(EngineError, match="version 2 is held, and was not loaded"):
            engine.call("examine", 60.0)


def test_an_examination_goes_on_where_it_stopped():
    from bridge.engines.examine import Examination

    model = torch.nn.Sequential(*(torch.nn.LayerNorm(4) for _ in range(3)))
    tensors = list(model.state_dict().items())
    wrong = dict(tensors)["1.weight"] + torch.tensor([0, 0, 1, 0])
    tensors = [*{**dict(tensors), "1.weight": wrong}.items(), ("4.weight", torch.ones(4))]
    examination = Examination(model, 7, tensors)
    steps = 1
    while (report := examination.work(0.0)) is None:
        steps += 1
    assert steps > len(tensors)
    assert (
        report
        == examination.work(0.0)
        == {
            "version": 7,
            "tensors": 7,
            "probed": [],
            "unchecked": ["4.weight"],
            "wrong": {"1.weight": "rows 2 are not what was sent"},
        }
    )


def test_no_two_columns_are_probed_alike():
    """Or a loader could trade them unseen."""
    from bridge.engines.examine import _vectors

    vectors = _vectors(4096)
    assert len(vectors.unique(dim=1).T) == 4096
    assert torch.equal(vectors, vectors.bfloat16().float()) and vectors.abs().max() < 2


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """(what loads weights in vLLM's process, holding version 1; the seconds that a fetch takes)."""
    from bridge import channels
    from bridge.engines import weight_transfer

    model = torch.nn.Sequential(torch.nn.LayerNorm(4), torch.nn.LayerNorm(4))
    settings = SimpleNamespace(parallel_config=None, model_config=None)
    worker = weight_transfer.BridgeWeightTransferEngine(
        SimpleNamespace(), settings, torch.device("cpu"), model
    )
    sent = [
        HostTensor(name, "float32", tuple(t.shape), t.detach().numpy().view(np.uint8).reshape(-1))
        for name, t in model.state_dict().items()
    ]
    ticket = ShuttleChannel(tmp_path).publish(*pack(1, sent, 1 << 20))
    takes, real = [0.0], channels.fetch

    def fetch(ticket, deadline_s):
        time.sleep(takes[0])
        return real(ticket, deadline_s)

    monkeypatch.setattr(channels, "fetch", fetch)
    expected = [[t.name, t.dtype, list(t.shape)] for t in sent]
    worker.receive_weights(weight_transfer.BridgeUpdateInfo(ticket.to_json(), 9.0, expected))
    worker.loaded, worker._staged = worker._staged.loaded(0.0), None
    worker._kept.release()
    return worker, takes


def test_decoding_goes_on_while_a_version_is_fetched_again_to_be_examined(worker):
    """From an object storage, all of it has to come once more."""
    worker, takes = worker
    takes[0] = 1.0  # longer than decoding may wait
    began = time.monotonic()
    worker.begin_examination(None, 30.0)
    assert not worker.found() and worker.examine(0.02) is None
    assert time.monotonic() - began < 0.9
    while not worker.found():
        time.sleep(0.01)
    while (report := worker.examine(0.02)) is None:
        pass
    worker.end_examination()
    assert (report["version"], report["wrong"], report["unchecked"]) == (1, {}, [])


def test_a_version_that_is_not_found_again_in_time_is_left_to_its_thread(worker):
    worker, takes = worker
    takes[0] = 5.0
    began = time.monotonic()
    worker.begin_examination(None, 0.1)
    assert worker.examine(0.02) is None
    receiver = worker._reread[0]
    worker.end_examination()
    assert time.monotonic() - began < 4 and worker._kept is not receiver and worker.found()
