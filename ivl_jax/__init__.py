"""Inverse value learning in JAX."""
