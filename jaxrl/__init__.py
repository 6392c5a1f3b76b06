"""The trainer: a Flax policy, trained with Optax on a JAX device mesh.

Nothing heavy is imported here: reading a configuration must not start jax.
"""

from jaxrl.no_tpu import expect_no_tpu

expect_no_tpu()
