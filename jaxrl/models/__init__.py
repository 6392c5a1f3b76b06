"""Policies: what a Hugging Face `config.json` describes, as a Flax decoder."""
