"""What is recognised in the programs of the JAX that is there."""
