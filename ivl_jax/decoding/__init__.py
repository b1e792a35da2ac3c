"""Decoding: composed logits to tokens to text, batched, sharded and streamed."""
