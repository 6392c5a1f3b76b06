"""One optimizer step, compiled once for each row length: (state, batch) -> (state, metrics)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl.config import AlgorithmSection, OptimizerSection
from jaxrl.losses import grpo_loss, token_logprobs
from jaxrl.mesh import batch_sharding
from jaxrl.models.decoder import Params, Policy
from jaxrl.models.lora import with_adapters
from jaxrl.types import TrainBatch


class TrainState(NamedTuple):
    """All that an update changes. Float32 master parameters, optimizer state sharded like them."""

    params: Params
    opt_state: Any
    step: jax.Array  # int32, updates tried, skipped ones included
    skipped_in_a_row: jax.Array  # int32, updates skipped since the last one that was applied


Update = Callable[[TrainState, TrainBatch], tuple[TrainState, dict[str, jax.Array]]]


def make_optimizer(c: OptimizerSection) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW with linear warm-up (Loshchilov and Hutter, 1711.05101)."""
    return optax.chain(
        optax.clip_by_global_norm(c.max_grad_norm),
        optax.adamw(
            lambda count: c.learning_rate * jnp.minimum(1.0, (count + 1) / max(c.warmup_steps, 1)),
            b1=c.beta1,
            b2=c.beta2,
            eps=c.eps,
            weight_decay=c.weight_decay,
        ),
    )


def init_state(params: Params, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """A fresh state around `params`, which lie on `mesh`; moments lie as their parameters do."""
    replicated = NamedSharding(mesh, P())
    zero = jax.device_put(jnp.zeros((), jnp.int32), replicated)
    shardings = opt_state_shardings(params, optimizer, mesh)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings)(params)
    return TrainState(params, opt_state, zero, jnp.copy(zero))


def opt_state_shardings(params: Params, optimizer: optax.GradientTransformation, mesh: Mesh) -> Any:
    """Each leaf that mirrors a parameter gets its sharding, every other one is replicated."""
    return optax.tree_map_params(
        optimizer,
        lambda _, param: param.sharding,
        jax.eval_shape(optimizer.init, params),
        params,
        transform_non_params=lambda _: NamedSharding(mesh, P()),
    )


def make_update(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    algorithm: AlgorithmSection,
    temperature: float,
    mesh: Mesh,
    frozen: Params | None = None,
) -> Update:
    """Returns update(state, batch) -> (state, metrics). The state passed in is consumed.

    With `frozen` weights the state's parameters are adapters, and only they change.

    One update a batch: the proximal policy is the current one, so the ratio is 1 and what differs
    from the engine is left to the importance weight (algorithm.correction).

    An update whose loss or gradient is not finite is skipped: parameters and optimizer state stay
    bitwise as they were. So is one with nothing to train on; only the former is counted in
    `skipped_in_a_row`. Metrics: those of `losses.grpo_loss`, and `loss`, `entropy`, `grad_norm`
    (before clipping), `update_norm`, `tokens/trained`, `update/skipped` (1 if it was).
    """
    cap = algorithm.correction_cap if algorithm.correction == "token_tis" else None

    def loss_fn(
        params: Params, frozen: Params, batch: TrainBatch
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        logits_BTV = policy.logits(with_adapters(frozen, params), batch.tokens_BT)
        logprobs_BT, entropy_BT = token_logprobs(logits_BTV, batch.tokens_BT, temperature)
        loss, metrics = grpo_loss(
            logprobs_BT,
            jax.lax.stop_gradient(logprobs_BT),
            batch,
            clip_low=algorithm.clip_low,
            clip_high=algorithm.clip_high,
            correction_cap=cap,
        )
        tokens = batch.loss_mask_BT.sum()
        entropy = (entropy_BT * batch.loss_mask_BT).sum() / jnp.maximum(tokens, 1.0)
        return loss, metrics | {"entropy": entropy, "tokens/trained": tokens}

    def step(
        state: TrainState, batch: TrainBatch, frozen: Params
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params, frozen, batch
        )
        changes, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, changes)
        grad_norm, update_norm = optax.tree.norm(grads), optax.tree.norm(changes)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(update_norm)
        apply = finite & (metrics["tokens/trained"] > 0)

        def keep(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda n, o: jnp.where(apply, n, o), new, old)

        state = TrainState(
            keep(params, state.params),
            keep(opt_state, state.opt_state),
            state.step + 1,
            jnp.where(apply, 0, state.skipped_in_a_row + ~finite),
        )
        metrics |= {
            "loss": loss,
            "grad_norm": grad_norm,
            "update_norm": jnp.where(apply, update_norm, 0.0),
            "update/skipped": 1.0 - apply,
        }
        return state, metrics

    compiled: dict[Any, Callable] = {}

    def update(state: TrainState, batch: TrainBatch) -> tuple[TrainState, dict[str, jax.Array]]:
        batch = jax.tree.map(lambda x: jax.device_put(x, batch_sharding(mesh, x.ndim)), batch)
        if not compiled:
            # What comes out lies as what went in: the state of step 100 is the state of step 0.
            shardings = jax.tree.map(lambda x: x.sharding, state)
            compiled[None] = jax.jit(
                step, donate_argnums=0, out_shardings=(shardings, NamedSharding(mesh, P()))
            )
        return compiled[None](state, batch, {} if frozen is None else frozen)

    return update
