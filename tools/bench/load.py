"""A version into a running vLLM engine, beside vLLM's own reload of the same tensors from files."""

import logging
import tempfile
from pathlib import Path
from typing import Any, cast

import ray

from bridge.channels.object_store import ObjectStoreChannel
from bridge.channels.shuttle import ShuttleChannel
from bridge.encoding import Encoder, Shadow
from bridge.engines.vllm import EngineSettings, VllmEngine, actor_environment
from bridge.export import Exporter
from bridge.names import expected_tensors
from jaxrl.models.params import param_specs
from tools.bench.publish import DTYPE, Trained, line, make_model, plain_copy, send, timed

_TIMEOUT_S = 600.0
_SETTINGS = EngineSettings(
    max_model_len=1024,
    max_num_seqs=8,
    kv_cache_bytes=1 << 30,
    enforce_eager=True,
    load_format="auto",  # of an engine that began without weights vLLM reloads none
)
_REQUEST = {  # sampled while versions arrive
    "tokens": [1, 2, 3],
    "n": 4,
    "max_new_tokens": 1000,
    "temperature": 1.0,
    "stop_tokens": [],
    "seed": 0,
    "version": 0,
}


class ReloadingEngine(VllmEngine):
    """An engine that can also do what vLLM does by itself."""

    async def reload(self, directory: str) -> None:
        await self._llm.collective_rpc("reload_weights", kwargs={"weights_path": directory})


def bench_load(gigabytes: float, repeat: int) -> None:
    """Prints seconds and GB/s of stage, load and pause, while completions are being sampled."""
    with tempfile.TemporaryDirectory(prefix="jaxrl-bench-") as folder:
        config = make_model(Path(folder), gigabytes)
        specs = param_specs(config)
        exporter, params = Exporter(specs, DTYPE), Trained(specs)
        shuttle = ShuttleChannel(Path(folder))
        send(exporter.groups(params.now), exporter, shuttle, Encoder("full"), Shadow(), 0)
        model = Path(folder) / "v00000000"
        (Path(folder) / "config.json").rename(model / "config.json")
        ray.init(
            address="local",
            num_cpus=2,
            object_store_memory=4 * exporter.nbytes + (1 << 28),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        environment = {"env_vars": actor_environment(cpu=True)}
        actor = ray.remote(ReloadingEngine).options(runtime_env=environment, max_concurrency=8)
        engine = cast(Any, actor).remote("engine", _SETTINGS, str(model))
        _call(engine.start.remote())
        engine.generate.remote(_REQUEST)
        _measure(engine, exporter, params, expected_tensors(specs, DTYPE), str(model), repeat)
        ray.shutdown()


def _measure(
    engine: Any, exporter: Exporter, params: Trained, expected: Any, model: str, repeat: int
) -> None:
    channel, encoder, shadow = ObjectStoreChannel(), Encoder("full"), Shadow()
    seconds: dict[str, list[float]] = {"stage": [], "load": [], "pause": [], "vLLM's reload": []}
    nbytes, copy, copies = exporter.nbytes, plain_copy(exporter.nbytes), []
    for version in range(1, repeat + 2):
        params.update()
        _, ticket = send(exporter.groups(params.now), exporter, channel, encoder, shadow, version)
        copies.append(timed(copy))
        staged = _call(engine.stage.remote(ticket, expected, _TIMEOUT_S))
        loaded = _call(engine.commit.remote(version))
        own = timed(lambda: _call(engine.reload.remote(model)))
        taken = (staged["stage_s"], loaded["load_s"], loaded["pause_s"], own)
        for phase, value in zip(seconds, taken, strict=True):
            seconds[phase].append(value)
    print(f"{nbytes / 1e9:.2f} GB of {DTYPE}, one engine")
    for phase, taken in seconds.items():  # one round to warm up
        line(phase, taken[1:], nbytes, copies[1:])
    channel.close()


def _call(reference: Any) -> Any:
    return ray.get(reference, timeout=_TIMEOUT_S)
