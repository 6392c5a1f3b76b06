"""The programs of a run, compiled for a target from shapes alone."""

import dataclasses
import re
import time
from typing import Any

import numpy as np

from bridge.wire import ITEM_BYTES
from jaxrl.config import Config
from jaxrl.models.config import DecoderConfig
from jaxrl.models.params import ParamSpec, param_specs, trained_specs, tree_of
from jaxrl.models.params import Path as LeafPath
from jaxrl.types import Group, Prompt, Rollout, TrainBatch, UserError
from tools.plan.hlo import Cost, Program
from tools.plan.topology import GIB, Target

_TOO_LARGE = re.compile(r"RESOURCE_EXHAUSTED")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One program on one device, in bytes."""

    seconds: float  # of compilation
    arguments: int
    outputs: int
    aliased: int  # outputs that take the place of arguments
    temporaries: int
    code: int
    cost: Cost
    xla_flops: float  # as XLA reports them: the bodies of loops once

    @property
    def peak(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class TooLarge:
    """XLA gave up: the program does not fit the device's memory."""

    seconds: float
    wanted: int | None  # bytes that it named
    message: str


class Refused(UserError):
    """The compiler cannot make the program, whatever the memory: no run on the target can."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """Everything that is lowered, as shapes, dtypes and shardings."""

    config: Config
    target: str  # its name
    decoder: DecoderConfig
    specs: dict[LeafPath, ParamSpec]  # of the whole policy
    trained: dict[LeafPath, ParamSpec]  # of what trains
    mesh: Any
    state: Any
    frozen: Any
    batch: TrainBatch  # of numpy arrays, one minibatch: every prompt and completion at its limit
    policy: Any


def prepare(c: Config, decoder: DecoderConfig, target: Target) -> Setup:
    import jax
    import jax.numpy as jnp

    from jaxrl.learner import FROZEN_DTYPE, lora_config, make_policy
    from jaxrl.mesh import make_mesh, param_shardings, row_shards
    from jaxrl.update import abstract_state, make_optimizer

    lora = lora_config(c)
    specs, trained = param_specs(decoder), trained_specs(decoder, lora)
    mesh = make_mesh(c.mesh, target.devices)

    def abstract(specs: dict[LeafPath, ParamSpec], dtype: str) -> Any:
        return jax.tree.map(
            lambda spec, sharding: jax.ShapeDtypeStruct(
                spec.shape, jnp.dtype(dtype), sharding=sharding
            ),
            tree_of(specs),
            param_shardings(specs, mesh),
        )

    policy = make_policy(c, decoder, mesh)
    state = abstract_state(abstract(trained, "float32"), make_optimizer(c.optimizer), mesh)
    if c.algorithm.reference_every:
        dtype = str(policy.compute_dtype) if lora is None else "float32"
        state = state._replace(reference=abstract(trained, dtype))
    return Setup(
        c,
        target.name,
        decoder,
        specs,
        trained,
        mesh,
        state,
        {} if lora is None else abstract(specs, FROZEN_DTYPE),
        largest_batch(c, row_shards(mesh), decoder.key_cost),
        policy,
    )


def largest_batch(c: Config, shards: int, key_cost: float) -> TrainBatch:
    """What `jaxrl.packing` makes of the largest minibatch of a step in which every prompt and
    completion is at its limit."""
    from jaxrl.packing import pack

    new = c.rollout.max_new_tokens
    rollout = Rollout(
        np.zeros(new, np.int32), np.zeros(new, np.float32), np.zeros(new, np.int64), "length", 0
    )
    prompt = Prompt(0, "", (0,) * c.data.max_prompt_tokens, {})
    prompts = -(-c.rollout.prompts_per_step // c.algorithm.minibatches)
    groups = [Group(prompt, (rollout,) * c.rollout.group_size)] * prompts
    ones = np.ones((prompts, c.rollout.group_size), np.float32)
    return pack(groups, ones, ones, c.update, shards, key_cost)


def compile_update(setup: Setup, target: Target) -> Compiled | TooLarge:
    import jax

    from jaxrl.mesh import batch_sharding
    from jaxrl.objectives.tokens import Anchors
    from jaxrl.update import make_optimizer, make_step

    c, mesh = setup.config, setup.mesh
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(mesh, x.ndim)),
        setup.batch,
    )
    step = make_step(
        setup.policy,
        make_optimizer(c.optimizer),
        c.algorithm,
        c.update,
        c.rollout.temperature,
        mesh,
        setup.state,
    )
    scores = batch.behavior_logprobs_BC  # as those of policies that stand still are, and lie
    anchors = Anchors(
        scores if c.algorithm.scores_first else None,
        scores if c.algorithm.kl_coefficient else None,
    )
    lowered = step.lower(setup.state, batch, setup.frozen, anchors)
    return _compile(lowered, f"{setup.target}: the update")


def compile_export(setup: Setup) -> Compiled | TooLarge:
    """The part of a publish that runs on the devices, of its largest bucket."""
    from bridge.export import Exporter

    c, params = setup.config, setup.state.params
    exporter = Exporter(setup.trained, c.wire_dtype, c.publish.bucket_mib << 20)
    largest = max(exporter.plan, key=lambda group: group.nbytes)
    program = exporter.program(largest, params)
    lowered = program.lower(*exporter.inputs(largest, params))
    return _compile(lowered, f"{setup.target}: the export")


def version_bytes(setup: Setup) -> int:
    """Of a device: what it keeps of a version to take differences from, its parts of the tensors in
    the wire's layout and dtype (`bridge.compare`). Not their padding: up to 128 KiB a bucket."""
    import jax

    from bridge.export import Exporter

    c, params = setup.config, setup.state.params
    exporter = Exporter(setup.trained, c.wire_dtype, c.publish.bucket_mib << 20)
    elements = 0
    for group in exporter.plan:
        program = exporter.program(group, params, gather=False)
        made = jax.eval_shape(program, *exporter.inputs(group, params))
        elements += sum(exporter.layout(made, setup.mesh).sizes)
    return ITEM_BYTES[c.wire_dtype] * elements


def _compile(lowered: Any, what: str = "the program") -> Compiled | TooLarge:
    """Raises Refused, with `what` it is, for any reason of XLA's but the memory."""
    import jax

    started = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        message = str(error).strip()
        if not _TOO_LARGE.search(message):
            raise Refused(
                f"{what} cannot be compiled, here or in a run; change what XLA names, or the mesh: "
                f"{message.partition(chr(10))[0]}"
            ) from None
        return TooLarge(time.perf_counter() - started, _wanted(message), message)
    seconds = time.perf_counter() - started
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    return Compiled(
        seconds,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.generated_code_size_in_bytes,
        Program(compiled.as_text()).cost(),
        float(cost.get("flops", 0.0)),
    )


def _wanted(message: str) -> int | None:
    """Bytes, of "required for HLO temporaries (16.42G)" or "Used 19.20G of 15.75G hbm"."""
    found = re.search(r"(?:temporaries \(|Used )([\d.]+)([KMGT])", message)
    if found is None:
        return None
    return int(float(found[1]) * GIB * {"K": 2**-20, "M": 2**-10, "G": 1, "T": 2**10}[found[2]])
