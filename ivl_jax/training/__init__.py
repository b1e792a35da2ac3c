"""Training: objective, optimizer, step, loop."""
