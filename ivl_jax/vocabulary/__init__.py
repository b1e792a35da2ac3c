"""Vocabulary maps: how the logits of one vocabulary are read in another, and how a map is built."""
