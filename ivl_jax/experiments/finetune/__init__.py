"""Fine-tuned references: settings, the order of their sweep, one run, the report."""
