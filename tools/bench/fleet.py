"""The fleet on this machine: beside vLLM's own batch API, with prompts shared and not, with engines
that are lost, in each mode of a run, and with 64 engines that sample nothing."""

import functools
import heapq
import json
import os
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np

from bridge.engines.vllm import EngineSettings, actor_environment
from bridge.fleet import Fleet, FleetSettings
from bridge.schedule import Rank, Schedule
from jaxrl.types import Prompt, Request, RunError, Sampling

_DEMO = Path(__file__).parents[2] / "configs" / "tiny_policy"
_LAYERS = {"num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 768}
_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
_POSITIONS = {"max_position_embeddings": 2048}
_SETTINGS = EngineSettings(
    dtype="float32",
    max_model_len=2048,
    max_num_seqs=64,
    kv_cache_bytes=512 << 20,
    enforce_eager=True,
    load_format="auto",
)
_TIMEOUT_S = 600.0
_SILENCE_S = 5.0
_MODES = {"synchronous": 0, "overlap": 1, "continuous": 2}  # with their max_lag
_RUN_STEPS, _WARM_UP = 14, 4
_ENGINES, _SEQS, _REQUESTS = 64, 256, 40_000


class Bare:
    """vLLM's batch API with the settings of our engines. A Ray actor."""

    def __init__(self, directory: str, prefix_caching: bool) -> None:
        from vllm import LLM

        self._llm: Any = LLM(
            directory,
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=_SETTINGS.max_model_len,
            max_num_seqs=_SETTINGS.max_num_seqs,
            kv_cache_memory_bytes=_SETTINGS.kv_cache_bytes,
            enforce_eager=True,
            enable_prefix_caching=prefix_caching,
            enable_chunked_prefill=False,
            max_num_batched_tokens=2048,
            logprobs_mode="processed_logprobs",
        )

    def generate(self, prompts: list[list[int]], n: int, new: int) -> int:
        """Samples; returns how many tokens."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = [
            SamplingParams(
                n=n,
                seed=n * i,
                max_tokens=new,
                ignore_eos=True,
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            for i in range(len(prompts))
        ]
        asked: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self._llm.generate(asked, params, use_tqdm=False)
        return sum(len(c.token_ids) for output in outputs for c in output.outputs)


def bench_fleet(repeat: int) -> None:
    """Prints a table of each; see the module."""
    scheduling()
    with tempfile.TemporaryDirectory(prefix="jaxrl-bench-") as folder:
        model = write_model(Path(folder) / "model")
        with _fleet(model) as fleet:
            beside_vllm(fleet, model, repeat)
        recovery(model)
        modes(Path(folder), model)


def write_model(directory: Path) -> Path:
    """Qwen3's architecture, 4 layers of 256, from random weights, with the demo's tokenizer."""
    import jax

    from bridge.checkpoints import save_model
    from bridge.export import Exporter
    from jaxrl.models.config import load_config
    from jaxrl.models.decoder import init_params
    from jaxrl.models.params import param_specs

    shutil.copytree(_DEMO, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    raw = json.loads((_DEMO / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(raw | _LAYERS | _HEADS | _POSITIONS))
    specs = param_specs(load_config(directory))
    params = init_params(specs, jax.random.key(0))
    save_model(Exporter(specs, "float32")(params), directory, directory)
    return directory


@contextmanager
def _fleet(model: Path, engines: int = 1, **settings: Any) -> Iterator[Fleet]:
    """Engines that serve what they loaded from `model`, late ones too."""
    fleet = Fleet(
        FleetSettings(min_engines=engines, max_engines=engines, **settings),
        _SETTINGS,
        str(model),
        [],
    )
    fleet.newcomers = lambda name: fleet.admit(name, 0)
    fleet.start()
    try:
        fleet.wait_ready()
        for name in fleet.members():
            fleet.admit(name, 0)
        yield fleet
    finally:
        fleet.close()


def beside_vllm(fleet: Fleet, model: Path, repeat: int) -> None:
    """The same prompts by vLLM's batch API, then long ones, with its prefix cache switched off."""
    import ray

    actor = ray.remote(Bare).options(runtime_env={"env_vars": actor_environment(cpu=True)})
    for text, prompt_tokens, count, new, caching in (
        ("vLLM's batch API", 16, 32, 128, True),
        ("no shared prompts", 1000, 8, 16, False),
    ):
        bare = cast(Any, actor).remote(str(model), caching)
        rng = np.random.default_rng(prompt_tokens)
        rounds: dict[str, list[float]] = {text: [], "fleet": []}
        for round_ in range(repeat + 1):
            # New prompts in each round: what the round before left in the cache is of no use.
            asked = rng.integers(3, 16, (count, prompt_tokens)).tolist()
            sample = functools.partial(_sample, fleet, asked, new, round_)
            batch = functools.partial(
                lambda *a, on: ray.get(on.generate.remote(*a), timeout=_TIMEOUT_S),
                asked,
                8,
                new,
                on=bare,
            )
            for name, run in {text: batch, "fleet": sample}.items():
                start = time.perf_counter()
                tokens = run()
                rounds[name].append(tokens / (time.perf_counter() - start))
        ray.kill(bare)
        what = f"{count} prompts of {prompt_tokens} tokens, 8 completions of {new}"
        medians = {name: statistics.median(rates[1:]) for name, rates in rounds.items()}
        print(what)
        for name, rate in medians.items():
            print(f"  {name:20s} {rate:9,.0f} tokens/s  {rate / medians[text]:5.2f} x")


def _sample(fleet: Fleet, prompts: list[list[int]], new: int, round_: int) -> int:
    sampling = Sampling(8, new, 1.0, ())
    asked = [Prompt(i, "", tuple(tokens), {}) for i, tokens in enumerate(prompts)]
    futures = fleet.submit([Request(p, sampling, 8 * p.id + round_) for p in asked])
    groups = [future.result(_TIMEOUT_S) for future in futures]
    return sum(len(rollout.tokens) for group in groups for rollout in group.rollouts)


def recovery(model: Path) -> None:
    """One of two engines is killed, then one stopped, while both sample."""
    for deed in (signal.SIGKILL, signal.SIGSTOP):
        with _fleet(model, engines=2, silence_s=_SILENCE_S) as fleet:
            _lose_one(fleet, deed)


def _lose_one(fleet: Fleet, deed: signal.Signals) -> None:
    pids = {info["name"]: info["pid"] for info in fleet.wait_ready()}
    victim = fleet.serving[0]
    asked = [Prompt(i, "", (5, 6, 7, 8), {}) for i in range(256)]
    sampling = Sampling(8, 128, 1.0, ())
    futures = fleet.submit([Request(prompt, sampling, 8 * prompt.id) for prompt in asked])
    futures[0].result(_TIMEOUT_S)
    start = time.perf_counter()
    os.kill(pids[victim], deed)
    noticed_s = _seconds_until(lambda: victim not in fleet.alive, start)
    elsewhere_s = _seconds_until(lambda: fleet.status()["fleet/requeued"] > 0, start)
    back_s = _seconds_until(lambda: len(fleet.serving) == 2, start)
    (other,) = (info for info in fleet.wait_ready() if info["name"].startswith(f"{victim}."))
    groups = [future.result(_TIMEOUT_S) for future in futures]
    lost = sum(len(group.rollouts) != sampling.n for group in groups)
    print(
        f"{deed.name}: noticed after {noticed_s:.1f} s, its requests were others' after "
        f"{elsewhere_s:.1f} s, the one in its place served after {back_s:.1f} s, of which vLLM's "
        f"start took {other['seconds']:.1f} s; {lost} of {len(groups)} groups lost"
    )


def _seconds_until(true: Callable[[], bool], start: float) -> float:
    while not true():
        if time.perf_counter() - start > _TIMEOUT_S:
            raise RunError(f"the fleet did not recover within {_TIMEOUT_S:g} s")
        time.sleep(0.02)
    return time.perf_counter() - start


def modes(folder: Path, model: Path) -> None:
    """Runs whose devices sleep in each update until that takes as long as sampling."""
    data = folder / "data.jsonl"
    rows = [{"prompt": f"{i % 9}+{i % 7}=", "answer": str(i)} for i in range(4096)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    alone = _run(folder, model, data, "alone", "synchronous", 0.0)
    sleep_s = _median(alone, "time/rollout_s")
    print(f"a step of {_RUN_STEPS - _WARM_UP}, with an update that sleeps for {sleep_s:.2f} s")
    runs = {mode: _run(folder, model, data, mode, mode, sleep_s) for mode in _MODES}
    apart = runs["synchronous"]
    longer_s = max(_median(apart, "time/rollout_s"), _median(apart, "time/update_s"))
    for mode, steps in runs.items():
        step_s, lag = _median(steps, "time/step_s"), statistics.mean(s["lag/mean"] for s in steps)
        print(
            f"  {mode:12s} {step_s:6.2f} s  {step_s / longer_s:5.2f} x the longer   lag {lag:.2f}"
        )


def _run(
    folder: Path, model: Path, data: Path, name: str, mode: str, sleep_s: float
) -> list[dict[str, float]]:
    """The metrics of the steps of a run, those that warm up left out."""
    from jaxrl import train

    config = {
        "run": {"name": name, "dir": str(folder / "runs"), "steps": _RUN_STEPS},
        "model": {"path": str(model)},
        "data": {"source": "jsonl", "path": str(data), "held_out": 0, "max_prompt_tokens": 16},
        "reward": {"kind": "exact"},
        "rollout": {
            "mode": mode,
            "max_lag": _MODES[mode],
            "prompts_per_step": 16,
            "group_size": 8,
            "max_new_tokens": 128,
        },
        "vllm": {
            "gpus_per_engine": 0,
            "enforce_eager": True,
            "kv_cache_mib": 256,
            "max_num_seqs": 64,
        },
        "algorithm": {"mask_equal_rewards": False},
        "eval": {"every_steps": 0},
        "checkpoint": {"every_steps": _RUN_STEPS},
        "log": {"tensorboard": False},
    }
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(config))  # which YAML reads too
    build = train.build_learner
    train.build_learner = lambda *args: _asleep(build(*args), sleep_s)
    try:
        if code := train.main(["--config", str(file)]):
            raise RunError(f"the run {name} ended with {code}")
    finally:
        train.build_learner = build
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines][_WARM_UP:]


def _asleep(learner: Any, seconds: float) -> Any:
    """The learner, whose devices do nothing for so many seconds in each update."""
    import dataclasses

    import jax
    import jax.numpy as jnp

    def wait() -> np.ndarray:
        time.sleep(seconds)
        return np.zeros((), np.int32)

    @functools.partial(jax.jit, donate_argnums=0)
    def updated(state: Any) -> Any:
        zero = jax.pure_callback(wait, jax.ShapeDtypeStruct((), jnp.int32))
        params = jax.tree.map(lambda x: x + zero.astype(x.dtype), state.params)
        return state._replace(params=params, step=state.step + 1)

    return dataclasses.replace(learner, update=lambda state, batch: (updated(state), {}))


def _median(steps: Sequence[dict[str, float]], name: str) -> float:
    return statistics.median(step[name] for step in steps)


def scheduling() -> None:
    """Engines that are events: each samples a completion in as many seconds as its length says.
    What is timed is the scheduler alone."""
    schedule, rng = Schedule(), np.random.default_rng(0)
    names = [f"engine-{i}" for i in range(_ENGINES)]
    for name in names:
        schedule.join(name, _SEQS)
    for i in range(_REQUESTS):
        schedule.add(str(i), 8, 0, Rank.NEXT)
    lengths_s = rng.lognormal(0.0, 0.7, _REQUESTS)
    serving = dict.fromkeys(names, 0)
    sampled_s = dict.fromkeys(names, 0.0)
    ends: list[tuple[float, str, str]] = []
    now = spent = 0.0
    left = _REQUESTS

    def timed(call: Callable[[], Any]) -> Any:
        nonlocal spent
        start = time.perf_counter()
        result = call()
        spent += time.perf_counter() - start
        return result

    while left:
        for engine, given in timed(lambda: schedule.assign(serving)).items():
            for request in given:
                heapq.heappush(ends, (now + lengths_s[int(request)], engine, request))
        now, engine, request = heapq.heappop(ends)
        timed(functools.partial(schedule.done, request))
        timed(functools.partial(schedule.said, engine, 8 * len(schedule.has(engine))))
        sampled_s[engine] += lengths_s[int(request)]
        left -= 1
    loads = np.array(list(sampled_s.values()))
    most, least = loads.max() / loads.mean() - 1, loads.min() / loads.mean() - 1
    print(
        f"{_ENGINES} engines, {8 * _REQUESTS:,} completions: {1e6 * spent / (8 * _REQUESTS):.1f} us"
        f" each; the engine with the most work had {most:+.1%}, that with the least {least:+.1%}"
    )
