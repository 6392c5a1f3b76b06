"""One optimizer step, compiled once for each batch shape: (state, batch) -> (state, metrics)."""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from jaxrl.config import AlgorithmSection, OptimizerSection, SftSection, UpdateSection
from jaxrl.logprobs import Scores, token_logprobs
from jaxrl.mesh import batch_sharding, keep_rows, partition, put_rows, replicated, row_shards
from jaxrl.models.attention import Packed
from jaxrl.models.decoder import Params, Policy
from jaxrl.models.lora import with_adapters
from jaxrl.objectives.objective import Metrics, Objective, make_objective
from jaxrl.objectives.tokens import NO_ANCHORS, Anchors
from jaxrl.optimizer import HOST, Optimizer
from jaxrl.packing import rows_of_microbatch
from jaxrl.types import TrainBatch, UserError


class TrainState(NamedTuple):
    """All that an update changes. Float32 master parameters, optimizer state sharded like them."""

    params: Params
    opt_state: Any
    step: jax.Array  # int32, updates tried, skipped ones included
    skipped_in_a_row: jax.Array  # int32, updates skipped since the last one that was applied
    reference: Params | None = None  # of algorithm.reference_every, as `make_copy` makes it


# Slots whose gradient a device computes at a time: enough to fill its matrix units, and on a CPU
# few enough for the activations to stay in its caches.
MICROBATCH, MICROBATCH_ON_CPU = 16384, 2048


COUNTED = ("update/skipped", "update/nonfinite")  # of all optimizer steps of a step


class Still(NamedTuple):
    """A policy that is not trained."""

    policy: Policy
    params: Params


Update = Callable[[TrainState, Sequence[TrainBatch]], tuple[TrainState, Metrics]]
Nll = Callable[[Params, TrainBatch], float]
Scorer = Callable[[Params, Params, TrainBatch], Scores]  # (params, frozen, batch)


def make_optimizer(c: OptimizerSection) -> Optimizer:
    """Global-norm clipping, then AdamW with linear warm-up (Loshchilov and Hutter, 1711.05101)."""

    def rate(count: Any) -> jax.Array:
        return c.learning_rate * jnp.minimum(1.0, (count + 1) / max(c.warmup_steps, 1))

    adamw = optax.adamw(
        rate,
        b1=c.beta1,
        b2=c.beta2,
        eps=c.eps,
        mu_dtype=c.first_moment_dtype,
        weight_decay=c.weight_decay,
    )
    return Optimizer(optax.clip_by_global_norm(c.max_grad_norm), adamw, rate, c.offload)


def init_state(params: Params, optimizer: Optimizer, mesh: Mesh) -> TrainState:
    """A fresh state around `params`, which lie on `mesh`; moments lie as their parameters do.

    Raises UserError if the devices do not reach the memory that moments are to lie in.
    """
    kinds = sorted(memory.kind for memory in mesh.devices.flat[0].addressable_memories())
    if optimizer.offload == "host" and HOST not in kinds:
        raise UserError(
            f"optimizer.offload = host needs {HOST} memory, and these devices "
            f"({jax.default_backend()}) reach {', '.join(kinds)}; set it to none"
        )
    replicated = NamedSharding(mesh, P())
    zero = jax.jit(lambda: jnp.zeros((), jnp.int32), out_shardings=replicated)()
    shardings = opt_state_shardings(params, optimizer, mesh)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings)(params)
    return TrainState(params, opt_state, zero, jnp.copy(zero))


def opt_state_shardings(params: Params, optimizer: Optimizer, mesh: Mesh) -> Any:
    """Each leaf that mirrors a parameter gets its sharding, in host memory if that is where moments
    lie; every other one is replicated."""

    def beside(param: jax.Array) -> Sharding:
        host = optimizer.offload == "host"
        return param.sharding.with_memory_kind(HOST) if host else param.sharding

    return optax.tree_map_params(
        optimizer,
        lambda _, param: beside(param),
        jax.eval_shape(optimizer.init, params),
        params,
        transform_non_params=lambda _: NamedSharding(mesh, P()),
    )


def abstract_state(params: Params, optimizer: Optimizer, mesh: Mesh) -> TrainState:
    """`init_state` without arrays: shapes, dtypes and shardings, for `params` that are so too."""
    replicated = NamedSharding(mesh, P())
    opt_state = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(optimizer.init, params),
        opt_state_shardings(params, optimizer, mesh),
    )
    count: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
    return TrainState(params, opt_state, count, count)


def make_update(
    policy: Policy,
    optimizer: Optimizer,
    algorithm: AlgorithmSection | SftSection,
    c: UpdateSection,
    temperature: float,
    mesh: Mesh,
    state: TrainState,
    frozen: Params | None = None,
    reference: Still | None = None,
) -> Update:
    """Returns update(state, minibatches) -> (state, metrics): `make_step` with one after the other,
    `algorithm.updates_per_batch` times. They are put on the mesh, their shapes are counted, and
    policies that stand still score all of them ahead of the first step. The state passed in is
    consumed. With `frozen` weights the state's parameters are adapters, and only they change. Of
    several processes each passes the rows that lie on its own devices (`mesh.rows_of_process`).

    The reference policy, where there is one, is `reference`; or that of the state, replaced every
    `algorithm.reference_every` calls; or that of the frozen weights alone, as adapters begin; or
    `state` as it is now, kept in the dtype that the policy computes in.

    Metrics: those of the last time over the minibatches, see `over_steps`; what is `COUNTED` is of
    all steps, and `update/compiled_shapes` are the shapes of batches, in this process.
    """
    step = make_step(policy, optimizer, algorithm, c, temperature, mesh, state)
    score = make_score_batch(policy, c, temperature, mesh)
    gather_metrics = jax.jit(over_steps, out_shardings=NamedSharding(mesh, P()))
    copy = make_copy(policy, state.params, frozen)
    whole = {} if frozen is None else frozen
    score_reference, still, beside = score, {}, whole
    if reference is not None:
        score_reference = make_score_batch(reference.policy, c, temperature, mesh)
        still, beside = reference.params, {}
    elif algorithm.kl_coefficient and not algorithm.reference_every and frozen is None:
        still = copy(state.params)
    shapes = set()

    def anchors(state: TrainState, batch: TrainBatch) -> Anchors:
        held = still if state.reference is None else state.reference
        return Anchors(
            score(state.params, whole, batch) if algorithm.scores_first else None,
            score_reference(held, beside, batch) if algorithm.kl_coefficient else None,
        )

    def update(state: TrainState, minibatches: Sequence[TrainBatch]) -> tuple[TrainState, Metrics]:
        shapes.update((batch.tokens_BT.shape, batch.targets_BC.shape) for batch in minibatches)
        refresh = False
        if algorithm.reference_every:  # of a state that the caller has waited for
            calls = int(state.step) // (len(minibatches) * algorithm.updates_per_batch) + 1
            refresh = calls % algorithm.reference_every == 0
        placed = [jax.tree.map(lambda x: put_rows(mesh, x), batch) for batch in minibatches]
        scored = [(batch, anchors(state, batch)) for batch in placed]
        found, counted = [], []
        for _ in range(algorithm.updates_per_batch):
            found = []
            for batch, held in scored:
                state, metrics = step(state, batch, whole, held)
                found.append(metrics)
            counted += [{name: metrics[name] for name in COUNTED} for metrics in found]
        metrics = found[0]
        if len(counted) > 1:
            metrics = gather_metrics(found, counted)
        if refresh:
            state = state._replace(reference=copy(state.params))
        return state, metrics | {"update/compiled_shapes": jnp.asarray(len(shapes))}

    return update


def over_steps(found: Sequence[Metrics], counted: Sequence[Metrics]) -> Metrics:
    """The metrics of one optimizer step after the other, as those of one, within a jitted function.

    The mean, where a step counts as often as it trains tokens; of a name that says min or max the
    extreme, of steps that train any; the sum of `tokens/trained`, and of what is `counted`.
    """
    tokens_N = jnp.stack([metrics["tokens/trained"] for metrics in found])
    shares_N = tokens_N / jnp.maximum(tokens_N.sum(), 1.0)

    def one(name: str) -> jax.Array:
        values_N = jnp.stack([metrics[name] for metrics in found])
        words = re.split("[/_]", name)
        if "max" not in words and "min" not in words:
            return (shares_N * values_N).sum()
        sign = 1.0 if "max" in words else -1.0
        most = jnp.where(tokens_N > 0, sign * values_N, -jnp.inf).max()
        return jnp.where(tokens_N.any(), sign * most, 0.0)

    sums = jax.tree.map(lambda *x: sum(x), *counted)
    return {name: one(name) for name in found[0]} | {"tokens/trained": tokens_N.sum()} | sums


def make_copy(policy: Policy, params: Params, frozen: Params | None) -> Callable[[Params], Params]:
    """Returns copy(params): what is kept of what trains as a reference, on the same devices and in
    memory of its own, as an update consumes its parameters. Adapters as they are, parameters in the
    dtype that the policy computes in."""
    dtype = policy.compute_dtype if frozen is None else jnp.float32
    return jax.jit(
        lambda params: jax.tree.map(lambda x: jnp.copy(x).astype(dtype), params),
        out_shardings=jax.tree.map(lambda x: x.sharding, params),
    )


def make_step(
    policy: Policy,
    optimizer: Optimizer,
    algorithm: AlgorithmSection | SftSection,
    c: UpdateSection,
    temperature: float,
    mesh: Mesh,
    state: TrainState,
) -> Any:
    """Returns the jitted step(state, batch, frozen, anchors) -> (state, metrics), which consumes
    its state; `.lower` compiles it ahead of time. The state that comes out lies as `state` does,
    that of step 100 as that of step 0; of `state` only shapes and shardings are read (see
    `abstract_state`).

    `frozen` holds the weights beside adapters, or is {}.

    Without proximal log-probs among `anchors` pi_old is the policy that is updated: ratios are 1,
    and what differs from the engine is left to `algorithm.correction`.

    An update whose loss or gradient is not finite is skipped: parameters and optimizer state stay
    bitwise as they were. So is one with nothing to train on; only the former is counted in
    `skipped_in_a_row` and `update/nonfinite`. Metrics: those of `make_objective`, and `loss`,
    `entropy`, `grad_norm` (before clipping), `update_norm`, `update_ratio` (to the norm of the
    parameters), `learning_rate`, `tokens/trained`, `update/skipped` and `update/nonfinite` (1 if it
    was).
    """
    objective = make_objective(algorithm)
    gradient = make_gradient(policy, objective, c, temperature, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, state)

    def step(
        state: TrainState, batch: TrainBatch, frozen: Params, anchors: Anchors = NO_ANCHORS
    ) -> tuple[TrainState, Metrics]:
        grads, scores = gradient(state.params, frozen, batch, anchors)
        # Of the whole batch, however its gradient was split.
        loss, metrics = objective(scores, batch, anchors)
        tokens = batch.loss_mask_BC.sum()
        grad_norm = optax.tree.norm(grads)
        # Clipped, a finite gradient gives finite moments and changes. To look at those as well
        # would keep the old and the new moments of all parameters at the same time.
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        apply = finite & (tokens > 0)
        learning_rate = optimizer.learning_rate(state.opt_state)
        param_norm = optax.tree.norm(state.params)
        params, opt_state, update_norm = optimizer.apply(
            grads, state.opt_state, state.params, apply, shardings.params
        )
        state = TrainState(
            params,
            opt_state,
            state.step + 1,
            jnp.where(apply, 0, state.skipped_in_a_row + ~finite),
            state.reference,
        )
        metrics |= {
            "loss": loss,
            "entropy": (scores[1] * batch.loss_mask_BC).sum() / jnp.maximum(tokens, 1.0),
            "grad_norm": grad_norm,
            "update_norm": jnp.where(apply, update_norm, 0.0),
            "update_ratio": jnp.where(apply, update_norm / param_norm, 0.0),
            "learning_rate": learning_rate,
            "tokens/trained": tokens,
            "update/skipped": 1.0 - apply,
            "update/nonfinite": 1.0 - finite,
        }
        return state, metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, NamedSharding(mesh, P())))


def make_gradient(
    policy: Policy,
    objective: Objective,
    c: UpdateSection,
    temperature: float,
    mesh: Mesh,
) -> Callable[[Params, Params, TrainBatch, Anchors], tuple[Params, Scores]]:
    """Returns gradient(params, frozen, batch, anchors): of the objective, and the scores that it
    was made of.

    One micro-batch after the other (update.max_tokens_per_microbatch), summed in float32.
    """
    shards, limit = row_shards(mesh), microbatch_tokens(c, mesh)
    score = make_scorer(policy, c, temperature, mesh)

    def loss_fn(
        params: Params, frozen: Params, batch: TrainBatch, anchors: Anchors
    ) -> tuple[jax.Array, Scores]:
        scores = score(params, frozen, batch)
        return objective(scores, batch, anchors)[0], scores

    of_part = jax.grad(loss_fn, has_aux=True)

    def gradient(
        params: Params, frozen: Params, batch: TrainBatch, anchors: Anchors = NO_ANCHORS
    ) -> tuple[Params, Scores]:
        B, T = batch.tokens_BT.shape
        rows = rows_of_microbatch(B, T, limit, shards)
        if rows == B:
            return of_part(params, frozen, batch, anchors)

        def add(total: Params, part: tuple[TrainBatch, Anchors]) -> tuple[Params, Scores]:
            grads, scores = of_part(params, frozen, *part)
            return jax.tree.map(jnp.add, total, grads), scores

        parts = jax.tree.map(lambda x: split(x, B // rows, shards), (batch, anchors))
        total, scores = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), parts)
        return total, jax.tree.map(lambda x: joined(x, shards), scores)

    return gradient


def make_nll(policy: Policy, c: UpdateSection, mesh: Mesh, frozen: Params | None = None) -> Nll:
    """Returns nll(params, batch): the negative log-likelihood of its trained tokens, summed, in
    nats at temperature 1. Of several processes each passes its rows, and gets the whole sum."""
    score = make_score_batch(policy, c, 1.0, mesh)

    @jax.jit
    def total(params: Params, frozen: Params, batch: TrainBatch) -> jax.Array:
        return -jnp.where(batch.loss_mask_BC > 0, score(params, frozen, batch), 0.0).sum()

    def nll(params: Params, batch: TrainBatch) -> float:
        batch = jax.tree.map(lambda x: put_rows(mesh, x), batch)
        return float(replicated(total(params, frozen or {}, batch)))

    return nll


def make_score_batch(
    policy: Policy, c: UpdateSection, temperature: float, mesh: Mesh
) -> Callable[[Params, Params, TrainBatch], jax.Array]:
    """Returns the jitted score_batch(params, frozen, batch): log-probs of its sampled tokens,
    float32 [B, C], one micro-batch after the other."""
    shards, limit = row_shards(mesh), microbatch_tokens(c, mesh)
    score = make_scorer(policy, c, temperature, mesh)

    def score_batch(params: Params, frozen: Params, batch: TrainBatch) -> jax.Array:
        B, T = batch.tokens_BT.shape
        parts = B // rows_of_microbatch(B, T, limit, shards)
        split_batch = jax.tree.map(lambda x: split(x, parts, shards), batch)
        logprobs = jax.lax.map(lambda part: score(params, frozen, part)[0], split_batch)
        return joined(logprobs, shards)

    return jax.jit(score_batch, out_shardings=batch_sharding(mesh, 2))


def make_scorer(policy: Policy, c: UpdateSection, temperature: float, mesh: Mesh) -> Scorer:
    """Returns score(params, frozen, batch): of a micro-batch's sampled tokens."""
    shards = row_shards(mesh)
    chunk_tokens = shards * max((c.logits_mib << 20) // (4 * policy.config.vocab_size), 1)

    def score(params: Params, frozen: Params, batch: TrainBatch) -> Scores:
        whole = with_adapters(frozen, params)
        return score_sampled(
            policy, whole, batch, temperature, chunk_tokens, shards, c.share_prompts
        )

    return score


def microbatch_tokens(c: UpdateSection, mesh: Mesh) -> int:
    """Row slots, over all devices, whose gradient is computed at a time; the default resolved."""
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    default = mesh.size * (MICROBATCH_ON_CPU if on_cpu else MICROBATCH)
    return c.max_tokens_per_microbatch or default


def score_sampled(
    policy: Policy,
    params: Params,
    batch: TrainBatch,
    temperature: float,
    chunk_tokens: int | None = None,
    shards: int = 1,
    branches: bool = True,
) -> Scores:
    """Log-probs and entropies of a batch's sampled tokens; logits are computed for no other.

    Without `branches` no two completions of the batch share a prompt.
    """
    hidden_BTD, _ = policy.hidden(
        params,
        batch.tokens_BT,
        batch.positions_BT,
        Packed(batch.group_BT, batch.branch_BT if branches else None, batch.positions_BT),
    )
    hidden_BCD = jnp.take_along_axis(hidden_BTD, batch.predictor_BC[..., None], axis=1)
    unembed = functools.partial(policy.unembed, params)
    if policy.mesh is not None and shards > 1:
        head_SVD = head_of_each_shard(policy.head(params), shards, policy.mesh)
        unembed = functools.partial(jax.vmap(policy.unembed_by), head_SVD)
    # Each device's rows as one, so that a chunk is as large as it may be however short rows are.
    scores = token_logprobs(
        keep_rows(hidden_BCD.reshape(shards, -1, hidden_BCD.shape[-1]), policy.mesh),
        unembed,
        batch.targets_BC.reshape(shards, -1),
        temperature,
        chunk_tokens,
    )
    logprobs_BC, entropy_BC = (x.reshape(batch.targets_BC.shape) for x in scores)
    return logprobs_BC, entropy_BC


def head_of_each_shard(head_VD: jax.Array, shards: int, mesh: Mesh) -> jax.Array:
    """float32 [S, V, D]: a copy for each shard of rows, on the devices that have the shard.

    So the head is gathered once, and its gradient stays with the shard until all chunks of logits
    have added to it. Of a head that shards have in common XLA does both for each chunk. It travels
    in the dtype it comes in; in float32 the chunks add up.
    """
    head_SVD = jnp.broadcast_to(head_VD, (shards, *head_VD.shape))
    layout = NamedSharding(mesh, partition(mesh, ("rows", "vocab", "embed"), head_SVD.shape))
    return jax.lax.with_sharding_constraint(head_SVD, layout).astype(jnp.float32)


def split(x: jax.Array, parts: int, shards: int) -> jax.Array:
    """[B, ...] -> [parts, B / parts, ...]; a part has rows of every shard, so that none move."""
    x = x.reshape(shards, parts, -1, *x.shape[1:]).swapaxes(0, 1)
    return x.reshape(parts, -1, *x.shape[3:])


def joined(x: jax.Array, shards: int) -> jax.Array:
    """The inverse of `split`."""
    parts, rows, *rest = x.shape
    return x.reshape(parts, shards, rows // shards, *rest).swapaxes(0, 1).reshape(-1, *rest)
