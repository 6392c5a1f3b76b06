"""AdamW on all parameters at once or, where its moments lie on the hosts, on a slice at a time."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

HOST = "pinned_host"  # jax's kind of host memory that devices copy to and from
_MOST_SLICES = 64  # of one parameter

# step(params, grads, state) -> the new parameters and state, the sum of squares of the change
Step = Callable[[Any, Any, Any], tuple[Any, Any, jax.Array]]


class Optimizer(NamedTuple):
    clip: optax.GradientTransformation  # of all gradients together; has no state
    adamw: optax.GradientTransformation  # of every element alone
    rate: Callable[[jax.Array], jax.Array]  # steps taken -> learning rate of the next
    offload: str = "none"  # see config.OptimizerSection

    def init(self, params: Any) -> Any:
        return self.adamw.init(params)

    def learning_rate(self, state: Any) -> jax.Array:
        """Of the step that `apply` would take."""
        return self.rate(state[0].count)

    def apply(
        self, grads: Any, state: Any, params: Any, ok: jax.Array, shardings: Any
    ) -> tuple[Any, Any, jax.Array]:
        """One step, within a jitted function.

        Args:
          ok: bool; where it is false, parameters and state come back bitwise as they were.
          shardings: of the parameters.

        Returns:
          The new parameters, the new state, and the norm of the change that the step asked for.
        """
        grads, _ = self.clip.update(grads, self.clip.init(params))
        step = functools.partial(_step, self.adamw, ok)
        if self.offload == "host":
            params, state, squares = _leaf_by_leaf(step, params, grads, state, shardings)
        else:
            params, state, squares = step(params, grads, state)
        return params, state, jnp.sqrt(squares)


def _step(
    adamw: optax.GradientTransformation, ok: jax.Array, params: Any, grads: Any, state: Any
) -> tuple[Any, Any, jax.Array]:
    changes, new_state = adamw.update(grads, state, params)

    def keep(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, old)

    new_params = keep(optax.apply_updates(params, changes), params)
    return new_params, keep(new_state, state), optax.tree.norm(changes, squared=True)


def _leaf_by_leaf(
    step: Step, params: Any, grads: Any, state: Any, shardings: Any
) -> tuple[Any, Any, jax.Array]:
    """`step` of every parameter on its own, with its part of the state."""
    structure = jax.tree.structure(params)

    def mirrors(node: Any) -> bool:  # one of the moments: a tree like the parameters
        return jax.tree.structure(node) == structure

    nodes, whole = jax.tree.flatten(state, is_leaf=mirrors)
    columns = [jax.tree.leaves(n) if mirrors(n) else [n] * structure.num_leaves for n in nodes]
    done = [
        _slice_by_slice(step, param, grad, whole.unflatten(parts), sharding)
        for param, grad, parts, sharding in zip(
            *map(jax.tree.leaves, (params, grads)),
            zip(*columns, strict=True),
            jax.tree.leaves(shardings),
            strict=True,
        )
    ]
    new_columns = zip(*(whole.flatten_up_to(new) for _, new, _ in done), strict=True)
    new_nodes = [
        structure.unflatten(column) if mirrors(node) else column[0]
        for node, column in zip(nodes, new_columns, strict=True)
    ]
    new_params = structure.unflatten([param for param, _, _ in done])
    squares = jnp.stack([squares for _, _, squares in done]).sum()
    return new_params, whole.unflatten(new_nodes), squares


def _slice_by_slice(
    step: Step, param: jax.Array, grad: jax.Array, state: Any, sharding: Any
) -> tuple[Any, Any, jax.Array]:
    """`step` of one parameter; a slice of its moments is on the devices at a time.

    A loop, because XLA starts every copy that is not in one at the beginning of the program, and
    then all moments are on the devices together, the old and the new ones.
    """
    axis, slices = slicing(param.shape, sharding.shard_shape(param.shape))
    size = param.shape[axis] // slices

    def cut(x: jax.Array, i: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis)

    def put(x: jax.Array, part: jax.Array, i: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(x, part, i * size, axis)

    def bring(moment: jax.Array, before: jax.Array, i: jax.Array) -> jax.Array:
        if before.shape != param.shape:  # a count, as it was before the first slice
            return before
        return jax.device_put(cut(moment, i), jax.memory.Space.Device)

    def take_back(moment: jax.Array, new: jax.Array, i: jax.Array) -> jax.Array:
        if moment.shape != param.shape:
            return new
        return put(moment, jax.device_put(new, jax.memory.Space.Host), i)

    def body(i: jax.Array, carry: tuple) -> tuple:
        param, after, squares = carry
        here = jax.tree.map(lambda a, before: bring(a, before, i), after, state)
        new_param, new, more = step(cut(param, i), cut(grad, i), here)
        after = jax.tree.map(lambda a, n: take_back(a, n, i), after, new)
        return put(param, new_param, i), after, squares + more

    return jax.lax.fori_loop(0, slices, body, (param, state, jnp.zeros((), jnp.float32)))


def slicing(shape: tuple[int, ...], local: tuple[int, ...]) -> tuple[int, int]:
    """The axis to cut an array along, and into how many slices: as many as there can be.

    Not an axis that devices split (`local` is one device's shape). A slice of one of the last two
    axes is a multiple of 16 or 128, the tiles of a TPU: its compiler crashes on others.
    """
    tiles = [*[1] * (len(shape) - 2), *(16, 128)[-len(shape) :]]
    choices = [(0, 1)] + [
        (axis, slices)
        for axis, (size, tile) in enumerate(zip(shape, tiles, strict=True))
        for slices in range(1, _MOST_SLICES + 1)
        if local[axis] == size and size % (slices * tile) == 0
    ]
    return max(choices, key=lambda choice: choice[1])
