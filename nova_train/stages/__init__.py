"""One module per stage: a config dataclass and `run(config)`, readable top to bottom as the algorithm."""
