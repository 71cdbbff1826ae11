"""Curvature of neural-network losses in JAX."""
