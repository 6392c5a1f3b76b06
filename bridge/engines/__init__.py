"""The worker half: rollout engines and what they load weights with. Never imports jax."""
