"""The block eigensolver, its stopping rules and its certificates."""
