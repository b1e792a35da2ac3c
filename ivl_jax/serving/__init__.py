"""HTTP over the engine: OpenAI's API for a base model and its value networks."""
