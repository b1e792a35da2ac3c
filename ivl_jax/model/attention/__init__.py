"""Attention: the plain form over a mask, and forms that never hold all scores at once."""
