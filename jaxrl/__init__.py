"""The trainer: a Flax policy, trained with Optax on a JAX device mesh.

Nothing is imported here: reading a configuration must not start jax.
"""
