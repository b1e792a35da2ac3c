"""The shipped family of small models: its text, invented facts, tokenizers and pre-training."""
