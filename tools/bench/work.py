"""A step of GRPO on a fixed work, and its parts: seconds, tokens/s, FLOP/s, memory."""

import dataclasses
import functools
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.advantages import estimate_advantages
from jaxrl.config import AlgorithmSection, MeshSection, OptimizerSection, UpdateSection
from jaxrl.logprobs import token_logprobs
from jaxrl.mesh import make_mesh, param_shardings
from jaxrl.models.config import DecoderConfig, load_config
from jaxrl.models.decoder import Policy, init_params
from jaxrl.models.params import param_specs
from jaxrl.packing import pack, usable_tokens
from jaxrl.sampler import InProcessEngine
from jaxrl.types import Group, Prompt, Rollout, Sampling, TrainBatch
from jaxrl.update import init_state, make_optimizer, make_update

# What is timed, and what else to say of it: values, or functions to call at the end.
Case = tuple[Callable[[], Any], dict[str, Any]]

MATMUL = 2048  # rows and columns of the product that the machine is measured by
SIZES = {
    "s": {"hidden_size": 256, "num_layers": 4, "num_heads": 8, "num_kv_heads": 4}
    | {"intermediate_size": 768},
    "m": {"hidden_size": 512, "num_layers": 8, "num_heads": 16, "num_kv_heads": 8}
    | {"intermediate_size": 1536},
}


class Work(NamedTuple):
    size: str
    prompts: int
    prompt_tokens: int
    group: int
    new: int
    ragged: bool
    mesh: MeshSection

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return self._asdict() | {"mesh": self.mesh.model_dump()}

    @property
    def model(self) -> DecoderConfig:
        """Qwen3's architecture, a vocabulary of 512, head_dim 32, tied embeddings."""
        common = {"vocab_size": 512, "head_dim": 32, "qk_norm": "head", "tied_embeddings": True}
        demo = load_config(Path(__file__).parents[2] / "configs" / "tiny_policy")
        positions = max(self.prompt_tokens + self.new, demo.max_positions)
        return dataclasses.replace(demo, **common, **SIZES[self.size], max_positions=positions)

    def lengths(self) -> np.ndarray:
        """Sampled tokens of each completion, [P, G]."""
        shape = (self.prompts, self.group)
        if not self.ragged:
            return np.full(shape, self.new)
        return np.random.default_rng(1).integers(1, self.new + 1, shape)

    def asked(self) -> list[Prompt]:
        rng = np.random.default_rng(0)
        tokens = rng.integers(1, 512, (self.prompts, self.prompt_tokens)).tolist()
        return [Prompt(i, "", tuple(prompt), {}) for i, prompt in enumerate(tokens)]

    def groups(self) -> list[Group]:
        rng = np.random.default_rng(2)

        def rollout(length: int) -> Rollout:
            tokens = rng.integers(1, 512, length).astype(np.int32)
            logprobs = np.full(length, -np.log(512), np.float32)
            return Rollout(tokens, logprobs, np.zeros(length, np.int64), "length", 0)

        return [
            Group(prompt, tuple(map(rollout, lengths)))
            for prompt, lengths in zip(self.asked(), self.lengths().tolist(), strict=True)
        ]

    def flops(self, passes: int) -> float:
        """Of one completion a row, nothing shared, attention to the whole row: what is usually
        counted. `passes` 1 is forward, 3 with the gradient."""
        c, sampled = self.model, self.lengths()
        specs = param_specs(c)
        body = sum(int(np.prod(s.shape)) for path, s in specs.items() if path[0] == "layers")
        tokens = sampled + self.prompt_tokens
        attention = 4 * c.num_heads * c.head_dim * c.num_layers * (tokens**2).sum()
        head = 2 * c.vocab_size * c.hidden_size * sampled.sum()
        return float(passes * (2 * body * tokens.sum() + head + attention))


def bench(what: str, work: Work, repeat: int) -> dict[str, Any]:
    """Prints a table, and returns its numbers."""
    run, facts = {"train": _train, "sample": _sample, "logprobs": _logprobs, "step": _step}[what](
        work
    )
    start = time.perf_counter()
    run()
    first = time.perf_counter() - start
    seconds, rates = [], []
    for _ in range(repeat):
        rates.append(matmul_rate())
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    median, rate = statistics.median(seconds), statistics.median(rates)
    record = {
        "what": what,
        **work.record(),
        "seconds": median,
        "seconds_all": seconds,
        "first_s": first,
        "tokens_per_s": int(work.lengths().sum()) / median,
        "matmul_flops_per_s": rate,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        **{name: fact() if callable(fact) else fact for name, fact in facts.items()},
    }
    if "flops" in record:
        record["flops_per_s"] = record["flops"] / median
        record["share_of_matmul"] = record["flops_per_s"] / rate
    _print(record)
    return record


def _print(record: dict[str, Any]) -> None:
    spread = f"{min(record['seconds_all']):.3f} to {max(record['seconds_all']):.3f}"
    shape = f"{record['prompts']} x {record['prompt_tokens']} tokens, {record['group']} completions"
    lines = {
        "work": f"{record['what']}, size {record['size']}, {shape} of "
        + f"{'1 to ' if record['ragged'] else ''}{record['new']}",
        "median": f"{record['seconds']:.4f} s ({spread}); the first, with compilation, "
        f"{record['first_s']:.1f} s",
        "sampled tokens": f"{record['tokens_per_s']:,.0f} /s",
    }
    if "flops" in record:
        lines["FLOPs"] = (
            f"{record['flops'] / 1e9:.1f} G, {record['flops_per_s'] / 1e9:.0f} GFLOP/s = "
            f"{record['share_of_matmul']:.2f} of a plain product's "
            f"{record['matmul_flops_per_s'] / 1e9:.0f}"
        )
    for name in ("rows", "rollout_s", "update_s"):
        if name in record:
            lines[name] = str(record[name])
    lines["peak memory"] = f"{record['peak_rss_bytes'] / 2**30:.2f} GiB"
    for name, text in lines.items():
        print(f"{name:16s} {text}")


@functools.cache
def _product() -> tuple[Callable, jax.Array]:
    return jax.jit(lambda a: a @ a), jnp.ones((MATMUL, MATMUL), jnp.float32)


def matmul_rate(times: int = 3) -> float:
    """FLOP/s of a square float32 product: the yardstick of this machine, at this moment."""
    run, a = _product()
    run(a).block_until_ready()
    start = time.perf_counter()
    for _ in range(times):
        run(a).block_until_ready()
    return times * 2 * MATMUL**3 / (time.perf_counter() - start)


def _policy(work: Work) -> tuple[Policy, Any]:
    """On its mesh, with random parameters."""
    mesh, specs = make_mesh(work.mesh), param_specs(work.model)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    shardings = param_shardings(specs, mesh)
    start = jax.jit(functools.partial(init_params, specs), out_shardings=shardings)
    policy = Policy(work.model, jnp.float32, "none" if on_cpu else "full", mesh=mesh)
    return policy, start(jax.random.key(0))


class Learner:
    """What `jaxrl.train` builds, from random weights."""

    def __init__(self, work: Work) -> None:
        self.policy, params = _policy(work)
        mesh, self.section = self.policy.mesh, UpdateSection()
        assert mesh is not None
        optimizer = make_optimizer(OptimizerSection())
        self.state = init_state(params, optimizer, mesh)
        self._update = make_update(
            self.policy, optimizer, AlgorithmSection(), self.section, 1.0, mesh, self.state
        )
        self.rows, self._row_shards = "", work.mesh.row_shards

    def pack(
        self, groups: list[Group], advantages_PG: np.ndarray, weights_PG: np.ndarray
    ) -> TrainBatch:
        """See `packing.pack`; for this mesh."""
        key_cost = self.policy.config.key_cost
        return pack(groups, advantages_PG, weights_PG, self.section, self._row_shards, key_cost)

    def update(self, groups: list[Group]) -> None:
        """Rewards are random: what is learned does not matter here."""
        rewards_PG = np.random.default_rng(3).random((len(groups), len(groups[0].rollouts)))
        advantages = estimate_advantages(
            rewards_PG.astype(np.float32),
            usable_tokens(groups, rewards_PG.shape[1]),
            AlgorithmSection(),
        )
        batch = self.pack(groups, *advantages)
        self.rows = "{} x {}".format(*batch.tokens_BT.shape)
        self.state, metrics = self._update(self.state, [batch])
        jax.block_until_ready((self.state, metrics))


def _train(work: Work) -> Case:
    learner, groups = Learner(work), work.groups()
    facts = {"flops": work.flops(3), "rows": lambda: learner.rows}
    return lambda: learner.update(groups), facts


def _sample(work: Work) -> Case:
    policy, params = _policy(work)
    engine = InProcessEngine(policy)
    engine.publish(params, 1)
    return functools.partial(_generate, work, engine), {}


def _generate(work: Work, engine: InProcessEngine) -> list[Group]:
    sampling = Sampling(work.group, work.new, 1.0, ())
    return engine.generate(work.asked(), sampling, list(range(0, 8 * work.prompts, 8)))


def _logprobs(work: Work) -> Case:
    policy, params = _policy(work)
    rows, length = work.prompts * work.group, work.prompt_tokens + work.new
    tokens_BT = np.random.default_rng(0).integers(1, 512, (rows, length)).astype(np.int32)

    @jax.jit
    def score(params: Any) -> jax.Array:
        hidden_BTD = policy.hidden_of_rows(params, tokens_BT)[:, work.prompt_tokens - 1 : -1]
        unembed = functools.partial(policy.unembed, params)
        return token_logprobs(hidden_BTD, unembed, tokens_BT[:, work.prompt_tokens :], 1.0)[0]

    return lambda: jax.block_until_ready(score(params)), {"flops": work.flops(1)}


def _step(work: Work) -> Case:
    learner = Learner(work)
    engine = InProcessEngine(learner.policy)
    seconds: dict[str, list[float]] = {"rollout_s": [], "update_s": []}
    versions = iter(range(1, 10_000))
    engine.publish(learner.state.params, next(versions))
    lengths = work.lengths()

    def run() -> None:
        start = time.perf_counter()
        groups = _generate(work, engine)
        if work.ragged:
            groups = [
                Group(group.prompt, tuple(map(_cut, group.rollouts, wanted)))
                for group, wanted in zip(groups, lengths.tolist(), strict=True)
            ]
        sampled = time.perf_counter()
        learner.update(groups)
        engine.publish(learner.state.params, next(versions))
        seconds["rollout_s"].append(sampled - start)
        seconds["update_s"].append(time.perf_counter() - sampled)

    def median(name: str) -> Callable[[], float]:
        return lambda: round(statistics.median(seconds[name][1:]), 4)

    return run, {name: median(name) for name in seconds} | {"rows": lambda: learner.rows}


def _cut(rollout: Rollout, length: int) -> Rollout:
    tokens, logprobs, versions = (
        x[:length] for x in (rollout.tokens, rollout.logprobs, rollout.versions)
    )
    return Rollout(tokens, logprobs, versions, "length", rollout.seed)
