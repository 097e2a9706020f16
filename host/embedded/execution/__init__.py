"""The graph engine: registry, validation, execution, caching, and the way from saved workflows to prompts."""
