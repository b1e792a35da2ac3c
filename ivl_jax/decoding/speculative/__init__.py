"""Speculative decoding: a draft proposes tokens, the composition accepts or replaces them."""
