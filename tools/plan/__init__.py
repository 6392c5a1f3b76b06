"""Says before a run whether it fits, and how fast it can be at most: `python -m tools.plan`."""
