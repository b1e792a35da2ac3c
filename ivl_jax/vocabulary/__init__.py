"""Vocabulary maps, which carry logits from one vocabulary to another: how to build and use them."""
