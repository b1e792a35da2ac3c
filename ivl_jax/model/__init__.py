"""One decoder for every supported family: architecture, layers, pure functions, caches."""
