"""What lifts transfer: ways to train a value network beside S, chosen on validation rows."""
