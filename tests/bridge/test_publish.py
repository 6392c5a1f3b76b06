"""What is served is what was trained: real params on a mesh, real channels, real engines."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bridge.channels.object_store import ObjectStoreChannel
from bridge.channels.shuttle import ShuttleChannel
from bridge.checkpoints import save_model
from bridge.encoding import Encoder
from bridge.export import Exporter
from bridge.fleet import Fleet, FleetSettings
from bridge.names import expected_tensors
from bridge.publisher import Publisher
from jaxrl.config import MeshSection
from jaxrl.mesh import make_mesh, param_shardings
from jaxrl.model_dir import engine_files
from jaxrl.models.config import load_config
from jaxrl.models.decoder import Policy, init_params
from jaxrl.models.params import param_specs
from jaxrl.sampler import make_score
from jaxrl.types import Prompt, Sampling
from tests.bridge.forked_engine import ForkedEngines

PROBES = [[5, 9, 100, 3, 3, 64, 1], [0] * 12, list(range(20, 60))]
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "eos_token_id": 7,
    "dtype": "float32",
}


def random_params(decoder, specs, seed):
    """Sharded over a real mesh, and wide enough that two seeds are whole nats apart."""
    shardings = param_shardings(specs, make_mesh(MeshSection(data=2, fsdp=2, tensor=2)))
    params = jax.tree.map(lambda x: jnp.where(x == 1.0, x, 8 * x), init_params(specs, seed))
    return jax.tree.map(jax.device_put, params, shardings)


def ready(settings, model, expected) -> Fleet:
    fleet = Fleet(
        FleetSettings(cpus_per_engine=1, gpus_per_engine=0, start_timeout_s=240),
        settings,
        model,
        expected,
    )
    fleet.start()
    return fleet


def scores(fleet: Fleet) -> list[np.ndarray]:
    (name,) = fleet.serving
    return [fleet.score(name, probe, 60.0) for probe in PROBES]


@pytest.fixture(scope="module")
def engines():
    engines = ForkedEngines()
    yield engines
    engines.close()


@pytest.mark.parametrize(
    ("dtype", "tied"), [("float32", True), ("bfloat16", False)], ids=["float32-tied", "bf16-untied"]
)
def test_after_every_publish_the_engine_is_a_fresh_engine_of_the_exported_directory(
    tied, dtype, tmp_path, ray_cluster, engine_settings, engines
):
    source, exported = tmp_path / "source", tmp_path / "exported"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({**CONFIG, "tie_word_embeddings": tied}))
    decoder = load_config(source)
    specs = param_specs(decoder)
    a, b = (random_params(decoder, specs, jax.random.key(seed)) for seed in (0, 1))
    # A step moves a few values a little.
    some = jax.jit(lambda key, x: jnp.where(jax.random.uniform(key, x.shape) < 0.02, x * 1.05, x))
    c = jax.tree.map(functools.partial(some, jax.random.key(2)), a)
    export = Exporter(specs, dtype, bucket_bytes=1 << 16)
    score = make_score(Policy(decoder, jnp.float32))
    save_model(export(a), source, exported)

    expected = expected_tensors(specs, dtype)
    settings = dataclasses.replace(engine_settings, dtype=dtype)
    running = ready(settings, engine_files(source), expected)
    warnings = []
    try:
        loading = dataclasses.replace(settings, load_format="auto")
        with engines.engine(loading, str(exported)) as fresh:
            of_fresh = [fresh.call("score", probe) for probe in PROBES]
        running.wait_ready()

        def publisher(channel, encoding):
            return Publisher(
                export,
                channel,
                running,
                score,
                probe=PROBES[0],
                probe_tolerance=1e-4 if dtype == "float32" else 1.0,
                encoder=Encoder(encoding),
                warn=warnings.append,
            )

        store = publisher(ObjectStoreChannel(keep_versions=2), "delta")
        shuttle = publisher(ShuttleChannel(tmp_path / "weights", keep_versions=2), "full")
        plan = [(store, a, 3), (store, b, 4), (shuttle, a, 5), (shuttle, b, 8), (store, a, 9)]
        for through, params, version in plan:
            report = through.publish(params, version)
            assert (report.version, report.engines) == (version, 1)
            assert list(report.phases) == ["ship", "stage", "load", "prove"]
            assert 0 < report.pause_s < report.phases["load"] <= report.seconds
            served = scores(running)
            if params is a:
                for ours, theirs in zip(served, of_fresh, strict=True):
                    np.testing.assert_array_equal(ours, theirs)
            else:  # and the publishes between really changed what is served
                assert max(np.abs(o - t).max() for o, t in zip(served, of_fresh, strict=True)) > 0.5
            if dtype == "float32":
                for probe, ours in zip(PROBES, served, strict=True):
                    np.testing.assert_allclose(ours, score(params, probe), atol=1e-4)
        small = store.publish(c, 10)
        of_small = scores(running)
        assert small.base == 9 and small.bytes < 0.1 * export.nbytes
        whole = shuttle.publish(c, 11)
        assert whole.base is None and whole.bytes == export.nbytes
        assert whole.digest == small.digest != report.digest
        for ours, theirs in zip(of_small, scores(running), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert store.publish(a, 12).digest == report.digest  # behind 10, which it holds no more
        assert not warnings

        prompt = Prompt(0, "", tuple(PROBES[0]), {})
        (group,) = running.generate([prompt], Sampling(2, 6, 1.0, (7,)), [11])
        for rollout in group.rollouts:
            assert set(rollout.versions.tolist()) == {12}
            if dtype == "float32":
                whole = [*prompt.tokens, *rollout.tokens.tolist()]
                trainer = score(a, whole)[len(prompt.tokens) :]
                np.testing.assert_allclose(rollout.logprobs, trainer, atol=1e-4)
    finally:
        running.close()


def test_an_engine_of_another_dtype_joins_a_run_and_serves_what_the_first_serves(
    tmp_path, ray_cluster, engine_settings
):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "tie_word_embeddings": True}))
    decoder = load_config(tmp_path)
    specs = param_specs(decoder)
    a, b, c = (random_params(decoder, specs, jax.random.key(seed)) for seed in range(3))
    mixed = [dataclasses.replace(engine_settings, dtype=d) for d in ("float32", "bfloat16")]
    fleet = ready(mixed, engine_files(tmp_path), expected_tensors(specs, "float32"))
    score = make_score(Policy(decoder, jnp.float32))
    warnings = []
    publisher = Publisher(
        Exporter(specs, "float32", bucket_bytes=1 << 16),
        ObjectStoreChannel(keep_versions=1),
        fleet,
        score,
        probe=PROBES[0],
        probe_tolerance=1.0,
        encoder=Encoder("delta"),
        warn=warnings.append,
    )
    try:
        fleet.wait_ready()
        assert publisher.publish(a, 1).engines == 1
        fleet.add()
        assert publisher.publish(b, 2).outcomes.keys() == {"engine-0"}  # nobody waits for it
        assert fleet.wait_members() == ["engine-1"] and fleet.serving == ["engine-0"]
        publisher.welcome("engine-1")  # it begins with version 1, which 2 is a difference from
        assert fleet.serving == ["engine-0", "engine-1"] and fleet.holds("engine-1") == 2
        report = publisher.publish(c, 3)
        assert report.base == 2 and report.engines == 2 and not warnings
        assert {outcome.digest for outcome in report.outcomes.values()} == {report.digest}
        exact, rounded = (fleet.score(name, PROBES[2], 60.0) for name in fleet.serving)
        np.testing.assert_allclose(exact, score(c, PROBES[2]), atol=1e-4)
        np.testing.assert_allclose(rounded, exact, atol=1.0)
        assert np.abs(rounded - exact).max() > 1e-3  # it does run in bfloat16
    finally:
        fleet.close()
