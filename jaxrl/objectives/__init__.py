"""What an update minimises: docs/algorithms.md has every name with its formula and source."""
