"""From what is compiled to times and sizes. The formulas are in docs/plan.md."""

import dataclasses
import math

import numpy as np

from bridge.names import hf_tensors
from bridge.wire import ITEM_BYTES
from jaxrl.config import Config
from jaxrl.models.config import DecoderConfig
from jaxrl.models.params import ParamSpec
from jaxrl.models.params import Path as LeafPath
from jaxrl.types import TrainBatch
from tools.plan.hlo import Collective, Cost, axes_of
from tools.plan.topology import Chip


@dataclasses.dataclass(frozen=True)
class ModelFlops:
    """Of one update, over all devices: what the mathematics needs, nothing computed twice."""

    matrices: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        return self.matrices + self.attention + self.head


def model_flops(
    decoder: DecoderConfig,
    specs: dict[LeafPath, ParamSpec],
    trained: dict[LeafPath, ParamSpec],
    batch: TrainBatch,
) -> ModelFlops:
    """2 FLOPs a token for each active weight forward, 2 for the gradient of its input, and 2 for
    its own where it trains; attention over the tokens that each one sees; the head for sampled
    tokens only. A token that is padding needs none.
    """
    real = batch.group_BT > 0
    tokens, sampled = int(real.sum()), int(batch.loss_mask_BC.sum())
    whole = not specs.keys() - trained.keys()
    adapters = 0 if whole else sum(math.prod(spec.shape) for spec in trained.values())
    factor = 6 if whole else 4
    body = sum(
        active_weights(path, spec, decoder)
        for path, spec in specs.items()
        if path[0] not in ("embed", "lm_head")
    )
    head = decoder.vocab_size * decoder.hidden_size
    seen = batch.positions_BT[real].astype(np.int64) + 1
    near = np.minimum(seen, decoder.sliding_window or seen)
    sliding = sum(decoder.sliding) if decoder.sliding else 0
    pairs = sliding * int(near.sum()) + (decoder.num_layers - sliding) * int(seen.sum())
    return ModelFlops(
        float(tokens) * (factor * body + 6 * adapters),
        12.0 * pairs * decoder.num_heads * decoder.head_dim,
        float(factor) * sampled * head,
    )


def active_weights(path: LeafPath, spec: ParamSpec, decoder: DecoderConfig) -> int:
    """Weights of a leaf that one token is multiplied with: of experts, those it is sent to."""
    size = math.prod(spec.shape)
    if "norm" in "/".join(path) or path[-1].endswith("_bias") or path[-1] == "sinks":
        return 0
    if decoder.moe is not None and "experts" in spec.axes:
        return size * decoder.moe.experts_per_token // decoder.moe.num_experts
    return size


@dataclasses.dataclass(frozen=True)
class Traffic:
    """All collectives of one kind over the same mesh axes."""

    kind: str
    axes: tuple[str, ...]
    overlapped: bool
    count: int
    bytes: int  # gathered, reduced or received by a device, in all
    wire_bytes: float  # sent by a device, in all
    seconds: float | None
    largest: str  # op_name of the one that moves most

    @property
    def over(self) -> str:
        return "+".join(self.axes) or "one device"


def traffic(
    collectives: tuple[Collective, ...], axes: dict[str, int], chip: Chip | None
) -> list[Traffic]:
    """Largest first. Seconds: each ring of a mesh axis has one link in both directions."""
    sorted_: dict[tuple, list[Collective]] = {}
    for one in collectives:
        crossed = axes_of(one.groups, list(axes), list(axes.values())) or tuple(
            axis for axis, size in axes.items() if size > 1
        )
        sorted_.setdefault((one.kind, crossed, one.overlapped), []).append(one)
    found = []
    for (kind, crossed, overlapped), members in sorted_.items():
        wire = sum(one.count * one.wire_bytes for one in members)
        ways = 1 if kind == "collective-permute" else 2
        found.append(
            Traffic(
                kind,
                crossed,
                overlapped,
                sum(one.count for one in members),
                sum(one.count * one.bytes for one in members),
                wire,
                None if chip is None else wire / (ways * chip.link_bandwidth),
                max(members, key=lambda one: one.count * one.wire_bytes).where,
            )
        )
    return sorted(found, key=lambda one: -one.wire_bytes)


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of an update if every unit ran at its peak: no step is shorter."""

    compute: float
    memory: float
    overlapped: float  # collectives that other work can hide
    exposed: float  # collectives that nothing hides

    @property
    def step(self) -> float:
        return max(self.compute, self.memory, self.overlapped) + self.exposed

    @property
    def bound(self) -> str:
        terms = {
            "compute": self.compute,
            "HBM": self.memory,
            "interconnect": self.overlapped + self.exposed,
        }
        return max(terms, key=lambda name: terms[name])


def roofline(cost: Cost, collectives: list[Traffic], chip: Chip) -> Roofline:
    return Roofline(
        (cost.matmul_flops + cost.kernel_flops) / chip.flops,
        cost.hbm_bytes / chip.hbm_bandwidth,
        sum(one.seconds or 0.0 for one in collectives if one.overlapped),
        sum(one.seconds or 0.0 for one in collectives if not one.overlapped),
    )


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Bytes."""

    parameters: int  # how many, not bytes
    active_parameters: int  # of them, what one token meets
    publish: int  # of one version
    publish_once: int  # with adapters, the frozen weights, ahead of the first version
    checkpoint: int
    batch: int
    host: int  # of the driver: what a step holds at the most, beside Python and libraries
    kv_token: int  # of one token in an engine's cache
    kv_engine: int  # of all completions that an engine decodes at a time, at full length


def sizes(
    c: Config,
    decoder: DecoderConfig,
    specs: dict[LeafPath, ParamSpec],
    trained: dict[LeafPath, ParamSpec],
    state_bytes: int,
    batch: TrainBatch,
) -> Sizes:
    def wire(specs: dict[LeafPath, ParamSpec], dtype: str) -> int:
        return ITEM_BYTES[dtype] * sum(math.prod(t.shape) for t in hf_tensors(specs).values())

    packed = c.algorithm.minibatches * sum(array.nbytes for array in batch)
    publish = wire(trained, c.wire_dtype)
    versions = c.publish.keep_versions if c.rollout.engine == "vllm" else 0
    kv = 2 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim
    kv *= ITEM_BYTES[c.engine_dtype]
    longest = c.data.max_prompt_tokens + c.rollout.max_new_tokens
    return Sizes(
        sum(math.prod(spec.shape) for spec in specs.values()),
        sum(
            active_weights(path, spec, decoder)
            for path, spec in specs.items()
            if path[0] != "embed" or decoder.tied_embeddings
        ),
        publish,
        wire(specs, "bfloat16") if specs.keys() - trained.keys() else 0,
        state_bytes,
        packed,
        # What the channel keeps alive (in shared memory, or files), and what is on its way there.
        publish * (1 + versions + (c.publish.encoding == "delta")) + packed,
        kv,
        kv * longest * c.vllm.max_num_seqs,
    )


# Of the bytes of a bfloat16 version, as a difference where 1 % of its values changed
# (docs/benchmarks.md, Deltas).
DELTA_SHARE = 0.006


@dataclasses.dataclass(frozen=True)
class Pools:
    """Trainer and engines, per step."""

    train_s: float  # update and publish
    rollout_s: float | None  # None: the engines' speed was not given
    tokens: int  # sampled
    completions: int
    engines: int
    engine_tokens_per_s: float | None

    @property
    def needed_tokens_per_s(self) -> float:
        """Of the pool, for a trainer that never waits while rollouts overlap updates."""
        return self.tokens / self.train_s

    @property
    def needed_engines(self) -> int | None:
        if self.engine_tokens_per_s is None:
            return None
        return math.ceil(self.needed_tokens_per_s / self.engine_tokens_per_s)

    def idle(self, max_lag: int) -> tuple[float, float, float] | None:
        """(seconds of a step, idle share of the trainer, idle share of the engines)."""
        if self.rollout_s is None:
            return None
        alternate = max_lag == 0
        cycle = self.rollout_s + self.train_s if alternate else max(self.rollout_s, self.train_s)
        return cycle, 1 - self.train_s / cycle, 1 - self.rollout_s / cycle


def publish_seconds(c: Config, nbytes: float, link_gbps: float | None) -> float | None:
    """To bring so many bytes over the trainer's one link to each engine, on a machine of its own;
    None if the link is not known."""
    engines = c.vllm.max_engines if c.rollout.engine == "vllm" else 1
    return None if link_gbps is None else engines * nbytes / (link_gbps * 125e6)


def pools(c: Config, step_s: float, publish_s: float, engine_tokens_per_s: float | None) -> Pools:
    completions = c.completions_per_step
    tokens = completions * c.rollout.max_new_tokens
    engines = c.vllm.max_engines if c.rollout.engine == "vllm" else 1
    rollout = tokens / (engines * engine_tokens_per_s) if engine_tokens_per_s else None
    return Pools(step_s + publish_s, rollout, tokens, completions, engines, engine_tokens_per_s)
