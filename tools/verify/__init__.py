"""Shows that a Hugging Face model converts exactly: `python -m tools.verify`."""
