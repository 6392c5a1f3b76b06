"""Everything between the trainer's mesh and the rollout engines.

Nothing is imported here: the worker half must load without jax, the trainer half without torch.
"""
