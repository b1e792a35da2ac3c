"""Benchmarks: what a base with value networks on top is worth, one benchmark a file."""
